//! Types that store four or eight values as one index into a codebook (IQ1, IQ2, IQ3). Only read: choosing entries is a
//! search of its own, and `llama-quantize` has it.
//!
//! Each becomes a scheme of scales and codes of single values ([`schemes::READ_ONLY`](crate::scheme::schemes)): a code is the
//! place of a value, with its sign, in the scheme's ascending table.

use super::{BlockMut, get_f16};
use crate::num::Codec;

/// Entries as `scripts/ggml_codebooks.py` wrote them, u16 each: eight places of two bits or four of four bits, the first lowest,
/// in the codebook's magnitudes (IQ2, IQ3) or in -1, 0, 1 (IQ1).
const CODEBOOKS: &[u8; 9216] = include_bytes!("codebooks.bin");
const IQ2_XXS: usize = 0;
const IQ2_XS: usize = IQ2_XXS + 256;
const IQ2_S: usize = IQ2_XS + 512;
const IQ3_XXS: usize = IQ2_S + 1024;
const IQ3_S: usize = IQ3_XXS + 256;
const IQ1: usize = IQ3_S + 512;

fn entry(codebook: usize, index: usize) -> u16 {
    let at = 2 * (codebook + index);
    u16::from_le_bytes([CODEBOOKS[at], CODEBOOKS[at + 1]])
}

/// Writes the codes of values whose magnitudes an entry has at `bits` each. `magnitudes` is how many there are, and with a
/// sign bit set (the first value's is the lowest) a value is negative: the tables mirror each other around zero.
fn put_signed(entry: u16, bits: usize, magnitudes: u8, signs: u8, codes: &mut [u8]) {
    for (i, code) in codes.iter_mut().enumerate() {
        let place = (entry >> (bits * i)) as u8 & ((1 << bits) - 1);
        *code = if signs >> i & 1 == 0 { magnitudes + place } else { magnitudes - 1 - place };
    }
}

/// Eight signs from seven: the eighth makes their number even.
fn even_signs(seven: u32) -> u8 {
    let seven = seven as u8 & 127;
    seven | (seven.count_ones() as u8 & 1) << 7
}

fn odd(k: u8) -> f32 {
    Codec::OddEighths(4).decode(k as u32)
}

fn get_u16(bytes: &[u8], i: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]])
}

fn get_u32(bytes: &[u8], i: usize) -> u32 {
    get_u16(bytes, 2 * i) as u32 | (get_u16(bytes, 2 * i + 1) as u32) << 16
}

/// Nibbles, two a byte, the low one first: scales of 16 values (IQ2) or 32 (IQ3).
fn get_scales(bytes: &[u8], block: &mut BlockMut) {
    for (j, scale) in block.scales.iter_mut().enumerate() {
        *scale = odd(bytes[j / 2] >> (4 * (j % 2)) & 15);
    }
}

/// IQ2_XXS: d, then for each 32 values a u32 of four 8-bit indices and a u32 of four times 7 signs and the scale on top.
pub(super) fn unpack_iq2_xxs(bytes: &[u8], block: &mut BlockMut) {
    block.outer_scale = get_f16(bytes);
    for (group, codes) in block.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let [indices, rest] = [0, 1].map(|i| get_u32(&bytes[2..], 2 * group + i));
        block.scales[group] = odd((rest >> 28) as u8);
        for (i, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let index = (indices >> (8 * i)) as usize & 255;
            put_signed(entry(IQ2_XXS, index), 2, 3, even_signs(rest >> (7 * i)), codes);
        }
    }
}

/// IQ2_XS: d, then for each 8 values a u16 of a 9-bit index and 7 signs, then scales.
pub(super) fn unpack_iq2_xs(bytes: &[u8], block: &mut BlockMut) {
    block.outer_scale = get_f16(bytes);
    for (i, codes) in block.codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let word = get_u16(&bytes[2..], i);
        put_signed(entry(IQ2_XS, word as usize & 511), 2, 3, even_signs(word as u32 >> 9), codes);
    }
    get_scales(&bytes[66..74], block);
}

/// IQ2_S: d, for each 8 values a byte of index, for each 8 a byte of signs, two upper index bits each, then scales.
pub(super) fn unpack_iq2_s(bytes: &[u8], block: &mut BlockMut) {
    block.outer_scale = get_f16(bytes);
    let (indices, signs, upper) = (&bytes[2..34], &bytes[34..66], &bytes[66..74]);
    for (i, codes) in block.codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let index = (upper[i / 4] as usize >> (2 * (i % 4)) & 3) << 8 | indices[i] as usize;
        put_signed(entry(IQ2_S, index), 2, 3, signs[i], codes);
    }
    get_scales(&bytes[74..82], block);
}

/// IQ3_XXS: d, for each 4 values a byte of index, then for each 32 a u32 of four times 7 signs and the scale on top.
pub(super) fn unpack_iq3_xxs(bytes: &[u8], block: &mut BlockMut) {
    block.outer_scale = get_f16(bytes);
    let indices = &bytes[2..66];
    for (group, codes) in block.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let rest = get_u32(&bytes[66..], group);
        block.scales[group] = odd((rest >> 28) as u8);
        for (i, codes) in codes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
            let signs = even_signs(rest >> (7 * (i / 2))) >> (4 * (i % 2));
            put_signed(entry(IQ3_XXS, indices[8 * group + i] as usize), 4, 8, signs, codes);
        }
    }
}

/// IQ3_S: d, for each 4 values a byte of index, a ninth index bit each, for each 8 a byte of signs, then scales.
pub(super) fn unpack_iq3_s(bytes: &[u8], block: &mut BlockMut) {
    block.outer_scale = get_f16(bytes);
    let (indices, ninth, signs) = (&bytes[2..66], &bytes[66..74], &bytes[74..106]);
    for (i, codes) in block.codes.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let index = (ninth[i / 8] as usize >> (i % 8) & 1) << 8 | indices[i] as usize;
        put_signed(entry(IQ3_S, index), 4, 8, signs[i / 2] >> (4 * (i % 2)), codes);
    }
    get_scales(&bytes[106..110], block);
}

/// Writes the codes of an entry of IQ1, whose values are shifted by an eighth, down or up: places 0, 2, 4 or 1, 3, 5 of the
/// table -9/8, -7/8, -1/8, 1/8, 7/8, 9/8.
fn put_shifted(entry: u16, down: bool, codes: &mut [u8]) {
    for (i, code) in codes.iter_mut().enumerate() {
        *code = 2 * (entry >> (2 * i) & 3) as u8 + u8::from(!down);
    }
}

/// IQ1_S: d, for each 8 values a byte of index, then for each 32 a u16 of four times 3 upper index bits, scale and shift.
pub(super) fn unpack_iq1_s(bytes: &[u8], block: &mut BlockMut) {
    block.outer_scale = get_f16(bytes);
    let indices = &bytes[2..34];
    for (group, codes) in block.codes.as_chunks_mut::<32>().0.iter_mut().enumerate() {
        let rest = get_u16(&bytes[34..], group);
        block.scales[group] = odd((rest >> 12) as u8 & 7);
        for (i, codes) in codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
            let index = (rest as usize >> (3 * i) & 7) << 8 | indices[4 * group + i] as usize;
            put_shifted(entry(IQ1, index), rest >> 15 == 1, codes);
        }
    }
}

/// IQ1_M: for each 8 values a byte of index, for each 8 a nibble of three upper index bits and the shift, then four u16 of
/// four times 3 bits of scales of 16 values, whose upper four bits together are d, the lowest first.
pub(super) fn unpack_iq1_m(bytes: &[u8], block: &mut BlockMut) {
    let (indices, nibbles, scales) = (&bytes[..32], &bytes[32..48], &bytes[48..56]);
    let d = (0..4).fold(0, |d, i| d | get_u16(scales, i) >> 12 << (4 * i));
    block.outer_scale = Codec::F16.decode(d as u32);
    for (j, scale) in block.scales.iter_mut().enumerate() {
        *scale = odd((get_u16(scales, j / 4) >> (3 * (j % 4))) as u8 & 7);
    }
    for (i, codes) in block.codes.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let nibble = nibbles[i / 2] >> (4 * (i % 2));
        let index = (nibble as usize & 7) << 8 | indices[i] as usize;
        put_shifted(entry(IQ1, index), nibble & 8 != 0, codes);
    }
}
