//! Rotary position embedding: which angle each pair of a head's values turns by.

use std::f64::consts::PI;

use crate::backend::Rope;

/// RoPE scaling as the configuration names it.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Plain RoPE.
    None,
    /// All frequencies divided by a factor.
    Linear {
        /// Divisor.
        factor: f32,
    },
    /// Llama 3: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of long wavelengths.
        factor: f32,
        /// `low_freq_factor`
        low: f32,
        /// `high_freq_factor`
        high: f32,
        /// `original_max_position_embeddings`
        original_context: usize,
    },
    /// A divisor for each frequency, `[head_dim / 2]`: how GGUF files state Llama 3 scaling.
    Divisors(Vec<f32>),
}

impl RopeScaling {
    /// Returns the rotary angles with scaling applied: θ^(-2i / head_dim), divided by [`RopeScaling::divisors`].
    pub fn apply(&self, theta: f32, head_dim: usize) -> Rope {
        let scaled = frequencies(theta, head_dim).zip(self.divisors(theta, head_dim));
        Rope { inverse_frequencies: scaled.map(|(f, divisor)| (f / divisor) as f32).collect() }
    }

    /// Returns what scaling divides each frequency by, `[head_dim / 2]`.
    ///
    /// With wavelength λ = 2π / frequency and original context C, Llama 3 keeps λ < C / high, divides λ > C / low by
    /// `factor`, and between interpolates the reciprocal (transformers `_compute_llama3_parameters`).
    pub fn divisors(&self, theta: f32, head_dim: usize) -> Vec<f64> {
        let divisor = |(i, frequency): (usize, f64)| match *self {
            RopeScaling::None => 1.0,
            RopeScaling::Divisors(ref divisors) => divisors[i] as f64,
            RopeScaling::Linear { factor } => factor as f64,
            RopeScaling::Llama3 { factor, low, high, original_context } => {
                let (factor, low, high) = (factor as f64, low as f64, high as f64);
                let periods = original_context as f64 * frequency / (2.0 * PI);
                if periods > high {
                    1.0
                } else if periods < low {
                    factor
                } else {
                    let kept = (periods - low) / (high - low);
                    1.0 / ((1.0 - kept) / factor + kept)
                }
            }
        };
        frequencies(theta, head_dim).enumerate().map(divisor).collect()
    }
}

/// Angles per position without scaling.
fn frequencies(theta: f32, head_dim: usize) -> impl Iterator<Item = f64> {
    let (theta, width) = (theta as f64, head_dim as f64);
    (0..head_dim / 2).map(move |i| theta.powf(-2.0 * i as f64 / width))
}
