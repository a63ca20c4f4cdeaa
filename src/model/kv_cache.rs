//! What keys and values of a model take of memory.

use serde::Serialize;

use super::config::Config;
use crate::backend::kv_cache::KvCache;

/// Memory of one kind of cache, for reports.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct KvMemory {
    /// Name as on the command line.
    pub kv_cache: String,
    /// Bytes that a token takes in all layers, scales included.
    pub bytes_per_token: u64,
    /// Share saved of what bf16 takes, 0 to 1.
    pub saved: f64,
}

impl KvMemory {
    /// Returns what a token of that model takes.
    pub fn new(kind: KvCache, config: &Config) -> Self {
        let heads = 2 * config.num_hidden_layers * config.num_key_value_heads;
        let head = kind.head_bytes(config.head_dim);
        KvMemory {
            kv_cache: kind.to_string(),
            bytes_per_token: (heads * head) as u64,
            saved: 1.0 - head as f64 / KvCache::Bf16.head_bytes(config.head_dim) as f64,
        }
    }
}
