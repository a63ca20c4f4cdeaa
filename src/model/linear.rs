//! A linear of a layer where a backend keeps it.

use anyhow::Result;

use super::stages::LinearSpec;
use super::{TensorSource, read_vector, read_weight};
use crate::backend::{Affine, Backend};
use crate::names::Role;
use crate::scheme::Activations;

/// y = x · weightᵀ + bias, with the inputs treated as the engine would.
pub struct Linear<B: Backend> {
    /// `[out_features, in_features]`
    pub weight: B::Weight,
    /// `[out_features]`
    pub bias: Option<B::Tensor>,
    /// What the engine does to the inputs first.
    pub rounding: Activations<f32>,
}

// A derived implementation would ask for backends that can be cloned.
impl<B: Backend> Clone for Linear<B> {
    fn clone(&self) -> Self {
        let Linear { weight, bias, rounding } = self;
        Linear { weight: weight.clone(), bias: bias.clone(), rounding: *rounding }
    }
}

impl<B: Backend> Linear<B> {
    /// Reads a linear and its bias, if it has one.
    pub(super) fn load(backend: &B, source: &impl TensorSource, spec: LinearSpec) -> Result<Self> {
        let LinearSpec { id, shape, bias } = spec;
        let bias = if bias { Some(read_vector(backend, source, id.bias(), shape[0])?) } else { None };
        Ok(Linear { weight: read_weight(backend, source, id, shape)?, bias, rounding: source.rounding(id) })
    }

    /// Returns what [`Backend::linears`] takes.
    pub(super) fn affine(&self) -> Affine<'_, B> {
        Affine { weight: &self.weight, bias: self.bias.as_ref(), rounding: self.rounding }
    }

    /// Returns the linear's output for inputs `[n, in_features]`.
    pub fn forward(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor> {
        backend.linear(x, &self.weight, self.bias.as_ref(), self.rounding)
    }

    /// Adds the linear's output for `input` to `x` `[n, out_features]`.
    pub fn add_forward(&self, backend: &B, x: &mut B::Tensor, input: &B::Tensor) -> Result<()> {
        backend.linear_add(x, input, &self.weight, self.bias.as_ref(), self.rounding)
    }
}

/// Sees the input of a linear: its role, the number of its expert if it is one's, and what it takes `[n, in_features]`.
pub type Observe<'a, B> = &'a mut dyn FnMut(Role, Option<usize>, &<B as Backend>::Tensor) -> Result<()>;
