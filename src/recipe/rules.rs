//! Which tensor becomes what, as an ordered list of rules: of those that select a tensor the last one decides.

use regex::Regex;

use crate::names::{Role, TensorId, TensorPart};
use crate::scheme::Choice;

/// Which matrices a rule speaks of. Vectors (norms, biases) are never selected.
#[derive(Clone, Debug)]
pub enum Select {
    /// All: linears of layers, embeddings, head.
    Matrices,
    /// All linears of layers.
    Linears,
    /// Those with one of these roles.
    Roles(Vec<Role>),
    /// Those with one of these roles in one of these layers.
    InLayers(Vec<Role>, Vec<usize>),
    /// Those whose name in the Hugging Face layout (`model.layers.3.mlp.down_proj.weight`) this finds a match in.
    Named(Regex),
}

/// What the selected tensors become.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Which ones.
    pub select: Select,
    /// What they become; `None`: they stay as they are.
    pub choice: Option<Choice>,
}

impl Select {
    /// Whether this selects a tensor.
    pub fn matches(&self, id: TensorId) -> bool {
        let matrix = id.role.is_linear() || matches!(id.role, Role::Embed | Role::Head);
        let layer = || id.layer.map(usize::from);
        id.part == TensorPart::Weight
            && matrix
            && match self {
                Select::Matrices => true,
                Select::Linears => id.role.is_linear(),
                Select::Roles(roles) => roles.contains(&id.role),
                Select::InLayers(roles, layers) => {
                    roles.contains(&id.role) && layer().is_some_and(|layer| layers.contains(&layer))
                }
                Select::Named(pattern) => pattern.is_match(&id.hf_name()),
            }
    }
}

impl Rule {
    /// Returns a rule that quantizes.
    pub fn new(select: Select, choice: Choice) -> Self {
        Rule { select, choice: Some(choice) }
    }
}

/// Returns what a tensor becomes, `None` if it stays as it is.
pub fn choose(rules: &[Rule], id: TensorId) -> Option<Choice> {
    rules.iter().rfind(|rule| rule.select.matches(id)).and_then(|rule| rule.choice)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheme::schemes::{MXFP4, Q6_K, Q8_0};

    #[test]
    fn the_last_rule_that_selects_a_tensor_decides_and_vectors_are_never_selected() {
        let rules = [
            Rule::new(Select::Matrices, Choice::weights(MXFP4)),
            Rule::new(Select::InLayers(vec![Role::V, Role::Down], vec![1]), Choice::weights(Q6_K)),
            Rule::new(Select::Named(Regex::new(r"layers\.2\.mlp").unwrap()), Choice::weights(Q8_0)),
            Rule { select: Select::Roles(vec![Role::Embed]), choice: None },
        ];
        let scheme = |id| choose(&rules, id).map(|choice| choice.scheme);
        assert_eq!(scheme(TensorId::in_layer(0, Role::Down)), Some(MXFP4));
        assert_eq!(scheme(TensorId::in_layer(1, Role::Down)), Some(Q6_K));
        assert_eq!(scheme(TensorId::in_layer(2, Role::Down)), Some(Q8_0));
        assert_eq!(scheme(TensorId::global(Role::Head)), Some(MXFP4));
        assert_eq!(scheme(TensorId::global(Role::Embed)), None);
        assert_eq!(scheme(TensorId::in_layer(2, Role::FfnNorm)), None);
        assert_eq!(scheme(TensorId::in_layer(0, Role::Q).bias()), None);
    }
}
