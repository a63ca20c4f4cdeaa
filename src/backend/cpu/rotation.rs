//! Rotary embedding.

use ndarray::{Array2, Axis};
use rayon::prelude::*;

use crate::backend::{Batch, Pairing, Rope};

/// Rotates the pairs of every head by position · angle.
pub fn rope(x: &mut Array2<f32>, rope: &Rope, batch: Batch) {
    let rotations = Rotations::new(rope, batch.tokens);
    x.axis_iter_mut(Axis(0)).into_par_iter().enumerate().for_each(|(row, mut x)| {
        rotations.turn_row(x.as_slice_mut().expect("rows are contiguous"), row % batch.tokens);
    });
}

/// The rotations of every position of a sequence.
pub struct Rotations {
    /// (cos, sin) of every position and pair, times the magnitude, `[positions, pairs]`.
    table: Vec<[f32; 2]>,
    /// Pairs of a head.
    pairs: usize,
    head_dim: usize,
    pairing: Pairing,
}

impl Rotations {
    /// Each position turns the one before by one step, in F64: after a million steps the error is still below 1e-9.
    pub fn new(rope: &Rope, positions: usize) -> Self {
        let angles = rope.angles(positions);
        let steps: Vec<[f64; 2]> = angles.iter().map(|&f| [(f as f64).cos(), (f as f64).sin()]).collect();
        let mut turned = vec![[rope.magnitude as f64, 0.0]; steps.len()];
        let mut table = Vec::with_capacity(positions * steps.len());
        for _ in 0..positions {
            for ([cos, sin], [step_cos, step_sin]) in turned.iter_mut().zip(&steps) {
                table.push([*cos as f32, *sin as f32]);
                (*cos, *sin) = (*cos * step_cos - *sin * step_sin, *sin * step_cos + *cos * step_sin);
            }
        }
        Rotations { table, pairs: steps.len(), head_dim: rope.head_dim, pairing: rope.pairing }
    }

    /// Rotates every head of row `row` of `x` to `position`.
    pub fn turn(&self, x: &mut Array2<f32>, row: usize, position: usize) {
        let mut x = x.row_mut(row);
        self.turn_row(x.as_slice_mut().expect("rows are contiguous"), position);
    }

    fn turn_row(&self, x: &mut [f32], position: usize) {
        let pairs = self.pairs;
        let rotation = &self.table[position * pairs..(position + 1) * pairs];
        for head in x.chunks_exact_mut(self.head_dim) {
            let turning = &mut head[..2 * pairs];
            match self.pairing {
                Pairing::Halves => {
                    let (first, second) = turning.split_at_mut(pairs);
                    first.iter_mut().zip(second).zip(rotation).for_each(|((a, b), by)| turn_pair(a, b, by));
                }
                Pairing::Neighbours => {
                    let (pairs, _) = turning.as_chunks_mut::<2>();
                    pairs.iter_mut().zip(rotation).for_each(|([a, b], by)| turn_pair(a, b, by));
                }
            }
        }
    }
}

fn turn_pair(a: &mut f32, b: &mut f32, &[cos, sin]: &[f32; 2]) {
    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
}

#[cfg(test)]
mod tests {
    use ndarray::s;

    use super::*;
    use crate::backend::LongAngles;

    #[test]
    fn rotation_keeps_lengths_and_depends_on_distance_only() {
        let rotary = Rope::plain(vec![1.0, 0.1]);
        let mut x = Array2::from_shape_fn((50, 4), |(_, col)| [1.0, 2.0, -1.0, 0.5][col]);
        rope(&mut x, &rotary, Batch { sequences: 2, tokens: 25 });
        let dot = |a: usize, b: usize| x.row(a).dot(&x.row(b));
        assert_eq!(x.row(0), x.row(25), "positions start anew in each sequence");
        assert!((dot(3, 3) - 6.25).abs() < 1e-5);
        assert!((dot(3, 7) - dot(20, 24)).abs() < 1e-5);
        let (cos, sin) = (3f32.cos(), 3f32.sin());
        assert!((x[[3, 0]] - (cos + sin)).abs() < 1e-6 && (x[[3, 2]] - (-cos + sin)).abs() < 1e-6);
    }

    #[test]
    fn neighbours_turn_as_halves_do_and_what_is_left_stays() {
        let angles = vec![1.0, 0.3];
        let halves = Rope { head_dim: 6, magnitude: 1.5, ..Rope::plain(angles.clone()) };
        let neighbours = Rope { pairing: Pairing::Neighbours, ..halves.clone() };
        let batch = Batch { sequences: 1, tokens: 4 };
        let apart = Array2::from_shape_fn((4, 12), |(row, i)| (row * 12 + i) as f32);
        // The same pairs, put side by side.
        let order = [0, 2, 1, 3, 4, 5];
        let beside = Array2::from_shape_fn((4, 12), |(row, i)| apart[[row, i / 6 * 6 + order[i % 6]]]);
        let (mut a, mut b) = (apart.clone(), beside);
        rope(&mut a, &halves, batch);
        rope(&mut b, &neighbours, batch);
        for ((row, i), &turned) in b.indexed_iter() {
            assert_eq!(turned, a[[row, i / 6 * 6 + order[i % 6]]]);
            if i % 6 >= 4 {
                assert_eq!(turned, apart[[row, i]], "a value past the pairs stays");
            }
        }
        let (sin, cos) = 2f32.sin_cos();
        let expected = 1.5 * (apart[[2, 0]] * cos - apart[[2, 2]] * sin);
        assert!((a[[2, 0]] - expected).abs() < 1e-5, "{} {expected}", a[[2, 0]]);
    }

    #[test]
    fn long_sequences_turn_by_their_own_angles_from_the_first_token_on() {
        let long = LongAngles { beyond: 3, inverse_frequencies: vec![0.5] };
        let both = Rope { long: Some(long), ..Rope::plain(vec![1.0]) };
        let ones = Array2::ones((4, 2));
        let turned = |by: &Rope, tokens: usize| {
            let mut x = ones.slice(s![..tokens, ..]).to_owned();
            rope(&mut x, by, Batch { sequences: 1, tokens });
            x
        };
        assert_eq!(turned(&both, 3), turned(&Rope::plain(vec![1.0]), 3));
        assert_eq!(turned(&both, 4), turned(&Rope::plain(vec![0.5]), 4));
        assert_eq!(turned(&both.for_length(4), 3), turned(&Rope::plain(vec![0.5]), 3));
        assert_eq!(turned(&both.for_length(3), 4), turned(&Rope::plain(vec![1.0]), 4));
    }

    #[test]
    fn the_reversed_rotation_is_the_transposed_one() {
        let long = LongAngles { beyond: 4, inverse_frequencies: vec![0.5, 0.2] };
        let by = Rope { head_dim: 5, magnitude: 1.3, long: Some(long), ..Rope::plain(vec![1.0, 0.3]) };
        let mut random = crate::method::testing::Random::new(5);
        for tokens in [4, 7] {
            let batch = Batch { sequences: 1, tokens };
            let [x, y] = [0, 1].map(|_| Array2::from_shape_fn((tokens, 10), |_| random.uniform()));
            let (mut turned, mut back) = (x.clone(), y.clone());
            rope(&mut turned, &by, batch);
            rope(&mut back, &by.reversed(), batch);
            let (forward, backward) = ((&turned * &y).sum(), (&x * &back).sum());
            assert!((forward - backward).abs() < 1e-4, "{forward} {backward}");
        }
    }

    #[test]
    fn the_rotation_recurrence_does_not_drift() {
        let rotary = Rope::plain(vec![1.0, 0.317, 1e-4]);
        let table = Rotations::new(&rotary, 100_000).table;
        for (i, &frequency) in rotary.inverse_frequencies.iter().enumerate() {
            let [cos, sin] = table[99_999 * 3 + i];
            let angle = 99_999.0 * frequency as f64;
            assert!((cos as f64 - angle.cos()).abs() < 1e-7 && (sin as f64 - angle.sin()).abs() < 1e-7);
        }
    }
}
