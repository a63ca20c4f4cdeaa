//! Ternary types: 256 values of -1, 0 and 1 under one scale. Only read.

use super::low_k::get_crumbs;
use super::{BlockMut, get_f16};

/// TQ2_0: 64 bytes of two-bit codes in the order of Q2_K, d.
pub(super) fn unpack_tq2_0(bytes: &[u8], block: &mut BlockMut) {
    get_crumbs(&bytes[..64], block.codes);
    block.scales[0] = get_f16(&bytes[64..]);
}

/// TQ1_0: 52 bytes of five or four base-3 digits, d. 32 bytes hold elements 0..160, 16 bytes elements 160..240, 4 bytes the
/// rest; digit n of byte l of a run of L bytes is its element n L + l.
pub(super) fn unpack_tq1_0(bytes: &[u8], block: &mut BlockMut) {
    let (first, rest) = block.codes.split_at_mut(160);
    let (second, third) = rest.split_at_mut(80);
    get_digits(&bytes[..32], first);
    get_digits(&bytes[32..48], second);
    get_digits(&bytes[48..52], third);
    block.scales[0] = get_f16(&bytes[52..]);
}

/// A byte is a binary fraction whose base-3 digits are the codes: times 3, the digit stands above it.
fn get_digits(bytes: &[u8], codes: &mut [u8]) {
    let mut fractions = bytes.to_vec();
    for codes in codes.chunks_exact_mut(bytes.len()) {
        for (code, fraction) in codes.iter_mut().zip(&mut fractions) {
            let tripled = 3 * *fraction as u16;
            *code = (tripled >> 8) as u8;
            *fraction = tripled as u8;
        }
    }
}
