//! Measuring what was written: perplexity and divergence from a baseline.

pub mod speed;
