//! The entries of `quantization_config` as the library defines them, and what they mean.

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::super::Format;
use super::{Group, Target};
use crate::scheme::schemes::{FP8, INT8, MXFP4, NVFP4, int4_grouped, int8_grouped};
use crate::scheme::{Activations, Scheme};

/// The top level; the library ignores fields it does not know here.
#[derive(Deserialize)]
pub(super) struct ConfigJson {
    pub(super) quant_method: String,
    pub(super) format: String,
    pub(super) config_groups: Map<String, Value>,
    pub(super) ignore: Option<Vec<String>>,
    #[serde(default)]
    pub(super) kv_cache_scheme: Value,
    #[serde(default)]
    pub(super) sparsity_config: Value,
    #[serde(default)]
    pub(super) transform_config: Value,
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

pub(super) fn is_empty(value: &Value) -> bool {
    value.is_null() || value.as_object().is_some_and(Map::is_empty)
}

/// Parses an entry of `config_groups`; `top_format` is the format of all groups that name none.
pub(super) fn parse_group(json: &Value, top_format: &str) -> Result<Group> {
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
