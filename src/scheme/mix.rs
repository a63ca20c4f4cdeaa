//! Format names users type, and which scheme each tensor of a model gets under them.
//!
//! GGUF mixes follow llama.cpp's `llama_tensor_get_type` (src/llama-quant.cpp, commit 0c1e57098), so that a file named
//! Q4_K_M is what everyone means by it.

use super::schemes::{self, *};
use super::{Activations, Scheme};
use crate::names::{Part, Role, TensorId};

/// A row of the table of formats.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Format {
    /// What users type after `--format`.
    pub name: &'static str,
    /// Other spellings.
    pub aliases: &'static [&'static str],
    /// One line for `--help`.
    pub about: &'static str,
    /// Who can read it, the default first.
    pub dialects: &'static [&'static str],
    /// What the decoder linears get unless the mix says otherwise.
    pub base: Scheme,
    /// How tensors deviate from `base`.
    pub mix: Mix,
    /// What engines do to the inputs of the quantized linears.
    pub activations: Activations,
}

/// How the tensors of a model deviate from a format's base scheme.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mix {
    /// Decoder linears only; embeddings and head stay as they are (in GGUF: Q8_0).
    Linears,
    /// Everything 2-D, by llama.cpp's rules for the `_M` types: some `attn_v` and `ffn_down` in Q6_K.
    GgufMedium,
    /// The `_S` types: for Q4_K the first `attn_v` and `ffn_down` in Q5_K.
    GgufSmall,
    /// Everything 2-D in the base scheme but the head (llama.cpp's rule for Q8_0, Q6_K and Q4_0).
    GgufUniform,
}

const CT: &str = "compressed-tensors";
const GGUF: &str = "gguf";

const fn gguf(name: &'static str, about: &'static str, base: Scheme, mix: Mix) -> Format {
    Format { name, aliases: &[], about, dialects: &[GGUF], base, mix, activations: Activations::Full }
}

/// A compressed-tensors format of the decoder linears.
const fn linears(
    name: &'static str,
    aliases: &'static [&'static str],
    about: &'static str,
    base: Scheme,
    activations: Activations,
) -> Format {
    Format { name, aliases, about, dialects: &[CT], base, mix: Mix::Linears, activations }
}

/// All formats.
pub const FORMATS: [Format; 15] = [
    Format {
        name: "mxfp4",
        aliases: &["mxfp4a16"],
        about: "4.25 bits: E2M1 in blocks of 32 with a power-of-two scale (vLLM, transformers; --dialect gguf: llama.cpp)",
        dialects: &[CT, GGUF],
        base: MXFP4,
        mix: Mix::Linears,
        activations: Activations::Full,
    },
    linears(
        "nvfp4",
        &["nvfp4a16"],
        "4.5 bits: E2M1 in blocks of 16 with E4M3 scales (vLLM, SGLang, transformers)",
        NVFP4,
        Activations::Full,
    ),
    linears(
        "fp8",
        &["fp8-w8a16"],
        "8-bit floats (E4M3), weights only, one scale per output channel (vLLM, transformers)",
        FP8,
        Activations::Full,
    ),
    linears(
        "fp8-w8a8",
        &["fp8-dynamic", "fp8_dynamic"],
        "8-bit floats, activations too, one scale per token (vLLM, SGLang, transformers)",
        FP8,
        Activations::Fp8PerToken,
    ),
    linears(
        "int4",
        &["w4a16"],
        "4 bits, weights only, in groups of --group-size columns, 128 unless told (vLLM, SGLang, transformers)",
        INT4,
        Activations::Full,
    ),
    linears(
        "int8",
        &["w8a16"],
        "8 bits, weights only, one scale per output channel or per --group-size columns (vLLM, transformers)",
        INT8,
        Activations::Full,
    ),
    linears(
        "int8-w8a8",
        &["w8a8"],
        "8-bit weights per channel and 8-bit activations per token (vLLM, transformers)",
        INT8,
        Activations::Int8PerToken,
    ),
    linears(
        "int8-w8a8-static",
        &["w8a8-static"],
        "the same with one activation scale per linear, fixed by calibration (vLLM, transformers)",
        INT8,
        Activations::Int8PerTensor,
    ),
    Format {
        aliases: &["q4_k"],
        ..gguf("q4_k_m", "llama.cpp's Q4_K_M: 4.5 bits, sensitive tensors in Q6_K", Q4_K, Mix::GgufMedium)
    },
    gguf("q4_k_s", "llama.cpp's Q4_K_S: 4.5 bits, a few tensors in Q5_K", Q4_K, Mix::GgufSmall),
    Format {
        aliases: &["q5_k"],
        ..gguf("q5_k_m", "llama.cpp's Q5_K_M: 5.5 bits, sensitive tensors in Q6_K", Q5_K, Mix::GgufMedium)
    },
    gguf("q5_k_s", "llama.cpp's Q5_K_S: 5.5 bits", Q5_K, Mix::GgufSmall),
    gguf("q6_k", "llama.cpp's Q6_K: 6.56 bits", Q6_K, Mix::GgufUniform),
    gguf("q8_0", "llama.cpp's Q8_0: 8.5 bits", Q8_0, Mix::GgufUniform),
    gguf("q4_0", "llama.cpp's Q4_0: 4.5 bits, the simplest and fastest to decode", Q4_0, Mix::GgufUniform),
];

/// Returns the format of that name or alias, in any case.
pub fn by_name(name: &str) -> Option<Format> {
    let name = name.to_ascii_lowercase();
    FORMATS.into_iter().find(|f| f.name == name || f.aliases.contains(&name.as_str()))
}

/// What a mix needs to know of the model.
#[derive(Clone, Copy, Debug)]
pub struct ModelShape {
    /// Number of decoder layers.
    pub layers: usize,
    /// Whether the head is the embedding table.
    pub tied: bool,
}

impl Format {
    /// Returns the scheme of a weight under this format, or `None` if it is kept as it is. `pure` gives everything
    /// 2-D the base scheme. Whether the scheme fits the row length is [`fallback`]'s question.
    pub fn scheme_for(&self, id: TensorId, dialect: &str, model: ModelShape, pure: bool) -> Option<Scheme> {
        let matrix = id.role.is_linear() || matches!(id.role, Role::Embed | Role::Head);
        if !matrix || id.part == Part::Bias || (dialect == CT && !id.role.is_linear()) {
            return None;
        }
        if pure || dialect == CT {
            return Some(self.base);
        }
        let heads = matches!(id.role, Role::Embed | Role::Head);
        let layer = id.layer.map_or(0, |layer| layer as usize);
        let sensitive = matches!(id.role, Role::V | Role::Down);
        let output = id.role == Role::Head || (id.role == Role::Embed && model.tied);
        Some(match self.mix {
            Mix::Linears if heads => Q8_0,
            Mix::Linears => self.base,
            _ if output && self.base != Q8_0 => Q6_K,
            Mix::GgufMedium if sensitive && more_bits(layer, model.layers) => Q6_K,
            Mix::GgufSmall if self.base == Q4_K && id.role == Role::V && layer < 4 => Q5_K,
            Mix::GgufSmall if self.base == Q4_K && id.role == Role::Down && layer < model.layers / 8 => Q5_K,
            _ => self.base,
        })
    }
}

/// llama.cpp's `use_more_bits`: the first and last eighth of the layers and every third between.
fn more_bits(layer: usize, layers: usize) -> bool {
    layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
}

/// Returns what a scheme becomes on rows of `cols` columns: itself where they fit, else llama.cpp's substitute, else
/// `None` (kept dense).
pub fn fallback(scheme: Scheme, cols: usize) -> Option<Scheme> {
    if cols.is_multiple_of(scheme.block_cols()) {
        return Some(scheme);
    }
    let substitute = match scheme.name {
        "q4_k" => schemes::Q5_0,
        "q5_k" => schemes::Q5_1,
        "q6_k" => schemes::Q8_0,
        _ => return None,
    };
    cols.is_multiple_of(substitute.block_cols()).then_some(substitute)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lifted(format: &str, role: Role, layers: usize) -> Vec<usize> {
        let format = by_name(format).unwrap();
        let model = ModelShape { layers, tied: false };
        let scheme = |i| format.scheme_for(TensorId::in_layer(i, role), "gguf", model, false);
        (0..layers).filter(|&i| scheme(i) != Some(format.base)).collect()
    }

    #[test]
    fn q4_k_m_lifts_the_layers_llama_cpp_lifts() {
        assert_eq!(lifted("q4_k_m", Role::V, 30), [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]);
        assert_eq!(
            lifted("Q4_K_M", Role::Down, 32),
            [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
        );
        assert!(lifted("q4_k_m", Role::Gate, 32).is_empty());
        assert_eq!(lifted("q4_k_s", Role::V, 32), [0, 1, 2, 3]);
    }

    #[test]
    fn rows_that_do_not_fit_get_llama_cpps_substitute() {
        let name = |scheme, cols| fallback(scheme, cols).map(|s| s.name);
        assert_eq!(name(Q4_K, 576), Some("q5_0"));
        assert_eq!(name(Q6_K, 576), Some("q8_0"));
        assert_eq!(name(Q4_K, 1536), Some("q4_k"));
        assert_eq!(name(MXFP4, 80), None);
    }
}
