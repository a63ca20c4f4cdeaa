//! `quant calibrate`: a model's importance matrix, for llama-quantize or `quant convert --imatrix`.

use std::path::PathBuf;

use anyhow::Result;

use super::calibration::Windows;
use super::{ModelRef, Status};
use crate::backend::cpu::Cpu;
use crate::calib::imatrix::Imatrix;
use crate::calib::importance::mean_squares;
use crate::cli::CalibrateArgs;
use crate::container::apart::ensure_apart;
use crate::container::output::check_file;
use crate::output::{Printer, Unit};

/// Runs the text through the model and writes the file.
pub fn run(args: &CalibrateArgs, printer: Printer) -> Result<Status> {
    check_file(&args.out, args.force)?;
    let model = ModelRef::resolve(args.model.as_deref(), args.revision.as_deref(), printer)?;
    let source = model.open(printer)?;
    ensure_apart(&args.out, source.read_files()?.iter().map(PathBuf::as_path))?;
    let windows = Windows::new(&args.calibration, &source, printer)?;
    let bar = printer.bar(source.config.num_hidden_layers as u64, "calibrate", Unit::Count);
    let importances = mean_squares(&Cpu, &source.config, &source, windows.tokens(), &|| bar.inc(1))?;
    bar.finish_and_clear();
    let record = windows.record();
    let imatrix = Imatrix {
        datasets: vec![record.name],
        chunks: record.windows as u32,
        chunk_size: record.n_ctx as u32,
        importances,
    };
    imatrix.write(&args.out, args.force)?;
    printer.result(&format!("wrote {}", args.out.display()))?;
    Ok(Status::Ok)
}
