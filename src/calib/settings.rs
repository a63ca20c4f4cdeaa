//! The settings of a calibrated run, and what each linear gets of them.

use serde::{Deserialize, Serialize};

use crate::method::mismatch::Strength;
use crate::method::solve::Knobs;
use crate::names::Role;
use crate::scheme::fit::ScaleRule;

/// How a model is calibrated.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// Strength of the input-mismatch correction of q, k, v.
    pub mismatch: f32,
    /// The same for all other linears.
    pub mismatch_later: f32,
    /// Strength with which o and down make up for the residual stream's drift.
    pub residual: f32,
    /// Damping relative to the Hessian's mean diagonal.
    pub damp: f32,
    /// Coordinate-descent sweeps over codes and scales.
    pub sweeps: usize,
    /// How power-of-two scales are chosen.
    pub scale_rule: ScaleRule,
    /// Power of a token's gradient energy with which it counts ([`super::token_energies`]); 0: all alike.
    pub token_power: f32,
    /// Strength with which input channels behind norms are rescaled, folded into the gains ([`super::smoothing`]); 0: not.
    pub smoothing: f32,
    /// The same for the input channels of down, folded into up.
    pub inner_smoothing: f32,
}

impl Default for Settings {
    /// The best fixed settings over the models measured: MXFP4 KLD .0993 and .1249 on tiny-llama and small-qwen3, where
    /// strengths of .5 / .75 / .5 gave .1005 and .1259, and .25 / .5 / .5 gave .0999 and .1267.
    fn default() -> Self {
        Settings {
            mismatch: 0.4,
            mismatch_later: 0.6,
            residual: 0.35,
            damp: 0.05,
            sweeps: 4,
            scale_rule: ScaleRule::Search,
            token_power: 0.5,
            smoothing: 0.0,
            inner_smoothing: 0.0,
        }
    }
}

impl Settings {
    /// Returns the settings to start from for linears whose inputs engines round or leave alone.
    ///
    /// Rounding down's inputs costs four fifths of what rounding all inputs does (small-qwen3, INT8 per token: KLD .0043 of
    /// .0054), and moving size from them to up takes 7 % of the whole away at this strength, 4 % at .4 (simulated with nearest codes). Rounded inputs differ
    /// from the full model's more than quantized weights explain, so less of that is corrected (5 % of the KLD on text kept out).
    pub fn for_inputs(rounded: bool) -> Self {
        let plain = Settings::default();
        if !rounded {
            return plain;
        }
        Settings {
            mismatch: 0.6 * plain.mismatch,
            mismatch_later: 0.6 * plain.mismatch_later,
            residual: 0.6 * plain.residual,
            // What is left is the inputs' error more than the weights': tokens that matter did not gain by it (.00328 of .00325
            // on tiny-llama, .00582 of .00577 on small-qwen3).
            token_power: 0.0,
            // Channels of very different sizes cannot share one scale.
            smoothing: 0.5,
            inner_smoothing: 0.5,
            ..plain
        }
    }

    /// Returns what the linears of a stage get; `role` is any of them.
    pub fn knobs(&self, role: Role) -> Knobs {
        let inputs = match role {
            Role::Q | Role::K | Role::V => self.mismatch,
            _ => self.mismatch_later,
        };
        Knobs {
            strength: Strength { inputs, residual: self.residual },
            damp: self.damp,
            sweeps: self.sweeps,
            scale_rule: self.scale_rule,
        }
    }
}
