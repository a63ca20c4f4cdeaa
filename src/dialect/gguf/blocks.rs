//! Block layouts of ggml: bytes of one block ↔ its codes and stored scales.
//!
//! Byte maps are those of ggml-common.h (`block_q4_0` … `block_q6_K`, `block_mxfp4`; llama.cpp commit 0c1e57098).
//! Integer codes of a [`QTensor`](crate::scheme::QTensor) are offset-binary, which is also how ggml stores every type
//! but Q8_0 (two's complement).

use crate::container::gguf::GgmlType;
use crate::num::Codec;
use crate::scheme::{Scheme, schemes};

/// One ggml block type: which scheme it spells and how.
pub(super) struct Layout {
    pub kind: GgmlType,
    pub scheme: Scheme,
    /// Writes one block, `kind.block_bytes()` long.
    pub pack: fn(&Block, &mut [u8]),
    /// Reads one block. Scales may come out NaN or infinite; the caller refuses them.
    pub unpack: fn(&[u8], &mut BlockMut),
}

/// The numbers of one block: `block_elems` codes and the scales that govern them.
pub(super) struct Block<'a> {
    pub codes: &'a [u8],
    /// One, or as many as a super-block has groups.
    pub scales: &'a [f32],
    /// Empty for symmetric types.
    pub offsets: &'a [f32],
    /// `d` and `dmin` of a super-block.
    pub outer_scale: f32,
    pub outer_offset: f32,
}

/// Where the numbers of one block go.
pub(super) struct BlockMut<'a> {
    pub codes: &'a mut [u8],
    pub scales: &'a mut [f32],
    pub offsets: &'a mut [f32],
    pub outer_scale: f32,
    pub outer_offset: f32,
}

/// All quantized types.
pub(super) const LAYOUTS: [Layout; 9] = [
    Layout { kind: GgmlType::Q4_0, scheme: schemes::Q4_0, pack: pack_q4::<2>, unpack: unpack_q4::<2> },
    Layout { kind: GgmlType::Q4_1, scheme: schemes::Q4_1, pack: pack_q4::<4>, unpack: unpack_q4::<4> },
    Layout { kind: GgmlType::Q5_0, scheme: schemes::Q5_0, pack: pack_q5::<2>, unpack: unpack_q5::<2> },
    Layout { kind: GgmlType::Q5_1, scheme: schemes::Q5_1, pack: pack_q5::<4>, unpack: unpack_q5::<4> },
    Layout { kind: GgmlType::Q8_0, scheme: schemes::Q8_0, pack: pack_q8_0, unpack: unpack_q8_0 },
    Layout { kind: GgmlType::Q4_K, scheme: schemes::Q4_K, pack: pack_q4_k, unpack: unpack_q4_k },
    Layout { kind: GgmlType::Q5_K, scheme: schemes::Q5_K, pack: pack_q5_k, unpack: unpack_q5_k },
    Layout { kind: GgmlType::Q6_K, scheme: schemes::Q6_K, pack: pack_q6_k, unpack: unpack_q6_k },
    Layout { kind: GgmlType::MXFP4, scheme: schemes::MXFP4, pack: pack_mxfp4, unpack: unpack_mxfp4 },
];

fn put_f16(x: f32, out: &mut [u8]) {
    out[..2].copy_from_slice(&(Codec::F16.encode(x) as u16).to_le_bytes());
}

fn get_f16(bytes: &[u8]) -> f32 {
    Codec::F16.decode(u16::from_le_bytes([bytes[0], bytes[1]]) as u32)
}

/// `out[i] = low[i] & 15 | high[i] << 4`; a fifth code bit falls off.
#[inline(always)]
fn put_nibbles(low: &[u8], high: &[u8], out: &mut [u8]) {
    for ((out, &low), &high) in out.iter_mut().zip(low).zip(high) {
        *out = low & 15 | high << 4;
    }
}

#[inline(always)]
fn get_nibbles(bytes: &[u8], low: &mut [u8], high: &mut [u8]) {
    for ((&byte, low), high) in bytes.iter().zip(low).zip(high) {
        *low = byte & 15;
        *high = byte >> 4;
    }
}

/// Scale, and minimum where there is one, in the first `HEADER` bytes.
fn put_header<const HEADER: usize>(block: &Block, out: &mut [u8]) {
    put_f16(block.scales[0], out);
    if HEADER == 4 {
        put_f16(block.offsets[0], &mut out[2..]);
    }
}

fn get_header<const HEADER: usize>(bytes: &[u8], block: &mut BlockMut) {
    block.scales[0] = get_f16(bytes);
    if HEADER == 4 {
        block.offsets[0] = get_f16(&bytes[2..]);
    }
}

/// Q4_0 and Q4_1: header, then byte j = element j | element j + 16 << 4.
fn pack_q4<const HEADER: usize>(block: &Block, out: &mut [u8]) {
    put_header::<HEADER>(block, out);
    put_nibbles(&block.codes[..16], &block.codes[16..32], &mut out[HEADER..HEADER + 16]);
}

fn unpack_q4<const HEADER: usize>(bytes: &[u8], block: &mut BlockMut) {
    get_header::<HEADER>(bytes, block);
    let (low, high) = block.codes.split_at_mut(16);
    get_nibbles(&bytes[HEADER..HEADER + 16], low, high);
}

/// Q5_0 and Q5_1: header, then a u32 whose bit i is the fifth bit of element i, then nibbles as in Q4.
fn pack_q5<const HEADER: usize>(block: &Block, out: &mut [u8]) {
    put_header::<HEADER>(block, out);
    for (out, codes) in out[HEADER..HEADER + 4].iter_mut().zip(block.codes.as_chunks::<8>().0) {
        // Bit 4 of byte i moves to bit 56 + i: each of the eight factors 2^(56 - 7i) lifts one byte there.
        let fifth_bits = u64::from_le_bytes(*codes) >> 4 & 0x0101_0101_0101_0101;
        *out = (fifth_bits.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8;
    }
    put_nibbles(&block.codes[..16], &block.codes[16..32], &mut out[HEADER + 4..HEADER + 20]);
}

fn unpack_q5<const HEADER: usize>(bytes: &[u8], block: &mut BlockMut) {
    get_header::<HEADER>(bytes, block);
    let (low, high) = block.codes.split_at_mut(16);
    get_nibbles(&bytes[HEADER + 4..HEADER + 20], low, high);
    for (codes, &fifth_bits) in block.codes.chunks_mut(8).zip(&bytes[HEADER..HEADER + 4]) {
        for (i, code) in codes.iter_mut().enumerate() {
            *code |= (fifth_bits >> i & 1) << 4;
        }
    }
}

/// Q8_0: d, then 32 two's complement bytes.
fn pack_q8_0(block: &Block, out: &mut [u8]) {
    put_f16(block.scales[0], out);
    for (out, &code) in out[2..34].iter_mut().zip(block.codes) {
        *out = code ^ 0x80;
    }
}

fn unpack_q8_0(bytes: &[u8], block: &mut BlockMut) {
    block.scales[0] = get_f16(bytes);
    for (code, &byte) in block.codes.iter_mut().zip(&bytes[2..34]) {
        *code = byte ^ 0x80;
    }
}

/// MXFP4: the E8M0 byte, then nibbles as in Q4. Both are the OCP ones: ggml's doubled element table and halved scale
/// are how it computes, not what it stores.
fn pack_mxfp4(block: &Block, out: &mut [u8]) {
    out[0] = Codec::E8M0.encode(block.scales[0]) as u8;
    put_nibbles(&block.codes[..16], &block.codes[16..32], &mut out[1..17]);
}

fn unpack_mxfp4(bytes: &[u8], block: &mut BlockMut) {
    block.scales[0] = Codec::E8M0.decode(bytes[0] as u32);
    let (low, high) = block.codes.split_at_mut(16);
    get_nibbles(&bytes[1..17], low, high);
}

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
fn pack_q4_k(block: &Block, out: &mut [u8]) {
    put_k_header(block, out);
    put_k_nibbles(block.codes, &mut out[16..144]);
}

fn unpack_q4_k(bytes: &[u8], block: &mut BlockMut) {
    get_k_header(bytes, block);
    get_k_nibbles(&bytes[16..144], block.codes);
}

/// Q5_K: header, 32 bytes of fifth bits (element 32g + l at bit g of byte l), 128 bytes of nibbles.
fn pack_q5_k(block: &Block, out: &mut [u8]) {
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

fn unpack_q5_k(bytes: &[u8], block: &mut BlockMut) {
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
fn pack_q6_k(block: &Block, out: &mut [u8]) {
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

fn unpack_q6_k(bytes: &[u8], block: &mut BlockMut) {
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
