//! What a block of weights stores: a [`Scheme`] is element × span × scale codec × offset codec, as data.
//!
//! Every format is, block by block, a grid: `value = scale · element[code] + offset`. Two-level formats (K-quants,
//! NVFP4) store that scale as `outer · inner`; [`QTensor::grid`] hides the difference, so a rounding method sees only
//! effective scales, offsets and the element table.
//!
//! - [`schemes`]: the table of all schemes; a new scalar format is one row.
//! - [`fit`]: finds the stored scales for given weights and importances.

mod distortion;
mod encode;
pub mod fit;
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
        let codes = ((rows * cols) as u64 * self.element.bits_of_256() as u64).div_ceil(256);
        let mut bits = codes + groups * self.scale.bits() as u64;
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

/// What an engine does to a linear's *inputs* at run time; evaluation simulates it.
///
/// `S` is the scale of a kind that fixes one: nothing in a recipe, which only says that there is one, and the number in a
/// model that runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Activations<S = ()> {
    /// Left in the model's precision (weight-only formats).
    #[default]
    Full,
    /// INT8, symmetric, one scale per token: `scale = max|x| / 127`, codes rounded to nearest even, clamped to ±127.
    Int8PerToken,
    /// FP8 E4M3, one scale per token: `scale = max|x| / 448`, values rounded to nearest even.
    Fp8PerToken,
    /// INT8, symmetric, one finite and positive scale for all tokens, found by calibration and stored beside the weight:
    /// codes `x / scale` rounded to nearest even, clamped to -128 and 127 as compressed-tensors and vLLM do.
    Int8PerTensor(S),
}

impl<S> Activations<S> {
    /// Whether each linear has a scale of its own that is fixed before run time.
    pub fn is_static(&self) -> bool {
        matches!(self, Activations::Int8PerTensor(_))
    }

    /// Returns the scale of a static kind.
    pub fn scale(self) -> Option<S> {
        match self {
            Activations::Int8PerTensor(scale) => Some(scale),
            _ => None,
        }
    }
}

impl Activations {
    /// Returns what happens to the inputs of one linear; only static kinds ask for `scale`.
    ///
    /// # Errors
    /// Those of `scale`.
    pub fn with_scale(self, scale: impl FnOnce() -> Result<f32>) -> Result<Activations<f32>> {
        Ok(match self {
            Activations::Full => Activations::Full,
            Activations::Int8PerToken => Activations::Int8PerToken,
            Activations::Fp8PerToken => Activations::Fp8PerToken,
            Activations::Int8PerTensor(()) => Activations::Int8PerTensor(scale()?),
        })
    }
}

/// What one tensor becomes: how its numbers are stored, and what engines do to the inputs of its linear.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Choice {
    /// How its numbers are stored.
    pub scheme: Scheme,
    /// What happens to its inputs.
    pub inputs: Activations,
}

impl Choice {
    /// Returns the choice that stores weights so and leaves inputs alone.
    pub const fn weights(scheme: Scheme) -> Self {
        Choice { scheme, inputs: Activations::Full }
    }
}
