//! Measuring what was written: perplexity, and divergence from a baseline.
//!
//! All models walk through the windows in lock step ([`Schedule`] says how many at once), so that their activations are
//! all that is kept beside the weights and the baseline runs once per window. Models in memory take a pass of windows at a
//! time; of models in files each layer is read once for a whole group of passes, whose residual streams wait meanwhile
//! ([`residency`] decides; [`walk`] is the way through one model). Logits are exact and never stored ([`Backend::compare`]). What a model says of each position is kept ([`Samples`]); every number and its interval comes
//! from there ([`metric`] is the table of them).

pub mod answers;
pub mod bootstrap;
pub mod cache;
pub mod gate;
pub mod metric;
pub mod protocol;
pub mod report;
pub mod residency;
pub mod samples;
pub mod sensitivity;
pub mod slices;
pub mod statistics;
pub mod suite;
pub mod task;
pub mod tokenization;
pub mod walk;

use anyhow::{Context, Result, bail, ensure};

pub use self::metric::{Estimate, Measures, Metric};
pub use self::protocol::{Protocol, Scored};
pub use self::report::{ModelRow, Report};
pub use self::samples::Samples;
pub use self::walk::Schedule;
use self::walk::{Work, groups};
use crate::backend::Backend;
use crate::backend::kv_cache::KvCache;
use crate::backend::parked::{Parked, Room};
use crate::model::config::Config;
use crate::model::layers::Layers;

/// A loaded model and what its row says of it.
pub struct Subject<'a, M> {
    /// Name as the user gave it.
    pub name: String,
    /// Format name.
    pub format: String,
    /// Stored bytes of all tensors.
    pub bytes: u64,
    /// `8 · bytes / weights`.
    pub bits_per_weight: f64,
    /// The weights.
    pub model: &'a M,
    /// How it keeps keys and values.
    pub kv_cache: KvCache,
}

/// What rows say of a model.
#[derive(Clone, Debug, PartialEq)]
#[allow(missing_docs)]
pub struct About {
    pub name: String,
    pub format: String,
    pub bytes: u64,
    pub bits_per_weight: f64,
}

impl About {
    /// Says that keys and values are kept in another way.
    pub fn with_cache(self, kv_cache: KvCache) -> Self {
        match kv_cache {
            KvCache::Exact => self,
            kind => About { name: format!("{}, kv {kind}", self.name), ..self },
        }
    }
}

impl<M> Subject<'_, M> {
    /// Returns what rows say of the model.
    pub fn about(&self) -> About {
        About {
            name: self.name.clone(),
            format: self.format.clone(),
            bytes: self.bytes,
            bits_per_weight: self.bits_per_weight,
        }
    }
}

/// A tokenized text and how it is cut.
#[derive(Clone, Debug)]
pub struct Text {
    /// What reports call it.
    pub name: String,
    /// Tokens of the whole text.
    pub tokens: Vec<u32>,
    /// Windows and scored positions.
    pub protocol: Protocol,
}

/// Runs `models` on a text, against `baseline` if there is one; its samples come first.
///
/// `progress(n)` is called with how many windows went through a layer of a model.
///
/// # Errors
/// Vocabularies that differ from the baseline's, windows longer than a model's context, token ids outside a
/// vocabulary, and losses that are not finite; each names the model.
pub fn run<B: Backend, M: Layers<B>>(
    backend: &B,
    schedule: Schedule,
    baseline: Option<&Subject<M>>,
    models: &[Subject<M>],
    text: &Text,
    progress: &dyn Fn(usize),
) -> Result<Vec<Samples>> {
    let protocol = &text.protocol;
    let subjects = || baseline.into_iter().chain(models);
    for subject in subjects() {
        check(subject, baseline, text).with_context(|| subject.name.clone())?;
    }
    let per_window = protocol.scored().len();
    let compared = |at: usize| baseline.is_some() && at > 0;
    let mut samples: Vec<Samples> =
        subjects().enumerate().map(|(at, _)| Samples::new(per_window, compared(at))).collect();
    for group in groups(schedule, text) {
        let mut reference: Option<(Vec<Parked<B>>, &M)> = None;
        let mut room = Room::new(schedule.room);
        for (at, subject) in subjects().enumerate() {
            let work = Work { backend, subject, protocol, group: &group };
            let hidden = work.hidden(room, &mut samples[at], progress)?;
            match reference.as_ref().filter(|_| compared(at)) {
                None => work.score(&hidden, &mut samples[at])?,
                Some((states, model)) => {
                    work.compare(states, &*model.output_head(backend)?, &hidden, &mut samples[at])?
                }
            }
            if at == 0 && baseline.is_some() {
                // What the baseline says of the group stays while the models run.
                for (state, pass) in hidden.iter().zip(&group) {
                    if let Parked::Device(_) = state {
                        room.take(
                            (pass.windows.len() * per_window * subject.model.config().hidden_size * 4) as u64,
                        );
                    }
                }
                reference = Some((hidden, subject.model));
            }
        }
    }
    Ok(samples)
}

fn check<B: Backend, M: Layers<B>>(
    subject: &Subject<M>,
    baseline: Option<&Subject<M>>,
    text: &Text,
) -> Result<()> {
    let config = subject.model.config();
    if let Some(baseline) = baseline {
        check_vocabulary(config, &baseline.about(), baseline.model.config())?;
    }
    check_fits(config, text)
}

/// Refuses a model whose vocabulary is not the baseline's.
pub fn check_vocabulary(config: &Config, baseline: &About, baseline_config: &Config) -> Result<()> {
    let (found, wanted) = (config.vocab_size, baseline_config.vocab_size);
    ensure!(
        found == wanted,
        "its vocabulary has {found} tokens and the baseline's ({}) {wanted}; a divergence needs one vocabulary",
        baseline.name
    );
    Ok(())
}

/// Refuses a text whose windows a model cannot take.
fn check_fits(config: &Config, text: &Text) -> Result<()> {
    let Text { tokens, protocol, .. } = text;
    ensure!(
        protocol.n_ctx <= config.max_position_embeddings,
        "windows of {} tokens exceed its context of {}; use a smaller `--ctx`",
        protocol.n_ctx,
        config.max_position_embeddings
    );
    ensure!(
        tokens.len() >= protocol.windows * protocol.n_ctx,
        "{} tokens do not fill {} windows of {}",
        tokens.len(),
        protocol.windows,
        protocol.n_ctx
    );
    if let Some(id) = tokens.iter().chain(&protocol.bos).find(|&&id| id as usize >= config.vocab_size) {
        bail!(
            "token id {id} is outside its vocabulary of {}; was the text tokenized for another model?",
            config.vocab_size
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeMap;
    use std::path::Path;
    use std::sync::Mutex;

    use super::*;
    use crate::backend::Batch;
    use crate::backend::cpu::Cpu;
    use crate::checkpoint::Checkpoint;
    use crate::model::Model;
    use crate::model::TensorSource;
    use crate::model::layers::Streamed;
    use crate::names::TensorId;
    use crate::scheme::Activations;
    use crate::tensor::Matrix;

    pub fn model(name: &str) -> Model<Cpu> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/logits").join(name);
        let checkpoint = Checkpoint::open(&folder).unwrap();
        Model::load(&Cpu, &checkpoint.config, &checkpoint).unwrap()
    }

    pub fn subject<'a, M>(name: &str, model: &'a M) -> Subject<'a, M> {
        Subject {
            name: name.into(),
            format: "bf16".into(),
            bytes: 1,
            bits_per_weight: 16.0,
            model,
            kv_cache: KvCache::Exact,
        }
    }

    pub fn tokens() -> Vec<u32> {
        (0..100u32).map(|i| i.wrapping_mul(2_654_435_761) >> 26).collect()
    }

    pub fn text(name: Scored, tokens: Vec<u32>) -> Text {
        let protocol = Protocol::new(name, 16, Some(6), "text", &[0; 100], None).unwrap();
        Text { name: "text".into(), tokens, protocol }
    }

    fn run_quietly<M: Layers<Cpu>>(
        base: Option<&Subject<M>>,
        models: &[Subject<M>],
        text: &Text,
    ) -> Result<Vec<Samples>> {
        run(&Cpu, Schedule::resident(&Cpu), base, models, text, &|_| ())
    }

    #[test]
    fn streamed_models_give_the_numbers_of_loaded_ones_and_each_layer_is_read_once_a_group() {
        struct Counted<'a>(&'a Checkpoint, Mutex<BTreeMap<TensorId, usize>>);

        impl TensorSource for Counted<'_> {
            fn read(&self, id: TensorId) -> Result<Matrix> {
                *self.1.lock().unwrap().entry(id).or_default() += 1;
                TensorSource::read(self.0, id)
            }

            fn rounding(&self, id: TensorId) -> Activations<f32> {
                self.0.rounding(id)
            }
        }

        let open = |name: &str| {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/logits").join(name);
            Checkpoint::open(&folder).unwrap()
        };
        let files = ["qwen3", "mistral"].map(open);
        let counted = files.each_ref().map(|file| Counted(file, Mutex::default()));
        let text = text(Scored::SecondHalf, tokens());
        let loaded = ["qwen3", "mistral"].map(model);
        let resident =
            run_quietly(Some(&subject("a", &loaded[0])), &[subject("b", &loaded[1])], &text).unwrap();
        // Six windows of 16 tokens: in passes of two windows, groups of two passes; streams on the device and on the host.
        for room in [None, Some(0), Some(4000)] {
            counted.iter().for_each(|counted| counted.1.lock().unwrap().clear());
            let streamed = [0, 1].map(|at| Streamed::new(&files[at].config, &counted[at]).unwrap());
            let schedule = Schedule { pass_tokens: 32, group_tokens: 64, room };
            let (base, other) = (subject("a", &streamed[0]), subject("b", &streamed[1]));
            let found = run(&Cpu, schedule, Some(&base), &[other], &text, &|_| ()).unwrap();
            for (found, wanted) in found.iter().zip(&resident) {
                assert_eq!(found.measures(), wanted.measures(), "{room:?}");
            }
            for counted in &counted {
                let reads = counted.1.lock().unwrap();
                assert!(reads.len() > 20);
                assert!(
                    reads.iter().all(|(id, &count)| count == 2 || id.layer.is_none()),
                    "two groups: {reads:?}"
                );
            }
        }
    }

    #[test]
    fn a_model_diverges_from_itself_by_exactly_zero() {
        let model = model("qwen3");
        let (base, same) = (subject("base", &model), subject("same", &model));
        let done = RefCell::new(0);
        let text = text(Scored::SecondHalf, tokens());
        let progress = |windows| *done.borrow_mut() += windows;
        let schedule = Schedule::resident(&Cpu);
        let found = run(&Cpu, schedule, Some(&base), &[same], &text, &progress).unwrap();
        let steps = 2 * 6 * model.layers.len();
        assert_eq!((*done.borrow(), found[0].tokens(), found[1].tokens()), (steps, 6 * 7, 6 * 7));
        let (own, same) = (found[0].measures(), found[1].measures());
        assert_eq!(own.value(Metric::Kld), None);
        assert_eq!(same.value(Metric::Ppl), own.value(Metric::Ppl));
        let nothing = Estimate { value: 0.0, interval: Some([0.0; 2]) };
        for metric in [Metric::DeltaPpl, Metric::Kld, Metric::KldMedian, Metric::KldP999, Metric::RmsDp] {
            assert_eq!(same.get(metric), Some(nothing), "{metric:?}");
        }
        assert_eq!((same.value(Metric::KldMax), same.value(Metric::Top1)), (Some(0.0), Some(1.0)));
        let errors = found[1].standard_errors();
        assert_eq!((errors.delta_ppl, errors.kld), (Some(0.0), Some(0.0)));
    }

    #[test]
    fn perplexity_is_the_exponential_of_the_mean_loss_of_all_scored_positions() {
        let model = model("mistral");
        let found = run_quietly(None, &[subject("m", &model)], &text(Scored::All, tokens())).unwrap();
        let mut losses = Vec::new();
        for window in tokens().chunks_exact(16) {
            let hidden = model.hidden(&Cpu, window, Batch { sequences: 1, tokens: 16 }).unwrap();
            let hidden = Cpu.select_rows(&hidden, &(0..15).collect::<Vec<_>>()).unwrap();
            let scores = Cpu.score(&hidden, model.head(), &window[1..]).unwrap();
            losses.extend(scores.iter().map(|score| score.nll as f64));
        }
        assert_eq!(losses.len(), found[0].tokens());
        let ppl = found[0].measures().value(Metric::Ppl).unwrap();
        assert!((ppl - statistics::mean(&losses).exp()).abs() < 1e-9 * ppl);
    }

    #[test]
    fn another_model_diverges_and_each_sees_its_own_hidden_states() {
        let (a, b) = (model("qwen3"), model("mistral"));
        let (a, b) = (subject("a", &a), subject("b", &b));
        let text = text(Scored::All, tokens());
        let both = run_quietly(Some(&a), &[subject("b", b.model)], &text).unwrap()[1].measures();
        let alone = run_quietly(None, &[b], &text).unwrap()[0].measures();
        assert_eq!(both.value(Metric::Ppl), alone.value(Metric::Ppl));
        let Estimate { value, interval: Some([low, high]) } = both.get(Metric::Kld).unwrap() else {
            panic!()
        };
        assert!(value > 0.1 && low < value && value < high);
        assert!(both.value(Metric::Top1) < Some(1.0) && both.value(Metric::Top5) >= both.value(Metric::Top1));
    }

    #[test]
    fn what_cannot_be_compared_is_refused_with_the_models_name() {
        let (base, mut other) = (model("qwen3"), model("mistral"));
        let refusal = |base: &Model<Cpu>, other: &Model<Cpu>, tokens: Vec<u32>| {
            let (base, other) = (subject("base", base), subject("other", other));
            let text = text(Scored::All, tokens);
            format!("{:#}", run_quietly(Some(&base), &[other], &text).unwrap_err())
        };
        let mut outside = tokens();
        outside[50] = 64;
        assert!(refusal(&base, &other, outside).contains("token id 64"));
        assert!(refusal(&base, &other, tokens()[..90].to_vec()).contains("90 tokens"));
        other.config.max_position_embeddings = 8;
        assert!(refusal(&base, &other, tokens()).starts_with("other: windows of 16 tokens"));
        other.config.vocab_size = 65;
        assert!(refusal(&base, &other, tokens()).starts_with("other: its vocabulary has 65"));
    }

    #[test]
    fn weights_that_overflow_are_reported_with_model_and_window() {
        let mut model = model("llama2");
        model.output_norm.fill(f32::NAN);
        let refusal = run_quietly(None, &[subject("broken", &model)], &text(Scored::All, tokens()));
        let message = format!("{:#}", refusal.unwrap_err());
        assert!(message.starts_with("broken, window") && message.contains(": the loss is NaN"), "{message}");
    }
}
