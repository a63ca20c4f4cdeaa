//! A matrix whose codes and scales are being chosen, in GPU memory: `struct Grids` of kernels/grid.cuh.

use anyhow::{Result, ensure};
use rayon::prelude::*;

use crate::backend::cuda::compile::Kernel;
use crate::backend::cuda::device::{Buffer, Device};
use crate::backend::cuda::weight::scheme_defines;
use crate::scheme::{QTensor, Scheme, Span};

/// The most columns a group may have unless it is a whole row.
const LONGEST_GROUP: u32 = super::BLOCK as u32;

/// A [`QTensor`] on the device: one code a byte, stored scales as F32.
pub struct Grids {
    pub scheme: Scheme,
    pub rows: usize,
    pub cols: usize,
    codes: Buffer,
    pub scales: Buffer,
    offsets: Buffer,
    outer_scales: Buffer,
    outer_offsets: Buffer,
}

impl Grids {
    /// Copies a matrix to the device.
    ///
    /// # Errors
    /// If the scheme's groups do not fit the kernels' blocks, or memory is short.
    pub fn upload(device: &Device, q: &QTensor) -> Result<Self> {
        let fits = match q.scheme.group {
            Span::Row => true,
            Span::Cols(n) => n % 16 == 0 && LONGEST_GROUP.is_multiple_of(n),
            Span::Tensor => false,
        };
        ensure!(
            fits,
            "`{}` in groups of {:?}: the GPU calibrates groups of 16, 32, 64 or 128 columns and whole rows; use \
             `--device cpu`",
            q.scheme.name,
            q.scheme.group
        );
        Ok(Grids {
            scheme: q.scheme,
            rows: q.rows,
            cols: q.cols,
            codes: device.upload_numbers(&q.codes)?,
            scales: device.upload_numbers(&q.scales)?,
            offsets: device.upload_numbers(&q.offsets)?,
            outer_scales: device.upload_numbers(&q.outer_scales)?,
            outer_offsets: device.upload_numbers(&q.outer_offsets)?,
        })
    }

    /// Returns a matrix whose codes and scales are to be written; for schemes of codes and scales alone.
    pub fn empty(device: &Device, scheme: Scheme, rows: usize, cols: usize) -> Result<Self> {
        let none = || device.allocate(0);
        Ok(Grids {
            scheme,
            rows,
            cols,
            codes: device.allocate(rows * cols)?,
            scales: device.allocate(4 * scheme.group.count(rows, cols))?,
            offsets: none()?,
            outer_scales: none()?,
            outer_offsets: none()?,
        })
    }

    /// Returns a copy on the device.
    pub fn duplicate(&self, device: &Device) -> Result<Self> {
        Ok(Grids {
            codes: device.duplicate(&self.codes)?,
            scales: device.duplicate(&self.scales)?,
            offsets: device.duplicate(&self.offsets)?,
            outer_scales: device.duplicate(&self.outer_scales)?,
            outer_offsets: device.duplicate(&self.outer_offsets)?,
            ..*self
        })
    }

    /// Copies codes and scales back into `q`, which has the same shape.
    pub fn download(&self, device: &Device, q: &mut QTensor) -> Result<()> {
        // Memory that is touched for the first time costs more than the copy: all threads touch it.
        q.codes.par_chunks_mut(1 << 20).for_each(|codes| codes.fill(0));
        device.download_numbers(&self.codes, &mut q.codes)?;
        device.download_numbers(&self.scales, &mut q.scales)?;
        device.download_numbers(&self.offsets, &mut q.offsets)?;
        device.download_numbers(&self.outer_scales, &mut q.outer_scales)?;
        device.download_numbers(&self.outer_offsets, &mut q.outer_offsets)
    }

    /// Returns `struct Grids`.
    pub fn words(&self) -> [u64; 7] {
        let groups = self.cols.div_ceil(self.scheme.group.len(self.cols));
        let outers = self.scheme.outer.map_or(0, |(span, _)| self.cols.div_ceil(span.len(self.cols)));
        [
            self.codes.at(),
            self.scales.at(),
            self.offsets.at(),
            self.outer_scales.at(),
            self.outer_offsets.at(),
            self.cols as u64 | (groups as u64) << 32,
            outers as u64,
        ]
    }

    /// Returns a kernel compiled for this scheme, with more definitions.
    pub fn kernel(&self, name: &'static str, defines: &[&str]) -> Kernel {
        let mut all = scheme_defines(&self.scheme);
        all.extend(defines.iter().map(|define| define.to_string()));
        Kernel { name, defines: all }
    }
}
