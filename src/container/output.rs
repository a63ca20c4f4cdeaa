//! Writing: a temporary sibling of the output that takes the final name only when complete.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result, bail, ensure};
use tempfile::NamedTempFile;

use super::TensorSpec;
use super::flush::Flusher;

/// How an output is created.
#[derive(Clone, Copy, Debug, Default)]
pub struct Opening<'a> {
    /// Whether an existing output is replaced.
    pub force: bool,
    /// With a key, what an interrupted run with that key has written is still there, and a run that fails leaves its own.
    pub key: Option<&'a str>,
}

/// An output in the making: `.NAME.partial-PID` beside its final place, removed on drop unless published; with a key
/// `.NAME.partial-KEY`, which stays. Locked while its process lives.
#[derive(Debug)]
pub(super) struct Draft {
    target: PathBuf,
    temporary: PathBuf,
    force: bool,
    /// Whether it stays where it is when it is not published.
    stays: bool,
    published: bool,
    /// Held, not read.
    _lock: Option<File>,
}

impl Draft {
    /// Creates a file of `len` bytes that starts with `header`; what else a kept one holds is left. An existing output is
    /// an error unless it is to be replaced; so are a parent that cannot be written and too little space.
    pub(super) fn file(target: &Path, opening: Opening, header: &[u8], len: u64) -> Result<(Self, File)> {
        check_file(target, opening.force)?;
        let mut draft = Self::prepare(target, opening, len)?;
        let file = create_file(&draft.temporary, target, header, len)?;
        draft.lock()?;
        Ok((draft, file))
    }

    /// Prepares a folder, as [`Draft::file`]; `force` replaces only a folder that is empty or holds a model.
    pub(super) fn folder(target: &Path, opening: Opening, bytes: u64) -> Result<Self> {
        check_folder(target, opening.force)?;
        let mut draft = Self::prepare(target, opening, bytes)?;
        fs::create_dir_all(&draft.temporary).with_context(|| cannot_create(target))?;
        draft.lock()?;
        Ok(draft)
    }

    fn prepare(target: &Path, opening: Opening, bytes: u64) -> Result<Self> {
        let Opening { force, key } = opening;
        let parent = parent_of(target);
        fs::create_dir_all(parent)
            .with_context(|| format!("{}: cannot create the folder for the output", parent.display()))?;
        let temporary = match key {
            Some(key) => partial_path(target, key)?,
            None => partial_path(target, &std::process::id().to_string())?,
        };
        if key.is_none() {
            // A crashed run of the same process id left it; nobody else has the name.
            remove(&temporary)?;
        }
        ensure_space(parent, bytes.saturating_sub(allocated(&temporary)?))?;
        let (target, stays) = (target.to_path_buf(), key.is_some());
        Ok(Draft { target, temporary, force, stays, published: false, _lock: None })
    }

    /// Tells other processes that this one is alive, where the file system knows locks.
    fn lock(&mut self) -> Result<()> {
        let Ok(file) = File::open(&self.temporary) else { return Ok(()) };
        if let Err(TryLockError::WouldBlock) = file.try_lock() {
            // It is the other's.
            self.stays = true;
            bail!("{}: another run is writing it", self.target.display());
        }
        self._lock = Some(file);
        Ok(())
    }

    /// Returns the temporary path: the file itself, or the folder that takes the files.
    pub(super) fn path(&self) -> &Path {
        &self.temporary
    }

    /// Returns the final path.
    pub(super) fn target(&self) -> &Path {
        &self.target
    }

    /// Gives the output its final name. What stood there goes only after the new one is in place.
    pub(super) fn publish(mut self) -> Result<()> {
        let failed = || format!("{}: cannot give the finished output its name", self.target.display());
        if !self.force && self.target.symlink_metadata().is_ok() {
            bail!(
                "{}: appeared while the output was written; pass `--force` to replace it",
                self.target.display()
            );
        }
        if self.target.is_dir() {
            let old = self.temporary.with_extension("replaced");
            fs::rename(&self.target, &old).with_context(failed)?;
            if let Err(error) = fs::rename(&self.temporary, &self.target) {
                fs::rename(&old, &self.target).with_context(failed)?;
                return Err(error).with_context(failed);
            }
            self.published = true;
            remove(&old)?;
        } else {
            fs::rename(&self.temporary, &self.target).with_context(failed)?;
            self.published = true;
        }
        // The rename itself is durable once the parent folder is.
        sync_folder(parent_of(&self.target))
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.published && !self.stays {
            // Nothing can be reported from here, and a leftover has a name that says what it is.
            let _ = remove(&self.temporary);
        }
    }
}

/// Refuses a file that cannot be written there, before any work is done for it.
pub(crate) fn check_file(target: &Path, force: bool) -> Result<()> {
    if target.is_dir() {
        bail!("{}: found a folder, wanted to write a file; choose another name", target.display());
    }
    check_absent(target, force)
}

/// Refuses a folder that cannot be written there; `force` replaces only one that is empty or holds a model.
pub(crate) fn check_folder(target: &Path, force: bool) -> Result<()> {
    if target.exists() && !target.is_dir() {
        bail!("{}: found a file, wanted to write a folder; choose another name", target.display());
    }
    if target.is_dir() && !replaceable(target)? {
        bail!(
            "{}: holds no model (`quant.json`, or `config.json` with weights), so it is not replaced; choose another \
             name",
            target.display()
        );
    }
    check_absent(target, force)
}

fn check_absent(target: &Path, force: bool) -> Result<()> {
    ensure!(
        force || target.symlink_metadata().is_err(),
        "{}: exists already; pass `--force` to replace it, or choose another name",
        target.display()
    );
    Ok(())
}

/// Where the bytes of a planned tensor go.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    /// Index of the file.
    pub(super) file: usize,
    /// First byte.
    pub(super) start: u64,
}

/// The tensors of an output: positioned writes that stay within each tensor, and a count of what is still missing.
#[derive(Debug)]
pub(super) struct Payload {
    files: Vec<(PathBuf, Arc<File>)>,
    tensors: Vec<(TensorSpec, Slot, AtomicU64)>,
    flusher: Flusher,
}

impl Payload {
    /// Returns a payload over open files (each with its final path, for messages).
    pub(super) fn new(files: Vec<(PathBuf, File)>, tensors: Vec<(TensorSpec, Slot)>) -> Self {
        let tensors = tensors.into_iter().map(|(spec, slot)| (spec, slot, AtomicU64::new(0))).collect();
        let files: Vec<_> = files.into_iter().map(|(path, file)| (path, Arc::new(file))).collect();
        let flusher = Flusher::new(files.iter().map(|(_, file)| file.clone()).collect());
        Payload { files, tensors, flusher }
    }

    /// See [`super::Sink::write`].
    pub(super) fn write(&self, tensor: usize, offset: u64, bytes: &[u8]) -> Result<()> {
        let (spec, slot, written) = &self.tensors[tensor];
        let (path, file) = &self.files[slot.file];
        let len = bytes.len() as u64;
        ensure!(
            offset.checked_add(len).is_some_and(|end| end <= spec.bytes()),
            "{}: `{}`: {len} bytes at {offset} do not fit its {} bytes",
            path.display(),
            spec.name,
            spec.bytes()
        );
        file.write_all_at(bytes, slot.start + offset)
            .with_context(|| format!("{}: cannot write `{}`", path.display(), spec.name))?;
        written.fetch_add(len, Ordering::Relaxed);
        self.flusher.wrote(slot.file, len);
        Ok(())
    }

    /// Returns the planned tensors.
    pub(super) fn specs(&self) -> impl Iterator<Item = &TensorSpec> {
        self.tensors.iter().map(|(spec, _, _)| spec)
    }

    /// Writes the first bytes of a file anew.
    pub(super) fn restate(&self, file: usize, header: &[u8]) -> Result<()> {
        let (path, file) = &self.files[file];
        file.write_all_at(header, 0).with_context(|| format!("{}: cannot write the header", path.display()))
    }

    /// See [`super::Sink::replace`].
    pub(super) fn replace(&self, tensor: usize, bytes: &[u8]) -> Result<()> {
        self.tensors[tensor].2.store(0, Ordering::Relaxed);
        self.write(tensor, 0, bytes)
    }

    /// See [`super::Sink::read`].
    pub(super) fn read(&self, tensor: usize) -> Result<Vec<u8>> {
        let (spec, slot, _) = &self.tensors[tensor];
        let (path, file) = &self.files[slot.file];
        let mut bytes = vec![0; spec.bytes() as usize];
        file.read_exact_at(&mut bytes, slot.start)
            .with_context(|| format!("{}: cannot read `{}` back", path.display(), spec.name))?;
        Ok(bytes)
    }

    /// Checks that all bytes came and makes them durable.
    pub(super) fn sync(self) -> Result<()> {
        for (spec, slot, written) in &self.tensors {
            let (written, wanted) = (written.load(Ordering::Relaxed), spec.bytes());
            ensure!(
                written == wanted,
                "{}: `{}`: {written} bytes were written, wanted {wanted}",
                self.files[slot.file].0.display(),
                spec.name
            );
        }
        let failed = |file: usize| format!("{}: cannot be flushed to disk", self.files[file].0.display());
        self.flusher.finish().or_else(|(file, error)| Err(error).with_context(|| failed(file)))?;
        for (index, (_, file)) in self.files.iter().enumerate() {
            file.sync_all().with_context(|| failed(index))?;
        }
        Ok(())
    }
}

/// Creates a file of its final length, starting with `header`; one that is there keeps what follows.
pub(super) fn create_file(path: &Path, shown: &Path, header: &[u8], len: u64) -> Result<File> {
    let create = || -> io::Result<File> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        file.write_all_at(header, 0)?;
        file.set_len(len)?;
        Ok(file)
    };
    create().with_context(|| cannot_create(shown))
}

/// Creates a file that is to be renamed, with the rights that the umask gives: others may read what users share.
pub(crate) fn temporary_in(folder: &Path) -> io::Result<NamedTempFile> {
    tempfile::Builder::new().permissions(fs::Permissions::from_mode(0o666)).tempfile_in(folder)
}

/// Makes the entries of a folder durable.
pub(super) fn sync_folder(path: &Path) -> Result<()> {
    File::open(path)
        .and_then(|folder| folder.sync_all())
        .with_context(|| format!("{}: cannot be flushed to disk", path.display()))
}

/// Returns where an output lies while it is made: `.NAME.partial-SUFFIX` beside it.
pub(crate) fn partial_path(target: &Path, suffix: &str) -> Result<PathBuf> {
    Ok(parent_of(target).join(format!("{}{suffix}", partial_prefix(target)?)))
}

/// Returns what the names of all files that belong to an unfinished output start with.
pub(crate) fn partial_prefix(target: &Path) -> Result<String> {
    let name = target.file_name().with_context(|| format!("{}: names no file", target.display()))?;
    Ok(format!(".{}.partial-", name.to_string_lossy()))
}

fn cannot_create(path: &Path) -> String {
    format!("{}: cannot be created; choose an output in a folder you may write to", path.display())
}

pub(super) fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Whether `--force` may replace a folder: an empty one, or one that a converter wrote. `config.json` alone is also what
/// other programs call their settings.
fn replaceable(folder: &Path) -> Result<bool> {
    let listed = || format!("{}: cannot be listed", folder.display());
    let names = fs::read_dir(folder).with_context(listed)?.map(|entry| Ok(entry?.file_name()));
    let names: Vec<String> = names
        .map(|name: io::Result<_>| Ok(name?.to_string_lossy().into_owned()))
        .collect::<io::Result<_>>()
        .with_context(listed)?;
    let has = |wanted: &str| names.iter().any(|name| name == wanted);
    let weights = names.iter().any(|name| name.ends_with(".safetensors"));
    Ok(names.is_empty() || has("quant.json") || (has("config.json") && weights))
}

fn ensure_space(folder: &Path, bytes: u64) -> Result<()> {
    let stat = rustix::fs::statvfs(folder)
        .with_context(|| format!("{}: cannot tell the free disk space", folder.display()))?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    ensure!(
        bytes <= free,
        "{}: the output takes {bytes} bytes, but the disk has {free} free; free some or choose another disk",
        folder.display()
    );
    Ok(())
}

/// Returns the disk space that a file, or the files of a folder, have already; 0 if there is none.
fn allocated(path: &Path) -> Result<u64> {
    let Ok(metadata) = path.metadata() else { return Ok(0) };
    if !metadata.is_dir() {
        return Ok(metadata.blocks() * 512);
    }
    let failed = || format!("{}: cannot be listed", path.display());
    let mut sum = 0;
    for entry in fs::read_dir(path).with_context(failed)? {
        sum += entry.and_then(|entry| entry.metadata()).with_context(failed)?.blocks() * 512;
    }
    Ok(sum)
}

/// Removes a file or a folder; no error if there is none.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let removed = match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => Err(error),
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
    };
    removed.with_context(|| format!("{}: cannot be removed", path.display()))
}
