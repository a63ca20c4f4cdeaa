//! `quant sensitivity`: what each tensor costs.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::measure::{self, Request, WithBackend};
use super::{ModelRef, Status};
use crate::checkpoint::Checkpoint;
use crate::cli::{GroupArg, SensitivityArgs};
use crate::convert::{self, SharedFactors};
use crate::eval::sensitivity::{self, Group, Sensitivity, TensorGroup};
use crate::eval::{Metric, Report};
use crate::generate::Generate;
use crate::method::solve;
use crate::model::Model;
use crate::names::{Role, TensorId};
use crate::output::{self, Printer, Unit};
use crate::plan::{Action, Plan, Step};
use crate::recipe::Recipe;
use crate::report;
use crate::scheme::Activations;
use crate::tensor::{Matrix, first_non_finite};

/// Windows that are measured unless told otherwise: every group runs through all of them.
const DEFAULT_WINDOWS: u32 = 16;

/// Quantizes one group at a time and ranks them.
pub fn run(args: &SensitivityArgs, printer: Printer) -> Result<Status> {
    output::check_reports(
        [&args.json, &args.csv, &args.html].into_iter().filter_map(|file| file.as_deref()),
    )?;
    let model = ModelRef::resolve(args.model.as_deref(), args.source.revision.as_deref(), printer)?;
    let source = model.open(printer)?;
    let recipe = Recipe::new(&args.format, args.dialect.as_deref(), args.group_size)?;
    let plan = Plan::new(&source, &recipe)?;
    let groups = groups(&plan, args.by);
    ensure!(!groups.is_empty(), "`--format {}` quantizes nothing of this model", args.format);
    let mut protocol = args.protocol.clone();
    protocol.windows.get_or_insert(DEFAULT_WINDOWS);
    let request = Request::new(&protocol, &args.source.device, &source)?;
    let mut found = measure::on_device(
        &request,
        printer,
        Trial { request: &request, source: &source, plan: &plan, groups: &groups, printer },
    )?;
    found.model = model.name;
    found.rank();
    write(args, found, printer)?;
    Ok(Status::Ok)
}

/// What runs on whichever device there is.
struct Trial<'a> {
    request: &'a Request,
    source: &'a Checkpoint,
    plan: &'a Plan,
    groups: &'a [(Key, Vec<&'a Step>)],
    printer: Printer,
}

impl WithBackend for Trial<'_> {
    type Output = Sensitivity;

    fn run<B: Generate>(self, backend: &B) -> Result<Sensitivity> {
        let Trial { request, source, plan, groups, printer } = self;
        let text = request.text();
        let mut model = Model::load(backend, &source.config, source)
            .with_context(|| format!("{}", source.path.display()))?;
        let tensors: Vec<Group> = groups
            .iter()
            .map(|(_, steps)| Group { tensors: steps.iter().map(|step| step.id).collect() })
            .collect();
        let bar = printer.bar(groups.len() as u64, "measuring", Unit::Count);
        let factors = convert::shared_factors(source, plan.steps.iter())?;
        let quantized = |id| quantized(source, plan, &factors, id);
        let klds = sensitivity::run(backend, &mut model, text, &tensors, &quantized, &|| bar.inc(1))?;
        bar.finish_and_clear();
        let groups = groups.iter().zip(klds).map(|((key, steps), kld)| {
            let weights = steps.iter().map(|step| (step.rows() * step.cols()) as u64).sum();
            let bytes_saved = steps.iter().map(|step| bytes_saved(source, plan, step)).sum();
            let mut schemes: Vec<String> = steps.iter().map(|step| step.action.name()).collect();
            schemes.sort();
            schemes.dedup();
            TensorGroup {
                name: key.name(),
                role: key.role_name(),
                layer: key.layer.map(usize::from),
                scheme: schemes.join(", "),
                weights,
                bytes_saved,
                kld,
                kld_per_megabyte: kld.value / (bytes_saved.max(1) as f64 / 1e6),
            }
        });
        Ok(Sensitivity {
            model: String::new(),
            format: plan.recipe.format.name.to_string(),
            protocol: text.protocol.clone(),
            groups: groups.collect(),
        })
    }
}

/// What the tensors of a group have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    layer: Option<u16>,
    role: Option<Role>,
}

impl Key {
    fn role_name(&self) -> String {
        self.role.map_or("all".to_string(), |role| format!("{role:?}").to_lowercase())
    }

    fn name(&self) -> String {
        match self.layer {
            Some(layer) => format!("layer {layer} {}", self.role_name()),
            None => self.role_name(),
        }
    }
}

/// Returns the quantized matrices of a plan in groups.
fn groups(plan: &Plan, by: GroupArg) -> Vec<(Key, Vec<&Step>)> {
    let mut groups: BTreeMap<Key, Vec<&Step>> = BTreeMap::new();
    for step in plan.steps.iter().filter(|step| matches!(step.action, Action::Quantize(_))) {
        let TensorId { layer, role, .. } = step.id;
        let key = match by {
            GroupArg::Tensor => Key { layer, role: Some(role) },
            GroupArg::Role => Key { layer: None, role: Some(role) },
            GroupArg::Layer => Key { layer, role: layer.is_none().then_some(role) },
        };
        groups.entry(key).or_default().push(step);
    }
    groups.into_iter().collect()
}

fn bytes_saved(source: &Checkpoint, plan: &Plan, step: &Step) -> u64 {
    let before = source.tensors.get(&step.id).map_or(0, |info| info.bytes);
    let after: u64 = plan.outputs[step.parts.clone()].iter().map(|output| output.spec.bytes()).sum();
    before.saturating_sub(after)
}

/// Returns a tensor rounded to nearest in the scheme its plan gives it.
fn quantized(
    source: &Checkpoint,
    plan: &Plan,
    factors: &SharedFactors,
    id: TensorId,
) -> Result<(Matrix, Activations<f32>)> {
    let step = plan.steps.iter().find(|step| step.id == id);
    let Some(&Step { action: Action::Quantize(scheme), inputs, .. }) = step else {
        anyhow::bail!("`{id}` is not quantized by the plan");
    };
    let matrix = source.read(id)?;
    let weights = matrix.to_f32();
    if let Some(at) = first_non_finite(&weights) {
        anyhow::bail!("{}: `{id}`: found {}, wanted finite weights", source.path.display(), weights[at]);
    }
    let (cols, rule) = (matrix.dims()[1], plan.recipe.scale_rule);
    let q = solve::fit_target(&weights, cols, scheme, factors.of(id), None, rule);
    let rounding = inputs.with_scale(|| {
        anyhow::bail!(
            "`{}` has scales that only calibration finds, which this command does without; use `--format int8-w8a8`",
            plan.recipe.format.name
        )
    })?;
    Ok((Matrix::Quantized(q), rounding))
}

/// Prints the ranking and writes what was asked for.
fn write(args: &SensitivityArgs, found: Sensitivity, printer: Printer) -> Result<()> {
    if let Some(file) = &args.json {
        output::write_report(file, &format!("{}\n", serde_json::to_string_pretty(&found)?), printer)?;
    }
    if let Some(file) = &args.csv {
        output::write_report(file, &csv(&found)?, printer)?;
    }
    let stdout = Some(Path::new("-"));
    if args.json.as_deref() != stdout && args.csv.as_deref() != stdout && args.html.as_deref() != stdout {
        printer.result(&table(&found))?;
    }
    if let Some(file) = &args.html {
        let report = Report { sensitivity: Some(found.clone()), ..Report::new(found.protocol, Vec::new()) };
        output::write_report(file, &report::html(&report)?, printer)?;
    }
    Ok(())
}

fn table(found: &Sensitivity) -> String {
    let mut table = output::table(["tensors", "scheme", "saves", "KLD", "95 % interval", "KLD per MB saved"]);
    output::right_align(&mut table, 2);
    for group in &found.groups {
        let show = |value| Metric::Kld.show(value);
        table.add_row([
            group.name.clone(),
            group.scheme.clone(),
            output::size(group.bytes_saved),
            show(group.kld.value),
            group.kld.interval.map_or("–".into(), |[low, high]| format!("{} to {}", show(low), show(high))),
            format!("{:.5}", group.kld_per_megabyte),
        ]);
    }
    let protocol = &found.protocol;
    format!(
        "{table}\n\nprotocol {}: {} windows of {} tokens, text sha256 {}…; one group at a time, codes rounded to nearest\n",
        protocol.name,
        protocol.windows,
        protocol.n_ctx,
        &protocol.text_sha256[..12]
    )
}

fn csv(found: &Sensitivity) -> Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    writer.write_record([
        "name",
        "role",
        "layer",
        "scheme",
        "weights",
        "bytes_saved",
        "kld",
        "kld_low",
        "kld_high",
        "kld_per_megabyte",
    ])?;
    for group in &found.groups {
        let bound = |at: usize| group.kld.interval.map_or(String::new(), |interval| interval[at].to_string());
        writer.write_record([
            group.name.clone(),
            group.role.clone(),
            group.layer.map_or(String::new(), |layer| layer.to_string()),
            group.scheme.clone(),
            group.weights.to_string(),
            group.bytes_saved.to_string(),
            group.kld.value.to_string(),
            bound(0),
            bound(1),
            group.kld_per_megabyte.to_string(),
        ])?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::Artifact;
    use crate::backend::cpu::Cpu;
    use crate::container::Opening;
    use crate::embedded;
    use crate::eval::{Protocol, Scored, Text};

    fn open() -> Checkpoint {
        Checkpoint::open(&embedded::model_folder().unwrap()).unwrap()
    }

    fn plan(source: &Checkpoint, format: &str) -> Plan {
        Plan::new(source, &Recipe::new(format, None, None).unwrap()).unwrap()
    }

    #[test]
    fn what_is_tried_of_a_tensor_is_what_a_conversion_writes() {
        let (source, folder) = (open(), tempfile::tempdir().unwrap());
        for format in ["nvfp4", "q3_k_m"] {
            let (plan, out) = (plan(&source, format), folder.path().join(format).with_extension("gguf"));
            let artifact = Artifact::new(&plan, &source, "model", &[], u64::MAX).unwrap();
            let sink = artifact.create(&out, Opening::default()).unwrap();
            convert::convert(&source, &plan, sink.as_ref(), None, &[], &|_| ()).unwrap();
            sink.finish().unwrap();
            let written = Checkpoint::open(&out).unwrap();
            let factors = convert::shared_factors(&source, plan.steps.iter()).unwrap();
            for step in plan.steps.iter().filter(|step| matches!(step.action, Action::Quantize(_))) {
                let (tried, _) = quantized(&source, &plan, &factors, step.id).unwrap();
                let written = written.read(step.id).unwrap();
                assert!(tried.to_f32() == written.to_f32(), "{format}: {}", step.id);
            }
        }
    }

    #[test]
    fn formats_rank_as_their_grids_do() {
        let source = open();
        let tokens = source.tokenizer().unwrap().encode(&embedded::EVAL_TEXT[..4096], false).unwrap();
        let protocol = Protocol::new(Scored::All, 64, Some(8), "text", &tokens, None).unwrap();
        let text = Text { name: "text".into(), tokens, protocol };
        let mut model = Model::load(&Cpu, &source.config, &source).unwrap();
        // One group of a middle layer whose inner width each format divides.
        let group =
            Group { tensors: [Role::Q, Role::K, Role::V].map(|role| TensorId::in_layer(2, role)).into() };
        let mut kld = |format| {
            let plan = plan(&source, format);
            let factors = convert::shared_factors(&source, plan.steps.iter()).unwrap();
            let quantized = |id| quantized(&source, &plan, &factors, id);
            let groups = std::slice::from_ref(&group);
            sensitivity::run(&Cpu, &mut model, &text, groups, &quantized, &|| ()).unwrap()[0].value
        };
        let klds = ["q8_0", "q6_k", "nvfp4", "mxfp4"].map(&mut kld);
        // Half the block and a scale of three more bits take a third off the error; two bits of code a factor of 16.
        assert!(klds.is_sorted(), "{klds:?}");
        assert!(klds[0] > 0.0 && klds[1] < 0.3 * klds[2] && klds[2] < 0.9 * klds[3], "{klds:?}");
    }
}
