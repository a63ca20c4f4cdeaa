//! Measuring what was written: perplexity and divergence from a baseline.
