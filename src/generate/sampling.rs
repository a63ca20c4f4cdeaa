//! Which token comes next: the same on every device that computed the same logits.
//!
//! After the exponential everything is a whole number, so that sums have no order, and random numbers are a function of
//! where they are used:
//!
//! ```text
//! weight[i] = ⌊(2^30 - 64) · exp((logit[i] - largest) / temperature)⌋
//! threshold = the largest t with Σ weight[weight ≥ t] ≥ top_p · Σ weight          equally likely tokens go together
//! token     = the first id at which the running sum of weight[weight ≥ threshold] passes u · its total, 0 ≤ u < 1
//! ```
//!
//! A token less than 2^-30 as likely as the most likely one has no weight and is never drawn.

use anyhow::{Result, ensure};

use crate::backend::cpu::exp;

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 always takes the most likely token.
    pub temperature: f32,
    /// Tokens are drawn from the fewest likeliest whose probability sums to this, more than 0 and at most 1 (Holtzman et al.,
    /// "The Curious Case of Neural Text Degeneration", 2019).
    pub top_p: f32,
    /// The same seed draws the same tokens; every prompt has its own random numbers.
    pub seed: u64,
}

impl Sampling {
    /// Always the most likely token.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };

    /// Errors on numbers that define no distribution.
    pub fn check(&self) -> Result<()> {
        let temperature = self.temperature;
        ensure!(
            temperature == 0.0 || (temperature > 0.0 && temperature.is_normal()),
            "a temperature of {temperature}; use 0 (the most likely token) or more"
        );
        ensure!(
            self.top_p > 0.0 && self.top_p <= 1.0,
            "a top-p of {}; use more than 0 and at most 1",
            self.top_p
        );
        Ok(())
    }

    /// Returns how the tokens of prompt number `prompt` are chosen.
    pub fn draw(&self, prompt: u64) -> Draw {
        let inverse_temperature = if self.temperature == 0.0 { 0.0 } else { self.temperature.recip() };
        Draw { inverse_temperature, top_p: self.top_p, stream: random(random(self.seed, 0), prompt) }
    }
}

/// How the tokens of one text are chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// 0: always the most likely token.
    pub(crate) inverse_temperature: f32,
    pub(crate) top_p: f32,
    /// Key of the text's random numbers.
    pub(crate) stream: u64,
}

/// Weight of the most likely token: the largest F32 below 2^30.
const WHOLE: f32 = 1_073_741_760.0;

impl Draw {
    /// Always the most likely token, the lowest id on ties.
    pub const GREEDY: Draw = Draw { inverse_temperature: 0.0, top_p: 1.0, stream: 0 };

    /// Returns whether nothing is drawn.
    pub fn is_greedy(&self) -> bool {
        self.inverse_temperature == 0.0
    }

    /// Returns the token that stands at `position` of the text, given its logits; `None` where those are not finite.
    pub fn choose(&self, logits: &[f32], position: usize) -> Option<u32> {
        let (top, largest) = most_likely(logits)?;
        if self.is_greedy() {
            return Some(top);
        }
        let weight = |&logit: &f32| (exp((logit - largest) * self.inverse_temperature) * WHOLE) as u32;
        let weights: Vec<u32> = logits.iter().map(weight).collect();
        let threshold = self.threshold(&weights)?;
        let kept = || weights.iter().map(|&weight| if weight < threshold { 0 } else { u64::from(weight) });
        let u = u128::from(random(self.stream, position as u64));
        let target = ((u * u128::from(kept().sum::<u64>())) >> 64) as u64;
        let mut sum = 0;
        let passes = |weight| {
            sum += weight;
            sum > target
        };
        kept().position(passes).map(|id| id as u32)
    }

    /// Returns the smallest weight that top-p keeps; `None` where no token has any.
    fn threshold(&self, weights: &[u32]) -> Option<u32> {
        let total: u64 = weights.iter().copied().map(u64::from).sum();
        let wanted = (f64::from(self.top_p) * total as f64).ceil() as u64;
        let mut likely: Vec<u32> = weights.iter().copied().filter(|&weight| weight > 0).collect();
        likely.sort_unstable_by(|a, b| b.cmp(a));
        let mut sum = 0;
        likely.into_iter().find(|&weight| {
            sum += u64::from(weight);
            sum >= wanted
        })
    }
}

/// Returns the first largest number and its place; `None` without any above -∞.
fn most_likely(logits: &[f32]) -> Option<(u32, f32)> {
    let mut best = (None, f32::NEG_INFINITY);
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best.1 {
            best = (Some(id as u32), logit);
        }
    }
    Some((best.0?, best.1))
}

/// Returns random number `counter` of a stream: SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number
/// Generators", OOPSLA 2014), whose state is a counter.
fn random(stream: u64, counter: u64) -> u64 {
    let mut z = stream.wrapping_add(counter.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits of probabilities 1/2, 1/4, 1/8 and 1/8, in a mixed order.
    fn logits() -> [f32; 4] {
        [0.125f32.ln(), 0.5f32.ln(), 0.25f32.ln(), 0.125f32.ln()]
    }

    fn counts(sampling: Sampling, draws: usize) -> [usize; 4] {
        let mut counts = [0; 4];
        let draw = sampling.draw(0);
        let chosen = (0..draws).filter_map(|position| draw.choose(&logits(), position));
        chosen.for_each(|id| counts[id as usize] += 1);
        counts
    }

    #[test]
    fn draws_have_the_frequencies_of_the_distribution() {
        for temperature in [1.0, 2.0] {
            let counts = counts(Sampling { temperature, top_p: 1.0, seed: 7 }, 16_000);
            let powers = logits().map(|logit| f64::from(logit / temperature).exp());
            for (count, power) in counts.iter().zip(powers) {
                let share = power / powers.iter().sum::<f64>();
                // Five standard deviations of a binomial count.
                let deviation: f64 = 16_000.0 * share * (1.0 - share);
                assert!((*count as f64 - 16_000.0 * share).abs() < 5.0 * deviation.sqrt(), "{counts:?}");
            }
        }
    }

    #[test]
    fn top_p_leaves_out_what_is_unlikely_and_keeps_equals_together() {
        let of = |top_p| counts(Sampling { temperature: 1.0, top_p, seed: 7 }, 500);
        assert_eq!(of(0.49)[1], 500);
        let [a, b, c, d] = of(0.7);
        assert!(a == 0 && d == 0 && b > 250 && c > 100, "{b} {c}");
        let [a, _, _, d] = of(0.8);
        assert!(a > 0 && d > 0, "one of two equals would do, and both are kept");
    }

    /// Frequencies over many tokens against probabilities in F64: χ² with 99 degrees of freedom has mean 99 and variance 198.
    #[test]
    fn frequencies_over_a_vocabulary_pass_a_chi_squared_test() {
        let logits: Vec<f32> = (0..100).map(|id| (id * 37 % 100) as f32 / 25.0).collect();
        let draw = Sampling { temperature: 0.8, top_p: 1.0, seed: 3 }.draw(5);
        let total: f64 = logits.iter().map(|&logit| (f64::from(logit) / 0.8).exp()).sum();
        let mut counts = [0u32; 100];
        let draws = 40_000;
        (0..draws).filter_map(|at| draw.choose(&logits, at)).for_each(|id| counts[id as usize] += 1);
        let deviation = |(&count, &logit): (&u32, &f32)| {
            let expected = draws as f64 * (f64::from(logit) / 0.8).exp() / total;
            (f64::from(count) - expected).powi(2) / expected
        };
        let chi_squared: f64 = counts.iter().zip(&logits).map(deviation).sum();
        assert!((chi_squared - 99.0).abs() < 5.0 * 198f64.sqrt(), "{chi_squared}");
    }

    #[test]
    fn a_low_temperature_is_greedy_and_a_seed_repeats() {
        assert_eq!(counts(Sampling { temperature: 0.01, top_p: 1.0, seed: 7 }, 200)[1], 200);
        assert_eq!(Draw::GREEDY.choose(&[0.5, 2.0, 2.0, -1.0], 9), Some(1), "the lowest id on ties");
        let sampling = Sampling { temperature: 1.0, top_p: 1.0, seed: 9 };
        let text = |sampling: Sampling, prompt| -> Vec<Option<u32>> {
            (0..40).map(|position| sampling.draw(prompt).choose(&logits(), position)).collect()
        };
        assert_eq!(text(sampling, 3), text(sampling, 3));
        assert_ne!(text(sampling, 3), text(sampling, 4));
        assert_ne!(text(sampling, 3), text(Sampling { seed: 10, ..sampling }, 3));
        // Streams of neighbouring prompts are not each other's continuation.
        assert_ne!(text(sampling, 3)[1..], text(sampling, 4)[..39]);
    }

    #[test]
    fn logits_that_are_not_finite_choose_nothing_and_nan_counts_nothing() {
        let draw = Sampling { temperature: 1.0, top_p: 0.9, seed: 1 }.draw(0);
        for draw in [draw, Draw::GREEDY] {
            assert_eq!(draw.choose(&[f32::NAN; 3], 0), None);
            assert_eq!(draw.choose(&[f32::NEG_INFINITY; 3], 0), None);
            assert_eq!(draw.choose(&[f32::NAN, 1.0, f32::NEG_INFINITY], 0), Some(1));
        }
        assert_eq!(draw.choose(&[f32::INFINITY, 1.0], 0), None);
    }

    #[test]
    fn numbers_that_define_no_distribution_are_refused() {
        let refused = |temperature, top_p| Sampling { temperature, top_p, seed: 0 }.check().is_err();
        assert!(refused(-1.0, 1.0) && refused(f32::NAN, 1.0) && refused(f32::INFINITY, 1.0));
        assert!(refused(1e-40, 1.0), "its reciprocal is infinite");
        assert!(refused(1.0, 0.0) && refused(1.0, 1.5) && refused(1.0, f32::NAN));
        assert!(Sampling::GREEDY.check().is_ok() && Sampling::GREEDY.draw(4).is_greedy());
    }
}
