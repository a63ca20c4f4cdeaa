//! What was asked for: a format, who will read it, and how codes are chosen.

use std::fmt;

use anyhow::{Result, bail};
use serde::Serialize;

use crate::dialect::{self, Dialect};
use crate::names::TensorId;
use crate::scheme::fit::ScaleRule;
use crate::scheme::mix::{self, FORMATS, Format};
use crate::scheme::{Activations, schemes};

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
        let Some(mut format) = mix::by_name(format) else {
            let known: Vec<_> = FORMATS.iter().map(|f| f.name).collect();
            bail!("`--format {format}` is not known; formats: {}", known.join(", "));
        };
        let name = dialect.unwrap_or(format.dialects[0]);
        if !format.dialects.contains(&name) {
            let alternatives = FORMATS.iter().filter(|f| f.dialects.contains(&name)).map(|f| f.name);
            bail!(
                "dialect `{name}` has no spelling for `{}`; its dialects: {}; formats of `{name}`: {}",
                format.name,
                format.dialects.join(", "),
                alternatives.collect::<Vec<_>>().join(", "),
            );
        }
        let Some(dialect) = dialect::by_name(name) else { bail!("`--dialect {name}` is not known") };
        match (group_size, format.name) {
            (None, _) => {}
            (Some(size @ (32 | 64 | 128)), "int8") => format.base = schemes::int8_grouped(size),
            (Some(size @ (32 | 64 | 128)), "int4") => format.base = schemes::int4_grouped(size),
            (Some(size), "int8" | "int4") => {
                bail!("`--group-size {size}`: engines read groups of 32, 64 or 128")
            }
            (Some(_), name) => {
                bail!("`--group-size` belongs to `--format int8` and `int4`; `{name}` has a fixed block")
            }
        }
        Ok(Recipe {
            format,
            dialect,
            method: Method::Rtn,
            scale_rule: ScaleRule::default(),
            pure: false,
            no_fallback: false,
            allow_requantize: false,
        })
    }

    /// Returns what the linear of a quantized weight does to its inputs.
    pub fn activations(&self, id: TensorId) -> Activations {
        if id.role.is_linear() { self.format.activations } else { Activations::Full }
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
        assert!(error("q4_k_m", None, Some(64)).contains("belongs to `--format int8`"));
        assert!(error("int8", None, Some(48)).contains("32, 64 or 128"));
    }

    #[test]
    fn the_group_size_becomes_part_of_the_scheme() {
        let recipe = Recipe::new("int8", None, Some(64)).unwrap();
        assert_eq!(recipe.format.base.group, Span::Cols(64));
    }
}
