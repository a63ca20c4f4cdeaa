//! Kernel sources → machine code for one architecture: NVRTC at run time, results kept on disk by content hash.

use std::ffi::{CStr, CString};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use cudarc::nvrtc::{result as nvrtc, sys};
use sha2::{Digest, Sha256};

use super::library;

/// A kernel and the macros it is compiled with.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Kernel {
    /// Name of its file in `kernels/` and of its entry point.
    pub name: &'static str,
    /// Preprocessor definitions, `NAME=VALUE`.
    pub defines: Vec<String>,
}

impl Kernel {
    /// Returns the kernel with these definitions.
    pub fn new(name: &'static str, defines: &[&str]) -> Self {
        Kernel { name, defines: defines.iter().map(|define| define.to_string()).collect() }
    }

    /// Returns the complete source: what kernels share, then the file itself.
    pub fn source(&self) -> Result<String> {
        let (_, headers, body) = SOURCES
            .iter()
            .find(|(name, ..)| *name == self.name)
            .with_context(|| format!("no kernel is named `{}`", self.name))?;
        Ok([include_str!("../../../kernels/common.cuh")]
            .iter()
            .chain(*headers)
            .chain([body])
            .copied()
            .collect())
    }
}

macro_rules! kernel {
    ($name:literal $(, $header:literal)*) => {
        (
            $name,
            &[$(include_str!(concat!("../../../kernels/", $header))),*],
            include_str!(concat!("../../../kernels/", $name, ".cu")),
        )
    };
}

/// (name, headers after `common.cuh`, source), one row a file of `kernels/`.
type Source = (&'static str, &'static [&'static str], &'static str);
const SOURCES: &[Source] = &[
    kernel!("add"),
    kernel!("add_rows"),
    kernel!("adopt", "scheme.cuh", "grid.cuh"),
    kernel!("advance"),
    kernel!("attend", "cache.cuh"),
    kernel!("attention", "tensor_core.cuh"),
    kernel!("attention_gradient"),
    kernel!("attention_precise"),
    kernel!("cast"),
    kernel!("coefficients"),
    kernel!("column_dots"),
    kernel!("compare", "loss.cuh"),
    kernel!("correct"),
    kernel!("dequantize", "scheme.cuh", "decode.cuh"),
    kernel!("descend", "scheme.cuh", "grid.cuh"),
    kernel!("divergence_gradient", "loss.cuh"),
    kernel!("divide"),
    kernel!("draw", "draw.cuh"),
    kernel!("embed", "scheme.cuh", "decode.cuh"),
    kernel!("feedback", "scheme.cuh", "grid.cuh"),
    kernel!("fisher_gradient", "loss.cuh"),
    kernel!("fit_power_of_two", "scheme.cuh", "grid.cuh"),
    kernel!("gather"),
    kernel!("gather_columns"),
    kernel!("maxima"),
    kernel!("matvec", "scheme.cuh", "decode.cuh", "tensor_core.cuh", "stage.cuh"),
    kernel!("missing"),
    kernel!("nucleus", "draw.cuh"),
    kernel!("outer_parts", "scheme.cuh", "grid.cuh"),
    kernel!("quantize_rows"),
    kernel!("refit_outer", "scheme.cuh", "grid.cuh"),
    kernel!("regrid", "scheme.cuh", "grid.cuh"),
    kernel!("rescale"),
    kernel!("rms_norm"),
    kernel!("rms_norm_gradient"),
    kernel!("rope"),
    kernel!("round_cache", "cache.cuh"),
    kernel!("row_dots"),
    kernel!("row_energies"),
    kernel!("scale_rows"),
    kernel!("score", "loss.cuh"),
    kernel!("swiglu"),
    kernel!("swiglu_gradient"),
    kernel!("symmetrize"),
    kernel!("values", "scheme.cuh", "grid.cuh"),
    kernel!("widen_hessian"),
];

/// Returns the names of all kernels.
pub fn names() -> impl Iterator<Item = &'static str> {
    SOURCES.iter().map(|(name, ..)| *name)
}

/// Returns the architecture name of a compute capability, the variant with the chip's own instructions where there is
/// one: (9, 0) → `sm_90a`. Errors below 8.0, which lacks bf16 matrix products.
pub fn architecture(major: i32, minor: i32) -> Result<String> {
    ensure!(
        major >= 8,
        "compute capability {major}.{minor} is too old: bf16 matrix products need 8.0 (A100, RTX 30) or newer; use \
         `--device cpu`"
    );
    Ok(format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" }))
}

/// Returns machine code (cubin) for the kernel, from the cache on disk or compiled and put there.
pub fn compile(kernel: &Kernel, architecture: &str) -> Result<Vec<u8>> {
    library::load_nvrtc()?;
    let source = kernel.source()?;
    let mut options = vec![
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_string(),
        "--define-macro=QUANT_KERNEL".to_string(),
    ];
    options.extend(kernel.defines.iter().map(|define| format!("--define-macro={define}")));
    let cached = cache_file(&source, &options)?;
    if let Some(code) = cached.as_ref().and_then(|file| std::fs::read(file).ok()) {
        return Ok(code);
    }
    let code = compile_source(kernel.name, &source, &options).with_context(|| {
        format!("kernel `{}` ({}) for {architecture}", kernel.name, kernel.defines.join(" "))
    })?;
    if let Some(file) = cached {
        keep(&file, &code);
    }
    Ok(code)
}

/// Returns where the result is kept: `$XDG_CACHE_HOME/quant/kernels` or `~/.cache/quant/kernels`; `None` without a home.
fn cache_file(source: &str, options: &[String]) -> Result<Option<PathBuf>> {
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let Some(cache) = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).or(home) else { return Ok(None) };
    let (mut major, mut minor) = (0, 0);
    version(&mut major, &mut minor)?;
    let hash = Sha256::new()
        .chain_update(format!("nvrtc {major}.{minor}\n{}\n", options.join(" ")))
        .chain_update(source)
        .finalize();
    let name: String = hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    Ok(Some(cache.join("quant").join("kernels").join(name + ".cubin")))
}

/// Writes a cache entry under a temporary name first, so that no reader sees half of it. A cache that cannot be written
/// costs time at the next start and nothing else, so its errors are dropped.
fn keep(file: &std::path::Path, code: &[u8]) {
    let Some(folder) = file.parent() else { return };
    let written = std::fs::create_dir_all(folder)
        .and_then(|()| tempfile::NamedTempFile::new_in(folder))
        .and_then(|mut temporary| std::io::Write::write_all(&mut temporary, code).map(|()| temporary));
    if let Ok(temporary) = written {
        temporary.persist(file).ok();
    }
}

#[allow(unsafe_code)]
fn version(major: &mut i32, minor: &mut i32) -> Result<()> {
    // SAFETY: both pointers are valid for the call, and `load_nvrtc` has found the library.
    unsafe { sys::nvrtcVersion(major, minor) }.result().context("NVRTC does not tell its version")
}

#[allow(unsafe_code)]
fn compile_source(name: &str, source: &str, options: &[String]) -> Result<Vec<u8>> {
    let source = CString::new(source)?;
    let program = nvrtc::create_program(&source, Some(&CString::new(format!("{name}.cu"))?))?;
    // SAFETY: `program` was just made and is destroyed once, at the end; `code` has the size NVRTC asks for.
    unsafe {
        if nvrtc::compile_program(program, options).is_err() {
            let log = nvrtc::get_program_log(program)?;
            let log = CStr::from_ptr(log.as_ptr()).to_string_lossy().into_owned();
            nvrtc::destroy_program(program)?;
            bail!("NVRTC refused it:\n{log}");
        }
        let mut bytes = 0;
        sys::nvrtcGetCUBINSize(program, &mut bytes).result()?;
        let mut code = vec![0u8; bytes];
        sys::nvrtcGetCUBIN(program, code.as_mut_ptr().cast()).result()?;
        nvrtc::destroy_program(program)?;
        Ok(code)
    }
}
