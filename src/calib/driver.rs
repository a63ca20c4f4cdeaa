//! Quantizes a model layer by layer on the inputs of its already quantized part, while the full-precision model runs
//! beside it.
//!
//! Per layer and in order: q, k, v → o → gate, up → down. Each stage prepares its input where engines round it or smoothing
//! rescales it (`prepare`), sums the input's second moments in both streams ([`crate::backend::MomentSums`]), quantizes its linears, and puts them into the quantized layer, so that the next stage sees what
//! they changed. In memory at a time: the residual streams of both models ([`Parked`], so that the device need not hold
//! them), one layer of each and the next one, one stage's moments, and as many inputs of o and down as there is room for; the others are
//! computed again once their linear is quantized. [`super::memory`] counts it.
//!
//! Layers that an interrupted run has finished are taken from it and only run forward ([`FinishedLayers`]).
//!
//! Windows past `held_out` ride along without being counted: comparing both models' outputs on them at the end says how
//! good these settings are, on text the statistics have not seen.

mod experts;
mod prepare;

use anyhow::{Context, Result, bail};

use self::prepare::{Prepared, rescaled};
use super::CHUNK_TOKENS;
use super::settings::Settings;
use super::smoothing::Factors;
use super::sums::Sums;
use super::token_energies::{TokenEnergies, factors};
use crate::backend::parked::{Parked, Room};
use crate::backend::{Batch, SecondMoments};
use crate::method::solve::{self, Outcome, Solve, Solved};
use crate::model::TensorSource;
use crate::model::block::{Layer, LayerConstants};
use crate::model::config::Config;
use crate::model::feed_forward::FeedForward;
use crate::model::layers::{Layers, Streamed};
use crate::model::stages::{Half, Stage};
use crate::names::{Role, TensorId};
use crate::scheme::fit::{self, fit};
use crate::scheme::{Activations, Choice, QTensor};
use crate::tensor::Matrix;

/// What to calibrate, and on what.
pub struct Request<'a> {
    /// Token windows of one length; at least one.
    pub windows: &'a [Vec<u32>],
    /// How much each token of each window matters; none if all count alike.
    pub energies: &'a [TokenEnergies],
    /// How many of the windows, the last ones, stay out of the statistics.
    pub held_out: usize,
    /// What each weight becomes, `None` for those kept as they are.
    pub choice: &'a (dyn Fn(TensorId) -> Option<Choice> + Sync),
    /// Whether engines will round the inputs of any linear.
    pub rounds_inputs: bool,
    /// How codes are chosen.
    pub settings: Settings,
    /// What an interrupted run has left.
    pub finished: Option<&'a dyn FinishedLayers>,
    /// Device memory for what waits between two uses, bytes; `None`: as much as it takes.
    pub room: Option<u64>,
}

/// Layers that an earlier run of the same request has finished.
pub trait FinishedLayers {
    /// Returns what it emitted of a layer; `None` if it did not finish the layer or one before it.
    ///
    /// # Errors
    /// If what it left cannot be read.
    fn layer(&self, layer: usize) -> Result<Option<Vec<Finished>>>;
}

/// What is finished.
// A handful exist at a time.
#[allow(clippy::large_enum_variant)]
pub enum Finished {
    /// Codes and scales.
    Quantized(Calibrated),
    /// A norm's gain, into which smoothing factors were folded.
    Rewritten(TensorId, Vec<f32>),
    /// All tensors of a layer.
    Layer(usize),
}

/// A quantized tensor.
pub struct Calibrated {
    /// Which one.
    pub id: TensorId,
    /// Its codes and scales, and how they came out.
    pub solved: Solved,
}

impl Request<'_> {
    /// Whether that tensor, though kept, comes from [`calibrate`], since it may be rewritten.
    pub fn rewrites(&self, id: TensorId) -> bool {
        self.settings.smoothing != 0.0 && matches!(id.role, Role::AttnNorm | Role::FfnNorm)
    }
}

/// Receives every tensor of the request as it is finished, in the order of a forward pass, and the end of every layer.
pub type Emit<'a> = &'a mut dyn FnMut(Finished) -> Result<()>;

/// Quantizes every weight of `request` and hands it to `emit`. Returns the mean KL divergence, in nats, of the quantized
/// model from the full one over the second halves of the held-out windows; `None` without such windows.
///
/// # Errors
/// If a tensor cannot be read, inputs are not finite (the message names the tensor), or `emit` fails.
pub fn calibrate<B: SecondMoments>(
    backend: &B,
    config: &Config,
    source: &impl TensorSource,
    request: &Request,
    emit: Emit,
) -> Result<Option<f64>> {
    let constants = LayerConstants::new(config);
    let room = Room::new(request.room);
    let mut run =
        Run { backend, config, constants, request, chunks: Vec::new(), room, done: Vec::new(), emit };
    let table = quantized_embeddings(&mut run, source)?;
    run.embed(source, table)?;
    Streamed::new(config, source)?.each_layer(backend, &mut |layer, full| {
        let mut quantized = full.clone();
        let finished = request.finished.map(|finished| finished.layer(layer)).transpose()?.flatten();
        match finished {
            Some(tensors) => run.replay(tensors, full, &mut quantized),
            None => run.layer(source, layer, full, &mut quantized),
        }
        .with_context(|| format!("layer {layer}"))?;
        run.done.push(Finished::Layer(layer));
        Ok(())
    })?;
    run.head(source)
}

/// Equally long windows on their way through both models.
struct Chunk<B: SecondMoments> {
    ids: Vec<u32>,
    batch: Batch,
    /// Number of its first token, counted over all windows.
    first: usize,
    /// Whether it counts for the statistics.
    counted: bool,
    /// Residual streams of the full-precision and the quantized model, `[n, hidden]`.
    full: Parked<B>,
    quantized: Parked<B>,
    /// Input of the quantized model's next linear that adds to the stream, where there is room for it.
    pending: Option<B::Tensor>,
}

struct Run<'a, B: SecondMoments> {
    backend: &'a B,
    config: &'a Config,
    constants: LayerConstants,
    request: &'a Request<'a>,
    chunks: Vec<Chunk<B>>,
    /// What the streams leave of the device's memory.
    room: Room,
    /// What is finished and not emitted yet.
    done: Vec<Finished>,
    emit: Emit<'a>,
}

/// Rounds and emits the embedding table, if the request says so: it comes first, since every layer sees its errors.
fn quantized_embeddings<B: SecondMoments>(
    run: &mut Run<B>,
    source: &impl TensorSource,
) -> Result<Option<QTensor>> {
    let id = TensorId::global(Role::Embed);
    let Some(Choice { scheme, .. }) = (run.request.choice)(id) else { return Ok(None) };
    let weight = source.read(id)?;
    let [rows, cols] = weight.dims();
    let weights = weight.to_f32();
    let q = fit(scheme, &weights, rows, cols, None, run.request.settings.scale_rule);
    // They have no input to weigh errors with.
    let outcome = Outcome { error: q.distortion(&weights, None).relative(), ..Outcome::default() };
    run.done.push(Finished::Quantized(Calibrated { id, solved: Solved { q: q.clone(), outcome } }));
    Ok(Some(q))
}

impl<'a, B: SecondMoments> Run<'a, B> {
    /// Starts both streams with the embeddings of all windows.
    fn embed(&mut self, source: &impl TensorSource, quantized: Option<QTensor>) -> Result<()> {
        let full = self.backend.upload(source.read(TensorId::global(Role::Embed))?)?;
        let quantized = quantized.map(|q| self.backend.upload(Matrix::Quantized(q))).transpose()?;
        let windows = self.request.windows;
        let (counted, held_out) = windows.split_at(windows.len() - self.request.held_out);
        let (tokens, hidden, mut first) = (windows[0].len(), self.config.hidden_size, 0);
        for (windows, counted) in [(counted, true), (held_out, false)] {
            for windows in windows.chunks((CHUNK_TOKENS / tokens).max(1)) {
                let ids = windows.concat();
                let stream = self.backend.embed(&full, &ids)?;
                let other = match &quantized {
                    Some(table) => self.backend.embed(table, &ids)?,
                    None => stream.clone(),
                };
                let place = self.room.place((2 * ids.len() * hidden * 4) as u64);
                self.chunks.push(Chunk {
                    full: Parked::new(self.backend, place, stream, hidden)?,
                    quantized: Parked::new(self.backend, place, other, hidden)?,
                    batch: Batch { sequences: windows.len(), tokens },
                    counted,
                    first,
                    ids,
                    pending: None,
                });
                first += windows.len() * tokens;
            }
        }
        Ok(())
    }

    /// Quantizes one layer and carries both streams through it.
    fn layer(
        &mut self,
        source: &impl TensorSource,
        index: usize,
        full: &Layer<B>,
        quantized: &mut Layer<B>,
    ) -> Result<()> {
        let mut inner = None;
        let mut stages = self.config.stages(index);
        let mixture = matches!(full.ffn, FeedForward::Mixture(_));
        let first = stages.iter().position(|stage| stage.half == Half::FeedForward).filter(|_| mixture);
        let experts = first.map_or(Vec::new(), |first| stages.split_off(first));
        for stage in stages {
            let factors = self.factors(&stage)?;
            let factors = factors.as_deref();
            if stage.reads_norm() {
                if stage.half == Half::FeedForward {
                    inner = self.inner_factors(index, quantized)?;
                }
                let prepared = self.prepare_normed(source, index, &stage, quantized)?;
                let sums = self.sum_normed(stage.half, full, quantized, prepared.rounding, factors)?;
                self.quantize(source, &stage, sums, &prepared, inner.as_ref(), quantized)?;
            } else {
                let prepared = self.prepare_mixed(source, &stage, inner.as_ref(), quantized)?;
                let sums = self.sum_mixed(&stage, full, quantized, prepared.rounding, factors)?;
                self.quantize(source, &stage, sums, &prepared, inner.as_ref(), quantized)?;
                self.add_output(stage.half, quantized)?;
            }
        }
        if mixture {
            let norm = TensorId::in_layer(index, Role::FfnNorm);
            if self.request.rewrites(norm) {
                // The router behind it stays as it is, and so does the norm.
                self.done.push(Finished::Rewritten(norm, source.read(norm)?.to_f32()));
            }
            self.experts(source, &experts, full, quantized)?;
        }
        Ok(())
    }

    /// Returns the factors of all tokens for what a stage reads; `None` if all count alike.
    fn factors(&self, stage: &Stage) -> Result<Option<Vec<f32>>> {
        let Request { energies, settings, .. } = self.request;
        let counts = !energies.is_empty() && settings.token_power != 0.0;
        counts.then(|| factors(energies, stage, settings.token_power)).transpose()
    }

    /// Sums what the first linears of a half read.
    fn sum_normed(
        &self,
        half: Half,
        full: &Layer<B>,
        quantized: &Layer<B>,
        rounding: Activations<f32>,
        factors: Option<&[f32]>,
    ) -> Result<Sums<'a, B>> {
        let backend = self.backend;
        let mut sums = Sums::new(backend, self.config.hidden_size, None)?.with_rounding(rounding);
        for chunk in self.chunks.iter().filter(|chunk| chunk.counted) {
            let norm = |stream: &Parked<B>, layer: &Layer<B>| {
                backend.rms_norm(stream.get(backend)?.as_ref(), layer.norm(half), self.constants.eps)
            };
            let factors = factors.map(|factors| &factors[chunk.first..chunk.first + chunk.ids.len()]);
            let (full, quantized) = (norm(&chunk.full, full)?, norm(&chunk.quantized, quantized)?);
            sums.add(chunk.ids.len(), &full, &quantized, None, factors)?;
        }
        Ok(sums)
    }

    /// Sums what the last linear of a half reads, and carries the full-precision streams through the half.
    fn sum_mixed(
        &mut self,
        stage: &Stage,
        full: &Layer<B>,
        quantized: &Layer<B>,
        rounding: Activations<f32>,
        factors: Option<&[f32]>,
    ) -> Result<Sums<'a, B>> {
        let (half, width) = (stage.half, stage.cols());
        let (backend, config, constants) = (self.backend, self.config, &self.constants);
        let mut sums = Sums::new(backend, width, Some(config.hidden_size))?.with_rounding(rounding);
        let mut room = self.room;
        for Chunk { ids, batch, first, counted, full: stream, quantized: other, pending } in &mut self.chunks
        {
            let factors = factors.map(|factors| &factors[*first..*first + ids.len()]);
            let other = other.get(backend)?;
            let mixed_q = match pending.take() {
                Some(mixed) => mixed,
                None => quantized.mixed(backend, constants, half, &other, *batch)?,
            };
            stream.update(backend, |stream| {
                let mixed = full.mixed(backend, constants, half, stream, *batch)?;
                if *counted {
                    sums.add(ids.len(), &mixed, &mixed_q, Some((stream, &other)), factors)?;
                }
                full.output(half)?.add_forward(backend, stream, &mixed)
            })?;
            let bytes = ids.len() * width * backend.value_bytes();
            *pending = room.take(bytes as u64).then_some(mixed_q);
        }
        Ok(sums)
    }

    /// Carries the quantized model's streams through a half whose linears are all quantized now.
    fn add_output(&mut self, half: Half, quantized: &Layer<B>) -> Result<()> {
        let (backend, constants) = (self.backend, &self.constants);
        for chunk in &mut self.chunks {
            let (pending, batch) = (chunk.pending.take(), chunk.batch);
            chunk.quantized.update(backend, |stream| {
                let mixed = match pending {
                    Some(mixed) => mixed,
                    None => quantized.mixed(backend, constants, half, stream, batch)?,
                };
                quantized.output(half)?.add_forward(backend, stream, &mixed)
            })?;
        }
        Ok(())
    }

    /// Emits a layer that an earlier run has finished, and carries both streams through it.
    fn replay(&mut self, finished: Vec<Finished>, full: &Layer<B>, quantized: &mut Layer<B>) -> Result<()> {
        let (backend, constants) = (self.backend, &self.constants);
        for tensor in finished {
            match &tensor {
                Finished::Quantized(done) => {
                    let weight = backend.upload(Matrix::Quantized(done.solved.q.clone()))?;
                    let scale = || {
                        let scale = done.solved.outcome.input_scale;
                        scale.with_context(|| format!("`{}` has no input scale", done.id))
                    };
                    let choice = (self.request.choice)(done.id);
                    let rounding =
                        choice.map_or(Activations::Full, |choice| choice.inputs).with_scale(scale)?;
                    self.exchange(done.id, weight, rounding, quantized)?;
                }
                Finished::Rewritten(id, values) => {
                    let gain = backend.tensor(1, values.len(), values)?;
                    match id.role {
                        Role::AttnNorm => quantized.attn_norm = gain,
                        Role::FfnNorm => quantized.ffn_norm = gain,
                        _ => bail!("`{id}` is no norm of a layer"),
                    }
                }
                Finished::Layer(_) => {}
            }
            self.done.push(tensor);
        }
        for Chunk { batch, full: stream, quantized: other, .. } in &mut self.chunks {
            for (stream, layer) in [(stream, full), (other, &*quantized)] {
                stream.update(backend, |x| {
                    layer.forward(backend, constants, x, *batch, &mut |_, _, _| Ok(()))
                })?;
            }
        }
        Ok(())
    }

    /// Puts a quantized weight into the quantized layer.
    fn exchange(
        &self,
        id: TensorId,
        weight: B::Weight,
        rounding: Activations<f32>,
        quantized: &mut Layer<B>,
    ) -> Result<()> {
        let linear = quantized.linear_mut(id).with_context(|| format!("`{id}` is no linear of a layer"))?;
        linear.weight = weight;
        linear.rounding = rounding;
        Ok(())
    }

    /// Emits what is finished. Called where a device still has sums to work on, so that it need not wait for files.
    fn emit_done(&mut self) -> Result<()> {
        self.done.drain(..).try_for_each(|done| (self.emit)(done))
    }

    /// Returns the weights of a stage's linears with what they become, those that are quantized.
    fn wanted(&self, stage: &Stage) -> Vec<(TensorId, Choice)> {
        let ids = stage.linears.iter().map(|linear| linear.id);
        ids.filter_map(|id| Some((id, (self.request.choice)(id)?))).collect()
    }

    /// Quantizes the linears of a stage, emits them and exchanges them in the quantized layer. `inner` moves size between
    /// up and down.
    fn quantize(
        &mut self,
        source: &impl TensorSource,
        stage: &Stage,
        sums: Sums<B>,
        prepared: &Prepared,
        inner: Option<&Factors>,
        quantized: &mut Layer<B>,
    ) -> Result<()> {
        self.emit_done()?;
        let wanted = self.wanted(stage);
        let Some(&(first, _)) = wanted.first() else { return Ok(()) };
        let Prepared { factors, rounding } = prepared;
        let factors = factors.as_ref();
        let mut moments = sums.moments;
        if let Some(factors) = factors {
            moments.rescale_full(self.backend, &factors.scales)?;
        }
        let tokens = moments.tokens;
        let weights = |id: TensorId| rescaled(source, id, factors, inner.filter(|_| id.role == Role::Up));
        let knobs = self.request.settings.knobs(first.role);
        let solver = self.backend.solver(moments, knobs).with_context(|| format!("{first}"))?;
        // What engines join into one matrix gets one factor.
        let joined = wanted.iter().any(|(_, choice)| fit::global_scale(&choice.scheme, 1.0).is_some());
        let mut amax = None;
        for (id, _) in wanted.iter().filter(|_| joined) {
            amax = Some(solve::amax(&weights(*id)?).max(amax.unwrap_or(0.0)));
        }
        for (id, Choice { scheme, .. }) in wanted {
            let weights = weights(id)?;
            let global = amax.and_then(|amax| fit::global_scale(&scheme, amax));
            let (mut solved, weight) =
                solver.quantize(&weights, scheme, global).with_context(|| format!("{id}"))?;
            self.exchange(id, weight, *rounding, quantized)?;
            solved.outcome.tokens = Some(tokens);
            solved.outcome.smoothing = factors.map(|factors| factors.strength);
            solved.outcome.input_scale = rounding.scale();
            self.done.push(Finished::Quantized(Calibrated { id, solved }));
        }
        Ok(())
    }

    /// Quantizes the head, if the request says so, and compares both models on the held-out windows.
    fn head(&mut self, source: &impl TensorSource) -> Result<Option<f64>> {
        let backend = self.backend;
        let gain = source.read(TensorId::global(Role::OutputNorm))?.to_f32();
        let gain = backend.tensor(1, gain.len(), &gain)?;
        let id = TensorId::global(if self.config.tie_word_embeddings { Role::Embed } else { Role::Head });
        let weight = source.read(id)?;
        let full = backend.upload(weight.clone())?;
        let quantized = match (self.request.choice)(id) {
            None => None,
            Some(Choice { scheme, .. }) if self.config.tie_word_embeddings => {
                let [rows, cols] = weight.dims();
                let rule = self.request.settings.scale_rule;
                let q = fit(scheme, &weight.to_f32(), rows, cols, None, rule);
                Some(backend.upload(Matrix::Quantized(q))?)
            }
            Some(Choice { scheme, .. }) => {
                let mut sums = Sums::new(backend, self.config.hidden_size, None)?;
                for chunk in self.chunks.iter().filter(|chunk| chunk.counted) {
                    let [full, quantized] = self.normed(chunk, &gain)?;
                    sums.add(chunk.ids.len(), &full, &quantized, None, None)?;
                }
                let tokens = sums.moments.tokens;
                let solver = backend.solver(sums.moments, self.request.settings.knobs(Role::Head))?;
                let (mut solved, quantized) = solver.quantize(&weight, scheme, None)?;
                solved.outcome.tokens = Some(tokens);
                self.done.push(Finished::Quantized(Calibrated { id, solved }));
                Some(quantized)
            }
        };
        self.emit_done()?;
        self.divergence(&gain, &full, quantized.as_ref().unwrap_or(&full))
    }

    /// Returns the final hidden states of both models.
    fn normed(&self, chunk: &Chunk<B>, gain: &B::Tensor) -> Result<[B::Tensor; 2]> {
        let norm = |stream: &Parked<B>| {
            self.backend.rms_norm(stream.get(self.backend)?.as_ref(), gain, self.constants.eps)
        };
        Ok([norm(&chunk.full)?, norm(&chunk.quantized)?])
    }

    fn divergence(&self, gain: &B::Tensor, full: &B::Weight, quantized: &B::Weight) -> Result<Option<f64>> {
        let (mut sum, mut count) = (0.0, 0usize);
        for chunk in self.chunks.iter().filter(|chunk| !chunk.counted) {
            let tokens = chunk.batch.tokens;
            let scored: Vec<usize> =
                (0..chunk.ids.len()).filter(|at| (tokens / 2..tokens - 1).contains(&(at % tokens))).collect();
            let targets: Vec<u32> = scored.iter().map(|&at| chunk.ids[at + 1]).collect();
            let [baseline, model] = self.normed(chunk, gain)?;
            let baseline = self.backend.select_rows(&baseline, &scored)?;
            let model = self.backend.select_rows(&model, &scored)?;
            let scores = self.backend.compare((&baseline, full), (&model, quantized), &targets)?;
            sum += scores.iter().map(|score| score.kld as f64).sum::<f64>();
            count += scores.len();
        }
        Ok((count > 0).then(|| sum / count as f64))
    }
}
