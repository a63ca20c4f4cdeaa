//! Config → one forward pass. Flags, never model names.

pub mod config;
pub mod tokenizer;
