//! Scales of an FP8 cache: how large keys and values become on calibration text.

use anyhow::{Result, ensure};

use crate::backend::{Backend, Batch};
use crate::model::TensorSource;
use crate::model::block::{Layer, LayerConstants};
use crate::model::config::Config;
use crate::names::{Role, TensorId};

/// The largest E4M3 value.
const LARGEST: f32 = 448.0;

/// Returns the scales of every layer's keys and values: the largest magnitude after rotation, over 448, so that nothing of
/// the calibration text is clipped (vLLM's `k_scale` and `v_scale`). `progress` hears of each finished layer. In memory at a time: the residual streams and a layer.
///
/// # Errors
/// Tensors that cannot be read, keys or values that are not finite.
pub fn fp8_scales<B: Backend>(
    backend: &B,
    config: &Config,
    source: &impl TensorSource,
    windows: &[Vec<u32>],
    progress: &dyn Fn(),
) -> Result<Vec<[f32; 2]>> {
    let constants = LayerConstants::new(config);
    let table = backend.upload(source.read(TensorId::global(Role::Embed))?)?;
    let mut streams = windows.iter().map(|ids| backend.embed(&table, ids)).collect::<Result<Vec<_>>>()?;
    let mut scales = Vec::with_capacity(config.num_hidden_layers);
    for at in 0..config.num_hidden_layers {
        let layer = Layer::load(backend, config, source, at)?;
        let mut largest = [0.0f32; 2];
        for (x, ids) in streams.iter_mut().zip(windows) {
            let batch = Batch { sequences: 1, tokens: ids.len() };
            let normed = backend.rms_norm(x, &layer.attn_norm, constants.eps)?;
            let [q, k, v] = layer.queries_keys_values(backend, &constants, &normed, batch)?;
            for (largest, tensor) in largest.iter_mut().zip([&k, &v]) {
                let values = backend.read(tensor)?;
                // A NaN stays, as `f32::max` would not let it.
                let greater = |a: f32, b: &f32| if b.abs() <= a { a } else { b.abs() };
                *largest = values.iter().fold(*largest, greater);
            }
            let mixed = layer.mix(backend, &constants, [&q, &k, &v], batch)?;
            layer.finish(backend, &constants, x, &mixed)?;
        }
        ensure!(
            largest.iter().all(|largest| largest.is_finite()),
            "layer {at}: keys or values are not finite; an FP8 cache cannot hold them"
        );
        // A layer without any signal still needs a scale that can divide.
        progress();
        scales.push(largest.map(|largest| if largest > 0.0 { largest / LARGEST } else { 1.0 }));
    }
    Ok(scales)
}
