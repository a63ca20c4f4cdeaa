//! The feed-forward part of a layer: gate, up and down, once ([`Gated`]) or as a [`Mixture`] of experts.

use anyhow::{Context, Result};

use super::TensorSource;
use super::config::{Config, Ffn};
use super::gated::Gated;
use super::linear::{Linear, Observe};
use super::mixture::Mixture;
use crate::backend::Backend;
use crate::names::{Role, TensorId};

/// What follows attention in a layer.
pub enum FeedForward<B: Backend> {
    /// The same for every token.
    Dense(Gated<B>),
    /// A few experts for each token.
    Mixture(Mixture<B>),
}

// A derived implementation would ask for backends that can be cloned.
impl<B: Backend> Clone for FeedForward<B> {
    fn clone(&self) -> Self {
        match self {
            FeedForward::Dense(gated) => FeedForward::Dense(gated.clone()),
            FeedForward::Mixture(mixture) => FeedForward::Mixture(mixture.clone()),
        }
    }
}

impl<B: Backend> FeedForward<B> {
    /// Reads the feed-forward part of layer `layer`.
    ///
    /// # Errors
    /// If a tensor is missing or has another shape than the configuration says.
    pub(super) fn load(
        backend: &B,
        config: &Config,
        source: &impl TensorSource,
        layer: usize,
    ) -> Result<Self> {
        let specs: Vec<_> = config.linears_of(layer).collect();
        let load = |id: TensorId| {
            let spec = specs.iter().find(|spec| spec.id == id);
            Linear::load(backend, source, *spec.with_context(|| format!("layer {layer} has no `{id}`"))?)
        };
        match &config.layers[layer].ffn {
            Ffn::Dense { .. } => {
                let ids = [Role::Gate, Role::Up, Role::Down].map(|role| TensorId::in_layer(layer, role));
                Gated::load(&load, ids).map(FeedForward::Dense)
            }
            Ffn::Mixture(experts) => {
                Mixture::load(backend, config, source, layer, experts, &load).map(FeedForward::Mixture)
            }
        }
    }

    /// Returns the linears of a dense part.
    ///
    /// # Errors
    /// If this is a mixture; `what` was asked for.
    pub fn dense(&self, what: &str) -> Result<&Gated<B>> {
        match self {
            FeedForward::Dense(gated) => Ok(gated),
            FeedForward::Mixture(_) => anyhow::bail!("{what} for mixtures of experts is not supported"),
        }
    }

    /// Returns the mixture.
    ///
    /// # Errors
    /// If this is no mixture.
    pub fn mixture(&self) -> Result<&Mixture<B>> {
        match self {
            FeedForward::Mixture(mixture) => Ok(mixture),
            FeedForward::Dense(_) => anyhow::bail!("a dense layer has no experts"),
        }
    }

    /// Returns the linear with that weight, `None` if it has none such.
    pub fn linear_mut(&mut self, id: TensorId) -> Option<&mut Linear<B>> {
        match self {
            FeedForward::Dense(gated) => gated.linear_mut(id.role),
            FeedForward::Mixture(mixture) => mixture.linear_mut(id),
        }
    }

    /// Adds what it makes of `normed` `[n, hidden]` to the residual stream `x` `[n, hidden]`. `observe` sees the input of every
    /// linear before it runs; those of an expert are its tokens' only.
    pub fn add_forward(
        &self,
        backend: &B,
        x: &mut B::Tensor,
        normed: &B::Tensor,
        observe: Observe<B>,
    ) -> Result<()> {
        match self {
            FeedForward::Dense(gated) => {
                observe(Role::Gate, None, normed)?;
                observe(Role::Up, None, normed)?;
                let mixed = gated.mixed(backend, normed)?;
                observe(Role::Down, None, &mixed)?;
                gated.down.add_forward(backend, x, &mixed)
            }
            FeedForward::Mixture(mixture) => mixture.add_forward(backend, x, normed, observe),
        }
    }
}
