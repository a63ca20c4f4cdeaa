//! Finds CUDA's libraries at run time, so that one binary runs with and without them.
//!
//! The driver comes with the system. NVRTC, cuBLASLt and, for calibration, cuSOLVER come from, in this order: the folders in `QUANT_CUDA_LIBRARIES`
//! (`:` between them), `CUDA_HOME` or `CUDA_PATH`, the system's library path, `/usr/local/cuda`, and the `nvidia-*` wheels
//! of the active or first Python on `PATH`. A library that was opened by path is found again under its plain name, which
//! is how the bindings (`cudarc`) look for it.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail};
use libloading::Library;

/// Names the folders to search first.
pub const SEARCH_VARIABLE: &str = "QUANT_CUDA_LIBRARIES";

/// Opens the CUDA driver; the error says how to get one.
pub fn load_driver() -> Result<()> {
    static DRIVER: OnceLock<Option<Library>> = OnceLock::new();
    DRIVER
        .get_or_init(|| open(Path::new("libcuda.so.1")))
        .as_ref()
        .map(|_| ())
        .context("no NVIDIA driver on this machine (`libcuda.so.1` is not found)")
}

/// Opens NVRTC, the run-time compiler; version 12 or 13.
pub fn load_nvrtc() -> Result<()> {
    static NVRTC: OnceLock<Option<Vec<Library>>> = OnceLock::new();
    NVRTC
        .get_or_init(|| {
            let (compiler, folder) = find(&["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"])?;
            // The compiler asks for its built-in functions by plain name, which fails outside the library path unless
            // they are open already.
            let mut libraries = vec![compiler];
            for entry in folder.iter().flat_map(std::fs::read_dir).flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.starts_with("libnvrtc-builtins.so") {
                    libraries.extend(open(&entry.path()));
                }
            }
            Some(libraries)
        })
        .as_ref()
        .map(|_| ())
        .with_context(|| missing("NVRTC", "libnvrtc.so.13", "nvidia-cuda-nvrtc"))
}

/// Opens cuBLASLt, the matrix library; version 12 or 13.
pub fn load_cublaslt() -> Result<()> {
    static CUBLASLT: OnceLock<Option<(Library, Option<PathBuf>)>> = OnceLock::new();
    CUBLASLT
        .get_or_init(|| find(&["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"]))
        .as_ref()
        .map(|_| ())
        .with_context(|| missing("cuBLASLt", "libcublasLt.so.13", "nvidia-cublas"))
}

/// Opens cuSOLVER, which calibration factors matrices with; version 11 or 12, of CUDA 12 or 13.
pub fn load_cusolver() -> Result<()> {
    static CUSOLVER: OnceLock<Option<(Library, Option<PathBuf>)>> = OnceLock::new();
    CUSOLVER
        .get_or_init(|| find(&["libcusolver.so.12", "libcusolver.so.11", "libcusolver.so"]))
        .as_ref()
        .map(|_| ())
        .with_context(|| missing("cuSOLVER", "libcusolver.so.12", "nvidia-cusolver"))
}

/// Loads everything a GPU run needs.
pub fn load_all() -> Result<()> {
    if !cfg!(target_os = "linux") {
        bail!("the CUDA backend runs on Linux only; use `--device cpu`");
    }
    load_driver()?;
    load_nvrtc()?;
    load_cublaslt()
}

fn missing(library: &str, file: &str, wheel: &str) -> String {
    format!(
        "{library} (`{file}`) is not found; install the CUDA toolkit, or run `pip install {wheel}` in the active \
         Python environment, or name its folder in `{SEARCH_VARIABLE}`, or use `--device cpu`"
    )
}

/// Opens the first library that is there, and returns the folder it came from when it was found by path.
fn find(names: &[&str]) -> Option<(Library, Option<PathBuf>)> {
    let by_path = |folders: Vec<PathBuf>| {
        folders.into_iter().find_map(|folder| {
            let library = names.iter().find_map(|name| open(&folder.join(name)))?;
            Some((library, Some(folder)))
        })
    };
    by_path(named_folders())
        .or_else(|| names.iter().find_map(|name| Some((open(Path::new(name))?, None))))
        .or_else(|| by_path(usual_folders()))
}

fn named_folders() -> Vec<PathBuf> {
    let mut folders: Vec<PathBuf> = std::env::var_os(SEARCH_VARIABLE)
        .iter()
        .flat_map(|list| std::env::split_paths(list).collect::<Vec<_>>())
        .collect();
    for variable in ["CUDA_HOME", "CUDA_PATH"] {
        folders.extend(std::env::var_os(variable).map(|home| PathBuf::from(home).join("lib64")));
    }
    folders
}

fn usual_folders() -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::from("/usr/local/cuda/lib64")];
    let environment =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let on_path = std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect::<Vec<_>>());
    let pythons = on_path.into_iter().flatten().filter(|folder| folder.join("python3").exists());
    let prefixes = environment.chain(pythons.filter_map(|folder| Some(folder.parent()?.to_path_buf())));
    for prefix in prefixes {
        for python in subfolders(&prefix.join("lib")) {
            for packages in ["site-packages", "dist-packages"] {
                for wheel in subfolders(&python.join(packages).join("nvidia")) {
                    folders.push(wheel.join("lib"));
                }
            }
        }
    }
    folders
}

/// Returns the folders in a folder, sorted, none if there is no such folder.
fn subfolders(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut folders: Vec<PathBuf> = entries.filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}

#[allow(unsafe_code)]
fn open(path: &Path) -> Option<Library> {
    // SAFETY: opening a library runs its initialisers; these are NVIDIA's own libraries, found where they are installed.
    unsafe { Library::new(path) }.ok()
}
