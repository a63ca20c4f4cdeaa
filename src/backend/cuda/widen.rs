//! Small matrices in Q5_0 lie in GPU memory as Q8_0, with the same values.
//!
//! Products of so few weights take the time of their launches and instructions, not of reading. Q4_K_M stores rows that do
//! not fit its blocks in Q5_0 and some layers' v in Q8_0: stored alike, q, k and v share a launch.

use crate::num::Element;
use crate::scheme::{QTensor, Scheme, schemes};

/// Most rows, and most columns, of a small matrix: q, k, v and o of models with a hidden size up to this.
const SMALL: usize = 1024;

/// Returns the scheme that a matrix `[rows, cols]` has in GPU memory.
pub(crate) fn scheme_on_device(scheme: Scheme, rows: usize, cols: usize) -> Scheme {
    if scheme == schemes::Q5_0 && rows.max(cols) <= SMALL { schemes::Q8_0 } else { scheme }
}

/// Returns codes and scales of the same values in the scheme of GPU memory, if that is another.
pub(super) fn widened(q: &QTensor) -> Option<QTensor> {
    let scheme = scheme_on_device(q.scheme, q.rows, q.cols);
    let (Element::Int(from), Element::Int(to)) = (q.scheme.element, scheme.element) else { return None };
    if from == to {
        return None;
    }
    // Codes count from the lowest value.
    let shift = (1 << (to - 1)) - (1 << (from - 1));
    Some(QTensor { scheme, codes: q.codes.iter().map(|code| code + shift).collect(), ..q.clone() })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_code_keeps_its_value_and_large_matrices_keep_theirs() {
        let mut q = QTensor::zeroed(schemes::Q5_0, 3, 64);
        q.codes.iter_mut().enumerate().for_each(|(i, code)| *code = (i % 32) as u8);
        q.scales.iter_mut().enumerate().for_each(|(i, scale)| *scale = i as f32 * 0.25 - 0.5);
        let wide = widened(&q).unwrap();
        assert_eq!(wide.scheme, schemes::Q8_0);
        let bits = |q: &QTensor| q.decode().into_iter().map(f32::to_bits).collect::<Vec<_>>();
        assert_eq!(bits(&wide), bits(&q));
        assert!(widened(&wide).is_none(), "once is enough");
        for (rows, cols) in [(SMALL + 1, 32), (1, SMALL + 32)] {
            assert!(widened(&QTensor::zeroed(schemes::Q5_0, rows, cols)).is_none());
        }
    }
}
