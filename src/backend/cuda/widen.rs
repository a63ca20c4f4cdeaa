//! Codes that lie in GPU memory wider than they are stored, with the same values:
//!
//! - values by table as INT8, so that products multiply them as they lie: IQ4_NL, IQ4_XS and what is only read take a byte each;
//! - two and three bits as four, the fewest that kernels unpack;
//! - small matrices in Q5_0 as Q8_0. Products of so few weights take the time of their launches and instructions, not of
//!   reading. Q4_K_M stores rows that do not fit its blocks in Q5_0 and some layers' v in Q8_0: stored alike, q, k and v share
//!   a launch.

use crate::num::Element;
use crate::scheme::{QTensor, Scheme, schemes};

/// Most rows, and most columns, of a small matrix: q, k, v and o of models with a hidden size up to this.
const SMALL: usize = 1024;

/// Returns the scheme that a matrix `[rows, cols]` has in GPU memory.
pub fn scheme_on_device(scheme: Scheme, rows: usize, cols: usize) -> Scheme {
    let element = match scheme.element {
        Element::Table(_) => Element::Int(8),
        Element::Int(..=3) => Element::Int(4),
        Element::Uint(..=3) => Element::Uint(4),
        _ if scheme == schemes::Q5_0 && rows.max(cols) <= SMALL => return schemes::Q8_0,
        element => element,
    };
    Scheme { element, ..scheme }
}

/// Returns codes and scales of the same values in the scheme of GPU memory, if that is another.
pub(super) fn widened(q: &QTensor) -> Option<QTensor> {
    let scheme = scheme_on_device(q.scheme, q.rows, q.cols);
    if scheme.element == q.scheme.element {
        return None;
    }
    let values = q.scheme.element.table();
    let wide: Vec<u8> = values.into_iter().map(|value| scheme.element.encode(value)).collect();
    Some(QTensor { scheme, codes: q.codes.iter().map(|&code| wide[code as usize]).collect(), ..q.clone() })
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

    #[test]
    fn tables_and_few_bits_keep_their_values() {
        let few = [schemes::Q2_K, schemes::Q3_K, schemes::IQ4_NL, schemes::IQ4_XS];
        for scheme in few.into_iter().chain(schemes::READ_ONLY) {
            let mut q = QTensor::zeroed(scheme, 2, 512);
            let codes = scheme.element.codes();
            q.codes.iter_mut().enumerate().for_each(|(i, code)| *code = (i % codes) as u8);
            q.scales.iter_mut().enumerate().for_each(|(i, scale)| *scale = scheme.scale.round(i as f32));
            q.outer_scales.fill(0.5);
            let wide = widened(&q).unwrap();
            assert_eq!(wide.decode(), q.decode(), "{}", scheme.name);
            assert!(matches!(wide.scheme.element, Element::Int(4 | 8) | Element::Uint(4)), "{}", scheme.name);
        }
    }
}
