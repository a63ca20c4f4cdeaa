//! What a kernel takes, read from its source: the one place that says it. A launch with other arguments is refused.

use anyhow::{Context, Result};

/// Type of a kernel's parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parameter {
    /// An address on the device.
    Pointer,
    /// `u32`
    U32,
    /// `u64`
    U64,
    /// `float`
    F32,
    /// Any other type: a struct passed by value.
    Struct,
}

/// Returns the parameters of the entry point `name`, in order.
///
/// # Errors
/// If the source has no `extern "C" __global__` function of that name.
pub fn of(source: &str, name: &str) -> Result<Vec<Parameter>> {
    let list = parameters(source, name)
        .with_context(|| format!("the source of kernel `{name}` has no entry point of that name"))?;
    Ok(list.split(',').map(parameter).collect())
}

/// Returns what stands between the parentheses after the entry point's name.
fn parameters<'a>(source: &'a str, name: &str) -> Option<&'a str> {
    let (_, entry) = source.split_once("extern \"C\" __global__")?;
    let mut starts = entry.match_indices(name);
    let list = starts.find_map(|(at, _)| {
        let part_of_a_word = entry[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_');
        entry[at + name.len()..].strip_prefix('(').filter(|_| !part_of_a_word)
    })?;
    Some(list.split_once(')')?.0)
}

/// Returns the type of one declaration, `const float *__restrict__ x`.
fn parameter(declaration: &str) -> Parameter {
    if declaration.contains('*') {
        return Parameter::Pointer;
    }
    let qualifiers = ["const", "__grid_constant__"];
    match declaration.split_whitespace().find(|word| !qualifiers.contains(word)) {
        Some("u32") => Parameter::U32,
        Some("u64") => Parameter::U64,
        Some("float") => Parameter::F32,
        _ => Parameter::Struct,
    }
}

#[cfg(test)]
mod tests {
    use super::Parameter::{F32, Pointer, Struct, U32, U64};
    use super::*;
    use crate::backend::cuda::compile::{Kernel, names};

    #[test]
    fn every_kernel_says_what_it_takes() {
        for name in names() {
            let found = of(&Kernel::new(name, &[]).source().unwrap(), name).unwrap();
            assert!(found.contains(&Pointer), "{name}: {found:?}");
        }
        for (name, wanted) in [
            ("add", vec![Pointer, Pointer, U64]),
            ("embed", vec![Struct, Pointer, Pointer]),
            ("missing", vec![Pointer, Pointer, Pointer, F32, F32, U64]),
            ("matvec", vec![Struct, Pointer, Pointer, Pointer, U32, F32]),
        ] {
            assert_eq!(of(&Kernel::new(name, &[]).source().unwrap(), name).unwrap(), wanted, "{name}");
        }
        assert!(of("__global__ void add(u32 x)", "add").is_err());
    }
}
