//! GPTQ by blocks: twin of [`crate::method::gptq`].

use anyhow::Result;

use super::grids::Grids;
use super::{BLOCK, CudaSolver, View, WIDE, by_rows, by_warps, pieces};
use crate::backend::cuda::compile::Kernel;
use crate::backend::cuda::device::{Arg, Buffer};
use crate::backend::cuda::gemm::Types;

impl CudaSolver<'_> {
    /// Queues the choice of the codes of `q`, whose scales are set, for `target` `[rows, cols]`.
    pub(super) fn feed_back(&self, target: &Buffer, q: &Grids) -> Result<()> {
        let (device, rows, cols) = (&self.cuda.device, q.rows, q.cols);
        let running = device.allocate(4 * rows * cols)?;
        device.launch(
            Kernel::new("gather_columns", &[]),
            by_rows(rows, cols),
            &[
                Arg::Pointer(running.at()),
                Arg::Pointer(target.at()),
                Arg::Pointer(self.order.at()),
                Arg::U32(rows as u32),
                Arg::U32(cols as u32),
            ],
        )?;
        let errors = device.allocate(4 * rows * WIDE)?;
        // running[:, reached] += errors of `done` · a[done, reached]
        let feed = |done: std::ops::Range<usize>, at: usize, reached: std::ops::Range<usize>| {
            self.multiply(
                Types::F32,
                [rows, done.len(), reached.len()],
                View::of(&errors, WIDE, 0, at),
                View::of(&self.coefficients, cols, done.start, reached.start),
                View::of(&running, cols, 0, reached.start),
                true,
            )
        };
        for wide in pieces(0..cols, WIDE) {
            for block in pieces(wide.clone(), BLOCK) {
                let at = block.start - wide.start;
                device.launch(
                    q.kernel("feedback", &[]),
                    by_warps(rows),
                    &[
                        Arg::Struct(&q.words()),
                        Arg::Pointer(target.at()),
                        Arg::Pointer(running.at()),
                        Arg::Pointer(errors.at()),
                        Arg::Pointer(self.coefficients.at()),
                        Arg::Pointer(self.order.at()),
                        Arg::U32(rows as u32),
                        Arg::U32(block.start as u32),
                        Arg::U32(block.len() as u32),
                        Arg::U32(WIDE as u32),
                        Arg::U32(at as u32),
                    ],
                )?;
                feed(block.clone(), at, block.end..wide.end)?;
            }
            feed(wide.clone(), 0, wide.end..cols)?;
        }
        Ok(())
    }
}
