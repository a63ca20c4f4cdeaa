//! Rotation, what caches do to keys and values, and attention over whole sequences.

use anyhow::{Result, ensure};

use super::compile::Kernel;
use super::device::{Arg, Geometry};
use super::{Cuda, Float, Tensor, macro_of};
use crate::backend::kv_cache::KvCache;
use crate::backend::{AttentionShape, Batch, Pairing, Rope};

impl Cuda {
    /// Rotates every head in place: [`Backend::rope`](crate::backend::Backend::rope).
    pub(super) fn rotate(&self, x: &mut Tensor, rope: &Rope, batch: Batch) -> Result<()> {
        let (head_dim, pairs) = (rope.head_dim, rope.pairs());
        ensure!(
            head_dim.is_multiple_of(2) && 2 * pairs <= head_dim && pairs <= MOST_PAIRS,
            "{pairs} rotated pairs in heads of {head_dim}: the GPU takes up to {MOST_PAIRS}, and heads of even width"
        );
        ensure!(x.cols.is_multiple_of(head_dim), "{} columns in heads of {head_dim}", x.cols);
        ensure!(x.rows == batch.sequences * batch.tokens, "{} rows for {batch:?}", x.rows);
        x.make_unique(&self.device)?;
        let neighbours = rope.pairing == Pairing::Neighbours;
        let whole = !neighbours && 2 * pairs == head_dim && pairs.is_multiple_of(4);
        let run = format!("RUN={}", if whole { 4 } else { 1 });
        self.device.launch(
            Kernel::new("rope", &[&macro_of("X", x.float), &neighbours_define(rope), &run]),
            Geometry::flat(x.rows, 256),
            &[
                Arg::Pointer(x.at()),
                Arg::Struct(&frequencies(&rope.angles(batch.tokens))),
                Arg::U32((x.cols / head_dim) as u32),
                Arg::U32(head_dim as u32),
                Arg::U32(pairs as u32),
                Arg::U32(batch.tokens as u32),
                Arg::U32(0),
                Arg::F32(rope.magnitude),
            ],
        )
    }

    /// Mixes values: [`Backend::attention`](crate::backend::Backend::attention).
    pub(super) fn mix(
        &self,
        [q, k, v]: [&Tensor; 3],
        sinks: Option<&Tensor>,
        shape: &AttentionShape,
        batch: Batch,
    ) -> Result<Tensor> {
        let AttentionShape { heads, kv_heads, head_dim, window, scale } = *shape;
        ensure!(
            head_dim % 16 == 0 && head_dim <= 256,
            "head size {head_dim}: the GPU takes multiples of 16 up to 256"
        );
        ensure!(kv_heads > 0 && heads % kv_heads == 0, "{heads} query heads for {kv_heads} key heads");
        ensure!(window != Some(0), "a sliding window of 0 sees nothing");
        for (x, count) in [(q, heads), (k, kv_heads), (v, kv_heads)] {
            ensure!(
                x.rows == batch.sequences * batch.tokens && x.cols == count * head_dim,
                "[{}, {}] for {shape:?}",
                x.rows,
                x.cols
            );
        }
        if let Some(sinks) = sinks {
            ensure!(
                sinks.float == Float::F32 && sinks.count() == heads,
                "{} sinks for {heads} heads",
                sinks.count()
            );
        }
        let (q, k, v) = (self.rounded(q)?, self.rounded(k)?, self.rounded(v)?);
        let y = Tensor::empty(&self.device, q.rows, q.cols, self.float)?;
        let (mut kernel, block_rows, geometry) = match self.float {
            Float::F32 => {
                (Kernel::new("attention_precise", &[&format!("D={head_dim}")]), 8, Geometry::flat(0, 256))
            }
            _ => flash_attention(head_dim),
        };
        kernel.defines.push(sinks_define(sinks));
        let grid = [batch.tokens.div_ceil(block_rows), heads, batch.sequences];
        self.device.launch(
            kernel,
            Geometry { grid, ..geometry },
            &[
                Arg::Pointer(q.at()),
                Arg::Pointer(k.at()),
                Arg::Pointer(v.at()),
                Arg::Pointer(sinks.map_or(0, Tensor::at)),
                Arg::Pointer(y.at()),
                Arg::U32(batch.tokens as u32),
                Arg::U32(heads as u32),
                Arg::U32(kv_heads as u32),
                Arg::U32(window_argument(window)),
                Arg::F32(scale),
            ],
        )?;
        Ok(y)
    }

    /// Rounds keys or values: [`Backend::round_cache`](crate::backend::Backend::round_cache).
    pub(super) fn round_runs(
        &self,
        x: &mut Tensor,
        kind: KvCache,
        head_dim: usize,
        scale: f32,
    ) -> Result<()> {
        if kind == KvCache::Exact {
            return Ok(());
        }
        ensure!(x.cols.is_multiple_of(head_dim), "{} columns in heads of {head_dim}", x.cols);
        x.make_unique(&self.device)?;
        let (run, mut defines) = cache_defines(kind, head_dim);
        defines.push(macro_of("X", x.float));
        let runs = x.count() / run;
        self.device.launch(
            Kernel { name: "round_cache", defines },
            Geometry::flat(runs.div_ceil(8), 256),
            &[Arg::Pointer(x.at()), Arg::U64(runs as u64), Arg::F32(scale)],
        )
    }
}

/// Pairs that `struct Frequencies` of the kernels has room for.
const MOST_PAIRS: usize = 128;

/// Returns `struct Frequencies` of the kernels: [`MOST_PAIRS`] floats, of which the first `angles.len()` matter.
pub(super) fn frequencies(angles: &[f32]) -> [u64; MOST_PAIRS / 2] {
    let mut words = [0u64; MOST_PAIRS / 2];
    for (word, two) in words.iter_mut().zip(angles.chunks(2)) {
        let bits = |value: Option<&f32>| u64::from(value.map_or(0, |value| value.to_bits()));
        *word = bits(two.first()) | bits(two.get(1)) << 32;
    }
    words
}

/// Returns the definition for the pairs that turn together.
pub(super) fn neighbours_define(rope: &Rope) -> String {
    format!("NEIGHBOURS={}", u8::from(rope.pairing == Pairing::Neighbours))
}

/// Returns how many values a cache rounds together, and the definitions of `cache.cuh`.
pub fn cache_defines(kind: KvCache, head_dim: usize) -> (usize, Vec<String>) {
    let (name, run, bits) = match kind {
        KvCache::Exact => ("EXACT", head_dim, 32),
        KvCache::Bf16 => ("BF16", head_dim, 32),
        KvCache::Fp8 => ("FP8", head_dim, 32),
        KvCache::Int8 { group: None } => ("INT8", head_dim, 32),
        KvCache::Int8 { group: Some(group) } => ("INT8", group, 16),
    };
    (run, vec![format!("KV={name}"), format!("RUN={run}"), format!("SCALE_BITS={bits}")])
}

/// Returns how many latest positions a query sees; none at all is a number that no position plus it overflows.
pub(super) fn window_argument(window: Option<usize>) -> u32 {
    window.map_or(1 << 30, |window| window.min(1 << 30) as u32)
}

/// Returns the definition for attention with or without sinks.
pub(super) fn sinks_define(sinks: Option<&Tensor>) -> String {
    format!("SINKS={}", u8::from(sinks.is_some()))
}

/// Returns the kernel for a head size, the queries a block takes, and its geometry without the grid. Heads past 128 take
/// smaller tiles, so that output, scores and queries of a warp stay in registers.
fn flash_attention(head_dim: usize) -> (Kernel, usize, Geometry) {
    let (tile, warps) = if head_dim <= 128 { (64, 8) } else { (32, 4) };
    let defines = [format!("D={head_dim}"), format!("BC={tile}"), format!("WARPS={warps}")];
    let shared = 4 * tile * (head_dim + 8) * 2;
    let geometry = Geometry { grid: [0; 3], block: [32 * warps, 1], shared: shared as u32 };
    (Kernel { name: "attention", defines: defines.to_vec() }, 16 * warps as usize, geometry)
}
