//! Which tensors a checkpoint of a model must hold.

use super::config::{Config, Ffn};
use super::stages::LinearSpec;
use crate::names::{Role, TensorId};

impl Config {
    /// Returns every tensor that a checkpoint must hold with its shape, in the order of a forward pass.
    pub fn expected_tensors(&self) -> Vec<(TensorId, Vec<usize>)> {
        let mut tensors = vec![(TensorId::global(Role::Embed), vec![self.vocab_size, self.hidden_size])];
        for layer in 0..self.num_hidden_layers {
            self.push_layer_tensors(layer, &mut tensors);
        }
        tensors.push((TensorId::global(Role::OutputNorm), vec![self.hidden_size]));
        if !self.tie_word_embeddings {
            tensors.push((TensorId::global(Role::Head), vec![self.vocab_size, self.hidden_size]));
        }
        tensors
    }

    fn push_layer_tensors(&self, layer: usize, tensors: &mut Vec<(TensorId, Vec<usize>)>) {
        let hidden = self.hidden_size;
        let id = |role| TensorId::in_layer(layer, role);
        for LinearSpec { id, shape, bias } in self.linears_of(layer) {
            tensors.push((id, shape.to_vec()));
            if bias {
                tensors.push((id.bias(), vec![shape[0]]));
            }
        }
        if let Ffn::Mixture(experts) = self.layers[layer].ffn {
            let count = experts.rule.experts;
            tensors.push((id(Role::Router), vec![count, hidden]));
            if experts.choice_bias {
                tensors.push((id(Role::ChoiceBias), vec![count]));
            }
            if experts.shared.is_some_and(|shared| shared.gated) {
                tensors.push((id(Role::SharedRouter), vec![1, hidden]));
            }
        }
        tensors.push((id(Role::AttnNorm), vec![hidden]));
        tensors.push((id(Role::FfnNorm), vec![hidden]));
        if let Some(norm) = self.qk_norm {
            tensors.push((id(Role::QNorm), vec![norm.width(self.num_attention_heads, self.head_dim)]));
            tensors.push((id(Role::KNorm), vec![norm.width(self.num_key_value_heads, self.head_dim)]));
        }
    }
}
