//! The operations of a forward pass. [`cpu::Cpu`] is their definition; other backends are fast copies under test.
//!
//! Shapes are `[rows, cols]`, row-major. `n` counts tokens of all sequences of a [`Batch`] together.

pub mod cpu;
pub mod cuda;
pub mod footprint;
pub mod gradients;
pub mod kv_cache;
pub mod machine;
pub mod parked;
mod rotation;

use anyhow::{Context, Result, ensure};

use self::gradients::Gradients;
use self::kv_cache::KvCache;
pub use self::rotation::{DynamicAngles, LongAngles, Pairing, Rope};
// Choosing codes is an operation of a device too: the contract is the method's, devices implement it.
use crate::method::solve::{Knobs, Solve};
use crate::scheme::Activations;
use crate::tensor::Matrix;

/// Equally long token sequences, one after another: row `s · tokens + t` is token `t` of sequence `s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Number of sequences.
    pub sequences: usize,
    /// Tokens in each.
    pub tokens: usize,
}

/// Shape of causal grouped-query attention.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// A query sees at most this many latest positions, itself included.
    pub window: Option<usize>,
    /// Scores are multiplied with this, usually `head_dim^-½`.
    pub scale: f32,
}

/// What the loss head reports for one scored position.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Score {
    /// Negative log-likelihood of the target under the model, nats.
    pub nll: f32,
    /// Token of highest probability; the lowest id on ties.
    pub top: u32,
}

/// What comparing with a baseline adds for one scored position.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Divergence {
    /// The baseline's own score.
    pub baseline: Score,
    /// The model's score.
    pub model: Score,
    /// KL(baseline ‖ model) over the full vocabulary, nats.
    pub kld: f32,
    /// How many tokens the model prefers to the baseline's most likely one, at most [`RANKS`]; on ties the lower id is
    /// preferred. 0: both have the same favourite.
    pub rank: u32,
}

/// Ranks that [`Divergence::rank`] tells apart; it stands for itself and all above.
pub const RANKS: u32 = 5;

/// A device that runs a decoder. `Tensor` holds activations, `Weight` a matrix as the device keeps it (packed weights
/// stay packed until the multiply).
pub trait Backend: Sync {
    /// Activations `[n, cols]`, or a vector as one row.
    type Tensor: Clone + Send;
    /// A weight matrix `[out_features, in_features]` or an embedding table `[vocab, hidden]`.
    type Weight: Clone + Send + Sync;

    /// Returns what reports print: device, precision, library.
    fn describe(&self) -> String;

    /// Returns how many tokens of independent sequences one pass should hold to keep the device busy.
    fn tokens_at_once(&self) -> usize {
        1
    }

    /// Returns the bytes of one number of what operations write; the residual stream is F32 on every device.
    fn value_bytes(&self) -> usize {
        4
    }

    /// Waits until everything that was asked for is done; devices that work on their own need it before a clock is read.
    fn wait(&self) -> Result<()> {
        Ok(())
    }

    /// Takes a weight over.
    fn upload(&self, weight: Matrix) -> Result<Self::Weight>;

    /// Copies activations to the device. `values` is `[rows, cols]`.
    fn tensor(&self, rows: usize, cols: usize, values: &[f32]) -> Result<Self::Tensor>;

    /// Copies activations back as F32, row-major.
    fn read(&self, x: &Self::Tensor) -> Result<Vec<f32>>;

    /// The same into a vector that is there and, where it is as long already, keeps its memory.
    fn read_into(&self, x: &Self::Tensor, out: &mut Vec<f32>) -> Result<()> {
        let values = self.read(x)?;
        if values.len() == out.len() {
            out.copy_from_slice(&values);
        } else {
            *out = values;
        }
        Ok(())
    }

    /// Returns the number of rows of `x`.
    fn rows(&self, x: &Self::Tensor) -> usize;

    /// Returns `x` restricted to `rows`, in that order.
    fn select_rows(&self, x: &Self::Tensor, rows: &[usize]) -> Result<Self::Tensor>;

    /// y\[i, :\] = table\[ids\[i\], :\]
    fn embed(&self, table: &Self::Weight, ids: &[u32]) -> Result<Self::Tensor>;

    /// y = x / sqrt(mean(x²) + eps) · gain over runs of `gain.len()` columns: a whole row, or each head of a row
    /// (Qwen3's q and k norms).
    fn rms_norm(&self, x: &Self::Tensor, gain: &Self::Tensor, eps: f32) -> Result<Self::Tensor>;

    /// y\[n, out\] = x\[n, in\] · wᵀ + bias, F32 accumulation. `rounding` says what happens to `x` first.
    fn linear(
        &self,
        x: &Self::Tensor,
        weight: &Self::Weight,
        bias: Option<&Self::Tensor>,
        rounding: Activations<f32>,
    ) -> Result<Self::Tensor>;

    /// Returns what linears, one at least, make of one input: [`Backend::linear`] of each.
    fn linears<const N: usize>(
        &self,
        x: &Self::Tensor,
        linears: [Affine<'_, Self>; N],
    ) -> Result<[Self::Tensor; N]> {
        separately(self, x, linears)
    }

    /// x += linear(input, …): an output projection joins the residual stream. One operation, so that a device can add in
    /// the epilogue of its product, without rounding the product first.
    fn linear_add(
        &self,
        x: &mut Self::Tensor,
        input: &Self::Tensor,
        weight: &Self::Weight,
        bias: Option<&Self::Tensor>,
        rounding: Activations<f32>,
    ) -> Result<()> {
        let y = self.linear(input, weight, bias, rounding)?;
        self.add(x, &y)
    }

    /// Rotates every head of `x` `[n, heads · head_dim]` in place by its token's position in its sequence.
    fn rope(&self, x: &mut Self::Tensor, rope: &Rope, batch: Batch) -> Result<()>;

    /// Causal softmax(scale · q kᵀ) v within each sequence. q `[n, heads · head_dim]`, k and v `[n, kv_heads · head_dim]`.
    ///
    /// `sinks` `[heads]` adds a position to every query of a head that mixes nothing in: exp(sink), not scaled, joins the
    /// denominator (gpt-oss; Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2023). -∞ is no sink.
    fn attention(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        sinks: Option<&Self::Tensor>,
        shape: &AttentionShape,
        batch: Batch,
    ) -> Result<Self::Tensor>;

    /// Rounds keys or values `[n, kv_heads · head_dim]` as a cache keeps them; `scale` is the layer's
    /// ([`KvCache::round`]). Devices without a kernel of their own leave it to the CPU.
    fn round_cache(&self, x: &mut Self::Tensor, kind: KvCache, head_dim: usize, scale: f32) -> Result<()>;

    /// y = silu(gate) · up, elementwise.
    fn swiglu(&self, gate: &Self::Tensor, up: &Self::Tensor) -> Result<Self::Tensor>;

    /// gate = swiglu(gate, up), where the device can in the same memory.
    fn swiglu_in_place(&self, gate: &mut Self::Tensor, up: &Self::Tensor) -> Result<()> {
        *gate = self.swiglu(gate, up)?;
        Ok(())
    }

    /// x += y
    fn add(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;

    /// x\[rows\[i\], :\] += weights\[i\] · y\[i, :\] for `y` `[rows.len(), cols]`: what an expert makes of its tokens joins the
    /// residual stream. No row stands twice in `rows`.
    fn add_rows(&self, x: &mut Self::Tensor, rows: &[usize], weights: &[f32], y: &Self::Tensor)
    -> Result<()>;

    /// Scores `targets[i]` against softmax(head · hidden\[i\]), exact F32 logits, without keeping all logits.
    fn score(&self, hidden: &Self::Tensor, head: &Self::Weight, targets: &[u32]) -> Result<Vec<Score>>;

    /// Scores the model and the baseline side by side; `hidden` and `head` of each. Both heads have one vocabulary.
    fn compare(
        &self,
        baseline: (&Self::Tensor, &Self::Weight),
        model: (&Self::Tensor, &Self::Weight),
        targets: &[u32],
    ) -> Result<Vec<Divergence>>;
}

/// What [`Backend::linear`] takes beside its input.
pub struct Affine<'a, B: Backend + ?Sized> {
    /// `[out_features, in_features]`
    pub weight: &'a B::Weight,
    /// `[out_features]`
    pub bias: Option<&'a B::Tensor>,
    /// What happens to the inputs first.
    pub rounding: Activations<f32>,
}

// Derived implementations would ask for backends that can be copied.
impl<B: Backend + ?Sized> Clone for Affine<'_, B> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<B: Backend + ?Sized> Copy for Affine<'_, B> {}

/// Returns what linears make of one input, one after another.
fn separately<B: Backend + ?Sized, const N: usize>(
    backend: &B,
    x: &B::Tensor,
    linears: [Affine<'_, B>; N],
) -> Result<[B::Tensor; N]> {
    let linears = linears.iter();
    let ys = linears.map(|linear| backend.linear(x, linear.weight, linear.bias, linear.rounding));
    <[_; N]>::try_from(ys.collect::<Result<Vec<_>>>()?).ok().context("as many outputs as linears")
}

/// Refuses what [`Backend::add_rows`] cannot add, for `x` and `y` of these shapes.
fn check_add_rows(x: (usize, usize), rows: &[usize], weights: &[f32], y: (usize, usize)) -> Result<()> {
    ensure!(
        y == (rows.len(), x.1) && weights.len() == rows.len(),
        "{} weights and {y:?} values for {} rows of {} columns",
        weights.len(),
        rows.len(),
        x.1
    );
    ensure!(rows.iter().all(|&row| row < x.0), "a row past the last of {}", x.0);
    Ok(())
}

/// [`Moments`](crate::method::statistics::Moments) where a device has summed them; of the Hessian only the entries at and
/// below the diagonal need be right.
pub struct MomentSums<T> {
    /// Input features.
    pub cols: usize,
    /// Number of tokens seen.
    pub tokens: usize,
    /// `X̃ᵀX̃`, `[cols, cols]`.
    pub hessian: T,
    /// `XᵀX̃`, `[cols, cols]`.
    pub cross: T,
    /// `(R - R̃)ᵀX̃`, `[outputs, cols]`, for linears that add to the residual stream.
    pub drift: Option<T>,
}

/// What calibration asks of a backend beyond a forward pass.
pub trait SecondMoments: Gradients {
    /// Chooses the codes of the linears that read one input.
    type Solver<'a>: Solve<Weight = Self::Weight>
    where
        Self: 'a;

    /// Returns zeros `[rows, cols]`, where sums start.
    fn zeros(&self, rows: usize, cols: usize) -> Result<Self::Tensor>;

    /// x -= y
    fn subtract(&self, x: &mut Self::Tensor, y: &Self::Tensor) -> Result<()>;

    /// Returns inputs as an engine's product sees them.
    fn round_inputs(&self, x: &Self::Tensor, rounding: Activations<f32>) -> Result<Self::Tensor>;

    /// maxima\[j\] = max(maxima\[j\], |x\[i, j\]|) over all i; `maxima` is `[1, cols]`. A NaN stays.
    fn add_maxima(&self, maxima: &mut Self::Tensor, x: &Self::Tensor) -> Result<()>;

    /// sum += aᵀ · b for `a` `[n, a_cols]`, `b` `[n, b_cols]`, `sum` `[a_cols, b_cols]`: second moments of calibration.
    /// Where `a` and `b` are the same tensor, only the entries at and below the diagonal need be right.
    fn add_moment(&self, sum: &mut Self::Tensor, a: &Self::Tensor, b: &Self::Tensor) -> Result<()>;

    /// sum\[i, j\] /= rows\[i\] · columns\[j\], where an absent factor is 1: moments of inputs in other units.
    fn divide(&self, sum: &mut Self::Tensor, rows: Option<&[f32]>, columns: Option<&[f32]>) -> Result<()>;

    /// Prepares to quantize the linears that read the input of these moments.
    ///
    /// # Errors
    /// If the moments are not finite.
    fn solver(&self, moments: MomentSums<Self::Tensor>, knobs: Knobs) -> Result<Self::Solver<'_>>;
}

impl<T> MomentSums<T> {
    /// Divides column j of X alone by `scales[j]`, where X̃ already comes in the new units.
    pub fn rescale_full<B: SecondMoments<Tensor = T>>(&mut self, backend: &B, scales: &[f32]) -> Result<()> {
        backend.divide(&mut self.cross, Some(scales), None)
    }
}
