//! Rates of one GPU: what it can do at best (copying, multiplying), and what our kernels reach of that.
//!
//! Each rate is the median of several runs after a warm-up, on random values larger than the cache; a run is timed from
//! an idle device to an idle device and is long enough for the launch to vanish in it.

use std::time::Instant;

use anyhow::Result;

use crate::backend::cpu::Cpu;
use crate::backend::cuda::choose::Chooser;
use crate::backend::cuda::decode::CudaDecoder;
use crate::backend::cuda::{Cuda, Float, Tensor, Weight};
use crate::backend::footprint::Footprint;
use crate::backend::{AttentionShape, Backend, Batch, SecondMoments};
use crate::generate::{Generate, Sampling};
use crate::model::Model;
use crate::model::block::{Layer, LayerConstants, Linear};
use crate::model::config::Config;
use crate::names::{Role, TensorId};
use crate::scheme::mix::{Format, ModelShape, fallback};
use crate::scheme::{QTensor, Rounding, Scheme, schemes};
use crate::tensor::{Dense, Dtype, Matrix};

/// What a machine can do at best, by its own measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Copying, bytes read plus bytes written per second.
    pub copy: f64,
    /// Matrix products, FLOP/s.
    pub products: f64,
}

/// A backend with all that commands ask of one.
pub trait Machine: Generate + SecondMoments + Footprint {
    /// Measures what the machine can do at best; `None` where that is not measured.
    fn ceilings(&self) -> Result<Option<Ceilings>> {
        Ok(None)
    }

    /// Returns what decides the last bit of its results.
    fn arithmetic(&self) -> String {
        self.describe()
    }

    /// Returns the bytes of its own memory that are free; `None` for a device that has no memory of its own.
    fn free_memory(&self) -> Result<Option<u64>> {
        Ok(None)
    }
}

impl Machine for Cpu {
    /// The same on every machine and for every number of threads.
    fn arithmetic(&self) -> String {
        "cpu".to_string()
    }
}

impl Machine for Cuda {
    fn ceilings(&self) -> Result<Option<Ceilings>> {
        let found = Ceilings { copy: copy_bandwidth(self)?, products: matrix_rate(self)? };
        self.device().give_back_memory()?;
        Ok(Some(found))
    }

    fn free_memory(&self) -> Result<Option<u64>> {
        self.device().synchronize()?;
        Ok(Some(self.device().memory()?.0 as u64))
    }
}

/// A measured rate.
#[derive(Clone, Debug, PartialEq)]
pub struct Rate {
    /// What ran.
    pub what: String,
    /// How fast.
    pub value: f64,
    /// `GB/s`, `TFLOP/s`, `tok/s` or `µs`.
    pub unit: &'static str,
    /// Share of the machine's own copy bandwidth or matrix rate.
    pub share: Option<f64>,
}

/// Returns the median seconds of one of `repeats` runs of `work`, each run `inner` times in a row.
pub fn seconds(
    cuda: &Cuda,
    repeats: usize,
    inner: usize,
    mut work: impl FnMut() -> Result<()>,
) -> Result<f64> {
    work()?;
    let mut times = Vec::with_capacity(repeats);
    for _ in 0..repeats {
        cuda.device().synchronize()?;
        let start = Instant::now();
        for _ in 0..inner {
            work()?;
        }
        cuda.device().synchronize()?;
        times.push(start.elapsed().as_secs_f64() / inner as f64);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[repeats / 2])
}

/// Returns cheap pseudo-random numbers in -0.5 ..= 0.5.
fn noise(count: usize) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1u32 << 24) as f32 - 0.5
    };
    (0..count).map(|_| next()).collect()
}

fn random_activations(cuda: &Cuda, rows: usize, cols: usize) -> Result<Tensor> {
    cuda.tensor(rows, cols, &noise(rows * cols))
}

/// Returns a matrix of noise: bf16, or of a scheme with all codes used.
pub fn random_weight(cuda: &Cuda, scheme: Option<Scheme>, rows: usize, cols: usize) -> Result<Weight> {
    let Some(scheme) = scheme else {
        let dense = Dense::from_f32(vec![rows, cols], &noise(rows * cols)).cast(Dtype::BF16);
        return cuda.upload(Matrix::Dense(dense));
    };
    let mut q = QTensor::zeroed(scheme, rows, cols);
    for (code, value) in q.codes.iter_mut().zip(noise(rows * cols)) {
        *code = ((value + 0.5) * (1u32 << scheme.element.bits()) as f32) as u8;
    }
    // Effective scales of 2^-9 either way; every codec holds these values.
    let (inner, outer) = if scheme.outer.is_some() { (1.0, 1.0 / 512.0) } else { (1.0 / 512.0, 0.0) };
    q.scales.fill(inner);
    q.outer_scales.fill(outer);
    q.offsets.fill(inner);
    q.outer_offsets.fill(outer);
    cuda.upload(Matrix::Quantized(q))
}

/// Returns the copy bandwidth, bytes read plus bytes written per second.
pub fn copy_bandwidth(cuda: &Cuda) -> Result<f64> {
    let bytes = 1usize << 30;
    let buffer = cuda.device().upload(&vec![1u8; bytes])?;
    let time = seconds(cuda, 9, 4, || cuda.device().duplicate(&buffer).map(|_| ()))?;
    Ok(2.0 * bytes as f64 / time)
}

/// Returns the rate of an 8192³ F16 product, FLOP/s.
pub fn matrix_rate(cuda: &Cuda) -> Result<f64> {
    let n = 8192;
    let weight = random_weight(cuda, None, n, n)?;
    let x = cuda.embed(&weight, &(0..n as u32).collect::<Vec<_>>())?;
    let x = cuda.linear(&x, &weight, None, Rounding::None)?;
    let time = seconds(cuda, 9, 4, || cuda.linear(&x, &weight, None, Rounding::None).map(|_| ()))?;
    Ok(2.0 * (n as f64).powi(3) / time)
}

/// Returns the rates of decoding every scheme to F16, bytes read and written, and their shares of `copy`.
pub fn dequantize(cuda: &Cuda, copy: f64) -> Result<Vec<Rate>> {
    let (rows, cols) = (32768, 8192);
    let mut rates = Vec::new();
    for scheme in schemes::ALL {
        let weight = random_weight(cuda, Some(scheme), rows, cols)?;
        let bytes = weight.bytes() + rows * cols * 2;
        let time = seconds(cuda, 9, 4, || cuda.dequantize(&weight, Float::F16).map(|_| ()))?;
        let value = bytes as f64 / time;
        let what = format!("dequantize {} to F16", scheme.name);
        rates.push(Rate { what, value: value / 1e9, unit: "GB/s", share: Some(value / copy) });
    }
    Ok(rates)
}

/// Returns the rate of causal attention for 32 query and 8 key heads, counting only the products a causal mask keeps.
pub fn attention(cuda: &Cuda, head_dim: usize, tokens: usize, matrix_rate: f64) -> Result<Rate> {
    let (heads, kv_heads, sequences) = (32, 8, 16384 / tokens);
    let batch = Batch { sequences, tokens };
    let scale = (head_dim as f32).powf(-0.5);
    let shape = AttentionShape { heads, kv_heads, head_dim, window: None, scale };
    let [q, k, v] = [heads, kv_heads, kv_heads]
        .map(|count| random_activations(cuda, sequences * tokens, count * head_dim));
    // Products read F16; convert outside the timed part.
    let [q, k, v] = [q?, k?, v?].map(|x| cuda.rounded(&x));
    let (q, k, v) = (q?, k?, v?);
    let time = seconds(cuda, 9, 4, || cuda.attention(&q, &k, &v, None, &shape, batch).map(|_| ()))?;
    let pairs = sequences * heads * tokens * (tokens + 1) / 2;
    let value = 4.0 * (pairs * head_dim) as f64 / time;
    let what = format!("attention, heads of {head_dim}, {sequences} x {tokens} tokens");
    Ok(Rate { what, value: value / 1e12, unit: "TFLOP/s", share: Some(value / matrix_rate) })
}

/// Returns the configuration of Llama-3-8B.
pub fn llama_8b() -> Result<Config> {
    llama([4096, 14336, 32, 32, 8, 128, 128_256])
}

/// Returns the configuration of SmolLM2-135M, but for its head, which is not the embedding table here.
pub fn smol_135m() -> Result<Config> {
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

/// Returns a model of noise as llama.cpp would store it in a format, or in bf16. Weights of one shape and scheme are shared
/// by all layers; one layer fits no cache, so that it is made fast and still read as a real one is.
pub fn random_model(cuda: &Cuda, config: Config, format: Option<&Format>) -> Result<Model<Cuda>> {
    let (hidden, ffn) = (config.hidden_size, config.intermediate_size);
    let (q_width, kv_width) =
        (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
    let shape = ModelShape { layers: config.num_hidden_layers, tied: false };
    let mut made: Vec<(Option<Scheme>, Role, Weight)> = Vec::new();
    let mut weight = |id: TensorId, rows: usize, cols: usize| -> Result<Weight> {
        let scheme = format.and_then(|format| format.scheme_for(id, "gguf", shape, false));
        let scheme = scheme.and_then(|scheme| fallback(scheme, cols));
        if let Some((.., weight)) = made.iter().find(|(of, role, _)| (*of, *role) == (scheme, id.role)) {
            return Ok(weight.clone());
        }
        let weight = random_weight(cuda, scheme, rows, cols)?;
        made.push((scheme, id.role, weight.clone()));
        Ok(weight)
    };
    let gain = cuda.tensor(1, hidden, &vec![1.0; hidden])?;
    let mut layers = Vec::new();
    for layer in 0..config.num_hidden_layers {
        let mut linear = |role, rows, cols| -> Result<Linear<Cuda>> {
            let weight = weight(TensorId::in_layer(layer, role), rows, cols)?;
            Ok(Linear { weight, bias: None, rounding: Rounding::None })
        };
        layers.push(Layer {
            attn_norm: gain.clone(),
            q: linear(Role::Q, q_width, hidden)?,
            k: linear(Role::K, kv_width, hidden)?,
            v: linear(Role::V, kv_width, hidden)?,
            o: linear(Role::O, hidden, q_width)?,
            qk_norm: None,
            sinks: None,
            kv_scales: [1.0; 2],
            ffn_norm: gain.clone(),
            gate: linear(Role::Gate, ffn, hidden)?,
            up: linear(Role::Up, ffn, hidden)?,
            down: linear(Role::Down, hidden, ffn)?,
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
pub fn prefill(cuda: &Cuda, model: &Model<Cuda>, batch: Batch) -> Result<f64> {
    let n = batch.sequences * batch.tokens;
    let ids: Vec<u32> = (0..n).map(|i| (i * 7919 % model.config.vocab_size) as u32).collect();
    let time = seconds(cuda, 5, 1, || {
        cuda.score(&model.hidden(cuda, &ids, batch)?, model.head(), &ids).map(|_| ())
    })?;
    Ok(n as f64 / time)
}

/// What generating runs at.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Generation {
    /// Seconds from the prompt to the first token.
    pub first_token: f64,
    /// Tokens per second of all sequences together after that.
    pub tokens_per_second: f64,
}

/// Returns how fast `batch` sequences are continued by 128 tokens after prompts of `prompt` tokens.
pub fn generation(cuda: &Cuda, model: &Model<Cuda>, batch: usize, prompt: usize) -> Result<Generation> {
    let count = 128;
    let ids: Vec<u32> = (0..batch * prompt).map(|i| (i * 7919 % model.config.vocab_size) as u32).collect();
    let mut decoder = CudaDecoder::new(cuda, model, batch, prompt + 3 * count + 8)?;
    decoder.prefill_all(&ids, &Sampling::GREEDY)?;
    let first_token = seconds(cuda, 3, 1, || decoder.prefill_all(&ids, &Sampling::GREEDY))?;
    // The first step records the graph.
    decoder.generate(2)?;
    let time = seconds(cuda, 1, 1, || decoder.generate(count))?;
    Ok(Generation { first_token, tokens_per_second: (batch * count) as f64 / time })
}

/// Tokens of the largest vocabularies that are common (Qwen).
const LARGE_VOCABULARY: usize = 151_936;

/// Returns the seconds that choosing the next tokens of `batch` sequences takes, from 151,936 logits each.
pub fn choosing(cuda: &Cuda, batch: usize, sampling: &Sampling) -> Result<f64> {
    let device = cuda.device();
    let mut chooser = Chooser::new(device, batch, LARGE_VOCABULARY, 8)?;
    let logits = noise(batch * LARGE_VOCABULARY).into_iter().flat_map(|x| (20.0 * x).to_le_bytes());
    device.write(&chooser.logits, 0, &logits.collect::<Vec<u8>>())?;
    for sequence in 0..batch {
        chooser.start(device, sequence, &[0], sampling.draw(sequence as u64))?;
    }
    seconds(cuda, 9, 100, || chooser.choose(device, 0, batch))
}
