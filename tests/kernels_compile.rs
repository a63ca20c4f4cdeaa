//! Every kernel compiles for every architecture we name, in every variant the backend asks for. Needs NVRTC but no GPU:
//! `pip install nvidia-cuda-nvrtc`, or `QUANT_CUDA_LIBRARIES=FOLDER`. Without NVRTC the test says so and passes.

#![allow(clippy::unwrap_used)]

use std::collections::HashSet;
use std::io::Write;

use quant::backend::cuda::compile::{Kernel, compile, names};
use quant::backend::cuda::{cache_defines, library, scheme_defines, scheme_on_device};
use quant::backend::kv_cache::KvCache;
use quant::num::Codec;
use quant::scheme::{Scheme, Span, schemes};
use rayon::prelude::*;

fn kernel(name: &'static str, defines: &str) -> Kernel {
    Kernel::new(name, &defines.split_whitespace().collect::<Vec<_>>())
}

/// One scheme of every kind: a scale alone, a scale per row, two levels with minima, a table.
const FEW: [Scheme; 4] = [schemes::MXFP4, schemes::INT8, schemes::Q2_K, schemes::IQ4_XS];

/// Returns the kernels that decode weights, for dense ones and these schemes.
fn decoding(schemes: &[Scheme]) -> Vec<Kernel> {
    let dense = ["F32", "F16", "BF16"].map(|dtype| vec![format!("ELEMENT=DENSE_{dtype}")]);
    let packed = |schemes: &[Scheme]| -> Vec<Vec<String>> {
        schemes.iter().map(|&scheme| scheme_defines(&scheme_on_device(scheme, 1 << 12, 1 << 12))).collect()
    };
    let mut every = [dense.to_vec(), packed(schemes)].concat();
    every.sort();
    every.dedup();
    let in_all_shapes = [dense.to_vec(), packed(&FEW)].concat();
    let mut kernels = Vec::new();
    for (number, defines) in every.into_iter().enumerate() {
        kernels.push(Kernel { name: "embed", defines: defines.clone() });
        for float in ["float", "f16"] {
            let with_output = defines.iter().cloned().chain([format!("Y={float}")]).collect();
            kernels.push(Kernel { name: "dequantize", defines: with_output });
        }
        let shapes =
            [("F16", 1, 1, 1, 1), ("ADD", 2, 4, 32, 0), ("F32", 2, 2, 16, 0), ("SWIGLU", 1, 1, 8, 0)];
        // How a scheme is decoded and how a product is cut are apart in the source.
        let all = in_all_shapes.contains(&defines);
        for (output, row_tiles, token_tiles, tokens, norm) in shapes
            .into_iter()
            .enumerate()
            .filter_map(|(at, shape)| (all || at == number % 4).then_some(shape))
        {
            let shape = [
                format!("OUTPUT={output}"),
                format!("ROW_TILES={row_tiles}"),
                format!("TOKEN_TILES={token_tiles}"),
                format!("TOKENS={tokens}"),
                "WARPS=8".to_string(),
                "STAGES=2".to_string(),
                format!("NORM={norm}"),
                format!("BLOCKS={}", if tokens > 8 { 1 } else { 2 }),
            ];
            let with_shape = defines.iter().cloned().chain(shape).collect();
            kernels.push(Kernel { name: "matvec", defines: with_shape });
        }
    }
    kernels
}

/// Returns all variants of the kernels that choose codes for these schemes.
fn calibrating(schemes: &[Scheme]) -> Vec<Kernel> {
    let plain = ["coefficients", "correct", "divide", "gather_columns", "missing", "row_dots", "symmetrize"];
    let mut kernels: Vec<Kernel> = plain.map(|name| kernel(name, "")).into();
    kernels.push(kernel("widen_hessian", ""));
    for scheme in schemes {
        let mut push = |name, more: &[&str]| {
            let defines = scheme_defines(scheme).into_iter().chain(more.iter().map(|more| more.to_string()));
            kernels.push(Kernel { name, defines: defines.collect() });
        };
        push("feedback", &[]);
        push("values", &["WHAT=VALUE", "Y=float"]);
        push("values", &["WHAT=VALUE", "Y=f16"]);
        push("descend", &["PART=CODES"]);
        if scheme.scale == Codec::E8M0 {
            push("fit_power_of_two", &[]);
        }
        match scheme.group {
            Span::Row => {
                push("values", &["WHAT=UNIT", "Y=float"]);
                push("regrid", &[]);
                push("adopt", &[]);
            }
            _ => push("descend", &["PART=SCALES"]),
        }
        if let Some((Span::Cols(_), _)) = scheme.outer {
            push("outer_parts", &[]);
            push("refit_outer", &[]);
        }
    }
    kernels
}

/// Attention and caches, for every kind of head.
fn attention() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for head_dim in [64, 80, 96, 128, 256] {
        let (tile, warps) = if head_dim <= 128 { (64, 8) } else { (32, 4) };
        for sinks in ["SINKS=0", "SINKS=1"] {
            kernels.push(kernel("attention", &format!("D={head_dim} BC={tile} WARPS={warps} {sinks}")));
            kernels.push(kernel("attention_precise", &format!("D={head_dim} {sinks}")));
        }
        for kind in [KvCache::Exact, KvCache::Bf16, KvCache::Fp8, KvCache::Int8 { group: Some(16) }] {
            let (_, cache) = cache_defines(kind, head_dim);
            let with = |more: &[String]| cache.iter().chain(more).cloned().collect();
            let heads = |sinks: u8, rotary: usize, neighbours: u8| {
                let width = format!("D={head_dim}");
                let rotation = [format!("ROTARY={rotary}"), format!("NEIGHBOURS={neighbours}")];
                [vec![width, "HEADS=4".into(), format!("SINKS={sinks}")], rotation.to_vec()].concat()
            };
            kernels.push(Kernel { name: "attend", defines: with(&heads(0, head_dim, 0)) });
            if kind == KvCache::Exact {
                kernels.push(Kernel { name: "attend", defines: with(&heads(1, head_dim, 0)) });
                kernels.push(Kernel { name: "attend", defines: with(&heads(0, head_dim / 4, 0)) });
                kernels.push(Kernel { name: "attend", defines: with(&heads(0, head_dim / 2, 1)) });
            }
            kernels.push(Kernel { name: "round_cache", defines: with(&["X=f16".to_string()]) });
        }
    }
    kernels
}

/// Returns all variants of the kernels that meet no scheme.
fn plain() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for x in ["float", "f16"] {
        let gradients = ["rms_norm_gradient", "row_energies", "scale_rows", "swiglu_gradient"];
        for rope in ["NEIGHBOURS=0 RUN=4", "NEIGHBOURS=0 RUN=1", "NEIGHBOURS=1 RUN=1"] {
            kernels.push(kernel("rope", &format!("X={x} {rope}")));
        }
        for name in ["add_rows", "maxima", "swiglu"].into_iter().chain(gradients) {
            kernels.push(kernel(name, &format!("X={x}")));
        }
        for sign in ["1.0f", "-1.0f"] {
            kernels.push(kernel("add", &format!("X={x} SIGN={sign}")));
        }
        for name in ["attention_gradient", "divergence_gradient", "fisher_gradient"] {
            kernels.push(kernel(name, &format!("Y={x}")));
        }
        for y in ["float", "f16"] {
            for name in ["cast", "rms_norm"] {
                kernels.push(kernel(name, &format!("X={x} Y={y}")));
            }
        }
        for codes in ["i8", "f16", "float"] {
            for to in ["INT8", "E4M3"] {
                kernels.push(kernel("quantize_rows", &format!("X={x} C={codes} TO={to} KEEP=CODES")));
            }
        }
        for values in ["f16", "float"] {
            for to in ["INT8", "E4M3"] {
                kernels.push(kernel("quantize_rows", &format!("X={x} C={values} TO={to} KEEP=VALUES")));
            }
        }
        for sums in ["int", "float"] {
            kernels.push(kernel("rescale", &format!("S={sums} Y={x}")));
        }
    }
    for name in ["advance", "column_dots", "compare", "draw", "gather", "nucleus", "score"] {
        kernels.push(kernel(name, ""));
    }
    kernels.extend(attention());
    kernels
}

/// Returns kernels among which every definition of every kernel occurs.
fn cover(kernels: &[Kernel]) -> Vec<Kernel> {
    let mut seen = HashSet::new();
    let mut adds = |kernel: &&Kernel| {
        let parts = kernel.defines.iter().map(String::as_str).chain([""]);
        // All are put in, so no short circuit.
        parts.filter(|part| seen.insert((kernel.name, part.to_string()))).count() > 0
    };
    kernels.iter().filter(|kernel| adds(kernel)).cloned().collect()
}

#[test]
fn every_kernel_compiles_for_ampere_hopper_and_blackwell() {
    if let Err(reason) = library::load_nvrtc() {
        // Not `eprintln!`, which the test harness keeps to itself when a test passes.
        let _ = writeln!(std::io::stderr(), "SKIPPED every_kernel_compiles: {reason:#}");
        return;
    }
    let grouped = [schemes::int8_grouped(128), schemes::int8_grouped(64), schemes::int4_grouped(32)];
    let written = [&schemes::ALL[..], &grouped].concat();
    let stored = [&schemes::ALL[..], &schemes::READ_ONLY, &grouped[..1]].concat();
    let kernels = [plain(), decoding(&stored), calibrating(&written)].concat();
    for name in names() {
        assert!(
            kernels.iter().any(|kernel| kernel.name == name),
            "kernel `{name}` has no variant in this test"
        );
    }
    // Architectures differ in a few lines of common.cuh and in the instructions they have, not in how definitions combine:
    // every scheme and combination on one of them, every definition on the others.
    let some = cover(&[plain(), decoding(&FEW), calibrating(&FEW)].concat());
    let work: Vec<(&str, &Kernel)> = [("sm_80", &some), ("sm_90a", &kernels), ("sm_100", &some)]
        .into_iter()
        .flat_map(|(architecture, kernels)| kernels.iter().map(move |kernel| (architecture, kernel)))
        .collect();
    work.into_par_iter().for_each(|(architecture, kernel)| {
        let code = compile(kernel, architecture).unwrap_or_else(|error| panic!("{error:#}"));
        assert_eq!(&code[..4], b"\x7fELF", "{kernel:?} for {architecture}");
    });
}
