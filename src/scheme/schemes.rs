//! The table of all schemes. Byte layouts live in the dialects; golden bytes for each row are in `tests/golden`.

use super::{Offset, Scheme, Span};
use crate::num::{Codec, Element};

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

/// All schemes; tests and dialects enumerate this.
pub const ALL: [Scheme; 13] = [MXFP4, NVFP4, FP8, INT8, INT4, Q8_0, Q4_0, Q5_0, Q4_1, Q5_1, Q4_K, Q5_K, Q6_K];

/// Returns INT8 with one scale per `group_size` columns.
pub const fn int8_grouped(group_size: u32) -> Scheme {
    Scheme { group: Span::Cols(group_size), ..INT8_GROUPED }
}

/// Returns INT4 with one scale per `group_size` columns.
pub const fn int4_grouped(group_size: u32) -> Scheme {
    Scheme { group: Span::Cols(group_size), ..INT4 }
}

/// Returns the scheme of that name.
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
        ] {
            let measured = scheme.stored_bits(3, 512) as f64 / (3.0 * 512.0);
            assert_eq!(measured, bits, "{}", scheme.name);
        }
    }
}
