//! Rates of the GPU and of our kernels on it, as tables. Ignored by default: `scripts/gpu.sh` runs them, one at a time.

#![allow(clippy::unwrap_used)]

use quant::backend::Batch;
use quant::backend::cuda::{Cuda, Precision};
use quant::eval::speed::{self, Rate};
use quant::generate::Sampling;
use quant::model::Model;
use quant::model::config::Config;
use quant::scheme::mix;

fn show(rate: &Rate) {
    let share = rate.share.map_or(String::new(), |share| format!("{:.1} %", 100.0 * share));
    println!("| {} | {:.1} {} | {share} |", rate.what, rate.value, rate.unit);
}

fn tokens_per_second(what: String, value: f64) {
    show(&Rate { what, value, unit: "tok/s", share: None });
}

fn model(cuda: &Cuda, config: &Config, format: &str) -> Model<Cuda> {
    speed::random_model(cuda, config.clone(), mix::by_name(format).as_ref()).unwrap()
}

#[test]
#[ignore = "measures speed on a GPU"]
fn operations() {
    let cuda = Cuda::new(0, Precision::F16).unwrap();
    let copy = speed::copy_bandwidth(&cuda).unwrap();
    let products = speed::matrix_rate(&cuda).unwrap();
    show(&Rate { what: "device copy, read + write".into(), value: copy / 1e9, unit: "GB/s", share: None });
    show(&Rate { what: "8192³ F16 product".into(), value: products / 1e12, unit: "TFLOP/s", share: None });
    speed::dequantize(&cuda, copy).unwrap().iter().for_each(show);
    for (head_dim, tokens) in [(64, 2048), (128, 512), (128, 2048), (128, 8192), (256, 2048)] {
        show(&speed::attention(&cuda, head_dim, tokens, products).unwrap());
    }
}

#[test]
#[ignore = "measures speed on a GPU"]
fn choosing() {
    let cuda = Cuda::new(0, Precision::F16).unwrap();
    let sampled = Sampling { temperature: 0.8, top_p: 0.95, seed: 1 };
    for (name, sampling) in [("most likely", Sampling::GREEDY), ("sampled", sampled)] {
        for batch in [1, 8, 32] {
            let value = 1e6 * speed::choosing(&cuda, batch, &sampling).unwrap();
            let what = format!("{name} of 151,936 tokens, {batch} sequences");
            show(&Rate { what, value, unit: "µs", share: None });
        }
    }
}

#[test]
#[ignore = "measures speed on a GPU"]
fn prompts() {
    let cuda = Cuda::new(0, Precision::F16).unwrap();
    let config = speed::llama_8b().unwrap();
    for format in ["bf16", "mxfp4", "q4_k_m"] {
        let model = model(&cuda, &config, format);
        for sequences in [1, 8] {
            let rate = speed::prefill(&cuda, &model, Batch { sequences, tokens: 2048 }).unwrap();
            tokens_per_second(format!("8B shape, {format}, {sequences} x 2048 tokens, loss included"), rate);
        }
    }
}

/// Prints what generating runs at in a format.
fn generation(format: &str) {
    let cuda = Cuda::new(0, Precision::F16).unwrap();
    for (name, config) in [("8B", speed::llama_8b().unwrap()), ("SmolLM2-135M", speed::smol_135m().unwrap())]
    {
        let model = model(&cuda, &config, format);
        for (batch, prompt) in [(1, 128), (1, 2048), (8, 128), (32, 128)] {
            let found = speed::generation(&cuda, &model, batch, prompt).unwrap();
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
