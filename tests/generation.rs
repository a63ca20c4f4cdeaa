//! Generation on the GPU: each step's logits are those of the CPU's forward pass over the same tokens.
//!
//! Without a GPU the tests say so and pass, unless `QUANT_REQUIRE_GPU` is set.

#![allow(clippy::unwrap_used)]

mod gpu;
mod sequences;

use gpu::gpu;
use quant::backend::cpu::Cpu;
use quant::backend::cuda::decode::CudaDecoder;
use quant::backend::cuda::{Cuda, Precision};
use quant::backend::kv_cache::KvCache;
use quant::backend::{Backend, Batch, LongAngles, Pairing, Rope};
use quant::generate::{Decoder, Sampling};
use quant::model::config::Config;
use quant::model::{Model, TensorSource};
use quant::names::{Role, TensorId, TensorPart};
use quant::scheme::fit::{ScaleRule, fit};
use quant::scheme::{Activations, Scheme, schemes};
use quant::tensor::{Dense, Dtype, Matrix};

/// A model of noise; linears and tables are rounded to a scheme.
struct Noise {
    config: Config,
    scheme: Option<Scheme>,
    rounding: Activations<f32>,
    /// Sinks of the first layer's heads.
    sinks: Option<[f32; 8]>,
    /// In place of the configuration's.
    rope: Option<Rope>,
}

impl Noise {
    fn new(qwen3: bool, scheme: Option<Scheme>) -> Self {
        let (architecture, model_type) =
            if qwen3 { ("Qwen3ForCausalLM", "qwen3") } else { ("Qwen2ForCausalLM", "qwen2") };
        // Rows that are no whole pieces of 128, where the scheme takes them.
        let whole = scheme.is_some_and(|scheme| scheme.block_cols() > 32);
        let (hidden, ffn) = match scheme {
            _ if whole => (256, 512),
            // Larger than what lies widened to Q8_0.
            Some(schemes::Q5_0) => (192, 1184),
            _ => (192, 352),
        };
        let config = serde_json::json!({
            "architectures": [architecture], "model_type": model_type, "hidden_size": hidden, "intermediate_size": ffn,
            "num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000,
            "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": false,
        });
        Noise {
            config: Config::from_json(&config).unwrap(),
            scheme,
            rounding: Activations::Full,
            sinks: None,
            rope: None,
        }
    }

    fn shape(&self, role: Role) -> [usize; 2] {
        let c = &self.config;
        let (q, kv) = (c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim);
        match role {
            Role::Embed | Role::Head => [c.vocab_size, c.hidden_size],
            Role::Q => [q, c.hidden_size],
            Role::K | Role::V => [kv, c.hidden_size],
            Role::O => [c.hidden_size, q],
            Role::Gate | Role::Up => [c.intermediate_size, c.hidden_size],
            Role::Down => [c.hidden_size, c.intermediate_size],
            Role::QNorm | Role::KNorm => [1, c.head_dim],
            _ => [1, c.hidden_size],
        }
    }
}

impl TensorSource for Noise {
    fn read(&self, id: TensorId) -> anyhow::Result<Matrix> {
        let [mut rows, mut cols] = self.shape(id.role);
        if id.part == TensorPart::Bias {
            (rows, cols) = (1, rows);
        }
        let mut state = (id.role as u32 * 64 + u32::from(id.layer.unwrap_or(63)) * 2 + id.part as u32 + 1)
            .wrapping_mul(2_654_435_761);
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1u32 << 24) as f32 - 0.5
        };
        let vector = rows == 1;
        let scale = if id.role == Role::Embed { 3.5 } else { 3.5 / (cols as f32).sqrt() };
        let values: Vec<f32> =
            (0..rows * cols).map(|_| if vector { 1.0 + 0.2 * next() } else { scale * next() }).collect();
        match self.scheme {
            Some(scheme) if !vector => {
                Ok(Matrix::Quantized(fit(scheme, &values, rows, cols, None, ScaleRule::default())))
            }
            _ => {
                let shape = if vector { vec![cols] } else { vec![rows, cols] };
                Ok(Matrix::Dense(Dense::from_f32(shape, &values).cast(Dtype::BF16)))
            }
        }
    }

    fn rounding(&self, id: TensorId) -> Activations<f32> {
        if id.role.is_linear() { self.rounding } else { Activations::Full }
    }
}

/// Returns the logits of the last position of each sequence on the CPU, `[sequences, vocab]`.
fn logits_on_cpu(model: &Model<Cpu>, sequences: &[Vec<u32>]) -> Vec<f32> {
    let tokens = sequences[0].len();
    let batch = Batch { sequences: sequences.len(), tokens };
    let hidden = model.hidden(&Cpu, &sequences.concat(), batch).unwrap();
    let last: Vec<usize> = (1..=sequences.len()).map(|sequence| sequence * tokens - 1).collect();
    let last = Cpu.select_rows(&hidden, &last).unwrap();
    Cpu.read(&Cpu.linear(&last, model.head(), None, Activations::Full).unwrap()).unwrap()
}

fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let norm = |values: &mut dyn Iterator<Item = f32>| {
        values.map(|x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
    };
    let error = norm(&mut found.iter().zip(expected).map(|(a, b)| a - b));
    error / norm(&mut expected.iter().copied())
}

/// Generates on the GPU and compares each step's logits with the CPU's: relative error, bounded.
fn continue_as_the_cpu_would(
    cuda: &Cuda,
    source: &Noise,
    name: &str,
    [batch, prompt]: [usize; 2],
    kv_cache: KvCache,
    bound: f64,
) {
    let mut on_cpu = Model::load(&Cpu, &source.config, source).unwrap();
    let mut on_gpu = Model::load(cuda, &source.config, source).unwrap();
    (on_cpu.constants.kv_cache, on_gpu.constants.kv_cache) = (kv_cache, kv_cache);
    if let Some(rope) = &source.rope {
        on_gpu.constants.rope = rope.clone();
        // A decoder turns as long as it may grow.
        on_cpu.constants.rope = rope.for_length(prompt + 30);
    }
    if let Some(sinks) = &source.sinks {
        let sinks = |layer: usize| -> Vec<f32> { sinks.iter().map(|sink| sink + layer as f32).collect() };
        for (at, layer) in on_cpu.layers.iter_mut().enumerate() {
            layer.sinks = Some(Cpu.tensor(1, 8, &sinks(at)).unwrap());
        }
        for (at, layer) in on_gpu.layers.iter_mut().enumerate() {
            layer.sinks = Some(cuda.tensor(1, 8, &sinks(at)).unwrap());
        }
    }
    let ids: Vec<u32> = (0..batch * prompt).map(|i| (i * 7919 % 1000) as u32).collect();
    let mut decoder = CudaDecoder::new(cuda, &on_gpu, batch, prompt + 30).unwrap();
    decoder.prefill_all(&ids, &Sampling::GREEDY).unwrap();
    for steps in [0, 1, 6] {
        decoder.generate(steps).unwrap();
        // The last token has been chosen but not fed.
        let mut sequences = decoder.tokens().unwrap();
        let chosen: Vec<u32> = sequences.iter_mut().map(|sequence| sequence.pop().unwrap()).collect();
        assert_eq!(decoder.next_tokens().unwrap(), chosen);
        let (found, expected) = (decoder.logits().unwrap(), logits_on_cpu(&on_cpu, &sequences));
        let error = relative_error(&found, &expected);
        assert!(error < bound, "{name}, batch {batch}, {} tokens: off by {error}", sequences[0].len());
        for (row, chosen) in found.chunks(1000).zip(chosen) {
            let most = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            assert_eq!(row.iter().position(|&x| x == most), Some(chosen as usize), "{name}");
        }
    }
}

/// Three layers of F16 roundings of 2^-12 each, one after another.
const F16_LAYERS: f64 = 0.002;

#[test]
fn every_step_continues_as_the_cpu_would() {
    let Some(cuda) = gpu(Precision::F16) else { return };
    let grouped = schemes::int8_grouped(128);
    let schemes = schemes::ALL.into_iter().chain([grouped]).map(Some).chain([None]);
    for (at, scheme) in schemes.enumerate() {
        let source = Noise::new(at % 2 == 0, scheme);
        let name = scheme.map_or("bf16", |scheme| scheme.name);
        for shape in [[1, 37], [5, 40], [9, 33], [32, 17]] {
            continue_as_the_cpu_would(&cuda, &source, name, shape, KvCache::Exact, F16_LAYERS);
        }
    }
    // Positions dealt to several blocks.
    for shape in [[1, 300], [3, 400]] {
        continue_as_the_cpu_would(&cuda, &Noise::new(true, None), "long", shape, KvCache::Exact, F16_LAYERS);
    }
}

#[test]
fn every_step_has_the_sinks_of_its_layer() {
    let Some(cuda) = gpu(Precision::F16) else { return };
    let sinks = Some([f32::NEG_INFINITY, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 1e4]);
    // One block a head, and positions dealt to several.
    for shape in [[1, 37], [32, 17], [1, 300], [3, 400]] {
        let source = Noise { sinks, ..Noise::new(true, None) };
        continue_as_the_cpu_would(&cuda, &source, "sinks", shape, KvCache::Exact, F16_LAYERS);
    }
}

#[test]
fn every_step_turns_as_the_cpu_does() {
    let Some(cuda) = gpu(Precision::F16) else { return };
    use Pairing::{Halves, Neighbours};
    for (pairing, rotary, magnitude) in [
        (Halves, 64, 1.25),
        (Halves, 48, 1.0),
        (Halves, 10, 1.25),
        (Neighbours, 64, 1.0),
        (Neighbours, 32, 1.25),
    ] {
        let angles =
            |slower: f32| (0..rotary / 2).map(move |i| 10f32.powf(-(i as f32) / 8.0) / slower).collect();
        let long = Some(LongAngles { beyond: 40, inverse_frequencies: angles(4.0) });
        let rope = Rope { head_dim: 64, pairing, long, magnitude, ..Rope::plain(angles(1.0)) };
        for qwen3 in [false, true] {
            let source = Noise { rope: Some(rope.clone()), ..Noise::new(qwen3, None) };
            for shape in [[1, 37], [3, 8], [3, 400]] {
                let name = format!("{pairing:?} {rotary}");
                continue_as_the_cpu_would(&cuda, &source, &name, shape, KvCache::Exact, F16_LAYERS);
            }
        }
    }
}

#[test]
fn quantized_inputs_are_quantized_in_every_step() {
    let Some(cuda) = gpu(Precision::F16) else { return };
    // The noise's inputs are some units large.
    for rounding in [Activations::Int8PerToken, Activations::Int8PerTensor(1.0 / 32.0)] {
        let source = Noise { rounding, ..Noise::new(true, Some(schemes::INT8)) };
        for shape in [[1, 20], [5, 20]] {
            // The last bits of inputs turn steps of 1/127 now and then, and these turn more: .017 was seen.
            continue_as_the_cpu_would(&cuda, &source, "w8a8", shape, KvCache::Exact, 0.04);
        }
    }
}

#[test]
fn every_step_keeps_keys_and_values_as_the_cpu_does() {
    let Some(cuda) = gpu(Precision::F16) else { return };
    let kinds =
        [KvCache::Bf16, KvCache::Fp8, KvCache::Int8 { group: None }, KvCache::Int8 { group: Some(16) }];
    for (kind, norms) in kinds.into_iter().flat_map(|kind| [(kind, true), (kind, false)]) {
        for shape in [[1, 37], [5, 20], [3, 400]] {
            // The last bit of a key turns a step of its cache now and then.
            let name = format!("kv {kind}");
            continue_as_the_cpu_would(&cuda, &Noise::new(norms, None), &name, shape, kind, 0.02);
        }
    }
}

#[test]
fn sequences_of_different_lengths_are_replaced_idle_and_refused() {
    let Some(cuda) = gpu(Precision::F16) else { return };
    let source = Noise::new(true, None);
    let on_cpu = Model::load(&Cpu, &source.config, &source).unwrap();
    let on_gpu = Model::load(&cuda, &source.config, &source).unwrap();
    let mut decoder = CudaDecoder::new(&cuda, &on_gpu, 3, sequences::CAPACITY).unwrap();
    sequences::come_and_go(&mut decoder, 1000, &mut |ids, found| {
        let error = relative_error(found, &logits_on_cpu(&on_cpu, &[ids.to_vec()]));
        assert!(error < F16_LAYERS, "{} tokens: off by {error}", ids.len());
    });
}

/// Weights are whole numbers and random numbers a function of seed, prompt and position, so both sides draw the same.
#[test]
fn sampled_tokens_are_those_that_the_definition_draws() {
    let Some(cuda) = gpu(Precision::F16) else { return };
    for vocab in [1000, 151_936] {
        let mut source = Noise::new(true, None);
        source.config.vocab_size = vocab;
        let model = Model::load(&cuda, &source.config, &source).unwrap();
        // Usual; everything kept; logits nearly equal; one token only.
        for (temperature, top_p) in [(0.8, 0.95), (1.5, 1.0), (100.0, 0.3), (0.01, 0.5)] {
            for batch in [1, 5, 32] {
                let sampling = Sampling { temperature, top_p, seed: 11 };
                let mut decoder = CudaDecoder::new(&cuda, &model, batch, 24).unwrap();
                let ids: Vec<u32> = (0..batch * 7).map(|i| (i * 7919 % vocab) as u32).collect();
                decoder.prefill_all(&ids, &sampling).unwrap();
                for steps in [0, 1, 9] {
                    decoder.generate(steps).unwrap();
                    let (texts, logits) = (decoder.tokens().unwrap(), decoder.logits().unwrap());
                    for (prompt, (text, logits)) in texts.iter().zip(logits.chunks(vocab)).enumerate() {
                        let (next, before) = text.split_last().unwrap();
                        let expected = sampling.draw(prompt as u64).choose(logits, before.len());
                        assert_eq!(Some(*next), expected, "{sampling:?}, {vocab} tokens, batch {batch}");
                    }
                    let next: Vec<u32> = texts.iter().map(|text| text[text.len() - 1]).collect();
                    assert_eq!(decoder.next_tokens().unwrap(), next);
                }
            }
        }
    }
}
