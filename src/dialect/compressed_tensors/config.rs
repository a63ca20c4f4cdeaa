//! `quantization_config` of `config.json`: which modules are quantized, and how.
//!
//! Written with the fields that compressed-tensors 0.17 knows and no others: it forbids unknown ones inside a group, and
//! vLLM 0.30 and 0.32 pin that version. Parsed with the library's own rules (`QuantizationConfig`, `match_targets`);
//! what evaluation could not reproduce is refused by name.

mod json;

use anyhow::{Context, Result, ensure};
use regex::Regex;
use serde_json::{Map, Value, json};

use self::json::{ConfigJson, is_empty, parse_group};
use super::Format;
use crate::num::{Codec, Element};
use crate::scheme::schemes::NVFP4;
use crate::scheme::{Activations, Scheme, Span};

/// What a checkpoint says of its quantized modules.
#[derive(Clone, Debug)]
pub struct Quantization {
    groups: Vec<Group>,
    ignore: Vec<Target>,
    fp8_cache: bool,
}

#[derive(Clone, Debug)]
struct Group {
    targets: Vec<Target>,
    scheme: Scheme,
    activations: Activations,
}

/// `Linear` (every linear), a module path, or `re:` and a pattern that matches from the start of a path.
#[derive(Clone, Debug)]
struct Target {
    text: String,
    pattern: Option<Regex>,
}

impl Quantization {
    /// Describes a plan: every linear module of the model with what it becomes, `None` if it is kept.
    ///
    /// One scheme is targeted as `Linear` with the kept modules ignored. Several are targeted path by path: patterns
    /// would be read differently by engines that match the names of fused modules (`gate_up_proj`) first.
    pub fn of_plan(linears: &[(String, Option<(Scheme, Activations)>)]) -> Result<Self> {
        let mut groups: Vec<Group> = vec![];
        let mut ignore = vec![Target::exact("lm_head")];
        for (module, stored) in linears {
            let Some((scheme, activations)) = *stored else {
                if module != "lm_head" {
                    ignore.push(Target::exact(module));
                }
                continue;
            };
            ensure!(
                module != "lm_head",
                "`lm_head` cannot be quantized: engines other than vLLM cannot load it"
            );
            Format::of(&scheme, activations).with_context(|| module.clone())?;
            let same = |group: &&mut Group| group.scheme == scheme && group.activations == activations;
            match groups.iter_mut().find(same) {
                Some(group) => group.targets.push(Target::exact(module)),
                None => groups.push(Group { targets: vec![Target::exact(module)], scheme, activations }),
            }
        }
        if let [group] = &mut groups[..] {
            group.targets = vec![Target::exact("Linear")];
        }
        Ok(Quantization { groups, ignore, fp8_cache: false })
    }

    /// Returns the same with an FP8 cache of keys and values, whose scales lie beside the weights.
    pub fn with_fp8_cache(self, fp8_cache: bool) -> Self {
        Quantization { fp8_cache, ..self }
    }

    /// Whether engines keep keys and values in FP8.
    pub fn has_fp8_cache(&self) -> bool {
        self.fp8_cache
    }

    /// Returns what that module path (`model.layers.0.mlp.up_proj`) is stored as, `None` if it is not quantized.
    ///
    /// Precedence as in the library: `ignore`, then exact paths, then patterns in alphabetical order, then `Linear`.
    /// `linear` says whether transformers builds that module as a `Linear`.
    pub fn of(&self, module: &str, linear: bool) -> Option<(Scheme, Activations)> {
        if self.ignore.iter().any(|target| target.names(module) || (linear && target.is_linear_class())) {
            return None;
        }
        let mut targets: Vec<_> =
            self.groups.iter().flat_map(|g| g.targets.iter().map(move |t| (t, g))).collect();
        targets.sort_by_key(|(target, _)| (target.pattern.is_some(), &target.text));
        let by_name = targets.iter().find(|(target, _)| target.names(module));
        let by_class = || targets.iter().find(|(target, _)| linear && target.is_linear_class());
        by_name.or_else(by_class).map(|(_, group)| (group.scheme, group.activations))
    }

    /// Returns the JSON object.
    pub fn to_json(&self) -> Value {
        let format = |group: &Group| {
            Format::of(&group.scheme, group.activations).expect("checked when the group was made").name()
        };
        let top = match &self.groups[..] {
            [] => "dense",
            [group] => format(group),
            _ => "mixed-precision",
        };
        let groups: Map<_, _> = (self.groups.iter().enumerate())
            .map(|(i, group)| {
                let json = json!({
                    "targets": texts(&group.targets),
                    "weights": weights_json(&group.scheme),
                    "input_activations": activations_json(group.activations),
                    "output_activations": null,
                    "format": format(group),
                });
                (format!("group_{i}"), json)
            })
            .collect();
        json!({
            "quant_method": "compressed-tensors",
            "format": top,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": texts(&self.ignore),
            "kv_cache_scheme": if self.fp8_cache { fp8_cache_json() } else { Value::Null },
        })
    }

    /// Parses the object. Errors name the field that is not supported.
    pub fn parse(json: &Value) -> Result<Self> {
        let config: ConfigJson = serde_json::from_value(json.clone()).context("`quantization_config`")?;
        ensure!(
            config.quant_method == "compressed-tensors",
            "`quant_method` is `{}`; only `compressed-tensors` is read",
            config.quant_method
        );
        for (field, value) in
            [("sparsity_config", &config.sparsity_config), ("transform_config", &config.transform_config)]
        {
            ensure!(is_empty(value), "`{field}` is not supported: evaluation would differ from the engine's");
        }
        let fp8_cache = is_fp8_cache(&config.kv_cache_scheme)?;
        let groups = (config.config_groups.iter())
            .map(|(name, json)| {
                parse_group(json, &config.format).with_context(|| format!("`config_groups.{name}`"))
            })
            .collect::<Result<_>>()?;
        let ignore = config.ignore.unwrap_or_default().into_iter().map(Target::parse).collect::<Result<_>>();
        Ok(Quantization { groups, ignore: ignore.context("`ignore`")?, fp8_cache })
    }
}

/// `kv_cache_scheme` as vLLM, SGLang and transformers read it: static E4M3 with one scale a layer.
fn fp8_cache_json() -> Value {
    json!({"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": true, "dynamic": false})
}

/// Errors on caches that evaluation could not reproduce.
fn is_fp8_cache(scheme: &Value) -> Result<bool> {
    if is_empty(scheme) {
        return Ok(false);
    }
    let Value::Object(wanted) = fp8_cache_json() else { return Ok(false) };
    for (field, value) in &wanted {
        ensure!(
            scheme.get(field) == Some(value),
            "`kv_cache_scheme` is not supported with {field} {}; wanted {value}: evaluation would differ from the engine's",
            scheme.get(field).unwrap_or(&Value::Null)
        );
    }
    Ok(true)
}

impl Target {
    fn exact(text: &str) -> Self {
        Target { text: text.to_string(), pattern: None }
    }

    fn parse(text: String) -> Result<Self> {
        let pattern = match text.strip_prefix("re:") {
            None => None,
            Some(pattern) => {
                let anchored = Regex::new(&format!("^(?:{pattern})"));
                Some(anchored.with_context(|| format!("`{text}` is no pattern that can be matched here"))?)
            }
        };
        Ok(Target { text, pattern })
    }

    fn names(&self, module: &str) -> bool {
        match &self.pattern {
            Some(pattern) => pattern.is_match(module),
            None => self.text == module,
        }
    }

    fn is_linear_class(&self) -> bool {
        self.text == "Linear"
    }
}

fn texts(targets: &[Target]) -> Vec<&str> {
    targets.iter().map(|target| target.text.as_str()).collect()
}

fn weights_json(scheme: &Scheme) -> Value {
    let mut json = json!({
        "num_bits": scheme.element.bits(),
        "type": if matches!(scheme.element, Element::E2M1 | Element::E4M3) { "float" } else { "int" },
        "symmetric": true,
        "strategy": "channel",
        "dynamic": false,
    });
    if let Span::Cols(group_size) = scheme.group {
        json["strategy"] = json!("group");
        json["group_size"] = json!(group_size);
    }
    if *scheme == NVFP4 {
        json["strategy"] = json!("tensor_group");
    }
    // Engines allocate the scale tensor with this type; without it they expect floats.
    let stored = match scheme.scale {
        Codec::E8M0 => Some("torch.uint8"),
        Codec::E4M3 => Some("torch.float8_e4m3fn"),
        _ => None,
    };
    if let Some(stored) = stored {
        json["scale_dtype"] = json!(stored);
        json["zp_dtype"] = json!(stored);
    }
    json
}

fn activations_json(activations: Activations) -> Value {
    let (kind, strategy) = match activations {
        Activations::Full => return Value::Null,
        Activations::Int8PerToken => ("int", "token"),
        Activations::Fp8PerToken => ("float", "token"),
        Activations::Int8PerTensor(()) => ("int", "tensor"),
    };
    let dynamic = strategy == "token";
    json!({"num_bits": 8, "type": kind, "symmetric": true, "strategy": strategy, "dynamic": dynamic})
}

#[cfg(test)]
#[cfg(test)]
mod tests;
