//! Rates of the GPU and of our kernels on it, as tables. Ignored by default: `scripts/gpu.sh` runs them, one at a time.

#![allow(clippy::unwrap_used)]

use anyhow::Result;
use quant::backend::cuda::decode::CudaDecoder;
use quant::backend::cuda::rates::{self, Rate};
use quant::backend::cuda::{Cuda, Precision, Weight};
use quant::backend::{Backend, Batch};
use quant::generate::Sampling;
use quant::model::Model;
use quant::model::block::{Layer, LayerConstants};
use quant::model::config::Config;
use quant::model::feed_forward::FeedForward;
use quant::model::gated::Gated;
use quant::model::linear::Linear;
use quant::names::{Role, TensorId};
use quant::recipe::Recipe;
use quant::recipe::formats::fallback;
use quant::recipe::rules::{self, Rule};
use quant::scheme::{Activations, Scheme};

fn show(rate: &Rate) {
    let share = rate.share.map_or(String::new(), |share| format!("{:.1} %", 100.0 * share));
    println!("| {} | {:.1} {} | {share} |", rate.what, rate.value, rate.unit);
}

fn tokens_per_second(what: String, value: f64) {
    show(&Rate { what, value, unit: "tok/s", share: None });
}

fn model(cuda: &Cuda, config: &Config, format: &str) -> Model<Cuda> {
    // bf16 is no format yet: no rules.
    let rules = Recipe::new(format, Some("gguf"), None).map(|recipe| recipe.rules(config));
    random_model(cuda, config.clone(), &rules.unwrap_or_default()).unwrap()
}

#[test]
#[ignore = "measures speed on a GPU"]
fn operations() {
    let cuda = Cuda::new(0, Precision::F16).unwrap();
    let copy = rates::copy_bandwidth(&cuda).unwrap();
    let products = rates::matrix_rate(&cuda).unwrap();
    show(&Rate { what: "device copy, read + write".into(), value: copy / 1e9, unit: "GB/s", share: None });
    show(&Rate { what: "8192³ F16 product".into(), value: products / 1e12, unit: "TFLOP/s", share: None });
    rates::dequantize(&cuda, copy).unwrap().iter().for_each(show);
    for (head_dim, tokens) in [(64, 2048), (128, 512), (128, 2048), (128, 8192), (256, 2048)] {
        show(&rates::attention(&cuda, head_dim, tokens, products).unwrap());
    }
}

#[test]
#[ignore = "measures speed on a GPU"]
fn choosing() {
    let cuda = Cuda::new(0, Precision::F16).unwrap();
    let sampled = Sampling { temperature: 0.8, top_p: 0.95, seed: 1 };
    for (name, sampling) in [("most likely", Sampling::GREEDY), ("sampled", sampled)] {
        for batch in [1, 8, 32] {
            let value = 1e6 * rates::choosing(&cuda, batch, &sampling).unwrap();
            let what = format!("{name} of 151,936 tokens, {batch} sequences");
            show(&Rate { what, value, unit: "µs", share: None });
        }
    }
}

#[test]
#[ignore = "measures speed on a GPU"]
fn prompts() {
    let cuda = Cuda::new(0, Precision::F16).unwrap();
    let config = llama_8b().unwrap();
    for format in ["bf16", "mxfp4", "q4_k_m"] {
        let model = model(&cuda, &config, format);
        for sequences in [1, 8] {
            let rate = prefill(&cuda, &model, Batch { sequences, tokens: 2048 }).unwrap();
            tokens_per_second(format!("8B shape, {format}, {sequences} x 2048 tokens, loss included"), rate);
        }
    }
}

/// Prints what generating runs at in a format.
fn generation(format: &str) {
    let cuda = Cuda::new(0, Precision::F16).unwrap();
    for (name, config) in [("8B", llama_8b().unwrap()), ("SmolLM2-135M", smol_135m().unwrap())] {
        let model = model(&cuda, &config, format);
        for (batch, prompt) in [(1, 128), (1, 2048), (8, 128), (32, 128)] {
            let found = generation_rates(&cuda, &model, batch, prompt).unwrap();
            let what = format!("{name} shape, {format}, generation, batch {batch} after {prompt} tokens");
            tokens_per_second(what, found.tokens_per_second);
        }
    }
}

macro_rules! generation {
    ($($test:ident $format:literal)*) => {$(
        #[test]
        #[ignore = "measures speed on a GPU"]
        fn $test() {
            generation($format);
        }
    )*};
}

generation! {
    generation_bf16 "bf16"
    generation_q8_0 "q8_0"
    generation_mxfp4 "mxfp4"
    generation_q4_k_m "q4_k_m"
}

/// Returns the configuration of Llama-3-8B.
fn llama_8b() -> Result<Config> {
    llama([4096, 14336, 32, 32, 8, 128, 128_256])
}

/// Returns the configuration of SmolLM2-135M, but for its head, which is not the embedding table here.
fn smol_135m() -> Result<Config> {
    llama([576, 1536, 30, 9, 3, 64, 49_152])
}

fn llama([hidden, ffn, layers, heads, kv_heads, head_dim, vocab]: [usize; 7]) -> Result<Config> {
    Config::from_json(&serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "vocab_size": vocab, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0, "tie_word_embeddings": false,
    }))
}

/// Returns a model of noise as llama.cpp would store it under these rules, else in bf16. Weights of one shape and scheme are shared
/// by all layers; one layer fits no cache, so that it is made fast and still read as a real one is.
fn random_model(cuda: &Cuda, config: Config, rules: &[Rule]) -> Result<Model<Cuda>> {
    let hidden = config.hidden_size;
    let mut made: Vec<(Option<Scheme>, Role, Weight)> = Vec::new();
    let mut weight = |id: TensorId, rows: usize, cols: usize| -> Result<Weight> {
        let scheme = rules::choose(rules, id).map(|choice| choice.scheme);
        let scheme = scheme.and_then(|scheme| fallback(scheme, cols));
        if let Some((.., weight)) = made.iter().find(|(of, role, _)| (*of, *role) == (scheme, id.role)) {
            return Ok(weight.clone());
        }
        let weight = rates::random_weight(cuda, scheme, rows, cols)?;
        made.push((scheme, id.role, weight.clone()));
        Ok(weight)
    };
    let gain = cuda.tensor(1, hidden, &vec![1.0; hidden])?;
    let mut layers = Vec::new();
    for layer in 0..config.num_hidden_layers {
        let mut linear = |role| -> Result<Linear<Cuda>> {
            let spec = config.linears_of(layer).find(|spec| spec.id.role == role).unwrap();
            let weight = weight(spec.id, spec.shape[0], spec.shape[1])?;
            Ok(Linear { weight, bias: None, rounding: Activations::Full })
        };
        layers.push(Layer {
            window: None,
            turns: true,
            attn_norm: gain.clone(),
            q: linear(Role::Q)?,
            k: linear(Role::K)?,
            v: linear(Role::V)?,
            o: linear(Role::O)?,
            qk_norm: None,
            sinks: None,
            kv_scales: [1.0; 2],
            ffn_norm: gain.clone(),
            ffn: FeedForward::Dense(Gated {
                gate: linear(Role::Gate)?,
                up: linear(Role::Up)?,
                down: linear(Role::Down)?,
            }),
        });
    }
    Ok(Model {
        constants: LayerConstants::new(&config),
        layers,
        output_norm: gain.clone(),
        embed: weight(TensorId::global(Role::Embed), config.vocab_size, hidden)?,
        untied_head: Some(weight(TensorId::global(Role::Head), config.vocab_size, hidden)?),
        config,
    })
}

/// Returns tokens per second of a full forward pass with every position scored.
fn prefill(cuda: &Cuda, model: &Model<Cuda>, batch: Batch) -> Result<f64> {
    let n = batch.sequences * batch.tokens;
    let ids: Vec<u32> = (0..n).map(|i| (i * 7919 % model.config.vocab_size) as u32).collect();
    let time = rates::seconds(cuda, 5, 1, || {
        cuda.score(&model.hidden(cuda, &ids, batch)?, model.head(), &ids).map(|_| ())
    })?;
    Ok(n as f64 / time)
}

/// What generating runs at.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Generation {
    /// Seconds from the prompt to the first token.
    first_token: f64,
    /// Tokens per second of all sequences together after that.
    tokens_per_second: f64,
}

/// Returns how fast `batch` sequences are continued by 128 tokens after prompts of `prompt` tokens.
fn generation_rates(cuda: &Cuda, model: &Model<Cuda>, batch: usize, prompt: usize) -> Result<Generation> {
    let count = 128;
    let ids: Vec<u32> = (0..batch * prompt).map(|i| (i * 7919 % model.config.vocab_size) as u32).collect();
    let mut decoder = CudaDecoder::new(cuda, model, batch, prompt + 3 * count + 8)?;
    decoder.prefill_all(&ids, &Sampling::GREEDY)?;
    let first_token = rates::seconds(cuda, 3, 1, || decoder.prefill_all(&ids, &Sampling::GREEDY))?;
    // The first step records the graph.
    decoder.generate(2)?;
    let time = rates::seconds(cuda, 1, 1, || decoder.generate(count))?;
    Ok(Generation { first_token, tokens_per_second: (batch * count) as f64 / time })
}
