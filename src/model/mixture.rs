//! The feed-forward part of a layer as a mixture of experts: a router sends each token to a few gated feed-forward parts, whose
//! outputs, weighed, join the residual stream; an expert that all tokens share may stand beside them.

use anyhow::{Context, Result, ensure};

use super::config::{Config, Experts};
use super::gated::Gated;
use super::linear::{Linear, Observe};
use super::router::{Assigned, Router};
use super::{TensorSource, read_weight};
use crate::backend::Backend;
use crate::names::{Role, TensorId};

/// A mixture of experts.
pub struct Mixture<B: Backend> {
    /// How logits choose experts.
    pub rule: Router,
    /// Router `[experts, hidden]`, kept in the model's precision: what it decides is not continuous.
    pub router: Linear<B>,
    /// Added to scores where experts are chosen, `[experts]`.
    pub choice_bias: Option<Vec<f32>>,
    /// The experts that it chooses from.
    pub experts: Vec<Gated<B>>,
    /// The expert that all tokens share.
    pub shared: Option<Shared<B>>,
}

/// The expert that all tokens share.
pub struct Shared<B: Backend> {
    /// Its linears.
    pub expert: Gated<B>,
    /// `[1, hidden]`: the logistic function of its product with a token weighs the expert (`Qwen2MoeSparseMoeBlock`).
    pub gate: Option<Linear<B>>,
}

// Derived implementations would ask for backends that can be cloned.
impl<B: Backend> Clone for Mixture<B> {
    fn clone(&self) -> Self {
        let Mixture { rule, router, choice_bias, experts, shared } = self;
        let shared = shared.as_ref();
        Mixture {
            rule: *rule,
            router: router.clone(),
            choice_bias: choice_bias.clone(),
            experts: experts.clone(),
            shared: shared.map(|s| Shared { expert: s.expert.clone(), gate: s.gate.clone() }),
        }
    }
}

impl<B: Backend> Mixture<B> {
    /// Reads the mixture of layer `layer`; `load` reads one of its linears.
    pub(super) fn load(
        backend: &B,
        config: &Config,
        source: &impl TensorSource,
        layer: usize,
        experts: &Experts,
        load: &impl Fn(TensorId) -> Result<Linear<B>>,
    ) -> Result<Self> {
        let id = |role| TensorId::in_layer(layer, role);
        let plain = |role, rows| -> Result<Linear<B>> {
            let weight = read_weight(backend, source, id(role), [rows, config.hidden_size])?;
            Ok(Linear { weight, bias: None, rounding: source.rounding(id(role)) })
        };
        let expert = |at| {
            Gated::load(load, [Role::Gate, Role::Up, Role::Down].map(|role| id(role).of_expert(at)))
                .with_context(|| format!("expert {at}"))
        };
        let shared = |gated| -> Result<Shared<B>> {
            Ok(Shared {
                expert: Gated::load(load, [Role::SharedGate, Role::SharedUp, Role::SharedDown].map(id))?,
                gate: if gated { Some(plain(Role::SharedRouter, 1)?) } else { None },
            })
        };
        Ok(Mixture {
            rule: experts.rule,
            router: plain(Role::Router, experts.rule.experts)?,
            choice_bias: match experts.choice_bias {
                true => Some(source.read(id(Role::ChoiceBias))?.to_f32()),
                false => None,
            },
            experts: (0..experts.rule.experts).map(expert).collect::<Result<_>>()?,
            shared: experts.shared.map(|of| shared(of.gated)).transpose()?,
        })
    }

    /// Returns the linear with that weight, `None` if it has none such.
    pub fn linear_mut(&mut self, id: TensorId) -> Option<&mut Linear<B>> {
        match (id.expert, &mut self.shared) {
            (Some(expert), _) => self.experts.get_mut(usize::from(expert))?.linear_mut(id.role),
            (None, Some(shared)) => shared.expert.linear_mut(id.role),
            (None, None) => None,
        }
    }

    /// Returns which of the tokens `normed` `[n, hidden]` each expert gets, and with what weight.
    ///
    /// # Errors
    /// If a logit is not finite.
    pub fn assign(&self, backend: &B, normed: &B::Tensor) -> Result<Vec<Assigned>> {
        let logits = logits(backend, &self.router, normed, self.rule.experts)?;
        ensure!(logits.iter().all(|logit| logit.is_finite()), "a router's logit is not a finite number");
        Ok(self.rule.route(&logits, self.choice_bias.as_deref()))
    }

    /// Adds what the mixture makes of `normed` `[n, hidden]` to the residual stream `x` `[n, hidden]`. `observe` sees the
    /// inputs of every linear, expert by expert: those of its tokens.
    pub fn add_forward(
        &self,
        backend: &B,
        x: &mut B::Tensor,
        normed: &B::Tensor,
        observe: Observe<B>,
    ) -> Result<()> {
        let assigned = self.assign(backend, normed)?;
        for (at, (expert, Assigned { rows, weights })) in self.experts.iter().zip(&assigned).enumerate() {
            if rows.is_empty() {
                continue;
            }
            let input = backend.select_rows(normed, rows)?;
            observe(Role::Gate, Some(at), &input)?;
            let mixed = expert.mixed(backend, &input)?;
            observe(Role::Down, Some(at), &mixed)?;
            backend.add_rows(x, rows, weights, &expert.down.forward(backend, &mixed)?)?;
        }
        let Some(Shared { expert, .. }) = &self.shared else { return Ok(()) };
        observe(Role::SharedGate, None, normed)?;
        let mixed = expert.mixed(backend, normed)?;
        observe(Role::SharedDown, None, &mixed)?;
        match self.shared_weights(backend, normed)? {
            None => expert.down.add_forward(backend, x, &mixed),
            Some(weights) => {
                let rows: Vec<usize> = (0..weights.len()).collect();
                backend.add_rows(x, &rows, &weights, &expert.down.forward(backend, &mixed)?)
            }
        }
    }

    /// Returns how much the shared expert counts for each token; `None` if it counts whole.
    fn shared_weights(&self, backend: &B, normed: &B::Tensor) -> Result<Option<Vec<f32>>> {
        let Some(gate) = self.shared.as_ref().and_then(|shared| shared.gate.as_ref()) else {
            return Ok(None);
        };
        let logits = logits(backend, gate, normed, 1)?;
        Ok(Some(logits.into_iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect()))
    }
}

/// Returns a linear's output `[n, outputs]` in F32 whatever the device's activations are: the choice of experts hangs on it.
fn logits<B: Backend>(
    backend: &B,
    linear: &Linear<B>,
    input: &B::Tensor,
    outputs: usize,
) -> Result<Vec<f32>> {
    let tokens = backend.rows(input);
    let mut sums = backend.tensor(tokens, outputs, &vec![0.0; tokens * outputs])?;
    backend.linear_add(&mut sums, input, &linear.weight, None, linear.rounding)?;
    backend.read(&sums)
}
