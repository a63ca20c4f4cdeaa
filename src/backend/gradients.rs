//! Derivatives of the operations of a forward pass, for calibration: how much each token's error matters, and which gains
//! bring a quantized model back. Named after the operation whose outputs' gradient `dy` they take.

use anyhow::Result;

use super::{AttentionShape, Backend, Batch};

/// What reverse-mode differentiation asks of a backend. Gradients are F32 on every device; weights are constants.
pub trait Gradients: Backend {
    /// dx\[n, in\] = dy\[n, out\] · w. What an engine does to inputs first counts as the identity (straight-through).
    fn linear_gradient(&self, dy: &Self::Tensor, weight: &Self::Weight) -> Result<Self::Tensor>;

    /// With r = (mean(x²) + eps)^-½ over a run: dx = r · gain · dy - x · r³ · mean(x · gain · dy).
    fn rms_norm_gradient(
        &self,
        x: &Self::Tensor,
        gain: &Self::Tensor,
        eps: f32,
        dy: &Self::Tensor,
    ) -> Result<Self::Tensor>;

    /// Returns the gradient of a gain `[width]`: Σ r · x · dy over all runs.
    fn gain_gradient(&self, x: &Self::Tensor, width: usize, eps: f32, dy: &Self::Tensor) -> Result<Vec<f32>>;

    /// Returns the gradients of gate and up. With s = 1 / (1 + e^-gate): dy · up · s · (1 + gate · (1 - s)), dy · gate · s.
    fn swiglu_gradient(
        &self,
        gate: &Self::Tensor,
        up: &Self::Tensor,
        dy: &Self::Tensor,
    ) -> Result<[Self::Tensor; 2]>;

    /// Returns the gradients of queries, keys and values. With P the probabilities: dV = Pᵀ dy, dP = dy Vᵀ,
    /// dS = scale · P ∘ (dP - rowsum(P ∘ dP)), dQ = dS K, dK = dSᵀ Q (FlashAttention-2, arXiv 2307.08691, section 2.3.2).
    /// `sinks` are those of [`Backend::attention`].
    fn attention_gradient(
        &self,
        qkv: [&Self::Tensor; 3],
        sinks: Option<&Self::Tensor>,
        dy: &Self::Tensor,
        shape: &AttentionShape,
        batch: Batch,
    ) -> Result<[Self::Tensor; 3]>;

    /// Returns the gradient of Σ KL(baseline ‖ model) in the model's hidden states.
    fn divergence_gradient(
        &self,
        baseline: (&Self::Tensor, &Self::Weight),
        model: (&Self::Tensor, &Self::Weight),
    ) -> Result<Self::Tensor>;

    /// Returns headᵀ v for each position, v random with mean 0 and covariance diag(p) - p pᵀ, the Fisher information of the
    /// logits: what errors do to the divergence, to second order, is the mean of the squares along such gradients.
    /// v = √p ∘ ε - p · (√p · ε) for signs ε that depend on `seed`, the position and the token.
    fn fisher_gradient(&self, hidden: &Self::Tensor, head: &Self::Weight, seed: u32) -> Result<Self::Tensor>;

    /// Returns Σ x² of each row.
    fn row_energies(&self, x: &Self::Tensor) -> Result<Vec<f32>>;

    /// Returns `x` with row i multiplied by `factors[i]`.
    fn scale_rows(&self, x: &Self::Tensor, factors: &[f32]) -> Result<Self::Tensor>;
}
