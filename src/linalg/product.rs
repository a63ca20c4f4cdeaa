//! Matrix products in F32: packed panels and one register tile, in safe code that the compiler vectorises.
//!
//! A product takes [`ROWS`] rows of a [`Left`] operand at a time, and panels of [`COLS`] columns of the right operand. The
//! tile keeps `ROWS × COLS` sums in registers and adds one fused multiply-add per sum and step of the shared depth, so a
//! result depends on neither the instruction set nor the number of threads: the same inputs give the same bits everywhere. (Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008.)
//!
//! Measured on Zen 4 with AVX-512: 108 GFLOP/s per core, as much as the assembly kernels of `faer` 0.24, which crash or
//! give wrong results for some shapes (private-gemm-x86 0.1.22).

use std::cell::RefCell;
use std::ops::Range;

use multiversion::multiversion;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, s};
use rayon::prelude::*;

/// Rows of a register tile.
pub const ROWS: usize = 8;
/// Columns of a register tile.
pub const COLS: usize = 32;
/// Depth of a panel: 64 KiB of right operand, which stays in the L2 cache while all rows pass.
const DEPTH: usize = 512;
/// Columns that are transposed at a time: one cache line of each source row.
const LINE: usize = 16;

/// A left operand `[rows, depth]`.
pub struct Left<'a> {
    values: Values<'a>,
    rows: usize,
    depth: usize,
}

/// How a left operand lies in memory.
enum Values<'a> {
    /// As their owner has them, each row contiguous.
    Rows(ArrayView2<'a, f32>),
    /// Blocks of [`ROWS`] rows, each stored depth-first, the last one padded with zeros.
    Blocks(Vec<[f32; ROWS]>),
}

impl<'a> Left<'a> {
    /// Takes the rows of `x`, which must be contiguous in memory.
    pub fn rows_of(x: ArrayView2<'a, f32>) -> Self {
        let (rows, depth) = x.dim();
        Left { values: Values::Rows(x), rows, depth }
    }

    /// Packs the columns of `x` `[depth, rows]` as rows.
    pub fn pack_columns(x: ArrayView2<f32>) -> Self {
        let (depth, rows) = x.dim();
        let mut blocks = take_blocks(rows.div_ceil(ROWS) * depth);
        blocks
            .par_chunks_mut(depth.max(1))
            .enumerate()
            .for_each(|(block, out)| copy_columns(x, block * ROWS, out));
        Left { values: Values::Blocks(blocks), rows, depth }
    }

    /// Returns the number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns rows `block · ROWS ..` times a panel of some of the depth.
    #[inline(always)]
    fn tile(&self, block: usize, depth: Range<usize>, panel: &[[f32; COLS]]) -> [[f32; COLS]; ROWS] {
        match &self.values {
            Values::Rows(x) => {
                let mut left: [&[f32]; ROWS] = [&[]; ROWS];
                // Rows past the last one repeat it; nobody asks for their sums.
                for (i, left) in (block * ROWS..).zip(&mut left) {
                    let row = x.row(i.min(self.rows - 1)).to_slice().expect("rows are contiguous");
                    *left = &row[depth.clone()];
                }
                tile_of_rows(left, panel)
            }
            Values::Blocks(blocks) => {
                let start = block * self.depth;
                tile_of_block(&blocks[start + depth.start..start + depth.end], panel)
            }
        }
    }
}

/// Blocks a thread keeps for its next operand: 16 MiB, a window of 512 tokens for a depth of 8192.
const SPARE_BLOCKS: usize = 1 << 19;

thread_local! {
    /// The buffer of the latest [`Left`] that this thread dropped: the next one need not be zeroed again.
    static SPARE: RefCell<Vec<[f32; ROWS]>> = const { RefCell::new(Vec::new()) };
}

/// Returns `len` blocks of unspecified content.
fn take_blocks(len: usize) -> Vec<[f32; ROWS]> {
    let mut blocks = SPARE.take();
    blocks.resize(len, [0.0; ROWS]);
    blocks
}

impl Drop for Left<'_> {
    fn drop(&mut self) {
        if let Values::Blocks(blocks) = &mut self.values
            && blocks.len() <= SPARE_BLOCKS
        {
            SPARE.set(std::mem::take(blocks));
        }
    }
}

/// Where the rows of a right operand `[cols, depth]` come from (a product multiplies with its transpose).
pub trait RightRows: Sync {
    /// Writes rows `first ..` as F32, `depth` values each, as many as fit `out`.
    fn decode_rows(&self, first: usize, out: &mut [f32]);
}

/// What becomes of the previous content of a product's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Previous {
    /// Overwritten.
    Replaced,
    /// The product is added to it.
    Kept,
}

/// y = left · rightᵀ, or y += left · rightᵀ, for each pair of a right operand and its `y` `[left rows, cols]`. Strips of
/// [`COLS`] columns of all of them run in parallel.
pub fn multiply_transposed<R: RightRows>(
    left: &Left,
    products: &mut [(&R, ArrayViewMut2<f32>)],
    previous: Previous,
) {
    let strips = products.iter_mut().flat_map(|(right, y)| {
        let strips = y.axis_chunks_iter_mut(Axis(1), COLS).enumerate();
        strips.map(|(strip, y)| (&**right, strip * COLS, y))
    });
    let strips: Vec<_> = strips.collect();
    // One at a time: the last ones decide how long a thread waits for the others.
    strips.into_par_iter().with_max_len(1).for_each(|(right, first_col, y)| {
        multiply_strip(left, right, first_col, y, previous);
    });
}

/// The product of `left` with rows `first_col ..` of `right`; `y` has at most [`COLS`] columns.
fn multiply_strip(
    left: &Left,
    right: &impl RightRows,
    first_col: usize,
    mut y: ArrayViewMut2<f32>,
    mut previous: Previous,
) {
    let (depth, cols) = (left.depth, y.ncols());
    with_scratch(|rows, panel| {
        rows.resize(cols * depth, 0.0);
        right.decode_rows(first_col, rows);
        let rows = ArrayView2::from_shape((cols, depth), rows).expect("resized to that shape");
        for start in (0..depth).step_by(DEPTH) {
            let range = start..depth.min(start + DEPTH);
            panel.resize(range.len(), [0.0; COLS]);
            transpose(rows.slice(s![.., range.clone()]), panel);
            multiply_panel(left, 0, range, panel, &mut y, previous);
            previous = Previous::Kept;
        }
    });
}

/// Which entries of a product are wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    /// All.
    All,
    /// Those at and below the diagonal; others may or may not be computed.
    Lower,
}

/// y += left · right for `right` `[depth, cols]`; strips of [`COLS`] columns run in parallel.
pub fn add_product(left: &Left, right: ArrayView2<f32>, mut y: ArrayViewMut2<f32>, wanted: Wanted) {
    let strips: Vec<_> = y.axis_chunks_iter_mut(Axis(1), COLS).collect();
    strips.into_par_iter().enumerate().with_max_len(1).for_each(|(strip, mut y)| {
        let first_block = if wanted == Wanted::Lower { strip * COLS / ROWS } else { 0 };
        with_scratch(|_, panel| {
            for start in (0..left.depth).step_by(DEPTH) {
                let range = start..left.depth.min(start + DEPTH);
                panel.resize(range.len(), [0.0; COLS]);
                copy_columns(right.slice(s![range.clone(), ..]), strip * COLS, panel);
                let mut y = y.slice_mut(s![first_block * ROWS.., ..]);
                multiply_panel(left, first_block, range, panel, &mut y, Previous::Kept);
            }
        });
    });
}

/// out\[k\] = x\[k, first .. first + W\], columns past the end as zeros. Rows must be contiguous.
fn copy_columns<const W: usize>(x: ArrayView2<f32>, first: usize, out: &mut [[f32; W]]) {
    let width = W.min(x.ncols() - first);
    for (out, row) in out.iter_mut().zip(x.rows()) {
        let row = &row.to_slice().expect("rows are contiguous")[first..first + width];
        out[..width].copy_from_slice(row);
        out[width..].fill(0.0);
    }
}

/// Gives each thread its own buffers for the decoded rows and the panel, so that strips do not allocate.
fn with_scratch(work: impl FnOnce(&mut Vec<f32>, &mut Vec<[f32; COLS]>)) {
    thread_local! {
        static SCRATCH: RefCell<(Vec<f32>, Vec<[f32; COLS]>)> = const { RefCell::new((Vec::new(), Vec::new())) };
    }
    SCRATCH.with_borrow_mut(|(rows, panel)| work(rows, panel));
}

/// y (+)= left\[:, depth\] · panel for every row of `left` from block `first_block` on, which `y` starts with.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
fn multiply_panel(
    left: &Left,
    first_block: usize,
    depth: Range<usize>,
    panel: &[[f32; COLS]],
    y: &mut ArrayViewMut2<f32>,
    previous: Previous,
) {
    for block in first_block..left.rows.div_ceil(ROWS) {
        let sums = left.tile(block, depth.clone(), panel);
        for (row, sums) in (block * ROWS..left.rows).zip(&sums) {
            let y = y.row_mut(row - first_block * ROWS).into_slice().expect("rows are contiguous");
            // A known length becomes two vector stores instead of a call.
            match (previous, <&mut [f32; COLS]>::try_from(&mut *y)) {
                (Previous::Replaced, Ok(y)) => *y = *sums,
                (Previous::Replaced, Err(_)) => y.copy_from_slice(&sums[..y.len()]),
                (Previous::Kept, _) => y.iter_mut().zip(sums).for_each(|(y, sum)| *y += *sum),
            }
        }
    }
}

/// out\[i\] = row `first_block · ROWS + i` of left\[:, depth\] · panel, as many whole blocks as `out` holds: a product in
/// the layout that the next product takes as its panel. Rows past the last one are unspecified.
#[multiversion(targets("x86_64+avx512f+avx512vl+avx512bw+avx512dq+avx2+fma", "x86_64+avx2+fma"))]
pub fn multiply_to_panel(
    left: &Left,
    first_block: usize,
    depth: Range<usize>,
    panel: &[[f32; COLS]],
    out: &mut [[f32; COLS]],
) {
    for (block, out) in (first_block..).zip(out.as_chunks_mut::<ROWS>().0) {
        *out = left.tile(block, depth.clone(), panel);
    }
}

/// The sums over the depth of both operands, each in order and with one rounding per step.
#[inline(always)]
fn tile_of_block(left: &[[f32; ROWS]], right: &[[f32; COLS]]) -> [[f32; COLS]; ROWS] {
    let mut sums = [[0.0f32; COLS]; ROWS];
    for (left, right) in left.iter().zip(right) {
        add_step(&mut sums, *left, *right);
    }
    sums
}

/// The same for rows that lie apart.
#[inline(always)]
fn tile_of_rows([a, b, c, d, e, f, g, h]: [&[f32]; ROWS], right: &[[f32; COLS]]) -> [[f32; COLS]; ROWS] {
    let mut sums = [[0.0f32; COLS]; ROWS];
    // Zipped, since eight indices would be eight checks.
    let steps = a.iter().zip(b).zip(c).zip(d).zip(e).zip(f).zip(g).zip(h).zip(right);
    for ((((((((a, b), c), d), e), f), g), h), right) in steps {
        add_step(&mut sums, [*a, *b, *c, *d, *e, *f, *g, *h], *right);
    }
    sums
}

/// sums\[i, j\] += left\[i\] · right\[j\]
#[inline(always)]
fn add_step(sums: &mut [[f32; COLS]; ROWS], left: [f32; ROWS], right: [f32; COLS]) {
    for (sums, left) in sums.iter_mut().zip(left) {
        for (sum, right) in sums.iter_mut().zip(right) {
            *sum = left.mul_add(right, *sum);
        }
    }
}

/// Writes `rows` `[at most W, depth]` transposed: `out[k][i] = rows[i, k]`, missing rows as zeros. Rows must be contiguous.
pub fn transpose<const W: usize>(rows: ArrayView2<f32>, out: &mut [[f32; W]]) {
    if rows.nrows() < W {
        out.fill([0.0; W]);
    }
    let mut sources: [&[f32]; W] = [&[]; W];
    for (source, row) in sources.iter_mut().zip(rows.rows()) {
        *source = row.to_slice().expect("rows are contiguous");
    }
    for (start, out) in (0..rows.ncols()).step_by(LINE).zip(out.chunks_mut(LINE)) {
        for (i, source) in sources[..rows.nrows()].iter().enumerate() {
            for (out, &value) in out.iter_mut().zip(&source[start..]) {
                out[i] = value;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use ndarray::Array2;

    use super::*;

    struct Rows(Array2<f32>);

    impl RightRows for Rows {
        fn decode_rows(&self, first: usize, out: &mut [f32]) {
            let start = first * self.0.ncols();
            out.copy_from_slice(&self.0.as_slice().unwrap()[start..start + out.len()]);
        }
    }

    /// Small integers of both signs, so that every sum is exact and the expected product has no tolerance.
    fn integers(rows: usize, cols: usize, seed: usize) -> Array2<f32> {
        Array2::from_shape_fn((rows, cols), |(r, c)| {
            ((r * 31 + c * 17 + seed) * 2654435761 % 13) as f32 - 6.0
        })
    }

    #[test]
    fn products_of_integers_are_exact_for_every_remainder_of_the_tile() {
        for (n, out, depth) in [
            (1, 1, 1),
            (7, 31, 15),
            (8, 32, 16),
            (9, 33, 17),
            (3, 70, DEPTH),
            (17, 5, DEPTH + 1),
            (16, 64, 2 * DEPTH),
            (130, 100, 1100),
        ] {
            let (x, w) = (integers(n, depth, 1), integers(out, depth, 2));
            let expected = x.dot(&w.t());
            let left = Left::rows_of(x.view());
            let mut y = Array2::from_elem((n, out), f32::NAN);
            multiply_transposed(&left, &mut [(&Rows(w.clone()), y.view_mut())], Previous::Replaced);
            assert_eq!(y, expected, "{n} × {out} × {depth}");
            multiply_transposed(&left, &mut [(&Rows(w), y.view_mut())], Previous::Kept);
            assert_eq!(y, &expected * 2.0, "{n} × {out} × {depth}");
        }
    }

    #[test]
    fn products_with_plain_right_operands_are_exact_at_and_below_the_diagonal() {
        for (depth, n) in [(1, 1), (DEPTH + 3, 33), (40, 100)] {
            let (a, b) = (integers(depth, n, 4), integers(depth, n, 5));
            let expected = a.t().dot(&b);
            let left = Left::pack_columns(a.view());
            for wanted in [Wanted::All, Wanted::Lower] {
                let mut y = Array2::zeros((n, n));
                add_product(&left, b.view(), y.view_mut(), wanted);
                for ((row, col), value) in y.indexed_iter() {
                    assert!(*value == expected[(row, col)] || (wanted == Wanted::Lower && col > row));
                }
            }
        }
    }

    #[test]
    fn columns_multiply_as_the_rows_of_the_transpose() {
        let x = integers(19, 12, 3);
        let transposed = x.t().as_standard_layout().to_owned();
        let panel: Vec<[f32; COLS]> = (0..19).map(|k| [(k * k % 7) as f32 - 3.0; COLS]).collect();
        let [columns, rows] = [Left::pack_columns(x.view()), Left::rows_of(transposed.view())].map(|left| {
            let mut out = vec![[f32::NAN; COLS]; 16];
            multiply_to_panel(&left, 0, 2..19, &panel[2..], &mut out);
            out.truncate(left.rows());
            out
        });
        assert_eq!(columns, rows);
    }
}
