//! What interrupted runs have left beside an output: unfinished outputs, `.NAME.partial-…`, and journals of calibrated ones.
//!
//! A run locks its own while it lives, so what is not locked has no owner.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::output::{self, parent_of};

/// Characters of a key ([`super::Opening::key`]), by which a leftover is told from that of a run without one.
pub const KEY_CHARACTERS: usize = 16;
/// Ending of the journal that lies beside an unfinished output with a key.
pub const JOURNAL: &str = ".journal";

/// A file or folder that nobody is writing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Leftover {
    /// Where it is.
    pub path: PathBuf,
    /// The key of the run that can go on with it; `None`: no run can.
    pub key: Option<String>,
}

impl Leftover {
    /// Deletes it.
    pub fn remove(&self) -> Result<()> {
        output::remove(&self.path)
    }
}

/// Returns what interrupted runs have left of the output `target`, sorted by name.
///
/// # Errors
/// If its folder cannot be listed.
pub fn of(target: &Path) -> Result<Vec<Leftover>> {
    let (folder, prefix) = (parent_of(target), output::partial_prefix(target)?);
    if !folder.is_dir() {
        return Ok(Vec::new());
    }
    let failed = || format!("{}: cannot be listed", folder.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).with_context(failed)? {
        let name = entry.with_context(failed)?.file_name().to_string_lossy().into_owned();
        let Some(suffix) = name.strip_prefix(&prefix) else { continue };
        let suffix = suffix.strip_suffix(JOURNAL).unwrap_or(suffix);
        let key = (suffix.len() == KEY_CHARACTERS).then(|| suffix.to_string());
        if !is_locked(&folder.join(format!("{prefix}{suffix}"))) {
            found.push(Leftover { path: folder.join(name), key });
        }
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(found)
}

/// Whether a living run holds a file or folder. Where locks cannot be asked for, it might.
fn is_locked(path: &Path) -> bool {
    let Ok(file) = File::open(path) else { return path.symlink_metadata().is_ok() };
    match file.try_lock() {
        Ok(()) => false,
        Err(TryLockError::WouldBlock | TryLockError::Error(_)) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::gguf::{GgufSink, Metadata};
    use crate::container::{Opening, Sink};

    #[test]
    fn only_what_no_living_run_holds_is_left_over() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("m.gguf");
        let key = "0123456789abcdef";
        let opening = Opening { force: false, key: Some(key) };
        let create = |opening| GgufSink::create(&target, opening, &Metadata::default(), &[]);
        let (own, keyed) = (create(Opening::default()).unwrap(), create(opening).unwrap());
        fs::write(dir.path().join(".m.gguf.partial-999999"), "dead").unwrap();
        fs::write(dir.path().join(".other.gguf.partial-1"), "another output's").unwrap();
        let names = |found: Vec<Leftover>| -> Vec<String> {
            found.iter().map(|l| l.path.file_name().unwrap().to_string_lossy().into_owned()).collect()
        };
        assert_eq!(names(of(&target).unwrap()), [".m.gguf.partial-999999"]);
        let refusal = create(opening).unwrap_err().to_string();
        assert!(refusal.ends_with("m.gguf: another run is writing it"), "{refusal}");
        drop((own, keyed));
        // Without a key nothing stays of a run that fails; with one, the next run goes on.
        fs::write(dir.path().join(format!(".m.gguf.partial-{key}.journal")), "").unwrap();
        let left = of(&target).unwrap();
        assert_eq!(left.iter().filter(|l| l.key.as_deref() == Some(key)).count(), 2);
        assert_eq!(left.len(), 3);
        left.iter().for_each(|l| l.remove().unwrap());
        assert_eq!(names(of(&target).unwrap()), Vec::<String>::new());
        Box::new(create(opening).unwrap()).finish().unwrap();
        assert!(target.is_file());
    }
}
