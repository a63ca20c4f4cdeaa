//! The keys of rotary embedding in `config.json` ↔ [`RopeParameters`].
//!
//! Read as transformers 5.17 does (`RotaryEmbeddingConfigMixin`): `rope_parameters`, in which θ and everything else stands,
//! for all layers or for each layer type; or the spelling of transformers 4, `rope_theta` beside `rope_scaling`, which wins
//! where both are given. The older names `type` (of `rope_type`), `su` (of `longrope`) and `mrope` (plain for text) are read.
//! Every other key, if it says anything, is refused by name.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Map, Value, json};

use super::{LongRope, RopeParameters, RopeScaling, Yarn};
use crate::backend::Pairing;
use crate::model::config::json::{decimal, size};

/// What a model class adds to the keys of rotary embedding.
#[derive(Clone, Copy, Debug)]
pub struct RopeClass {
    /// θ where no key says it (`default_theta`).
    pub theta: f32,
    /// `max_position_embeddings` where no key says it.
    pub context: usize,
    /// `original_max_position_embeddings` beside the object, where no key says it (Phi-3 has 4096).
    pub original_context: Option<usize>,
    /// Share of a head that turns where no key says it.
    pub share: f64,
    /// Whether the class rotates a part of each head where `partial_rotary_factor` asks for it. Those of Llama, Mistral and
    /// Qwen do not look at the key; engines differ.
    pub partial: bool,
    /// (name of a type, what this class takes it for): Phi-3 takes `yarn` for `longrope`.
    pub renamed: &'static [(&'static str, &'static str)],
    /// Which values turn together.
    pub pairing: Pairing,
    /// Keys inside the object that the class reads itself.
    pub own: &'static [&'static str],
}

impl RopeClass {
    /// The class with nothing of its own, as Llama's.
    pub const PLAIN: RopeClass = RopeClass {
        theta: 10_000.0,
        context: 2048,
        original_context: None,
        share: 1.0,
        partial: false,
        renamed: &[],
        pairing: Pairing::Halves,
        own: &[],
    };
}

/// Rotary embedding of a model's layers.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeByLayer {
    /// All layers turn alike.
    Shared(RopeParameters),
    /// Layer type (an entry of `layer_types`) → its parameters; `None` for layers that do not turn.
    ByType(BTreeMap<String, Option<RopeParameters>>),
}

impl RopeByLayer {
    /// Returns the parameters of all layers.
    ///
    /// # Errors
    /// Names the first layer type if layers differ.
    pub fn shared(self) -> Result<RopeParameters> {
        match self {
            RopeByLayer::Shared(parameters) => Ok(parameters),
            RopeByLayer::ByType(types) => bail!(
                "`rope_parameters.{}`: RoPE parameters per layer type are not supported for this architecture; wanted \
                 one set for all layers",
                types.keys().next().map_or("", String::as_str)
            ),
        }
    }

    /// Returns the parameters of a layer type; `None` for layers that do not turn.
    ///
    /// # Errors
    /// Names the type if the configuration has parameters for other types only.
    pub fn of(&self, layer_type: &str) -> Result<Option<&RopeParameters>> {
        match self {
            RopeByLayer::Shared(parameters) => Ok(Some(parameters)),
            RopeByLayer::ByType(types) => match types.get(layer_type) {
                Some(parameters) => Ok(parameters.as_ref()),
                None => bail!("`rope_parameters` has no `{layer_type}`, which `layer_types` names"),
            },
        }
    }
}

/// Reads the keys of a `config.json`.
///
/// # Errors
/// Names the key that is missing, malformed or unknown, or the type of scaling that is.
pub fn read(json: &Value, class: &RopeClass) -> Result<RopeByLayer> {
    // An empty object says nothing, as in transformers.
    let given = |key: &'static str| match json.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some((key, object)).filter(|_| !object.is_empty())),
        Some(other) => bail!("`{key}` is `{other}`; wanted an object or null"),
    };
    let (new, old) = (given("rope_parameters")?, given("rope_scaling")?);
    let nothing = Map::new();
    let (key, object) = old.or(new).unwrap_or(("rope_parameters", &nothing));
    let theta = number(json, "rope_theta")?;
    let share = number(json, "partial_rotary_factor")?;
    let context = size(json, "max_position_embeddings")?.unwrap_or(class.context);
    let by_type = object.values().any(Value::is_object);
    let outer = Outer {
        theta: theta.map_or(class.theta, |theta| theta as f32),
        share: share.unwrap_or(class.share),
        context,
        // The key beside the object wins over the one inside, but not for types of layers.
        original_context: match by_type {
            true => None,
            false => size(json, "original_max_position_embeddings")?.or(class.original_context),
        },
    };
    if !by_type {
        return Ok(RopeByLayer::Shared(one(key, object, class, &outer)?));
    }
    let mut types = BTreeMap::new();
    for (name, value) in object {
        let path = format!("{key}.{name}");
        match value {
            Value::Object(object) => {
                types.insert(name.clone(), Some(one(&path, object, class, &outer)?));
            }
            Value::Null => {
                types.insert(name.clone(), None);
            }
            // transformers leaves them behind when it saves; each type has its own.
            _ if ["rope_theta", "partial_rotary_factor"].contains(&name.as_str()) => {}
            _ => bail!("`{path}` is `{value}` among parameters per layer type; wanted an object"),
        }
    }
    Ok(RopeByLayer::ByType(types))
}

/// What stands beside the object, defaults of the class filled in.
struct Outer {
    theta: f32,
    share: f64,
    context: usize,
    original_context: Option<usize>,
}

/// Reads one set of parameters; `path` is the object's.
fn one(path: &str, object: &Map<String, Value>, class: &RopeClass, outer: &Outer) -> Result<RopeParameters> {
    let named = ["rope_type", "type"].iter().find_map(|key| object.get(*key).filter(|name| !name.is_null()));
    let name = match named {
        None => "default",
        Some(name) => {
            name.as_str().with_context(|| format!("`{path}.rope_type` is `{name}`; wanted a name"))?
        }
    };
    let kind = class.renamed.iter().find(|row| row.0 == name).map_or(name, |row| row.1);
    let rope = Object { object: &Value::Object(object.clone()), kind };
    let read = || {
        let (scaling, used): (_, &[&str]) = scaling(&rope, outer)?;
        rope.refuse_others(used, class)?;
        let share = number(rope.object, "partial_rotary_factor")?.unwrap_or(outer.share);
        ensure!(
            share == 1.0 || class.partial || matches!(scaling, RopeScaling::Proportional { .. }),
            "`partial_rotary_factor` is {share}, which engines read differently for this architecture; wanted 1.0"
        );
        let theta = number(rope.object, "rope_theta")?.map_or(outer.theta, |theta| theta as f32);
        Ok(RopeParameters { theta, share, pairing: class.pairing, scaling })
    };
    read().with_context(|| format!("`{path}`"))
}

/// Returns the scaling of a type, and the keys it reads.
fn scaling(rope: &Object, outer: &Outer) -> Result<(RopeScaling, &'static [&'static str])> {
    Ok(match rope.kind {
        "default" | "mrope" => (RopeScaling::None, &[]),
        "linear" => (RopeScaling::Linear { factor: rope.need("factor")? }, &["factor"]),
        "dynamic" => {
            (RopeScaling::Dynamic { factor: rope.need("factor")?, context: outer.context }, &["factor"])
        }
        "proportional" => {
            let factor = number(rope.object, "factor")?.unwrap_or(1.0) as f32;
            (RopeScaling::Proportional { factor }, &["factor"])
        }
        "llama3" => (
            RopeScaling::Llama3 {
                factor: rope.need("factor")?,
                low: rope.need("low_freq_factor")?,
                high: rope.need("high_freq_factor")?,
                original_context: rope.original_context(outer)?,
            },
            &["factor", "low_freq_factor", "high_freq_factor"],
        ),
        "yarn" => (
            RopeScaling::Yarn(yarn(rope, outer)?),
            &["factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"],
        ),
        "longrope" | "su" => (
            RopeScaling::LongRope(long_rope(rope, outer)?),
            &["factor", "attention_factor", "short_factor", "long_factor"],
        ),
        other => bail!(
            "type `{other}` is not known; known are `default`, `linear`, `dynamic`, `yarn`, `longrope`, `llama3` and \
             `proportional`"
        ),
    })
}

fn yarn(rope: &Object, outer: &Outer) -> Result<Yarn> {
    let original_context = rope.original_context(outer)?;
    ensure!(rope.object.get("factor").is_some(), "`factor` is missing for type `yarn`");
    let stretched = outer.context as f64 / original_context as f64;
    let factor = number(rope.object, "factor")?.unwrap_or(stretched);
    // 0 and null both mean the usual value, as Python's `or` takes them.
    let said = |name: &str| Ok::<_, anyhow::Error>(number(rope.object, name)?.filter(|&x| x != 0.0));
    let magnitude = match (number(rope.object, "attention_factor")?, said("mscale")?, said("mscale_all_dim")?)
    {
        (Some(magnitude), ..) => magnitude as f32,
        (None, Some(mscale), Some(all)) => {
            (Yarn::magnitude_of(factor, mscale) / Yarn::magnitude_of(factor, all)) as f32
        }
        _ => Yarn::usual_magnitude(factor as f32),
    };
    Ok(Yarn {
        factor: factor as f32,
        original_context,
        beta_fast: said("beta_fast")?.unwrap_or(32.0) as f32,
        beta_slow: said("beta_slow")?.unwrap_or(1.0) as f32,
        truncate: match rope.object.get("truncate") {
            None => true,
            Some(Value::Bool(truncate)) => *truncate,
            Some(other) => bail!("`truncate` is `{other}`; wanted `true` or `false`"),
        },
        magnitude,
    })
}

fn long_rope(rope: &Object, outer: &Outer) -> Result<LongRope> {
    let original_context = rope.original_context(outer)?;
    let stretched = outer.context as f64 / original_context as f64;
    let factor = number(rope.object, "factor")?.unwrap_or(stretched);
    let usual = LongRope::usual_magnitude(factor, original_context);
    Ok(LongRope {
        short: rope.table("short_factor")?,
        long: rope.table("long_factor")?,
        original_context,
        magnitude: number(rope.object, "attention_factor")?.map_or(usual, |magnitude| magnitude as f32),
    })
}

/// One set of parameters as it stands in the file.
struct Object<'a> {
    object: &'a Value,
    /// The type, by its present name.
    kind: &'a str,
}

/// Keys that every type reads, or that change nothing: `original_max_position_embeddings` where the type does not use it,
/// the sections of positions of images, of which text has none, and whether a model was trained so.
const COMMON: [&str; 8] = [
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "original_max_position_embeddings",
    "mrope_section",
    "mrope_interleaved",
    "finetuned",
];

/// (key, the value with which it changes nothing)
const NEUTRAL: [(&str, f64); 5] = [
    ("factor", 1.0),
    ("attention_factor", 1.0),
    ("attn_factor", 1.0),
    ("extrapolation_factor", 1.0),
    ("llama_4_scaling_beta", 0.0),
];

impl Object<'_> {
    fn need(&self, name: &str) -> Result<f32> {
        let value = number(self.object, name)?;
        Ok(value.with_context(|| format!("`{name}` is missing for type `{}`", self.kind))? as f32)
    }

    fn table(&self, name: &str) -> Result<Vec<f32>> {
        let list = self.object.get(name).and_then(Value::as_array);
        let list = list.with_context(|| format!("`{name}` is no list, which type `{}` wants", self.kind))?;
        let number = |value: &Value| {
            let number = value.as_f64().with_context(|| format!("`{name}` has `{value}`; wanted numbers"));
            number.map(|number| number as f32)
        };
        list.iter().map(number).collect()
    }

    fn original_context(&self, outer: &Outer) -> Result<usize> {
        let inner = size(self.object, "original_max_position_embeddings")?;
        Ok(outer.original_context.or(inner).unwrap_or(outer.context))
    }

    /// Refuses every key that neither this type nor its class reads and that is not known to change nothing.
    fn refuse_others(&self, used: &[&str], class: &RopeClass) -> Result<()> {
        for (key, value) in self.object.as_object().into_iter().flatten() {
            let read = [&COMMON, used, class.own].iter().any(|keys| keys.contains(&key.as_str()));
            let neutral =
                NEUTRAL.iter().any(|(name, neutral)| name == key && value.as_f64() == Some(*neutral));
            ensure!(
                read || neutral || value.is_null(),
                "`{key}` is `{value}`, which no forward pass here knows for type `{}`; if engines ignore it, remove it",
                self.kind
            );
        }
        Ok(())
    }
}

/// Returns the object of `rope_parameters` that [`read`] takes for these parameters again, in the spelling of transformers 5.
///
/// # Errors
/// If scaling is a table of divisors, which has no key there.
pub fn write(rope: &RopeParameters, class: &RopeClass) -> Result<Value> {
    let mut out = match &rope.scaling {
        RopeScaling::None => json!({"rope_type": "default"}),
        RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": decimal(*factor)}),
        RopeScaling::Dynamic { factor, context: _ } => {
            json!({"rope_type": "dynamic", "factor": decimal(*factor)})
        }
        RopeScaling::Proportional { factor } => {
            json!({"rope_type": "proportional", "factor": decimal(*factor)})
        }
        RopeScaling::Llama3 { factor, low, high, original_context } => json!({
            "rope_type": "llama3",
            "factor": decimal(*factor),
            "low_freq_factor": decimal(*low),
            "high_freq_factor": decimal(*high),
            "original_max_position_embeddings": original_context,
        }),
        RopeScaling::Yarn(yarn) => json!({
            "rope_type": "yarn",
            "factor": decimal(yarn.factor),
            "original_max_position_embeddings": yarn.original_context,
            "beta_fast": decimal(yarn.beta_fast),
            "beta_slow": decimal(yarn.beta_slow),
            "truncate": yarn.truncate,
            "attention_factor": decimal(yarn.magnitude),
        }),
        RopeScaling::LongRope(long) => json!({
            "rope_type": "longrope",
            "short_factor": long.short.iter().map(|x| decimal(*x)).collect::<Vec<_>>(),
            "long_factor": long.long.iter().map(|x| decimal(*x)).collect::<Vec<_>>(),
            "original_max_position_embeddings": long.original_context,
            "attention_factor": decimal(long.magnitude),
        }),
        RopeScaling::Divisors(_) => {
            bail!("RoPE is scaled by a table of divisors, which `config.json` has no key for")
        }
    };
    out["rope_theta"] = decimal(rope.theta);
    if rope.share != class.share {
        out["partial_rotary_factor"] = json!(rope.share);
    }
    Ok(out)
}

fn number(json: &Value, name: &str) -> Result<Option<f64>> {
    match json.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(value) => Ok(Some(value)),
            None => bail!("`{name}` is `{value}`; wanted a number"),
        },
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
