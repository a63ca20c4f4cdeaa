//! GGUF v3 files: typed metadata, tensor descriptions, then the tensors, each padded to 32 bytes.
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

pub use read::Gguf;
pub use types::GgmlType;
pub use value::{Kind, Metadata, Value};
pub use write::GgufSink;

const MAGIC: &[u8; 4] = b"GGUF";
const VERSION: u32 = 3;
const ALIGNMENT: u64 = 32;
const MAX_DIMS: usize = 4;
/// Longest tensor name in bytes (`GGML_MAX_NAME` less its terminator).
const MAX_NAME: usize = 63;
