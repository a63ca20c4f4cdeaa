//! The reference backend: plain f32 on the CPU.
