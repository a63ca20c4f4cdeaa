//! Keys of a `config.json`, one by one: absent or null, of the wanted kind, or refused by name.

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// Returns a number with the digits that an F32 needs; as an F64 it would print its rounding.
pub(in crate::model) fn decimal(x: f32) -> Value {
    x.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}

pub(in crate::model) fn required(json: &Value, name: &str) -> Result<usize> {
    size(json, name)?.with_context(|| format!("`{name}` is missing"))
}

/// Returns a size, or `None` where the field is absent or null.
pub(in crate::model) fn size(json: &Value, name: &str) -> Result<Option<usize>> {
    match json.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64() {
            Some(value) => Ok(Some(value as usize)),
            None => bail!("`{name}` is `{value}`; wanted a whole number"),
        },
    }
}

pub(in crate::model) fn number(json: &Value, name: &str) -> Result<Option<f32>> {
    match json.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(value) => Ok(Some(value as f32)),
            None => bail!("`{name}` is `{value}`; wanted a number"),
        },
    }
}

pub(in crate::model) fn flag(json: &Value, name: &str) -> Result<bool> {
    flag_or(json, name, false)
}

/// Returns a flag, or `default` where the field is absent or null.
pub(in crate::model) fn flag_or(json: &Value, name: &str, default: bool) -> Result<bool> {
    match json.get(name) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(value)) => Ok(*value),
        Some(value) => bail!("`{name}` is `{value}`; wanted `true` or `false`"),
    }
}

/// Returns the ids of a field that may be a number, a list of numbers, or null.
pub(in crate::model) fn token_ids(json: &Value, name: &str) -> Result<Vec<u32>> {
    let id = |value: &Value| match value.as_u64().and_then(|id| u32::try_from(id).ok()) {
        Some(id) => Ok(id),
        None => bail!("`{name}` is `{value}`; wanted token ids"),
    };
    let given = match json.get(name) {
        None | Some(Value::Null) => &[][..],
        Some(Value::Array(ids)) => ids,
        Some(value) => std::slice::from_ref(value),
    };
    // -1 is none, as the original LLaMA conversions and their fine-tunes have it.
    given.iter().filter(|value| value.as_i64() != Some(-1)).map(id).collect()
}
