//! What a forward pass takes of a device's memory beside weights.

use super::config::Config;
use crate::backend::footprint::Footprint;

/// Returns what a pass of `tokens` tokens takes beside weights: the residual stream, its norm and the product's copy of it
/// in F32, and what the larger half of a layer has at once: q, k, v, their rotated or packed copies and the mixed values, or
/// gate, up, their product and its copy.
pub fn pass_bytes(device: &impl Footprint, config: &Config, tokens: usize) -> u64 {
    let q = config.num_attention_heads * config.head_dim;
    let kv = config.num_key_value_heads * config.head_dim;
    let half = (3 * q + 2 * kv).max(4 * config.intermediate_size) as u64;
    tokens as u64 * (3 * 4 * config.hidden_size as u64 + half * device.activation_bytes())
}
