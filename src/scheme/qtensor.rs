use std::ops::Range;

use multiversion::multiversion;

use super::{Offset, Scheme, Span};
use crate::num::Element;

/// One quantized matrix `[rows, cols]`, in no ecosystem's byte order: one code per byte, scales as the decoded values
/// that their codecs represent exactly.
///
/// One byte per code costs twice the memory of packed 4-bit codes on the one tensor in flight, and keeps bit twiddling
/// out of every rounding method. Packing is the dialect's business.
#[derive(Clone, Debug, PartialEq)]
pub struct QTensor {
    /// What the numbers mean.
    pub scheme: Scheme,
    /// Output features.
    pub rows: usize,
    /// Input features.
    pub cols: usize,
    /// `[rows, cols]`, row-major.
    pub codes: Vec<u8>,
    /// Inner scales, `[rows, groups per row]` (or as many as `scheme.group` says).
    pub scales: Vec<f32>,
    /// Outer scales, as many as the outer span says; empty for one-level schemes.
    pub outer_scales: Vec<f32>,
    /// Inner offsets, one per group; empty for symmetric schemes. For `Offset::Subtracted` these are the 6-bit minima.
    pub offsets: Vec<f32>,
    /// Outer factors of the offsets (`dmin`), one per outer span; only for `Offset::Subtracted`.
    pub outer_offsets: Vec<f32>,
}

/// The effective grid of one group: `value = scale · element[code] + offset`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Grid {
    /// Effective scale; may be zero (every code is then `offset`) or negative (Q4_0).
    pub scale: f32,
    /// Effective offset, 0 for symmetric schemes.
    pub offset: f32,
}

impl QTensor {
    /// Returns a tensor of zeros in every field, sized for `[rows, cols]`.
    pub fn zeroed(scheme: Scheme, rows: usize, cols: usize) -> Self {
        let groups = scheme.group.count(rows, cols);
        let outer = scheme.outer.map_or(0, |(span, _)| span.count(rows, cols));
        let (offsets, outer_offsets) = match scheme.offset {
            Offset::None => (0, 0),
            Offset::Added(_) => (groups, 0),
            Offset::Subtracted(_) => (groups, outer),
        };
        QTensor {
            scheme,
            rows,
            cols,
            codes: vec![0; rows * cols],
            scales: vec![0.0; groups],
            outer_scales: vec![0.0; outer],
            offsets: vec![0.0; offsets],
            outer_offsets: vec![0.0; outer_offsets],
        }
    }

    /// Returns how many groups a row has.
    pub fn groups_per_row(&self) -> usize {
        self.cols.div_ceil(self.group_cols())
    }

    /// Returns how many columns a group has.
    pub fn group_cols(&self) -> usize {
        self.scheme.group.len(self.cols)
    }

    /// Returns the effective grid of group `group` of row `row`.
    ///
    /// The products are rounded to F32 in the order of ggml's dequantizers (`d · sc`, then `· q`, then `- dmin · m`),
    /// so that decoded values agree with theirs bit for bit.
    #[inline]
    pub fn grid(&self, row: usize, group: usize) -> Grid {
        let at = match self.scheme.group {
            Span::Tensor => 0,
            _ => row * self.groups_per_row() + group,
        };
        let Some((span, _)) = self.scheme.outer else {
            let offset = if self.offsets.is_empty() { 0.0 } else { self.offsets[at] };
            return Grid { scale: self.scales[at], offset };
        };
        let outer = match span {
            Span::Tensor => 0,
            Span::Row => row,
            Span::Cols(n) => row * self.cols.div_ceil(n as usize) + group * self.group_cols() / n as usize,
        };
        let offset = match self.scheme.offset {
            Offset::None => 0.0,
            Offset::Added(_) => self.offsets[at],
            Offset::Subtracted(_) => -(self.outer_offsets[outer] * self.offsets[at]),
        };
        Grid { scale: self.outer_scales[outer] * self.scales[at], offset }
    }

    /// Writes the values of one row. `out` has `cols` elements.
    pub fn decode_row(&self, row: usize, out: &mut [f32]) {
        decode_row(self, row, out);
    }

    /// Returns the values of all rows, `[rows, cols]`.
    pub fn decode(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, out) in out.chunks_mut(self.cols).enumerate() {
            self.decode_row(row, out);
        }
        out
    }

    /// Returns the tensor whose row `i` is this one's row `order[i]`, as many rows as `order` names. Rows carry their
    /// scales along.
    pub fn permute_rows(&self, order: &[usize]) -> Self {
        let mut out = QTensor::zeroed(self.scheme, order.len(), self.cols);
        for (to, &from) in order.iter().enumerate() {
            out.copy_rows(to, self, from..from + 1);
        }
        out
    }

    /// Returns some rows as a tensor of their own.
    pub fn slice_rows(&self, rows: Range<usize>) -> Self {
        let mut out = QTensor::zeroed(self.scheme, rows.len(), self.cols);
        out.copy_rows(0, self, rows);
        out
    }

    /// Copies `part` (the same scheme and width, fewer rows) over the rows from `first_row` on.
    pub fn set_rows(&mut self, first_row: usize, part: &QTensor) {
        self.copy_rows(first_row, part, 0..part.rows);
    }

    fn copy_rows(&mut self, to: usize, source: &QTensor, from: Range<usize>) {
        debug_assert_eq!((self.scheme, self.cols), (source.scheme, source.cols));
        let (rows, inner) = (self.rows, self.scheme.group);
        let outer = self.scheme.outer.map_or(inner, |(span, _)| span);
        place_rows(&source.codes, &mut self.codes, rows, to, &from);
        place_spans(inner, &source.scales, &mut self.scales, rows, to, &from);
        place_spans(inner, &source.offsets, &mut self.offsets, rows, to, &from);
        place_spans(outer, &source.outer_scales, &mut self.outer_scales, rows, to, &from);
        place_spans(outer, &source.outer_offsets, &mut self.outer_offsets, rows, to, &from);
    }
}

/// See [`QTensor::decode_row`]. Products and sums are rounded separately on every target.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2+fma"))]
fn decode_row(q: &QTensor, row: usize, out: &mut [f32]) {
    // One loop per element type, so that the choice is made outside of them.
    match q.scheme.element {
        Element::E2M1 => decode_groups(q, row, out, |code| Element::E2M1.decode(code)),
        Element::E4M3 => decode_groups(q, row, out, |code| Element::E4M3.decode(code)),
        Element::Int(bits) => decode_groups(q, row, out, |code| Element::Int(bits).decode(code)),
        Element::Uint(bits) => decode_groups(q, row, out, |code| Element::Uint(bits).decode(code)),
        Element::Table(table) => decode_groups(q, row, out, |code| Element::Table(table).decode(code)),
    }
}

#[inline(always)]
fn decode_groups(q: &QTensor, row: usize, out: &mut [f32], value: impl Fn(u8) -> f32) {
    let codes = &q.codes[row * q.cols..(row + 1) * q.cols];
    let group_cols = q.group_cols();
    for (group, (codes, out)) in codes.chunks(group_cols).zip(out.chunks_mut(group_cols)).enumerate() {
        let Grid { scale, offset } = q.grid(row, group);
        for (out, &code) in out.iter_mut().zip(codes) {
            *out = scale * value(code) + offset;
        }
    }
}

/// Copies rows `from` of one field into `to_field`, a field of a `rows`-row tensor, starting at row `to`.
fn place_rows<T: Copy>(from_field: &[T], to_field: &mut [T], rows: usize, to: usize, from: &Range<usize>) {
    let width = to_field.len() / rows.max(1);
    to_field[to * width..(to + from.len()) * width]
        .copy_from_slice(&from_field[from.start * width..from.end * width]);
}

/// The same for a field with one number per span; what belongs to the whole tensor is copied whole.
fn place_spans(
    span: Span,
    from_field: &[f32],
    to_field: &mut [f32],
    rows: usize,
    to: usize,
    from: &Range<usize>,
) {
    match span {
        Span::Tensor => {
            // A part that was fitted under a factor of its own would change what the rows before it mean.
            let unset = to_field.iter().all(|factor| *factor == 0.0);
            debug_assert!(unset || *to_field == *from_field, "parts of one tensor under different factors");
            to_field.copy_from_slice(from_field);
        }
        Span::Row | Span::Cols(_) => place_rows(from_field, to_field, rows, to, from),
    }
}
