//! Quantizes a model layer by layer on the inputs of its already quantized part, while the full-precision model runs
//! beside it.
//!
//! Per layer and in order: q, k, v → o → gate, up → down. Each stage sums the second moments of its input in both
//! streams ([`MomentSums`]), quantizes its linears, and puts them into the quantized layer, so that the next stage sees what
//! they changed. In memory at a time: the residual streams of both models ([`Parked`], so that the device need not hold
//! them), one layer of each and the next one, one stage's moments, and as many inputs of o and down as there is room for; the others are
//! computed again once their linear is quantized. [`super::memory`] counts it.
//!
//! Layers that an interrupted run has finished are taken from it and only run forward ([`FinishedLayers`]).
//!
//! Windows past `held_out` ride along without being counted: comparing both models' outputs on them at the end says how
//! good these settings are, on text the statistics have not seen.

use anyhow::{Context, Result, bail};

use super::settings::Settings;
use super::smoothing::{Factors, Linears, Smoothing, divide_rows, multiply_columns};
use super::sums::{Sums, sampled_rows};
use crate::backend::parked::{Parked, Room};
use crate::backend::{Batch, MomentSums, SecondMoments};
use crate::method::solve::{self, Deviation, Solve, Solved};
use crate::model::TensorSource;
use crate::model::block::{Half, Layer, LayerConstants};
use crate::model::config::Config;
use crate::model::layers::{Layers, Streamed};
use crate::names::{Role, TensorId};
use crate::scheme::fit::{self, fit};
use crate::scheme::{Activations, QTensor, Scheme};
use crate::tensor::{Dense, Matrix};

/// Tokens that pass through a layer together.
pub(super) const CHUNK_TOKENS: usize = 4096;
/// Tokens whose inputs a search for smoothing factors sees, of every chunk at most.
const SAMPLED_TOKENS: usize = 512;

/// What to calibrate, and on what.
pub struct Request<'a> {
    /// Token windows of one length; at least one.
    pub windows: &'a [Vec<u32>],
    /// How many of the windows, the last ones, stay out of the statistics.
    pub held_out: usize,
    /// The scheme of each weight, `None` for those kept as they are.
    pub scheme: &'a (dyn Fn(TensorId) -> Option<Scheme> + Sync),
    /// What the engine will do to the inputs of quantized linears.
    pub activations: Activations,
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
    /// Its codes and scales, and what rounding cost.
    pub solved: Solved,
    /// Tokens its statistics come from; 0 for tensors rounded without.
    pub tokens: usize,
    /// How strongly its input was smoothed.
    pub smoothing: Option<f32>,
}

impl Request<'_> {
    /// Whether that tensor, though kept, comes from [`calibrate`], since it may be rewritten.
    pub fn rewrites(&self, id: TensorId) -> bool {
        self.settings.smoothing != Smoothing::Off && matches!(id.role, Role::AttnNorm | Role::FfnNorm)
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
    let Some(scheme) = (run.request.scheme)(id) else { return Ok(None) };
    let weight = source.read(id)?;
    let [rows, cols] = weight.dims();
    let q = fit(scheme, &weight.to_f32(), rows, cols, None, run.request.settings.scale_rule);
    let solved =
        Solved { q: q.clone(), error_nearest: f64::NAN, error: f64::NAN, deviation: Deviation::default() };
    run.done.push(Finished::Quantized(Calibrated { id, solved, tokens: 0, smoothing: None }));
    Ok(Some(q))
}

impl<'a, B: SecondMoments> Run<'a, B> {
    /// Starts both streams with the embeddings of all windows.
    fn embed(&mut self, source: &impl TensorSource, quantized: Option<QTensor>) -> Result<()> {
        let full = self.backend.upload(source.read(TensorId::global(Role::Embed))?)?;
        let quantized = quantized.map(|q| self.backend.upload(Matrix::Quantized(q))).transpose()?;
        let windows = self.request.windows;
        let (counted, held_out) = windows.split_at(windows.len() - self.request.held_out);
        let (tokens, hidden) = (windows[0].len(), self.config.hidden_size);
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
                    ids,
                    pending: None,
                });
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
        for half in Half::ALL {
            if half == Half::FeedForward {
                inner = self.inner_factors(source, index, quantized)?;
            }
            let sums = self.sum_normed(half, full)?;
            self.stage(source, index, half.inputs(), sums, inner.as_ref(), quantized)?;
            let sums = self.sum_mixed(half, full, quantized)?;
            self.stage(source, index, &[half.output()], sums, inner.as_ref(), quantized)?;
            self.add_output(half, quantized)?;
        }
        Ok(())
    }

    /// Sums what the first linears of a half read.
    fn sum_normed(&self, half: Half, full: &Layer<B>) -> Result<Sums<'a, B>> {
        let backend = self.backend;
        let counted = || self.chunks.iter().filter(|chunk| chunk.counted);
        let smooth = self.request.settings.smoothing != Smoothing::Off;
        // Smoothing changes the units of a norm's outputs before they are rounded, after they are summed.
        let rounded = if smooth { Activations::Full } else { self.request.activations };
        let sampled = if smooth { (2 * SAMPLED_TOKENS).div_ceil(counted().count().max(1)) } else { 0 };
        let sums = Sums::new(backend, self.config.hidden_size, None)?;
        let mut sums = sums.with_sample(sampled).with_rounding(rounded);
        for chunk in counted() {
            let norm = |stream: &Parked<B>| {
                backend.rms_norm(stream.get(backend)?.as_ref(), full.norm(half), self.constants.eps)
            };
            sums.add(chunk.ids.len(), &norm(&chunk.full)?, &norm(&chunk.quantized)?, None)?;
        }
        Ok(sums)
    }

    /// Sums what the last linear of a half reads, and carries the full-precision streams through the half.
    fn sum_mixed(&mut self, half: Half, full: &Layer<B>, quantized: &Layer<B>) -> Result<Sums<'a, B>> {
        let (backend, config, constants) = (self.backend, self.config, &self.constants);
        let width = match half {
            Half::Attention => config.num_attention_heads * config.head_dim,
            Half::FeedForward => config.intermediate_size,
        };
        let sums = Sums::new(backend, width, Some(config.hidden_size))?;
        let mut sums = sums.with_rounding(self.request.activations);
        let mut room = self.room;
        for Chunk { ids, batch, counted, full: stream, quantized: other, pending } in &mut self.chunks {
            let other = other.get(backend)?;
            let mixed_q = quantized.mixed(backend, constants, half, &other, *batch)?;
            stream.update(backend, |stream| {
                let mixed = full.mixed(backend, constants, half, stream, *batch)?;
                if *counted {
                    sums.add(ids.len(), &mixed, &mixed_q, Some((stream, &other)))?;
                }
                full.output(half).add_forward(backend, stream, &mixed)
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
                quantized.output(half).add_forward(backend, stream, &mixed)
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
                    self.exchange(done.id, weight, quantized)?;
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
                stream
                    .update(backend, |x| layer.forward(backend, constants, x, *batch, &mut |_, _| Ok(())))?;
            }
        }
        Ok(())
    }

    /// Puts a quantized weight into the quantized layer.
    fn exchange(&self, id: TensorId, weight: B::Weight, quantized: &mut Layer<B>) -> Result<()> {
        let linear =
            quantized.linear_mut(id.role).with_context(|| format!("`{id}` is no linear of a layer"))?;
        linear.weight = weight;
        linear.activations = self.request.activations;
        Ok(())
    }

    /// Emits what is finished. Called where a device still has sums to work on, so that it need not wait for files.
    fn emit_done(&mut self) -> Result<()> {
        self.done.drain(..).try_for_each(|done| (self.emit)(done))
    }

    /// Returns the weights of a layer's linears of these roles with their schemes, those that are quantized.
    fn wanted(&self, layer: usize, roles: &[Role]) -> Vec<(TensorId, Scheme)> {
        let ids = roles.iter().map(|&role| TensorId::in_layer(layer, role));
        ids.filter_map(|id| Some((id, (self.request.scheme)(id)?))).collect()
    }

    /// Returns the factors that move size between up and down, from what `down` of this layer sees before gate and up are
    /// quantized; `None` without smoothing, or where up has a bias, which would have to follow.
    fn inner_factors(
        &self,
        source: &impl TensorSource,
        layer: usize,
        quantized: &Layer<B>,
    ) -> Result<Option<Factors>> {
        let (smoothing, wanted) = (self.request.settings.inner_smoothing, self.wanted(layer, &[Role::Down]));
        let up = (self.request.scheme)(TensorId::in_layer(layer, Role::Up));
        if smoothing == Smoothing::Off || wanted.is_empty() || up.is_none() || self.config.mlp_bias {
            return Ok(None);
        }
        let mut inputs = Vec::new();
        for chunk in self.chunks.iter().filter(|chunk| chunk.counted).take(2) {
            let stream = chunk.quantized.get(self.backend)?;
            let normed = self.backend.rms_norm(&stream, &quantized.ffn_norm, self.constants.eps)?;
            let rows = sampled_rows(chunk.ids.len(), SAMPLED_TOKENS);
            let normed = self.backend.select_rows(&normed, &rows)?;
            inputs.extend(self.backend.read(&quantized.gated(self.backend, &normed)?)?);
        }
        let weights = [(source.read(wanted[0].0)?.to_f32(), wanted[0].1)];
        let cols = self.config.intermediate_size;
        let activations = self.request.activations;
        let linears =
            Linears { inputs: &inputs, cols, weights: &weights, activations, against_weights: false };
        linears.factors(self.backend, smoothing).map(Some)
    }

    /// Folds smoothing factors for the linears behind a norm into its gain. `inputs` are rows of what they read.
    fn norm_factors(
        &mut self,
        source: &impl TensorSource,
        norm: TensorId,
        inputs: &[f32],
        wanted: &[(TensorId, Scheme)],
        gain: &mut B::Tensor,
    ) -> Result<Factors> {
        let weights = wanted.iter().map(|&(id, scheme)| Ok((source.read(id)?.to_f32(), scheme)));
        let weights = weights.collect::<Result<Vec<_>>>()?;
        let (cols, activations) = (self.config.hidden_size, self.request.activations);
        let against_weights = activations != Activations::Full;
        let linears = Linears { inputs, cols, weights: &weights, activations, against_weights };
        let mut factors = linears.factors(self.backend, self.request.settings.smoothing)?;
        let Matrix::Dense(stored) = source.read(norm)? else {
            bail!("`{norm}` is quantized, wanted plain numbers")
        };
        let values = factors.fold(&stored).to_f32();
        *gain = self.backend.tensor(1, cols, &values)?;
        self.done.push(Finished::Rewritten(norm, values));
        Ok(factors)
    }

    /// Quantizes linears that share an input, emits them and exchanges them in the quantized layer. `inner` moves size
    /// between up and down.
    fn stage(
        &mut self,
        source: &impl TensorSource,
        layer: usize,
        roles: &[Role],
        mut sums: Sums<B>,
        inner: Option<&Factors>,
        quantized: &mut Layer<B>,
    ) -> Result<()> {
        self.emit_done()?;
        let wanted = self.wanted(layer, roles);
        let norm = match roles[0] {
            Role::Q => Some((Role::AttnNorm, &mut quantized.attn_norm)),
            Role::Gate => Some((Role::FfnNorm, &mut quantized.ffn_norm)),
            _ => None,
        };
        let norm = norm.map(|(role, gain)| (TensorId::in_layer(layer, role), gain));
        let norm = norm.filter(|(id, _)| self.request.rewrites(*id));
        if wanted.len() < roles.len() {
            if let Some((norm, _)) = norm {
                // Something behind it stays as it is, and so does the norm.
                self.done.push(Finished::Rewritten(norm, source.read(norm)?.to_f32()));
            }
            if wanted.is_empty() {
                return Ok(());
            }
            return self.solve(source, wanted, sums.moments, None, None, quantized);
        }
        let inputs = std::mem::take(&mut sums.sample);
        let mut moments = sums.moments;
        let mut factors = None;
        if let Some((norm, gain)) = norm {
            let found = self.norm_factors(source, norm, &inputs, &wanted, gain)?;
            moments.rescale(self.backend, &found.scales)?;
            factors = Some(found);
        } else if let (Role::Down, Some(inner)) = (roles[0], inner) {
            moments.rescale_full(self.backend, &inner.scales)?;
            factors = Some(inner.clone());
        }
        self.solve(source, wanted, moments, factors.as_ref(), inner, quantized)
    }

    /// Quantizes, emits and exchanges the linears of a stage: `factors` are those of their input, `inner` those between up
    /// and down.
    fn solve(
        &mut self,
        source: &impl TensorSource,
        wanted: Vec<(TensorId, Scheme)>,
        moments: MomentSums<B::Tensor>,
        factors: Option<&Factors>,
        inner: Option<&Factors>,
        quantized: &mut Layer<B>,
    ) -> Result<()> {
        let roles = [wanted[0].0.role];
        let tokens = moments.tokens;
        let prepared = |id: TensorId| -> Result<Matrix> {
            let stored = source.read(id)?;
            let inner = inner.filter(|_| id.role == Role::Up);
            if factors.is_none() && inner.is_none() {
                return Ok(stored);
            }
            let mut weights = stored.to_f32();
            if let Some(factors) = factors {
                multiply_columns(&mut weights, &factors.scales);
            }
            if let Some(inner) = inner {
                divide_rows(&mut weights, &inner.scales);
            }
            Ok(Matrix::Dense(Dense::from_f32(stored.dims().to_vec(), &weights)))
        };
        let knobs = self.request.settings.knobs(roles[0]);
        let solver = self.backend.solver(moments, knobs).with_context(|| format!("{}", wanted[0].0))?;
        // What engines join into one matrix gets one factor.
        let joined = wanted.iter().any(|(_, scheme)| fit::global_scale(scheme, 1.0).is_some());
        let mut amax = None;
        for (id, _) in wanted.iter().filter(|_| joined) {
            amax = Some(solve::amax(&prepared(*id)?).max(amax.unwrap_or(0.0)));
        }
        for (id, scheme) in wanted {
            let weights = prepared(id)?;
            let global = amax.and_then(|amax| fit::global_scale(&scheme, amax));
            let (solved, weight) =
                solver.quantize(&weights, scheme, global).with_context(|| format!("{id}"))?;
            self.exchange(id, weight, quantized)?;
            let smoothing = factors.map(|factors| factors.strength);
            self.done.push(Finished::Quantized(Calibrated { id, solved, tokens, smoothing }));
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
        let quantized = match (self.request.scheme)(id) {
            None => None,
            Some(scheme) if self.config.tie_word_embeddings => {
                let [rows, cols] = weight.dims();
                let rule = self.request.settings.scale_rule;
                let q = fit(scheme, &weight.to_f32(), rows, cols, None, rule);
                Some(backend.upload(Matrix::Quantized(q))?)
            }
            Some(scheme) => {
                let mut sums = Sums::new(backend, self.config.hidden_size, None)?;
                for chunk in self.chunks.iter().filter(|chunk| chunk.counted) {
                    let [full, quantized] = self.normed(chunk, &gain)?;
                    sums.add(chunk.ids.len(), &full, &quantized, None)?;
                }
                let tokens = sums.moments.tokens;
                let solver = backend.solver(sums.moments, self.request.settings.knobs(Role::Head))?;
                let (solved, quantized) = solver.quantize(&weight, scheme, None)?;
                self.done.push(Finished::Quantized(Calibrated { id, solved, tokens, smoothing: None }));
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
