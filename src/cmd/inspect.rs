//! `quant inspect`: what a model holds.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use super::{ModelRef, Status};
use crate::checkpoint::{Checkpoint, Stored, TensorInfo};
use crate::cli::InspectArgs;
use crate::output::{self, Printer};

/// Prints tensors, schemes, bits per weight and sizes.
pub fn run(args: &InspectArgs, printer: Printer) -> Result<Status> {
    output::check_reports(args.json.as_deref())?;
    let model = ModelRef::resolve(args.model.as_deref(), args.revision.as_deref(), printer)?;
    let checkpoint = model.open(printer)?;
    if let Some(file) = &args.json {
        output::write_report(file, &format!("{:#}\n", describe(&checkpoint)), printer)?;
    }
    if args.json.as_deref() != Some(Path::new("-")) {
        printer.result(&summary(&checkpoint))?;
    }
    Ok(Status::Ok)
}

fn summary(checkpoint: &Checkpoint) -> String {
    let mut table = output::table(["tensor", "shape", "stored as", "bits/weight", "bytes"]);
    output::right_align(&mut table, 3);
    for (id, info) in &checkpoint.tensors {
        table.add_row([
            id.to_string(),
            shape(info),
            stored(info),
            format!("{:.3}", bits_per_weight(info)),
            info.bytes.to_string(),
        ]);
    }
    let config = &checkpoint.config;
    let kinds: Vec<_> = by_kind(checkpoint)
        .into_iter()
        .map(|(kind, (count, bytes))| format!("{kind}: {count} tensors, {}", output::size(bytes)))
        .collect();
    format!(
        "{table}\n\n{}: {}, {} layers, hidden {}, vocabulary {}, {:.2} M weights, {}, {:.3} bits per weight\n{}\n",
        checkpoint.path.display(),
        config.family.class,
        config.num_hidden_layers,
        config.hidden_size,
        config.vocab_size,
        checkpoint.total_weights() as f64 / 1e6,
        output::size(checkpoint.total_bytes()),
        checkpoint.bits_per_weight(),
        kinds.join("; "),
    )
}

fn describe(checkpoint: &Checkpoint) -> Value {
    let tensors: Vec<_> = checkpoint
        .tensors
        .iter()
        .map(|(id, info)| {
            let mut json = json!({
                "name": id.to_string(), "shape": info.shape, "stored": stored(info), "bytes": info.bytes,
                "bits_per_weight": bits_per_weight(info),
            });
            if let Some(scale) = info.rounding.scale() {
                json["input_scale"] = json!(scale);
            }
            json
        })
        .collect();
    json!({
        "model": checkpoint.path, "architecture": checkpoint.config.family.class,
        "layers": checkpoint.config.num_hidden_layers, "weights": checkpoint.total_weights(),
        "bytes": checkpoint.total_bytes(),
        "bits_per_weight": checkpoint.bits_per_weight(),
        "tensors": tensors,
    })
}

/// Tensor count and bytes of each way of storing.
fn by_kind(checkpoint: &Checkpoint) -> BTreeMap<String, (usize, u64)> {
    let mut kinds = BTreeMap::new();
    for info in checkpoint.tensors.values() {
        let (count, bytes) = kinds.entry(stored(info)).or_insert((0, 0));
        *count += 1;
        *bytes += info.bytes;
    }
    kinds
}

fn stored(info: &TensorInfo) -> String {
    match info.stored {
        Stored::Dense(dtype) => dtype.to_string().to_lowercase(),
        Stored::Quantized(scheme, _) => scheme.name.to_string(),
    }
}

fn shape(info: &TensorInfo) -> String {
    info.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" × ")
}

fn bits_per_weight(info: &TensorInfo) -> f64 {
    info.bytes as f64 * 8.0 / info.weights().max(1) as f64
}
