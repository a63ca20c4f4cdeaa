//! The GPU that tests run on, where there is one.

use std::io::Write;

use quant::backend::cuda::{Cuda, Precision};

/// Opens the GPU, or says why the test is skipped. Panics instead where `QUANT_REQUIRE_GPU` is set.
pub fn gpu(precision: Precision) -> Option<Cuda> {
    match Cuda::new(0, precision) {
        Ok(cuda) => Some(cuda),
        Err(reason) if std::env::var_os("QUANT_REQUIRE_GPU").is_none() => {
            // Not `eprintln!`, which the test harness keeps to itself when a test passes.
            let test = std::thread::current().name().unwrap_or("a test").to_string();
            let _ = writeln!(std::io::stderr(), "SKIPPED {test}, no GPU: {reason:#}");
            None
        }
        Err(reason) => panic!("{reason:#}"),
    }
}
