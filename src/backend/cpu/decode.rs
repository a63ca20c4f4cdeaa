//! Generation: one token of every sequence at a time, over F32 keys and values that grow as they are used.

use anyhow::{Context, Result, ensure};
use ndarray::{Array2, Axis, s};
use rayon::prelude::*;

use super::Cpu;
use super::attention::attend_one;
use super::rotation::Rotations;
use crate::backend::kv_cache::KvCache;
use crate::backend::{Backend, Batch};
// Upwards by contract: a decoder runs the layers of a model token by token, as generating asks for it.
use crate::generate::{Decoder, Draw, Generate};
use crate::model::Model;
use crate::model::block::LayerConstants;
use crate::scheme::Activations;

/// Rows of one register tile of a product, four times: past it the time per token hardly falls.
const SEQUENCES: usize = 32;

impl Generate for Cpu {
    fn sequences_at_once(&self) -> usize {
        SEQUENCES
    }

    fn decoder<'a>(
        &'a self,
        model: &'a Model<Cpu>,
        kv_cache: KvCache,
        sequences: usize,
        capacity: usize,
    ) -> Result<Box<dyn Decoder + 'a>> {
        let context = model.config.max_position_embeddings;
        ensure!(capacity <= context, "{capacity} tokens exceed the model's context of {context}");
        let layers = model.layers.len();
        Ok(Box::new(CpuDecoder {
            model,
            constants: model.constants.with_cache(kv_cache).for_length(capacity),
            capacity,
            rotations: Rotations::new(&model.constants.rope, capacity),
            caches: (0..sequences).map(|_| Cache::new(layers)).collect(),
            logits: Array2::zeros((sequences, model.config.vocab_size)),
        }))
    }
}

/// Keys and values of one sequence: per layer, `[tokens, kv_heads · head_dim]`, row-major.
struct Cache {
    layers: Vec<(Vec<f32>, Vec<f32>)>,
    tokens: usize,
    draw: Draw,
}

impl Cache {
    fn new(layers: usize) -> Self {
        Cache { layers: vec![Default::default(); layers], tokens: 0, draw: Draw::GREEDY }
    }
}

struct CpuDecoder<'a> {
    model: &'a Model<Cpu>,
    constants: LayerConstants,
    capacity: usize,
    rotations: Rotations,
    caches: Vec<Cache>,
    /// `[sequences, vocab]`
    logits: Array2<f32>,
}

impl Decoder for CpuDecoder<'_> {
    fn sequences(&self) -> usize {
        self.caches.len()
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn prefill(&mut self, sequence: usize, prompt: &[u32], draw: Draw) -> Result<()> {
        ensure!(
            (1..=self.capacity).contains(&prompt.len()),
            "a prompt of {} tokens for a sequence of up to {}",
            prompt.len(),
            self.capacity
        );
        let model = self.model;
        let batch = Batch { sequences: 1, tokens: prompt.len() };
        let mut x = model.embed(&Cpu, prompt)?;
        let cache = &mut self.caches[sequence];
        (cache.tokens, cache.draw) = (prompt.len(), draw);
        for (layer, cache) in model.layers.iter().zip(&mut cache.layers) {
            let normed = Cpu.rms_norm(&x, &layer.attn_norm, model.constants.eps)?;
            let [q, k, v] = layer.queries_keys_values(&Cpu, &self.constants, &normed, batch)?;
            let mixed = layer.mix(&Cpu, &model.constants, [&q, &k, &v], batch)?;
            *cache = (Cpu.read(&k)?, Cpu.read(&v)?);
            layer.finish(&Cpu, &model.constants, &mut x, &mixed)?;
        }
        let last = Cpu.select_rows(&x, &[prompt.len() - 1])?;
        self.keep_logits(&last, &[sequence])
    }

    fn step(&mut self, tokens: &[Option<u32>]) -> Result<()> {
        let (running, ids): (Vec<usize>, Vec<u32>) =
            tokens.iter().enumerate().filter_map(|(sequence, token)| Some((sequence, (*token)?))).unzip();
        for &sequence in &running {
            let length = self.caches.get(sequence).map_or(0, |cache| cache.tokens);
            ensure!(
                length > 0 && length < self.capacity,
                "sequence {sequence} holds {length} of {} tokens and cannot be continued",
                self.capacity
            );
        }
        let model = self.model;
        let mut x = model.embed(&Cpu, &ids)?;
        for (at, layer) in model.layers.iter().enumerate() {
            let normed = Cpu.rms_norm(&x, &layer.attn_norm, model.constants.eps)?;
            let [mut q, mut k, mut v] = layer.projections(&Cpu, &model.constants, &normed)?;
            for (row, &sequence) in running.iter().enumerate().filter(|_| layer.turns) {
                let position = self.caches[sequence].tokens;
                self.rotations.turn(&mut q, row, position);
                self.rotations.turn(&mut k, row, position);
            }
            let (kind, head_dim) = (self.constants.kv_cache, self.constants.attention.head_dim);
            Cpu.round_cache(&mut k, kind, head_dim, layer.kv_scales[0])?;
            Cpu.round_cache(&mut v, kind, head_dim, layer.kv_scales[1])?;
            let mixed = self.attend(at, &running, &q, &k, &v);
            layer.finish(&Cpu, &model.constants, &mut x, &mixed)?;
        }
        running.iter().for_each(|&sequence| self.caches[sequence].tokens += 1);
        self.keep_logits(&x, &running)
    }

    fn next_tokens(&mut self) -> Result<Vec<u32>> {
        let rows = self.logits.axis_iter(Axis(0)).into_par_iter().zip(&self.caches);
        rows.map(|(row, cache)| {
            let chosen = row.as_slice().and_then(|logits| cache.draw.choose(logits, cache.tokens));
            chosen.context("logits are not finite; the weights hold NaN, or infinite values")
        })
        .collect()
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        Cpu.read(&self.logits)
    }
}

impl CpuDecoder<'_> {
    /// Appends a key and a value to each running sequence and attends over all of them.
    fn attend(
        &mut self,
        layer: usize,
        running: &[usize],
        q: &Array2<f32>,
        k: &Array2<f32>,
        v: &Array2<f32>,
    ) -> Array2<f32> {
        for (row, &sequence) in running.iter().enumerate() {
            let (keys, values) = &mut self.caches[sequence].layers[layer];
            keys.extend(k.row(row));
            values.extend(v.row(row));
        }
        let model = self.model;
        let shape = &model.layers[layer].attention(&model.constants);
        let sinks = model.layers[layer].sinks.as_ref();
        let mut mixed = Array2::zeros(q.dim());
        mixed.axis_iter_mut(Axis(0)).into_par_iter().enumerate().for_each(|(row, mut mixed)| {
            let (keys, values) = &self.caches[running[row]].layers[layer];
            for head in 0..shape.heads {
                let columns = head * shape.head_dim..(head + 1) * shape.head_dim;
                let kv_head = head / (shape.heads / shape.kv_heads);
                let query = q.slice(s![row, columns.clone()]);
                let mut out = mixed.slice_mut(s![columns]);
                let (query, out) = (query.to_slice(), out.as_slice_mut());
                let (query, out) = query.zip(out).expect("rows are contiguous");
                let sink = sinks.map(|sinks| sinks[[0, head]]);
                attend_one(query, keys, values, kv_head, sink, shape, out);
            }
        });
        mixed
    }

    /// Computes the logits that follow `x` `[running, hidden]`.
    fn keep_logits(&mut self, x: &Array2<f32>, running: &[usize]) -> Result<()> {
        let model = self.model;
        let hidden = Cpu.rms_norm(x, &model.output_norm, model.constants.eps)?;
        let logits = Cpu.linear(&hidden, model.head(), None, Activations::Full)?;
        for (row, &sequence) in running.iter().enumerate() {
            self.logits.row_mut(sequence).assign(&logits.row(row));
        }
        Ok(())
    }
}
