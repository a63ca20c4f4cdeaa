//! What a stored number can be: element tables and scale codecs. Nothing here knows about blocks, files or models.
//!
//! - [`Element`]: the values a code stands for at unit scale, e.g. E2M1 = ±{0, ½, 1, 1½, 2, 3, 4, 6}.
//! - [`Codec`]: how a scale (or an offset) itself is stored, e.g. E8M0 = a power of two in one byte.
//!
//! Number formats: OCP Microscaling Formats v1.0 §5 (E2M1, E4M3, E8M0); IEEE 754 (F16, F32); BF16 is the upper
//! half of an F32.

mod codec;
mod element;
mod minifloat;
mod table;

pub use codec::Codec;
pub use element::Element;
pub use table::Table;
