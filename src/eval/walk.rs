//! The way of windows through one model: in passes, and in groups of passes whose residual streams wait at one layer
//! together.

use std::ops::Range;
use std::time::Instant;

use anyhow::{Context, Result};

use super::{Protocol, Samples, Subject, Text};
use crate::backend::parked::{Parked, Room};
use crate::backend::{Backend, Batch};
use crate::model::block::Layer;
use crate::model::layers::Layers;

/// How models run through a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Tokens that pass through a layer together; at least one window does.
    pub pass_tokens: usize,
    /// Tokens whose residual streams wait at one layer together; at least one pass does.
    pub group_tokens: usize,
    /// Device memory for streams, bytes; those past it wait in host memory. `None`: all stay on the device.
    pub room: Option<u64>,
}

impl Schedule {
    /// Returns the schedule of models that are in memory: one pass at a time, as large as the backend likes.
    pub fn resident<B: Backend>(backend: &B) -> Self {
        let tokens = backend.tokens_at_once();
        Schedule { pass_tokens: tokens, group_tokens: tokens, room: None }
    }
}

/// Windows that go through a layer at once, and their tokens.
pub(super) struct Pass {
    pub(super) windows: Range<usize>,
    pub(super) ids: Vec<u32>,
}

impl Pass {
    pub(super) fn batch(&self, protocol: &Protocol) -> Batch {
        Batch { sequences: self.windows.len(), tokens: protocol.n_ctx }
    }

    /// Returns the tokens that the scored positions predict.
    pub(super) fn targets(&self, rows: &[usize]) -> Vec<u32> {
        rows.iter().map(|&row| self.ids[row + 1]).collect()
    }
}

/// Returns the windows of a text, about `tokens` tokens at a time.
pub(super) fn passes(tokens: usize, text: &Text) -> impl Iterator<Item = Pass> {
    let protocol = &text.protocol;
    let at_once = (tokens / protocol.n_ctx).max(1);
    (0..protocol.windows).step_by(at_once).map(move |first| {
        let windows = first..protocol.windows.min(first + at_once);
        let ids = windows.clone().flat_map(|window| protocol.window(&text.tokens, window)).collect();
        Pass { windows, ids }
    })
}

/// Returns the passes of a text in groups.
pub(super) fn groups(schedule: Schedule, text: &Text) -> Vec<Vec<Pass>> {
    let at_once = (schedule.pass_tokens / text.protocol.n_ctx).max(1);
    let passes_at_once = (schedule.group_tokens / (at_once * text.protocol.n_ctx)).max(1);
    let mut groups: Vec<Vec<Pass>> = Vec::new();
    for pass in passes(schedule.pass_tokens, text) {
        match groups.last_mut().filter(|group| group.len() < passes_at_once) {
            Some(group) => group.push(pass),
            None => groups.push(vec![pass]),
        }
    }
    groups
}

/// One model and one group of passes.
pub(super) struct Work<'a, B: Backend, M: Layers<B>> {
    pub(super) backend: &'a B,
    pub(super) subject: &'a Subject<'a, M>,
    pub(super) protocol: &'a Protocol,
    pub(super) group: &'a [Pass],
}

impl<B: Backend, M: Layers<B>> Work<'_, B, M> {
    /// Runs the group and returns the final hidden states at the scored positions, one for each pass.
    pub(super) fn hidden(
        &self,
        room: Room,
        samples: &mut Samples,
        progress: &dyn Fn(usize),
    ) -> Result<Vec<Parked<B>>> {
        let Work { backend, subject, protocol, group } = *self;
        let model = subject.model;
        let constants = model.constants().with_cache(subject.kv_cache);
        let last = model.config().num_hidden_layers - 1;
        backend.wait()?;
        let started = Instant::now();
        let mut streams = self.embed(room).with_context(|| subject.name.clone())?;
        let mut visit = |at: usize, layer: &Layer<B>| {
            for (stream, pass) in streams.iter_mut().zip(group) {
                let batch = pass.batch(protocol);
                let work = |x: &mut B::Tensor| match at < last {
                    true => layer.forward(backend, &constants, x, batch, &mut |_, _, _| Ok(())),
                    false => {
                        let rows = protocol.scored_rows(batch.sequences);
                        *x = layer.forward_at(backend, &constants, x, batch, &rows)?;
                        Ok(())
                    }
                };
                stream.update(backend, work).with_context(|| format!("{}, layer {at}", self.place(pass)))?;
                progress(pass.windows.len());
            }
            Ok(())
        };
        model.each_layer(backend, &mut visit)?;
        let gain = model.final_norm(backend)?;
        for stream in &mut streams {
            stream.update(backend, |x| {
                *x = backend.rms_norm(x, &gain, constants.eps)?;
                Ok(())
            })?;
        }
        backend.wait()?;
        samples.add_pass(group.iter().map(|pass| pass.ids.len()).sum(), started.elapsed());
        Ok(streams)
    }

    /// Starts the residual streams.
    fn embed(&self, mut room: Room) -> Result<Vec<Parked<B>>> {
        let table = self.subject.model.embeddings(self.backend)?;
        let hidden = self.subject.model.config().hidden_size;
        let streams = self.group.iter().map(|pass| {
            let x = self.backend.embed(&table, &pass.ids)?;
            Parked::new(self.backend, room.place((pass.ids.len() * hidden * 4) as u64), x, hidden)
        });
        streams.collect()
    }

    /// Scores hidden states.
    pub(super) fn score(&self, hidden: &[Parked<B>], samples: &mut Samples) -> Result<()> {
        let head = self.subject.model.output_head(self.backend)?;
        for (hidden, pass) in hidden.iter().zip(self.group) {
            let targets = pass.targets(&self.protocol.scored_rows(pass.windows.len()));
            let scores = self.backend.score(hidden.get(self.backend)?.as_ref(), &head, &targets);
            scores.and_then(|scores| samples.add_scores(&scores)).with_context(|| self.place(pass))?;
        }
        Ok(())
    }

    /// Compares hidden states with those of a baseline, whose head is given.
    pub(super) fn compare(
        &self,
        reference: &[Parked<B>],
        reference_head: &B::Weight,
        hidden: &[Parked<B>],
        samples: &mut Samples,
    ) -> Result<()> {
        let backend = self.backend;
        let head = self.subject.model.output_head(backend)?;
        for ((reference, hidden), pass) in reference.iter().zip(hidden).zip(self.group) {
            let targets = pass.targets(&self.protocol.scored_rows(pass.windows.len()));
            let (reference, hidden) = (reference.get(backend)?, hidden.get(backend)?);
            let found = backend.compare((&reference, reference_head), (&hidden, &head), &targets);
            found.and_then(|found| samples.add(found)).with_context(|| self.place(pass))?;
        }
        Ok(())
    }

    /// Says where something went wrong.
    fn place(&self, pass: &Pass) -> String {
        let (name, windows) = (&self.subject.name, &pass.windows);
        match windows.len() {
            1 => format!("{name}, window {}", windows.end),
            _ => format!("{name}, windows {} to {}", windows.start + 1, windows.end),
        }
    }
}
