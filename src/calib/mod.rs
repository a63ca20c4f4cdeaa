//! Calibration: text → token windows → statistics of every linear's input → calibrated codes.
//!
//! - [`corpus`]: the text, as a named, hashed object, and the token windows drawn from it.
//! - [`settings`]: strengths, damping, sweeps, and which linear gets what.
//! - [`driver`]: layer by layer, both models side by side.

pub mod corpus;
pub mod driver;
pub mod settings;
