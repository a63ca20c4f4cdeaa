//! Rates of the GPU and of our kernels on it, as a table. Ignored by default: `scripts/gpu.sh` runs it.

#![allow(clippy::unwrap_used)]

use quant::backend::Batch;
use quant::backend::cuda::{Cuda, Precision};
use quant::eval::speed::{self, Rate};
use quant::scheme::schemes::{MXFP4, Q4_K, Q6_K, Q8_0};

#[test]
#[ignore = "measures speed on a GPU"]
fn rates() {
    let cuda = Cuda::new(0, Precision::F16).unwrap();
    let show = |rate: &Rate| {
        let share = rate.share.map_or(String::new(), |share| format!("{:.1} %", 100.0 * share));
        println!("| {} | {:.1} {} | {share} |", rate.what, rate.value, rate.unit);
    };
    let copy = speed::copy_bandwidth(&cuda).unwrap();
    let products = speed::matrix_rate(&cuda).unwrap();
    show(&Rate { what: "device copy, read + write".into(), value: copy / 1e9, unit: "GB/s", share: None });
    show(&Rate { what: "8192³ F16 product".into(), value: products / 1e12, unit: "TFLOP/s", share: None });
    speed::dequantize(&cuda, copy).unwrap().iter().for_each(show);
    for (head_dim, tokens) in [(64, 2048), (128, 512), (128, 2048), (128, 8192), (256, 2048)] {
        show(&speed::attention(&cuda, head_dim, tokens, products).unwrap());
    }
    for (name, scheme, table) in [
        ("bf16", None, None),
        ("mxfp4, q8_0 head", Some(MXFP4), Some(Q8_0)),
        ("q4_k, q6_k head", Some(Q4_K), Some(Q6_K)),
    ] {
        let model = speed::random_model(&cuda, speed::llama_8b().unwrap(), scheme, table).unwrap();
        for sequences in [1, 8] {
            let value = speed::prefill(&cuda, &model, Batch { sequences, tokens: 2048 }).unwrap();
            let what = format!("8B shape, {name}, {sequences} x 2048 tokens, loss included");
            show(&Rate { what, value, unit: "tok/s", share: None });
        }
        for batch in [1, 2, 8, 32] {
            let found = speed::generation(&cuda, &model, batch, 128).unwrap();
            let what = format!("8B shape, {name}, generation, batch {batch}");
            show(&Rate { what, value: found.tokens_per_second, unit: "tok/s", share: None });
        }
    }
}
