//! Which linears a layer has, asked of the configuration: their shapes, what they read, how they follow each other. Whoever
//! walks a layer's linears (loading, calibrating, counting memory and work) takes them from here.

use super::config::{Config, Ffn, Mixer, SharedExpert};
use crate::names::{Role, TensorId};

/// One of the two parts of a layer that add to the residual stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Half {
    /// q, k, v; attention; o.
    Attention,
    /// gate, up; down.
    FeedForward,
}

impl Half {
    /// Both, in the order they run.
    pub const ALL: [Half; 2] = [Half::Attention, Half::FeedForward];

    /// Returns the linear that adds to the stream.
    pub fn output(self) -> Role {
        match self {
            Half::Attention => Role::O,
            Half::FeedForward => Role::Down,
        }
    }
}

/// A linear of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinearSpec {
    /// Its weight.
    pub id: TensorId,
    /// `[out_features, in_features]`
    pub shape: [usize; 2],
    /// Whether it has a bias `[out_features]`.
    pub bias: bool,
}

/// Linears of a layer that read one input, in the order they run. Engines join them into one matrix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stage {
    /// The part of the layer they belong to.
    pub half: Half,
    /// At least one.
    pub linears: Vec<LinearSpec>,
}

impl Stage {
    /// Returns the id that stands for all of them.
    pub fn leader(&self) -> TensorId {
        self.linears[0].id
    }

    /// Returns the width of the input.
    pub fn cols(&self) -> usize {
        self.linears[0].shape[1]
    }

    /// Returns the width of all outputs together.
    pub fn rows(&self) -> usize {
        self.linears.iter().map(|linear| linear.shape[0]).sum()
    }

    /// Returns the width of the widest output.
    pub fn widest(&self) -> usize {
        self.linears.iter().map(|linear| linear.shape[0]).max().unwrap_or(0)
    }

    /// Whether it reads the normed residual stream; otherwise it adds to the stream.
    pub fn reads_norm(&self) -> bool {
        !matches!(self.leader().role, Role::O | Role::Down | Role::SharedDown)
    }
}

impl LinearSpec {
    /// Returns how many weights it has.
    pub fn weights(&self) -> usize {
        self.shape[0] * self.shape[1]
    }
}

impl Config {
    /// Returns the stages of a layer in the order they run: the mixer's, then those of the feed-forward part.
    pub fn stages(&self, layer: usize) -> Vec<Stage> {
        let hidden = self.hidden_size;
        let linear = |role, out_features, in_features, bias| LinearSpec {
            id: TensorId::in_layer(layer, role),
            shape: [out_features, in_features],
            bias,
        };
        let kind = &self.layers[layer];
        let mut stages = match kind.mixer {
            Mixer::Attention => {
                let q = self.num_attention_heads * self.head_dim;
                let kv = self.num_key_value_heads * self.head_dim;
                let inputs = vec![
                    linear(Role::Q, q, hidden, self.qkv_bias),
                    linear(Role::K, kv, hidden, self.qkv_bias),
                    linear(Role::V, kv, hidden, self.qkv_bias),
                ];
                let output = vec![linear(Role::O, hidden, q, self.o_bias)];
                [inputs, output].map(|linears| Stage { half: Half::Attention, linears }).to_vec()
            }
        };
        stages.extend(match kind.ffn {
            Ffn::Dense { width } => {
                let inputs = vec![
                    linear(Role::Gate, width, hidden, self.mlp_bias),
                    linear(Role::Up, width, hidden, self.mlp_bias),
                ];
                let output = vec![linear(Role::Down, hidden, width, self.mlp_bias)];
                [inputs, output].map(|linears| Stage { half: Half::FeedForward, linears }).to_vec()
            }
            Ffn::Mixture(experts) => {
                let gated = |[gate, up, down]: [Role; 3], width| {
                    let inputs = [gate, up].map(|role| linear(role, width, hidden, self.mlp_bias)).to_vec();
                    let output = vec![linear(down, hidden, width, self.mlp_bias)];
                    [inputs, output].map(|linears| Stage { half: Half::FeedForward, linears })
                };
                let mut stages = Vec::new();
                for expert in 0..experts.rule.experts {
                    for mut stage in gated([Role::Gate, Role::Up, Role::Down], experts.width) {
                        stage.linears.iter_mut().for_each(|linear| linear.id = linear.id.of_expert(expert));
                        stages.push(stage);
                    }
                }
                if let Some(SharedExpert { width, .. }) = experts.shared {
                    stages.extend(gated([Role::SharedGate, Role::SharedUp, Role::SharedDown], width));
                }
                stages
            }
        });
        stages
    }

    /// Returns the linears of a layer in the order they run.
    pub fn linears_of(&self, layer: usize) -> impl Iterator<Item = LinearSpec> {
        self.stages(layer).into_iter().flat_map(|stage| stage.linears)
    }

    /// Returns the linears of all layers in the order they run.
    pub fn linears(&self) -> impl Iterator<Item = LinearSpec> {
        (0..self.layers.len()).flat_map(|layer| self.linears_of(layer))
    }

    /// Returns the stage of a layer that adds a half's result to the residual stream.
    pub fn output_stage(&self, layer: usize, half: Half) -> Option<Stage> {
        self.stages(layer).into_iter().find(|stage| stage.half == half && !stage.reads_norm())
    }
}
