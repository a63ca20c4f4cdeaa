//! Calibrated quantization of the embedded model: what it promises whatever the settings.

#![allow(clippy::unwrap_used)] // tests: a failed unwrap is a failed test

use std::collections::BTreeMap;

use anyhow::Result;
use quant::backend::cpu::Cpu;
use quant::backend::{Backend, Batch};
use quant::calib::corpus::{Corpus, WindowShape};
use quant::calib::driver::{Finished, Request, calibrate};
use quant::calib::settings::Settings;
use quant::checkpoint::Checkpoint;
use quant::embedded;
use quant::model::tokenizer::Tokenizer;
use quant::model::{Model, TensorSource};
use quant::names::TensorId;
use quant::recipe::Recipe;
use quant::recipe::rules::choose;
use quant::scheme::fit::{ScaleRule, fit};
use quant::scheme::{Activations, Choice, QTensor};
use quant::tensor::Matrix;

/// Enough text for calibration to win clearly, little enough for a test.
const SHAPE: WindowShape = WindowShape { context: 128, tokens: 52 * 128, bos: None };

/// A checkpoint some of whose weights are replaced by quantized ones.
struct Replaced<'a> {
    source: &'a Checkpoint,
    tensors: BTreeMap<TensorId, QTensor>,
}

impl TensorSource for Replaced<'_> {
    fn read(&self, id: TensorId) -> Result<Matrix> {
        match self.tensors.get(&id) {
            Some(q) => Ok(Matrix::Quantized(q.clone())),
            None => TensorSource::read(self.source, id),
        }
    }

    fn rounding(&self, _: TensorId) -> Activations<f32> {
        Activations::Full
    }
}

fn open() -> (Checkpoint, Tokenizer) {
    let folder = embedded::model_folder().unwrap();
    (Checkpoint::open(&folder).unwrap(), Tokenizer::open(&folder).unwrap())
}

fn choice_of(source: &Checkpoint, format: &str) -> impl Fn(TensorId) -> Option<Choice> + Sync {
    let rules = Recipe::new(format, None, None).unwrap().rules(&source.config);
    move |id| choose(&rules, id)
}

/// Calibrates and returns the tensors, in the order they came, with the divergence on held-out windows.
fn calibrated(format: &str, held_out: usize, room: Option<u64>) -> (Vec<(TensorId, QTensor)>, Option<f64>) {
    let (source, tokenizer) = open();
    let corpus = Corpus::bundled();
    let ids = tokenizer.encode(&corpus.text(), false).unwrap();
    let windows = corpus.windows(&ids, SHAPE, 1).unwrap();
    let request = Request {
        windows: &windows,
        energies: &[],
        held_out,
        choice: &choice_of(&source, format),
        rounds_inputs: false,
        settings: Settings::default(),
        finished: None,
        room,
    };
    let mut tensors = Vec::new();
    let kld = calibrate(&Cpu, &source.config, &source, &request, &mut |done| {
        let Finished::Quantized(done) = done else { return Ok(()) };
        let outcome = done.solved.outcome;
        assert!(outcome.tokens.is_none() || Some(outcome.error) < outcome.error_nearest, "{}", done.id);
        tensors.push((done.id, done.solved.q));
        Ok(())
    });
    (tensors, kld.unwrap())
}

/// KLD from the embedded model over a piece of evaluation text.
fn divergence(tensors: impl IntoIterator<Item = (TensorId, QTensor)>) -> f64 {
    let (source, tokenizer) = open();
    let ids = &tokenizer.encode(embedded::EVAL_TEXT, false).unwrap()[..8 * 128];
    let batch = Batch { sequences: 8, tokens: 128 };
    let replaced = Replaced { source: &source, tensors: tensors.into_iter().collect() };
    let full = Model::load(&Cpu, &source.config, &source).unwrap();
    let quantized = Model::load(&Cpu, &source.config, &replaced).unwrap();
    let scored: Vec<usize> = (0..ids.len()).filter(|at| (64..127).contains(&(at % 128))).collect();
    let targets: Vec<u32> = scored.iter().map(|&at| ids[at + 1]).collect();
    let hidden =
        |model: &Model<Cpu>| Cpu.select_rows(&model.hidden(&Cpu, ids, batch).unwrap(), &scored).unwrap();
    let scores = Cpu
        .compare((&hidden(&full), full.head()), (&hidden(&quantized), quantized.head()), &targets)
        .unwrap();
    scores.iter().map(|score| score.kld as f64).sum::<f64>() / scores.len() as f64
}

fn nearest(format: &str) -> Vec<(TensorId, QTensor)> {
    let (source, _) = open();
    let choice = choice_of(&source, format);
    let quantized = source.tensors.iter().filter_map(|(&id, info)| {
        let weights = TensorSource::read(&source, id).unwrap().to_f32();
        let [rows, cols] = info.shape[..] else { return None };
        Some((id, fit(choice(id)?.scheme, &weights, rows, cols, None, ScaleRule::Search)))
    });
    quantized.collect()
}

#[test]
fn calibration_beats_the_nearest_codes_and_repeats_itself_wherever_its_streams_wait() {
    let (tensors, held_out) = calibrated("mxfp4", 4, None);
    assert_eq!(tensors.len(), 7 * 6);
    assert!(tensors.windows(2).all(|pair| pair[0].0 < pair[1].0), "the order of a forward pass");
    // No stream on the device, no input kept.
    assert!((tensors.clone(), held_out) == calibrated("mxfp4", 4, Some(0)), "two runs differ");
    // 6,144 tokens of calibration; the whole text gains much more (README, results).
    let (calibrated, nearest) = (divergence(tensors), divergence(nearest("mxfp4")));
    assert!(calibrated < 0.95 * nearest, "{calibrated} against {nearest}");
    let ratio = held_out.unwrap() / calibrated;
    assert!((0.3..3.0).contains(&ratio), "the held-out estimate is {ratio} times the measured divergence");
}

#[test]
fn two_level_schemes_and_embeddings_are_calibrated_too() {
    let (tensors, no_estimate) = calibrated("q4_k_m", 0, Some(4_000_000));
    assert_eq!((tensors.len(), no_estimate), (7 * 6 + 1, None));
    assert!(divergence(tensors) < divergence(nearest("q4_k_m")));
}
