//! Coordinate descent by blocks: twin of [`crate::method::descent`], in the same order of columns and groups.

use anyhow::Result;

use super::grids::Grids;
use super::{BLOCK, CudaSolver, UPDATES, View, WIDE, by_warps, pieces};
use crate::backend::cuda::device::{Arg, Buffer, Geometry};
use crate::backend::cuda::gemm::Types;
use crate::scheme::{Offset, Span};

impl CudaSolver<'_> {
    /// Improves codes and scales of `q` for `target` `[rows, cols]`.
    pub(super) fn descend(&self, target: &Buffer, q: &mut Grids) -> Result<()> {
        if self.knobs.sweeps == 0 {
            return Ok(());
        }
        let mut gradient = self.with_hessian(Types::F32, &self.values(q, "VALUE", Some(target))?, q.rows)?;
        for _ in 0..self.knobs.sweeps {
            self.pass("CODES", q, &gradient)?;
            match q.scheme.group {
                Span::Row => gradient = self.improve_row_scales(q, gradient)?,
                _ => self.pass("SCALES", q, &gradient)?,
            }
            if let Some((Span::Cols(span), _)) = q.scheme.outer {
                self.refit_outer(q, &gradient, span as usize)?;
            }
        }
        Ok(())
    }

    /// Queues one pass over all columns: see `PART` of kernels/descend.cu.
    pub(super) fn pass(&self, part: &str, q: &Grids, gradient: &Buffer) -> Result<()> {
        let (device, rows, cols) = (&self.cuda.device, q.rows, q.cols);
        let changes = device.allocate(4 * rows * WIDE)?;
        let define = format!("PART={part}");
        for wide in pieces(0..cols, WIDE) {
            for block in pieces(wide.clone(), BLOCK) {
                let at = block.start - wide.start;
                device.launch(
                    q.kernel("descend", &[&define]),
                    by_warps(rows),
                    &[
                        Arg::Struct(&q.words()),
                        Arg::Pointer(gradient.at()),
                        Arg::Pointer(self.hessian.at()),
                        Arg::Pointer(changes.at()),
                        Arg::U32(rows as u32),
                        Arg::U32(block.start as u32),
                        Arg::U32(block.len() as u32),
                        Arg::U32(WIDE as u32),
                        Arg::U32(at as u32),
                    ],
                )?;
                self.spread((&changes, WIDE, at), block, gradient, wide.clone(), rows)?;
            }
            self.spread((&changes, WIDE, 0), wide.clone(), gradient, 0..wide.start, rows)?;
            self.spread((&changes, WIDE, 0), wide.clone(), gradient, wide.end..cols, rows)?;
        }
        Ok(())
    }

    /// Queues the refit of the factors of super-blocks of `span` columns.
    fn refit_outer(&self, q: &Grids, gradient: &Buffer, span: usize) -> Result<()> {
        let (device, rows, cols) = (&self.cuda.device, q.rows, q.cols);
        let matrix = || device.allocate(4 * rows * span);
        let (scaled, offsets, with_scaled, with_offsets) = (matrix()?, matrix()?, matrix()?, matrix()?);
        let changes = matrix()?;
        for block in pieces(0..cols, span) {
            let parts = [
                Arg::Struct(&q.words()),
                Arg::Pointer(scaled.at()),
                Arg::Pointer(offsets.at()),
                Arg::U32(block.start as u32),
            ];
            device.launch(q.kernel("outer_parts", &[]), Geometry::flat(rows, span as u32), &parts)?;
            let mut pairs = vec![(&scaled, &with_scaled)];
            if let Offset::Subtracted(_) = q.scheme.offset {
                pairs.push((&offsets, &with_offsets));
            }
            for (part, product) in pairs {
                self.multiply(
                    UPDATES,
                    [rows, block.len(), block.len()],
                    View::of(part, span, 0, 0),
                    View::of(self.hessian.buffer(), cols, block.start, block.start),
                    View::of(product, span, 0, 0),
                    false,
                )?;
            }
            device.launch(
                q.kernel("refit_outer", &[]),
                Geometry { block: [32, 8], ..Geometry::flat(rows.div_ceil(8), 32) },
                &[
                    Arg::Struct(&q.words()),
                    Arg::Pointer(scaled.at()),
                    Arg::Pointer(offsets.at()),
                    Arg::Pointer(with_scaled.at()),
                    Arg::Pointer(with_offsets.at()),
                    Arg::Pointer(gradient.at()),
                    Arg::Pointer(changes.at()),
                    Arg::U32(rows as u32),
                    Arg::U32(block.start as u32),
                ],
            )?;
            self.spread((&changes, span, 0), block, gradient, 0..cols, rows)?;
        }
        Ok(())
    }
}
