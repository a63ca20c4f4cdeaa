//! Where a file keeps the rows of a model's tensor: all of one stored tensor, a slice of one, every second row, or rows in
//! another order.
//!
//! Rows are independent in every dialect (a row is whole blocks and whole groups), so that moving rows is moving bytes:
//! readers [`gather`](RowMap::gather) before they unpack, writers [`scatter`](RowMap::scatter) after they have packed.

use std::ops::Range;

/// Which row of a stored tensor is which row of a model's tensor: `stored = first + step · place(row)`, where `place`
/// reorders rows within runs of equal length.
///
/// `first` alone is a slice of a tensor that holds several (q of a fused q, k, v; one expert's matrix of a stack
/// `[experts, rows, cols]`, whose leading axes count as one). `step` 2 is one of two interleaved matrices (gate and up of
/// GPT-OSS). A run is a head whose rows are rotated in another order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RowMap {
    first: usize,
    step: usize,
    /// Stored place of each row of a run; empty where the order is the same.
    places: Vec<usize>,
}

/// Where a dialect keeps a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Name of the stored tensor where it is kept dense: `….q_proj.weight`, `….experts.gate_up_proj`.
    pub name: String,
    /// Axes of the stored tensor but for the columns: its rows, or `[experts, rows]`.
    pub axes: Vec<usize>,
    /// Which of those rows, all axes taken as one.
    pub rows: RowMap,
}

impl RowMap {
    /// All rows in the same order.
    pub const SAME: RowMap = RowMap { first: 0, step: 1, places: Vec::new() };

    /// Consecutive rows from `first` on.
    pub fn slice(first: usize) -> Self {
        RowMap { first, ..RowMap::SAME }
    }

    /// Every `step`-th row from `first` on.
    pub fn strided(first: usize, step: usize) -> Self {
        RowMap { first, step, ..RowMap::SAME }
    }

    /// The same rows in another order: within every run of `order.len()` rows, stored row `i` is row `order[i]`.
    pub fn reordered(self, order: &[usize]) -> Self {
        let mut places = vec![0; order.len()];
        order.iter().enumerate().for_each(|(stored, &row)| places[row] = stored);
        RowMap { places, ..self }
    }

    /// Returns the stored row that is row `row`.
    pub fn stored(&self, row: usize) -> usize {
        let run = self.run();
        let place = row / run * run + self.places.get(row % run).copied().unwrap_or(0);
        self.first + self.step * place
    }

    /// Returns the length of runs that are reordered; 1 without. Whole runs are consecutive in the file.
    pub fn run(&self) -> usize {
        self.places.len().max(1)
    }

    /// Returns the smallest range of stored rows that holds `rows`.
    pub fn span(&self, rows: Range<usize>) -> Range<usize> {
        if self.places.is_empty() {
            let start = self.stored(rows.start);
            return start..if rows.is_empty() { start } else { self.stored(rows.end - 1) + 1 };
        }
        let stored = || rows.clone().map(|row| self.stored(row));
        let start = stored().min().unwrap_or(self.first);
        start..stored().max().map_or(start, |last| last + 1)
    }

    /// Whether rows follow each other in the file as in the model.
    pub fn is_contiguous(&self) -> bool {
        self.step == 1 && self.places.is_empty()
    }

    /// Returns the bytes of `rows`, in their order, out of those of [`RowMap::span`].
    pub fn gather(&self, rows: Range<usize>, row_bytes: usize, stored: &[u8]) -> Vec<u8> {
        let first = self.span(rows.clone()).start;
        let mut bytes = Vec::with_capacity(rows.len() * row_bytes);
        for row in rows {
            let at = (self.stored(row) - first) * row_bytes;
            bytes.extend_from_slice(&stored[at..at + row_bytes]);
        }
        bytes
    }

    /// Inverse of [`RowMap::gather`]: hands `write` the bytes of `rows` piece by piece, each with the stored row that it
    /// starts at. Whole runs become one piece unless rows of other tensors lie between.
    pub fn scatter<E>(
        &self,
        rows: Range<usize>,
        row_bytes: usize,
        bytes: &[u8],
        mut write: impl FnMut(usize, &[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if self.is_contiguous() {
            return write(self.stored(rows.start), bytes);
        }
        let mut order: Vec<(usize, usize)> =
            rows.enumerate().map(|(i, row)| (self.stored(row), i * row_bytes)).collect();
        order.sort_unstable();
        let mut piece = Vec::with_capacity(bytes.len());
        for run in order.chunk_by(|a, b| a.0 + 1 == b.0) {
            piece.clear();
            run.iter().for_each(|&(_, at)| piece.extend_from_slice(&bytes[at..at + row_bytes]));
            write(run[0].0, &piece)?;
        }
        Ok(())
    }
}

impl Place {
    /// A stored tensor of its own, `rows` rows in the same order.
    pub fn whole(name: String, rows: usize) -> Self {
        Place { name, axes: vec![rows], rows: RowMap::SAME }
    }

    /// Returns how many rows the stored tensor has.
    pub fn stored_rows(&self) -> usize {
        self.axes.iter().product()
    }

    /// Returns the module's path: the name without `.weight`.
    pub fn module(&self) -> &str {
        self.name.strip_suffix(".weight").unwrap_or(&self.name)
    }

    /// Returns what the names of all parts start with that a quantized tensor becomes here.
    pub fn prefix(&self) -> String {
        match self.name.strip_suffix("weight") {
            Some(module) => module.to_string(),
            None => format!("{}_", self.name),
        }
    }

    /// Returns the stored shape of a tensor or part of that many columns; `None` for a vector.
    pub fn shape(&self, cols: Option<usize>) -> Vec<usize> {
        self.axes.iter().copied().chain(cols).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every map of 8 rows that a file can ask for.
    fn maps() -> Vec<RowMap> {
        vec![
            RowMap::SAME,
            RowMap::slice(3),
            RowMap::strided(1, 2),
            RowMap::SAME.reordered(&[0, 2, 1, 3]),
            RowMap::slice(4).reordered(&[3, 0, 1, 2]),
            RowMap::strided(1, 3).reordered(&[1, 0]),
        ]
    }

    #[test]
    fn what_is_scattered_is_gathered_again_whatever_range_is_asked_for() {
        for map in maps() {
            let bytes: Vec<u8> = (0..16).collect();
            let mut file = [255u8; 64];
            for rows in [0..4, 4..8] {
                let part = &bytes[rows.start * 2..rows.end * 2];
                map.scatter(rows, 2, part, |row, piece| {
                    file[row * 2..row * 2 + piece.len()].copy_from_slice(piece);
                    Ok::<_, ()>(())
                })
                .unwrap();
            }
            assert_eq!(file.iter().filter(|&&byte| byte != 255).count(), 16, "{map:?}");
            for rows in [0..8, 0..1, 3..6, 5..5] {
                let span = map.span(rows.clone());
                let found = map.gather(rows.clone(), 2, &file[span.start * 2..span.end * 2]);
                assert_eq!(found, bytes[rows.start * 2..rows.end * 2], "{map:?} {rows:?}");
            }
        }
    }

    #[test]
    fn stored_row_i_of_a_run_is_row_order_i() {
        let order = [0, 2, 1, 3];
        let map = RowMap::slice(10).reordered(&order);
        for (i, &row) in order.iter().enumerate() {
            assert_eq!((map.stored(row), map.stored(4 + row)), (10 + i, 14 + i));
        }
        assert_eq!((map.run(), RowMap::SAME.run()), (4, 1));
    }

    #[test]
    fn whole_runs_are_written_in_one_piece_and_interleaved_rows_one_by_one() {
        let pieces = |map: RowMap| {
            let mut count = 0;
            map.scatter(0..8, 1, &[0; 8], |_, _| {
                count += 1;
                Ok::<_, ()>(())
            })
            .unwrap();
            count
        };
        assert_eq!(pieces(RowMap::SAME.reordered(&[1, 0])), 1);
        assert_eq!(pieces(RowMap::strided(0, 2)), 8);
    }

    #[test]
    fn parts_are_named_after_the_module_or_the_stack() {
        let linear = Place::whole("a.q_proj.weight".into(), 4);
        assert_eq!((linear.module(), linear.prefix().as_str()), ("a.q_proj", "a.q_proj."));
        let stack = Place { axes: vec![2, 4], ..Place::whole("a.experts.down".into(), 0) };
        assert_eq!((stack.prefix().as_str(), stack.stored_rows()), ("a.experts.down_", 8));
        assert_eq!(stack.shape(Some(3)), [2, 4, 3]);
    }
}
