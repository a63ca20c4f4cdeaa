//! What devices take of memory: the terms from which evaluation and calibration derive theirs before anything is read.

use super::Backend;
use super::cpu::Cpu;
use super::cuda::Cuda;
use super::cuda::widen::scheme_on_device;
use crate::scheme::{Offset, Scheme};

/// A device that can tell what it would take.
pub trait Footprint {
    /// Returns how many tokens one pass should hold.
    fn pass_tokens(&self) -> usize;

    /// Returns the bytes of one number of what operations write.
    fn activation_bytes(&self) -> u64;

    /// Returns the bytes that a tensor of `shape`, stored in `bytes` bytes, takes in the device's memory; `scheme` is that
    /// of its codes, `None` for plain numbers.
    fn weight_bytes(&self, scheme: Option<Scheme>, shape: &[usize], bytes: u64) -> u64;

    /// Returns what multiplying with a matrix of that many weights takes beside inputs and outputs.
    fn decoded_bytes(&self, weights: u64) -> u64;

    /// Returns the bytes of logits held at once.
    fn logits_bytes(&self, vocab: usize) -> u64;

    /// Returns what choosing the codes of a matrix `[rows, cols]` takes on the device beside its input's moments.
    fn solver_bytes(&self, rows: u64, cols: u64) -> u64;
}

impl Footprint for Cpu {
    fn pass_tokens(&self) -> usize {
        self.tokens_at_once()
    }

    fn activation_bytes(&self) -> u64 {
        4
    }

    /// Dense tensors lie as they are stored, quantized ones with a byte for each code and F32 scales.
    fn weight_bytes(&self, scheme: Option<Scheme>, shape: &[usize], bytes: u64) -> u64 {
        let (Some(scheme), &[rows, cols]) = (scheme, shape) else { return bytes };
        let groups = scheme.group.count(rows, cols) * if scheme.offset == Offset::None { 1 } else { 2 };
        let outer = 2 * scheme.outer.map_or(0, |(span, _)| span.count(rows, cols));
        (rows * cols + 4 * (groups + outer)) as u64
    }

    /// Panels of a few rows are decoded at a time.
    fn decoded_bytes(&self, _: u64) -> u64 {
        0
    }

    /// A summary of 160 bytes for each position and block of 512 tokens.
    fn logits_bytes(&self, vocab: usize) -> u64 {
        (vocab.div_ceil(512) * self.tokens_at_once() * 160) as u64
    }

    /// The moments again as they are handed over (8 cols²), then the damped Hessian twice, a factor in F64 and its
    /// coefficients (8 + 8 + 2), and six copies of the matrix in F32: weights, target, correction, values, error, product.
    fn solver_bytes(&self, rows: u64, cols: u64) -> u64 {
        26 * cols * cols + 24 * rows * cols
    }
}

impl Footprint for Cuda {
    fn pass_tokens(&self) -> usize {
        self.tokens_at_once()
    }

    fn activation_bytes(&self) -> u64 {
        self.value_bytes() as u64
    }

    /// Dense matrices become F16, vectors F32; packed rows are padded to whole pieces of 128 columns, and small matrices may
    /// have wider codes.
    fn weight_bytes(&self, scheme: Option<Scheme>, shape: &[usize], bytes: u64) -> u64 {
        let weights = shape.iter().map(|&n| n as u64).product::<u64>();
        match (scheme, shape) {
            (Some(scheme), &[rows, cols]) => {
                let bits = |scheme: Scheme| scheme.stored_bits(rows, cols).max(1);
                let wider = bits(scheme_on_device(scheme, rows, cols)) as f64 / bits(scheme) as f64;
                let padded = cols.next_multiple_of(128) as f64 / cols.max(1) as f64;
                (bytes as f64 * wider * padded) as u64
            }
            (_, &[_, _]) => weights * self.activation_bytes(),
            _ => weights * 4,
        }
    }

    /// Also holds a matrix as it is stored while it is rounded.
    fn decoded_bytes(&self, weights: u64) -> u64 {
        weights * self.activation_bytes()
    }

    /// Slices of 2^27 logits, at least 128 positions of two models.
    fn logits_bytes(&self, vocab: usize) -> u64 {
        4 * (1 << 27).max(256 * vocab as u64)
    }

    /// As `cuda/solve` says: a matrix `[cols, cols]` more in F32 and one in F64, and 33 bytes a weight of a slab.
    fn solver_bytes(&self, rows: u64, cols: u64) -> u64 {
        12 * cols * cols + 33 * (rows * cols).min(1 << 26)
    }
}
