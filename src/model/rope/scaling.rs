//! The angles of rotary embedding: θ, the share of a head that turns, and what stretches them to longer contexts.
//!
//! The formulas are those of transformers 5.17, `modeling_rope_utils.py` (`ROPE_INIT_FUNCTIONS`), in F64, rounded once.

use std::f64::consts::PI;

use anyhow::{Result, ensure};

use crate::backend::{DynamicAngles, LongAngles, Pairing, Rope};

/// Rotary embedding as a configuration states it, all defaults filled in.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeParameters {
    /// Base of the wavelengths: pair i of n has 2π · θ^(i / n) before scaling.
    pub theta: f32,
    /// Share of a head that turns (`partial_rotary_factor`).
    pub share: f64,
    /// Which values turn together.
    pub pairing: Pairing,
    /// What happens to the wavelengths.
    pub scaling: RopeScaling,
}

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
    /// θ grows with a sequence that exceeds the context and is plain up to there ([`DynamicAngles`]).
    Dynamic {
        /// How fast it grows.
        factor: f32,
        /// `max_position_embeddings`
        context: usize,
    },
    /// All frequencies divided by a factor; the share of a head that turns spreads over the wavelengths of the whole head,
    /// of which it takes the shortest (Gemma 4).
    Proportional {
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
    /// YaRN (Peng et al., 2023): as Llama 3 with another ramp, and a factor of cosines and sines.
    Yarn(Yarn),
    /// LongRoPE (Ding et al., 2024): a divisor for each frequency, others for sequences past the original context.
    LongRope(LongRope),
    /// A divisor for each frequency, `[pairs]`: how GGUF files state Llama 3 scaling.
    Divisors(Vec<f32>),
}

/// Parameters of YaRN.
#[derive(Clone, Debug, PartialEq)]
pub struct Yarn {
    /// Divisor of long wavelengths.
    pub factor: f32,
    /// `original_max_position_embeddings`
    pub original_context: usize,
    /// Pairs that turn more often than this over the original context are kept.
    pub beta_fast: f32,
    /// Pairs that turn less often than this over the original context are divided by `factor`.
    pub beta_slow: f32,
    /// Whether the ends of the ramp are whole pairs.
    pub truncate: bool,
    /// Factor of cosines and sines (`attention_factor`).
    pub magnitude: f32,
}

/// Parameters of LongRoPE.
#[derive(Clone, Debug, PartialEq)]
pub struct LongRope {
    /// Divisors up to the original context, `[pairs]`.
    pub short: Vec<f32>,
    /// Divisors of longer sequences, `[pairs]`.
    pub long: Vec<f32>,
    /// `original_max_position_embeddings`
    pub original_context: usize,
    /// Factor of cosines and sines (`attention_factor`).
    pub magnitude: f32,
}

impl RopeParameters {
    /// Returns plain rotation of whole heads, in halves.
    pub fn plain(theta: f32) -> Self {
        RopeParameters { theta, share: 1.0, pairing: Pairing::Halves, scaling: RopeScaling::None }
    }

    /// Returns how many values of a head turn.
    pub fn rotary_dim(&self, head_dim: usize) -> usize {
        match self.scaling {
            RopeScaling::Proportional { .. } => head_dim,
            _ => (head_dim as f64 * self.share) as usize,
        }
    }

    /// Returns the share of a head with which [`RopeParameters::rotary_dim`] is `rotary_dim`.
    pub fn share_of(rotary_dim: usize, head_dim: usize) -> f64 {
        let share = rotary_dim as f64 / head_dim as f64;
        if (head_dim as f64 * share) as usize == rotary_dim { share } else { share.next_up() }
    }

    /// Returns the rotation of heads of `head_dim` values.
    pub fn rope(&self, head_dim: usize) -> Rope {
        let frequencies = self.frequencies(head_dim);
        let divided = |divisors: Vec<f64>| {
            frequencies.iter().zip(divisors).map(|(f, divisor)| (f / divisor) as f32).collect()
        };
        Rope {
            head_dim,
            pairing: self.pairing,
            inverse_frequencies: divided(self.divisors(head_dim)),
            long: match &self.scaling {
                RopeScaling::LongRope(LongRope { long, original_context, .. }) => Some(LongAngles {
                    beyond: *original_context,
                    inverse_frequencies: divided(long.iter().map(|&divisor| divisor as f64).collect()),
                }),
                _ => None,
            },
            dynamic: match self.scaling {
                RopeScaling::Dynamic { factor, context } => Some(DynamicAngles { context, factor }),
                _ => None,
            },
            magnitude: self.magnitude(),
        }
    }

    /// Returns the factor of cosines and sines.
    pub fn magnitude(&self) -> f32 {
        match &self.scaling {
            RopeScaling::Yarn(Yarn { magnitude, .. }) => *magnitude,
            RopeScaling::LongRope(LongRope { magnitude, .. }) => *magnitude,
            _ => 1.0,
        }
    }

    /// Returns what scaling divides each frequency by, `[pairs]`; for Llama 3 these are GGUF's `rope_freqs`.
    pub fn divisors(&self, head_dim: usize) -> Vec<f64> {
        let frequencies = self.frequencies(head_dim);
        let pairs = frequencies.len();
        match &self.scaling {
            RopeScaling::None | RopeScaling::Dynamic { .. } => vec![1.0; pairs],
            RopeScaling::Linear { factor } => vec![*factor as f64; pairs],
            RopeScaling::Proportional { factor } => {
                let turning = (self.share * head_dim as f64 / 2.0) as usize;
                (0..pairs).map(|i| if i < turning { *factor as f64 } else { f64::INFINITY }).collect()
            }
            RopeScaling::Llama3 { factor, low, high, original_context } => {
                let divisor =
                    |f: &f64| llama3(*original_context as f64 * f / (2.0 * PI), *factor, *low, *high);
                frequencies.iter().map(divisor).collect()
            }
            RopeScaling::Yarn(yarn) => {
                let [start, end] = yarn.ramp(self.theta as f64, 2 * pairs);
                let divided = |i: usize| ((i as f64 - start) / (end - start)).clamp(0.0, 1.0);
                let factor = yarn.factor as f64;
                (0..pairs).map(|i| 1.0 / (divided(i) / factor + (1.0 - divided(i)))).collect()
            }
            RopeScaling::LongRope(LongRope { short: divisors, .. }) | RopeScaling::Divisors(divisors) => {
                divisors.iter().map(|&divisor| divisor as f64).collect()
            }
        }
    }

    /// Returns angles per position without scaling, θ^(-i / pairs).
    fn frequencies(&self, head_dim: usize) -> Vec<f64> {
        let pairs = self.rotary_dim(head_dim) / 2;
        (0..pairs).map(|i| (self.theta as f64).powf(-(i as f64) / pairs as f64)).collect()
    }

    /// Refuses numbers that describe no rotation of heads of `head_dim` values, whatever file they came from.
    ///
    /// # Errors
    /// Names the number and what it has to be.
    pub fn validate(&self, head_dim: usize) -> Result<()> {
        ensure!(head_dim.is_multiple_of(2), "`head_dim` {head_dim} is odd; RoPE rotates pairs");
        positive("rope_theta", self.theta)?;
        let share = self.share;
        ensure!(0.0 < share && share <= 1.0, "`partial_rotary_factor` is {share}; wanted a share of a head");
        let rotary = self.rotary_dim(head_dim);
        ensure!(
            rotary > 0 && rotary.is_multiple_of(2),
            "`partial_rotary_factor` {share} rotates {rotary} of {head_dim} values; RoPE rotates pairs"
        );
        match &self.scaling {
            RopeScaling::None => Ok(()),
            RopeScaling::Linear { factor } | RopeScaling::Proportional { factor } => {
                positive("factor", *factor)
            }
            RopeScaling::Dynamic { factor, context } => {
                ensure!(*factor >= 1.0 && factor.is_finite(), "`factor` is {factor}; wanted 1 or more");
                ensure!(*context > 0, "`max_position_embeddings` is 0; wanted a positive number");
                ensure!(rotary > 2, "type `dynamic` wants more than one pair to turn");
                Ok(())
            }
            RopeScaling::Llama3 { factor, low, high, original_context } => {
                for (name, value) in
                    [("factor", factor), ("low_freq_factor", low), ("high_freq_factor", high)]
                {
                    positive(name, *value)?;
                }
                ensure!(low < high, "`low_freq_factor` {low} is not below `high_freq_factor` {high}");
                within_a_context(*original_context)
            }
            RopeScaling::Yarn(yarn) => yarn.validate(self.theta),
            RopeScaling::LongRope(LongRope { short, long, original_context, magnitude }) => {
                divisors("short_factor", short, rotary / 2)?;
                divisors("long_factor", long, rotary / 2)?;
                positive("attention_factor", *magnitude)?;
                within_a_context(*original_context)
            }
            RopeScaling::Divisors(table) => divisors("rope_freqs", table, rotary / 2),
        }
    }
}

/// Returns the divisor of a pair that turns `periods` times over the original context C, so of wavelength λ = C / periods:
/// λ < C / high is kept, λ > C / low divided by `factor`, and between the reciprocal is interpolated.
fn llama3(periods: f64, factor: f32, low: f32, high: f32) -> f64 {
    let (factor, low, high) = (factor as f64, low as f64, high as f64);
    if periods > high {
        1.0
    } else if periods < low {
        factor
    } else {
        let kept = (periods - low) / (high - low);
        1.0 / ((1.0 - kept) / factor + kept)
    }
}

impl Yarn {
    /// Returns the factor of cosines and sines that follows from the others: 0.1 · ln(factor) + 1.
    pub fn usual_magnitude(factor: f32) -> f32 {
        Yarn::magnitude_of(factor as f64, 1.0) as f32
    }

    /// Returns 0.1 · `mscale` · ln(factor) + 1 for factors past 1.
    pub fn magnitude_of(factor: f64, mscale: f64) -> f64 {
        if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 }
    }

    /// Returns where among the pairs division starts and where it is full, for `rotary_dim` values that turn.
    fn ramp(&self, theta: f64, rotary_dim: usize) -> [f64; 2] {
        let width = rotary_dim as f64;
        let pair_turning = |times: f32| {
            width * (self.original_context as f64 / (times as f64 * 2.0 * PI)).ln() / (2.0 * theta.ln())
        };
        let [start, end] = [self.beta_fast, self.beta_slow].map(pair_turning);
        let [start, end] = if self.truncate { [start.floor(), end.ceil()] } else { [start, end] };
        let [start, end] = [start.max(0.0), end.min(width - 1.0)];
        if start == end { [start, end + 0.001] } else { [start, end] }
    }

    fn validate(&self, theta: f32) -> Result<()> {
        let Yarn { factor, original_context, beta_fast, beta_slow, truncate: _, magnitude } = self;
        for (name, value) in [
            ("factor", factor),
            ("beta_fast", beta_fast),
            ("beta_slow", beta_slow),
            ("attention_factor", magnitude),
        ] {
            positive(name, *value)?;
        }
        ensure!(theta > 1.0, "`rope_theta` is {theta}; YaRN wants more than 1");
        ensure!(beta_slow <= beta_fast, "`beta_slow` {beta_slow} is above `beta_fast` {beta_fast}");
        within_a_context(*original_context)
    }
}

impl LongRope {
    /// Returns the factor of cosines and sines that follows from how far the original context is stretched:
    /// sqrt(1 + ln(factor) / ln(original_context)).
    pub fn usual_magnitude(factor: f64, original_context: usize) -> f32 {
        if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original_context as f64).ln()).sqrt() as f32 }
    }
}

fn positive(name: &str, value: f32) -> Result<()> {
    ensure!(value.is_finite() && value > 0.0, "`{name}` is {value}; wanted a positive number");
    Ok(())
}

fn within_a_context(original: usize) -> Result<()> {
    ensure!(original > 1, "`original_max_position_embeddings` is {original}; wanted more than 1");
    Ok(())
}

fn divisors(name: &str, table: &[f32], wanted: usize) -> Result<()> {
    ensure!(table.len() == wanted, "`{name}`: {} RoPE divisors, wanted {wanted}", table.len());
    let wrong = table.iter().find(|x| !(x.is_finite() && **x > 0.0));
    ensure!(
        wrong.is_none(),
        "`{name}`: a RoPE divisor is {}; wanted positive numbers",
        wrong.unwrap_or(&0.0)
    );
    Ok(())
}
