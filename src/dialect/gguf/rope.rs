//! Rotary embedding ↔ the `{architecture}.rope.*` keys and tensors of a GGUF file.
//!
//! What llama.cpp makes of them (src/llama-model.cpp, llama-context.cpp and ggml's `rope_yarn`, commit 0c1e57098):
//!
//! | `rope.scaling.type` | angles | factor of cosines and sines |
//! |---|---|---|
//! | `none` | plain | `attn_factor` |
//! | `linear`, or no key | divided by `factor` | `attn_factor` |
//! | `yarn` | YaRN with whole pairs at the ends of its ramp | `attn_factor` · (0.1 · ln(`factor`) + 1) |
//! | `longrope` | divided by the tensor `rope_factors_short` or `rope_factors_long` | `attn_factor` |
//!
//! Architectures that look for the tensor `rope_freqs` divide every angle by its entry: Llama 3 scaling.

use anyhow::{Result, bail, ensure};

use super::keys::Keys;
use crate::container::Storage;
use crate::container::gguf::{Gguf, Metadata, Value};
use crate::model::architecture::Architecture;
use crate::model::config::Family;
use crate::model::rope::{LongRope, RopeParameters, RopeScaling, Yarn};
use crate::names::{Role, TensorId};
use crate::tensor::{Dtype, floats_from_bytes};

/// Sets the keys of heads of `head_dim` values, all but `dimension_count`.
///
/// # Errors
/// Name what llama.cpp cannot do for that architecture.
pub fn write(
    rope: &RopeParameters,
    head_dim: usize,
    architecture: &Architecture,
    out: &mut Metadata,
) -> Result<()> {
    let name = architecture.name;
    let rotary = rope.rotary_dim(head_dim);
    ensure!(
        rotary == head_dim || architecture.partial_rotation,
        "llama.cpp rotates whole heads of `{name}`, not {rotary} of {head_dim} values"
    );
    ensure!(
        tensors(rope, head_dim).is_empty() || architecture.rope_divisors,
        "llama.cpp has no scaling for `{name}` that divides each RoPE frequency on its own; remove the scaling \
         from the source's `config.json`, or try another `--dialect`"
    );
    let mut set = |key: &str, value: Value| out.set(&format!("{name}.rope.{key}"), value);
    set("freq_base", Value::F32(rope.theta));
    let kind = match &rope.scaling {
        RopeScaling::None
        | RopeScaling::Dynamic { .. }
        | RopeScaling::Proportional { .. }
        | RopeScaling::Llama3 { .. }
        | RopeScaling::Divisors(_) => return Ok(()),
        RopeScaling::Linear { factor } => {
            set("scaling.type", "linear".into());
            set("scaling.factor", Value::F32(*factor));
            return Ok(());
        }
        RopeScaling::Yarn(yarn) => {
            set("scaling.factor", Value::F32(yarn.factor));
            set("scaling.original_context_length", Value::U32(u32::try_from(yarn.original_context)?));
            if yarn.beta_fast != BETA_FAST {
                set("scaling.yarn_beta_fast", Value::F32(yarn.beta_fast));
            }
            if yarn.beta_slow != BETA_SLOW {
                set("scaling.yarn_beta_slow", Value::F32(yarn.beta_slow));
            }
            "yarn"
        }
        RopeScaling::LongRope(long) => {
            set("scaling.original_context_length", Value::U32(u32::try_from(long.original_context)?));
            "longrope"
        }
    };
    set("scaling.type", kind.into());
    let share = attention_factor(rope);
    if share != 1.0 {
        set("scaling.attn_factor", Value::F32(share));
    }
    Ok(())
}

/// What llama.cpp takes where YaRN's keys are missing.
const BETA_FAST: f32 = 32.0;
const BETA_SLOW: f32 = 1.0;

/// Returns `attn_factor`: the magnitude beyond what llama.cpp multiplies with anyway.
fn attention_factor(rope: &RopeParameters) -> f32 {
    let (magnitude, own) = (rope.magnitude(), own_magnitude(&rope.scaling));
    let quotient = magnitude / own;
    // A rounded quotient times the divisor is not always the dividend again.
    let near = [quotient, quotient.next_up(), quotient.next_down()];
    near.into_iter().find(|near| near * own == magnitude).unwrap_or(quotient)
}

/// Returns the magnitude that llama.cpp works out itself.
fn own_magnitude(scaling: &RopeScaling) -> f32 {
    match scaling {
        RopeScaling::Yarn(yarn) => Yarn::usual_magnitude(yarn.factor),
        _ => 1.0,
    }
}

/// Returns the tables of divisors that go with the keys, each `[pairs]`.
pub fn tensors(rope: &RopeParameters, head_dim: usize) -> Vec<(TensorId, Vec<f32>)> {
    match &rope.scaling {
        RopeScaling::None
        | RopeScaling::Dynamic { .. }
        | RopeScaling::Linear { .. }
        | RopeScaling::Yarn(_) => Vec::new(),
        RopeScaling::Proportional { .. } | RopeScaling::Llama3 { .. } | RopeScaling::Divisors(_) => {
            // A pair that does not turn has an infinite divisor, which llama.cpp writes as 1e30.
            let divisors = rope.divisors(head_dim).into_iter().map(|divisor| divisor.min(1e30) as f32);
            vec![(TensorId::global(Role::RopeFreqs), divisors.collect())]
        }
        RopeScaling::LongRope(LongRope { short, long, .. }) => vec![
            (TensorId::global(Role::RopeFactorsLong), long.clone()),
            (TensorId::global(Role::RopeFactorsShort), short.clone()),
        ],
    }
}

/// Returns what a file of this configuration makes llama.cpp compute otherwise, one sentence each.
pub fn losses(rope: &RopeParameters, context: usize) -> Vec<String> {
    match &rope.scaling {
        RopeScaling::Dynamic { factor, .. } => vec![format!(
            "RoPE scaling `dynamic` with factor {factor}, which GGUF cannot say, is left out: it acts beyond {context} \
             tokens only"
        )],
        RopeScaling::Yarn(yarn) if !yarn.truncate => vec![
            "YaRN's `truncate` is false, which GGUF cannot say: llama.cpp starts and ends the ramp at whole pairs"
                .to_string(),
        ],
        _ => Vec::new(),
    }
}

/// Returns the rotary embedding of a file's heads of `head_dim` values; `context` is its `context_length`.
///
/// # Errors
/// Name the key that is malformed, unknown or not supported.
pub fn read(file: &Gguf, family: &Family, head_dim: usize, context: usize) -> Result<RopeParameters> {
    let architecture = &family.gguf;
    let keys = Keys::new(&file.metadata, format!("{}.rope.", architecture.name));
    keys.refuse_unknown(&READ, &SILENT)?;
    let rotary = keys.size("dimension_count")?.unwrap_or(head_dim);
    ensure!(
        rotary == head_dim || architecture.partial_rotation && (2..=head_dim).contains(&rotary),
        "GGUF key `{}` is {rotary}, wanted the head size {head_dim}",
        keys.name("dimension_count")
    );
    Ok(RopeParameters {
        theta: keys.float("freq_base")?.unwrap_or(10_000.0),
        share: RopeParameters::share_of(rotary, head_dim),
        pairing: family.pairing(),
        scaling: scaling(file, &keys, context)?,
    })
}

fn scaling(file: &Gguf, keys: &Keys, context: usize) -> Result<RopeScaling> {
    let table = |role| table(file, TensorId::global(role));
    let tables = [Role::RopeFreqs, Role::RopeFactorsLong, Role::RopeFactorsShort].map(table);
    let [divisors, long, short] = tables;
    let (divisors, long, short) = (divisors?, long?, short?);
    let kind = keys.text("scaling.type")?.unwrap_or("linear");
    // The older key is read where the present one is missing. 0 means 1.
    let factor = match keys.float("scaling.factor")? {
        None => keys.float("scale_linear")?.unwrap_or(0.0),
        Some(factor) => factor,
    };
    let factor = if factor == 0.0 || kind == "none" { 1.0 } else { factor };
    let share = keys.float("scaling.attn_factor")?.unwrap_or(1.0);
    let original_context = keys.size("scaling.original_context_length")?.unwrap_or(context);
    let plain = |scaling| {
        ensure!(share == 1.0, "GGUF key `{}` is {share} for type `{kind}`", keys.name("scaling.attn_factor"));
        ensure!(
            long.is_none() && short.is_none(),
            "there is `rope_factors_long` or `rope_factors_short`, but GGUF key `{}` is `{kind}`",
            keys.name("scaling.type")
        );
        Ok(scaling)
    };
    let beside = |what: &str| {
        let name = TensorId::global(Role::RopeFreqs).gguf_name();
        format!("`{name}` together with {what} is not supported")
    };
    match (kind, divisors) {
        ("none" | "linear", Some(divisors)) => {
            ensure!(factor == 1.0, beside(&format!("`{}` {factor}", keys.name("scaling.factor"))));
            plain(RopeScaling::Divisors(divisors))
        }
        ("yarn", None) => Ok(RopeScaling::Yarn(yarn(keys, factor, original_context, share)?)),
        // Phi-3's files have the tables without the type.
        ("longrope" | "none" | "linear", None) if long.is_some() || kind == "longrope" => {
            ensure!(
                factor == 1.0,
                "GGUF key `{}` is {factor} beside `rope_factors_long`",
                keys.name("scaling.factor")
            );
            let (Some(long), Some(short)) = (long, short) else {
                bail!("`rope_factors_long` and `rope_factors_short` are not both there; wanted by LongRoPE");
            };
            Ok(RopeScaling::LongRope(LongRope { short, long, original_context, magnitude: share }))
        }
        ("none" | "linear", None) if factor == 1.0 => plain(RopeScaling::None),
        ("linear", None) => plain(RopeScaling::Linear { factor }),
        ("yarn" | "longrope", Some(_)) => bail!(beside(&format!("type `{kind}`"))),
        (kind, _) => bail!(
            "GGUF key `{}` is `{kind}`; known are `none`, `linear`, `yarn` and `longrope`",
            keys.name("scaling.type")
        ),
    }
}

/// Reads YaRN; `share` multiplies what its cosines and sines are multiplied with by its own rule.
fn yarn(keys: &Keys, factor: f32, original_context: usize, share: f32) -> Result<Yarn> {
    let own = keys.float("scaling.yarn_log_multiplier")?.filter(|&x| x != 0.0);
    let usual = Yarn::usual_magnitude(factor);
    let magnitude = match own {
        None => usual,
        Some(all) => usual / Yarn::magnitude_of(factor as f64, all as f64) as f32,
    };
    Ok(Yarn {
        factor,
        original_context,
        beta_fast: keys.float("scaling.yarn_beta_fast")?.unwrap_or(BETA_FAST),
        beta_slow: keys.float("scaling.yarn_beta_slow")?.unwrap_or(BETA_SLOW),
        truncate: true,
        magnitude: share * magnitude,
    })
}

/// Returns a table of divisors, `None` where the file has none.
fn table(file: &Gguf, id: TensorId) -> Result<Option<Vec<f32>>> {
    let name = id.gguf_name();
    let Some(tensor) = file.tensors.iter().find(|tensor| tensor.spec.name == name) else { return Ok(None) };
    let storage = &tensor.spec.storage;
    ensure!(*storage == Storage::Plain(Dtype::F32), "`{name}` is {storage:?}, wanted F32");
    let bytes = file.files[tensor.file].read(tensor.start, tensor.spec.bytes())?;
    let mut divisors = vec![0.0; bytes.len() / 4];
    floats_from_bytes(Dtype::F32, &bytes, &mut divisors);
    Ok(Some(divisors))
}

/// What [`read`] reads.
const READ: [&str; 10] = [
    "dimension_count",
    "freq_base",
    "scale_linear",
    "scaling.type",
    "scaling.factor",
    "scaling.attn_factor",
    "scaling.original_context_length",
    "scaling.yarn_log_multiplier",
    "scaling.yarn_beta_fast",
    "scaling.yarn_beta_slow",
];

/// What changes no number: whether the model was trained so; the sections of positions of images, of which text has none; what
/// llama.cpp replaces by its own where YaRN acts, and does not look at elsewhere.
const SILENT: [&str; 3] = ["scaling.finetuned", "dimension_sections", "scaling.yarn_attn_factor"];
