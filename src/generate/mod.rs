//! Continuing texts token by token, over a cache of keys and values.
//!
//! [`Decoder`] is what a device provides: a fixed number of sequences, each at its own length. [`generate`] keeps them
//! busy with any number of prompts, each with its [`Draw`] from a [`Sampling`], and stops ([`Stop`]).

mod sampling;
mod stop;

use anyhow::{Result, ensure};
use serde::Serialize;

pub use self::sampling::{Draw, Sampling};
pub use self::stop::Stop;
use crate::backend::Backend;
use crate::backend::kv_cache::KvCache;
use crate::model::Model;
use crate::model::tokenizer::Tokenizer;

/// Several sequences that a model continues together, each at its own length.
///
/// A sequence is empty until its first [`Decoder::prefill`]; logits and next tokens of empty and idle sequences are
/// unspecified.
pub trait Decoder {
    /// Returns the number of sequences.
    fn sequences(&self) -> usize;

    /// Returns how many tokens a sequence may hold.
    fn capacity(&self) -> usize;

    /// Replaces a sequence with `prompt`, one token or more, whose continuation is chosen as `draw` says.
    ///
    /// # Errors
    /// Prompts that are empty or exceed the capacity, ids outside the vocabulary.
    fn prefill(&mut self, sequence: usize, prompt: &[u32], draw: Draw) -> Result<()>;

    /// Appends `tokens[s]` to every sequence `s`. `None` leaves a sequence idle: it must be prefilled before it is used
    /// again, so that a device may run it along with any token.
    ///
    /// # Errors
    /// Sequences that are full or empty, ids outside the vocabulary.
    fn step(&mut self, tokens: &[Option<u32>]) -> Result<()>;

    /// Returns each sequence's next token: [`Draw::choose`] of its logits.
    ///
    /// # Errors
    /// Logits that are not finite.
    fn next_tokens(&mut self) -> Result<Vec<u32>>;

    /// Returns the logits of each sequence's next token, `[sequences, vocab]`, for tests.
    fn logits(&mut self) -> Result<Vec<f32>>;
}

/// A backend that generates.
pub trait Generate: Backend + Sized {
    /// Returns how many sequences keep the device busy.
    fn sequences_at_once(&self) -> usize;

    /// Returns `sequences` empty sequences of up to `capacity` tokens, keys and values as `kv_cache` keeps them;
    /// [`KvCache::Exact`] leaves that to the model.
    ///
    /// # Errors
    /// Models or numbers of sequences that the device does not take, too little memory.
    fn decoder<'a>(
        &'a self,
        model: &'a Model<Self>,
        kv_cache: KvCache,
        sequences: usize,
        capacity: usize,
    ) -> Result<Box<dyn Decoder + 'a>>;
}

/// Why a text ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// A stop token or stop string.
    Stop,
    /// The limit of new tokens.
    Length,
}

/// What a model wrote after a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Generated {
    /// New tokens, the stop token included.
    pub tokens: Vec<u32>,
    /// Their text up to the stop string, special tokens left out.
    pub text: String,
    /// Why it ended.
    pub finish: Finish,
}

/// A text to be continued.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Request {
    /// The text's tokens, at least one.
    pub ids: Vec<u32>,
    /// Most new tokens.
    pub max_new_tokens: usize,
}

/// Tokens that all sequences of a decoder may hold together, so that long contexts do not fill the memory.
const CACHED_TOKENS: usize = 1 << 16;

/// Returns a decoder with room for any of these requests, as many at once as keep the device busy.
///
/// # Errors
/// Those of [`Generate::decoder`].
pub fn decoder_for<'a, B: Generate>(
    backend: &'a B,
    model: &'a Model<B>,
    kv_cache: KvCache,
    requests: &[Request],
) -> Result<Box<dyn Decoder + 'a>> {
    let capacity = requests.iter().map(|request| request.ids.len() + request.max_new_tokens).max();
    let capacity = capacity.unwrap_or(0).max(1);
    let sequences = backend.sequences_at_once().min(requests.len()).min(CACHED_TOKENS / capacity).max(1);
    backend.decoder(model, kv_cache, sequences, capacity)
}

/// A prompt and its tokens so far.
struct Running {
    prompt: usize,
    limit: usize,
    new: Vec<u32>,
}

/// Continues every prompt; `done` is called with each as it ends, in any order.
///
/// # Errors
/// Those of the decoder; prompts with no room for their new tokens, or that want none.
pub fn generate(
    decoder: &mut dyn Decoder,
    tokenizer: &Tokenizer,
    prompts: &[Request],
    sampling: &Sampling,
    stop: &Stop,
    done: &mut dyn FnMut(usize, Generated) -> Result<()>,
) -> Result<()> {
    sampling.check()?;
    for prompt in prompts {
        ensure!(
            prompt.max_new_tokens > 0 && prompt.ids.len() + prompt.max_new_tokens <= decoder.capacity(),
            "a prompt of {} tokens and {} new ones for a capacity of {}",
            prompt.ids.len(),
            prompt.max_new_tokens,
            decoder.capacity()
        );
    }
    let mut waiting = prompts.iter().enumerate();
    let mut running: Vec<Option<Running>> = (0..decoder.sequences()).map(|_| None).collect();
    loop {
        for (sequence, slot) in running.iter_mut().enumerate().filter(|(_, slot)| slot.is_none()) {
            let Some((prompt, request)) = waiting.next() else { break };
            // Random numbers of its own, so that neighbours do not change its text.
            decoder.prefill(sequence, &request.ids, sampling.draw(prompt as u64))?;
            *slot = Some(Running { prompt, limit: request.max_new_tokens, new: Vec::new() });
        }
        if running.iter().all(Option::is_none) {
            return Ok(());
        }
        for (slot, next) in running.iter_mut().zip(decoder.next_tokens()?) {
            let Some(run) = slot else { continue };
            run.new.push(next);
            if let Some(generated) = stop.ended(&run.new, run.limit, tokenizer)? {
                done(run.prompt, generated)?;
                *slot = None;
            }
        }
        let tokens: Vec<_> = running.iter().map(|slot| slot.as_ref()?.new.last().copied()).collect();
        if tokens.iter().any(Option::is_some) {
            decoder.step(&tokens)?;
        }
    }
}
