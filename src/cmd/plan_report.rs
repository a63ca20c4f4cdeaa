//! What `--dry-run` prints: every tensor, the exact size, what does not fit, the memory, and who can load the result.

use serde_json::{Value, json};

use crate::artifact;
use crate::convert;
use crate::loaders::{self, LoaderVerdict};
use crate::output;
use crate::plan::{Plan, Step};

/// Returns the plan as a table for people. `bytes` is the size of everything that will be written.
pub fn text(plan: &Plan, out: &str, bytes: u64) -> String {
    let recipe = &plan.recipe;
    let mut tensors = output::table(["tensor", "shape", "becomes", "bits/weight", "bytes"]);
    output::right_align(&mut tensors, 3);
    for step in &plan.steps {
        let stored = step_bytes(plan, step);
        let weights = (step.rows() * step.cols()).max(1);
        tensors.add_row([
            step.id.to_string(),
            step.shape.iter().map(usize::to_string).collect::<Vec<_>>().join(" × "),
            step.action.name(),
            format!("{:.3}", stored as f64 * 8.0 / weights as f64),
            stored.to_string(),
        ]);
    }
    let mut loads = output::table(["loader", "version", "loads", "why"]);
    for verdict in verdicts(plan) {
        loads.add_row([verdict.loader, verdict.version, verdict.loads.word(), verdict.reason]);
    }
    let fallbacks: String =
        plan.fallbacks().map(|(step, reason)| format!("  {}: {reason}\n", step.id)).collect();
    let fallbacks = if fallbacks.is_empty() { "  none\n".to_string() } else { fallbacks };
    let losses: String = plan.losses.iter().map(|loss| format!("not kept: {loss}\n\n")).collect();
    format!(
        "{out}: {} for {}, method {}\n\n{tensors}\n\nfallbacks:\n{fallbacks}\n{losses}size: {bytes} bytes ({}), {:.3} bits per weight\n\
         memory: about {} beside the program\n\n{loads}\n",
        recipe.format.name,
        recipe.dialect.name(),
        recipe.method,
        output::size(bytes),
        plan.payload_bytes() as f64 * 8.0 / plan.weights().max(1) as f64,
        output::size(convert::peak_bytes(plan, rayon::current_num_threads())),
    )
}

/// Returns the same as JSON.
pub fn json(plan: &Plan, out: &str, bytes: u64) -> Value {
    let recipe = &plan.recipe;
    let tensors: Vec<_> = plan
        .steps
        .iter()
        .map(|step| {
            json!({
                "name": step.id.to_string(), "shape": step.shape, "stored": step.action.name(),
                "bytes": step_bytes(plan, step), "fallback": step.fallback,
            })
        })
        .collect();
    let loaders: Vec<_> = verdicts(plan).iter().map(LoaderVerdict::to_json).collect();
    json!({
        "out": out, "format": recipe.format.name, "dialect": recipe.dialect.name(), "method": recipe.method.to_string(),
        "bytes": bytes, "bits_per_weight": plan.payload_bytes() as f64 * 8.0 / plan.weights().max(1) as f64,
        "peak_memory_bytes": convert::peak_bytes(plan, rayon::current_num_threads()),
        "fallbacks": plan.fallbacks().count(), "losses": plan.losses, "tensors": tensors, "loaders": loaders,
    })
}

fn verdicts(plan: &Plan) -> Vec<LoaderVerdict> {
    let tensors = artifact::matrices(plan);
    loaders::verdicts(plan.recipe.dialect.loaders(), &loaders::PlannedOutput { tensors: &tensors })
}

fn step_bytes(plan: &Plan, step: &Step) -> u64 {
    plan.outputs[step.parts.clone()].iter().map(|output| output.spec.bytes()).sum()
}
