//! E8M0 scales: the choice of one exponent per block.

use super::{Group, ScaleRule, best, groups};
use crate::num::Codec;
use crate::scheme::QTensor;

pub(super) fn fit(q: &mut QTensor, weights: &[f32], importances: Option<&[f32]>, rule: ScaleRule) {
    let element = q.scheme.element;
    let blocks = groups(q, weights, importances);
    for (scale, block) in q.scales.iter_mut().zip(blocks) {
        let byte = match rule {
            ScaleRule::Floor => byte_for(block.amax(), 8.0),
            ScaleRule::Even => byte_for(block.amax(), 7.0),
            ScaleRule::T7_25 => byte_for(block.amax(), 7.25),
            ScaleRule::Search => search(block, |byte| block.error(element, Codec::E8M0.decode(byte), 0.0)),
        };
        *scale = Codec::E8M0.decode(byte);
    }
}

/// Returns the byte of the least power of two that keeps `amax` below `threshold` units (at most 8), for elements that
/// end at 6: `e = floor(log2 amax) - 2`, plus one if amax reaches `threshold · 2^e`. Within 0..=254.
fn byte_for(amax: f32, threshold: f32) -> u32 {
    // Scaling by 2^32 makes a denormal maximum a normal number, whose exponent field is its binary logarithm.
    let (amax, shift) = if amax < f32::MIN_POSITIVE { (amax * 2f32.powi(32), 32) } else { (amax, 0) };
    let exponent = (amax.to_bits() >> 23) as i32 - shift - 2;
    let mantissa = f32::from_bits((amax.to_bits() & 0x007f_ffff) | 0x4080_0000);
    (exponent + (mantissa >= threshold) as i32).clamp(0, 254) as u32
}

fn search(block: Group, cost: impl Fn(u32) -> f32) -> u32 {
    let floor = byte_for(block.amax(), 8.0);
    best([floor, floor + 1, floor.saturating_sub(1)], |byte| cost(byte.min(254))).map_or(0, |b| b.min(254))
}
