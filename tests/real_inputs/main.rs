//! Inputs as people have them: what public reports on tools of this kind describe, with the values that
//! transformers 5.17, huggingface_hub 1.33 and llama.cpp 0c1e57098 give for them.

#![allow(clippy::unwrap_used)]

mod command;
mod folders;
mod model;
mod refusals;
mod tokenizers;
