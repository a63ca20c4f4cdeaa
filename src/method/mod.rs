//! Which codes are chosen: rounding methods. They see only effective grids ([`crate::scheme::QTensor::grid`]) and the
//! element table, so each works for every scheme.
//!
//! All minimise the same per-row quadratic. With `t` the target row, `q` the decoded row and `H = X̃ᵀX̃` the second
//! moment of the linear's inputs `X̃ [tokens, cols]`, the squared output error is
//!
//! ```text
//! loss(q) = (q - t) H (q - t)ᵀ            summed over rows: tr(Δ H Δᵀ)
//! ```
//!
//! - [`statistics`]: `H`, and the cross moment `XᵀX̃` with the full-precision model's inputs.
//! - [`mismatch`]: the target itself: weights corrected for inputs that quantization upstream has changed.
//! - [`gptq`]: one pass over the columns with error feedback.
//! - [`descent`]: sweeps that change one code, or one group's scale, at a time; the loss never rises.
//! - [`solve`](mod@solve): all of them in order, for one matrix.

pub mod descent;
pub mod gptq;
pub mod mismatch;
pub mod refit;
pub mod solve;
pub mod statistics;
#[cfg(test)]
pub(crate) mod testing;
