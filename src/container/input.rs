//! Reading: a file of known length and where tensors lie in it.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use memmap2::{Advice, MmapOptions};
use rayon::prelude::*;

use super::{TensorSpec, text};

/// Bytes above which several threads read: most of the time goes into memory that is touched for the first time.
const LARGE: u64 = 16 << 20;
/// Bytes that one of them reads at a time.
const PIECE: usize = 1 << 20;
/// Bytes from which on [`InputFile::share`] maps; norms and biases are read.
const MAPPED: u64 = 1 << 16;

/// A file opened for positioned reads. Memory holds only what is asked for, and threads share it.
#[derive(Debug)]
pub struct InputFile {
    /// Where it is.
    pub path: PathBuf,
    /// Its length when opened.
    pub len: u64,
    pub(super) file: File,
}

impl InputFile {
    /// Opens a file. Errors say what stands at the path if it is no readable file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("{}: cannot be opened", path.display()))?;
        let metadata = file.metadata().with_context(|| format!("{}", path.display()))?;
        if metadata.is_dir() {
            bail!("{}: found a folder, wanted a file", path.display());
        }
        ensure!(metadata.len() > 0, "{}: the file is empty; download it again", path.display());
        let mut start = [0; 64];
        let read =
            file.read_at(&mut start, 0).with_context(|| format!("{}: cannot be read", path.display()))?;
        text::refuse_pointer(path, &start[..read])?;
        Ok(InputFile { path: path.to_path_buf(), len: metadata.len(), file })
    }

    /// Returns `len` bytes from `start` on to be kept: large ones in memory shared with the system's page cache. Errors as
    /// [`InputFile::read`].
    #[allow(unsafe_code)]
    pub fn share(&self, start: u64, len: u64) -> Result<Bytes> {
        self.check(start, len)?;
        if len < MAPPED {
            return Ok(self.read(start, len)?.into());
        }
        // SAFETY: nobody writes to checkpoints in place while they are used: `quant` itself renames finished files, and so
        // do the tools that download them. Whoever truncates one meanwhile ends the process, as with every tool that maps.
        let map = unsafe { MmapOptions::new().offset(start).len(len as usize).map(&self.file) };
        let map =
            map.with_context(|| format!("{}: cannot map {len} bytes at {start}", self.path.display()))?;
        // Only speed depends on it.
        let _ = map.advise(Advice::WillNeed);
        Ok(Bytes::from_owner(map))
    }

    /// Errors if the file ends before `len` bytes from `start` on.
    fn check(&self, start: u64, len: u64) -> Result<()> {
        ensure!(
            start.checked_add(len).is_some_and(|end| end <= self.len),
            "{}: wanted {len} bytes at {start}, but the file ends at {}; download it again",
            self.path.display(),
            self.len
        );
        Ok(())
    }

    /// Returns `len` bytes from `start` on. Errors if the file ends before.
    pub fn read(&self, start: u64, len: u64) -> Result<Vec<u8>> {
        // Checked before the buffer is made, so that a wrong length never becomes an allocation.
        self.check(start, len)?;
        if len > LARGE {
            let mut bytes = vec![0; len as usize];
            let pieces = bytes.par_chunks_mut(PIECE).enumerate();
            pieces.try_for_each(|(i, piece)| self.fill(start + (i * PIECE) as u64, piece))?;
            return Ok(bytes);
        }
        let mut bytes = Vec::with_capacity(len as usize);
        while bytes.len() < len as usize {
            let at = start + bytes.len() as u64;
            let read = rustix::io::pread(&self.file, rustix::buffer::spare_capacity(&mut bytes), at);
            match read.map_err(std::io::Error::from) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Ok(0) => {
                    bail!("{}: ends at {at}, as it did not when opened; did it change?", self.path.display())
                }
                read => {
                    read.with_context(|| {
                        format!("{}: cannot read {len} bytes at {start}", self.path.display())
                    })?;
                }
            }
        }
        bytes.truncate(len as usize);
        Ok(bytes)
    }

    /// Fills `bytes` with those from `start` on.
    fn fill(&self, start: u64, bytes: &mut [u8]) -> Result<()> {
        let read = self.file.read_exact_at(bytes, start);
        read.with_context(|| format!("{}: cannot read {} bytes at {start}", self.path.display(), bytes.len()))
    }
}

/// A tensor found in a header: validated to lie within its file.
#[derive(Clone, Debug, PartialEq)]
pub struct Located {
    /// Name, type and shape.
    pub spec: TensorSpec,
    /// Which of the container's files.
    pub file: usize,
    /// First byte, from the start of the file.
    pub start: u64,
}
