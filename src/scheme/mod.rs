//! What a block of weights stores: a [`Scheme`] is element × span × scale codec × offset codec, as data.
//!
//! Every format is, block by block, a grid: `value = scale · element[code] + offset`. Two-level formats (K-quants,
//! NVFP4) store that scale as `outer · inner`; [`QTensor::grid`] hides the difference, so a rounding method sees only
//! effective scales, offsets and the element table.
//!
//! - [`schemes`]: the table of all schemes; a new scalar format is one row.
//! - [`fit`]: finds the stored scales for given weights and importances.
//! - [`mix`]: which tensor of a model gets which scheme under a format name such as `q4_k_m`.

mod distortion;
mod encode;
pub mod fit;
pub mod mix;
mod qtensor;
pub mod schemes;

pub use distortion::Distortion;
pub use qtensor::{Grid, QTensor};

use anyhow::Result;

use crate::num::{Codec, Element};

/// How many values along a row share one scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Span {
    /// One for the whole tensor.
    Tensor,
    /// One per row (output channel).
    Row,
    /// One per this many consecutive columns of a row.
    Cols(u32),
}

impl Span {
    /// Returns the span's length in a row of `cols` columns.
    pub fn len(self, cols: usize) -> usize {
        match self {
            Span::Tensor | Span::Row => cols,
            Span::Cols(n) => n as usize,
        }
    }

    /// Returns how many spans a `[rows, cols]` tensor has.
    pub fn count(self, rows: usize, cols: usize) -> usize {
        match self {
            Span::Tensor => 1,
            Span::Row => rows,
            Span::Cols(n) => rows * cols.div_ceil(n as usize),
        }
    }
}

/// What is added to `scale · element[code]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Offset {
    /// Nothing: the grid is symmetric around zero.
    None,
    /// One stored number per group, added (Q4_1, Q5_1, affine formats).
    Added(Codec),
    /// `- outer_offset · inner` where `inner` is stored per group with this codec and `outer_offset` per outer span
    /// with the outer codec (the "mins" of Q4_K and Q5_K).
    Subtracted(Codec),
}

/// What stored numbers mean. Says nothing about bytes, names or files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scheme {
    /// Name as its owners spell it: `mxfp4`, `q4_k`, `int8`.
    pub name: &'static str,
    /// What a code stands for.
    pub element: Element,
    /// Values that share one (inner) scale.
    pub group: Span,
    /// How that scale is stored.
    pub scale: Codec,
    /// Second level, if any: the effective scale is `outer · scale`.
    pub outer: Option<(Span, Codec)>,
    /// What is added.
    pub offset: Offset,
}

impl Scheme {
    /// Returns the smallest number of columns a row must be a multiple of.
    pub fn block_cols(&self) -> usize {
        match (self.outer, self.group) {
            (Some((Span::Cols(n), _)), _) => n as usize,
            (_, Span::Cols(n)) => n as usize,
            _ => 1,
        }
    }

    /// Returns the exact number of stored bits of a `[rows, cols]` tensor, without container padding.
    pub fn stored_bits(&self, rows: usize, cols: usize) -> u64 {
        let groups = self.group.count(rows, cols) as u64;
        let mut bits = (rows * cols) as u64 * self.element.bits() as u64 + groups * self.scale.bits() as u64;
        if let Some((span, codec)) = self.outer {
            bits += span.count(rows, cols) as u64 * codec.bits() as u64;
        }
        match self.offset {
            Offset::None => bits,
            Offset::Added(codec) => bits + groups * codec.bits() as u64,
            Offset::Subtracted(codec) => {
                let outer = self.outer.map_or(0, |(span, c)| span.count(rows, cols) as u64 * c.bits() as u64);
                bits + groups * codec.bits() as u64 + outer
            }
        }
    }
}

/// How an engine quantizes a linear's *inputs* at run time; evaluation simulates it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Activations {
    /// Left in the model's precision (weight-only formats).
    #[default]
    Full,
    /// INT8, symmetric, one scale per token: `scale = max|x| / 127`, codes rounded to nearest even, clamped to ±127.
    Int8PerToken,
    /// FP8 E4M3, one scale per token: `scale = max|x| / 448`, values rounded to nearest even.
    Fp8PerToken,
    /// INT8, symmetric, one scale for all tokens, found by calibration and stored beside the weight: codes `x / scale`
    /// rounded to nearest even, clamped to -128 and 127 as compressed-tensors and vLLM do.
    Int8PerTensor,
}

/// What happens to the inputs of one linear: [`Activations`] with the number that a fixed kind brings.
#[derive(Clone, Copy, Debug, PartialEq, Default)]
pub enum Rounding {
    /// [`Activations::Full`]
    #[default]
    None,
    /// [`Activations::Int8PerToken`]
    Int8PerToken,
    /// [`Activations::Fp8PerToken`]
    Fp8PerToken,
    /// [`Activations::Int8PerTensor`] with its scale, finite and positive.
    Int8PerTensor(f32),
}

impl Activations {
    /// Whether each linear has a scale of its own that is fixed before run time.
    pub fn is_static(self) -> bool {
        self == Activations::Int8PerTensor
    }

    /// Returns what happens to the inputs of a linear; `scale` is asked only by kinds that are static.
    ///
    /// # Errors
    /// Those of `scale`.
    pub fn rounding(self, scale: impl FnOnce() -> Result<f32>) -> Result<Rounding> {
        Ok(match self {
            Activations::Full => Rounding::None,
            Activations::Int8PerToken => Rounding::Int8PerToken,
            Activations::Fp8PerToken => Rounding::Fp8PerToken,
            Activations::Int8PerTensor => Rounding::Int8PerTensor(scale()?),
        })
    }
}

impl Rounding {
    /// Returns the scale of a static kind.
    pub fn scale(self) -> Option<f32> {
        match self {
            Rounding::Int8PerTensor(scale) => Some(scale),
            _ => None,
        }
    }
}
