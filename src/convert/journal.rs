//! What a calibrated conversion has finished, so that an interrupted one goes on where it stopped.
//!
//! While an output NAME is made, `.NAME.partial-KEY` holds its bytes and `.NAME.partial-KEY.journal` says which of them are
//! final: one JSON line for the key, one for each trial of settings, one for each finished layer with the BLAKE3 hash of
//! every tensor's bytes, one for the finished output, which the journal outlives until it is measured too. KEY is a hash of everything the bytes depend on ([`key`]), so a run of another kind never meets
//! these files, and bytes that do not match their hash are made again.

use std::cell::Cell;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::calib::choose::Trial;
use crate::container::leftovers::{JOURNAL, KEY_CHARACTERS};
use crate::container::output::{partial_path, remove};
use crate::method::solve::Outcome;

/// One line.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Entry {
    /// The first: 64 hexadecimal digits.
    Key(String),
    Trial(Trial),
    Layer(FinishedLayer),
    Output(FinishedOutput),
}

/// An output that has its final name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FinishedOutput {
    /// Hash of its bytes.
    pub hash: String,
    /// What rounding cost each tensor, in the order of the plan.
    pub outcomes: Vec<Outcome>,
    /// What the manifest says of the settings.
    pub settings: Value,
}

/// A finished layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FinishedLayer {
    /// Its number; layers are finished in order.
    pub layer: usize,
    /// What was written of it, in order.
    pub tensors: Vec<FinishedTensor>,
}

/// A finished tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FinishedTensor {
    /// Hugging Face name.
    pub name: String,
    /// BLAKE3 of its stored parts, one after another.
    pub hash: String,
    /// How it came out; `None` for a rewritten vector.
    pub outcome: Option<Outcome>,
}

/// The journal of one output.
pub struct Journal {
    path: PathBuf,
    /// The output's bytes so far.
    partial: PathBuf,
    file: File,
    contents: Contents,
    /// Whether anything is worth keeping.
    written: Cell<bool>,
}

/// Returns the name and the key of a run whose result depends on what `identify` adds to the hash, on this program, and on
/// nothing else.
///
/// # Errors
/// If the program cannot read itself.
pub fn key(identify: impl FnOnce(&mut blake3::Hasher) -> Result<()>) -> Result<String> {
    let mut hash = blake3::Hasher::new();
    hash.update(b"quant journal 1\n").update(env!("CARGO_PKG_VERSION").as_bytes());
    // Two builds of one version may choose different codes.
    let own = std::env::current_exe().and_then(File::open).context("the program cannot read its own file")?;
    hash.update_reader(own).context("the program cannot read its own file")?;
    identify(&mut hash)?;
    Ok(hash.finalize().to_hex().to_string())
}

/// Returns the part of a key that is in file names.
pub fn short(key: &str) -> &str {
    &key[..KEY_CHARACTERS]
}

/// What the lines of a journal say.
#[derive(Default)]
struct Contents {
    /// Whether it is that of the key it was read for.
    ours: bool,
    trials: Vec<Trial>,
    layers: Vec<FinishedLayer>,
    output: Option<FinishedOutput>,
}

impl Contents {
    /// Reads lines under that key; returns also how many bytes of them are valid. A run that was killed may have left half
    /// a line.
    fn parse(text: &[u8], key: &str) -> (Self, usize) {
        let (mut contents, mut valid) = (Contents::default(), 0);
        for line in text.split_inclusive(|&byte| byte == b'\n').filter(|line| line.ends_with(b"\n")) {
            match serde_json::from_slice(line) {
                Ok(Entry::Key(found)) if valid == 0 && found == key => contents.ours = true,
                Ok(Entry::Trial(trial)) if contents.ours => contents.trials.push(trial),
                Ok(Entry::Layer(layer)) if contents.ours && layer.layer == contents.layers.len() => {
                    contents.layers.push(layer);
                }
                Ok(Entry::Output(output)) if contents.ours => contents.output = Some(output),
                _ => break,
            }
            valid += line.len();
        }
        (contents, valid)
    }
}

/// Returns what an earlier run with that key says of the output, if it finished it.
///
/// # Errors
/// If there is a journal that cannot be read.
pub fn finished(target: &Path, key: &str) -> Result<Option<FinishedOutput>> {
    let path = journal_path(target, key)?;
    match fs::read(&path) {
        Ok(text) => Ok(Contents::parse(&text, key).0.output),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("{}: cannot be read", path.display())),
    }
}

fn journal_path(target: &Path, key: &str) -> Result<PathBuf> {
    partial_path(target, &format!("{}{JOURNAL}", short(key)))
}

impl Journal {
    /// Opens the journal of the output `target` under that key, or begins it. The caller holds the unfinished output.
    ///
    /// # Errors
    /// If it cannot be read or written.
    pub fn open(target: &Path, key: &str) -> Result<Self> {
        let partial = partial_path(target, short(key))?;
        let path = journal_path(target, key)?;
        let failed = || format!("{}: the journal cannot be used; delete it", path.display());
        let mut file =
            OpenOptions::new().read(true).append(true).create(true).open(&path).with_context(failed)?;
        let mut text = Vec::new();
        file.read_to_end(&mut text).with_context(failed)?;
        let (contents, valid) = Contents::parse(&text, key);
        file.set_len(valid as u64).with_context(failed)?;
        let written = Cell::new(!contents.trials.is_empty() || !contents.layers.is_empty());
        let begun = contents.ours;
        let journal = Journal { path, partial, file, contents, written };
        if !begun {
            journal.append(&Entry::Key(key.to_string()))?;
        }
        Ok(journal)
    }

    /// Returns the trials that an earlier run has measured.
    pub fn trials(&self) -> &[Trial] {
        &self.contents.trials
    }

    /// Returns the layers that an earlier run has finished, from the first on.
    pub fn layers(&self) -> &[FinishedLayer] {
        &self.contents.layers
    }

    /// Notes a trial.
    pub fn add_trial(&self, trial: &Trial) -> Result<()> {
        self.append(&Entry::Trial(trial.clone()))?;
        self.written.set(true);
        Ok(())
    }

    /// Notes a layer whose bytes are all written.
    pub fn add_layer(&self, layer: FinishedLayer) -> Result<()> {
        self.append(&Entry::Layer(layer))?;
        self.written.set(true);
        Ok(())
    }

    /// Notes an output that has its final name.
    pub fn add_output(&self, output: FinishedOutput) -> Result<()> {
        self.append(&Entry::Output(output))
    }

    /// Whether the next run with this key finds something to go on from.
    pub fn is_worth_keeping(&self) -> bool {
        self.written.get()
    }

    /// Deletes the journal of an output that has its final name and all that belongs to it.
    pub fn finish(self) -> Result<()> {
        ensure!(!self.partial.exists(), "{}: the output is not finished", self.partial.display());
        self.written.set(true);
        remove(&self.path)
    }

    fn append(&self, entry: &Entry) -> Result<()> {
        let mut line = serde_json::to_vec(entry)?;
        line.push(b'\n');
        (&self.file).write_all(&line).with_context(|| format!("{}: cannot be written", self.path.display()))
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        if !self.written.get() {
            // Nothing can be reported from here, and a leftover has a name that says what it is.
            let _ = remove(&self.path).and_then(|()| remove(&self.partial));
        }
    }
}
