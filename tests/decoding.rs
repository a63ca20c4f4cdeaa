//! Step-by-step decoding on the CPU agrees with the full forward pass.
#![allow(clippy::unwrap_used)]

mod sequences;

use std::path::Path;

use quant::backend::cpu::Cpu;
use quant::backend::kv_cache::KvCache;
use quant::backend::{Backend, Batch, LongAngles, Pairing, Rope};
use quant::checkpoint::Checkpoint;
use quant::generate::{Draw, Finish, Generate, Request, Sampling, Stop, generate};
use quant::model::Model;
use quant::model::tokenizer::Tokenizer;
use quant::scheme::Activations;

fn golden(name: &str) -> Model<Cpu> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/logits").join(name);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    Model::load(&Cpu, &checkpoint.config, &checkpoint).unwrap()
}

fn tiny_llama() -> (Model<Cpu>, Tokenizer) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("eval/tiny-llama");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    (Model::load(&Cpu, &checkpoint.config, &checkpoint).unwrap(), checkpoint.tokenizer().unwrap())
}

/// Returns the logits after the last of `ids` by a full forward pass.
fn full(model: &Model<Cpu>, ids: &[u32]) -> Vec<f32> {
    let batch = Batch { sequences: 1, tokens: ids.len() };
    let hidden = model.hidden_at(&Cpu, ids, batch, &[ids.len() - 1]).unwrap();
    Cpu.read(&Cpu.linear(&hidden, model.head(), None, Activations::Full).unwrap()).unwrap()
}

fn ids(count: usize, seed: u32) -> Vec<u32> {
    (0..count as u32).map(|i| (i + seed).wrapping_mul(2_654_435_761) >> 26).collect()
}

/// Returns a model of which the golden files have no like: sinks, or neighbours turning in a part of each head.
fn varied(name: &str) -> Model<Cpu> {
    let mut model = golden(name);
    if name == "qwen3" {
        let heads = model.config.num_attention_heads;
        let sinks: Vec<f32> = (0..heads).map(|head| 2.0 - head as f32).collect();
        model.layers[1].sinks = Some(Cpu.tensor(1, heads, &sinks).unwrap());
    }
    if name == "llama2" {
        // Heads of 8, of which 6 turn; sequences that may grow past 20 tokens turn slower from their first token on.
        let long = Some(LongAngles { beyond: 20, inverse_frequencies: vec![0.5, 0.1, 0.01] });
        let (angles, pairing) = (vec![1.0, 0.3, 0.1], Pairing::Neighbours);
        model.constants.rope = Rope { head_dim: 8, pairing, long, magnitude: 1.2, ..Rope::plain(angles) };
    }
    model
}

/// Both sides compute in F32 and differ in the order of attention's sums only: logits reach 22 and two layers amplify, so
/// a few hundred units in the last place (2^-20 at 16) are to be expected; 1e-4 is the bound of `tests/logits.rs`.
#[test]
fn every_step_gives_the_logits_of_the_full_pass() {
    for name in
        ["llama2", "llama3", "llama_biases", "llama_yarn", "mistral", "qwen2", "qwen2_windows", "qwen3"]
    {
        let (model, mut whole) = (varied(name), varied(name));
        whole.constants = whole.constants.for_length(sequences::CAPACITY);
        let mut decoder = Cpu.decoder(&model, KvCache::Exact, 3, sequences::CAPACITY).unwrap();
        sequences::come_and_go(decoder.as_mut(), model.config.vocab_size as u32, &mut |ids, found| {
            for (found, expected) in found.iter().zip(&full(&whole, ids)) {
                assert!((found - expected).abs() < 1e-4, "{name}, {} tokens: {found} {expected}", ids.len());
            }
        });
    }
}

/// Keys and values are the same numbers on both sides up to the order of attention's sums in the layer before, so a
/// rounding may now and then fall on the other side: one code of one key moves a logit by less than 1e-2.
#[test]
fn a_quantized_cache_reads_the_same_step_by_step() {
    for kind in [KvCache::Bf16, KvCache::Fp8, KvCache::Int8 { group: None }, KvCache::Int8 { group: Some(4) }]
    {
        let mut model = golden("qwen3");
        let exact = full(&model, &ids(20, 2));
        model.constants.kv_cache = kind;
        model.layers[1].kv_scales = [0.5, 2.0];
        let mut decoder = Cpu.decoder(&model, KvCache::Exact, 1, 40).unwrap();
        decoder.prefill(0, &ids(12, 2), Draw::GREEDY).unwrap();
        ids(20, 2)[12..].iter().for_each(|&token| decoder.step(&[Some(token)]).unwrap());
        let (found, whole) = (decoder.logits().unwrap(), full(&model, &ids(20, 2)));
        let apart = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart(&found, &whole) < 1e-2, "{kind}: {}", apart(&found, &whole));
        assert!(apart(&found, &exact) > 1e-3, "{kind} changes something");
    }
}

#[test]
fn a_full_or_empty_sequence_cannot_be_continued() {
    let model = golden("llama2");
    let mut decoder = Cpu.decoder(&model, KvCache::Exact, 2, 4).unwrap();
    let refusal = |result: anyhow::Result<()>| result.unwrap_err().to_string();
    assert!(refusal(decoder.step(&[Some(1), None])).contains("holds 0 of 4"));
    assert!(refusal(decoder.prefill(0, &[], Draw::GREEDY)).contains("a prompt of 0 tokens"));
    assert!(refusal(decoder.prefill(0, &[1; 5], Draw::GREEDY)).contains("a prompt of 5 tokens"));
    decoder.prefill(0, &[1; 4], Draw::GREEDY).unwrap();
    assert!(refusal(decoder.step(&[Some(1), None])).contains("holds 4 of 4"));
    assert!(Cpu.decoder(&model, KvCache::Exact, 1, 1 << 20).err().unwrap().to_string().contains("context"));
}

/// Generates after the prompts and returns what came out, in the prompts' order.
fn run(
    sequences: usize,
    prompts: &[&str],
    sampling: Sampling,
    stop: &Stop,
    max_new_tokens: usize,
) -> Vec<(String, Finish, Vec<u32>)> {
    let (model, tokenizer) = tiny_llama();
    let prompts: Vec<_> = prompts
        .iter()
        .map(|text| Request { ids: tokenizer.encode(text, true).unwrap(), max_new_tokens })
        .collect();
    let mut decoder = Cpu.decoder(&model, KvCache::Exact, sequences, 80).unwrap();
    let mut found = vec![None; prompts.len()];
    generate(decoder.as_mut(), &tokenizer, &prompts, &sampling, stop, &mut |at, text| {
        found[at] = Some((text.text, text.finish, text.tokens));
        Ok(())
    })
    .unwrap();
    found.into_iter().map(Option::unwrap).collect()
}

const PROMPTS: [&str; 5] =
    ["The old man looked at", "import os\n\ndef main(", "{\"name\": \"", "Natalia has 5 apples", "The"];

#[test]
fn greedy_texts_are_the_full_pass_continued_and_do_not_depend_on_neighbours() {
    let stop = Stop::default();
    let together = run(2, &PROMPTS, Sampling::GREEDY, &stop, 12);
    assert_eq!(together, run(5, &PROMPTS, Sampling::GREEDY, &stop, 12));
    let (model, tokenizer) = tiny_llama();
    let mut expected = tokenizer.encode(PROMPTS[0], true).unwrap();
    let prompt = expected.len();
    for _ in 0..12 {
        let logits = full(&model, &expected);
        let max = logits.iter().copied().fold(f32::MIN, f32::max);
        expected.push(logits.iter().position(|&logit| logit == max).unwrap() as u32);
    }
    assert_eq!(together[0].2, expected[prompt..]);
    assert_eq!(together[0].1, Finish::Length);
}

#[test]
fn sampled_texts_repeat_with_their_seed_and_differ_without() {
    let stop = Stop::default();
    let sampling = |seed| Sampling { temperature: 1.0, top_p: 0.95, seed };
    let first = run(3, &PROMPTS, sampling(1), &stop, 12);
    assert_eq!(first, run(2, &PROMPTS, sampling(1), &stop, 12));
    assert_ne!(first, run(3, &PROMPTS, sampling(2), &stop, 12));
}

#[test]
fn stop_strings_and_stop_tokens_end_a_text_and_are_left_out() {
    let free = run(1, &PROMPTS[..1], Sampling::GREEDY, &Stop::default(), 16);
    let (text, _, tokens) = &free[0];
    let word = text.split_whitespace().nth(3).unwrap();
    let stop = Stop { strings: vec![word.into(), "never".into()], ..Stop::default() };
    let (stopped, finish, _) = &run(1, &PROMPTS[..1], Sampling::GREEDY, &stop, 16)[0];
    assert_eq!(*stopped, text[..text.find(word).unwrap()]);
    assert_eq!(*finish, Finish::Stop);
    let at = tokens.iter().position(|token| *token == tokens[5]).unwrap();
    let stop = Stop { tokens: vec![tokens[5]], ..Stop::default() };
    let (stopped, finish, same) = &run(1, &PROMPTS[..1], Sampling::GREEDY, &stop, 16)[0];
    assert_eq!((same.as_slice(), *finish), (&tokens[..=at], Finish::Stop));
    assert!(text.starts_with(stopped.as_str()) && stopped.len() < text.len());
}
