//! Mixtures of experts ↔ the `{architecture}.expert_*` keys of a GGUF file, and what llama.cpp does about experts that no key
//! says (src/models, commit 0c1e57098).

use anyhow::{Context, Result, bail, ensure};

use super::keys::Keys;
use crate::container::gguf::Metadata;
use crate::model::config::{Config, Experts, Ffn, SharedExpert};
use crate::model::family::{Architecture, GgufMixture};
use crate::model::router::{Router, Scores};
use crate::names::{Role, TensorId};
use crate::rows::{Place, RowMap};

/// Sets the keys of a configuration whose layers have experts; none for others.
///
/// # Errors
/// Name what llama.cpp does otherwise than the model, or cannot do, for that architecture.
pub fn write(config: &Config, out: &mut Metadata) -> Result<()> {
    let architecture = &config.family.gguf;
    let name = architecture.name;
    let Some(experts) = config.layers.iter().find_map(|layer| layer.ffn.experts()) else { return Ok(()) };
    let fixed = mixture_of(architecture)?;
    let dense = config.layers.iter().position(|layer| layer.ffn.experts().is_none());
    if let Some(layer) = dense {
        bail!(
            "layer {layer} has no experts, but llama.cpp looks for some in every layer of `{name}`; {CURE}"
        );
    }
    let kept = fixed.experts(
        experts.rule.experts,
        experts.rule.top_k,
        experts.width,
        experts.shared.map(|s| s.width),
    );
    ensure!(
        kept.rule.renormalise == experts.rule.renormalise,
        "llama.cpp {} divides the weights of the chosen experts by their sum for `{name}`, and this model {} \
         (`norm_topk_prob`); {CURE}",
        if fixed.renormalises { "always" } else { "never" },
        if experts.rule.renormalise { "does" } else { "does not" },
    );
    ensure!(
        config.layers.iter().all(|layer| layer.ffn == Ffn::Mixture(kept)),
        "llama.cpp chooses experts of `{name}` by another rule than this model: {kept:?}, wanted {experts:?}; {CURE}"
    );
    let mut set = |key: &str, value: usize| -> Result<()> {
        let value =
            u32::try_from(value).with_context(|| format!("`{key}` {value} does not fit GGUF's u32"))?;
        out.set(&format!("{name}.{key}"), value);
        Ok(())
    };
    set("expert_count", experts.rule.experts)?;
    set("expert_used_count", experts.rule.top_k)?;
    if fixed.scores != Scores::Softmax {
        set("expert_gating_func", gating(fixed.scores))?;
    }
    if fixed.own_width {
        set("expert_feed_forward_length", experts.width)?;
    }
    match experts.shared {
        Some(SharedExpert { width, .. }) => set("expert_shared_feed_forward_length", width),
        None => Ok(()),
    }
}

const CURE: &str = "choose a format of compressed-tensors";

/// Returns the experts of every layer of a file; `None` if it has none. `width` is its `feed_forward_length`.
///
/// # Errors
/// Name the key that is missing, malformed, or changes what no forward pass here honours.
pub fn read(keys: &Keys, architecture: &Architecture, width: usize) -> Result<Option<Experts>> {
    let experts = keys.size("expert_count")?.unwrap_or(0);
    if experts == 0 {
        return Ok(None);
    }
    let fixed = mixture_of(architecture)?;
    let top_k = keys.required("expert_used_count")?;
    ensure!(top_k > 0, "GGUF key `{}` is 0; wanted at least 1", keys.name("expert_used_count"));
    let usual = if fixed.own_width { width / top_k } else { width };
    let own = keys.size("expert_feed_forward_length")?.filter(|&width| width > 0);
    let shared = match fixed.shared {
        true => Some(keys.size("expert_shared_feed_forward_length")?.unwrap_or(width)),
        false => None,
    };
    let usual_scores = gating(fixed.scores);
    let scores = keys.size("expert_gating_func")?.filter(|&scores| scores > 0).unwrap_or(usual_scores);
    ensure!(
        scores == usual_scores,
        "GGUF key `{}` is {scores}, wanted {usual_scores} for `{}`",
        keys.name("expert_gating_func"),
        architecture.name
    );
    keys.refuse_others(&UNREAD)?;
    Ok(Some(fixed.experts(experts, top_k, own.unwrap_or(usual), shared)))
}

/// Keys that change which experts are chosen and how they count, and the values with which they do not, or say what is the
/// only way for these architectures.
const UNREAD: [(&str, f64); 5] = [
    ("expert_weights_scale", 1.0),
    ("expert_group_count", 0.0),
    ("expert_group_used_count", 0.0),
    ("leading_dense_block_count", 0.0),
    ("interleave_moe_layer_step", 1.0),
];

/// Returns llama.cpp's number for a way from logits to scores (`llama_expert_gating_func_type`).
fn gating(scores: Scores) -> usize {
    match scores {
        Scores::Softmax => 1,
        Scores::Sigmoid => 2,
        Scores::SoftmaxOfChosen => 3,
    }
}

fn mixture_of(architecture: &Architecture) -> Result<&GgufMixture> {
    let mixture = architecture.mixture.as_ref();
    mixture.with_context(|| {
        format!("llama.cpp's mixtures of experts of `{}` are not known here; {CURE}", architecture.name)
    })
}

impl GgufMixture {
    /// Returns the experts of a layer of such a file.
    fn experts(&self, experts: usize, top_k: usize, width: usize, shared: Option<usize>) -> Experts {
        let (scores, renormalise) = (self.scores, self.renormalises);
        Experts {
            rule: Router { experts, top_k, scores, groups: None, renormalise, scale: 1.0 },
            width,
            choice_bias: self.choice_bias,
            shared: shared.map(|width| SharedExpert { width, gated: true }),
        }
    }
}

/// Returns where files keep a matrix of an expert: in a stack of that matrix of all experts of its layer
/// `[experts, rows, cols]`; `None` for other tensors.
pub fn place(id: TensorId, rows: usize, config: &Config) -> Option<Place> {
    let expert = usize::from(id.expert?);
    let experts = config.layers[usize::from(id.layer?)].ffn.experts()?.rule.experts;
    let stem = match id.role {
        Role::Gate => "ffn_gate_exps",
        Role::Up => "ffn_up_exps",
        Role::Down => "ffn_down_exps",
        _ => return None,
    };
    Some(Place { name: id.gguf_name_as(stem), axes: vec![experts, rows], rows: RowMap::slice(expert * rows) })
}

/// Whether a tensor chooses or weighs experts: as in files of llama.cpp's converter, it is F32 whatever the others are.
pub fn chooses(id: TensorId) -> bool {
    matches!(id.role, Role::Router | Role::SharedRouter)
}
