//! `quant completions`: a script that teaches a shell our flags.

use anyhow::Result;
use clap::CommandFactory;

use super::Status;
use crate::cli::{Cli, CompletionsArgs};
use crate::output::Printer;

/// Prints the script.
pub fn run(args: &CompletionsArgs, printer: Printer) -> Result<Status> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "quant", &mut script);
    printer.result(&String::from_utf8_lossy(&script))?;
    Ok(Status::Ok)
}
