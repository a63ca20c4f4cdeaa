//! Other scales for groups that are whole rows: twin of `improve_scale` in [`crate::method::descent`]. A row's codes are
//! re-solved under each candidate by passes over all columns, all rows at once; which candidates there are is the CPU's
//! decision ([`refit::candidates`]).

use anyhow::Result;

use super::grids::Grids;
use super::{CudaSolver, UPDATES, by_rows};
use crate::backend::cuda::device::{Arg, Buffer};
use crate::method::refit::{self, Normal};
use crate::scheme::QTensor;

impl CudaSolver<'_> {
    /// Gives every row the best of the scales worth trying, if it lowers the loss, and returns the gradient after that.
    pub(super) fn improve_row_scales(&self, q: &mut Grids, gradient: Buffer) -> Result<Buffer> {
        let (device, rows) = (&self.cuda.device, q.rows);
        let candidates = self.row_candidates(q, &gradient)?;
        let values = self.values(q, "VALUE", None)?;
        let (best, best_gradient) = (q.duplicate(device)?, device.duplicate(&gradient)?);
        let mut least = vec![0.0; rows];
        for scales in candidates {
            let mut trial = q.duplicate(device)?;
            trial.scales = device.upload_numbers(&scales)?;
            let trial_gradient = self.resolve(q, &trial, &gradient)?;
            // The change is 2 d·g + dᵀHd = d · (g before + g after).
            let moved = self.values(&trial, "VALUE", Some(&values))?;
            let before = self.row_dots(&moved, &gradient, rows)?;
            let after = self.row_dots(&moved, &trial_gradient, rows)?;
            let mut better = vec![0u32; rows];
            for (((least, better), before), after) in least.iter_mut().zip(&mut better).zip(before).zip(after)
            {
                if before + after < *least {
                    (*least, *better) = (before + after, 1);
                }
            }
            let better = device.upload_numbers(&better)?;
            device.launch(
                q.kernel("adopt", &[]),
                by_rows(rows, q.cols),
                &[
                    Arg::Struct(&trial.words()),
                    Arg::Struct(&best.words()),
                    Arg::Pointer(trial_gradient.at()),
                    Arg::Pointer(best_gradient.at()),
                    Arg::Pointer(better.at()),
                    Arg::U32(rows as u32),
                ],
            )?;
        }
        *q = best;
        Ok(best_gradient)
    }

    /// Returns scales to try, one list of all rows after another; rows without as many keep theirs there.
    fn row_candidates(&self, q: &Grids, gradient: &Buffer) -> Result<Vec<Vec<f32>>> {
        let (device, rows) = (&self.cuda.device, q.rows);
        let units = self.values(q, "UNIT", None)?;
        let with_units = self.with_hessian(UPDATES, &units, rows)?;
        let cc = self.row_dots(&units, &with_units, rows)?;
        let cg = self.row_dots(&units, gradient, rows)?;
        let mut scales = vec![0.0f32; rows];
        device.download_numbers(&q.scales, &mut scales)?;
        let mut row = QTensor::zeroed(q.scheme, 1, q.cols);
        let mut lists: Vec<Vec<f32>> = Vec::new();
        for i in 0..rows {
            row.scales[0] = scales[i];
            let normal = Normal { cc: cc[i], cg: cg[i], ..Normal::default() };
            for (list, stored) in refit::candidates(&row, 0, &normal).into_iter().enumerate() {
                if list == lists.len() {
                    lists.push(scales.clone());
                }
                lists[list][i] = stored.scale;
            }
        }
        Ok(lists)
    }

    /// Queues the choice of codes under the scales of `trial`: nearest to the values of `q`, then two passes. Returns the
    /// gradient there.
    fn resolve(&self, q: &Grids, trial: &Grids, gradient: &Buffer) -> Result<Buffer> {
        let device = &self.cuda.device;
        let changes = device.allocate(4 * q.rows * q.cols)?;
        device.launch(
            q.kernel("regrid", &[]),
            by_rows(q.rows, q.cols),
            &[
                Arg::Struct(&q.words()),
                Arg::Struct(&trial.words()),
                Arg::Pointer(changes.at()),
                Arg::U32(q.rows as u32),
            ],
        )?;
        let gradient = device.duplicate(gradient)?;
        self.spread((&changes, q.cols, 0), 0..q.cols, &gradient, 0..q.cols, q.rows)?;
        drop(changes);
        for _ in 0..2 {
            self.pass("CODES", trial, &gradient)?;
        }
        Ok(gradient)
    }
}
