//! The table of all schemes. Byte layouts live in the dialects; golden bytes for each row are in `tests/golden`.

use super::{Offset, Scheme, Span};
use crate::num::{Codec, Element, Table};

const fn flat(name: &'static str, element: Element, group: Span, scale: Codec) -> Scheme {
    Scheme { name, element, group, scale, outer: None, offset: Offset::None }
}

const SUPER_BLOCK: Option<(Span, Codec)> = Some((Span::Cols(256), Codec::F16));

/// OCP MXFP4: 32 E2M1 values share a power of two. 4.25 bits per weight.
pub const MXFP4: Scheme = flat("mxfp4", Element::E2M1, Span::Cols(32), Codec::E8M0);
/// NVFP4: 16 E2M1 values share an E4M3 scale, under one F32 factor for the tensor (a power of two here, see
/// [`super::fit::global_scale`]). 4.5 bits per weight.
pub const NVFP4: Scheme = Scheme {
    outer: Some((Span::Tensor, Codec::F32)),
    ..flat("nvfp4", Element::E2M1, Span::Cols(16), Codec::E4M3)
};
/// FP8 (E4M3) with one BF16 scale per row.
pub const FP8: Scheme = flat("fp8", Element::E4M3, Span::Row, Codec::BF16);
/// INT4 in groups of 128 columns; [`int4_grouped`] sets another length.
pub const INT4: Scheme = flat("int4", Element::Int(4), Span::Cols(128), Codec::BF16);
/// INT8 with one BF16 scale per row (W8A16 and W8A8 weights).
pub const INT8: Scheme = flat("int8", Element::Int(8), Span::Row, Codec::BF16);
/// INT8 in groups along the row; [`int8_grouped`] sets the length.
const INT8_GROUPED: Scheme = flat("int8", Element::Int(8), Span::Cols(128), Codec::BF16);
/// ggml `block_q8_0`: 32 INT8 values, F16 scale. 8.5 bits per weight.
pub const Q8_0: Scheme = flat("q8_0", Element::Int(8), Span::Cols(32), Codec::F16);
/// ggml `block_q4_0`: 32 INT4 values, F16 scale (its sign is free). 4.5 bits per weight.
pub const Q4_0: Scheme = flat("q4_0", Element::Int(4), Span::Cols(32), Codec::F16);
/// ggml `block_q5_0`: 32 INT5 values, F16 scale. 5.5 bits per weight.
pub const Q5_0: Scheme = flat("q5_0", Element::Int(5), Span::Cols(32), Codec::F16);
/// ggml `block_q4_1`: 32 unsigned 4-bit values, F16 scale and F16 minimum. 5 bits per weight.
pub const Q4_1: Scheme = Scheme {
    offset: Offset::Added(Codec::F16),
    ..flat("q4_1", Element::Uint(4), Span::Cols(32), Codec::F16)
};
/// ggml `block_q5_1`: 32 unsigned 5-bit values, F16 scale and F16 minimum. 6 bits per weight.
pub const Q5_1: Scheme = Scheme {
    offset: Offset::Added(Codec::F16),
    ..flat("q5_1", Element::Uint(5), Span::Cols(32), Codec::F16)
};
/// ggml `block_q4_K`: 8 × 32 values, 6-bit scales and minima under one F16 pair. 4.5 bits per weight.
pub const Q4_K: Scheme = Scheme {
    outer: SUPER_BLOCK,
    offset: Offset::Subtracted(Codec::U6),
    ..flat("q4_k", Element::Uint(4), Span::Cols(32), Codec::U6)
};
/// ggml `block_q5_K`: as Q4_K with 5-bit codes. 5.5 bits per weight.
pub const Q5_K: Scheme = Scheme {
    outer: SUPER_BLOCK,
    offset: Offset::Subtracted(Codec::U6),
    ..flat("q5_k", Element::Uint(5), Span::Cols(32), Codec::U6)
};
/// ggml `block_q6_K`: 16 × 16 six-bit values, INT8 scales under one F16. 6.5625 bits per weight.
pub const Q6_K: Scheme =
    Scheme { outer: SUPER_BLOCK, ..flat("q6_k", Element::Int(6), Span::Cols(16), Codec::I8) };

/// ggml `block_q3_K`: 16 × 16 three-bit values, signed 6-bit scales under one F16. 3.4375 bits per weight.
pub const Q3_K: Scheme =
    Scheme { outer: SUPER_BLOCK, ..flat("q3_k", Element::Int(3), Span::Cols(16), Codec::I6) };
/// ggml `block_q2_K`: 16 × 16 two-bit values, 4-bit scales and minima under one F16 pair. 2.625 bits per weight.
pub const Q2_K: Scheme = Scheme {
    outer: SUPER_BLOCK,
    offset: Offset::Subtracted(Codec::U4),
    ..flat("q2_k", Element::Uint(2), Span::Cols(16), Codec::U4)
};

/// The sixteen values of IQ4_NL and IQ4_XS, denser around zero (`kvalues_iq4nl` of ggml-common.h).
const IQ4: Element = Element::Table(&Table::new(
    &[-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113],
    4 * 256,
));
/// ggml `block_iq4_nl`: 32 values of a table, F16 scale (its sign is free). 4.5 bits per weight.
pub const IQ4_NL: Scheme = flat("iq4_nl", IQ4, Span::Cols(32), Codec::F16);
/// ggml `block_iq4_xs`: 8 × 32 values of the same table, signed 6-bit scales under one F16. 4.25 bits per weight.
pub const IQ4_XS: Scheme = Scheme { outer: SUPER_BLOCK, ..flat("iq4_xs", IQ4, Span::Cols(32), Codec::I6) };

/// All schemes that weights can be rounded to; tests and dialects enumerate this.
pub const ALL: [Scheme; 17] = [
    MXFP4, NVFP4, FP8, INT8, INT4, Q8_0, Q4_0, Q5_0, Q4_1, Q5_1, Q4_K, Q5_K, Q6_K, Q3_K, Q2_K, IQ4_NL, IQ4_XS,
];

/// Values of ggml's ternary types. TQ2_0 has a fourth code, which only a file that is no ternary model's has.
const TERNARY: Table = Table::new(&[-1, 0, 1], 8 * 52);
const TERNARY_OF_TWO_BITS: Table = Table::new(&[-1, 0, 1, 2], 8 * 64);

/// A scheme whose codes are stored together, eight or four as one entry of a codebook: `value = d · (2k + 1)/8 · entry`, where
/// `bits_of_256` leaves the super-block's F16 and the scales out.
const fn codebook(name: &'static str, values: &'static Table, group: u32, scale_bits: u8) -> Scheme {
    let scale = Codec::OddEighths(scale_bits);
    Scheme { outer: SUPER_BLOCK, ..flat(name, Element::Table(values), Span::Cols(group), scale) }
}

/// Magnitudes 8, 25, 43 with signs: 15 index and sign bits for eight values (XXS), 16 (XS), 18 (S).
const IQ2: [Table; 3] = {
    let values = [-43, -25, -8, 8, 25, 43];
    [Table::new(&values, 32 * 15), Table::new(&values, 32 * 16), Table::new(&values, 32 * 18)]
};
/// Twice 4, 12, … 52, 62 with signs: ggml has a quarter where the IQ2 types have an eighth.
const IQ3_XXS_VALUES: Table =
    Table::new(&[-124, -104, -88, -72, -56, -40, -24, -8, 8, 24, 40, 56, 72, 88, 104, 124], 32 * 23);
/// Eight times 1, 3, … 15 with signs: ggml has whole scales here.
const IQ3_S_VALUES: Table =
    Table::new(&[-120, -104, -88, -72, -56, -40, -24, -8, 8, 24, 40, 56, 72, 88, 104, 120], 32 * 26);
/// Eight times -1, 0, 1, each an eighth up or down.
const IQ1: [Table; 2] = {
    let values = [-9, -7, -1, 1, 7, 9];
    [Table::new(&values, 45 * 8), Table::new(&values, 48 * 8)]
};

/// Schemes that files of other tools bring and weights are not rounded to here: ternary ones, which want a model trained
/// for them, and codebooks.
pub const READ_ONLY: [Scheme; 9] = [
    flat("tq1_0", Element::Table(&TERNARY), Span::Cols(256), Codec::F16),
    flat("tq2_0", Element::Table(&TERNARY_OF_TWO_BITS), Span::Cols(256), Codec::F16),
    codebook("iq2_xxs", &IQ2[0], 32, 4),
    codebook("iq2_xs", &IQ2[1], 16, 4),
    codebook("iq2_s", &IQ2[2], 16, 4),
    codebook("iq3_xxs", &IQ3_XXS_VALUES, 32, 4),
    codebook("iq3_s", &IQ3_S_VALUES, 32, 4),
    codebook("iq1_s", &IQ1[0], 32, 3),
    codebook("iq1_m", &IQ1[1], 16, 3),
];

/// Returns INT8 with one scale per `group_size` columns.
pub const fn int8_grouped(group_size: u32) -> Scheme {
    Scheme { group: Span::Cols(group_size), ..INT8_GROUPED }
}

/// Returns INT4 with one scale per `group_size` columns.
pub const fn int4_grouped(group_size: u32) -> Scheme {
    Scheme { group: Span::Cols(group_size), ..INT4 }
}

/// Returns the scheme of that name that weights can be rounded to.
pub fn by_name(name: &str) -> Option<Scheme> {
    ALL.into_iter().find(|scheme| scheme.name == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_bits_equal_the_published_bits_per_weight() {
        for (scheme, bits) in [
            (MXFP4, 4.25),
            (Q8_0, 8.5),
            (Q4_0, 4.5),
            (Q5_0, 5.5),
            (Q4_1, 5.0),
            (Q5_1, 6.0),
            (Q4_K, 4.5),
            (Q5_K, 5.5),
            (Q6_K, 6.5625),
            (Q3_K, 3.4375),
            (Q2_K, 2.625),
            (IQ4_NL, 4.5),
            (IQ4_XS, 4.25),
        ] {
            let measured = scheme.stored_bits(3, 512) as f64 / (3.0 * 512.0);
            assert_eq!(measured, bits, "{}", scheme.name);
        }
        let read_only = [1.6875, 2.0625, 2.0625, 2.3125, 2.5625, 3.0625, 3.4375, 1.5625, 1.75];
        for (scheme, bits) in READ_ONLY.into_iter().zip(read_only) {
            assert_eq!(scheme.stored_bits(3, 512) as f64 / (3.0 * 512.0), bits, "{}", scheme.name);
        }
    }
}
