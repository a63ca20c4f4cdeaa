//! Every layout equals what the compressed-tensors library writes and reads (`scripts/golden_compressed_tensors.py`).

#![allow(clippy::unwrap_used)]

use std::path::Path;

use half::bf16;
use quant::backend::cpu::Cpu;
use quant::backend::{Backend, SecondMoments};
use quant::container::Storage;
use quant::dialect::Dialect;
use quant::dialect::compressed_tensors::config::Quantization;
use quant::dialect::compressed_tensors::{CompressedTensors, INPUT_SCALE};
use quant::scheme::{Activations, Scheme, schemes};
use safetensors::SafeTensors;

const MODULE: &str = "model.layers.0.mlp.up_proj";

/// Bytes and what the library says of them, with the shape of the weight.
fn golden(name: &str) -> (Vec<u8>, Scheme, Activations, [usize; 2]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/compressed_tensors");
    let bytes = std::fs::read(folder.join(format!("{name}.safetensors"))).unwrap();
    let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
    let metadata = header.metadata().clone().unwrap();
    assert!(metadata["versions"].starts_with("compressed-tensors 0.17.0"), "{}", metadata["versions"]);
    let json = serde_json::from_str(&metadata["quantization_config"]).unwrap();
    let (scheme, activations) = Quantization::parse(&json).unwrap().of(MODULE, true).unwrap();
    let shape = SafeTensors::deserialize(&bytes).unwrap().tensor("decompressed").unwrap().shape().to_vec();
    (bytes, scheme, activations, [shape[0], shape[1]])
}

fn check(name: &str, wanted: Scheme, wanted_activations: Activations) {
    let (bytes, scheme, activations, [rows, cols]) = golden(name);
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!((scheme, activations), (wanted, wanted_activations), "the library's config names the scheme");

    let parts = CompressedTensors.parts(&scheme, activations, rows, cols).unwrap();
    // Those of the inputs are looked at elsewhere.
    let beside = |name: &&str| *name != "decompressed" && !name.starts_with("input");
    assert_eq!(parts.len(), file.names().iter().filter(|name| beside(name)).count(), "the same tensors");
    for part in &parts {
        let stored = file.tensor(part.suffix).unwrap();
        assert_eq!(stored.shape(), part.shape, "{name} {}", part.suffix);
        let Storage::Plain(dtype) = part.storage else { panic!("{}: no plain numbers", part.suffix) };
        assert_eq!(stored.dtype().to_string(), dtype.to_string(), "{}", part.suffix);
        if let Some(fixed) = &part.fixed {
            assert_eq!(stored.data(), fixed, "{name} {}", part.suffix);
        }
    }

    let data: Vec<&[u8]> =
        parts.iter().filter(|p| p.fixed.is_none()).map(|p| file.tensor(p.suffix).unwrap().data()).collect();
    let q = CompressedTensors.unpack(&scheme, activations, rows, cols, &data).unwrap();
    assert_eq!(CompressedTensors.pack(&q, activations).unwrap(), data, "{name}: packed again");

    let (low, high) = scheme.element.range();
    let values: Vec<f32> = q.codes.iter().map(|&code| scheme.element.decode(code)).collect();
    assert!(values.contains(&low) && values.contains(&high), "{name}: the ends of the range occur");

    // code · scale is exact in F32 (8 + 8 bits of mantissa), and the library rounds that product to BF16 once. Compared
    // as numbers: its −0 is our 0.
    let theirs = file.tensor("decompressed").unwrap();
    for (i, (ours, theirs)) in q.decode().into_iter().zip(theirs.data().as_chunks::<2>().0).enumerate() {
        assert_eq!(bf16::from_f32(ours), bf16::from_le_bytes(*theirs), "{name}: value {i}");
    }
}

#[test]
fn mxfp4_equals_the_library() {
    check("mxfp4", schemes::MXFP4, Activations::Full);
}

#[test]
fn nvfp4_equals_the_library() {
    check("nvfp4", schemes::NVFP4, Activations::Full);
}

#[test]
fn fp8_equals_the_library() {
    check("fp8", schemes::FP8, Activations::Full);
    check("fp8_w8a8", schemes::FP8, Activations::Fp8PerToken);
}

#[test]
fn int4_in_groups_equals_the_library() {
    check("int4_group128", schemes::INT4, Activations::Full);
    check("int4_group32", schemes::int4_grouped(32), Activations::Full);
}

#[test]
fn int8_per_channel_equals_the_library() {
    check("int8_channel", schemes::INT8, Activations::Full);
}

#[test]
fn int8_in_groups_equals_the_library() {
    check("int8_group32", schemes::int8_grouped(32), Activations::Full);
}

#[test]
fn int8_of_odd_width_equals_the_library() {
    check("int8_odd_width", schemes::INT8, Activations::Full);
}

#[test]
fn int8_with_quantized_activations_equals_the_library() {
    check("int8_w8a8", schemes::INT8, Activations::Int8PerToken);
}

#[test]
fn int8_with_inputs_of_a_fixed_scale_equals_the_library() {
    check("int8_w8a8_static", schemes::INT8, Activations::Int8PerTensor(()));
}

#[test]
fn inputs_of_a_fixed_scale_are_rounded_as_the_library_rounds_them() {
    let (bytes, _, activations, _) = golden("int8_w8a8_static");
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let data = file.tensor(name).unwrap().data();
        data.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    };
    let inputs = floats("inputs");
    let scale = floats(INPUT_SCALE)[0];
    let rounding = activations.with_scale(|| Ok(scale)).unwrap();
    let x = Cpu.tensor(inputs.len() / 64, 64, &inputs).unwrap();
    let found = Cpu.read(&Cpu.round_inputs(&x, rounding).unwrap()).unwrap();
    assert_eq!(found, floats("inputs_rounded"));
    let codes: Vec<f32> = found.iter().map(|x| x / scale).collect();
    assert!(codes.contains(&-128.0) && codes.contains(&127.0), "both ends occur");
}
