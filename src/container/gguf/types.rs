//! ggml tensor types.

use crate::tensor::Dtype;

/// A ggml tensor type this project reads or writes. Block sizes: ggml-common.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types)]
pub enum GgmlType {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ1_S,
    IQ1_M,
    IQ2_XXS,
    IQ2_XS,
    IQ2_S,
    IQ3_XXS,
    IQ3_S,
    IQ4_NL,
    IQ4_XS,
    TQ1_0,
    TQ2_0,
    MXFP4,
}

/// (type, id in the file, elements per block, bytes per block)
const TYPES: [(GgmlType, u32, usize, usize); 25] = {
    use GgmlType::*;
    [
        (F32, 0, 1, 4),
        (F16, 1, 1, 2),
        (BF16, 30, 1, 2),
        (Q4_0, 2, 32, 18),
        (Q4_1, 3, 32, 20),
        (Q5_0, 6, 32, 22),
        (Q5_1, 7, 32, 24),
        (Q8_0, 8, 32, 34),
        (Q2_K, 10, 256, 84),
        (Q3_K, 11, 256, 110),
        (Q4_K, 12, 256, 144),
        (Q5_K, 13, 256, 176),
        (Q6_K, 14, 256, 210),
        (IQ1_S, 19, 256, 50),
        (IQ1_M, 29, 256, 56),
        (IQ2_XXS, 16, 256, 66),
        (IQ2_XS, 17, 256, 74),
        (IQ2_S, 22, 256, 82),
        (IQ3_XXS, 18, 256, 98),
        (IQ3_S, 21, 256, 110),
        (IQ4_NL, 20, 32, 18),
        (IQ4_XS, 23, 256, 136),
        (TQ1_0, 34, 256, 54),
        (TQ2_0, 35, 256, 66),
        (MXFP4, 39, 32, 17),
    ]
};

/// Names of types that exist but are not read here, for messages (ggml.h).
const OTHERS: [(u32, &str); 10] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (24, "I8"),
    (25, "I16"),
    (26, "I32"),
    (27, "I64"),
    (28, "F64"),
    (40, "NVFP4"),
    (41, "Q1_0"),
    (42, "Q2_0"),
];

impl GgmlType {
    /// Returns what a message calls a type that [`GgmlType::from_id`] does not know.
    pub(super) fn unknown_name(id: u32) -> String {
        match OTHERS.iter().find(|row| row.0 == id) {
            Some((_, name)) => format!("`{name}`"),
            None => format!("number {id}"),
        }
    }

    /// Returns the plain number type, if it is one.
    pub fn dtype(self) -> Option<Dtype> {
        match self {
            GgmlType::F32 => Some(Dtype::F32),
            GgmlType::F16 => Some(Dtype::F16),
            GgmlType::BF16 => Some(Dtype::BF16),
            _ => None,
        }
    }

    /// Returns the type of plain numbers, if ggml has it for weights.
    pub fn from_dtype(dtype: Dtype) -> Option<Self> {
        [GgmlType::F32, GgmlType::F16, GgmlType::BF16].into_iter().find(|kind| kind.dtype() == Some(dtype))
    }

    /// Returns the type with that id in a file.
    pub fn from_id(id: u32) -> Option<Self> {
        TYPES.iter().find(|row| row.1 == id).map(|row| row.0)
    }

    /// Returns the id in a file.
    pub fn id(self) -> u32 {
        TYPES[self as usize].1
    }

    /// Returns how many elements a block has.
    pub fn block_elems(self) -> usize {
        TYPES[self as usize].2
    }

    /// Returns how many bytes a block has.
    pub fn block_bytes(self) -> usize {
        TYPES[self as usize].3
    }
}
