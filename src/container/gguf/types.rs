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
    Q4_K,
    Q5_K,
    Q6_K,
    MXFP4,
}

/// (type, id in the file, elements per block, bytes per block)
const TYPES: [(GgmlType, u32, usize, usize); 12] = {
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
        (Q4_K, 12, 256, 144),
        (Q5_K, 13, 256, 176),
        (Q6_K, 14, 256, 210),
        (MXFP4, 39, 32, 17),
    ]
};

/// Names of types that exist but are not read here, for messages (ggml.h).
const OTHERS: [(u32, &str); 18] = [
    (9, "Q8_1"),
    (10, "Q2_K"),
    (11, "Q3_K"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (20, "IQ4_NL"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (23, "IQ4_XS"),
    (24, "I8"),
    (26, "I32"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (40, "NVFP4"),
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
