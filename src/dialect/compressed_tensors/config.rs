//! `quantization_config` of `config.json`: which modules are quantized, and how.
//!
//! Written with the fields that compressed-tensors 0.17 knows and no others: it forbids unknown ones inside a group, and
//! vLLM 0.30 and 0.32 pin that version. Parsed with the library's own rules (`QuantizationConfig`, `match_targets`);
//! what evaluation could not reproduce is refused by name.

use anyhow::{Context, Result, bail, ensure};
use regex::Regex;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Format;
use crate::num::{Codec, Element};
use crate::scheme::schemes::{FP8, INT8, MXFP4, NVFP4, int4_grouped, int8_grouped};
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

/// Adds `quantization_config` to the source's `config.json`, everything else as it was, in its order.
///
/// Errors if the source has one already: its tensors are not what it would then say.
pub fn add_to_config(source: &str, quantization: &Quantization) -> Result<String> {
    let mut config: Map<String, Value> = serde_json::from_str(source).context("`config.json`")?;
    ensure!(!config.contains_key("quantization_config"), "`config.json` already has a `quantization_config`");
    config.insert("quantization_config".into(), quantization.to_json());
    Ok(serde_json::to_string_pretty(&config)? + "\n")
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

/// The top level; the library ignores fields it does not know here.
#[derive(Deserialize)]
struct ConfigJson {
    quant_method: String,
    format: String,
    config_groups: Map<String, Value>,
    ignore: Option<Vec<String>>,
    #[serde(default)]
    kv_cache_scheme: Value,
    #[serde(default)]
    sparsity_config: Value,
    #[serde(default)]
    transform_config: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GroupJson {
    targets: Vec<String>,
    weights: Option<ArgsJson>,
    #[serde(default)]
    input_activations: Option<ArgsJson>,
    #[serde(default)]
    output_activations: Value,
    format: Option<String>,
}

/// The library's `QuantizationArgs`; absent fields have its defaults.
#[derive(Deserialize, Debug)]
#[serde(deny_unknown_fields)]
struct ArgsJson {
    #[serde(default = "eight")]
    num_bits: u32,
    #[serde(default = "int", rename = "type")]
    kind: String,
    #[serde(default = "yes")]
    symmetric: bool,
    strategy: Option<String>,
    group_size: Option<i64>,
    #[serde(default)]
    dynamic: Value,
    #[serde(default)]
    actorder: Value,
    #[serde(default)]
    block_structure: Value,
    /// Of the tensors themselves; their headers say the same and are checked.
    #[serde(rename = "scale_dtype", default)]
    _scale_dtype: Value,
    #[serde(rename = "zp_dtype", default)]
    _zp_dtype: Value,
    /// How the scales were once found: no matter to a reader.
    #[serde(rename = "observer", default)]
    _observer: Value,
    #[serde(rename = "observer_kwargs", default)]
    _observer_kwargs: Value,
}

fn eight() -> u32 {
    8
}

fn int() -> String {
    "int".into()
}

fn yes() -> bool {
    true
}

fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_object().is_some_and(Map::is_empty)
}

fn parse_group(json: &Value, top_format: &str) -> Result<Group> {
    ensure!(json.is_object(), "named presets are not supported; write the scheme out");
    let group: GroupJson = serde_json::from_value(json.clone())?;
    ensure!(is_empty(&group.output_activations), "`output_activations` are not supported");
    let scheme = group.weights.context("`weights` is missing")?.scheme()?;
    let activations = match group.input_activations {
        None => Activations::Full,
        Some(args) => args.activations()?,
    };
    let wanted = Format::of(&scheme, activations)?.name();
    let found = group.format.as_deref().unwrap_or(top_format);
    ensure!(found == wanted, "`format` is `{found}`, but such a group is stored as `{wanted}`");
    let targets = group.targets.into_iter().map(Target::parse).collect::<Result<_>>()?;
    Ok(Group { targets, scheme, activations })
}

impl ArgsJson {
    fn scheme(&self) -> Result<Scheme> {
        ensure!(self.symmetric, "asymmetric weights are not supported");
        ensure!(is_static(&self.dynamic), "`weights.dynamic` is {}, wanted `false`", self.dynamic);
        ensure!(is_empty(&self.block_structure), "`block_structure` is not supported");
        ensure!(
            // Other orders change how codes were chosen, not where they are stored.
            !matches!(&self.actorder, Value::Bool(true)) && self.actorder.as_str() != Some("group"),
            "`actorder` `group` (`weight_g_idx`) is not supported"
        );
        let group_size = u32::try_from(self.group_size.unwrap_or(-1)).ok();
        match (self.kind.as_str(), self.num_bits, self.strategy(), group_size) {
            ("float", 4, "group", Some(32)) => Ok(MXFP4),
            ("float", 4, "tensor_group", Some(16)) => Ok(NVFP4),
            ("float", 8, "channel", None) => Ok(FP8),
            ("int", 4, "group", Some(size @ (32 | 64 | 128))) => Ok(int4_grouped(size)),
            ("int", 8, "channel", None) => Ok(INT8),
            ("int", 8, "group", Some(size)) if size > 0 => Ok(int8_grouped(size)),
            (kind, bits, strategy, _) => bail!(
                "{bits}-bit `{kind}` weights with strategy `{strategy}` and group size {:?} are not supported; 4-bit \
                 float in groups of 32 (MXFP4) or 16 (NVFP4), 8-bit float per channel, 8-bit int per channel or group and \
                 4-bit int in groups of 32, 64 or 128 are",
                self.group_size
            ),
        }
    }

    fn activations(&self) -> Result<Activations> {
        ensure!(
            self.symmetric,
            "`input_activations`: asymmetric inputs (`input_zero_point`) are not supported; quantize the original model \
             with `symmetric` true"
        );
        let dynamic = self.dynamic == Value::Bool(true);
        match (self.kind.as_str(), self.num_bits, self.strategy()) {
            ("int", 8, "token") if dynamic => Ok(Activations::Int8PerToken),
            ("float", 8, "token") if dynamic => Ok(Activations::Fp8PerToken),
            ("int", 8, "tensor") if is_static(&self.dynamic) => Ok(Activations::Int8PerTensor(())),
            (kind, bits, strategy) => bail!(
                "`input_activations`: {bits}-bit `{kind}`, strategy `{strategy}`, dynamic {} is not supported; 8 bits with \
                 strategy `token` and dynamic true are, and 8-bit `int` with strategy `tensor` and dynamic false",
                self.dynamic
            ),
        }
    }

    /// Absent, it follows from the group size.
    fn strategy(&self) -> &str {
        match (&self.strategy, self.group_size) {
            (Some(strategy), _) => strategy,
            (None, None) => "tensor",
            (None, Some(-1)) => "channel",
            (None, Some(_)) => "group",
        }
    }
}

fn is_static(dynamic: &Value) -> bool {
    dynamic.is_null() || *dynamic == Value::Bool(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UP: &str = "model.layers.0.mlp.up_proj";
    const DOWN: &str = "model.layers.0.mlp.down_proj";

    fn plan(rows: &[(&str, Option<(Scheme, Activations)>)]) -> Quantization {
        let rows: Vec<_> = rows.iter().map(|(module, stored)| (module.to_string(), *stored)).collect();
        Quantization::of_plan(&rows).unwrap()
    }

    fn error_of(edit: impl Fn(&mut Value)) -> String {
        let mut json = plan(&[(UP, Some((MXFP4, Activations::Full)))]).to_json();
        edit(&mut json);
        format!("{:#}", Quantization::parse(&json).unwrap_err())
    }

    #[test]
    fn what_is_written_parses_to_the_same_modules() {
        let w8a8 = Some((INT8, Activations::Int8PerToken));
        let grouped = Some((int8_grouped(128), Activations::Full));
        let mxfp4 = Some((MXFP4, Activations::Full));
        let nvfp4 = Some((NVFP4, Activations::Full));
        let w8a8_static = Some((INT8, Activations::Int8PerTensor(())));
        let fp8 = Some((FP8, Activations::Fp8PerToken));
        let int4 = Some((int4_grouped(64), Activations::Full));
        for (up, down) in [
            (nvfp4, fp8),
            (int4, int4),
            (mxfp4, mxfp4),
            (w8a8, None),
            (w8a8_static, w8a8),
            (grouped, mxfp4),
            (None, w8a8),
            (None, None),
        ] {
            let rows = [(UP, up), (DOWN, down), ("lm_head", None)];
            let parsed = Quantization::parse(&plan(&rows).to_json()).unwrap();
            for (module, stored) in rows {
                assert_eq!(parsed.of(module, true), stored, "{module}");
            }
            for kept in ["model.embed_tokens", "model.norm", "model.layers.0.input_layernorm"] {
                assert_eq!(parsed.of(kept, false), None);
            }
        }
    }

    #[test]
    fn one_scheme_targets_linear_and_ignores_what_is_kept() {
        let json = plan(&[(UP, Some((MXFP4, Activations::Full))), (DOWN, None), ("lm_head", None)]).to_json();
        assert_eq!(json["format"], "mxfp4-pack-quantized");
        assert_eq!(json["config_groups"]["group_0"]["targets"], json!(["Linear"]));
        assert_eq!(json["ignore"], json!(["lm_head", DOWN]));
    }

    #[test]
    fn exact_paths_win_over_patterns_and_patterns_over_classes() {
        let mut json =
            plan(&[(UP, Some((MXFP4, Activations::Full))), (DOWN, Some((INT8, Activations::Full)))])
                .to_json();
        json["config_groups"]["group_0"]["targets"] = json!(["Linear", r"re:.*\.up_proj"]);
        json["config_groups"]["group_1"]["targets"] = json!([UP, r"re:layers\.0"]);
        json["ignore"] = json!(["lm_head", r"re:.*layers\.2\."]);
        let parsed = Quantization::parse(&json).unwrap();
        let linear = |module: &str| module != "model.embed_tokens";
        let name = |module| parsed.of(module, linear(module)).map(|(scheme, _)| scheme.name);
        assert_eq!(name(UP), Some("int8"));
        assert_eq!(name("model.layers.1.mlp.up_proj"), Some("mxfp4"));
        // `re:layers` does not match from the start of the path.
        assert_eq!(name(DOWN), Some("mxfp4"));
        assert_eq!(name("model.layers.2.mlp.up_proj"), None);
        assert_eq!(name("lm_head"), None);
        assert_eq!(name("model.embed_tokens"), None);
    }

    #[test]
    fn absent_fields_have_the_librarys_defaults() {
        let json = json!({
            "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": null, "version": "0.17.0",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"group_size": 64}}},
        });
        assert_eq!(
            Quantization::parse(&json).unwrap().of(UP, true),
            Some((int8_grouped(64), Activations::Full))
        );
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        let group =
            |json: &mut Value, field: &str, value: Value| json["config_groups"]["group_0"][field] = value;
        for (field, value, wanted) in [
            ("kv_cache_scheme", json!({"num_bits": 8}), "`kv_cache_scheme`"),
            ("transform_config", json!({"config_groups": {}}), "`transform_config`"),
            ("quant_method", json!("gptq"), "`gptq`"),
            ("config_groups", json!({"MXFP4A16": ["Linear"]}), "`config_groups.MXFP4A16`: named presets"),
            ("ignore", json!(["re:(?=x)"]), "`ignore`: `re:(?=x)`"),
        ] {
            let error = error_of(|json| json[field] = value.clone());
            assert!(error.contains(wanted), "{error}");
        }
        for (field, value, wanted) in [
            ("format", json!("int-quantized"), "stored as `mxfp4-pack-quantized`"),
            ("output_activations", json!({"num_bits": 8}), "`output_activations`"),
            ("surprise", json!(1), "unknown field `surprise`"),
            ("weights", json!({"num_bits": 3}), "3-bit `int`"),
            ("weights", json!({"group_size": 128, "symmetric": false}), "asymmetric"),
            ("weights", json!({"group_size": 128, "actorder": "group"}), "`actorder`"),
            ("weights", json!({"group_size": 128, "rotation": 1}), "unknown field `rotation`"),
            (
                "input_activations",
                json!({"num_bits": 8, "type": "float"}),
                "`input_activations`: 8-bit `float`",
            ),
            (
                "input_activations",
                json!({"num_bits": 8, "strategy": "tensor", "dynamic": true}),
                "dynamic true is not supported",
            ),
            (
                "input_activations",
                json!({"num_bits": 8, "strategy": "tensor", "symmetric": false}),
                "asymmetric inputs (`input_zero_point`)",
            ),
        ] {
            let error = error_of(|json| group(json, field, value.clone()));
            assert!(error.starts_with("`config_groups.group_0`") && error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn config_json_keeps_its_keys_and_their_order() {
        let quantization = plan(&[(UP, Some((MXFP4, Activations::Full)))]);
        let source = r#"{"model_type": "llama", "torch_dtype": "bfloat16", "rms_norm_eps": 1e-06, "a": [1]}"#;
        let written: Map<String, Value> =
            serde_json::from_str(&add_to_config(source, &quantization).unwrap()).unwrap();
        let keys: Vec<_> = written.keys().map(String::as_str).collect();
        assert_eq!(keys, ["model_type", "torch_dtype", "rms_norm_eps", "a", "quantization_config"]);
        assert_eq!(written["rms_norm_eps"], 1e-6);
        let again = add_to_config(&serde_json::to_string(&written).unwrap(), &quantization);
        assert!(again.unwrap_err().to_string().contains("already has"));
    }
}
