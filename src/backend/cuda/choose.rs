//! The end of a decoding step: every sequence's next token is chosen, recorded and moved on to without asking the host.
//!
//! `kernels/advance.cu` takes the most likely token; of texts that are sampled, `nucleus.cu` finds what top-p keeps, ten
//! bits of the smallest weight at a time, and `draw.cu` draws.

use anyhow::{Result, ensure};

use super::compile::Kernel;
use super::device::{Arg, Buffer, Device, Geometry};
use super::u32_bytes;
use crate::generate::Draw;

/// Blocks that share a sequence's logits: at most 32, whose sums one block of 1024 threads takes together.
const BLOCKS: usize = 16;

/// Most tokens of a block: what `nucleus.cu` sums in 32 bits.
const BLOCK_TOKENS: usize = 1 << 17;

/// Tokens of several sequences, and how they go on.
pub struct Chooser {
    sequences: usize,
    vocab: usize,
    capacity: usize,
    /// F32 `[sequences, vocab]`: what is chosen from.
    pub logits: Buffer,
    /// u32 `[sequences + 1]`: the next tokens, which a step is fed; not 0 at the end after logits that are not finite.
    pub ids: Buffer,
    /// u32 `[sequences]`: the position of that token.
    pub positions: Buffer,
    /// u32 `[sequences, capacity]`: the token at each position.
    history: Buffer,
    /// `struct Draw` `[sequences]`
    draws: Buffer,
    /// What blocks found, and how many have; u32 `[sequences, vocab]` weights once a text was sampled.
    best: Buffer,
    weights: Option<Buffer>,
    bins: Buffer,
    nuclei: Buffer,
    sums: Buffer,
    arrived: Buffer,
}

impl Chooser {
    /// Reserves memory for `sequences` texts of up to `capacity` tokens.
    pub fn new(device: &Device, sequences: usize, vocab: usize, capacity: usize) -> Result<Self> {
        ensure!(
            vocab <= BLOCKS * BLOCK_TOKENS,
            "a vocabulary of {vocab}; generation on the GPU takes up to {}",
            BLOCKS * BLOCK_TOKENS
        );
        let words = |count: usize| device.zeros(4 * count);
        Ok(Chooser {
            sequences,
            vocab,
            capacity,
            logits: device.allocate(4 * sequences * vocab)?,
            ids: words(sequences + 1)?,
            positions: words(sequences)?,
            history: words(sequences * capacity)?,
            draws: words(4 * sequences)?,
            best: words(2 * sequences * BLOCKS)?,
            weights: None,
            bins: words(2 * 1024 * sequences)?,
            nuclei: words(4 * sequences)?,
            sums: words(2 * 32 * BLOCKS * sequences)?,
            arrived: words(sequences)?,
        })
    }

    /// Returns whether [`Chooser::choose`] queues the kernels that sample.
    pub fn samples(&self) -> bool {
        self.weights.is_some()
    }

    /// Returns the address of the logits of sequences from `first` on.
    pub fn logits_of(&self, first: usize) -> u64 {
        self.logits.at() + (4 * first * self.vocab) as u64
    }

    /// Starts a text: the next choice is the token after `prompt`.
    pub fn start(&mut self, device: &Device, sequence: usize, prompt: &[u32], draw: Draw) -> Result<()> {
        let row = 4 * sequence * self.capacity;
        device.write(&self.history, row, &u32_bytes(prompt.iter().copied()))?;
        // The position of the last token: `advance` moves on to the next.
        device.write(&self.positions, 4 * sequence, &u32_bytes([prompt.len() as u32 - 1].into_iter()))?;
        let numbers = [draw.inverse_temperature.to_bits(), draw.top_p.to_bits()];
        let stream = [draw.stream as u32, (draw.stream >> 32) as u32];
        device.write(&self.draws, 16 * sequence, &u32_bytes(numbers.into_iter().chain(stream)))?;
        if self.weights.is_none() && !draw.is_greedy() {
            self.weights = Some(device.allocate(4 * self.sequences * self.vocab)?);
        }
        Ok(())
    }

    /// Queues the choice of the next token of `count` sequences from `first` on.
    pub fn choose(&self, device: &Device, first: usize, count: usize) -> Result<()> {
        let launch = |name, args: &[Arg]| {
            let geometry = Geometry { grid: [BLOCKS, count, 1], ..Geometry::flat(0, 1024) };
            device.launch_overlapping(Kernel::new(name, &[]), geometry, args)
        };
        let of = |buffer: &Buffer, bytes: usize| Arg::Pointer(buffer.at() + (first * bytes) as u64);
        let (vocab, capacity) = (Arg::U32(self.vocab as u32), Arg::U32(self.capacity as u32));
        let logits = Arg::Pointer(self.logits_of(first));
        let [ids, positions, arrived] = [&self.ids, &self.positions, &self.arrived].map(|it| of(it, 4));
        let history = of(&self.history, 4 * self.capacity);
        let failed = Arg::Pointer(self.ids.at() + 4 * self.sequences as u64);
        let best = of(&self.best, 8 * BLOCKS);
        launch("advance", &[logits, ids, positions, history, best, arrived, failed, vocab, capacity])?;
        let Some(weights) = &self.weights else { return Ok(()) };
        let weights = of(weights, 4 * self.vocab);
        let [draws, nuclei] = [&self.draws, &self.nuclei].map(|it| of(it, 16));
        let (bins, sums) = (of(&self.bins, 8 * 1024), of(&self.sums, 8 * 32 * BLOCKS));
        for digit in 0..3 {
            let digit = Arg::U32(digit);
            launch("nucleus", &[logits, ids, draws, weights, bins, nuclei, arrived, failed, vocab, digit])?;
        }
        let found = [weights, ids, positions, history, draws, nuclei, sums, arrived, vocab, capacity];
        launch("draw", &found)
    }

    /// Returns every sequence's next token.
    ///
    /// # Errors
    /// Logits that are not finite.
    pub fn next(&self, device: &Device) -> Result<Vec<u32>> {
        let mut ids = vec![0u32; self.sequences + 1];
        device.download_numbers(&self.ids, &mut ids)?;
        ensure!(
            ids.pop() == Some(0),
            "logits are not finite; activations pass what F16 holds, or weights hold NaN"
        );
        Ok(ids)
    }

    /// Feeds the next step these tokens instead of the chosen ones.
    pub fn feed(&self, device: &Device, tokens: impl Iterator<Item = u32>) -> Result<()> {
        device.write(&self.ids, 0, &u32_bytes(tokens))
    }

    /// Returns the first `lengths[s]` tokens of each sequence and the next, while there is room for that.
    pub fn texts(&self, device: &Device, lengths: &[usize]) -> Result<Vec<Vec<u32>>> {
        let mut ids = vec![0u32; self.sequences * self.capacity];
        device.download_numbers(&self.history, &mut ids)?;
        let rows = ids.chunks(self.capacity).zip(lengths);
        Ok(rows
            .map(|(row, &length)| row[..(length + usize::from(length > 0)).min(row.len())].to_vec())
            .collect())
    }
}
