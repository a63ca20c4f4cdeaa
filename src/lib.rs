//! Quantize Hugging Face checkpoints and measure what was written.
//!
//! Every stored format is, block by block, a grid: `value = scale · element[code] + offset`. So the work splits into four
//! independent questions, each answered in one place:
//!
//! | question | module |
//! |---|---|
//! | what can a number be? | [`num`] |
//! | what does a block store? | [`scheme`] |
//! | which codes are chosen? | [`method`] |
//! | how does an ecosystem spell it? | [`dialect`] |
//!
//! The spine, in the order data flows:
//!
//! ```text
//! Checkpoint (headers only) ─ Recipe ─▶ Plan ─▶ Sink (sizes known, temporary file, header written)
//!       per tensor:  weights ─▶ fit ─▶ choose codes ─▶ pack ─▶ write
//! Sink::finish (fsync, rename) ─▶ Checkpoint::open(artifact) ─ unpack ─▶ Model ─▶ eval ─▶ Report
//! ```

pub mod artifact;
pub mod backend;
pub mod calib;
pub mod checkpoint;
pub mod cli;
pub mod cmd;
pub mod container;
pub mod convert;
pub mod dialect;
pub mod embedded;
pub mod eval;
pub mod generate;
mod guard;
pub mod hub;
pub mod linalg;
pub mod loaders;
pub mod manifest;
pub mod memory;
pub mod method;
pub mod model;
pub mod names;
pub mod num;
pub mod output;
pub mod plan;
pub mod recipe;
pub mod report;
pub mod rows;
pub mod scheme;
pub mod tensor;
