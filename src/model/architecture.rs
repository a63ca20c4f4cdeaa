//! What llama.cpp makes of an architecture, beyond what the keys of its files say.

use super::norms::QkNorm;
use super::router::Scores;

/// An architecture of GGUF files.
pub struct Architecture {
    /// `general.architecture`
    pub name: &'static str,
    /// Whether q and k are rotated in neighbours (2i, 2i + 1), so that files keep the rows of each head in that order.
    pub neighbours: bool,
    /// Whether a part of each head may be rotated; others do not load a file that asks for it.
    pub partial_rotation: bool,
    /// Whether angles are divided by the tensors `rope_freqs` or `rope_factors_*`; others do not load a file that has them.
    pub rope_divisors: bool,
    /// Whether files name the window of attention (`attention.sliding_window`), 0 for none, though llama.cpp attends to all
    /// positions.
    pub names_window: bool,
    /// Of this many layers the last does not turn queries and keys by their position; all others do.
    pub still_layers: Option<usize>,
    /// What norms of q and k go over, where a file has some.
    pub qk_norm: QkNorm,
    /// What it does about experts, where files may have some.
    pub mixture: Option<GgufMixture>,
}

/// What llama.cpp does about the experts of an architecture, whatever the keys of a file say.
pub struct GgufMixture {
    /// How logits become scores.
    pub scores: Scores,
    /// Whether the weights of the chosen experts are divided by their sum.
    pub renormalises: bool,
    /// Whether a key says how wide each expert is; otherwise it is as wide as a dense layer would be.
    pub own_width: bool,
    /// Whether every layer has an expert that all tokens share, weighed for each.
    pub shared: bool,
    /// Whether a bias is added to the scores that choose.
    pub choice_bias: bool,
}

impl Architecture {
    /// Whole heads rotated in halves, no window, nothing of its own.
    pub const PLAIN: Architecture = Architecture {
        name: "",
        neighbours: false,
        partial_rotation: false,
        rope_divisors: false,
        names_window: false,
        still_layers: None,
        qk_norm: QkNorm::Heads,
        mixture: None,
    };
}
