//! Cholesky factors in F64 by cuSOLVER: on GPUs with F64 matrix units as fast as in F32, and as exact as on the CPU.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use cudarc::cusolver::{DnHandle, sys};
use cudarc::driver::CudaStream;

use crate::backend::cuda::device::{Buffer, Device};
use crate::backend::cuda::library;

/// What cuSOLVER calls the upper half, counting columns first, is our lower one.
const LOWER: sys::cublasFillMode_t = sys::cublasFillMode_t::CUBLAS_FILL_MODE_UPPER;

/// cuSOLVER on one stream.
pub(in crate::backend::cuda) struct Factorizer(DnHandle);

impl Factorizer {
    /// Opens the library; the error says how to get it.
    pub fn new(stream: &Arc<CudaStream>) -> Result<Self> {
        library::load_cusolver()?;
        Ok(Factorizer(DnHandle::new(stream.clone()).context("cuSOLVER does not start")?))
    }

    /// Replaces the lower half of `matrix` `[n, n]`, F64, by its factor `L`, `L Lᵀ = matrix`. Returns whether the matrix is
    /// positive definite; waits for the answer.
    #[allow(unsafe_code)]
    pub fn factor(&self, device: &Device, matrix: &Buffer, n: usize) -> Result<bool> {
        ensure!(matrix.bytes() == 8 * n * n, "{} bytes for a matrix of {n}", matrix.bytes());
        let info = device.allocate(4)?;
        let (at, size) = (matrix.at() as *mut f64, n as i32);
        let mut words = 0;
        // SAFETY: the matrix has the size just checked, and workspace and `info` live until the download has waited.
        let workspace = unsafe {
            sys::cusolverDnDpotrf_bufferSize(self.0.cu(), LOWER, size, at, size, &raw mut words).result()?;
            let workspace = device.allocate(8 * words as usize)?;
            let room = workspace.at() as *mut f64;
            sys::cusolverDnDpotrf(self.0.cu(), LOWER, size, at, size, room, words, info.at() as *mut i32)
                .result()
                .with_context(|| format!("cuSOLVER does not factor a matrix of {n}"))?;
            workspace
        };
        let mut found = [0i32];
        device.download_numbers(&info, &mut found)?;
        drop(workspace);
        ensure!(found[0] >= 0, "cuSOLVER refuses argument {} of a factorisation", -found[0]);
        Ok(found[0] == 0)
    }

    /// Queues b = b · (L Lᵀ)⁻¹ for `b` `[rows, n]`, F64, with the factor from [`Factorizer::factor`].
    #[allow(unsafe_code)]
    pub fn solve_right(
        &self,
        device: &Device,
        factor: &Buffer,
        n: usize,
        b: &Buffer,
        rows: usize,
    ) -> Result<()> {
        ensure!(factor.bytes() == 8 * n * n && b.bytes() == 8 * n * rows, "right-hand sides [{rows}, {n}]");
        let info = device.allocate(4)?;
        let (size, count) = (n as i32, rows as i32);
        // SAFETY: both have the sizes just checked; memory is freed in stream order.
        unsafe {
            sys::cusolverDnDpotrs(
                self.0.cu(),
                LOWER,
                size,
                count,
                factor.at() as *const f64,
                size,
                b.at() as *mut f64,
                size,
                info.at() as *mut i32,
            )
        }
        .result()
        .with_context(|| format!("cuSOLVER does not solve [{rows}, {n}]"))
    }
}
