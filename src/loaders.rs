//! Who can load an output, and why not: known before the first weight is read.
//!
//! Each dialect has a table; for each loader the first row that applies is the verdict. Facts were read in the source of the versions
//! in [`LOADERS`] or found by running them. Whether a program knows an architecture is not asked here.

use serde_json::{Value, json};

use crate::names::TensorId;
use crate::num::Element;
use crate::scheme::{Activations, Scheme, Span};

/// A planned output.
#[derive(Clone, Copy, Debug)]
pub struct PlannedOutput<'a> {
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
pub struct LoaderVerdict {
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

/// Returns every loader's verdict by a dialect's rows, in the order of [`LOADERS`].
pub fn verdicts(rows: &[Row], output: &PlannedOutput) -> Vec<LoaderVerdict> {
    LOADERS
        .into_iter()
        .map(|(loader, version)| match rows.iter().find(|row| row.0 == loader && (row.1)(output)) {
            Some(&(.., loads, reason)) => LoaderVerdict { loader, version, loads, reason },
            None => LoaderVerdict { loader, version, loads: Loads::Unchecked, reason: "" },
        })
        .collect()
}

/// (loader, condition, verdict, reason); of a dialect's rows the first that applies to an output decides.
pub type Row = (&'static str, fn(&PlannedOutput) -> bool, Loads, &'static str);

/// Why engines that join matrices refuse an output.
pub const FUSED_APART: &str = "it fuses q, k, v and gate, up, and here members of one layer are stored differently; drop \
                           the exception or extend it to all of them";

/// Of every output.
pub fn always(_: &PlannedOutput) -> bool {
    true
}

fn stores(output: &PlannedOutput, test: impl Fn(&Scheme, Activations) -> bool) -> bool {
    output
        .tensors
        .iter()
        .filter_map(|(_, stored)| *stored)
        .any(|(scheme, activations)| test(&scheme, activations))
}

/// Whether it holds MXFP4.
pub fn has_mxfp4(output: &PlannedOutput) -> bool {
    stores(output, |scheme, _| scheme.element == Element::E2M1 && scheme.outer.is_none())
}

/// Whether it holds NVFP4.
pub fn has_nvfp4(output: &PlannedOutput) -> bool {
    stores(output, |scheme, _| scheme.element == Element::E2M1 && scheme.outer.is_some())
}

/// Whether it holds FP8.
pub fn has_fp8(output: &PlannedOutput) -> bool {
    stores(output, |scheme, _| scheme.element == Element::E4M3)
}

/// Whether linears round their inputs to INT8.
pub fn has_w8a8(output: &PlannedOutput) -> bool {
    stores(output, |_, activations| {
        matches!(activations, Activations::Int8PerToken | Activations::Int8PerTensor(()))
    })
}

/// Whether the scales of inputs are fixed.
pub fn has_static(output: &PlannedOutput) -> bool {
    stores(output, |_, activations| activations.is_static())
}

/// Whether integers have groups of a length that kernels do not know.
pub fn odd_group(output: &PlannedOutput) -> bool {
    stores(output, |scheme, _| {
        matches!(scheme.element, Element::Int(_))
            && matches!(scheme.group, Span::Cols(n) if ![32, 64, 128].contains(&n))
    })
}

/// Whether projections that engines join into one matrix are stored differently in some layer.
pub fn fused_apart(output: &PlannedOutput) -> bool {
    let members =
        || output.tensors.iter().map(|(id, stored)| ((id.layer, id.expert, id.role.joined()), stored));
    members().any(|(key, stored)| members().any(|(other, differently)| key == other && stored != differently))
}

impl Loads {
    /// Returns the verdict in a word.
    pub fn word(self) -> &'static str {
        match self {
            Loads::Yes => "yes",
            Loads::If => "if",
            Loads::No => "no",
            Loads::Unchecked => "unchecked",
        }
    }
}

impl LoaderVerdict {
    /// Returns what reports say of it.
    pub fn to_json(&self) -> Value {
        json!({"loader": self.loader, "version": self.version, "loads": self.loads.word(), "reason": self.reason})
    }
}

#[cfg(test)]
mod tests {
    use super::Loads::{If, No, Yes};
    use super::*;
    use crate::dialect::{self, DIALECTS};
    use crate::names::Role;
    use crate::scheme::schemes::{INT8, MXFP4, Q4_K, int8_grouped};

    fn layer(scheme: Scheme, activations: Activations) -> Vec<(TensorId, Option<(Scheme, Activations)>)> {
        [Role::Q, Role::K, Role::V, Role::O, Role::Gate, Role::Up, Role::Down]
            .map(|role| (TensorId::in_layer(3, role), Some((scheme, activations))))
            .into()
    }

    const CT: &str = "compressed-tensors";
    const GGUF: &str = "gguf";

    fn verdict(
        dialect: &str,
        loader: &str,
        tensors: &[(TensorId, Option<(Scheme, Activations)>)],
    ) -> LoaderVerdict {
        let all = verdicts(dialect::by_name(dialect).unwrap().loaders(), &PlannedOutput { tensors });
        all.into_iter().find(|verdict| verdict.loader == loader).unwrap()
    }

    #[test]
    fn every_loader_has_a_last_word_on_every_dialect() {
        for dialect in DIALECTS {
            for (loader, _) in LOADERS {
                let rows: Vec<_> = dialect.loaders().iter().filter(|row| row.0 == loader).collect();
                let last = rows.last().unwrap_or_else(|| panic!("{loader} on {}", dialect.name()));
                // The default applies to an output that nothing else describes.
                assert!((last.1)(&PlannedOutput { tensors: &[] }), "{loader} on {}", dialect.name());
                assert!(rows.iter().all(|row| !row.3.is_empty()));
            }
            let known = |loader| LOADERS.iter().any(|(name, _)| *name == loader);
            assert!(dialect.loaders().iter().all(|row| known(row.0)));
        }
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
