//! A layer's mixture of experts: each expert is quantized on the tokens that the quantized model's router sends to it, which
//! count as much as its output counts for them.

use anyhow::{Context, Result, bail};

use super::prepare::{Prepared, inputs_of};
use super::{Calibrated, Chunk, Finished, Run};
use crate::backend::SecondMoments;
use crate::backend::parked::Parked;
use crate::calib::sums::Sums;
use crate::method::solve::{self, Deviation, Outcome, Solved};
use crate::model::TensorSource;
use crate::model::block::Layer;
use crate::model::gated::Gated;
use crate::model::mixture::Mixture;
use crate::model::router::Assigned;
use crate::model::stages::Stage;
use crate::scheme::{Choice, fit};
use crate::tensor::Matrix;

/// Both models' mixtures of one layer.
struct Pair<'a, B: SecondMoments> {
    full: &'a Mixture<B>,
    quantized: &'a Mixture<B>,
}

impl<'a, B: SecondMoments> Run<'a, B> {
    /// Quantizes the experts of a layer and carries both streams through them. `stages` are those of its feed-forward part.
    pub(super) fn experts(
        &mut self,
        source: &impl TensorSource,
        stages: &[Stage],
        full: &Layer<B>,
        quantized: &mut Layer<B>,
    ) -> Result<()> {
        let assigned = self.assigned(quantized)?;
        for stage in stages {
            let rounding = inputs_of(&self.wanted(stage))?.with_scale(|| {
                bail!("static input scales of experts are not supported; choose `int8-w8a8`")
            })?;
            let prepared = Prepared { factors: None, rounding };
            let sums = self.sum_expert(stage, &assigned, full, quantized, &prepared)?;
            match sums.moments.tokens {
                0 => self.nearest(source, stage, &prepared, quantized)?,
                _ => self.quantize(source, stage, sums, &prepared, None, quantized)?,
            }
        }
        self.add_experts(full, quantized)
    }

    /// Returns which tokens of each counted chunk the quantized model's router sends to each expert.
    fn assigned(&self, quantized: &Layer<B>) -> Result<Vec<Vec<Assigned>>> {
        let mixture = quantized.ffn.mixture()?;
        let counted = self.chunks.iter().filter(|chunk| chunk.counted);
        counted
            .map(|chunk| mixture.assign(self.backend, &self.normed_stream(&chunk.quantized, quantized)?))
            .collect()
    }

    /// Returns what the feed-forward part of a layer reads of a stream.
    fn normed_stream(&self, stream: &Parked<B>, layer: &Layer<B>) -> Result<B::Tensor> {
        let stream = stream.get(self.backend)?;
        self.backend.rms_norm(stream.as_ref(), &layer.ffn_norm, self.constants.eps)
    }

    /// Sums what a stage of one expert reads.
    fn sum_expert(
        &self,
        stage: &Stage,
        assigned: &[Vec<Assigned>],
        full: &Layer<B>,
        quantized: &Layer<B>,
        prepared: &Prepared,
    ) -> Result<Sums<'a, B>> {
        let backend = self.backend;
        let expert = stage.leader().expert.map(usize::from);
        let pair = Pair { full: full.ffn.mixture()?, quantized: quantized.ffn.mixture()? };
        let mut sums = Sums::new(backend, stage.cols(), None)?.with_rounding(prepared.rounding);
        let chunks = self.chunks.iter().filter(|chunk| chunk.counted).zip(assigned);
        for (Chunk { full: stream, quantized: other, ids, .. }, assigned) in chunks {
            let tokens = expert.map(|expert| &assigned[expert]);
            if tokens.is_some_and(|tokens| tokens.rows.is_empty()) {
                continue;
            }
            let input = |stream: &Parked<B>, layer: &Layer<B>, mixture: &Mixture<B>| -> Result<B::Tensor> {
                let mut input = self.normed_stream(stream, layer)?;
                if let Some(tokens) = tokens {
                    input = backend.select_rows(&input, &tokens.rows)?;
                }
                if stage.reads_norm() { Ok(input) } else { of(mixture, expert)?.mixed(backend, &input) }
            };
            let (full, quantized) =
                (input(stream, full, pair.full)?, input(other, quantized, pair.quantized)?);
            let count = tokens.map_or(ids.len(), |tokens| tokens.rows.len());
            sums.add(count, &full, &quantized, None, tokens.map(|tokens| &tokens.weights[..]))?;
        }
        Ok(sums)
    }

    /// Gives the linears of an expert that saw no token their nearest codes, and says so.
    fn nearest(
        &mut self,
        source: &impl TensorSource,
        stage: &Stage,
        prepared: &Prepared,
        quantized: &mut Layer<B>,
    ) -> Result<()> {
        let rule = self.request.settings.scale_rule;
        let wanted = self.wanted(stage);
        let weights = wanted.iter().map(|&(id, _)| source.read(id)).collect::<Result<Vec<_>>>()?;
        let largest = weights.iter().map(solve::amax).fold(0.0, f32::max);
        for ((id, Choice { scheme, .. }), weights) in wanted.into_iter().zip(weights) {
            let [_, cols] = weights.dims();
            let global = fit::global_scale(&scheme, largest);
            let weights = weights.to_f32();
            let q = solve::fit_target(&weights, cols, scheme, global, None, rule);
            let weight = self.backend.upload(Matrix::Quantized(q.clone())).with_context(|| id.to_string())?;
            self.exchange(id, weight, prepared.rounding, quantized)?;
            let outcome = Outcome {
                error: q.distortion(&weights, None).relative(),
                tokens: Some(0),
                input_scale: prepared.rounding.scale(),
                deviation: Deviation { kept_nearest: true, ..Deviation::default() },
                ..Outcome::default()
            };
            self.done.push(Finished::Quantized(Calibrated { id, solved: Solved { q, outcome } }));
        }
        Ok(())
    }

    /// Carries both streams through a mixture whose experts are all quantized now.
    fn add_experts(&mut self, full: &Layer<B>, quantized: &Layer<B>) -> Result<()> {
        let (backend, eps) = (self.backend, self.constants.eps);
        for Chunk { full: stream, quantized: other, .. } in &mut self.chunks {
            for (stream, layer) in [(stream, full), (other, quantized)] {
                stream.update(backend, |x| {
                    let normed = backend.rms_norm(x, &layer.ffn_norm, eps)?;
                    layer.ffn.add_forward(backend, x, &normed, &mut |_, _, _| Ok(()))
                })?;
            }
        }
        Ok(())
    }
}

/// Returns the linears of an expert, or those of the shared one.
fn of<B: SecondMoments>(mixture: &Mixture<B>, expert: Option<usize>) -> Result<&Gated<B>> {
    let gated = match expert {
        Some(expert) => mixture.experts.get(expert),
        None => mixture.shared.as_ref().map(|shared| &shared.expert),
    };
    gated.context("there is no such expert")
}
