//! Sums of second moments on the device: made whole, divided by factors, widened to F64.

use anyhow::{Context, Result, ensure};

use super::super::compile::Kernel;
use super::super::device::{Arg, Buffer};
use super::super::{Cuda, Tensor};
use super::{Factorizer, by_rows};

impl Cuda {
    /// Returns cuSOLVER, opened when it is first needed.
    pub(super) fn factorizer(&self) -> Result<&Factorizer> {
        if self.factorizer.get().is_none() {
            // Another thread may have been faster; then this one's handle closes again.
            self.factorizer.set(Factorizer::new(self.device.stream())?).ok();
        }
        self.factorizer.get().context("cuSOLVER was just opened")
    }

    /// Mirrors the lower half of `[n, n]`, adds to the diagonal, and returns the diagonal before that.
    pub(super) fn symmetrize(&self, sum: &mut Tensor, add: f32) -> Result<Vec<f32>> {
        let n = sum.cols;
        sum.make_unique(&self.device)?;
        let diagonal = self.device.allocate(4 * n)?;
        let args = [Arg::Pointer(sum.at()), Arg::Pointer(diagonal.at()), Arg::F32(add), Arg::U32(n as u32)];
        self.device.launch(Kernel::new("symmetrize", &[]), by_rows(n, n), &args)?;
        let mut values = vec![0.0; n];
        self.device.download_numbers(&diagonal, &mut values)?;
        Ok(values)
    }

    /// Queues the lower half of `sum` with `add` on its diagonal in F64, in the reverse of `order` where there is one.
    pub(super) fn widen(&self, wide: &Buffer, sum: &Tensor, order: Option<&Buffer>, add: f32) -> Result<()> {
        let n = sum.cols;
        self.device.launch(
            Kernel::new("widen_hessian", &[]),
            by_rows(n, n),
            &[
                Arg::Pointer(wide.at()),
                Arg::Pointer(sum.at()),
                Arg::Pointer(order.map_or(0, Buffer::at)),
                Arg::F32(add),
                Arg::U32(n as u32),
            ],
        )
    }

    /// Queues sum\[i, j\] /= rows\[i\] · columns\[j\].
    pub(in crate::backend::cuda) fn divide_sum(
        &self,
        sum: &mut Tensor,
        rows: Option<&[f32]>,
        columns: Option<&[f32]>,
    ) -> Result<()> {
        ensure!(
            rows.is_none_or(|rows| rows.len() == sum.rows)
                && columns.is_none_or(|columns| columns.len() == sum.cols),
            "factors that do not fit moments of [{}, {}]",
            sum.rows,
            sum.cols
        );
        sum.make_unique(&self.device)?;
        let upload = |factors: Option<&[f32]>| factors.map(|f| self.device.upload_numbers(f)).transpose();
        let (rows, columns) = (upload(rows)?, upload(columns)?);
        let pointer = |factors: &Option<Buffer>| Arg::Pointer(factors.as_ref().map_or(0, Buffer::at));
        self.device.launch(
            Kernel::new("divide", &[]),
            by_rows(sum.rows, sum.cols),
            &[
                Arg::Pointer(sum.at()),
                pointer(&rows),
                pointer(&columns),
                Arg::U32(sum.rows as u32),
                Arg::U32(sum.cols as u32),
            ],
        )
    }
}
