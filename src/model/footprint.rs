//! What a forward pass takes of a device's memory beside weights.

use super::config::Config;
use super::stages::Half;
use crate::backend::footprint::Footprint;

/// Returns what a pass of `tokens` tokens takes beside weights: the residual stream, its norm and the product's copy of it
/// in F32, and what the larger half of a layer has at once: q, k, v, their rotated or packed copies and the mixed values, or
/// gate, up, their product and its copy.
pub fn pass_bytes(device: &impl Footprint, config: &Config, tokens: usize) -> u64 {
    let half_values = |layer, half| {
        let stages = config.stages(layer).into_iter().filter(|stage| stage.half == half);
        stages.map(|stage| if stage.reads_norm() { stage.rows() } else { 2 * stage.cols() }).sum::<usize>()
    };
    let halves = (0..config.layers.len()).flat_map(|layer| Half::ALL.map(|half| half_values(layer, half)));
    let half = halves.max().unwrap_or(0) as u64;
    tokens as u64 * (3 * 4 * config.hidden_size as u64 + half * device.activation_bytes())
}
