//! Generating tokens: one position of every sequence at a time, over a cache of keys and values.
//!
//! A step reads every packed weight once (`kernels/matvec.cu`) and is one CUDA graph: the token ids, positions and logits
//! it works on stay on the device, so the host only starts graphs. Greedy: the most likely token goes into the next step.

use anyhow::{Context, Result, ensure};
use cudarc::driver::CudaGraph;
use cudarc::driver::sys::{CUgraphInstantiate_flags, CUstreamCaptureMode};

use super::compile::Kernel;
use super::device::{Arg, Buffer, Geometry};
use super::weight::Weight;
use super::{Cuda, Float, Tensor, u32_bytes};
use crate::backend::{Backend, Batch};
use crate::generate::Generate;
use crate::model::Model;
use crate::model::block::Linear;
use crate::scheme::Activations;

impl Generate for Cuda {
    fn sequences_at_once(&self) -> usize {
        32
    }

    fn decoder<'a>(
        &'a self,
        _: &'a Model<Cuda>,
        _: usize,
        _: usize,
    ) -> Result<Box<dyn crate::generate::Decoder + 'a>> {
        anyhow::bail!("sequences of different lengths are not continued on the GPU yet; use `--device cpu`")
    }
}

/// Sequences of equal length that a model continues together.
pub struct Decoder<'a> {
    cuda: &'a Cuda,
    model: &'a Model<Cuda>,
    batch: usize,
    capacity: usize,
    /// Tokens in the cache of each sequence; the device counts along.
    length: usize,
    /// Keys and values of each layer, bf16 `[batch, capacity, kv_heads · head_dim]`.
    cache: Vec<(Buffer, Buffer)>,
    state: State,
    step: Option<CudaGraph>,
}

/// Memory a step works in.
struct State {
    /// u32 `[batch]`: the token each sequence continues with.
    ids: Buffer,
    /// u32 `[batch]`: its position.
    positions: Buffer,
    /// u32 `[batch, capacity]`: the token at each position.
    history: Buffer,
    /// F32 `[batch, hidden]`: the residual stream.
    x: Buffer,
    /// bf16 `[batch, hidden]`
    normed: Buffer,
    /// bf16, width of the queries, keys and values.
    q: Buffer,
    k: Buffer,
    v: Buffer,
    /// bf16, width of the queries.
    mixed: Buffer,
    /// bf16 `[batch, intermediate]`
    gated: Buffer,
    /// F32 `[batch, vocab]`
    logits: Buffer,
}

/// What a product does with its result; names as in matvec.cu.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Output {
    Bf16,
    F32,
    Add,
    Swiglu,
}

impl Output {
    fn macro_name(self) -> &'static str {
        match self {
            Output::Bf16 => "OUTPUT=BF16",
            Output::F32 => "OUTPUT=F32",
            Output::Add => "OUTPUT=ADD",
            Output::Swiglu => "OUTPUT=SWIGLU",
        }
    }
}

/// One of the products side by side in a launch.
struct Part<'a> {
    weight: &'a Weight,
    bias: Option<&'a Tensor>,
    y: &'a Buffer,
}

impl<'a> Decoder<'a> {
    /// Reserves memory for `batch` sequences of up to `capacity` tokens.
    ///
    /// # Errors
    /// Too little memory, F32 activations, more than 32 sequences, linears with quantized inputs, and shapes the
    /// kernels do not take; each says what is wanted.
    pub fn new(cuda: &'a Cuda, model: &'a Model<Cuda>, batch: usize, capacity: usize) -> Result<Self> {
        let config = &model.config;
        let head_dim = config.head_dim;
        ensure!(cuda.float == Float::F16, "generation on the GPU runs in bf16, without `--precise`");
        ensure!(
            (1..=32).contains(&batch),
            "a batch of {batch}; generation on the GPU takes 1 to 32 sequences"
        );
        ensure!(
            head_dim.is_multiple_of(64) && head_dim <= 256,
            "head size {head_dim}; generation on the GPU takes 64, 128, 192 and 256"
        );
        ensure!(
            capacity <= config.max_position_embeddings,
            "{capacity} tokens exceed the model's context of {}",
            config.max_position_embeddings
        );
        for layer in &model.layers {
            for linear in [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down] {
                ensure!(
                    linear.activations == Activations::Full,
                    "linears that quantize their inputs are not generated with on the GPU yet; use `--device cpu`"
                );
            }
        }
        let device = cuda.device();
        let kv_width = config.num_key_value_heads * head_dim;
        let q_width = config.num_attention_heads * head_dim;
        let cache = || device.allocate(batch * capacity * kv_width * 2);
        let floats = |width: usize, float: Float| device.allocate(batch * width * float.bytes());
        Ok(Decoder {
            cuda,
            model,
            batch,
            capacity,
            length: 0,
            cache: model.layers.iter().map(|_| Ok((cache()?, cache()?))).collect::<Result<_>>()?,
            state: State {
                ids: device.upload(&vec![0; 4 * batch])?,
                positions: device.upload(&vec![0; 4 * batch])?,
                history: device.upload(&vec![0; 4 * batch * capacity])?,
                x: floats(config.hidden_size, Float::F32)?,
                normed: floats(config.hidden_size, Float::Bf16)?,
                q: floats(q_width, Float::Bf16)?,
                k: floats(kv_width, Float::Bf16)?,
                v: floats(kv_width, Float::Bf16)?,
                mixed: floats(q_width, Float::Bf16)?,
                gated: floats(config.intermediate_size, Float::Bf16)?,
                logits: floats(config.vocab_size, Float::F32)?,
            },
            step: None,
        })
    }

    /// Runs prompts of one length, `[batch, tokens]` one after another, from an empty cache; afterwards each sequence
    /// holds its prompt and the first token generated.
    pub fn prefill(&mut self, prompts: &[u32]) -> Result<()> {
        let tokens = prompts.len() / self.batch;
        ensure!(
            tokens > 0 && tokens * self.batch == prompts.len() && tokens < self.capacity,
            "prompts of {} tokens for {} sequences of up to {}",
            prompts.len(),
            self.batch,
            self.capacity
        );
        let (cuda, model) = (self.cuda, self.model);
        let batch = Batch { sequences: self.batch, tokens };
        let mut x = model.embed(cuda, prompts)?;
        let constants = &model.constants;
        for (layer, cache) in model.layers.iter().zip(&self.cache) {
            let normed = cuda.rms_norm(&x, &layer.attn_norm, constants.eps)?;
            let [q, k, v] = layer.queries_keys_values(cuda, constants, &normed, batch)?;
            self.keep(&k, &cache.0, tokens)?;
            self.keep(&v, &cache.1, tokens)?;
            let mixed = cuda.attention(&q, &k, &v, &constants.attention, batch)?;
            layer.o.add_forward(cuda, &mut x, &mixed)?;
            let normed = cuda.rms_norm(&x, &layer.ffn_norm, constants.eps)?;
            layer.down.add_forward(cuda, &mut x, &layer.gated(cuda, &normed)?)?;
        }
        let last: Vec<usize> = (1..=self.batch).map(|sequence| sequence * tokens - 1).collect();
        let x = cuda.rms_norm(&cuda.select_rows(&x, &last)?, &model.output_norm, constants.eps)?;
        let x = cuda.cast(&x, None, Float::Bf16)?;
        let head = [Part { weight: model.head(), bias: None, y: &self.state.logits }];
        let device = &cuda.device;
        let mut history = vec![0u32; self.batch * self.capacity];
        for (row, prompt) in history.chunks_mut(self.capacity).zip(prompts.chunks(tokens)) {
            row[..tokens].copy_from_slice(prompt);
        }
        self.state.history = device.upload(&u32_bytes(history.into_iter()))?;
        self.state.positions =
            device.upload(&u32_bytes(std::iter::repeat_n(tokens as u32 - 1, self.batch)))?;
        // The buffers have moved, so a recorded step would write elsewhere.
        self.step = None;
        self.matvec(x.at(), &head, Output::F32)?;
        self.advance()?;
        self.length = tokens;
        Ok(())
    }

    /// Queues the copy of a prompt's keys or values `[batch · tokens, width]` into a cache.
    fn keep(&self, rows: &Tensor, cache: &Buffer, tokens: usize) -> Result<()> {
        let rows = self.cuda.cast(rows, None, Float::Bf16)?;
        let row_bytes = rows.cols * 2;
        for sequence in 0..self.batch {
            let (source, target) = (sequence * tokens * row_bytes, sequence * self.capacity * row_bytes);
            self.cuda.device.copy(rows.buffer(), source, cache, target, tokens * row_bytes)?;
        }
        Ok(())
    }

    /// Generates `count` more tokens for every sequence.
    pub fn generate(&mut self, count: usize) -> Result<()> {
        ensure!(
            self.length > 0 && self.length + count < self.capacity,
            "{} tokens and {count} more for a cache of {}",
            self.length,
            self.capacity
        );
        for _ in 0..count {
            match &self.step {
                Some(graph) => graph.launch().context("a decoding step does not start")?,
                None => {
                    // The first step compiles and loads what it needs, which a recording must not.
                    self.run_step()?;
                    self.step = Some(self.record()?);
                }
            }
            self.length += 1;
        }
        Ok(())
    }

    /// Returns all tokens of each sequence, the prompt first.
    pub fn tokens(&self) -> Result<Vec<Vec<u32>>> {
        let mut bytes = vec![0u8; 4 * self.batch * self.capacity];
        self.cuda.device.download(&self.state.history, &mut bytes)?;
        let ids: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
        let count = if self.length == 0 { 0 } else { self.length + 1 };
        Ok(ids.chunks(self.capacity).map(|row| row[..count].to_vec()).collect())
    }

    /// Returns the logits of the last step, `[batch, vocab]`.
    pub fn logits(&self) -> Result<Vec<f32>> {
        let mut bytes = vec![0u8; 4 * self.batch * self.model.config.vocab_size];
        self.cuda.device.download(&self.state.logits, &mut bytes)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
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
        let device = &self.cuda.device;
        model.embed.embed_into(device, &state.ids, self.batch, &state.x)?;
        for (layer, cache) in model.layers.iter().zip(&self.cache) {
            self.norm(&state.x, &layer.attn_norm, &state.normed, Float::F32)?;
            let qkv = [part(&layer.q, &state.q), part(&layer.k, &state.k), part(&layer.v, &state.v)];
            self.matvec(state.normed.at(), &qkv, Output::Bf16)?;
            if let Some((q_norm, k_norm)) = &layer.qk_norm {
                self.norm(&state.q, q_norm, &state.q, Float::Bf16)?;
                self.norm(&state.k, k_norm, &state.k, Float::Bf16)?;
            }
            self.append(cache)?;
            self.attend(cache)?;
            self.matvec(state.mixed.at(), &[part(&layer.o, &state.x)], Output::Add)?;
            self.norm(&state.x, &layer.ffn_norm, &state.normed, Float::F32)?;
            let gate_up = [part(&layer.gate, &state.gated), part(&layer.up, &state.gated)];
            self.matvec(state.normed.at(), &gate_up, Output::Swiglu)?;
            self.matvec(state.gated.at(), &[part(&layer.down, &state.x)], Output::Add)?;
        }
        self.norm(&state.x, &model.output_norm, &state.normed, Float::F32)?;
        let head = [Part { weight: model.head(), bias: None, y: &state.logits }];
        self.matvec(state.normed.at(), &head, Output::F32)?;
        self.advance()
    }

    /// Queues y = norm(x) for all runs of the gain's width; y may be x.
    fn norm(&self, x: &Buffer, gain: &Tensor, y: &Buffer, from: Float) -> Result<()> {
        let width = gain.count();
        let runs = y.bytes() / 2 / width;
        self.cuda.norm_into((x.at(), from), gain, (y.at(), Float::Bf16), runs, self.model.constants.eps)
    }

    /// Queues the products of one input with several weights, those stored alike in one launch.
    fn matvec(&self, x: u64, parts: &[Part], output: Output) -> Result<()> {
        for alike in parts.chunk_by(|a, b| a.weight.stored == b.weight.stored) {
            ensure!(
                output != Output::Swiglu || alike.len() == 2,
                "gate and up are stored in different formats; generation on the GPU wants one"
            );
            self.launch_matvec(x, alike, output)?;
        }
        Ok(())
    }

    fn launch_matvec(&self, x: u64, parts: &[Part], output: Output) -> Result<()> {
        let cols = parts[0].weight.cols;
        ensure!(
            cols.is_multiple_of(64),
            "{cols} input features; generation on the GPU wants a multiple of 64"
        );
        let token_tiles = self.batch.div_ceil(8).next_power_of_two();
        let row_tiles = if output == Output::Swiglu { 2 } else { 1 };
        let mut words = [0u64; 30];
        let mut blocks = 0;
        for i in 0..3 {
            // Absent parts repeat the last, whose blocks are all taken already.
            let part = &parts[i.min(parts.len() - 1)];
            words[7 * i..7 * i + 7].copy_from_slice(&part.weight.argument());
            words[21 + i] = part.y.at();
            words[24 + i] = part.bias.map_or(0, Tensor::at);
            if i < parts.len() && (output != Output::Swiglu || i == 0) {
                blocks += part.weight.rows.div_ceil(16);
            }
            set_half(&mut words[27..], i, part.weight.rows as u32);
            set_half(&mut words[27..], 3 + i, blocks as u32);
        }
        let mut defines = parts[0].weight.defines();
        // Few blocks need many warps each to keep enough bytes on their way; sums of all warps fit in shared memory.
        let warps = if blocks <= 528 && row_tiles * token_tiles <= 4 { 16 } else { 8 };
        let unroll = if token_tiles == 1 { 4 / row_tiles } else { 1 };
        defines.extend([
            output.macro_name().to_string(),
            format!("ROW_TILES={row_tiles}"),
            format!("TOKEN_TILES={token_tiles}"),
            format!("UNROLL={unroll}"),
            format!("WARPS={warps}"),
        ]);
        self.cuda.device.launch_overlapping(
            Kernel { name: "matvec", defines },
            Geometry::flat(blocks, 32 * warps),
            &[Arg::Struct(&words), Arg::Pointer(x), Arg::U32(self.batch as u32)],
        )
    }

    fn append(&self, cache: &(Buffer, Buffer)) -> Result<()> {
        let (state, constants) = (&self.state, &self.model.constants);
        let shape = &constants.attention;
        self.cuda.device.launch_overlapping(
            Kernel::new("append", &[]),
            Geometry::flat(self.batch, 256),
            &[
                Arg::Pointer(state.q.at()),
                Arg::Pointer(state.k.at()),
                Arg::Pointer(state.v.at()),
                Arg::Pointer(cache.0.at()),
                Arg::Pointer(cache.1.at()),
                Arg::Pointer(state.positions.at()),
                Arg::Struct(&super::frequencies(&constants.rope)),
                Arg::U32(shape.heads as u32),
                Arg::U32(shape.kv_heads as u32),
                Arg::U32(shape.head_dim as u32 / 2),
                Arg::U32(self.capacity as u32),
            ],
        )
    }

    fn attend(&self, cache: &(Buffer, Buffer)) -> Result<()> {
        let (state, shape) = (&self.state, &self.model.constants.attention);
        // Queries and outputs of a block's heads stay in registers: at most 4 heads of 128.
        let share = shape.heads / shape.kv_heads;
        let heads =
            (1..=share).rev().find(|heads| share % heads == 0 && heads * shape.head_dim <= 512).unwrap_or(1);
        self.cuda.device.launch_overlapping(
            Kernel::new("attend_cached", &[&format!("D={}", shape.head_dim), &format!("HEADS={heads}")]),
            Geometry { grid: [shape.heads / heads, self.batch, 1], ..Geometry::flat(0, 256) },
            &[
                Arg::Pointer(state.q.at()),
                Arg::Pointer(cache.0.at()),
                Arg::Pointer(cache.1.at()),
                Arg::Pointer(state.positions.at()),
                Arg::Pointer(state.mixed.at()),
                Arg::U32(shape.heads as u32),
                Arg::U32(shape.kv_heads as u32),
                Arg::U32(self.capacity as u32),
                Arg::U32(super::window_argument(shape.window)),
                Arg::F32(shape.scale),
            ],
        )
    }

    fn advance(&self) -> Result<()> {
        let state = &self.state;
        self.cuda.device.launch_overlapping(
            Kernel::new("advance", &[]),
            Geometry::flat(self.batch, 1024),
            &[
                Arg::Pointer(state.logits.at()),
                Arg::Pointer(state.ids.at()),
                Arg::Pointer(state.positions.at()),
                Arg::Pointer(state.history.at()),
                Arg::U32(self.model.config.vocab_size as u32),
                Arg::U32(self.capacity as u32),
            ],
        )
    }
}

fn part<'a>(linear: &'a Linear<Cuda>, y: &'a Buffer) -> Part<'a> {
    Part { weight: &linear.weight, bias: linear.bias.as_ref(), y }
}

/// Sets 32-bit number `i` of a run of 64-bit words.
fn set_half(words: &mut [u64], i: usize, value: u32) {
    words[i / 2] |= u64::from(value) << (32 * (i % 2));
}
