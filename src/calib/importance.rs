//! Mean squared inputs of every linear of a full-precision model over calibration windows: what an importance matrix holds.
//!
//! Layer by layer: in memory are the residual streams of all windows and one layer.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::CHUNK_TOKENS;
use super::imatrix::Importances;
use crate::backend::{Backend, Batch};
use crate::model::TensorSource;
use crate::model::block::{Layer, LayerConstants};
use crate::model::config::Config;
use crate::names::{Role, TensorId};

/// Returns the mean square of each column's input, for every decoder linear. `windows` are equally long; `progress` hears
/// of each finished layer.
///
/// # Errors
/// If a tensor cannot be read or the backend fails.
pub fn mean_squares<B: Backend>(
    backend: &B,
    config: &Config,
    source: &impl TensorSource,
    windows: &[Vec<u32>],
    progress: &dyn Fn(),
) -> Result<Importances> {
    let constants = LayerConstants::new(config);
    let table = backend.upload(source.read(TensorId::global(Role::Embed))?)?;
    let tokens = windows.first().map_or(1, Vec::len);
    let mut chunks = Vec::new();
    for windows in windows.chunks((CHUNK_TOKENS / tokens).max(1)) {
        let batch = Batch { sequences: windows.len(), tokens };
        chunks.push((backend.embed(&table, &windows.concat())?, batch));
    }
    let mut out = Importances::new();
    for index in 0..config.num_hidden_layers {
        let layer = Layer::load(backend, config, source, index).with_context(|| format!("layer {index}"))?;
        let mut sums: BTreeMap<TensorId, (Vec<f64>, usize)> = BTreeMap::new();
        for (x, batch) in &mut chunks {
            layer.forward(backend, &constants, x, *batch, &mut |role, expert, input| {
                // K and V read what Q reads, up what gate reads.
                if role.joined() != role {
                    return Ok(());
                }
                let id = TensorId {
                    expert: expert.map(|expert| expert as u16),
                    ..TensorId::in_layer(index, role)
                };
                let (squares, count) = sums.entry(id).or_default();
                add_squares(squares, &backend.read(input)?, backend.rows(input));
                *count += backend.rows(input);
                Ok(())
            })?;
        }
        for stage in config.stages(index) {
            // An expert that no token reached has no importances, as in llama.cpp's.
            let Some((squares, count)) = sums.get(&stage.leader()) else { continue };
            let means: Vec<f32> = squares.iter().map(|sum| (sum / *count as f64) as f32).collect();
            out.extend(stage.linears.iter().map(|linear| (linear.id, means.clone())));
        }
        progress();
    }
    Ok(out)
}

/// Adds the squares of `values` `[tokens, cols]` to the sums of their columns.
fn add_squares(sums: &mut Vec<f64>, values: &[f32], tokens: usize) {
    let cols = values.len() / tokens.max(1);
    sums.resize(cols, 0.0);
    for row in values.chunks_exact(cols.max(1)) {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += (*x as f64) * (*x as f64));
    }
}

/// Checks that every quantized weight's importances fit; returns how many of `tensors` have none.
///
/// # Errors
/// As [`super::imatrix::Imatrix::of`].
pub fn missing(
    imatrix: &super::imatrix::Imatrix,
    tensors: impl Iterator<Item = (TensorId, usize)>,
) -> Result<usize> {
    let mut missing = 0;
    for (id, cols) in tensors {
        missing += imatrix.of(id, cols)?.is_none() as usize;
    }
    Ok(missing)
}
