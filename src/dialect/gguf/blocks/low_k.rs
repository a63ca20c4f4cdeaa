//! Q2_K and Q3_K: super-blocks of 256 values of two bits, and of two and one.

use super::{Block, BlockMut, get_f16, put_f16};
use crate::num::Codec;

/// Two bits a value, in halves of 128: byte 32n + l = elements 128n + l, + 32, + 64, + 96 from the low end up.
fn put_crumbs(codes: &[u8], out: &mut [u8]) {
    for (codes, out) in codes.as_chunks::<128>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        for (l, out) in out.iter_mut().enumerate() {
            let low = |run: usize| codes[32 * run + l] & 3;
            *out = low(0) | low(1) << 2 | low(2) << 4 | low(3) << 6;
        }
    }
}

pub(super) fn get_crumbs(bytes: &[u8], codes: &mut [u8]) {
    for (bytes, codes) in bytes.as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<128>().0) {
        for (run, codes) in codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (code, &byte) in codes.iter_mut().zip(bytes) {
                *code = byte >> (2 * run) & 3;
            }
        }
    }
}

/// Q2_K: 16 bytes scale | minimum << 4, 64 bytes of codes, d, dmin.
pub(super) fn pack_q2_k(block: &Block, out: &mut [u8]) {
    for (out, (&scale, &min)) in out.iter_mut().zip(block.scales.iter().zip(block.offsets)) {
        *out = (Codec::U4.encode(scale) | Codec::U4.encode(min) << 4) as u8;
    }
    put_crumbs(block.codes, &mut out[16..80]);
    put_f16(block.outer_scale, &mut out[80..]);
    put_f16(block.outer_offset, &mut out[82..]);
}

pub(super) fn unpack_q2_k(bytes: &[u8], block: &mut BlockMut) {
    for (j, &byte) in bytes[..16].iter().enumerate() {
        block.scales[j] = (byte & 15) as f32;
        block.offsets[j] = (byte >> 4) as f32;
    }
    get_crumbs(&bytes[16..80], block.codes);
    block.outer_scale = get_f16(&bytes[80..]);
    block.outer_offset = get_f16(&bytes[82..]);
}

/// Q3_K: 32 bytes of third bits (element 32g + l at bit g of byte l), 64 bytes of the lower two, 12 bytes of scales, d.
///
/// The 16 scales are stored 32 larger: byte j (below 8) = the lower four bits of scale j | those of scale j + 8 << 4; byte
/// 8 + j (below 4) = the upper two bits of scales j, j + 4, j + 8, j + 12 from the low end up.
pub(super) fn pack_q3_k(block: &Block, out: &mut [u8]) {
    let mut third_bits = [0u8; 32];
    for (group, codes) in block.codes.as_chunks::<32>().0.iter().enumerate() {
        for (bits, &code) in third_bits.iter_mut().zip(codes) {
            *bits |= (code >> 2 & 1) << group;
        }
    }
    out[..32].copy_from_slice(&third_bits);
    put_crumbs(block.codes, &mut out[32..96]);
    let scale = |j: usize| Codec::I6.encode(block.scales[j]) as u8;
    for j in 0..8 {
        out[96 + j] = scale(j) & 15 | scale(j + 8) << 4;
    }
    for j in 0..4 {
        let upper = |run: usize| scale(j + 4 * run) >> 4;
        out[104 + j] = upper(0) | upper(1) << 2 | upper(2) << 4 | upper(3) << 6;
    }
    put_f16(block.outer_scale, &mut out[108..]);
}

pub(super) fn unpack_q3_k(bytes: &[u8], block: &mut BlockMut) {
    get_crumbs(&bytes[32..96], block.codes);
    for (group, codes) in block.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for (code, &bits) in codes.iter_mut().zip(&bytes[..32]) {
            *code |= (bits >> group & 1) << 2;
        }
    }
    for (j, scale) in block.scales.iter_mut().enumerate() {
        let lower = bytes[96 + j % 8] >> (4 * (j / 8)) & 15;
        let upper = bytes[104 + j % 4] >> (2 * (j / 4)) & 3;
        *scale = Codec::I6.decode((upper << 4 | lower) as u32);
    }
    block.outer_scale = get_f16(&bytes[108..]);
}
