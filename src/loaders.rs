//! Who can load an output, and why not: known before the first weight is read.
//!
//! One table; for each loader the first row that applies is the verdict. Facts were read in the source of the versions
//! in [`LOADERS`] or found by running them. The four architectures this project reads are known to all of them.

use std::fmt;

use crate::names::TensorId;
use crate::num::Element;
use crate::scheme::{Activations, Scheme, Span};

/// A planned output.
#[derive(Clone, Copy, Debug)]
pub struct Output<'a> {
    /// Name of its dialect.
    pub dialect: &'a str,
    /// Every matrix with what it becomes, `None` if it is kept.
    pub tensors: &'a [(TensorId, Option<(Scheme, Activations)>)],
}

/// Whether a program loads an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loads {
    /// As it is.
    Yes,
    /// If the condition named in the reason holds.
    If,
    /// Not at all.
    No,
    /// Nobody has looked.
    Unchecked,
}

/// One program's verdict on an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The program.
    pub loader: &'static str,
    /// The version it was checked with.
    pub version: &'static str,
    /// The verdict.
    pub loads: Loads,
    /// Why, on what hardware, or what to do instead.
    pub reason: &'static str,
}

/// Programs and the versions whose behaviour the table describes.
pub const LOADERS: [(&str, &str); 7] = [
    ("vLLM", "0.32.0"),
    ("SGLang", "0.5.23"),
    ("transformers", "5.17.0"),
    ("llama.cpp", "0c1e57098"),
    ("Ollama", "0.33.0-rc2"),
    ("LM Studio", "with llama.cpp 0c1e57098"),
    ("MLX", "mlx-lm 0.32.2"),
];

/// Returns every loader's verdict, in the order of [`LOADERS`].
pub fn verdicts(output: &Output) -> Vec<Verdict> {
    LOADERS
        .into_iter()
        .map(|(loader, version)| {
            let applies = |row: &&Row| row.0 == output.dialect && row.1 == loader && (row.2)(output);
            match ROWS.iter().find(applies) {
                Some(&(.., loads, reason)) => Verdict { loader, version, loads, reason },
                None => Verdict { loader, version, loads: Loads::Unchecked, reason: "" },
            }
        })
        .collect()
}

/// (dialect, loader, condition, verdict, reason)
type Row = (&'static str, &'static str, fn(&Output) -> bool, Loads, &'static str);

const CT: &str = "compressed-tensors";
const GGUF: &str = "gguf";
const FUSED_APART: &str = "it fuses q, k, v and gate, up, and here members of one layer are stored differently; drop \
                           the exception or extend it to all of them";

use Loads::{If, No, Unchecked, Yes};

const ROWS: &[Row] = &[
    (CT, "vLLM", fused_apart, No, FUSED_APART),
    (CT, "vLLM", odd_group, No, "its 8-bit kernels know groups of 32, 64 and 128 columns, and whole rows"),
    (
        CT,
        "vLLM",
        has_mxfp4,
        If,
        "GPU of compute capability 8.0 or later, `--dtype bfloat16` (float16 loses small scales); from 10.0 on inputs \
         are quantized to 4 bits too unless VLLM_DISABLED_KERNELS=FlashInferMxFp4LinearKernel; not on CPUs",
    ),
    (
        CT,
        "vLLM",
        has_nvfp4,
        If,
        "GPU of compute capability 7.5 or later: unpacked as it multiplies (Marlin); not on CPUs",
    ),
    (
        CT,
        "vLLM",
        has_fp8,
        If,
        "CPU, or GPU of compute capability 7.5 or later; below 8.9 inputs stay in 16 bits",
    ),
    (
        CT,
        "vLLM",
        has_w8a8,
        If,
        "CPU, or GPU of compute capability 7.5 to 9.0; from 10.0 on it fails unless \
         VLLM_DISABLED_KERNELS=CutlassInt8ScaledMMLinearKernel",
    ),
    (CT, "vLLM", always, If, "GPU of compute capability 7.5 or later; not on CPUs"),
    (
        CT,
        "SGLang",
        has_mxfp4,
        No,
        "it has no dense MXFP4 in compressed-tensors; use `--format int8` or int8-w8a8",
    ),
    (CT, "SGLang", fused_apart, No, FUSED_APART),
    (CT, "SGLang", has_fp8, If, "GPU of compute capability 8.9 or later"),
    (
        CT,
        "SGLang",
        has_static,
        If,
        "GPU of compute capability 8.0 or later; it passes over the fixed scales of inputs and finds one per token",
    ),
    (CT, "SGLang", always, If, "GPU of compute capability 8.0 or later"),
    (
        CT,
        "transformers",
        always,
        Yes,
        "with compressed-tensors 0.15 or later; unpacked to BF16 on the first forward pass",
    ),
    (CT, "llama.cpp", always, No, "it reads GGUF; use `--dialect gguf` or a GGUF format"),
    (
        CT,
        "Ollama",
        always,
        No,
        "of safetensors it imports only unquantized ones; use `--dialect gguf` or a GGUF format",
    ),
    (CT, "LM Studio", always, No, "it reads GGUF and MLX; use `--dialect gguf` or a GGUF format"),
    (CT, "MLX", always, No, "mlx-lm renames packed weights only for three mixture-of-experts models"),
    (GGUF, "vLLM", always, Unchecked, "its GGUF loader was not checked; use a compressed-tensors format"),
    (GGUF, "SGLang", always, Unchecked, "its GGUF loader was not checked; use a compressed-tensors format"),
    (
        GGUF,
        "transformers",
        always,
        Unchecked,
        "its GGUF loader was not checked; use a compressed-tensors format",
    ),
    (GGUF, "llama.cpp", has_mxfp4, If, "builds since August 2025, which know the MXFP4 type"),
    (GGUF, "llama.cpp", always, Yes, "`llama-cli -m FILE`"),
    (
        GGUF,
        "Ollama",
        has_mxfp4,
        If,
        "a version whose llama.cpp knows the MXFP4 type; `FROM ./FILE` in a Modelfile",
    ),
    (GGUF, "Ollama", always, Yes, "`FROM ./FILE` in a Modelfile, then `ollama create NAME -f Modelfile`"),
    (GGUF, "LM Studio", has_mxfp4, If, "an engine whose llama.cpp knows the MXFP4 type; `lms import FILE`"),
    (GGUF, "LM Studio", always, Yes, "`lms import FILE`"),
    (GGUF, "MLX", always, No, "mlx-lm loads folders of safetensors in its own layout"),
];

fn always(_: &Output) -> bool {
    true
}

fn stores(output: &Output, test: impl Fn(&Scheme, Activations) -> bool) -> bool {
    output
        .tensors
        .iter()
        .filter_map(|(_, stored)| *stored)
        .any(|(scheme, activations)| test(&scheme, activations))
}

fn has_mxfp4(output: &Output) -> bool {
    stores(output, |scheme, _| scheme.element == Element::E2M1 && scheme.outer.is_none())
}

fn has_nvfp4(output: &Output) -> bool {
    stores(output, |scheme, _| scheme.element == Element::E2M1 && scheme.outer.is_some())
}

fn has_fp8(output: &Output) -> bool {
    stores(output, |scheme, _| scheme.element == Element::E4M3)
}

fn has_w8a8(output: &Output) -> bool {
    stores(output, |_, activations| {
        matches!(activations, Activations::Int8PerToken | Activations::Int8PerTensor(()))
    })
}

fn has_static(output: &Output) -> bool {
    stores(output, |_, activations| activations.is_static())
}

fn odd_group(output: &Output) -> bool {
    stores(output, |scheme, _| {
        matches!(scheme.element, Element::Int(_))
            && matches!(scheme.group, Span::Cols(n) if ![32, 64, 128].contains(&n))
    })
}

/// Whether projections that engines join into one matrix are stored differently in some layer.
fn fused_apart(output: &Output) -> bool {
    let members =
        || output.tensors.iter().map(|(id, stored)| ((id.layer, id.expert, id.role.joined()), stored));
    members().any(|(key, stored)| members().any(|(other, differently)| key == other && stored != differently))
}

/// What plans print.
impl fmt::Display for Loads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Loads::Yes => "yes",
            Loads::If => "if",
            Loads::No => "no",
            Loads::Unchecked => "unchecked",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::Role;
    use crate::scheme::schemes::{INT8, MXFP4, Q4_K, int8_grouped};

    fn layer(scheme: Scheme, activations: Activations) -> Vec<(TensorId, Option<(Scheme, Activations)>)> {
        [Role::Q, Role::K, Role::V, Role::O, Role::Gate, Role::Up, Role::Down]
            .map(|role| (TensorId::in_layer(3, role), Some((scheme, activations))))
            .into()
    }

    fn verdict(
        dialect: &str,
        loader: &str,
        tensors: &[(TensorId, Option<(Scheme, Activations)>)],
    ) -> Verdict {
        let all = verdicts(&Output { dialect, tensors });
        all.into_iter().find(|verdict| verdict.loader == loader).unwrap()
    }

    #[test]
    fn every_loader_has_a_last_word_on_every_dialect() {
        for dialect in [CT, GGUF] {
            for (loader, _) in LOADERS {
                let rows: Vec<_> = ROWS.iter().filter(|row| row.0 == dialect && row.1 == loader).collect();
                let last = rows.last().unwrap_or_else(|| panic!("{loader} on {dialect}"));
                // The default applies to an output that nothing else describes.
                assert!((last.2)(&Output { dialect, tensors: &[] }), "{loader} on {dialect}");
                assert!(rows.iter().all(|row| !row.4.is_empty()));
            }
        }
        let known = |loader| LOADERS.iter().any(|(name, _)| *name == loader);
        assert!(ROWS.iter().all(|row| known(row.1) && crate::dialect::by_name(row.0).is_some()));
    }

    #[test]
    fn engines_say_what_the_format_notes_say() {
        let mxfp4 = layer(MXFP4, Activations::Full);
        let int8 = layer(INT8, Activations::Full);
        let w8a8 = layer(INT8, Activations::Int8PerToken);
        let fixed = layer(INT8, Activations::Int8PerTensor(()));
        let q4_k = layer(Q4_K, Activations::Full);
        for (dialect, loader, tensors, loads, mentions) in [
            (CT, "vLLM", &mxfp4, If, "8.0"),
            (CT, "vLLM", &w8a8, If, "CutlassInt8"),
            (CT, "vLLM", &fixed, If, "CutlassInt8"),
            (CT, "SGLang", &fixed, If, "per token"),
            (CT, "vLLM", &int8, If, "not on CPUs"),
            (CT, "SGLang", &mxfp4, No, "dense MXFP4"),
            (CT, "SGLang", &w8a8, If, "8.0"),
            (CT, "transformers", &mxfp4, Yes, "0.15"),
            (CT, "llama.cpp", &int8, No, "gguf"),
            (CT, "MLX", &int8, No, "mlx-lm"),
            (GGUF, "llama.cpp", &q4_k, Yes, "llama-cli"),
            (GGUF, "llama.cpp", &mxfp4, If, "2025"),
            (GGUF, "Ollama", &q4_k, Yes, "Modelfile"),
            (GGUF, "MLX", &q4_k, No, "layout"),
        ] {
            let verdict = verdict(dialect, loader, tensors);
            assert_eq!(verdict.loads, loads, "{dialect} {loader}");
            assert!(verdict.reason.contains(mentions), "{}", verdict.reason);
        }
    }

    #[test]
    fn members_of_a_fused_matrix_must_be_stored_alike() {
        for (role, split) in [(Role::K, true), (Role::Up, true), (Role::Down, false), (Role::O, false)] {
            let mut tensors = layer(INT8, Activations::Full);
            tensors.iter_mut().find(|(id, _)| id.role == role).unwrap().1 = None;
            assert_eq!(verdict(CT, "vLLM", &tensors).loads == No, split, "{role:?}");
            assert_eq!(verdict(CT, "transformers", &tensors).loads, Yes);
        }
    }

    #[test]
    fn groups_without_a_kernel_are_named() {
        assert_eq!(verdict(CT, "vLLM", &layer(int8_grouped(128), Activations::Full)).loads, If);
        assert_eq!(verdict(CT, "vLLM", &layer(int8_grouped(96), Activations::Full)).loads, No);
    }
}
