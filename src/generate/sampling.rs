//! Which token comes next.

use anyhow::{Result, ensure};

/// How tokens are drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sampling {
    /// Logits are divided by this; 0 always takes the most likely token.
    pub temperature: f32,
    /// Tokens are drawn from the fewest whose probability sums to this, more than 0 and at most 1 (Holtzman et al., "The
    /// Curious Case of Neural Text Degeneration", 2019).
    pub top_p: f32,
    /// The same seed draws the same tokens; every prompt has its own sequence of random numbers.
    pub seed: u64,
}

impl Sampling {
    /// Always the most likely token.
    pub const GREEDY: Sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 0 };

    /// Returns whether nothing is drawn.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0
    }

    /// Errors on numbers that define no distribution.
    pub fn check(&self) -> Result<()> {
        ensure!(
            self.temperature.is_finite() && self.temperature >= 0.0,
            "a temperature of {}; use 0 (the most likely token) or more",
            self.temperature
        );
        ensure!(
            self.top_p > 0.0 && self.top_p <= 1.0,
            "a top-p of {}; use more than 0 and at most 1",
            self.top_p
        );
        Ok(())
    }

    /// Returns the random numbers of prompt `prompt`.
    pub fn chooser(&self, prompt: u64) -> Chooser<'_> {
        // Odd multipliers keep neighbouring prompts and seeds apart (Weyl sequence).
        let seed = self.seed.wrapping_add(prompt.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Chooser { sampling: self, random: fastrand::Rng::with_seed(seed) }
    }
}

/// One prompt's draws.
pub struct Chooser<'a> {
    sampling: &'a Sampling,
    random: fastrand::Rng,
}

impl Chooser<'_> {
    /// Draws a token from softmax(logits / temperature), restricted to the likeliest tokens that sum to top-p.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| f64::from((logit - max) / self.sampling.temperature).exp();
        let mut likely: Vec<(u32, f64)> =
            logits.iter().enumerate().map(|(id, &logit)| (id as u32, weight(logit))).collect();
        // Stable, so that ties keep the order of ids.
        likely.sort_by(|a, b| b.1.total_cmp(&a.1));
        let total: f64 = likely.iter().map(|(_, weight)| weight).sum();
        let mut kept = 0.0;
        let enough = likely.iter().position(|(_, weight)| {
            kept += weight;
            kept >= f64::from(self.sampling.top_p) * total
        });
        likely.truncate(enough.map_or(likely.len(), |last| last + 1));
        let mut left = self.random.f64() * kept;
        let drawn = likely.iter().find(|(_, weight)| {
            left -= weight;
            left < 0.0
        });
        drawn.or(likely.last()).map_or(0, |(id, _)| *id)
    }
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
        let mut chooser = sampling.chooser(0);
        (0..draws).for_each(|_| counts[chooser.choose(&logits()) as usize] += 1);
        counts
    }

    #[test]
    fn draws_have_the_frequencies_of_the_distribution() {
        let counts = counts(Sampling { temperature: 1.0, top_p: 1.0, seed: 7 }, 16_000);
        for (count, share) in counts.iter().zip([0.125, 0.5, 0.25, 0.125]) {
            // Five standard deviations of a binomial count.
            let deviation: f64 = 16_000.0 * share * (1.0 - share);
            assert!((*count as f64 - 16_000.0 * share).abs() < 5.0 * deviation.sqrt(), "{counts:?}");
        }
    }

    #[test]
    fn top_p_leaves_out_what_is_unlikely() {
        let of = |top_p| counts(Sampling { temperature: 1.0, top_p, seed: 7 }, 500);
        assert_eq!(of(0.5)[1], 500);
        let [a, b, c, d] = of(0.7);
        assert!(a == 0 && d == 0 && b > 250 && c > 100, "{b} {c}");
        let [a, _, _, d] = of(0.8);
        assert!(a > 0 && d == 0, "ties keep the lower id");
    }

    #[test]
    fn a_low_temperature_is_greedy_and_a_seed_repeats() {
        assert_eq!(counts(Sampling { temperature: 0.01, top_p: 1.0, seed: 7 }, 200)[1], 200);
        let sampling = Sampling { temperature: 1.0, top_p: 1.0, seed: 9 };
        let draw = |prompt| -> Vec<u32> {
            let mut chooser = sampling.chooser(prompt);
            (0..40).map(|_| chooser.choose(&logits())).collect()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }

    #[test]
    fn numbers_that_define_no_distribution_are_refused() {
        let refused = |temperature, top_p| Sampling { temperature, top_p, seed: 0 }.check().is_err();
        assert!(refused(-1.0, 1.0) && refused(f32::NAN, 1.0) && refused(1.0, 0.0) && refused(1.0, 1.5));
        assert!(Sampling::GREEDY.check().is_ok() && Sampling::GREEDY.is_greedy());
    }
}
