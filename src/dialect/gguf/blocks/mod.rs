//! Block layouts of ggml: bytes of one block ↔ its codes and stored scales.
//!
//! Byte maps are those of ggml-common.h (`block_q4_0` … `block_iq4_xs`, `block_mxfp4`; llama.cpp commit 0c1e57098).
//! Integer codes of a [`QTensor`](crate::scheme::QTensor) are offset-binary, which is also how ggml stores every type
//! but Q8_0 (two's complement).
//!
//! One file per kind of block: [`flat`] (32 values under one scale), [`k`] and [`low_k`] (super-blocks of 256 with two levels
//! of scales), [`ternary`], [`codebook`] (several values stored as one index).

mod codebook;
mod flat;
mod k;
mod low_k;
mod ternary;

use crate::container::gguf::GgmlType;
use crate::num::Codec;
use crate::scheme::{Scheme, schemes};

/// One ggml block type: which scheme it spells and how.
pub(super) struct Layout {
    pub kind: GgmlType,
    pub scheme: Scheme,
    /// Writes one block, `kind.block_bytes()` long; `None` for types that are only read.
    pub pack: Option<fn(&Block, &mut [u8])>,
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

/// All quantized types, by scheme.
pub(super) static LAYOUTS: [Layout; 22] = {
    use GgmlType as G;
    const fn both(
        kind: G,
        scheme: Scheme,
        pack: fn(&Block, &mut [u8]),
        unpack: fn(&[u8], &mut BlockMut),
    ) -> Layout {
        Layout { kind, scheme, pack: Some(pack), unpack }
    }
    const fn read_only(kind: G, index: usize, unpack: fn(&[u8], &mut BlockMut)) -> Layout {
        Layout { kind, scheme: schemes::READ_ONLY[index], pack: None, unpack }
    }
    [
        both(G::Q4_0, schemes::Q4_0, flat::pack_q4::<2>, flat::unpack_q4::<2>),
        both(G::Q4_1, schemes::Q4_1, flat::pack_q4::<4>, flat::unpack_q4::<4>),
        both(G::Q5_0, schemes::Q5_0, flat::pack_q5::<2>, flat::unpack_q5::<2>),
        both(G::Q5_1, schemes::Q5_1, flat::pack_q5::<4>, flat::unpack_q5::<4>),
        both(G::Q8_0, schemes::Q8_0, flat::pack_q8_0, flat::unpack_q8_0),
        both(G::Q2_K, schemes::Q2_K, low_k::pack_q2_k, low_k::unpack_q2_k),
        both(G::Q3_K, schemes::Q3_K, low_k::pack_q3_k, low_k::unpack_q3_k),
        both(G::Q4_K, schemes::Q4_K, k::pack_q4_k, k::unpack_q4_k),
        both(G::Q5_K, schemes::Q5_K, k::pack_q5_k, k::unpack_q5_k),
        both(G::Q6_K, schemes::Q6_K, k::pack_q6_k, k::unpack_q6_k),
        both(G::IQ4_NL, schemes::IQ4_NL, flat::pack_q4::<2>, flat::unpack_q4::<2>),
        both(G::IQ4_XS, schemes::IQ4_XS, k::pack_iq4_xs, k::unpack_iq4_xs),
        both(G::MXFP4, schemes::MXFP4, flat::pack_mxfp4, flat::unpack_mxfp4),
        read_only(G::TQ1_0, 0, ternary::unpack_tq1_0),
        read_only(G::TQ2_0, 1, ternary::unpack_tq2_0),
        read_only(G::IQ2_XXS, 2, codebook::unpack_iq2_xxs),
        read_only(G::IQ2_XS, 3, codebook::unpack_iq2_xs),
        read_only(G::IQ2_S, 4, codebook::unpack_iq2_s),
        read_only(G::IQ3_XXS, 5, codebook::unpack_iq3_xxs),
        read_only(G::IQ3_S, 6, codebook::unpack_iq3_s),
        read_only(G::IQ1_S, 7, codebook::unpack_iq1_s),
        read_only(G::IQ1_M, 8, codebook::unpack_iq1_m),
    ]
};

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
