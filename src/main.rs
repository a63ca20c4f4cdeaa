//! The `quant` command: parse, run, print the error chain, set the exit status.

use std::io;
use std::process::ExitCode;

use clap::Parser;
use quant::cli::Cli;
use quant::cmd::{self, Status};

/// A quality gate failed: the run worked, the answer is no.
const GATE_FAILED: u8 = 1;
/// Bad usage or input; clap uses the same number for flags it does not know.
const BAD_INPUT: u8 = 2;

/// Keeps freed memory for the next window of activations: page faults of an evaluation fell from 109,000 to 4,000, its
/// processor time by 3 to 6 %.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    match cmd::run(Cli::parse()) {
        Ok(Status::Ok) => ExitCode::SUCCESS,
        Ok(Status::GateFailed) => ExitCode::from(GATE_FAILED),
        // Whoever read our output has what they wanted (`quant inspect | head`).
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(BAD_INPUT)
        }
    }
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe))
}
