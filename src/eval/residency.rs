//! Whether models lie in memory while they are evaluated or their layers are streamed from their files, decided from
//! headers and from what memory may be used.
//!
//! ```text
//! in memory:  all weights + one pass
//! streamed:   max(embeddings; 2 layers + the largest matrix read + one pass; 2 heads + logits) + waiting streams
//! ```
//!
//! [`Footprint`] has the terms. A waiting window takes its residual stream, and the baseline's last hidden states at scored positions.

use anyhow::{Result, ensure};

use super::{Schedule, Text};
use crate::backend::footprint::Footprint;
use crate::checkpoint::Checkpoint;
use crate::memory::Budget;
use crate::model::footprint::pass_bytes;
use crate::names::{Role, TensorId};
use crate::output::size;

/// How models are run, and what to tell of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Residency {
    /// `None`: in memory.
    pub streamed: Option<Schedule>,
    /// What it takes, in a sentence.
    pub summary: String,
}

/// Decides how `models` are evaluated. `together`: all are needed at once, not one after another; the first is the
/// baseline.
///
/// # Errors
/// If not even one window fits, with what is needed and what there is.
pub fn decide(
    device: &impl Footprint,
    budget: Budget,
    models: &[&Checkpoint],
    together: bool,
    texts: &[&Text],
) -> Result<Residency> {
    let needs: Vec<Need> = models.iter().map(|model| Need::of(device, model)).collect();
    let worst = |of| worst(&needs, of);
    let all: u64 = needs.iter().map(|need| need.weights).sum();
    let weights = if together { all } else { worst(|need| need.weights) + worst(|need| need.head) };
    let pass =
        |tokens: usize| models.iter().map(|m| pass_bytes(device, &m.config, tokens)).max().unwrap_or(0);
    let resident =
        weights + (worst(|need| need.decoded) + pass(device.pass_tokens())).max(worst(|need| need.logits));
    let Some(limit) = budget.device else {
        return Ok(Residency { streamed: None, summary: format!("models in memory: {}", size(resident)) });
    };
    if resident <= limit {
        let summary = format!("models in memory: {} of {} that may be used", size(resident), size(limit));
        return Ok(Residency { streamed: None, summary });
    }
    streamed(device, (budget, limit), models, &needs, texts, resident)
}

fn worst(needs: &[Need], of: fn(&Need) -> u64) -> u64 {
    needs.iter().map(of).max().unwrap_or(0)
}

/// Divides what may be used, `limit` bytes of the device, where models in memory would take `resident` bytes.
fn streamed(
    device: &impl Footprint,
    (budget, limit): (Budget, u64),
    models: &[&Checkpoint],
    needs: &[Need],
    texts: &[&Text],
    resident: u64,
) -> Result<Residency> {
    let worst = |of| worst(needs, of);
    let pass =
        |tokens: usize| models.iter().map(|m| pass_bytes(device, &m.config, tokens)).max().unwrap_or(0);
    let head = 2 * worst(|need| need.head) + worst(|need| need.logits);
    let n_ctx = texts.iter().map(|text| text.protocol.n_ctx).max().unwrap_or(1);
    let layers = 2 * worst(|need| need.layer) + worst(|need| need.matrix) + worst(|need| need.decoded);
    let fixed =
        |tokens: usize| (layers + pass(tokens)).max(head).max(worst(|need| need.embeddings) + pass(tokens));
    let hidden = models.iter().map(|model| model.config.hidden_size).max().unwrap_or(0);
    let scored = texts.iter().map(|text| text.protocol.scored().len()).max().unwrap_or(0);
    let window = ((n_ctx + scored) * hidden * 4) as u64;
    let mut pass_tokens = device.pass_tokens().max(n_ctx);
    while pass_tokens > n_ctx && fixed(pass_tokens) + window * (pass_tokens / n_ctx) as u64 > limit {
        pass_tokens = (pass_tokens / 2).max(n_ctx);
    }
    let least = fixed(pass_tokens) + window;
    ensure!(
        least <= limit,
        "streaming layers takes {} at least (two layers and the largest matrix {}, a window of {n_ctx} tokens {}, heads and \
         logits {}), but {} may be used; raise `--{}`, or use a smaller `--ctx`",
        size(least),
        size(layers),
        size(pass(pass_tokens) + window),
        size(head),
        size(limit),
        if budget.separate { "vram" } else { "ram" }
    );
    let room = limit - fixed(pass_tokens);
    // In host memory also lie the layer that is read and the heads on their way.
    let staged = layers.max(head);
    let beside = match (budget.separate, budget.host) {
        (false, _) => 0,
        (true, None) => u64::MAX / 2,
        (true, Some(host)) => host.saturating_sub(staged),
    };
    let group = ((room + beside) / window).clamp(1, 1 << 32) as usize;
    let groups = texts.iter().map(|text| text.protocol.windows.div_ceil(group)).max().unwrap_or(1);
    let summary = format!(
        "streaming layers: models in memory take {}, {} may be used; two layers at a time and {pass_tokens} tokens take {}, \
         every file is read {groups} times",
        size(resident),
        size(limit),
        size(fixed(pass_tokens)),
    )
    .replace("read 1 times", "read once");
    let schedule = Schedule { pass_tokens, group_tokens: group.saturating_mul(n_ctx), room: Some(room) };
    Ok(Residency { streamed: Some(schedule), summary })
}

/// Bytes of one model's parts.
struct Need {
    weights: u64,
    /// The largest layer.
    layer: u64,
    /// The largest matrix of a layer.
    matrix: u64,
    embeddings: u64,
    head: u64,
    decoded: u64,
    logits: u64,
}

impl Need {
    fn of(device: &impl Footprint, model: &Checkpoint) -> Self {
        let bytes = |id: &TensorId| model.tensors.get(id).map_or(0, |info| info.bytes_on(device));
        let in_layers = || model.tensors.keys().filter(|id| id.layer.is_some());
        let mut layers = vec![0; model.config.num_hidden_layers];
        for id in in_layers() {
            if let Some(sum) = layers.get_mut(usize::from(id.layer.unwrap_or(0))) {
                *sum += bytes(id);
            }
        }
        let embeddings = bytes(&TensorId::global(Role::Embed));
        let head = match model.config.tie_word_embeddings {
            true => embeddings,
            false => bytes(&TensorId::global(Role::Head)),
        };
        let widest = in_layers().filter_map(|id| Some(model.tensors.get(id)?.weights())).max().unwrap_or(0);
        let vocab = model.config.vocab_size;
        let head_weights = (vocab * model.config.hidden_size) as u64;
        Need {
            weights: model.tensors.keys().map(bytes).sum(),
            layer: layers.into_iter().max().unwrap_or(0),
            matrix: in_layers().map(bytes).max().unwrap_or(0),
            embeddings,
            head,
            decoded: device.decoded_bytes(widest),
            logits: device.logits_bytes(vocab) + 2 * device.decoded_bytes(head_weights),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::embedded;
    use crate::eval::{Protocol, Scored};

    fn decided(device: u64, host: Option<u64>) -> Result<Residency> {
        let model = Checkpoint::open(&embedded::model_folder().unwrap()).unwrap();
        let tokens = vec![0; 60 * 512];
        let protocol = Protocol::new(Scored::SecondHalf, 512, None, "text", &tokens, None).unwrap();
        let text = Text { name: "text".into(), tokens, protocol };
        let (device, separate) = (Some(device), host.is_some());
        let budget = Budget { device, host: host.or(device), separate };
        decide(&Cpu, budget, &[&model, &model], true, &[&text])
    }

    #[test]
    fn models_stay_in_memory_where_they_fit_and_stream_where_they_do_not() {
        let roomy = decided(100_000_000, None).unwrap();
        assert!(
            roomy.streamed.is_none() && roomy.summary.starts_with("models in memory"),
            "{}",
            roomy.summary
        );
        // 23 MB of weights.
        let tight = decided(20_000_000, None).unwrap();
        let schedule = tight.streamed.unwrap();
        assert!(tight.summary.starts_with("streaming layers"), "{}", tight.summary);
        assert!(schedule.pass_tokens >= 512 && schedule.group_tokens >= schedule.pass_tokens);
        assert!(schedule.room.unwrap() < 20_000_000);
        // Streams that wait in host memory make groups larger.
        let helped = decided(20_000_000, Some(1 << 40)).unwrap().streamed.unwrap();
        assert!(helped.group_tokens >= 60 * 512);
        let refusal = decided(5_000_000, None).unwrap_err().to_string();
        assert!(refusal.contains("5.0 MB may be used; raise `--ram`"), "{refusal}");
    }
}
