//! Which experts of a mixture a token goes to, and how much each counts.
//!
//! Router logits become scores; the best experts by score (plus a bias that only chooses) are kept, where asked only of the best
//! groups; their scores, renormalised and scaled where asked, weigh their outputs. Formulas as in the classes of
//! transformers 5.17 that the variants name.

use anyhow::{Result, ensure};

/// How logits become scores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    /// Softmax over all experts (`Qwen3MoeTopKRouter`, `MixtralTopKRouter`, `DeepseekV2Moe`).
    Softmax,
    /// The logistic function of each (`DeepseekV3TopkRouter`, `Glm4MoeTopkRouter`, `MiniMaxM2`).
    Sigmoid,
    /// Softmax over the chosen experts' logits alone (`GptOssTopKRouter`).
    SoftmaxOfChosen,
}

/// How a group of experts is ranked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// By its best expert (DeepSeek V2's `group_limited_greedy`).
    Best,
    /// By the sum of its best two (DeepSeek V3).
    BestTwo,
}

/// Groups of consecutive experts, of which only some may be chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// Number of groups (`n_group`).
    pub count: usize,
    /// How many stay (`topk_group`).
    pub kept: usize,
    /// What ranks them.
    pub score: GroupScore,
}

/// The rule of a mixture's router.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Router {
    /// Number of experts.
    pub experts: usize,
    /// Experts a token goes to.
    pub top_k: usize,
    /// How logits become scores.
    pub scores: Scores,
    /// Restriction to groups, if any.
    pub groups: Option<Groups>,
    /// Whether chosen scores are divided by their sum.
    pub renormalise: bool,
    /// Factor of all weights (`routed_scaling_factor`).
    pub scale: f32,
}

/// The tokens of one expert.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Assigned {
    /// Rows of the input, ascending.
    pub rows: Vec<usize>,
    /// How much the expert's output counts for each.
    pub weights: Vec<f32>,
}

impl Router {
    /// Checks that the numbers fit each other.
    ///
    /// # Errors
    /// Names the number that does not.
    pub fn validated(self) -> Result<Self> {
        let Router { experts, top_k, groups, .. } = self;
        ensure!(experts > 0, "a mixture of 0 experts; wanted at least one");
        ensure!(
            (1..=experts).contains(&top_k),
            "each token goes to {top_k} of {experts} experts; wanted 1 to {experts}"
        );
        if let Some(Groups { count, kept, score }) = groups {
            ensure!(
                count > 0 && experts.is_multiple_of(count),
                "{experts} experts do not fall into {count} equal groups (`n_group`)"
            );
            ensure!((1..=count).contains(&kept), "`topk_group` is {kept}; wanted 1 to {count}");
            let members = experts / count;
            ensure!(
                top_k <= kept * members,
                "each token goes to {top_k} experts, but {kept} groups hold only {}",
                kept * members
            );
            ensure!(
                score != GroupScore::BestTwo || members >= 2,
                "groups of one expert have no two best; wanted at least two experts in each of {count} groups"
            );
        }
        Ok(self)
    }

    /// Returns each expert's tokens for router logits `[n, experts]`. `bias` `[experts]` is added to the scores where
    /// experts are chosen, and not to the weights. Equal scores go to the lower expert.
    pub fn route(&self, logits: &[f32], bias: Option<&[f32]>) -> Vec<Assigned> {
        let mut assigned = vec![Assigned::default(); self.experts];
        for (row, logits) in logits.chunks_exact(self.experts).enumerate() {
            for (expert, weight) in self.choose(logits, bias) {
                assigned[expert].rows.push(row);
                assigned[expert].weights.push(weight);
            }
        }
        assigned
    }

    /// Returns the experts of one token and their weights, best first.
    pub fn choose(&self, logits: &[f32], bias: Option<&[f32]>) -> Vec<(usize, f32)> {
        let scores = match self.scores {
            Scores::Softmax => softmax(logits),
            Scores::Sigmoid => logits.iter().map(|&x| 1.0 / (1.0 + (-x).exp())).collect(),
            Scores::SoftmaxOfChosen => logits.to_vec(),
        };
        let mut ranked = scores.clone();
        for (score, bias) in ranked.iter_mut().zip(bias.into_iter().flatten()) {
            *score += bias;
        }
        if let Some(groups) = self.groups {
            groups.restrict(&mut ranked);
        }
        let chosen = best(&ranked, self.top_k);
        let mut weights: Vec<f32> = chosen.iter().map(|&expert| scores[expert]).collect();
        if self.scores == Scores::SoftmaxOfChosen {
            weights = softmax(&weights);
        }
        if self.renormalise {
            // DeepSeek's guard against a sum of zero; it is below the last bit of any other sum.
            let sum = weights.iter().sum::<f32>() + 1e-20;
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
        chosen.into_iter().zip(weights.into_iter().map(|weight| weight * self.scale)).collect()
    }
}

impl Groups {
    /// Sets the scores of experts outside the best groups so that they come last.
    fn restrict(&self, scores: &mut [f32]) {
        let members = scores.len() / self.count;
        let of_group = |group: &[f32]| match self.score {
            GroupScore::Best => group.iter().copied().fold(f32::NEG_INFINITY, f32::max),
            GroupScore::BestTwo => best(group, 2).into_iter().map(|at| group[at]).sum(),
        };
        let ranks: Vec<f32> = scores.chunks_exact(members).map(of_group).collect();
        let kept = best(&ranks, self.kept);
        for (group, scores) in scores.chunks_exact_mut(members).enumerate() {
            if !kept.contains(&group) {
                scores.fill(f32::NEG_INFINITY);
            }
        }
    }
}

/// Returns the places of the `count` largest values, largest first; the lower place on ties.
fn best(values: &[f32], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..values.len()).collect();
    places.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    places.truncate(count);
    places
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f32> = logits.iter().map(|x| (x - max).exp()).collect();
    let sum: f32 = exponentials.iter().sum();
    exponentials.into_iter().map(|x| x / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Router = Router {
        experts: 4,
        top_k: 2,
        scores: Scores::Softmax,
        groups: None,
        renormalise: false,
        scale: 1.0,
    };

    fn close(found: &[(usize, f32)], wanted: &[(usize, f64)]) {
        assert_eq!(found.len(), wanted.len());
        for (found, wanted) in found.iter().zip(wanted) {
            assert_eq!(found.0, wanted.0, "{found:?}");
            assert!((found.1 as f64 - wanted.1).abs() < 1e-6, "{found:?} {wanted:?}");
        }
    }

    #[test]
    fn softmax_then_choice_keeps_or_renormalises_the_scores() {
        // Logits that are logarithms of 1, 2, 3, 4: scores .1 .2 .3 .4.
        let logits: Vec<f32> = [1f32, 4.0, 2.0, 3.0].iter().map(|x| x.ln()).collect();
        close(&PLAIN.choose(&logits, None), &[(1, 0.4), (3, 0.3)]);
        let renormalised = Router { renormalise: true, scale: 2.5, ..PLAIN };
        close(&renormalised.choose(&logits, None), &[(1, 2.5 * 4.0 / 7.0), (3, 2.5 * 3.0 / 7.0)]);
        let chosen_first = Router { scores: Scores::SoftmaxOfChosen, ..PLAIN };
        close(&chosen_first.choose(&logits, None), &[(1, 4.0 / 7.0), (3, 3.0 / 7.0)]);
    }

    #[test]
    fn a_bias_chooses_but_does_not_weigh() {
        let router = Router { scores: Scores::Sigmoid, ..PLAIN };
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let chosen = router.choose(&[0.0, 1.0, 2.0, -1.0], Some(&[0.0, 0.0, -10.0, 10.0]));
        close(&chosen, &[(3, sigmoid(-1.0)), (1, sigmoid(1.0))]);
    }

    #[test]
    fn only_the_best_groups_are_chosen_from() {
        let scores = Scores::Softmax;
        let groups = |score| Some(Groups { count: 2, kept: 1, score });
        // Group 0 has the best expert, group 1 the best two.
        let logits: Vec<f32> = [4f32, 0.5, 3.0, 2.5].iter().map(|x| x.ln()).collect();
        let best = Router { scores, groups: groups(GroupScore::Best), ..PLAIN };
        assert_eq!(best.choose(&logits, None).iter().map(|x| x.0).collect::<Vec<_>>(), [0, 1]);
        let two = Router { scores, groups: groups(GroupScore::BestTwo), ..PLAIN };
        assert_eq!(two.choose(&logits, None).iter().map(|x| x.0).collect::<Vec<_>>(), [2, 3]);
    }

    #[test]
    fn tokens_are_listed_by_expert_and_ties_go_to_the_lower_one() {
        let router = Router { top_k: 1, ..PLAIN };
        let assigned = router.route(&[0.0, 5.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 9.0, 0.0, 0.0], None);
        assert_eq!(assigned[1].rows, [0, 2]);
        assert_eq!(assigned[0].rows, [1]);
        assert_eq!(assigned[0].weights, [0.25]);
        assert!(assigned[2].rows.is_empty() && assigned[3].rows.is_empty());
    }

    #[test]
    fn numbers_that_do_not_fit_are_refused_by_name() {
        let groups = |count, kept, score| Some(Groups { count, kept, score });
        for (router, word) in [
            (Router { experts: 0, ..PLAIN }, "0 experts"),
            (Router { top_k: 5, ..PLAIN }, "wanted 1 to 4"),
            (Router { top_k: 0, ..PLAIN }, "wanted 1 to 4"),
            (Router { groups: groups(3, 1, GroupScore::Best), ..PLAIN }, "`n_group`"),
            (Router { groups: groups(2, 3, GroupScore::Best), ..PLAIN }, "`topk_group`"),
            (Router { top_k: 2, groups: groups(4, 1, GroupScore::Best), ..PLAIN }, "hold only 1"),
            (Router { top_k: 1, groups: groups(4, 1, GroupScore::BestTwo), ..PLAIN }, "no two best"),
        ] {
            let message = router.validated().unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }
}
