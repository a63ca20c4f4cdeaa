//! What an engine keeps of keys and values, which every later token reads: how it is rounded, and what it takes.
//!
//! Keys are rounded after their rotation, as vLLM and llama.cpp store them; what attention reads is the rounded value.
//!
//! | | stored | scale |
//! |---|---|---|
//! | `bf16` | bf16 | none |
//! | `fp8` | E4M3, saturating | one a layer for keys and one for values, F32; 1 unless calibrated (vLLM's `k_scale`, `v_scale`) |
//! | `int8` | -127 ..= 127 | amax / 127 of a token's head, F32 (vLLM's `int8_per_token_head`) |
//! | `int8,group=N` | -127 ..= 127 | amax / 127 of N values of a head, F16 (llama.cpp's `q8_0` has N = 32) |

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, anyhow, ensure};
use half::{bf16, f16};

use crate::num::Element;

/// How keys and values are kept between tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvCache {
    /// As the backend computes them.
    #[default]
    Exact,
    /// Rounded to bf16.
    Bf16,
    /// E4M3.
    Fp8,
    /// INT8 with a scale for `group` values, for a whole head where `None`.
    Int8 {
        /// Values that share a scale.
        group: Option<usize>,
    },
}

impl KvCache {
    /// Rounds one token's keys or values `[kv_heads · head_dim]`. `scale` is the layer's, which only FP8 has.
    pub fn round(self, row: &mut [f32], head_dim: usize, scale: f32) {
        match self {
            KvCache::Exact => {}
            KvCache::Bf16 => row.iter_mut().for_each(|x| *x = bf16::from_f32(*x).to_f32()),
            KvCache::Fp8 => row.iter_mut().for_each(|x| {
                *x = Element::E4M3.decode(Element::E4M3.encode(*x / scale)) * scale;
            }),
            KvCache::Int8 { group } => {
                row.chunks_mut(group.unwrap_or(head_dim)).for_each(|run| round_int8(run, group.is_some()));
            }
        }
    }

    /// Errors on groups that do not divide a head.
    pub fn check(self, head_dim: usize) -> Result<()> {
        if let KvCache::Int8 { group: Some(group) } = self {
            ensure!(
                group > 0 && head_dim.is_multiple_of(group),
                "`--kv-cache {self}`: groups of {group} do not divide heads of {head_dim}"
            );
        }
        Ok(())
    }

    /// Returns the bytes of one token's keys, or values, of one head, scales included.
    pub fn head_bytes(self, head_dim: usize) -> usize {
        match self {
            KvCache::Exact => 4 * head_dim,
            KvCache::Bf16 => 2 * head_dim,
            KvCache::Fp8 => head_dim,
            KvCache::Int8 { group: None } => head_dim + 4,
            KvCache::Int8 { group: Some(group) } => head_dim + 2 * (head_dim / group),
        }
    }
}

/// Rounds values that share a scale; `half` stores the scale in 16 bits, as llama.cpp does, after the codes are chosen.
fn round_int8(run: &mut [f32], half: bool) {
    let amax = run.iter().fold(0.0f32, |amax, x| amax.max(x.abs()));
    let scale = amax / 127.0;
    let stored = if half { f16::from_f32(scale).to_f32() } else { scale };
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    run.iter_mut().for_each(|x| *x = (*x * inverse).round().clamp(-127.0, 127.0) * stored);
}

impl FromStr for KvCache {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(",group=") {
            None => match text {
                "bf16" => Ok(KvCache::Bf16),
                "fp8" => Ok(KvCache::Fp8),
                "int8" => Ok(KvCache::Int8 { group: None }),
                _ => Err(anyhow!("`{text}` is no cache; use bf16, fp8, int8 or int8,group=N")),
            },
            Some(("int8", group)) => {
                let group = group.parse().map_err(|_| anyhow!("`{group}` is no number of values"))?;
                Ok(KvCache::Int8 { group: Some(group) })
            }
            Some((other, _)) => Err(anyhow!("`{other}` has no groups; use int8,group=N")),
        }
    }
}

impl fmt::Display for KvCache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            KvCache::Exact => f.write_str("exact"),
            KvCache::Bf16 => f.write_str("bf16"),
            KvCache::Fp8 => f.write_str("fp8"),
            KvCache::Int8 { group: None } => f.write_str("int8"),
            KvCache::Int8 { group: Some(group) } => write!(f, "int8,group={group}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KINDS: [KvCache; 4] =
        [KvCache::Bf16, KvCache::Fp8, KvCache::Int8 { group: None }, KvCache::Int8 { group: Some(8) }];

    fn row() -> Vec<f32> {
        (0..64).map(|i| ((i * 37 % 64) as f32 - 31.5) * 0.21).collect()
    }

    #[test]
    fn every_name_survives_a_round_trip_and_others_are_refused() {
        for kind in KINDS {
            assert_eq!(kind.to_string().parse::<KvCache>().unwrap(), kind);
        }
        for (text, word) in [("int4", "int4"), ("fp8,group=8", "no groups"), ("int8,group=x", "`x`")] {
            let message = text.parse::<KvCache>().unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }

    #[test]
    fn rounding_errs_by_half_a_step_at_most_and_twice_changes_nothing() {
        for kind in KINDS {
            let (exact, mut rounded) = (row(), row());
            kind.round(&mut rounded, 16, 1.0);
            let group = if let KvCache::Int8 { group: Some(group) } = kind { group } else { 16 };
            for (exact, rounded) in exact.chunks(group).zip(rounded.chunks(group)) {
                let amax = exact.iter().fold(0.0f32, |amax, x| amax.max(x.abs()));
                for (x, y) in exact.iter().zip(rounded) {
                    let bound = match kind {
                        // Half of the last of 8 bits, and of 4 bits.
                        KvCache::Bf16 => x.abs() / 256.0,
                        KvCache::Fp8 => (x.abs() / 16.0).max(1.0 / 1024.0),
                        // Half a step, and the F16 scale's relative error of 2^-11 on the largest code.
                        _ => amax / 254.0 + amax / 2048.0,
                    };
                    assert!((x - y).abs() <= bound * 1.0001, "{kind}: {x} {y}");
                }
            }
            let mut twice = rounded.clone();
            kind.round(&mut twice, 16, 1.0);
            let drift = twice.iter().zip(&rounded).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(drift <= 7.0 / 2048.0, "{kind}: {drift}");
        }
    }

    #[test]
    fn fp8_saturates_at_448_scales_and_int8_keeps_zeros() {
        let mut row = [500.0, -1e9, 448.0, 0.0];
        KvCache::Fp8.round(&mut row, 4, 1.0);
        assert_eq!(row, [448.0, -448.0, 448.0, 0.0]);
        let mut row = [1.0, 3.5, 0.0, -7.0];
        KvCache::Fp8.round(&mut row, 4, 7.0 / 448.0);
        assert_eq!(row[3], -7.0);
        let mut row = [0.0; 4];
        KvCache::Int8 { group: None }.round(&mut row, 4, 1.0);
        assert_eq!(row, [0.0; 4]);
    }

    #[test]
    fn a_scale_of_q8_0_is_that_of_ggml() {
        // gguf-py 0.19: dequantize(quantize(x, Q8_0), Q8_0) of 32 values i · 0.1 - 1.6.
        let mut row: Vec<f32> = (0..32).map(|i| i as f32 * 0.1 - 1.6).collect();
        KvCache::Int8 { group: Some(32) }.round(&mut row, 32, 1.0);
        let scale = f16::from_f32(1.6f32 / 127.0).to_f32();
        assert_eq!([row[0], row[1], row[16], row[31]], [-127.0 * scale, -119.0 * scale, 0.0, 119.0 * scale]);
    }
}
