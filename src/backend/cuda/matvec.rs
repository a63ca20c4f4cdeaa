//! Products of a few tokens with packed weights, read once: `kernels/matvec.cu`.

use anyhow::{Result, ensure};

use super::compile::Kernel;
use super::device::{Arg, Buffer, Device, Geometry};
use super::weight::Weight;
use super::{Cuda, Tensor};

/// Tokens that one launch takes.
pub(super) const MAX_TOKENS: usize = 32;

/// What a product does with its result; names as in matvec.cu.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Destination {
    F16,
    F32,
    Add,
    Swiglu,
}

impl Destination {
    fn macro_name(self) -> &'static str {
        match self {
            Destination::F16 => "OUTPUT=F16",
            Destination::F32 => "OUTPUT=F32",
            Destination::Add => "OUTPUT=ADD",
            Destination::Swiglu => "OUTPUT=SWIGLU",
        }
    }
}

/// One of the products side by side in a launch.
pub(super) struct Operand<'a> {
    pub weight: &'a Weight,
    pub bias: Option<&'a Tensor>,
    /// Address of the result.
    pub y: u64,
}

/// Inputs of a product on the device.
#[derive(Clone, Copy)]
pub(super) struct Input<'a> {
    /// Address of F16 `[tokens, cols]`; with `norm` F32 `[1, cols]`.
    pub x: u64,
    /// Gain F32 `[cols]` and epsilon of a norm to take first.
    pub norm: Option<(&'a Tensor, f32)>,
    /// F32 `[tokens]`: what each token's products are multiplied with.
    pub scales: Option<&'a Buffer>,
    pub tokens: usize,
}

impl Cuda {
    /// Queues the products of one input with several weights of one width, those stored alike in one launch.
    pub(super) fn matvec(&self, input: Input, parts: &[Operand], output: Destination) -> Result<()> {
        for alike in parts.chunk_by(|a, b| a.weight.stored == b.weight.stored) {
            ensure!(
                output != Destination::Swiglu || alike.len() == 2,
                "gate and up are stored in different formats; generation on the GPU wants one"
            );
            self.launch_matvec(input, alike, output)?;
        }
        Ok(())
    }

    fn launch_matvec(&self, input: Input, parts: &[Operand], output: Destination) -> Result<()> {
        let weight = parts[0].weight;
        let rows: usize = match output {
            Destination::Swiglu => 2 * weight.rows,
            _ => parts.iter().map(|part| part.weight.rows).sum(),
        };
        let shape = Shape::new(weight, rows, &input, &self.device)?;
        let mut words = [0u64; 30];
        let mut tiles = 0;
        for i in 0..3 {
            // Absent parts repeat the last, whose tiles are all taken already.
            let part = &parts[i.min(parts.len() - 1)];
            words[7 * i..7 * i + 7].copy_from_slice(&part.weight.argument());
            words[21 + i] = part.y;
            words[24 + i] = part.bias.map_or(0, Tensor::at);
            match output {
                Destination::Swiglu if i == 0 => tiles += part.weight.rows.div_ceil(8 * shape.row_tiles),
                Destination::Swiglu => (),
                _ if i < parts.len() => tiles += part.weight.rows.div_ceil(16 * shape.row_tiles),
                _ => (),
            }
            set_half(&mut words[27..], i, part.weight.rows as u32);
            set_half(&mut words[27..], 3 + i, tiles as u32);
        }
        let mut defines = weight.defines();
        defines.push(output.macro_name().to_string());
        defines.extend(shape.defines());
        let (gain, eps) = input.norm.map_or((0, 0.0), |(gain, eps)| (gain.at(), eps));
        let blocks = tiles.min(shape.per_multiprocessor * self.device.multiprocessors());
        self.device.launch_overlapping(
            Kernel { name: "matvec", defines },
            Geometry { shared: shape.shared as u32, ..Geometry::flat(blocks, 32 * shape.warps as u32) },
            &[
                Arg::Struct(&words),
                Arg::Pointer(input.x),
                Arg::Pointer(gain),
                Arg::Pointer(input.scales.map_or(0, Buffer::at)),
                Arg::U32(input.tokens as u32),
                Arg::F32(eps),
            ],
        )
    }
}

/// Tiles and stages of a launch; names as in matvec.cu.
struct Shape {
    row_tiles: usize,
    token_tiles: usize,
    tokens: usize,
    warps: usize,
    stages: usize,
    norm: bool,
    /// Blocks that share a multiprocessor.
    per_multiprocessor: usize,
    /// Dynamic shared memory of a block, bytes.
    shared: usize,
}

/// Shared memory of a block that the system keeps, and that kernels declare themselves, bytes.
const KEPT: usize = 2 << 10;

impl Shape {
    fn new(weight: &Weight, rows: usize, input: &Input, device: &Device) -> Result<Self> {
        let batch = input.tokens;
        ensure!((1..=MAX_TOKENS).contains(&batch), "{batch} tokens in a product of 1 to {MAX_TOKENS}");
        let token_tiles = batch.div_ceil(8).next_power_of_two();
        let tokens = if batch == 1 { 1 } else { 8 * token_tiles };
        // Two tiles read each token's inputs once for 32 rows.
        let row_tiles = if tokens > 1 { 2 } else { 1 };
        let norm = input.norm.is_some();
        let stage = row_tiles * (64 * weight.lane_bytes() + 16 * weight.staged_grid_bytes())
            + if norm { 0 } else { tokens * 256 };
        let sums = row_tiles * token_tiles * 16 * if tokens == 1 { 1 } else { 8 };
        let sum_buffers = if sums <= 256 { 2 } else { 1 };
        let shared = |warps: usize, stages: usize| {
            let normed = if norm { weight.cols.next_multiple_of(128) * 2 } else { 0 };
            warps * (stages * stage + sum_buffers * sums * 4) + normed
        };
        // How evenly tiles fall on the multiprocessors, in 1 / 1024.
        let tiles = rows.div_ceil(16 * row_tiles);
        let evenness = |blocks: usize| {
            let slots = blocks * device.multiprocessors();
            1024 * tiles / (tiles.div_ceil(slots) * slots)
        };
        let most_blocks = if tokens > 8 { 1 } else { 3 };
        let per_multiprocessor =
            (1..=most_blocks).max_by_key(|&blocks| evenness(blocks) + [0, 0, 128, 64][blocks]);
        let per_multiprocessor = per_multiprocessor.unwrap_or(1);
        // Half of the shared memory: the next launch's first stages fill while this one ends.
        let most = device.shared_memory() - KEPT;
        let planned = if tokens > 8 { most } else { most / 2 / per_multiprocessor };
        let stages =
            |warps: usize| (2..=6).rev().find(|&stages| shared(warps, stages) <= planned).unwrap_or(2);
        let Some(warps) = [8, 4, 2].into_iter().find(|&warps| shared(warps, stages(warps)) <= most) else {
            anyhow::bail!("rows of {} are too wide for generation on the GPU", weight.cols)
        };
        let stages = stages(warps);
        let shared = shared(warps, stages);
        let per_multiprocessor = per_multiprocessor.min(device.shared_memory() / (shared + KEPT)).max(1);
        Ok(Shape { row_tiles, token_tiles, tokens, warps, stages, norm, per_multiprocessor, shared })
    }

    fn defines(&self) -> [String; 7] {
        let Shape { row_tiles, token_tiles, tokens, warps, stages, .. } = self;
        [
            format!("ROW_TILES={row_tiles}"),
            format!("TOKEN_TILES={token_tiles}"),
            format!("TOKENS={tokens}"),
            format!("WARPS={warps}"),
            format!("STAGES={stages}"),
            format!("NORM={}", u8::from(self.norm)),
            format!("BLOCKS={}", self.per_multiprocessor),
        ]
    }
}

/// Sets 32-bit number `i` of a run of 64-bit words.
fn set_half(words: &mut [u64], i: usize, value: u32) {
    words[i / 2] |= u64::from(value) << (32 * (i % 2));
}
