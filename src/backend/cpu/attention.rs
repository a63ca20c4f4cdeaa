//! Causal attention.
//!
//! Attention works on one head and a panel of 32 queries at a time, keys first: scores\[key, query\] = k · qᵀ come out of
//! the product in the layout that the next product, outᵀ\[d, query\] = vᵀ · scores, takes in. Values are packed
//! once per head, for all queries and all query heads of their group.

use std::cell::RefCell;
use std::ops::Range;

use multiversion::multiversion;
use ndarray::{Array2, ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

use super::elementwise::{exp, max};
use super::zeros;
use crate::backend::{AttentionShape, Batch};
use crate::linalg::product::{COLS, Left, ROWS, multiply_to_panel, transpose};

/// Returns causal softmax(scale · q kᵀ) v within each sequence, `[n, heads · head_dim]`; `sinks` `[heads]`.
pub fn attention(
    q: &Array2<f32>,
    k: &Array2<f32>,
    v: &Array2<f32>,
    sinks: Option<&[f32]>,
    shape: &AttentionShape,
    batch: Batch,
) -> Array2<f32> {
    let group = shape.heads / shape.kv_heads;
    let view = |x, sequence, head| head_of(x, batch, shape.head_dim, sequence, head);
    let packed: Vec<(Left, Left)> = (0..batch.sequences * shape.kv_heads)
        .into_par_iter()
        .map(|at| {
            let (sequence, head) = (at / shape.kv_heads, at % shape.kv_heads);
            (Left::rows_of(view(k, sequence, head)), Left::pack_columns(view(v, sequence, head)))
        })
        .collect();
    let mut out = zeros(q.dim());
    out.axis_chunks_iter_mut(Axis(0), batch.tokens).into_par_iter().enumerate().for_each(
        |(sequence, mut out)| {
            out.axis_chunks_iter_mut(Axis(0), COLS).into_par_iter().enumerate().for_each(
                |(panel, mut out)| {
                    out.axis_chunks_iter_mut(Axis(1), shape.head_dim).into_par_iter().enumerate().for_each(
                        |(head, out)| {
                            let queries = panel * COLS..panel * COLS + out.nrows();
                            let (keys, values) = &packed[sequence * shape.kv_heads + head / group];
                            let sink = sinks.map(|sinks| sinks[head]);
                            attend(view(q, sequence, head), queries, keys, values, sink, shape, out);
                        },
                    );
                },
            );
        },
    );
    out
}

/// Returns the rows of one sequence and the columns of one head.
fn head_of(
    x: &Array2<f32>,
    batch: Batch,
    head_dim: usize,
    sequence: usize,
    head: usize,
) -> ArrayView2<'_, f32> {
    let rows = sequence * batch.tokens..(sequence + 1) * batch.tokens;
    x.slice(s![rows, head * head_dim..(head + 1) * head_dim])
}

/// Attention of at most [`COLS`] consecutive queries of one head.
fn attend(
    q: ArrayView2<f32>,
    queries: Range<usize>,
    keys: &Left,
    values: &Left,
    sink: Option<f32>,
    shape: &AttentionShape,
    mut out: ArrayViewMut2<f32>,
) {
    let oldest = shape.window.map_or(0, |window| (queries.start + 1).saturating_sub(window));
    // Whole blocks of keys; the mask hides what is too old or too new.
    let first_block = oldest / ROWS;
    let seen = first_block * ROWS..queries.end.next_multiple_of(ROWS).min(keys.rows());

    SCRATCH.with_borrow_mut(|Scratch { panel, scores, transposed }| {
        panel.resize(shape.head_dim, [0.0; COLS]);
        transpose(q.slice(s![queries.clone(), ..]), panel);
        scores.resize(seen.len().next_multiple_of(ROWS), [0.0; COLS]);
        multiply_to_panel(keys, first_block, 0..shape.head_dim, panel, scores);
        let scores = &mut scores[..seen.len()];
        mask(scores, seen.start, queries.start, shape.window);
        let sums = softmax(scores, shape.scale, sink);

        transposed.resize(shape.head_dim.next_multiple_of(ROWS), [0.0; COLS]);
        multiply_to_panel(values, 0, seen.clone(), scores, transposed);
        for (query, mut out) in out.rows_mut().into_iter().enumerate() {
            let share = 1.0 / sums[query];
            for (out, value) in out.iter_mut().zip(transposed.iter()) {
                *out = value[query] * share;
            }
        }
    });
}

/// What [`attend`] writes over before it reads; kept by each thread, so that nothing is zeroed or allocated anew.
#[derive(Default)]
struct Scratch {
    panel: Vec<[f32; COLS]>,
    scores: Vec<[f32; COLS]>,
    transposed: Vec<[f32; COLS]>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Sets the scores of keys that a query does not see to -∞. Row `i` of `scores` is key `first_key + i`.
fn mask(scores: &mut [[f32; COLS]], first_key: usize, first_query: usize, window: Option<usize>) {
    let oldest_of_last = window.map_or(0, |window| (first_query + COLS).saturating_sub(window));
    for (i, scores) in scores.iter_mut().enumerate() {
        let key = first_key + i;
        if key <= first_query && key >= oldest_of_last {
            continue;
        }
        for (query, score) in (first_query..).zip(scores) {
            if key > query || window.is_some_and(|window| key + window <= query) {
                *score = f32::NEG_INFINITY;
            }
        }
    }
}

/// Replaces every column by exp(scale · (score - its maximum)) and returns the columns' sums, the sink's share added. A sink
/// far above all scores makes that infinite and so every probability 0.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
fn softmax(scores: &mut [[f32; COLS]], scale: f32, sink: Option<f32>) -> [f32; COLS] {
    let mut maxima = [f32::NEG_INFINITY; COLS];
    for row in scores.iter() {
        for (max, &score) in maxima.iter_mut().zip(row) {
            *max = if score > *max { score } else { *max };
        }
    }
    let mut sums = [0.0; COLS];
    for row in scores {
        for ((score, &max), sum) in row.iter_mut().zip(&maxima).zip(&mut sums) {
            *score = exp((*score - max) * scale);
            *sum += *score;
        }
    }
    if let Some(sink) = sink {
        sums.iter_mut().zip(&maxima).for_each(|(sum, &max)| *sum += exp(sink - max * scale));
    }
    sums
}

/// Attention of the newest query of one head over all cached `keys` and `values` `[tokens, kv_heads · head_dim]`, its
/// own included. `query` and `out` have the head's width.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn attend_one(
    query: &[f32],
    keys: &[f32],
    values: &[f32],
    kv_head: usize,
    sink: Option<f32>,
    shape: &AttentionShape,
    out: &mut [f32],
) {
    let (d, width) = (shape.head_dim, shape.kv_heads * shape.head_dim);
    let tokens = keys.len() / width;
    let oldest = shape.window.map_or(0, |window| tokens.saturating_sub(window));
    let of_head = |rows: usize| rows * width + kv_head * d..rows * width + (kv_head + 1) * d;
    let mut scores: Vec<f32> =
        (oldest..tokens).map(|key| dot(query, &keys[of_head(key)]) * shape.scale).collect();
    let largest = max(&scores);
    let mut total = 0.0;
    for score in &mut scores {
        *score = exp(*score - largest);
        total += *score;
    }
    total += sink.map_or(0.0, |sink| exp(sink - largest));
    out.fill(0.0);
    for (key, &score) in (oldest..tokens).zip(&scores) {
        let share = score / total;
        for (out, &value) in out.iter_mut().zip(&values[of_head(key)]) {
            *out = share.mul_add(value, *out);
        }
    }
}

/// Returns Σ a\[i\] · b\[i\].
#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let ((a, rest_a), (b, rest_b)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    let mut lanes = [0.0f32; LANES];
    for (a, b) in a.iter().zip(b) {
        for ((lane, &a), &b) in lanes.iter_mut().zip(a).zip(b) {
            *lane = a.mul_add(b, *lane);
        }
    }
    lanes.iter().sum::<f32>() + rest_a.iter().zip(rest_b).map(|(&a, &b)| a * b).sum::<f32>()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn noise(rows: usize, cols: usize, seed: u32) -> Array2<f32> {
        let mut state = seed;
        Array2::from_shape_simple_fn((rows, cols), || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
    }

    /// The definition, one query at a time in F64.
    fn reference(
        [q, k, v]: [&Array2<f32>; 3],
        sinks: Option<&[f32]>,
        shape: &AttentionShape,
        batch: Batch,
    ) -> Array2<f64> {
        let (d, group) = (shape.head_dim, shape.heads / shape.kv_heads);
        Array2::from_shape_fn(q.dim(), |(row, col)| {
            let (head, position) = (col / d, row % batch.tokens);
            let (start, kv) = (row - position, head / group * d);
            let oldest = shape.window.map_or(0, |window| (position + 1).saturating_sub(window));
            let weight = |key: usize| {
                let dot: f64 =
                    (0..d).map(|i| q[[row, head * d + i]] as f64 * k[[start + key, kv + i]] as f64).sum();
                (dot * shape.scale as f64).exp()
            };
            let sink = sinks.map_or(0.0, |sinks| (sinks[head] as f64).exp());
            let total: f64 = (oldest..=position).map(weight).sum::<f64>() + sink;
            (oldest..=position).map(|key| weight(key) * v[[start + key, kv + col % d]] as f64).sum::<f64>()
                / total
        })
    }

    #[test]
    fn attention_equals_its_definition_with_groups_windows_sinks_and_odd_lengths() {
        for (sequences, tokens, heads, kv_heads, head_dim, window) in [
            (1, 1, 1, 1, 2, None),
            (1, 75, 4, 2, 16, None),
            (2, 33, 3, 1, 10, None),
            (1, 100, 2, 2, 8, Some(1)),
            (2, 70, 4, 4, 6, Some(9)),
            (1, 64, 2, 1, 32, Some(40)),
        ] {
            let batch = Batch { sequences, tokens };
            let shape = AttentionShape { heads, kv_heads, head_dim, window, scale: 2.0 };
            let n = sequences * tokens;
            let (q, k, v) = (
                noise(n, heads * head_dim, 1),
                noise(n, kv_heads * head_dim, 2),
                noise(n, kv_heads * head_dim, 3),
            );
            let sinks: Vec<f32> = (0..heads).map(|head| 4.0 - 3.0 * head as f32).collect();
            for sinks in [None, Some(&sinks[..])] {
                let found = attention(&q, &k, &v, sinks, &shape, batch);
                let expected = reference([&q, &k, &v], sinks, &shape, batch);
                // Scores reach 2 · head_dim / 3; each rounding step moves a weight by about that times 2^-24.
                for (found, expected) in found.iter().zip(&expected) {
                    assert!((*found as f64 - expected).abs() < 1e-5, "{found} {expected} {shape:?}");
                }
                let last = batch.tokens - 1;
                let (keys, values) = (k.as_slice().unwrap(), v.as_slice().unwrap());
                let sequence = 0..batch.tokens * kv_heads * head_dim;
                for head in 0..heads {
                    let columns = head * head_dim..(head + 1) * head_dim;
                    let mut out = vec![0.0; head_dim];
                    attend_one(
                        &q.row(last).as_slice().unwrap()[columns.clone()],
                        &keys[sequence.clone()],
                        &values[sequence.clone()],
                        head / (heads / kv_heads),
                        sinks.map(|sinks| sinks[head]),
                        &shape,
                        &mut out,
                    );
                    for (out, column) in out.iter().zip(columns) {
                        let expected = expected[[last, column]];
                        assert!((*out as f64 - expected).abs() < 1e-5, "{out} {expected} {shape:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_sink_of_minus_infinity_is_none_and_a_huge_one_takes_everything() {
        let batch = Batch { sequences: 1, tokens: 40 };
        let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 8, window: Some(33), scale: 0.4 };
        let (q, k, v) = (noise(40, 16, 1), noise(40, 8, 2), noise(40, 8, 3));
        let with = |sinks: Option<&[f32]>| attention(&q, &k, &v, sinks, &shape, batch);
        assert_eq!(with(Some(&[f32::NEG_INFINITY; 2])), with(None));
        for huge in [1e3, 1e38, f32::INFINITY] {
            let found = with(Some(&[f32::NEG_INFINITY, huge]));
            assert_eq!(
                found.slice(s![.., ..8]),
                with(None).slice(s![.., ..8]),
                "heads have sinks of their own"
            );
            assert!(found.slice(s![.., 8..]).iter().all(|&x| x == 0.0), "a sink of {huge}");
            let mut out = [1.0; 8];
            let (keys, values) = (k.as_slice().unwrap(), v.as_slice().unwrap());
            attend_one(&q.row(39).as_slice().unwrap()[8..], keys, values, 0, Some(huge), &shape, &mut out);
            assert_eq!(out, [0.0; 8], "a sink of {huge}");
        }
    }
}
