//! The keys of a GGUF file that begin alike: those of its architecture, or some of those.

use anyhow::{Context, Result, ensure};

use crate::container::gguf::Metadata;

/// Keys with one prefix (`llama.`, `llama.rope.`), by what follows it.
pub struct Keys<'a> {
    metadata: &'a Metadata,
    prefix: String,
}

impl<'a> Keys<'a> {
    /// Returns the keys that begin with `prefix`.
    pub fn new(metadata: &'a Metadata, prefix: String) -> Self {
        Keys { metadata, prefix }
    }

    /// Returns a key's whole name.
    pub fn name(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// Returns a float, `None` without the key; an error if it is of another kind, here and below.
    pub fn float(&self, key: &str) -> Result<Option<f32>> {
        let name = self.name(key);
        self.metadata.get(&name).map(|_| self.metadata.float(&name)).transpose()
    }

    /// Returns a size.
    pub fn size(&self, key: &str) -> Result<Option<usize>> {
        let name = self.name(key);
        self.metadata.get(&name).map(|_| self.metadata.size(&name)).transpose()
    }

    /// Returns a size that must be there.
    pub fn required(&self, key: &str) -> Result<usize> {
        self.size(key)?.with_context(|| format!("GGUF key `{}` is missing, wanted a size", self.name(key)))
    }

    /// Returns a text.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>> {
        let name = self.name(key);
        self.metadata.get(&name).map(|_| self.metadata.str(&name)).transpose()
    }

    /// Refuses keys of `neutral` that say something else than the value given there, with which they change nothing.
    ///
    /// # Errors
    /// Names the key.
    pub fn refuse_others(&self, neutral: &[(&str, f64)]) -> Result<()> {
        for &(key, neutral) in neutral {
            let name = self.name(key);
            let Some(value) = self.metadata.get(&name) else { continue };
            let number =
                value.as_f64().or(value.as_u64().map(|x| x as f64)).or(value.as_bool().map(f64::from));
            ensure!(
                number == Some(neutral),
                "GGUF key `{name}` is {value:?}, which no forward pass here honours"
            );
        }
        Ok(())
    }

    /// Refuses every key that is in neither of these lists: those that are read, and those that change nothing.
    ///
    /// # Errors
    /// Names the key.
    pub fn refuse_unknown(&self, read: &[&str], silent: &[&str]) -> Result<()> {
        for (name, value) in &self.metadata.0 {
            let Some(key) = name.strip_prefix(&self.prefix) else { continue };
            ensure!(
                read.contains(&key) || silent.contains(&key),
                "GGUF key `{name}` is {value:?}, which no forward pass here knows"
            );
        }
        Ok(())
    }
}
