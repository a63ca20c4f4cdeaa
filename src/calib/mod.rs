//! Calibration: text → token windows → statistics of every linear's input → calibrated codes.
//!
//! - [`corpus`]: the text, as a named, hashed object, and the token windows drawn from it.
//! - [`mod@choose`]: which settings suit a model, by the divergence on windows kept out.
//! - [`importance`], [`imatrix`]: mean squared inputs, in memory and as llama.cpp stores them.
//! - [`settings`]: strengths, damping, sweeps, and which linear gets what.
//! - [`smoothing`]: exact rewrites that make inputs or weights easier to round.
//! - [`token_energies`]: which tokens matter.
//! - [`tune`]: gains of norms, when all codes are chosen.
//! - [`driver`]: layer by layer, both models side by side; [`memory`]: what that takes, and what of it lies where.

pub mod choose;
pub mod corpus;
pub mod driver;
pub mod imatrix;
pub mod importance;
mod inputs;
pub mod kv_cache;
pub mod memory;
pub mod settings;
pub mod smoothing;
mod sums;
pub mod token_energies;
pub mod tune;

/// Tokens that pass through a layer together.
const CHUNK_TOKENS: usize = 4096;
