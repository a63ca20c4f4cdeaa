//! What is done about the inputs of a stage before its linears are quantized: smoothing factors are found and folded, and
//! the scale of static inputs is fixed.

use anyhow::{Context, Result, bail, ensure};

use super::{Layer, Run};
use crate::backend::SecondMoments;
use crate::calib::inputs::{Inputs, rows_of_each, sampled_rows};
use crate::calib::smoothing::{Factors, divide_rows, multiply_columns};
use crate::model::TensorSource;
use crate::model::stages::{Half, Stage};
use crate::names::{Role, TensorId};
use crate::scheme::{Activations, Choice};
use crate::tensor::{Dense, Matrix};

/// What the linears of a stage are quantized for.
#[derive(Default)]
pub(super) struct Prepared {
    /// What the channels of their input are divided by.
    pub(super) factors: Option<Factors>,
    /// What the engine does to their input.
    pub(super) rounding: Activations<f32>,
}

/// Returns what engines do to the one input that all these linears read; nothing where there are none.
///
/// # Errors
/// If they differ: an input is prepared, and its moments are summed, once.
pub(super) fn inputs_of(wanted: &[(TensorId, Choice)]) -> Result<Activations> {
    let Some((first, Choice { inputs, .. })) = wanted.first() else { return Ok(Activations::Full) };
    for (other, choice) in wanted {
        ensure!(
            choice.inputs == *inputs,
            "`{first}` and `{other}` read one input, but it is rounded differently for each; give both the same format"
        );
    }
    Ok(*inputs)
}

/// Reads a weight whose input channels are divided by `columns`, and whose outputs by `rows`.
pub(super) fn rescaled(
    source: &impl TensorSource,
    id: TensorId,
    columns: Option<&Factors>,
    rows: Option<&Factors>,
) -> Result<Matrix> {
    let stored = source.read(id)?;
    if columns.is_none() && rows.is_none() {
        return Ok(stored);
    }
    let mut weights = stored.to_f32();
    if let Some(columns) = columns {
        multiply_columns(&mut weights, &columns.scales);
    }
    if let Some(rows) = rows {
        divide_rows(&mut weights, &rows.scales);
    }
    Ok(Matrix::Dense(Dense::from_f32(stored.dims().to_vec(), &weights)))
}

impl<'a, B: SecondMoments> Run<'a, B> {
    /// Prepares the linears behind a norm: folds smoothing factors into its gain, and emits it.
    pub(super) fn prepare_normed(
        &mut self,
        source: &impl TensorSource,
        layer: usize,
        stage: &Stage,
        quantized: &mut Layer<B>,
    ) -> Result<Prepared> {
        let half = stage.half;
        let wanted = self.wanted(stage);
        let activations = inputs_of(&wanted)?;
        let role = if half == Half::Attention { Role::AttnNorm } else { Role::FfnNorm };
        let norm = TensorId::in_layer(layer, role);
        let mut smooth = self.request.rewrites(norm);
        if smooth && wanted.len() < stage.linears.len() {
            // Something behind it stays as it is, and so does the norm.
            self.done.push(super::Finished::Rewritten(norm, source.read(norm)?.to_f32()));
            smooth = false;
        }
        if wanted.is_empty() {
            return Ok(Prepared::default());
        }
        if !smooth && !activations.is_static() {
            let rounding = activations.with_scale(|| bail!("no scale was searched"))?;
            return Ok(Prepared { factors: None, rounding });
        }
        let inputs = self.normed_inputs(half, quantized)?;
        let factors = match smooth {
            true => Some(self.fold(source, norm, &inputs.sample, quantized.norm_mut(half))?),
            false => None,
        };
        let rounding = self.rounding(source, &inputs, factors.as_ref(), true, &wanted)?;
        Ok(Prepared { factors, rounding })
    }

    /// Prepares the linear with which a half ends. `inner` are the factors between up and down.
    pub(super) fn prepare_mixed(
        &mut self,
        source: &impl TensorSource,
        stage: &Stage,
        inner: Option<&Factors>,
        quantized: &Layer<B>,
    ) -> Result<Prepared> {
        let wanted = self.wanted(stage);
        let activations = inputs_of(&wanted)?;
        if wanted.is_empty() {
            return Ok(Prepared::default());
        }
        let factors = inner.filter(|_| stage.half == Half::FeedForward).cloned();
        let rounding = match activations.is_static() {
            true => {
                let inputs = self.mixed_inputs(stage, quantized)?;
                self.rounding(source, &inputs, factors.as_ref(), false, &wanted)?
            }
            false => activations.with_scale(|| bail!("no scale was searched"))?,
        };
        Ok(Prepared { factors, rounding })
    }

    /// Returns what the engine will do to inputs that linears read whose columns `factors` rescale; `divide` says that the
    /// inputs are not in those units yet.
    fn rounding(
        &self,
        source: &impl TensorSource,
        inputs: &Inputs<B>,
        factors: Option<&Factors>,
        divide: bool,
        wanted: &[(TensorId, Choice)],
    ) -> Result<Activations<f32>> {
        inputs_of(wanted)?.with_scale(|| {
            let weights = wanted.iter().map(|&(id, _)| rescaled(source, id, factors, None));
            let weights = weights.collect::<Result<Vec<_>>>()?;
            let divisors = factors.filter(|_| divide).map(|factors| &factors.scales[..]);
            inputs.static_scale(divisors, &weights).with_context(|| format!("{}", wanted[0].0))
        })
    }

    /// Looks at what the first linears of a half read.
    fn normed_inputs(&self, half: Half, quantized: &Layer<B>) -> Result<Inputs<'a, B>> {
        let backend = self.backend;
        let counted = || self.chunks.iter().filter(|chunk| chunk.counted);
        let mut inputs = Inputs::new(backend, self.config.hidden_size, counted().count())?;
        for chunk in counted() {
            let stream = chunk.quantized.get(backend)?;
            let normed = backend.rms_norm(&stream, quantized.norm(half), self.constants.eps)?;
            inputs.add(chunk.ids.len(), &normed)?;
        }
        Ok(inputs)
    }

    /// Looks at what the last linear of a half reads, and keeps it where there is room.
    fn mixed_inputs(&mut self, stage: &Stage, quantized: &Layer<B>) -> Result<Inputs<'a, B>> {
        let (backend, half, width) = (self.backend, stage.half, stage.cols());
        let counted = self.chunks.iter().filter(|chunk| chunk.counted).count();
        let mut inputs = Inputs::new(backend, width, counted)?;
        let mut room = self.room;
        for chunk in &mut self.chunks {
            let stream = chunk.quantized.get(backend)?;
            let mixed = quantized.mixed(backend, &self.constants, half, &stream, chunk.batch)?;
            if chunk.counted {
                inputs.add(chunk.ids.len(), &mixed)?;
            }
            let bytes = chunk.ids.len() * width * backend.value_bytes();
            chunk.pending = room.take(bytes as u64).then_some(mixed);
        }
        Ok(inputs)
    }

    /// Returns the factors that move size between up and down, from what `down` of this layer sees before gate and up are
    /// quantized; `None` without smoothing, or where up has a bias, which would have to follow.
    pub(super) fn inner_factors(&self, layer: usize, quantized: &Layer<B>) -> Result<Option<Factors>> {
        let strength = self.request.settings.inner_smoothing;
        let up = self.config.linears_of(layer).find(|linear| linear.id.role == Role::Up);
        let (Some(up), Some(down)) = (up, self.config.output_stage(layer, Half::FeedForward)) else {
            return Ok(None);
        };
        let both = !self.wanted(&down).is_empty() && (self.request.choice)(up.id).is_some();
        if strength == 0.0 || !both || up.bias {
            return Ok(None);
        }
        let counted = || self.chunks.iter().filter(|chunk| chunk.counted);
        let sampled = rows_of_each(counted().count());
        let mut inputs = Vec::new();
        for chunk in counted() {
            let stream = chunk.quantized.get(self.backend)?;
            let stream = self.backend.select_rows(&stream, &sampled_rows(chunk.ids.len(), sampled))?;
            let normed = self.backend.rms_norm(&stream, &quantized.ffn_norm, self.constants.eps)?;
            inputs
                .extend(self.backend.read(&quantized.ffn.dense("smoothing")?.mixed(self.backend, &normed)?)?);
        }
        Ok(Some(Factors::new(&inputs, down.cols(), strength)))
    }

    /// Folds smoothing factors for the linears behind a norm into its gain. `inputs` are rows of what they read.
    fn fold(
        &mut self,
        source: &impl TensorSource,
        norm: TensorId,
        inputs: &[f32],
        gain: &mut B::Tensor,
    ) -> Result<Factors> {
        let cols = self.config.hidden_size;
        let mut factors = Factors::new(inputs, cols, self.request.settings.smoothing);
        let Matrix::Dense(stored) = source.read(norm)? else {
            bail!("`{norm}` is quantized, wanted plain numbers")
        };
        let values = factors.fold(&stored).to_f32();
        *gain = self.backend.tensor(1, cols, &values)?;
        self.done.push(super::Finished::Rewritten(norm, values));
        Ok(factors)
    }
}
