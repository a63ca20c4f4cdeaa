//! A gated feed-forward part: gate, up and down of a dense layer or of one expert.

use anyhow::Result;

use super::linear::Linear;
use crate::backend::Backend;
use crate::names::{Role, TensorId};

/// Two linears that read one input and a third that reads `silu(gate) · up`.
pub struct Gated<B: Backend> {
    /// `[width, hidden]`
    pub gate: Linear<B>,
    /// `[width, hidden]`
    pub up: Linear<B>,
    /// `[hidden, width]`
    pub down: Linear<B>,
}

// A derived implementation would ask for backends that can be cloned.
impl<B: Backend> Clone for Gated<B> {
    fn clone(&self) -> Self {
        let Gated { gate, up, down } = self;
        Gated { gate: gate.clone(), up: up.clone(), down: down.clone() }
    }
}

impl<B: Backend> Gated<B> {
    /// Reads the three linears whose roles are these.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape than the configuration says.
    pub(super) fn load(
        load: &impl Fn(TensorId) -> Result<Linear<B>>,
        [gate, up, down]: [TensorId; 3],
    ) -> Result<Self> {
        Ok(Gated { gate: load(gate)?, up: load(up)?, down: load(down)? })
    }

    /// Returns `silu(gate) · up` `[n, width]`, what `down` takes, for inputs `[n, hidden]`.
    pub fn mixed(&self, backend: &B, input: &B::Tensor) -> Result<B::Tensor> {
        let [mut gated, up] = backend.linears(input, [&self.gate, &self.up].map(Linear::affine))?;
        backend.swiglu_in_place(&mut gated, &up)?;
        Ok(gated)
    }

    /// Returns the linear of that role of a dense layer or an expert, `None` for other roles.
    pub fn linear_mut(&mut self, role: Role) -> Option<&mut Linear<B>> {
        match role {
            Role::Gate | Role::SharedGate => Some(&mut self.gate),
            Role::Up | Role::SharedUp => Some(&mut self.up),
            Role::Down | Role::SharedDown => Some(&mut self.down),
            _ => None,
        }
    }
}
