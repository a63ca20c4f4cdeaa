//! How much each token's outputs matter: the squared size of the loss's gradient in them.
//!
//! Second moments count every token alike, but what an error does to the model's predictions differs from token to token
//! by two orders of magnitude. To second order, an error e in the outputs of a linear at one token changes the divergence
//! by (g · e)² / 2 for the gradients g of a Fisher sample ([`Gradients::fisher_gradient`]), so a token whose gradients are
//! large should count for more where codes are chosen (GuidedQuant, Kim et al., arXiv 2505.07004, weighs by the squares; so
//! does the diagonal of YAQA's output Hessian, arXiv 2505.22988).
//!
//! One random gradient per token is a noisy estimate, and a few tokens would outweigh all others, so weights are a power of
//! the energies ([`factors`]). Measured in MXFP4 (60 windows, default effort): power ½ took the KLD from .1024 to .0993 on
//! tiny-llama (CPU) and from .1289 to .1273 on small-qwen3 (GPU). In a prototype with labels drawn from p (`--effort fast`, .1056 and
//! .1320 without) it was .1023 and .1289 with power ½, .1017 and .1357 with power 1, and .1043 and .1310 with the text's own
//! next tokens as labels.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};

use super::CHUNK_TOKENS;
use crate::backend::Batch;
use crate::backend::gradients::Gradients;
use crate::model::Model;
use crate::model::backward::Met;
use crate::model::stages::Stage;
use crate::names::TensorId;

/// A token counts at most this many times the mean.
const MOST: f32 = 30.0;

/// The energies of one window: first linear of a stage → those of its tokens `[tokens]`. Linears that share an input share
/// weights.
pub type TokenEnergies = BTreeMap<TensorId, Vec<f32>>;

/// Sends a random gradient of each position back through the model, for windows of one length. `done` receives how many
/// windows came back.
///
/// # Errors
/// If the backend fails, or a gradient is not finite (the message names the layer).
pub fn token_energies<B: Gradients>(
    backend: &B,
    model: &Model<B>,
    windows: &[Vec<u32>],
    done: &dyn Fn(usize),
) -> Result<Vec<TokenEnergies>> {
    let tokens = windows.first().map_or(1, Vec::len);
    let together = (backend.tokens_at_once().min(CHUNK_TOKENS) / tokens).max(1);
    let stages = (0..model.layers.len()).flat_map(|layer| model.config.stages(layer));
    let leaders: BTreeMap<TensorId, TensorId> = stages
        .flat_map(|stage| stage.linears.iter().map(|linear| (linear.id, stage.leader())).collect::<Vec<_>>())
        .collect();
    let mut found = Vec::with_capacity(windows.len());
    for (chunk, windows) in windows.chunks(together).enumerate() {
        let batch = Batch { sequences: windows.len(), tokens };
        let mut energies = vec![TokenEnergies::new(); windows.len()];
        let fisher = |hidden: &_| backend.fisher_gradient(hidden, model.head(), chunk as u32);
        model.backward(backend, &windows.concat(), batch, fisher, &mut |id, met| {
            let (Met::Linear(gradient), Some(stage)) = (met, leaders.get(&id)) else { return Ok(()) };
            let rows = backend.row_energies(gradient)?;
            ensure!(
                rows.iter().all(|energy| energy.is_finite()),
                "the gradient of `{id}` is not finite; calibrate with `--precise`, or with `--effort fast`, which does \
                 without"
            );
            for (energies, rows) in energies.iter_mut().zip(rows.chunks(tokens)) {
                let sums = energies.entry(*stage).or_insert_with(|| vec![0.0; tokens]);
                sums.iter_mut().zip(rows).for_each(|(sum, energy)| *sum += energy);
            }
            Ok(())
        })?;
        found.append(&mut energies);
        done(windows.len());
    }
    Ok(found)
}

/// Returns the factors of all windows' tokens, one window after another, for what a stage reads: √w for
/// weights w = energy^power, which count at most 30 times their mean. The largest factor is 1, so that no number type
/// overflows; moments scale alike, which changes no choice.
///
/// # Errors
/// If the stage has no energies.
pub fn factors(energies: &[TokenEnergies], stage: &Stage, power: f32) -> Result<Vec<f32>> {
    let mut weights = Vec::new();
    for window in energies {
        let energies = window.get(&stage.leader());
        let energies = energies.with_context(|| format!("`{}` has no energies", stage.leader()))?;
        weights.extend(energies.iter().map(|energy| energy.powf(power)));
    }
    let mean = weights.iter().sum::<f32>() / weights.len().max(1) as f32;
    let most = weights.iter().fold(0.0, |most: f32, &w| most.max(w)).min(MOST * mean);
    if most > 0.0 {
        weights.iter_mut().for_each(|weight| *weight = (weight.min(most) / most).sqrt());
    } else {
        weights.fill(1.0);
    }
    Ok(weights)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::backend::Backend;
    use crate::backend::cpu::Cpu;
    use crate::checkpoint::Checkpoint;
    use crate::model::stages::{Half, LinearSpec};
    use crate::names::Role;

    #[test]
    fn energies_do_not_depend_on_later_windows_and_the_last_stages_see_the_fisher_gradient_itself() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/logits/qwen3");
        let source = Checkpoint::open(&folder).unwrap();
        let model = Model::load(&Cpu, &source.config, &source).unwrap();
        let windows: Vec<Vec<u32>> = (0..3).map(|w| (0..16).map(|i| (i * 7 + w) % 64).collect()).collect();
        let found = token_energies(&Cpu, &model, &windows, &|_| ()).unwrap();
        assert_eq!(token_energies(&Cpu, &model, &windows[..2], &|_| ()).unwrap(), found[..2]);
        // What down adds to goes through the final norm and the head alone.
        let ids = windows.concat();
        let batch = Batch { sequences: 3, tokens: 16 };
        let mut x = model.embed(&Cpu, &ids).unwrap();
        for layer in 0..model.layers.len() {
            model.layer_forward(&Cpu, layer, &mut x, batch, &mut |_, _, _| Ok(())).unwrap();
        }
        let (gain, eps) = (&model.output_norm, model.constants.eps);
        let hidden = Cpu.rms_norm(&x, gain, eps).unwrap();
        let dy = Cpu.fisher_gradient(&hidden, model.head(), 0).unwrap();
        let dx = Cpu.rms_norm_gradient(&x, gain, eps, &dy).unwrap();
        let wanted = Cpu.row_energies(&dx).unwrap();
        let last = model.layers.len() - 1;
        let down = TensorId::in_layer(last, Role::Down);
        let of_down: Vec<f32> = found.iter().flat_map(|window| window[&down].clone()).collect();
        assert_eq!(of_down, wanted);
        assert!(found.iter().all(|window| window.values().flatten().all(|energy| *energy > 0.0)));
        assert!(found.iter().all(|window| window.len() == 4 * model.layers.len()));
    }

    #[test]
    fn factors_grow_with_energy_up_to_one_and_a_power_of_zero_counts_all_alike() {
        let up = LinearSpec { id: TensorId::in_layer(1, Role::Up), shape: [8, 8], bias: false };
        let stage = Stage { half: Half::FeedForward, linears: vec![up] };
        let window = |values: &[f32]| TokenEnergies::from([(up.id, values.to_vec())]);
        let some = window(&[1.0, 4.0, 9.0, 16.0]);
        assert_eq!(factors(std::slice::from_ref(&some), &stage, 1.0).unwrap(), [0.25, 0.5, 0.75, 1.0]);
        assert_eq!(factors(&[some.clone(), some], &stage, 0.0).unwrap(), [1.0; 8]);
        let mut values = vec![1.0; 400];
        values[0] = 1e9;
        let found = factors(&[window(&values)], &stage, 1.0).unwrap();
        assert!(found[0] == 1.0 && found[1] > 0.0);
        assert_eq!(factors(&[window(&[0.0; 2])], &stage, 0.5).unwrap(), [1.0; 2]);
        assert!(factors(&[TokenEnergies::new()], &stage, 0.5).is_err());
    }
}
