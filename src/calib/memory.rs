//! What a calibration takes of memory, derived from headers, and what of it lies where.
//!
//! ```text
//! fixed   = max(embeddings;
//!               3 layers + the largest matrix again + moments + max(a chunk in both models, the solver);
//!               head in both models, its moments and solver where it is quantized, logits)
//! streams = 2 models · tokens · hidden · 4
//! moments = 8 · cols² + 4 · hidden · cols            cols: inputs of the widest linear
//! ```
//!
//! Streams lie on the device as far as there is room beside `fixed`, the others in the host's memory; not a bit changes.
//! What is left after that keeps inputs that would be computed twice ([`super::driver`]).

use anyhow::{Result, ensure};

use super::CHUNK_TOKENS;
use crate::backend::footprint::Footprint;
use crate::memory::Budget;
use crate::model::config::Config;
use crate::model::footprint::pass_bytes;
use crate::model::stages::Stage;
use crate::output::size;

/// What is calibrated.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// The model.
    pub config: &'a Config,
    /// Bytes that a dense weight takes on the device.
    pub weight_bytes: u64,
    /// Calibration tokens of all windows.
    pub tokens: usize,
    /// Tokens of a window.
    pub n_ctx: usize,
    /// Whether embeddings are rounded, and whether the head's codes are chosen.
    pub rounds: [bool; 2],
}

/// Where streams lie.
#[derive(Clone, Debug, PartialEq)]
pub struct MemoryPlan {
    /// Device memory for streams, bytes; `None`: as much as it takes.
    pub room: Option<u64>,
    /// What it takes, in a sentence.
    pub summary: String,
}

/// Decides where the streams lie.
///
/// # Errors
/// If it does not fit, with what is needed and what there is.
pub fn plan(device: &impl Footprint, budget: Budget, work: Work) -> Result<MemoryPlan> {
    let Work { config, tokens, .. } = work;
    let streams = 2 * (tokens * config.hidden_size * 4) as u64;
    let Fixed { layers, moments, larger, ends } = fixed(device, work);
    let fixed = (layers + moments + larger).max(ends);
    let parts = format!(
        "three layers {}, second moments {}, a chunk of text or the solver {}, embeddings or head {}",
        size(layers),
        size(moments),
        size(larger),
        size(ends)
    );
    let Some(limit) = budget.device else {
        return Ok(MemoryPlan {
            room: None,
            summary: format!("calibration takes {}: {parts}", size(fixed + streams)),
        });
    };
    let option = if budget.separate { "vram" } else { "ram" };
    let least = if budget.separate { fixed } else { fixed + streams };
    ensure!(
        least <= limit,
        "calibration takes {} at least ({parts}, streams {}), but {} may be used; raise `--{option}`, or use fewer \
         `--calib-tokens` or a smaller `--calib-ctx`",
        size(least),
        size(if budget.separate { 0 } else { streams }),
        size(limit)
    );
    let room = limit - fixed;
    let mut summary = format!("calibration takes {} ({parts}) and streams of {}", size(fixed), size(streams));
    if budget.separate && streams > room {
        let waiting = streams - room;
        let host = waiting + host_bytes(work);
        if let Some(limit) = budget.host {
            ensure!(
                host <= limit,
                "calibration takes {} of the machine's memory (streams past the GPU's {}, preparing weights {}), but {} may \
                 be used; raise `--ram` or `--vram`, or use fewer `--calib-tokens`",
                size(host),
                size(waiting),
                size(host - waiting),
                size(limit)
            );
        }
        summary = format!("{summary}, of which {} wait in the machine's memory", size(waiting));
    }
    Ok(MemoryPlan { room: Some(room), summary: format!("{summary}; {} may be used", size(limit)) })
}

/// Returns what telling which tokens matter takes on the device ([`super::token_energies`]): the model, whose weights take
/// `weights` bytes; the stream before every layer of a chunk; a layer on its way back, whose gradients are F32, four numbers
/// an input or output at most at a time; scores and probabilities of one sequence; logits with their gradient.
pub fn backward_bytes(device: &impl Footprint, work: Work, weights: u64) -> u64 {
    let Work { config, n_ctx, .. } = work;
    let tokens = device.pass_tokens().min(CHUNK_TOKENS).max(n_ctx) as u64;
    let [hidden, layers, heads, n_ctx] =
        [config.hidden_size, config.num_hidden_layers, config.num_attention_heads, n_ctx].map(|n| n as u64);
    let widest =
        config.linears().map(|linear| linear.shape[0].max(linear.shape[1])).max().unwrap_or(0) as u64;
    let layer = pass_bytes(device, config, tokens as usize) + 4 * 4 * tokens * (widest + hidden);
    let decoded = device.decoded_bytes(hidden * widest.max(config.vocab_size as u64));
    weights
        + 4 * layers * tokens * hidden
        + layer
        + decoded
        + 4 * 4 * heads * n_ctx * n_ctx
        + 2 * device.logits_bytes(config.vocab_size)
}

struct Fixed {
    layers: u64,
    moments: u64,
    /// Of a chunk and the solver, in the stage that takes most.
    larger: u64,
    ends: u64,
}

fn fixed(device: &impl Footprint, work: Work) -> Fixed {
    let Work { config, weight_bytes, n_ctx, rounds, .. } = work;
    let [hidden, vocab] = [config.hidden_size, config.vocab_size].map(|n| n as u64);
    let layers = || (0..config.layers.len()).map(|layer| config.stages(layer));
    let weights = |stages: Vec<Stage>| -> u64 {
        stages.iter().flat_map(|stage| &stage.linears).map(|linear| linear.weights() as u64).sum()
    };
    let layer = layers().map(weights).max().unwrap_or(0) * weight_bytes;
    let largest = largest_linear(config);
    let mixed = layers().flatten().map(|stage| stage.cols().max(stage.widest()) as u64);
    let mixed = mixed.max().unwrap_or(hidden);
    // Full-precision, quantized, and the one that is read ahead.
    let held = 3 * layer + largest * weight_bytes + device.decoded_bytes(largest);
    let moments = |cols: u64| 8 * cols * cols + 4 * hidden * cols;
    let chunk_tokens = CHUNK_TOKENS.max(n_ctx);
    // Both models' halves; streams copied from the host, their difference; inputs in F32 where they are rounded or widened.
    let chunk = 2 * pass_bytes(device, config, chunk_tokens) + 4 * chunk_tokens as u64 * (3 * hidden + mixed);
    let stage = |stage: Stage| {
        let (rows, cols) = (stage.widest() as u64, stage.cols() as u64);
        (moments(cols), chunk.max(device.solver_bytes(rows, cols)))
    };
    let (moments_bytes, larger) =
        layers().flatten().map(stage).max_by_key(|(moments, larger)| moments + larger).unwrap_or((0, chunk));
    let table = vocab * hidden;
    let embeddings =
        table * weight_bytes + device.decoded_bytes(table) + if rounds[0] { 9 * table } else { 0 };
    let solved = moments(hidden) + device.solver_bytes(vocab, hidden);
    let head = 2 * table * weight_bytes
        + if rounds[1] { solved } else { 0 }
        + device.logits_bytes(config.vocab_size)
        + 2 * device.decoded_bytes(table);
    Fixed { layers: held, moments: moments_bytes, larger, ends: embeddings.max(head) }
}

/// Returns what the machine's own memory holds beside streams while a GPU calibrates: a matrix on its way, six times in
/// F32 while its scales are fitted and its codes come back.
fn host_bytes(work: Work) -> u64 {
    let Work { config, rounds, .. } = work;
    let table = if rounds[0] || rounds[1] { config.vocab_size * config.hidden_size } else { 0 };
    24 * largest_linear(config).max(table as u64)
}

fn largest_linear(config: &Config) -> u64 {
    config.linears().map(|linear| linear.weights() as u64).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::scheme::Scheme;

    /// As a GPU counts, without one.
    struct Gpu;

    impl Footprint for Gpu {
        fn pass_tokens(&self) -> usize {
            16_384
        }

        fn activation_bytes(&self) -> u64 {
            2
        }

        fn weight_bytes(&self, _: Option<Scheme>, shape: &[usize], _: u64) -> u64 {
            2 * shape.iter().product::<usize>() as u64
        }

        fn decoded_bytes(&self, weights: u64) -> u64 {
            2 * weights
        }

        fn logits_bytes(&self, _: usize) -> u64 {
            1 << 29
        }

        fn solver_bytes(&self, rows: u64, cols: u64) -> u64 {
            12 * cols * cols + 28 * (rows * cols).min(1 << 26)
        }
    }

    fn llama_3_8b() -> Config {
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
            "rms_norm_eps": 1e-5, "tie_word_embeddings": false,
        });
        Config::from_json(&config).unwrap()
    }

    fn planned(vram: u64, ram: u64) -> Result<MemoryPlan> {
        let config = llama_3_8b();
        let work =
            Work { config: &config, weight_bytes: 2, tokens: 128 * 2048, n_ctx: 2048, rounds: [false; 2] };
        let budget = Budget { device: Some(vram), host: Some(ram), separate: true };
        plan(&Gpu, budget, work)
    }

    #[test]
    fn an_8b_model_is_calibrated_on_128_windows_in_12_gb_beside_24_gb() {
        // What `--vram 12G --ram 24G` leave for tensors.
        let plan = planned(10_735_000_000, 23_000_000_000).unwrap();
        let streams = 2 * 262_144 * 4096 * 4;
        assert!(
            plan.room.unwrap() < streams && plan.summary.contains("wait in the machine's memory"),
            "{}",
            plan.summary
        );
        let roomy = planned(70_000_000_000, 23_000_000_000).unwrap();
        assert!(roomy.room.unwrap() > streams && !roomy.summary.contains("wait"), "{}", roomy.summary);
    }

    #[test]
    fn what_cannot_fit_is_refused_with_numbers() {
        let refusal = planned(3_000_000_000, 23_000_000_000).unwrap_err().to_string();
        assert!(refusal.contains("3.0 GB may be used; raise `--vram`"), "{refusal}");
        let refusal = planned(10_735_000_000, 3_000_000_000).unwrap_err().to_string();
        assert!(refusal.contains("3.0 GB may be used; raise `--ram`"), "{refusal}");
        let config = llama_3_8b();
        let work =
            Work { config: &config, weight_bytes: 2, tokens: 128 * 2048, n_ctx: 2048, rounds: [false; 2] };
        let cpu = Budget { device: Some(10_000_000_000), host: Some(10_000_000_000), separate: false };
        let refusal = plan(&Cpu, cpu, work).unwrap_err().to_string();
        assert!(refusal.contains("streams 8.6 GB") && refusal.contains("`--ram`"), "{refusal}");
    }
}
