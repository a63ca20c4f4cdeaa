//! GGUF files: typed metadata, tensor descriptions, then the tensors, each padded to 32 bytes.
//!
//! ```text
//! "GGUF" | u32 3 | i64 tensors | i64 keys | (key, i32 type, value)* | (name, u32 n, i64 dims[n], i32 type, u64 offset)*
//! | padding | payload        strings: u64 length, UTF-8
//! ```
//!
//! Dimensions are stored fastest first; here, as everywhere outside, shapes are slowest first. Rules as llama.cpp's
//! loader enforces them (ggml/src/gguf.cpp, commit 0c1e57098).

mod read;
mod types;
mod value;
mod write;

use std::path::Path;

pub use read::Gguf;
pub use types::GgmlType;
pub use value::{Array, Kind, Metadata, Value};
pub use write::GgufSink;

/// Whether a path is a GGUF file by its name, for reading and writing alike.
pub fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"))
}

const MAGIC: &[u8; 4] = b"GGUF";
/// What is written.
const VERSION: u32 = 3;
/// What is read: version 2 differs only in that it could not be big-endian.
const READ_VERSIONS: [u32; 2] = [2, 3];
const ALIGNMENT: u64 = 32;
const MAX_DIMS: usize = 4;
/// Longest tensor name in bytes (`GGML_MAX_NAME` less its terminator).
const MAX_NAME: usize = 63;
