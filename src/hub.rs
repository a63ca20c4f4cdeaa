//! Hugging Face hub ids → a local folder.

use std::path::PathBuf;

use anyhow::{Result, bail};

use crate::output::Printer;

/// Returns the local path of a model.
pub fn resolve(model: &str, _revision: Option<&str>, _printer: Printer) -> Result<PathBuf> {
    let path = PathBuf::from(model);
    if !path.exists() {
        bail!("`{model}`: there is no such file or folder")
    }
    Ok(path)
}
