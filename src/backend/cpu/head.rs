//! The loss head: log-likelihoods and divergences over a vocabulary that is visited block by block, so that logits exist
//! for one block at a time only. Each block leaves a summary per position; summaries merge in the order of blocks, in F64.

use std::ops::Range;

use multiversion::multiversion;
use ndarray::{Array2, Axis, s};
use rayon::prelude::*;

use super::decoded::add_decoded_product;
use super::elementwise::{exp, max, softmax, sum};
use crate::backend::{Divergence, RANKS, Score};
use crate::linalg::product::{Left, Previous, RightRows, multiply_transposed};
use crate::tensor::Matrix;

/// Vocabulary entries per block.
const BLOCK: usize = 512;

/// One position's logits over a part of the vocabulary.
#[derive(Clone, Copy)]
struct Summary {
    /// Largest logit.
    max: f32,
    /// Its token, the lowest on ties.
    top: u32,
    /// Σ exp(logit - max)
    total: f64,
    /// The target's logit; `None` while the target's block has not been merged.
    target: Option<f32>,
}

impl Summary {
    const EMPTY: Summary = Summary { max: f32::NEG_INFINITY, top: 0, total: 0.0, target: None };

    /// Joins the summary of later tokens; returns by how much each side's sums were scaled.
    fn merge(&mut self, later: &Summary) -> (f64, f64) {
        let max = if later.max > self.max { later.max } else { self.max };
        let scale = |side: f32| if side == max { 1.0 } else { ((side - max) as f64).exp() };
        let (own, other) = (scale(self.max), scale(later.max));
        self.top = if later.max > self.max { later.top } else { self.top };
        self.total = self.total * own + later.total * other;
        self.target = self.target.or(later.target);
        self.max = max;
        (own, other)
    }

    fn score(&self) -> Score {
        let target = self.target.map_or(f64::NAN, |logit| logit as f64);
        Score { nll: (self.max as f64 - target + self.total.ln()) as f32, top: self.top }
    }
}

/// The largest logits seen, largest first, and their tokens; the lowest token first on ties.
#[derive(Clone, Copy)]
struct Best {
    logits: [f32; RANKS as usize],
    tokens: [u32; RANKS as usize],
}

impl Best {
    const EMPTY: Best =
        Best { logits: [f32::NEG_INFINITY; RANKS as usize], tokens: [u32::MAX; RANKS as usize] };

    /// Takes a token in. Tokens come in ascending order.
    fn insert(&mut self, logit: f32, token: u32) {
        let mut at = RANKS as usize;
        while at > 0 && logit > self.logits[at - 1] {
            at -= 1;
        }
        if at < RANKS as usize {
            self.logits[at..].rotate_right(1);
            self.tokens[at..].rotate_right(1);
            (self.logits[at], self.tokens[at]) = (logit, token);
        }
    }

    fn rank(&self, token: u32) -> u32 {
        self.tokens.iter().position(|&t| t == token).map_or(RANKS, |at| at as u32)
    }
}

/// Two models' summaries, the model's favourites, and Σ exp(baseline logit - its max) · (baseline logit - model logit).
#[derive(Clone, Copy)]
struct Pair {
    baseline: Summary,
    model: Summary,
    best: Best,
    difference: f64,
}

impl Pair {
    const EMPTY: Pair =
        Pair { baseline: Summary::EMPTY, model: Summary::EMPTY, best: Best::EMPTY, difference: 0.0 };

    fn merge(&mut self, later: &Pair) {
        let (own, other) = self.baseline.merge(&later.baseline);
        self.model.merge(&later.model);
        later
            .best
            .logits
            .iter()
            .zip(later.best.tokens)
            .for_each(|(&logit, token)| self.best.insert(logit, token));
        self.difference = self.difference * own + later.difference * other;
    }

    /// KL(p ‖ q) = Σ p · (a - b) - lse(a) + lse(b) with p = softmax(a), q = softmax(b): exactly 0 for equal logits.
    fn divergence(&self) -> Divergence {
        let mean = self.difference / self.baseline.total;
        let maxima = self.baseline.max as f64 - self.model.max as f64;
        let kld = mean - (maxima + (self.baseline.total.ln() - self.model.total.ln()));
        Divergence {
            baseline: self.baseline.score(),
            model: self.model.score(),
            kld: kld as f32,
            rank: self.best.rank(self.baseline.top),
        }
    }
}

/// Scores every position; see [`crate::backend::Backend::score`].
pub fn score(hidden: &Array2<f32>, head: &Matrix, targets: &[u32]) -> Vec<Score> {
    let hidden = Left::rows_of(hidden.view());
    let blocks = vocabulary_blocks(head, |first, width| {
        let logits = logits(&hidden, head, first, width);
        let rows = logits.axis_iter(Axis(0)).zip(targets);
        rows.map(|(row, &target)| summarise(row.as_slice().unwrap_or(&[]), first, target)).collect()
    });
    merge(&blocks, Summary::EMPTY, |summary, later| _ = summary.merge(later))
        .iter()
        .map(Summary::score)
        .collect()
}

/// Compares every position; see [`crate::backend::Backend::compare`].
pub fn compare(
    baseline: (&Array2<f32>, &Matrix),
    model: (&Array2<f32>, &Matrix),
    targets: &[u32],
) -> Vec<Divergence> {
    let (left_a, left_b) = (Left::rows_of(baseline.0.view()), Left::rows_of(model.0.view()));
    let blocks = vocabulary_blocks(baseline.1, |first, width| {
        let (a, b) = (logits(&left_a, baseline.1, first, width), logits(&left_b, model.1, first, width));
        let rows = a.axis_iter(Axis(0)).zip(b.axis_iter(Axis(0))).zip(targets);
        rows.map(|((a, b), &target)| {
            let (a, b) = (a.to_slice().unwrap_or(&[]), b.to_slice().unwrap_or(&[]));
            let baseline = summarise(a, first, target);
            Pair {
                baseline,
                model: summarise(b, first, target),
                best: best(b, first),
                difference: difference(a, b, baseline.max),
            }
        })
        .collect()
    });
    merge(&blocks, Pair::EMPTY, Pair::merge).iter().map(Pair::divergence).collect()
}

/// Returns the gradient of the summed divergences in the model's hidden states; see
/// [`crate::backend::gradients::Gradients::divergence_gradient`].
pub fn divergence_gradient(baseline: (&Array2<f32>, &Matrix), model: (&Array2<f32>, &Matrix)) -> Array2<f32> {
    gradient(model.0, model.1, |rows, found| {
        let wanted = baseline.0.slice(s![rows, ..]);
        let mut wanted = logits(&Left::rows_of(wanted), baseline.1, 0, found.ncols());
        let rows = found.axis_iter_mut(Axis(0)).into_par_iter().zip(wanted.axis_iter_mut(Axis(0)));
        rows.for_each(|(mut found, mut wanted)| {
            let (Some(found), Some(wanted)) = (found.as_slice_mut(), wanted.as_slice_mut()) else { return };
            softmax(found, 1.0, None);
            softmax(wanted, 1.0, None);
            found.iter_mut().zip(wanted).for_each(|(q, p)| *q -= *p);
        });
    })
}

/// Returns a random gradient per position; see [`crate::backend::gradients::Gradients::fisher_gradient`].
pub fn fisher_gradient(hidden: &Array2<f32>, head: &Matrix, seed: u32) -> Array2<f32> {
    gradient(hidden, head, |rows, found| {
        found.axis_iter_mut(Axis(0)).into_par_iter().zip(rows).for_each(|(mut found, row)| {
            let Some(p) = found.as_slice_mut() else { return };
            softmax(p, 1.0, None);
            fisher(p, hashed(seed ^ hashed(row as u32)));
        });
    })
}

/// Positions whose logits exist at a time in the backward pass.
const ROWS: usize = 128;

/// Returns what `turn`, given positions and their logits, makes the logits' gradient, times the head.
fn gradient(
    hidden: &Array2<f32>,
    head: &Matrix,
    turn: impl Fn(Range<usize>, &mut Array2<f32>) + Sync,
) -> Array2<f32> {
    let (vocab, mut dx) = (head.dims()[0], Array2::zeros(hidden.dim()));
    for first in (0..hidden.nrows()).step_by(ROWS) {
        let rows = first..hidden.nrows().min(first + ROWS);
        let mut found = logits(&Left::rows_of(hidden.slice(s![rows.clone(), ..])), head, 0, vocab);
        turn(rows.clone(), &mut found);
        add_decoded_product(&found, head, dx.slice_mut(s![rows, ..]));
    }
    dx
}

/// Turns probabilities into √p ∘ ε - p · (√p · ε), with signs ε that depend on `key` and the token.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
fn fisher(p: &mut [f32], key: u32) {
    let signed_root =
        |token: usize, p: f32| f32::from_bits(p.sqrt().to_bits() ^ (hashed(key ^ token as u32) & 1) << 31);
    const LANES: usize = 16;
    let mut sums = [0f32; LANES];
    for (block, p) in p.chunks(LANES).enumerate() {
        for (lane, (sum, &p)) in sums.iter_mut().zip(p).enumerate() {
            *sum += signed_root(block * LANES + lane, p);
        }
    }
    let sum: f32 = sums.iter().sum();
    for (token, p) in p.iter_mut().enumerate() {
        *p = signed_root(token, *p) - *p * sum;
    }
}

/// A bijection of 32 bits whose low bits look random (C. Wellons' `lowbias32`, in the public domain).
#[inline(always)]
fn hashed(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// Returns what `visit(first token, number of tokens)` says of every block of the vocabulary, in order.
fn vocabulary_blocks<T: Send>(head: &Matrix, visit: impl Fn(usize, usize) -> Vec<T> + Sync) -> Vec<Vec<T>> {
    let vocab = head.dims()[0];
    let blocks: Vec<usize> = (0..vocab).step_by(BLOCK).collect();
    blocks.into_par_iter().map(|first| visit(first, BLOCK.min(vocab - first))).collect()
}

/// Returns one merged summary per position.
fn merge<T: Copy>(blocks: &[Vec<T>], empty: T, join: impl Fn(&mut T, &T)) -> Vec<T> {
    let mut merged = vec![empty; blocks.first().map_or(0, Vec::len)];
    for block in blocks {
        merged.iter_mut().zip(block).for_each(|(merged, later)| join(merged, later));
    }
    merged
}

/// Rows `first ..` of the head.
struct HeadRows<'a> {
    head: &'a Matrix,
    first: usize,
}

impl RightRows for HeadRows<'_> {
    fn decode_rows(&self, first: usize, out: &mut [f32]) {
        self.head.decode_rows(self.first + first, out);
    }
}

fn logits(hidden: &Left, head: &Matrix, first: usize, width: usize) -> Array2<f32> {
    let mut logits = Array2::zeros((hidden.rows(), width));
    multiply_transposed(hidden, &mut [(&HeadRows { head, first }, logits.view_mut())], Previous::Replaced);
    logits
}

/// Summarises the logits of tokens `first ..`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
fn summarise(logits: &[f32], first: usize, target: u32) -> Summary {
    let max = max(logits);
    let top = first + logits.iter().position(|&logit| logit == max).unwrap_or(0);
    let total = sum(logits, |logit| exp(logit - max) as f64);
    let target = (target as usize).checked_sub(first).and_then(|at| logits.get(at)).copied();
    Summary { max, top: top as u32, total, target }
}

/// Returns the largest of the logits of tokens `first ..`.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
fn best(logits: &[f32], first: usize) -> Best {
    let mut best = Best::EMPTY;
    for (at, chunk) in logits.chunks(16).enumerate() {
        if max(chunk) > best.logits[RANKS as usize - 1] {
            let tokens = (first + 16 * at) as u32..;
            chunk.iter().zip(tokens).for_each(|(&logit, token)| best.insert(logit, token));
        }
    }
    best
}

/// Σ exp(a\[i\] - max) · (a\[i\] - b\[i\])
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
fn difference(a: &[f32], b: &[f32], max: f32) -> f64 {
    const LANES: usize = 16;
    let ((a, rest_a), (b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let term = |a: f32, b: f32| exp(a - max) as f64 * (a - b) as f64;
    let mut lanes = [0.0f64; LANES];
    for (a, b) in a.iter().zip(b) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane += term(a, b);
        }
    }
    lanes.iter().sum::<f64>() + rest_a.iter().zip(rest_b).map(|(&a, &b)| term(a, b)).sum::<f64>()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tensor::Dense;

    fn noise(rows: usize, cols: usize, seed: u32, scale: f32) -> Array2<f32> {
        let mut state = seed;
        Array2::from_shape_simple_fn((rows, cols), || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
        })
    }

    fn matrix(x: &Array2<f32>) -> Matrix {
        Matrix::Dense(Dense::from_f32(x.shape().to_vec(), x.as_slice().unwrap()))
    }

    fn log_softmax(hidden: &Array2<f32>, head: &Array2<f32>) -> Array2<f64> {
        let mut logits = hidden.mapv(f64::from).dot(&head.mapv(f64::from).t());
        for mut row in logits.rows_mut() {
            let max = row.fold(f64::MIN, |a, &b| a.max(b));
            let lse = max + row.mapv(|v| (v - max).exp()).sum().ln();
            row.mapv_inplace(|v| v - lse);
        }
        logits
    }

    #[test]
    fn scores_and_divergences_equal_their_definitions_across_vocabulary_blocks() {
        let vocab = 2 * BLOCK + 77;
        let (hidden_a, head_a) = (noise(9, 24, 1, 1.0), noise(vocab, 24, 2, 3.0));
        let (hidden_b, head_b) = (&hidden_a + &noise(9, 24, 3, 0.05), &head_a + &noise(vocab, 24, 4, 0.05));
        let targets: Vec<u32> = [0, 1, 511, 512, 513, 1023, 1024, 1100, vocab - 1].map(|t| t as u32).to_vec();
        let (log_p, log_q) = (log_softmax(&hidden_a, &head_a), log_softmax(&hidden_b, &head_b));
        let found = compare((&hidden_a, &matrix(&head_a)), (&hidden_b, &matrix(&head_b)), &targets);
        let scores = score(&hidden_b, &matrix(&head_b), &targets);
        for (i, (found, &target)) in found.iter().zip(&targets).enumerate() {
            let kld: f64 = log_p.row(i).iter().zip(log_q.row(i)).map(|(p, q)| p.exp() * (p - q)).sum();
            assert!((found.kld as f64 - kld).abs() < 1e-6, "{} {kld}", found.kld);
            assert!((found.baseline.nll as f64 + log_p[[i, target as usize]]).abs() < 1e-5);
            assert!((found.model.nll as f64 + log_q[[i, target as usize]]).abs() < 1e-5);
            let best = log_p.row(i).iter().cloned().fold(f64::MIN, f64::max);
            assert_eq!(log_p[[i, found.baseline.top as usize]], best);
            assert_eq!(found.model, scores[i]);
            let favourite = found.baseline.top as usize;
            let preferred = log_q.row(i).iter().filter(|&&q| q > log_q[[i, favourite]]).count();
            assert_eq!(found.rank, (preferred as u32).min(RANKS));
        }
    }

    #[test]
    fn equal_models_diverge_by_exactly_zero() {
        let (hidden, head) = (noise(5, 16, 1, 2.0), matrix(&noise(BLOCK + 3, 16, 2, 2.0)));
        for d in compare((&hidden, &head), (&hidden, &head), &[0, 1, 2, 3, 514]) {
            assert_eq!((d.kld, d.baseline, d.rank), (0.0, d.model, 0));
        }
    }

    #[test]
    fn the_rank_counts_what_the_model_prefers_and_the_lower_token_goes_first_on_ties() {
        let vocab = BLOCK + 8;
        let hidden = Array2::from_elem((1, 1), 1.0);
        let head = |favourites: &[usize]| {
            let mut logits = Array2::zeros((vocab, 1));
            favourites.iter().enumerate().for_each(|(i, &token)| logits[[token, 0]] = 9.0 - i as f32);
            matrix(&logits)
        };
        let (tied, order) = ([3, BLOCK, 9], [BLOCK + 1, 2, BLOCK + 7, 40, 41, 42]);
        let rank = |baseline: usize, model: &Matrix| {
            compare((&hidden, &head(&[baseline])), (&hidden, model), &[0])[0].rank
        };
        assert_eq!(order.map(|token| rank(token, &head(&order))), [0, 1, 2, 3, 4, 5]);
        let mut equal = Array2::zeros((vocab, 1));
        tied.iter().for_each(|&token| equal[[token, 0]] = 1.0);
        assert_eq!(tied.map(|token| rank(token, &matrix(&equal))), [0, 2, 1]);
        assert_eq!([0, 1, 2].map(|token| rank(token, &matrix(&equal))), [3, 4, 5]);
    }

    #[test]
    fn the_lowest_token_wins_a_tie_and_huge_logits_stay_finite() {
        let hidden = Array2::from_elem((1, 1), 1.0);
        let mut logits = Array2::from_elem((BLOCK + 8, 1), -3e38f32);
        (logits[[3, 0]], logits[[9, 0]], logits[[BLOCK + 1, 0]]) = (3e38, 3e38, 3e38);
        let found = score(&hidden, &matrix(&logits), &[9]);
        assert_eq!(found[0].top, 3);
        assert!((found[0].nll - 3f32.ln()).abs() < 1e-6);
    }
}
