//! What was asked for: which tensor becomes what ([`rules`]), who will read it, and how codes are chosen.
//!
//! A format is a name for a function that returns rules ([`formats`]).

pub mod formats;
pub mod rules;

use std::fmt;

use anyhow::{Result, bail, ensure};
use serde::Serialize;

use self::formats::{Base, FORMATS, Format, Mix};
use self::rules::Rule;
use crate::dialect::{self, Dialect};
use crate::model::config::Config;
use crate::scheme::fit::ScaleRule;

/// How codes are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Round to nearest after a scale search.
    Rtn,
    /// Error feedback over calibration inputs, with mismatch correction and coordinate descent.
    Gptq,
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Method::Rtn => "rtn",
            Method::Gptq => "gptq",
        })
    }
}

/// A conversion as asked for, names resolved and contradictions refused.
#[derive(Clone, Copy)]
pub struct Recipe {
    /// The format, its base scheme adjusted to the group size.
    pub format: Format,
    /// What the tensors become.
    pub mix: Mix,
    /// Who will read the result.
    pub dialect: &'static dyn Dialect,
    /// How codes are chosen.
    pub method: Method,
    /// How power-of-two scales are chosen.
    pub scale_rule: ScaleRule,
    /// Everything 2-D in the base scheme.
    pub pure: bool,
    /// A substitute scheme is an error.
    pub no_fallback: bool,
    /// An already quantized source is accepted.
    pub allow_requantize: bool,
}

impl Recipe {
    /// Resolves names. Errors name the flag, what it was given and what it takes.
    pub fn new(format: &str, dialect: Option<&str>, group_size: Option<u32>) -> Result<Self> {
        let Some(mut format) = formats::by_name(format) else {
            let known: Vec<_> = FORMATS.iter().map(|f| f.name).collect();
            bail!("`--format {format}` is not known; formats: {}", known.join(", "));
        };
        let name = dialect.unwrap_or(format.dialects[0].0);
        let Some(&(_, mix)) = format.dialects.iter().find(|row| row.0 == name) else {
            let spelled = |format: &&Format| format.dialects.iter().any(|row| row.0 == name);
            bail!(
                "dialect `{name}` has no spelling for `{}`; its dialects: {}; formats of `{name}`: {}",
                format.name,
                format.dialects.iter().map(|row| row.0).collect::<Vec<_>>().join(", "),
                FORMATS.iter().filter(spelled).map(|f| f.name).collect::<Vec<_>>().join(", "),
            );
        };
        let Some(dialect) = dialect::by_name(name) else { bail!("`--dialect {name}` is not known") };
        if let Some(size) = group_size {
            let Some(grouped) = format.grouped else {
                let takes: Vec<_> =
                    FORMATS.iter().filter(|f| f.grouped.is_some()).map(|f| format!("`{}`", f.name)).collect();
                bail!(
                    "`--group-size` belongs to `--format` {}; `{}` has a fixed block",
                    takes.join(" and "),
                    format.name
                )
            };
            ensure!(
                matches!(size, 32 | 64 | 128),
                "`--group-size {size}`: engines read groups of 32, 64 or 128"
            );
            if let Base::Quantized(choice) = &mut format.base {
                choice.scheme = grouped(size);
            }
        }
        Ok(Recipe {
            format,
            mix,
            dialect,
            method: Method::Rtn,
            scale_rule: ScaleRule::default(),
            pure: false,
            no_fallback: false,
            allow_requantize: false,
        })
    }

    /// Returns which tensor of a model becomes what.
    pub fn rules(&self, config: &Config) -> Vec<Rule> {
        let Base::Quantized(base) = self.format.base else { return Vec::new() };
        let mut rules = (self.mix)(base, config);
        if self.pure {
            rules.iter_mut().for_each(|rule| rule.choice = rule.choice.map(|_| base));
        }
        rules
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheme::Span;

    fn error(format: &str, dialect: Option<&str>, group_size: Option<u32>) -> String {
        Recipe::new(format, dialect, group_size).err().map(|e| e.to_string()).unwrap_or_default()
    }

    #[test]
    fn contradictions_are_refused_by_name() {
        assert!(error("q9_9", None, None).contains("`--format q9_9` is not known"));
        assert!(error("int8", Some("gguf"), None).contains("dialect `gguf` has no spelling for `int8`"));
        assert!(error("q4_k_m", None, Some(64)).contains("belongs to `--format` `int4` and `int8`"));
        assert!(error("int8", None, Some(48)).contains("32, 64 or 128"));
    }

    #[test]
    fn the_group_size_becomes_part_of_the_scheme() {
        let recipe = Recipe::new("int8", None, Some(64)).unwrap();
        assert_eq!(recipe.format.base.choice().unwrap().scheme.group, Span::Cols(64));
    }
}
