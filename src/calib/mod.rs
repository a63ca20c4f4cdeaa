//! Calibration: text → token windows → statistics of every linear's input → calibrated codes.
//!
//! - [`corpus`]: the text, as a named, hashed object, and the token windows drawn from it.

pub mod corpus;
