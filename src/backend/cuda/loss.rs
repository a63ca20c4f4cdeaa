//! The loss head: logits exist for a slice of positions at a time, on the device only; three numbers a position come back.

use anyhow::{Result, ensure};

use super::compile::Kernel;
use super::device::{Arg, Buffer, Geometry};
use super::gemm::{Form, Product, Types};
use super::{Cuda, Float, Tensor, Weight, u32_bytes};
use crate::backend::{Divergence, RANKS, Score};

/// Logits held at once, F32 values: 512 MiB.
const LOGITS: usize = 1 << 27;

/// A head ready to multiply with.
struct Head<'a> {
    hidden: Tensor,
    weight: &'a Weight,
    decoded: Option<Buffer>,
}

impl Cuda {
    pub(super) fn score_rows(&self, hidden: &Tensor, head: &Weight, targets: &[u32]) -> Result<Vec<Score>> {
        let n = targets.len();
        let head = self.head(hidden, head, targets)?;
        let uploaded = self.device.upload(&u32_bytes(targets.iter().copied()))?;
        let (nll, top) = (self.device.allocate(4 * n)?, self.device.allocate(4 * n)?);
        for (first, rows) in slices(n, head.weight.rows) {
            let logits = self.logits(&head, first, rows)?;
            let at = 4 * first as u64;
            self.device.launch(
                Kernel::new("score", &[]),
                Geometry::flat(rows, 512),
                &[
                    Arg::Pointer(logits.at()),
                    Arg::Pointer(uploaded.at() + at),
                    Arg::Pointer(nll.at() + at),
                    Arg::Pointer(top.at() + at),
                    Arg::U32(head.weight.rows as u32),
                ],
            )?;
        }
        let (nll, top) = (self.words(&nll, n)?, self.words(&top, n)?);
        Ok(nll.into_iter().zip(top).map(|(nll, top)| Score { nll: f32::from_bits(nll), top }).collect())
    }

    pub(super) fn compare_rows(
        &self,
        baseline: (&Tensor, &Weight),
        model: (&Tensor, &Weight),
        targets: &[u32],
    ) -> Result<Vec<Divergence>> {
        let n = targets.len();
        let vocab = model.1.rows;
        ensure!(baseline.1.rows == vocab, "vocabularies of {} and {vocab} tokens", baseline.1.rows);
        let baseline = self.head(baseline.0, baseline.1, targets)?;
        let model = self.head(model.0, model.1, targets)?;
        let uploaded = self.device.upload(&u32_bytes(targets.iter().copied()))?;
        let (nll, top) = (self.device.allocate(8 * n)?, self.device.allocate(8 * n)?);
        let (kld, rank) = (self.device.allocate(4 * n)?, self.device.allocate(4 * n)?);
        for (first, rows) in slices(n, 2 * vocab) {
            let (expected, found) = (self.logits(&baseline, first, rows)?, self.logits(&model, first, rows)?);
            let at = 4 * first as u64;
            self.device.launch(
                Kernel::new("compare", &[]),
                Geometry::flat(rows, 512),
                &[
                    Arg::Pointer(expected.at()),
                    Arg::Pointer(found.at()),
                    Arg::Pointer(uploaded.at() + at),
                    Arg::Pointer(nll.at() + 2 * at),
                    Arg::Pointer(top.at() + 2 * at),
                    Arg::Pointer(kld.at() + at),
                    Arg::Pointer(rank.at() + at),
                    Arg::U32(vocab as u32),
                ],
            )?;
        }
        let (nll, top) = (self.words(&nll, 2 * n)?, self.words(&top, 2 * n)?);
        let (kld, rank) = (self.words(&kld, n)?, self.words(&rank, n)?);
        let score = |i: usize| Score { nll: f32::from_bits(nll[i]), top: top[i] };
        let row = |i: usize| Divergence {
            baseline: score(2 * i),
            model: score(2 * i + 1),
            kld: f32::from_bits(kld[i]),
            rank: rank[i].min(RANKS),
        };
        Ok((0..n).map(row).collect())
    }

    fn head<'a>(&self, hidden: &Tensor, weight: &'a Weight, targets: &[u32]) -> Result<Head<'a>> {
        ensure!(hidden.rows == targets.len(), "{} targets for {} positions", targets.len(), hidden.rows);
        ensure!(hidden.cols == weight.cols, "{} hidden features for a head of {}", hidden.cols, weight.cols);
        if let Some(target) = targets.iter().find(|&&target| target as usize >= weight.rows) {
            anyhow::bail!("target {target} is outside the vocabulary of {}", weight.rows);
        }
        Ok(Head { hidden: self.rounded(hidden)?, weight, decoded: self.decoded(weight)? })
    }

    /// Returns F32 logits `[rows, vocab]` of the positions from `first` on.
    fn logits(&self, head: &Head, first: usize, rows: usize) -> Result<Buffer> {
        let Head { hidden, weight, decoded } = head;
        let types = if self.float == Float::F32 { Types::F32 } else { Types::F16ToF32 };
        let product = Product {
            n: rows,
            out: weight.rows,
            input: weight.cols,
            types,
            accumulate: false,
            form: Form::Linear,
        };
        let logits = self.device.allocate(rows * weight.rows * 4)?;
        let x = hidden.at() + (first * hidden.cols * hidden.float.bytes()) as u64;
        let w = decoded.as_ref().unwrap_or(weight.codes());
        self.gemm.multiply(&self.device, product, w.at(), x, logits.at())?;
        Ok(logits)
    }

    /// Returns F32 logits `[rows, vocab]` of the hidden states from `first` on.
    pub(super) fn logits_of(
        &self,
        (hidden, head): (&Tensor, &Weight),
        first: usize,
        rows: usize,
    ) -> Result<Buffer> {
        ensure!(hidden.cols == head.cols, "{} hidden features for a head of {}", hidden.cols, head.cols);
        let head = Head { hidden: self.rounded(hidden)?, weight: head, decoded: self.decoded(head)? };
        self.logits(&head, first, rows)
    }

    fn words(&self, buffer: &Buffer, count: usize) -> Result<Vec<u32>> {
        let mut bytes = vec![0u8; 4 * count];
        self.device.download(buffer, &mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect())
    }
}

/// Returns (first row, rows) of the slices that `n` rows of `width` logits are cut into, at most [`LOGITS`] values each.
/// Slices are a multiple of 128 rows, which keeps products full and inputs aligned.
pub(super) fn slices(n: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    let step = (LOGITS / width / 128 * 128).max(128);
    (0..n).step_by(step).map(move |first| (first, step.min(n - first)))
}
