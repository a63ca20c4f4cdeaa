//! Rotary position embedding as configurations state it: [`json`] reads its keys, [`scaling`] computes the angles of
//! [`Rope`](crate::backend::Rope).

pub mod json;
pub mod scaling;

pub use scaling::{LongRope, RopeParameters, RopeScaling, Yarn};
