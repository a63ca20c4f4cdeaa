//! The angles of rotary embedding are transformers', and so are its rotations: references made by `scripts/golden_rope.py`
//! (versions beside them).
#![allow(clippy::unwrap_used)]

use quant::backend::cpu::Cpu;
use quant::backend::{Backend, Batch, Pairing, Rope};
use quant::model::rope::json::{RopeClass, read};
use serde_json::Value;

fn golden() -> Value {
    serde_json::from_str(include_str!("golden/rope.json")).unwrap()
}

fn numbers(list: &Value) -> Vec<f32> {
    list.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
}

/// Returns what the classes of the script say of themselves.
fn class(name: &str) -> RopeClass {
    let phi3 = RopeClass {
        context: 4096,
        original_context: Some(4096),
        partial: true,
        renamed: &[("yarn", "longrope")],
        ..RopeClass::PLAIN
    };
    if name == "phi3" { phi3 } else { RopeClass::PLAIN }
}

#[test]
fn inverse_frequencies_are_those_of_transformers() {
    let golden = golden();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 30);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let head_dim = case["head_dim"].as_u64().unwrap() as usize;
        let parameters =
            read(&case["config"], &class(case["class"].as_str().unwrap())).unwrap().shared().unwrap();
        parameters.validate(head_dim).unwrap_or_else(|error| panic!("{name}: {error:#}"));
        let rope = parameters.rope(head_dim);
        let magnitude = case["magnitude"].as_f64().unwrap();
        assert!(
            (rope.magnitude as f64 / magnitude - 1.0).abs() < 1e-6,
            "{name}: {} {magnitude}",
            rope.magnitude
        );
        // transformers computes in F32: the exponent's rounding is multiplied by ln θ, a ramp takes a few more steps.
        let bound = (8.0 + parameters.theta.ln()) * f32::EPSILON;
        for angles in case["angles"].as_array().unwrap() {
            let tokens = angles["tokens"].as_u64().unwrap() as usize;
            let (expected, found) = (numbers(&angles["inverse_frequencies"]), rope.angles(tokens));
            assert_eq!(found.len(), expected.len(), "{name}");
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                let far = (found - expected).abs() > bound * expected.abs();
                assert!(!far, "{name}, {tokens} tokens, pair {i}: {found} {expected}");
            }
        }
    }
}

#[test]
fn rotations_are_those_of_transformers() {
    for case in golden()["rotations"].as_array().unwrap() {
        let class = case["class"].as_str().unwrap();
        let head_dim = case["head_dim"].as_u64().unwrap() as usize;
        let pairing = if class == "glm4" { Pairing::Neighbours } else { Pairing::Halves };
        let rope = Rope { head_dim, pairing, ..Rope::plain(numbers(&case["inverse_frequencies"])) };
        let (x, expected) = (numbers(&case["x"]), numbers(&case["y"]));
        let mut turned = Cpu.tensor(x.len() / head_dim, head_dim, &x).unwrap();
        Cpu.rope(&mut turned, &rope, Batch { sequences: 1, tokens: x.len() / head_dim }).unwrap();
        for (found, expected) in Cpu.read(&turned).unwrap().iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-6, "{class} {head_dim}: {found} {expected}");
        }
    }
}
