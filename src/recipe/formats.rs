//! Format names users type, and which scheme each tensor of a model gets under them.
//!
//! GGUF mixes follow llama.cpp's `llama_tensor_get_type` (src/llama-quant.cpp, commit 0c1e57098), so that a file named
//! Q4_K_M is what everyone means by it.

use super::rules::{Rule, Select};
use crate::model::config::Config;
use crate::names::Role;
use crate::scheme::schemes::*;
use crate::scheme::{Activations, Choice, Scheme};
use crate::tensor::Dtype;

/// What the tensors of a model become, given what most of them do.
pub type Mix = fn(Choice, &Config) -> Vec<Rule>;

/// A row of the table of formats.
#[derive(Clone, Copy, Debug)]
pub struct Format {
    /// What users type after `--format`.
    pub name: &'static str,
    /// Other spellings.
    pub aliases: &'static [&'static str],
    /// One line for `--help`.
    pub about: &'static str,
    /// Who can read it, the default first, and the mix that each gets.
    pub dialects: &'static [(&'static str, Mix)],
    /// What the linears of layers become unless the mix says otherwise.
    pub base: Base,
    /// The scheme with a scale for that many columns, where `--group-size` may ask for one.
    pub grouped: Option<fn(u32) -> Scheme>,
}

/// What a format makes of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Base {
    /// Most linears are quantized so.
    Quantized(Choice),
    /// All tensors are plain floats of that type.
    Dense(Dtype),
}

impl Base {
    /// Returns what most linears become; `None` if nothing is quantized.
    pub fn choice(self) -> Option<Choice> {
        match self {
            Base::Quantized(choice) => Some(choice),
            Base::Dense(_) => None,
        }
    }

    /// Returns the number type of all tensors; `None` if that is the source's business.
    pub fn dtype(self) -> Option<Dtype> {
        match self {
            Base::Quantized(_) => None,
            Base::Dense(dtype) => Some(dtype),
        }
    }
}

const DENSE: &str = "dense";
const CT: &str = "compressed-tensors";
const GGUF: &str = "gguf";

/// A format of llama.cpp.
const fn gguf(
    name: &'static str,
    about: &'static str,
    base: Scheme,
    dialects: &'static [(&'static str, Mix)],
) -> Format {
    Format {
        name,
        aliases: &[],
        about,
        dialects,
        base: Base::Quantized(Choice::weights(base)),
        grouped: None,
    }
}

/// A compressed-tensors format of the linears of layers.
const fn linears(
    name: &'static str,
    aliases: &'static [&'static str],
    about: &'static str,
    scheme: Scheme,
    inputs: Activations,
) -> Format {
    Format {
        name,
        aliases,
        about,
        dialects: &[(CT, decoder)],
        base: Base::Quantized(Choice { scheme, inputs }),
        grouped: None,
    }
}

/// Plain floats.
const fn floats(name: &'static str, about: &'static str, dtype: Dtype) -> Format {
    Format {
        name,
        aliases: &[],
        about,
        dialects: &[(DENSE, nothing), (GGUF, nothing)],
        base: Base::Dense(dtype),
        grouped: None,
    }
}

/// All formats.
pub const FORMATS: [Format; 24] = [
    Format {
        name: "mxfp4",
        aliases: &["mxfp4a16"],
        about: "4.25 bits: E2M1 in blocks of 32 with a power-of-two scale (vLLM, transformers; --dialect gguf: llama.cpp)",
        dialects: &[(CT, decoder), (GGUF, decoder_and_q8_0)],
        base: Base::Quantized(Choice::weights(MXFP4)),
        grouped: None,
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
    Format {
        grouped: Some(int4_grouped),
        ..linears(
            "int4",
            &["w4a16"],
            "4 bits, weights only, in groups of --group-size columns, 128 by default (vLLM, SGLang, transformers)",
            INT4,
            Activations::Full,
        )
    },
    Format {
        grouped: Some(int8_grouped),
        ..linears(
            "int8",
            &["w8a16"],
            "8 bits, weights only, one scale per output channel or per --group-size columns (vLLM, transformers)",
            INT8,
            Activations::Full,
        )
    },
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
        Activations::Int8PerTensor(()),
    ),
    Format {
        aliases: &["q4_k"],
        ..gguf("q4_k_m", "llama.cpp's Q4_K_M: 4.5 bits, sensitive tensors in Q6_K", Q4_K, &[(GGUF, medium)])
    },
    gguf("q4_k_s", "llama.cpp's Q4_K_S: 4.5 bits, a few tensors in Q5_K", Q4_K, &[(GGUF, small)]),
    Format {
        aliases: &["q5_k"],
        ..gguf("q5_k_m", "llama.cpp's Q5_K_M: 5.5 bits, sensitive tensors in Q6_K", Q5_K, &[(GGUF, medium)])
    },
    gguf("q5_k_s", "llama.cpp's Q5_K_S: 5.5 bits", Q5_K, &[(GGUF, uniform)]),
    gguf("q6_k", "llama.cpp's Q6_K: 6.56 bits", Q6_K, &[(GGUF, uniform)]),
    gguf("q8_0", "llama.cpp's Q8_0: 8.5 bits", Q8_0, &[(GGUF, everything)]),
    gguf("q4_0", "llama.cpp's Q4_0: 4.5 bits, the simplest and fastest to decode", Q4_0, &[(GGUF, uniform)]),
    gguf(
        "iq4_nl",
        "llama.cpp's IQ4_NL: 4.5 bits, 16 uneven values in blocks of 32",
        IQ4_NL,
        &[(GGUF, uneven)],
    ),
    gguf(
        "iq4_xs",
        "llama.cpp's IQ4_XS: 4.25 bits, the same values in super-blocks",
        IQ4_XS,
        &[(GGUF, uneven)],
    ),
    gguf(
        "q3_k_l",
        "llama.cpp's Q3_K_L: 3.4 bits, sensitive tensors in Q5_K",
        Q3_K,
        &[(GGUF, three_bits_large)],
    ),
    Format {
        aliases: &["q3_k"],
        ..gguf(
            "q3_k_m",
            "llama.cpp's Q3_K_M: 3.4 bits, sensitive tensors in Q4_K",
            Q3_K,
            &[(GGUF, three_bits_medium)],
        )
    },
    gguf("q3_k_s", "llama.cpp's Q3_K_S: 3.4 bits", Q3_K, &[(GGUF, uniform)]),
    gguf("q2_k", "llama.cpp's Q2_K: 2.6 bits, sensitive tensors in Q3_K", Q2_K, &[(GGUF, two_bits)]),
    floats(
        "bf16",
        "an ordinary checkpoint in BF16, whatever the source was (--dialect gguf: llama.cpp)",
        Dtype::BF16,
    ),
    floats("f16", "an ordinary checkpoint in F16 (--dialect gguf: llama.cpp)", Dtype::F16),
    floats(
        "f32",
        "an ordinary checkpoint in F32, which holds every value (--dialect gguf: llama.cpp)",
        Dtype::F32,
    ),
];

/// Returns the format of that name or alias, in any case.
pub fn by_name(name: &str) -> Option<Format> {
    let name = name.to_ascii_lowercase();
    FORMATS.into_iter().find(|f| f.name == name || f.aliases.contains(&name.as_str()))
}

/// No tensor is quantized.
fn nothing(_: Choice, _: &Config) -> Vec<Rule> {
    Vec::new()
}

/// The linears of layers only: embeddings and head stay as they are.
fn decoder(base: Choice, _: &Config) -> Vec<Rule> {
    vec![Rule::new(Select::Linears, base)]
}

/// The linears of layers; embeddings and head in Q8_0.
fn decoder_and_q8_0(base: Choice, config: &Config) -> Vec<Rule> {
    let tables = Rule::new(Select::Roles(vec![Role::Embed, Role::Head]), Choice::weights(Q8_0));
    [decoder(base, config), vec![tables]].concat()
}

/// Every matrix.
fn everything(base: Choice, _: &Config) -> Vec<Rule> {
    vec![Rule::new(Select::Matrices, base)]
}

/// Every matrix but the head, which is kept better.
fn uniform(base: Choice, config: &Config) -> Vec<Rule> {
    let head = if config.tie_word_embeddings { vec![Role::Head, Role::Embed] } else { vec![Role::Head] };
    let head = Rule::new(Select::Roles(head), Choice::weights(Q6_K));
    [everything(base, config), vec![head]].concat()
}

/// llama.cpp's `_M` types: v and down of some layers in Q6_K too.
fn medium(base: Choice, config: &Config) -> Vec<Rule> {
    let layers = config.num_hidden_layers;
    let lifted = (0..layers).filter(|&layer| more_bits(layer, layers)).collect();
    let sensitive = Select::InLayers(vec![Role::V, Role::Down], lifted);
    [uniform(base, config), vec![Rule::new(sensitive, Choice::weights(Q6_K))]].concat()
}

/// llama.cpp's Q4_K_S: the first v and down in Q5_K.
fn small(base: Choice, config: &Config) -> Vec<Rule> {
    let first =
        |role, count| Rule::new(Select::InLayers(vec![role], (0..count).collect()), Choice::weights(Q5_K));
    let first = vec![first(Role::V, 4), first(Role::Down, config.num_hidden_layers / 8)];
    [uniform(base, config), first].concat()
}

/// Where errors hurt the most: v, o and down.
fn sensitive(scheme: Scheme) -> Rule {
    Rule::new(Select::Roles(vec![Role::V, Role::O, Role::Down]), Choice::weights(scheme))
}

/// v of models where four heads of queries and more share it: it is small, and an error in it is in all of them.
fn shared_v(scheme: Scheme, config: &Config) -> Option<Rule> {
    let shared = config.num_attention_heads >= 4 * config.num_key_value_heads;
    shared.then(|| Rule::new(Select::Roles(vec![Role::V]), Choice::weights(scheme)))
}

/// llama.cpp's Q3_K_M: v, o and down in Q4_K, the first v and down in Q5_K.
fn three_bits_medium(base: Choice, config: &Config) -> Vec<Rule> {
    let first =
        |role, count| Rule::new(Select::InLayers(vec![role], (0..count).collect()), Choice::weights(Q5_K));
    let first = vec![first(Role::V, 2), first(Role::Down, config.num_hidden_layers / 16)];
    [uniform(base, config), vec![sensitive(Q4_K)], first].concat()
}

/// llama.cpp's Q3_K_L: v, o and down in Q5_K.
fn three_bits_large(base: Choice, config: &Config) -> Vec<Rule> {
    [uniform(base, config), vec![sensitive(Q5_K)]].concat()
}

/// llama.cpp's Q2_K: v, o and down in Q3_K, a shared v in Q4_K.
fn two_bits(base: Choice, config: &Config) -> Vec<Rule> {
    uniform(base, config).into_iter().chain([sensitive(Q3_K)]).chain(shared_v(Q4_K, config)).collect()
}

/// llama.cpp's IQ4_NL and IQ4_XS as with an importance matrix (without one, it keeps the first down in Q5_K): a shared v in
/// Q5_K.
fn uneven(base: Choice, config: &Config) -> Vec<Rule> {
    uniform(base, config).into_iter().chain(shared_v(Q5_K, config)).collect()
}

/// llama.cpp's `use_more_bits`: the first and last eighth of the layers and every third between.
fn more_bits(layer: usize, layers: usize) -> bool {
    layer < layers / 8 || layer >= 7 * layers / 8 || (layer - layers / 8) % 3 == 2
}

/// llama.cpp's substitutes for schemes whose block does not divide a row.
const SUBSTITUTES: [(Scheme, Scheme); 6] =
    [(Q2_K, Q4_0), (Q3_K, Q4_0), (Q4_K, Q5_0), (Q5_K, Q5_1), (Q6_K, Q8_0), (IQ4_XS, IQ4_NL)];

/// Returns what a scheme becomes on rows of `cols` columns: itself where they fit, else llama.cpp's substitute, else
/// `None` (kept dense).
pub fn fallback(scheme: Scheme, cols: usize) -> Option<Scheme> {
    let substitute = SUBSTITUTES.iter().find(|(of, _)| *of == scheme).map(|(_, substitute)| *substitute);
    [Some(scheme), substitute].into_iter().flatten().find(|scheme| cols.is_multiple_of(scheme.block_cols()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::TensorId;
    use crate::recipe::rules::choose;

    fn config(layers: usize, kv_heads: usize) -> Config {
        Config::from_json(&serde_json::json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": kv_heads, "vocab_size": 64,
            "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        }))
        .unwrap()
    }

    fn lifted(format: &str, role: Role, layers: usize) -> Vec<usize> {
        let format = by_name(format).unwrap();
        let base = format.base.choice();
        let rules = (format.dialects[0].1)(base.unwrap(), &config(layers, 4));
        let choice = |i| choose(&rules, TensorId::in_layer(i, role));
        (0..layers).filter(|&i| choice(i) != base).collect()
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
    fn low_bits_are_mixed_as_llama_cpp_does() {
        for (format, role, layer, kv_heads, wanted) in [
            ("q3_k_m", Role::V, 1, 1, "q5_k"),
            ("q3_k_m", Role::V, 2, 1, "q4_k"),
            ("q3_k_m", Role::Down, 1, 1, "q5_k"),
            ("q3_k_m", Role::Down, 2, 1, "q4_k"),
            ("q3_k_m", Role::O, 0, 1, "q4_k"),
            ("q3_k_m", Role::Gate, 0, 1, "q3_k"),
            ("q3_k_l", Role::O, 9, 1, "q5_k"),
            ("q3_k_s", Role::V, 0, 1, "q3_k"),
            ("q2_k", Role::V, 9, 1, "q4_k"),
            ("q2_k", Role::V, 9, 2, "q3_k"),
            ("q2_k", Role::Down, 9, 2, "q3_k"),
            ("q2_k", Role::Q, 9, 2, "q2_k"),
            ("iq4_xs", Role::V, 9, 1, "q5_k"),
            ("iq4_xs", Role::V, 9, 2, "iq4_xs"),
            ("iq4_nl", Role::Down, 0, 1, "iq4_nl"),
        ] {
            let format = by_name(format).unwrap();
            let rules = (format.dialects[0].1)(format.base.choice().unwrap(), &config(32, kv_heads));
            let chosen = choose(&rules, TensorId::in_layer(layer, role)).map(|choice| choice.scheme.name);
            assert_eq!(chosen, Some(wanted), "{} {role:?} {layer} {kv_heads}", format.name);
        }
    }

    #[test]
    fn rows_that_do_not_fit_get_llama_cpps_substitute() {
        let name = |scheme, cols| fallback(scheme, cols).map(|s| s.name);
        assert_eq!(name(Q4_K, 576), Some("q5_0"));
        assert_eq!(name(Q6_K, 576), Some("q8_0"));
        assert_eq!(name(Q4_K, 1536), Some("q4_k"));
        assert_eq!([name(Q2_K, 576), name(Q3_K, 576)], [Some("q4_0"); 2]);
        assert_eq!(name(IQ4_XS, 576), Some("iq4_nl"));
        assert_eq!(name(MXFP4, 80), None);
    }
}
