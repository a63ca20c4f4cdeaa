//! The forward pass agrees with transformers: references made by `scripts/logit_reference.py` (versions beside them).
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use quant::backend::cpu::Cpu;
use quant::backend::{Backend, Batch};
use quant::checkpoint::Checkpoint;
use quant::model::Model;
use quant::names::{Role, TensorId};
use quant::scheme::Activations;
use quant::tensor::{Dtype, floats_from_bytes};
use safetensors::SafeTensors;

const NAMES: [&str; 24] = [
    "ernie4_5",
    "glm4_moe",
    "llama2",
    "llama3",
    "llama3_old",
    "llama_biases",
    "llama_dynamic",
    "llama_longrope",
    "llama_longrope_short",
    "llama_yarn",
    "minimax_m2",
    "mistral",
    "mixtral",
    "phi3",
    "phi3_long",
    "qwen2",
    "qwen2_moe",
    "qwen2_windows",
    "qwen2_yarn_old",
    "qwen3",
    "qwen3_dynamic_old",
    "qwen3_moe",
    "seed_oss",
    "smollm3",
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/logits").join(name)
}

fn open(name: &str) -> Model<Cpu> {
    let checkpoint = Checkpoint::open(&golden(name)).unwrap();
    Model::load(&Cpu, &checkpoint.config, &checkpoint).unwrap()
}

/// Returns the reference's token ids and logits `[tokens, vocab]`.
fn reference(name: &str) -> (Vec<u32>, Vec<f32>) {
    let bytes = std::fs::read(golden(&format!("{name}.safetensors"))).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let ids = file
        .tensor("ids")
        .unwrap()
        .data()
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| u32::from_le_bytes(*b))
        .collect();
    let stored = file.tensor("logits").unwrap();
    let mut logits = vec![0.0; stored.data().len() / 4];
    floats_from_bytes(Dtype::F32, stored.data(), &mut logits);
    (ids, logits)
}

fn logits(model: &Model<Cpu>, ids: &[u32], batch: Batch) -> Vec<f32> {
    let hidden = model.hidden(&Cpu, ids, batch).unwrap();
    Cpu.read(&Cpu.linear(&hidden, model.head(), None, Activations::Full).unwrap()).unwrap()
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Both sides compute in F32 and differ by the order of sums only: logits reach 22, two layers amplify, so a few hundred
/// units in the last place (2^-20 at 16) are to be expected and 1e-4 is a bound with room.
#[test]
fn logits_agree_with_transformers_for_every_architecture() {
    for name in NAMES {
        let (ids, expected) = reference(name);
        let found = logits(&open(name), &ids, Batch { sequences: 1, tokens: ids.len() });
        let difference = max_difference(&found, &expected);
        println!("{name}: {difference:e}");
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    for name in ["llama3", "mistral"] {
        let (ids, expected) = reference(name);
        let twice = [ids.clone(), ids.clone()].concat();
        let found = logits(&open(name), &twice, Batch { sequences: 2, tokens: ids.len() });
        let (first, second) = found.split_at(expected.len());
        assert_eq!(first, second, "{name}");
        assert!(max_difference(first, &expected) < 1e-4, "{name}");
    }
}

#[test]
fn hidden_states_of_some_rows_are_those_of_all_rows() {
    for name in NAMES {
        let model = open(name);
        let (ids, batch) = (reference(name).0, Batch { sequences: 1, tokens: 24 });
        let all = model.hidden(&Cpu, &ids, batch).unwrap();
        let rows = [3, 20, 7];
        let some = model.hidden_at(&Cpu, &ids, batch, &rows).unwrap();
        assert_eq!(some, Cpu.select_rows(&all, &rows).unwrap(), "{name}");
    }
}

#[test]
fn the_loss_head_scores_the_reference_logits() {
    let (ids, expected) = reference("qwen3");
    let model = open("qwen3");
    let hidden = model.hidden(&Cpu, &ids, Batch { sequences: 1, tokens: ids.len() }).unwrap();
    let rows: Vec<usize> = (0..ids.len() - 1).collect();
    let scores = Cpu.score(&Cpu.select_rows(&hidden, &rows).unwrap(), model.head(), &ids[1..]).unwrap();
    for ((score, logits), &target) in
        scores.iter().zip(expected.chunks(model.config.vocab_size)).zip(&ids[1..])
    {
        let total: f64 = logits.iter().map(|&logit| (logit as f64).exp()).sum();
        let nll = total.ln() - logits[target as usize] as f64;
        assert!((score.nll as f64 - nll).abs() < 1e-4, "{} {nll}", score.nll);
        assert!(logits.iter().all(|&logit| logit <= logits[score.top as usize]));
    }
}

#[test]
fn observers_see_the_input_of_every_linear_in_order() {
    use quant::names::Role::{Down, Gate, K, O, Q, Up, V};
    let model = open("qwen2");
    let ids = [3, 1, 4, 1, 5];
    let batch = Batch { sequences: 1, tokens: 5 };
    let mut x = model.embed(&Cpu, &ids).unwrap();
    let mut seen = Vec::new();
    for layer in 0..2 {
        let mut observe = |role, _, input: &<Cpu as Backend>::Tensor| {
            seen.push((role, input.ncols()));
            Ok(())
        };
        model.layer_forward(&Cpu, layer, &mut x, batch, &mut observe).unwrap();
    }
    let layer = [(Q, 32), (K, 32), (V, 32), (O, 32), (Gate, 32), (Up, 32), (Down, 48)];
    assert_eq!(seen, [layer, layer].concat());
}

#[test]
fn int8_inputs_move_the_logits_a_little() {
    let (ids, expected) = reference("llama2");
    let mut model = open("llama2");
    for layer in &mut model.layers {
        for linear in [&mut layer.q, &mut layer.k, &mut layer.v, &mut layer.o] {
            linear.rounding = Activations::Int8PerToken;
        }
        for role in [Role::Gate, Role::Up] {
            let linear = layer.linear_mut(TensorId::in_layer(0, role)).unwrap();
            linear.rounding = Activations::Int8PerToken;
        }
    }
    let difference =
        max_difference(&logits(&model, &ids, Batch { sequences: 1, tokens: ids.len() }), &expected);
    assert!((1e-3..1.0).contains(&difference), "{difference}");
}
