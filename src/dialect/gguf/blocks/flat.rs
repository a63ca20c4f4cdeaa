//! Blocks of 32 values under one scale.

use super::{Block, BlockMut, get_f16, get_nibbles, put_f16, put_nibbles};
use crate::num::Codec;

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

/// Q4_0, IQ4_NL and Q4_1: header, then byte j = element j | element j + 16 << 4.
pub(super) fn pack_q4<const HEADER: usize>(block: &Block, out: &mut [u8]) {
    put_header::<HEADER>(block, out);
    put_nibbles(&block.codes[..16], &block.codes[16..32], &mut out[HEADER..HEADER + 16]);
}

pub(super) fn unpack_q4<const HEADER: usize>(bytes: &[u8], block: &mut BlockMut) {
    get_header::<HEADER>(bytes, block);
    let (low, high) = block.codes.split_at_mut(16);
    get_nibbles(&bytes[HEADER..HEADER + 16], low, high);
}

/// Q5_0 and Q5_1: header, then a u32 whose bit i is the fifth bit of element i, then nibbles as in Q4.
pub(super) fn pack_q5<const HEADER: usize>(block: &Block, out: &mut [u8]) {
    put_header::<HEADER>(block, out);
    for (out, codes) in out[HEADER..HEADER + 4].iter_mut().zip(block.codes.as_chunks::<8>().0) {
        // Bit 4 of byte i moves to bit 56 + i: each of the eight factors 2^(56 - 7i) lifts one byte there.
        let fifth_bits = u64::from_le_bytes(*codes) >> 4 & 0x0101_0101_0101_0101;
        *out = (fifth_bits.wrapping_mul(0x0102_0408_1020_4080) >> 56) as u8;
    }
    put_nibbles(&block.codes[..16], &block.codes[16..32], &mut out[HEADER + 4..HEADER + 20]);
}

pub(super) fn unpack_q5<const HEADER: usize>(bytes: &[u8], block: &mut BlockMut) {
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
pub(super) fn pack_q8_0(block: &Block, out: &mut [u8]) {
    put_f16(block.scales[0], out);
    for (out, &code) in out[2..34].iter_mut().zip(block.codes) {
        *out = code ^ 0x80;
    }
}

pub(super) fn unpack_q8_0(bytes: &[u8], block: &mut BlockMut) {
    block.scales[0] = get_f16(bytes);
    for (code, &byte) in block.codes.iter_mut().zip(&bytes[2..34]) {
        *code = byte ^ 0x80;
    }
}

/// MXFP4: the E8M0 byte, then nibbles as in Q4. Both are the OCP ones: ggml's doubled element table and halved scale
/// are how it computes, not what it stores.
pub(super) fn pack_mxfp4(block: &Block, out: &mut [u8]) {
    out[0] = Codec::E8M0.encode(block.scales[0]) as u8;
    put_nibbles(&block.codes[..16], &block.codes[16..32], &mut out[1..17]);
}

pub(super) fn unpack_mxfp4(bytes: &[u8], block: &mut BlockMut) {
    block.scales[0] = Codec::E8M0.decode(bytes[0] as u32);
    let (low, high) = block.codes.split_at_mut(16);
    get_nibbles(&bytes[1..17], low, high);
}
