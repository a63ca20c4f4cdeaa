//! Safetensors: an 8-byte header length, a JSON header, then the tensors without gaps.
//!
//! ```text
//! u64 n | n bytes of {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}, …} | payload
//! ```
//!
//! Offsets count from the payload's start. Format: the README of the safetensors crate, which also defines the number
//! types and has the last word on every header read here.

mod read;
mod write;

pub use read::Safetensors;
pub use write::{SHARD_BYTES, SafetensorsSink};

use std::path::Path;

use safetensors::Dtype as FileDtype;

use crate::tensor::Dtype;

/// Whether a path is a safetensors file by its name.
pub fn is_safetensors(path: &Path) -> bool {
    path.extension().is_some_and(|end| end.eq_ignore_ascii_case("safetensors"))
}

/// Number types in this project and in the file.
const DTYPES: [(Dtype, FileDtype); 8] = [
    (Dtype::F32, FileDtype::F32),
    (Dtype::F16, FileDtype::F16),
    (Dtype::BF16, FileDtype::BF16),
    (Dtype::F8E4M3, FileDtype::F8_E4M3),
    (Dtype::I64, FileDtype::I64),
    (Dtype::I32, FileDtype::I32),
    (Dtype::I8, FileDtype::I8),
    (Dtype::U8, FileDtype::U8),
];
