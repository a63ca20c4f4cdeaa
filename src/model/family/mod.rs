//! The decoder families: one file and one row of [`FAMILIES`] each.
//!
//! All that a family's name decides stands here: what its files call things, and what its configuration class means by its
//! keys. The forward pass sees only what [`Config`] says.

mod ernie4_5;
mod glm4_moe;
mod json;
mod llama;
mod minimax_m2;
mod mistral;
mod mixtral;
mod phi3;
mod qwen2;
mod qwen2_moe;
mod qwen3;
mod qwen3_moe;
mod seed_oss;
mod smollm3;

pub use super::architecture::{Architecture, GgufMixture};
pub use super::config::{Config, Family, Fused, Name};
use crate::names::{Role, TensorId};
use crate::rows::{Place, RowMap};

/// Where a fused tensor keeps the rows of one of its matrices.
pub struct Share {
    /// The fused tensor.
    pub fused: &'static Fused,
    /// The matrix's first row in it.
    pub first: usize,
    /// All its rows.
    pub rows: usize,
}

/// All families. Of those that share a GGUF architecture, the first is what such files are read as; the first with experts, if
/// the files have some.
pub const FAMILIES: [&Family; 13] = [
    &llama::LLAMA,
    &mistral::MISTRAL,
    &mixtral::MIXTRAL,
    &phi3::PHI3,
    &qwen2::QWEN2,
    &qwen3::QWEN3,
    &qwen2_moe::QWEN2_MOE,
    &qwen3_moe::QWEN3_MOE,
    &seed_oss::SEED_OSS,
    &smollm3::SMOLLM3,
    &ernie4_5::ERNIE4_5,
    &glm4_moe::GLM4_MOE,
    &minimax_m2::MINIMAX_M2,
];

impl Family {
    /// Returns the family that GGUF files of an architecture are read as, whose layers have experts or have none; `None` if no
    /// family here has that name.
    pub fn of_gguf(architecture: &str, experts: bool) -> Option<&'static Family> {
        let named = || FAMILIES.into_iter().filter(|family| family.gguf.name == architecture);
        named().find(|family| family.gguf.mixture.is_some() == experts).or_else(|| named().next())
    }
}

impl Share {
    /// Returns the place in the fused tensor, which is stored under that name.
    pub fn place(&self, name: String) -> Place {
        Place { name, axes: vec![self.rows], rows: RowMap::slice(self.first) }
    }
}

impl Config {
    /// Returns where a tensor's rows lie that is stored together with others; `None` if it is stored on its own.
    pub fn share(&self, id: TensorId) -> Option<Share> {
        let fused = self.family.fused.iter().find(|fused| fused.roles.contains(&id.role))?;
        let linears: Vec<_> = self.linears_of(usize::from(id.layer?)).collect();
        let rows = |&role: &Role| {
            let linear =
                linears.iter().find(|linear| linear.id.role == role && linear.id.expert == id.expert);
            linear.map_or(0, |linear| linear.shape[0])
        };
        let before = fused.roles.iter().take_while(|&&role| role != id.role);
        Some(Share { fused, first: before.map(rows).sum(), rows: fused.roles.iter().map(rows).sum() })
    }
}
