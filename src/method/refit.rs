//! Which other stored scales and offsets a group could have, given its codes and the loss around them.
//!
//! A group's values are `v = s · c + o`, linear in scale and offset, so with the gradient `g = H (q - t)` of half the
//! loss the best change of both is the solution of two normal equations:
//!
//! ```text
//! | cᵀHc  cᵀHu | | ds |     | c·g |
//! | uᵀHc  uᵀHu | | do | = - | u·g |        c: element values, u: ones, both over the group's columns
//! ```
//!
//! Candidates are that optimum, rounded to what the codecs can store, and the nearest neighbours of the current scale
//! and offset: [`super::descent`] re-solves the codes under each and keeps what lowers the loss.

use crate::num::Codec;
use crate::scheme::{Offset, QTensor, Scheme};

/// What a group stores: inner scale and inner offset (0 where the scheme has none).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StoredScale {
    /// A value of `scheme.scale`.
    pub scale: f32,
    /// A value of the offset's codec.
    pub offset: f32,
}

/// The quadratic of one group in its two unknowns.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Normal {
    /// `cᵀHc`
    pub cc: f64,
    /// `cᵀHu`
    pub cu: f64,
    /// `uᵀHu`
    pub uu: f64,
    /// `c·g`
    pub cg: f64,
    /// `u·g`
    pub ug: f64,
}

impl Normal {
    /// Returns the change of (scale, offset) that lowers the loss most; the offset stays if `fixed_offset`.
    pub fn solve(&self, fixed_offset: bool) -> (f32, f32) {
        let determinant = self.cc * self.uu - self.cu * self.cu;
        if !fixed_offset && determinant > 1e-6 * self.cc * self.uu {
            let scale = (self.cu * self.ug - self.uu * self.cg) / determinant;
            let offset = (self.cu * self.cg - self.cc * self.ug) / determinant;
            return (scale as f32, offset as f32);
        }
        (if self.cc > 0.0 { (-self.cg / self.cc) as f32 } else { 0.0 }, 0.0)
    }

    /// Returns how the loss changes with these changes of scale and offset.
    pub fn change(&self, scale: f32, offset: f32) -> f64 {
        let (s, o) = (scale as f64, offset as f64);
        2.0 * (s * self.cg + o * self.ug) + s * s * self.cc + 2.0 * s * o * self.cu + o * o * self.uu
    }
}

/// Returns the factors that turn a group's stored pair into effective scale and offset: `scale · .0`, `offset · .1`.
pub fn outer_factors(row: &QTensor, group: usize) -> (f32, f32) {
    let Some((span, _)) = row.scheme.outer else { return (1.0, 1.0) };
    let outer = group * row.group_cols() / span.len(row.cols);
    let offset = match row.scheme.offset {
        Offset::Subtracted(_) => -row.outer_offsets[outer],
        _ => 1.0,
    };
    (row.outer_scales[outer], offset)
}

/// Returns the stored pairs worth trying for a group of a one-row tensor, the current one not among them.
pub fn candidates(row: &QTensor, group: usize, normal: &Normal) -> Vec<StoredScale> {
    let scheme = &row.scheme;
    let now =
        StoredScale { scale: row.scales[group], offset: row.offsets.get(group).copied().unwrap_or(0.0) };
    let (outer_scale, outer_offset) = outer_factors(row, group);
    let offset_codec = match scheme.offset {
        Offset::None => None,
        Offset::Added(codec) | Offset::Subtracted(codec) => Some(codec),
    };
    let mut out: Vec<StoredScale> = Vec::new();
    let mut push = |scale: f32, offset: f32| {
        let stored = StoredScale {
            scale: scheme.scale.round(scale),
            offset: offset_codec.map_or(0.0, |codec| codec.round(offset)),
        };
        if stored != now && stored.scale != 0.0 && !out.contains(&stored) {
            out.push(stored);
        }
    };
    if scheme.scale != Codec::E8M0 && outer_scale != 0.0 {
        let (scale, offset) = normal.solve(offset_codec.is_none() || outer_offset == 0.0);
        let offset = if outer_offset == 0.0 { 0.0 } else { offset / outer_offset };
        push(now.scale + scale / outer_scale, now.offset + offset);
    }
    let [below, above] = neighbours(scheme, now.scale);
    push(below, now.offset);
    push(above, now.offset);
    if matches!(offset_codec, Some(Codec::U4 | Codec::U6)) {
        push(now.scale, now.offset - 1.0);
        push(now.scale, now.offset + 1.0);
    }
    out
}

/// Returns the next smaller and larger scale: the codec's own steps where they are coarse, else the change that moves
/// the largest code by half a step.
fn neighbours(scheme: &Scheme, scale: f32) -> [f32; 2] {
    match scheme.scale {
        Codec::E8M0 => [scale / 2.0, scale * 2.0],
        Codec::E4M3 => {
            let byte = Codec::E4M3.encode(scale);
            [byte.saturating_sub(1), (byte + 1).min(0x7e)].map(|byte| Codec::E4M3.decode(byte))
        }
        Codec::U4 | Codec::U6 | Codec::I6 | Codec::I8 => [scale - 1.0, scale + 1.0],
        Codec::OddEighths(_) => [scale - 0.25, scale + 0.25],
        _ => {
            let (low, high) = scheme.element.range();
            let step = 0.5 / high.max(-low);
            [scale * (1.0 - step), scale * (1.0 + step)]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheme::schemes::*;

    #[test]
    fn normal_equations_are_solved_exactly() {
        // ½·loss = ½ xᵀAx + bᵀx with A = [[4, 1], [1, 3]], b = (2, -5): x = -A⁻¹b = (-1, 2).
        let normal = Normal { cc: 4.0, cu: 1.0, uu: 3.0, cg: 2.0, ug: -5.0 };
        assert_eq!(normal.solve(false), (-1.0, 2.0));
        assert_eq!(normal.solve(true), (-0.5, 0.0));
    }

    #[test]
    fn candidates_are_storable_and_new() {
        for scheme in ALL {
            let mut row = QTensor::zeroed(scheme, 1, 256);
            row.scales.fill(scheme.scale.round(2.0));
            row.outer_scales.fill(0.5);
            row.outer_offsets.fill(0.25);
            let normal = Normal { cc: 4.0, cu: 1.0, uu: 3.0, cg: 2.0, ug: -5.0 };
            let found = candidates(&row, 0, &normal);
            assert!(!found.is_empty(), "{}", scheme.name);
            for stored in found {
                assert_eq!(scheme.scale.round(stored.scale), stored.scale, "{}", scheme.name);
                assert!(stored.scale != row.scales[0] || stored.offset != 0.0, "{}", scheme.name);
            }
        }
    }
}
