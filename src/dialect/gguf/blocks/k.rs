//! Super-blocks of 256 values with two levels of scales, four bits a value and more.

use super::{Block, BlockMut, get_f16, get_nibbles, put_f16, put_nibbles};
use crate::num::Codec;

/// The 16 bytes at the head of Q4_K and Q5_K: d, dmin, then 6-bit scales S and minima M of 8 groups.
///
/// | byte | bits 0–5 or 0–3 | the rest |
/// |---|---|---|
/// | 4 + j, j < 4 | S\[j\] | S\[j + 4\] >> 4 |
/// | 8 + j | M\[j\] | M\[j + 4\] >> 4 |
/// | 12 + j | S\[j + 4\] & 15 | M\[j + 4\] & 15 |
fn put_k_header(block: &Block, out: &mut [u8]) {
    put_f16(block.outer_scale, out);
    put_f16(block.outer_offset, &mut out[2..]);
    let scale = |j: usize| Codec::U6.encode(block.scales[j]) as u8;
    let min = |j: usize| Codec::U6.encode(block.offsets[j]) as u8;
    for j in 0..4 {
        let (scale_high, min_high) = (scale(j + 4), min(j + 4));
        out[4 + j] = scale(j) | scale_high >> 4 << 6;
        out[8 + j] = min(j) | min_high >> 4 << 6;
        out[12 + j] = scale_high & 15 | min_high << 4;
    }
}

fn get_k_header(bytes: &[u8], block: &mut BlockMut) {
    block.outer_scale = get_f16(bytes);
    block.outer_offset = get_f16(&bytes[2..]);
    for j in 0..4 {
        let [scale, min, low] = [bytes[4 + j], bytes[8 + j], bytes[12 + j]];
        block.scales[j] = (scale & 63) as f32;
        block.offsets[j] = (min & 63) as f32;
        block.scales[j + 4] = (scale >> 6 << 4 | low & 15) as f32;
        block.offsets[j + 4] = (min >> 6 << 4 | low >> 4) as f32;
    }
}

/// Four chunks of 64 elements: byte 32c + l = element 64c + l | element 64c + 32 + l << 4.
fn put_k_nibbles(codes: &[u8], out: &mut [u8]) {
    for (codes, out) in codes.as_chunks::<64>().0.iter().zip(out.as_chunks_mut::<32>().0) {
        put_nibbles(&codes[..32], &codes[32..], out);
    }
}

fn get_k_nibbles(bytes: &[u8], codes: &mut [u8]) {
    for (bytes, codes) in bytes.as_chunks::<32>().0.iter().zip(codes.as_chunks_mut::<64>().0) {
        let (low, high) = codes.split_at_mut(32);
        get_nibbles(bytes, low, high);
    }
}

/// Q4_K: header, 128 bytes of nibbles.
pub(super) fn pack_q4_k(block: &Block, out: &mut [u8]) {
    put_k_header(block, out);
    put_k_nibbles(block.codes, &mut out[16..144]);
}

pub(super) fn unpack_q4_k(bytes: &[u8], block: &mut BlockMut) {
    get_k_header(bytes, block);
    get_k_nibbles(&bytes[16..144], block.codes);
}

/// Q5_K: header, 32 bytes of fifth bits (element 32g + l at bit g of byte l), 128 bytes of nibbles.
pub(super) fn pack_q5_k(block: &Block, out: &mut [u8]) {
    put_k_header(block, out);
    let mut fifth_bits = [0u8; 32];
    for (group, codes) in block.codes.as_chunks::<32>().0.iter().enumerate() {
        for (bits, &code) in fifth_bits.iter_mut().zip(codes) {
            *bits |= (code >> 4) << group;
        }
    }
    out[16..48].copy_from_slice(&fifth_bits);
    put_k_nibbles(block.codes, &mut out[48..176]);
}

pub(super) fn unpack_q5_k(bytes: &[u8], block: &mut BlockMut) {
    get_k_header(bytes, block);
    get_k_nibbles(&bytes[48..176], block.codes);
    for (group, codes) in block.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        for (code, &bits) in codes.iter_mut().zip(&bytes[16..48]) {
            *code |= (bits >> group & 1) << 4;
        }
    }
}

/// Q6_K: ql\[128\], qh\[64\], int8 scales\[16\], d. Each half n of 128 elements is four runs a, b, c, d of 32:
/// ql\[64n + l\] = a | c << 4, ql\[64n + 32 + l\] = b | d << 4 (low four bits),
/// qh\[32n + l\] = the upper two bits of a, b, c, d from the low end up.
pub(super) fn pack_q6_k(block: &Block, out: &mut [u8]) {
    let (ql, rest) = out.split_at_mut(128);
    let (qh, rest) = rest.split_at_mut(64);
    for n in 0..2 {
        let codes = &block.codes[128 * n..128 * (n + 1)];
        put_nibbles(&codes[..32], &codes[64..96], &mut ql[64 * n..64 * n + 32]);
        put_nibbles(&codes[32..64], &codes[96..], &mut ql[64 * n + 32..64 * n + 64]);
        for (l, out) in qh[32 * n..32 * (n + 1)].iter_mut().enumerate() {
            let upper = |run: usize| codes[32 * run + l] >> 4;
            *out = upper(0) | upper(1) << 2 | upper(2) << 4 | upper(3) << 6;
        }
    }
    for (out, &scale) in rest.iter_mut().zip(block.scales) {
        *out = Codec::I8.encode(scale) as u8;
    }
    put_f16(block.outer_scale, &mut rest[16..]);
}

pub(super) fn unpack_q6_k(bytes: &[u8], block: &mut BlockMut) {
    for n in 0..2 {
        let (ql, qh) = (&bytes[64 * n..64 * (n + 1)], &bytes[128 + 32 * n..128 + 32 * (n + 1)]);
        let (ab, cd) = block.codes[128 * n..128 * (n + 1)].split_at_mut(64);
        let ((a, b), (c, d)) = (ab.split_at_mut(32), cd.split_at_mut(32));
        get_nibbles(&ql[..32], a, c);
        get_nibbles(&ql[32..], b, d);
        for (run, codes) in [a, b, c, d].into_iter().enumerate() {
            for (code, &upper) in codes.iter_mut().zip(qh) {
                *code |= (upper >> (2 * run) & 3) << 4;
            }
        }
    }
    for (scale, &byte) in block.scales.iter_mut().zip(&bytes[192..208]) {
        *scale = Codec::I8.decode(byte as u32);
    }
    block.outer_scale = get_f16(&bytes[208..]);
}

/// IQ4_XS: d, upper two bits of the 8 scales (a u16, scale j from bit 2j up), their lower four bits (nibbles), then nibbles of
/// each 32 elements as in Q4_0. Scales are stored 32 larger.
pub(super) fn pack_iq4_xs(block: &Block, out: &mut [u8]) {
    put_f16(block.outer_scale, out);
    let scale = |j: usize| Codec::I6.encode(block.scales[j]) as u16;
    let upper = (0..8).fold(0, |upper, j| upper | scale(j) >> 4 << (2 * j));
    out[2..4].copy_from_slice(&upper.to_le_bytes());
    for j in 0..4 {
        out[4 + j] = (scale(2 * j) & 15 | scale(2 * j + 1) << 4) as u8;
    }
    for (codes, out) in block.codes.as_chunks::<32>().0.iter().zip(out[8..].as_chunks_mut::<16>().0) {
        put_nibbles(&codes[..16], &codes[16..], out);
    }
}

pub(super) fn unpack_iq4_xs(bytes: &[u8], block: &mut BlockMut) {
    block.outer_scale = get_f16(bytes);
    let upper = u16::from_le_bytes([bytes[2], bytes[3]]);
    for (j, scale) in block.scales.iter_mut().enumerate() {
        let lower = bytes[4 + j / 2] >> (4 * (j % 2)) & 15;
        *scale = Codec::I6.decode((upper >> (2 * j) & 3) as u32 * 16 + lower as u32);
    }
    for (codes, bytes) in block.codes.as_chunks_mut::<32>().0.iter_mut().zip(bytes[8..].as_chunks::<16>().0) {
        let (low, high) = codes.split_at_mut(16);
        get_nibbles(bytes, low, high);
    }
}
