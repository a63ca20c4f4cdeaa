//! Opened models as evaluation takes them.

use anyhow::{Context, Result};

use crate::artifact::file_name;
use crate::backend::Backend;
use crate::backend::kv_cache::KvCache;
use crate::checkpoint::Checkpoint;
use crate::eval::{About, Subject};
use crate::model::Model;

/// Loads a model.
pub fn load<B: Backend>(backend: &B, checkpoint: &Checkpoint) -> Result<Model<B>> {
    Model::load(backend, &checkpoint.config, checkpoint)
        .with_context(|| format!("{}", checkpoint.path.display()))
}

/// Returns what rows say of a model.
pub fn about(checkpoint: &Checkpoint) -> About {
    About {
        name: file_name(&checkpoint.path),
        format: checkpoint.format_name(),
        bytes: checkpoint.total_bytes(),
        bits_per_weight: checkpoint.bits_per_weight(),
    }
}

/// Returns a model with the cache it is stored with.
pub fn subject<'a, M>(checkpoint: &Checkpoint, model: &'a M) -> Subject<'a, M> {
    let About { name, format, bytes, bits_per_weight } = about(checkpoint);
    Subject { name, format, bytes, bits_per_weight, model, kv_cache: KvCache::Exact }
}

/// The exact cache, and those that were asked for.
pub fn kinds(kv_caches: &[KvCache]) -> impl Iterator<Item = KvCache> {
    [KvCache::Exact].into_iter().chain(kv_caches.iter().copied())
}

/// Returns a model with every cache.
pub fn variants<'a, M>(
    kv_caches: &[KvCache],
    checkpoint: &Checkpoint,
    model: &'a M,
) -> impl Iterator<Item = Subject<'a, M>> {
    kinds(kv_caches).map(move |kv_cache| {
        let About { name, format, bytes, bits_per_weight } = about(checkpoint).with_cache(kv_cache);
        Subject { name, format, bytes, bits_per_weight, model, kv_cache }
    })
}
