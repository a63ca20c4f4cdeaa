//! Generating tokens: one position of every sequence at a time, over a cache of keys and values.
//!
//! A step reads every packed weight once (`kernels/matvec.cu`) and is one CUDA graph: the token ids, positions and logits
//! it works on stay on the device, and so does the choice of the next token ([`Chooser`]). [`CudaDecoder::generate`] feeds
//! each step the token that the one before chose, without asking the host; through [`Decoder`] the host sees every token.

use anyhow::{Context, Result, ensure};
use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::attention::{cache_defines, frequencies, neighbours_define, sinks_define, window_argument};
use super::choose::Chooser;
use super::compile::Kernel;
use super::device::{Arg, Buffer, Geometry};
use super::matvec::{Destination, Input, MAX_TOKENS, Operand};
use super::{Cuda, Float, Tensor};
use crate::backend::kv_cache::KvCache;
use crate::backend::{Backend, Batch};
// Upwards by contract: a decoder runs the layers of a model token by token, as generating asks for it.
use crate::generate::{Decoder, Draw, Generate, Sampling};
use crate::model::Model;
use crate::model::block::{Layer, LayerConstants};
use crate::model::linear::Linear;
use crate::model::norms::QkNorm;
use crate::model::stages::Half;
use crate::scheme::Activations;

/// Blocks of `attend` that keep an H100 busy.
const ATTENTION_BLOCKS: usize = 264;

impl Generate for Cuda {
    fn sequences_at_once(&self) -> usize {
        MAX_TOKENS
    }

    fn decoder<'a>(
        &'a self,
        model: &'a Model<Cuda>,
        kv_cache: KvCache,
        sequences: usize,
        capacity: usize,
    ) -> Result<Box<dyn Decoder + 'a>> {
        Ok(Box::new(CudaDecoder::new(self, model, sequences, capacity)?.with_cache(kv_cache)))
    }
}

/// Widest row that a product norms itself.
const WIDEST_NORM: usize = 8192;

/// What a linear reads.
#[derive(Clone, Copy)]
enum From<'a> {
    /// The residual stream, normed with this gain.
    Residual(&'a Tensor),
    /// F16 values.
    Values(&'a Buffer),
}

/// Sequences that a model continues together.
pub struct CudaDecoder<'a> {
    cuda: &'a Cuda,
    model: &'a Model<Cuda>,
    constants: LayerConstants,
    capacity: usize,
    /// Tokens in the cache of each sequence; the device counts along.
    lengths: Vec<usize>,
    /// Keys and values of each layer, F16 `[sequences, capacity, kv_heads · head_dim]`.
    cache: Vec<(Buffer, Buffer)>,
    state: State,
    chooser: Chooser,
    step: Option<CudaGraph>,
}

/// Memory a step works in; the first dimension counts sequences.
struct State {
    /// F32 `[sequences, hidden]`: the residual stream.
    x: Buffer,
    /// F16 `[sequences, hidden]`
    normed: Buffer,
    /// F16, width of the queries, keys and values.
    q: Buffer,
    k: Buffer,
    v: Buffer,
    /// F16, width of the queries.
    mixed: Buffer,
    /// F16 `[sequences, intermediate]`
    gated: Buffer,
    /// Integers as F16, and their scales F32 `[sequences]`, for linears that quantize their inputs.
    codes: Buffer,
    scales: Buffer,
    /// Partial results of `attend` and their counters.
    partial: Buffer,
    arrived: Buffer,
}

/// Refuses what the decoding kernels do not do.
fn ensure_supported(cuda: &Cuda, model: &Model<Cuda>, sequences: usize, capacity: usize) -> Result<()> {
    let config = &model.config;
    let head_dim = config.head_dim;
    ensure!(cuda.float == Float::F16, "generation on the GPU runs in F16, without `--precise`");
    ensure!(
        (1..=MAX_TOKENS).contains(&sequences),
        "{sequences} sequences; generation on the GPU takes 1 to {MAX_TOKENS}"
    );
    ensure!(
        head_dim.is_multiple_of(16) && head_dim <= 256,
        "head size {head_dim}; generation on the GPU takes multiples of 16 up to 256"
    );
    ensure!(
        capacity <= config.max_position_embeddings,
        "{capacity} tokens exceed the model's context of {}",
        config.max_position_embeddings
    );
    ensure!(
        model.layers.iter().all(|layer| layer.turns),
        "some layers do not turn queries and keys by their position; generation on the GPU does: use --device cpu"
    );
    ensure!(
        config.qk_norm != Some(QkNorm::Row),
        "q and k are normed over all heads together; generation on the GPU norms each: use --device cpu"
    );
    Ok(())
}

impl<'a> CudaDecoder<'a> {
    /// Reserves memory for `sequences` sequences of up to `capacity` tokens.
    ///
    /// # Errors
    /// Too little memory, F32 activations, more than 32 sequences, and shapes the kernels do not take; each says what is
    /// wanted.
    pub fn new(
        cuda: &'a Cuda,
        model: &'a Model<Cuda>,
        sequences: usize,
        capacity: usize,
    ) -> Result<CudaDecoder<'a>> {
        ensure_supported(cuda, model, sequences, capacity)?;
        let config = &model.config;
        let head_dim = config.head_dim;
        let device = cuda.device();
        let kv_width = config.num_key_value_heads * head_dim;
        let q_width = config.num_attention_heads * head_dim;
        let cache = || device.allocate(sequences * capacity * kv_width * 2);
        let floats = |width: usize, float: Float| device.allocate(sequences * width * float.bytes());
        let widest = config.linears().map(|linear| linear.shape[1]).max().unwrap_or(config.hidden_size);
        let ffn_width = |layer| config.output_stage(layer, Half::FeedForward).map_or(0, |stage| stage.cols());
        let ffn = (0..config.num_hidden_layers).map(ffn_width).max().unwrap_or(0);
        let splits = splits(model, sequences, capacity);
        let state = State {
            x: floats(config.hidden_size, Float::F32)?,
            normed: floats(config.hidden_size, Float::F16)?,
            q: floats(q_width, Float::F16)?,
            k: floats(kv_width, Float::F16)?,
            v: floats(kv_width, Float::F16)?,
            mixed: floats(q_width, Float::F16)?,
            gated: floats(ffn, Float::F16)?,
            codes: floats(widest, Float::F16)?,
            scales: floats(1, Float::F32)?,
            partial: device.allocate(sequences * config.num_attention_heads * splits * (head_dim + 2) * 4)?,
            arrived: device.zeros(4 * sequences * config.num_attention_heads)?,
        };
        Ok(CudaDecoder {
            cuda,
            model,
            constants: model.constants.for_length(capacity),
            capacity,
            lengths: vec![0; sequences],
            cache: model.layers.iter().map(|_| Ok((cache()?, cache()?))).collect::<Result<_>>()?,
            state,
            chooser: Chooser::new(device, sequences, config.vocab_size, capacity)?,
            step: None,
        })
    }

    /// Returns the decoder with keys and values as `kv_cache` keeps them; [`KvCache::Exact`] leaves that to the model.
    pub fn with_cache(mut self, kv_cache: KvCache) -> Self {
        self.constants = self.model.constants.with_cache(kv_cache).for_length(self.capacity);
        self
    }

    /// Replaces all sequences with prompts of one length, one after another.
    pub fn prefill_all(&mut self, prompts: &[u32], sampling: &Sampling) -> Result<()> {
        let sequences = self.lengths.len();
        ensure!(prompts.len().is_multiple_of(sequences), "{} tokens for {sequences} prompts", prompts.len());
        let draws: Vec<Draw> = (0..sequences as u64).map(|prompt| sampling.draw(prompt)).collect();
        self.prefill_from(0, prompts, &draws)
    }

    /// Replaces sequences from `first` on with prompts of one length, one for each of `draws`.
    fn prefill_from(&mut self, first: usize, prompts: &[u32], draws: &[Draw]) -> Result<()> {
        let (count, sampled) = (draws.len(), self.chooser.samples());
        let tokens = prompts.len() / count;
        ensure!(
            (1..=self.capacity).contains(&tokens) && first + count <= self.lengths.len(),
            "a prompt of {tokens} tokens for a sequence of up to {}",
            self.capacity
        );
        let (cuda, model) = (self.cuda, self.model);
        let (device, batch) = (&cuda.device, Batch { sequences: count, tokens });
        let mut x = model.embed(cuda, prompts)?;
        let constants = &self.constants;
        for (layer, cache) in model.layers.iter().zip(&self.cache) {
            let normed = cuda.rms_norm(&x, &layer.attn_norm, constants.eps)?;
            let [q, k, v] = layer.queries_keys_values(cuda, constants, &normed, batch)?;
            self.keep(&k, &cache.0, first, batch)?;
            self.keep(&v, &cache.1, first, batch)?;
            let mixed = layer.mix(cuda, constants, [&q, &k, &v], batch)?;
            layer.finish(cuda, constants, &mut x, &mixed)?;
        }
        let last: Vec<usize> = (1..=count).map(|sequence| sequence * tokens - 1).collect();
        let x = cuda.rms_norm(&cuda.select_rows(&x, &last)?, &model.output_norm, constants.eps)?;
        let head = [Operand { weight: model.head(), bias: None, y: self.chooser.logits_of(first) }];
        cuda.matvec(Input { x: x.at(), norm: None, scales: None, tokens: count }, &head, Destination::F32)?;
        for (sequence, (prompt, draw)) in (first..).zip(prompts.chunks(tokens).zip(draws)) {
            self.chooser.start(device, sequence, prompt, *draw)?;
        }
        self.chooser.choose(device, first, count)?;
        if self.chooser.samples() != sampled {
            // Recorded without the kernels that sample.
            self.step = None;
        }
        self.lengths[first..first + count].fill(tokens);
        Ok(())
    }

    /// Queues the copy of prompts' keys or values `[batch · tokens, width]` into a cache.
    fn keep(&self, rows: &Tensor, cache: &Buffer, first: usize, batch: Batch) -> Result<()> {
        let row_bytes = rows.cols * rows.float.bytes();
        for sequence in 0..batch.sequences {
            let source = sequence * batch.tokens * row_bytes;
            let target = (first + sequence) * self.capacity * row_bytes;
            self.cuda.device.copy(rows.buffer(), source, cache, target, batch.tokens * row_bytes)?;
        }
        Ok(())
    }

    /// Generates `count` more tokens for every sequence.
    pub fn generate(&mut self, count: usize) -> Result<()> {
        for &length in &self.lengths {
            ensure!(
                length > 0 && length + count <= self.capacity,
                "{length} tokens and {count} more for a cache of {}",
                self.capacity
            );
        }
        for _ in 0..count {
            self.launch_step()?;
        }
        self.lengths.iter_mut().for_each(|length| *length += count);
        Ok(())
    }

    /// Returns all tokens of each sequence, the prompt first and the next token last; while there is room for that.
    pub fn tokens(&self) -> Result<Vec<Vec<u32>>> {
        self.chooser.texts(&self.cuda.device, &self.lengths)
    }

    fn launch_step(&mut self) -> Result<()> {
        if let Some(graph) = &self.step {
            return graph.launch().context("a decoding step does not start");
        }
        // The first step compiles and loads what it needs, which a recording must not.
        self.run_step()?;
        self.step = Some(self.record()?);
        Ok(())
    }

    fn record(&self) -> Result<CudaGraph> {
        let stream = self.cuda.device.stream();
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)?;
        let queued = self.run_step();
        let graph = stream.end_capture(CUgraphInstantiate_flags(0));
        queued?;
        graph?.context("a decoding step recorded nothing")
    }

    /// Queues one step: every sequence's token through all layers, and the choice of the next.
    fn run_step(&self) -> Result<()> {
        let (model, state) = (self.model, &self.state);
        model.embed.embed_into(&self.cuda.device, &self.chooser.ids, self.lengths.len(), &state.x)?;
        for (layer, cache) in model.layers.iter().zip(&self.cache) {
            let qkv = [(&layer.q, &state.q), (&layer.k, &state.k), (&layer.v, &state.v)];
            self.product(From::Residual(&layer.attn_norm), &qkv, Destination::F16)?;
            self.attend(layer, cache)?;
            self.product(From::Values(&state.mixed), &[(&layer.o, &state.x)], Destination::Add)?;
            let ffn = layer.ffn.dense("generation on a GPU")?;
            let gate_up = [(&ffn.gate, &state.gated), (&ffn.up, &state.gated)];
            self.product(From::Residual(&layer.ffn_norm), &gate_up, Destination::Swiglu)?;
            self.product(From::Values(&state.gated), &[(&ffn.down, &state.x)], Destination::Add)?;
        }
        let head = [Operand { weight: model.head(), bias: None, y: self.chooser.logits_of(0) }];
        self.cuda.matvec(self.normed(&model.output_norm, Activations::Full)?, &head, Destination::F32)?;
        self.chooser.choose(&self.cuda.device, 0, self.lengths.len())
    }

    /// Returns norm(residual stream) · gain as a product reads it: a lone sequence's is worked out by the product itself.
    fn normed<'b>(&'b self, gain: &'b Tensor, rounding: Activations<f32>) -> Result<Input<'b>> {
        let (state, eps, tokens) = (&self.state, self.model.constants.eps, self.lengths.len());
        if tokens == 1 && rounding == Activations::Full && gain.count() <= WIDEST_NORM {
            return Ok(Input { x: state.x.at(), norm: Some((gain, eps)), scales: None, tokens });
        }
        let (x, y) = ((state.x.at(), Float::F32), (state.normed.at(), Float::F16));
        self.cuda.norm_into(x, gain, y, tokens, eps)?;
        self.input(&state.normed, gain.count(), rounding)
    }

    /// Returns F16 values `[sequences, cols]` as a product reads them, quantized first where the engine does that.
    fn input<'b>(&'b self, x: &'b Buffer, cols: usize, rounding: Activations<f32>) -> Result<Input<'b>> {
        let (state, tokens) = (&self.state, self.lengths.len());
        if rounding == Activations::Full {
            return Ok(Input { x: x.at(), norm: None, scales: None, tokens });
        }
        let to = ("f16", rounding);
        self.cuda.quantize_rows((x.at(), Float::F16), to, &state.codes, &state.scales, [tokens, cols])?;
        Ok(Input { x: state.codes.at(), norm: None, scales: Some(&state.scales), tokens })
    }

    /// Queues linears of one input, each into its buffer.
    fn product(&self, from: From, linears: &[(&Linear<Cuda>, &Buffer)], output: Destination) -> Result<()> {
        for alike in linears.chunk_by(|(a, _), (b, _)| a.rounding == b.rounding) {
            let (first, _) = alike[0];
            let input = match from {
                From::Residual(gain) => self.normed(gain, first.rounding)?,
                From::Values(x) => self.input(x, first.weight.cols, first.rounding)?,
            };
            let parts: Vec<Operand> = alike
                .iter()
                .map(|(linear, y)| Operand { weight: &linear.weight, bias: linear.bias.as_ref(), y: y.at() })
                .collect();
            self.cuda.matvec(input, &parts, output)?;
        }
        Ok(())
    }

    fn attend(&self, layer: &Layer<Cuda>, cache: &(Buffer, Buffer)) -> Result<()> {
        let (state, constants) = (&self.state, &self.constants);
        let shape = &layer.attention(constants);
        let heads = heads_together(self.model);
        let gains = layer.qk_norm.as_ref().map_or((0, 0), |(q, k)| (q.at(), k.at()));
        let splits = splits(self.model, self.lengths.len(), self.capacity);
        let (_, mut defines) = cache_defines(constants.kv_cache, shape.head_dim);
        defines.extend([
            format!("D={}", shape.head_dim),
            format!("ROTARY={}", 2 * constants.rope.pairs()),
            neighbours_define(&constants.rope),
            format!("HEADS={heads}"),
            sinks_define(layer.sinks.as_ref()),
        ]);
        self.cuda.device.launch_overlapping(
            Kernel { name: "attend", defines },
            Geometry { grid: [shape.heads / heads, self.lengths.len(), splits], ..Geometry::flat(0, 256) },
            &[
                Arg::Pointer(state.q.at()),
                Arg::Pointer(state.k.at()),
                Arg::Pointer(state.v.at()),
                Arg::Pointer(gains.0),
                Arg::Pointer(gains.1),
                Arg::Pointer(layer.sinks.as_ref().map_or(0, Tensor::at)),
                Arg::Pointer(cache.0.at()),
                Arg::Pointer(cache.1.at()),
                Arg::Pointer(self.chooser.positions.at()),
                Arg::Struct(&frequencies(&constants.rope.angles(self.capacity))),
                Arg::Pointer(state.partial.at()),
                Arg::Pointer(state.arrived.at()),
                Arg::Pointer(state.mixed.at()),
                Arg::U32(shape.heads as u32),
                Arg::U32(shape.kv_heads as u32),
                Arg::U32(self.capacity as u32),
                Arg::U32(window_argument(shape.window)),
                Arg::F32(shape.scale),
                Arg::F32(constants.rope.magnitude),
                Arg::F32(constants.eps),
                Arg::F32(layer.kv_scales[0]),
                Arg::F32(layer.kv_scales[1]),
            ],
        )
    }
}

impl Decoder for CudaDecoder<'_> {
    fn sequences(&self) -> usize {
        self.lengths.len()
    }

    fn capacity(&self) -> usize {
        self.capacity
    }

    fn prefill(&mut self, sequence: usize, prompt: &[u32], draw: Draw) -> Result<()> {
        self.prefill_from(sequence, prompt, &[draw])
    }

    fn step(&mut self, tokens: &[Option<u32>]) -> Result<()> {
        let vocab = self.model.config.vocab_size;
        ensure!(
            tokens.len() == self.lengths.len(),
            "{} tokens for {} sequences",
            tokens.len(),
            self.lengths.len()
        );
        for (sequence, (token, length)) in tokens.iter().zip(&self.lengths).enumerate() {
            let Some(token) = token else { continue };
            ensure!((*token as usize) < vocab, "token {token} is outside the vocabulary of {vocab}");
            ensure!(
                *length > 0 && *length < self.capacity,
                "sequence {sequence} holds {length} of {} tokens and cannot be continued",
                self.capacity
            );
        }
        let fed = |(token, _): &(&Option<u32>, &mut usize)| token.is_some();
        tokens.iter().zip(&mut self.lengths).filter(fed).for_each(|(_, length)| *length += 1);
        self.chooser.feed(&self.cuda.device, tokens.iter().map(|token| token.unwrap_or(0)))?;
        self.launch_step()
    }

    fn next_tokens(&mut self) -> Result<Vec<u32>> {
        self.chooser.next(&self.cuda.device)
    }

    fn logits(&mut self) -> Result<Vec<f32>> {
        let mut logits = vec![0.0; self.lengths.len() * self.model.config.vocab_size];
        self.cuda.device.download_numbers(&self.chooser.logits, &mut logits)?;
        self.next_tokens()?;
        Ok(logits)
    }
}

/// Returns how many query heads a block of `attend` takes: their queries and outputs stay in registers.
fn heads_together(model: &Model<Cuda>) -> usize {
    let shape = &model.constants.attention;
    let share = shape.heads / shape.kv_heads;
    (1..=share.min(4)).rev().find(|heads| share.is_multiple_of(*heads)).unwrap_or(1)
}

/// Returns how many blocks share the positions of a sequence and head.
fn splits(model: &Model<Cuda>, sequences: usize, capacity: usize) -> usize {
    let blocks = model.constants.attention.heads / heads_together(model) * sequences;
    (ATTENTION_BLOCKS / blocks).clamp(1, capacity.div_ceil(64).clamp(1, 64))
}
