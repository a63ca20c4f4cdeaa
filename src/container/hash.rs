//! BLAKE3 of files, block by block in any order and from any thread, so that whoever reads a file anyway can hash it on
//! the way. The blocks are subtrees of the hash's tree (BLAKE3 paper, section 2.1), merged at the end.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result};
use blake3::Hasher;
use blake3::hazmat::{
    ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root,
};
use rayon::prelude::*;
use rustix::fs::Advice;

/// Bytes of a block, a power of two: enough for one long read, and few enough to be hashed from a core's own cache.
const BLOCK: u64 = 1 << 20;

/// The hash of a file in the making.
#[derive(Debug)]
pub struct FileHash {
    /// Where the file is.
    pub path: PathBuf,
    file: File,
    len: u64,
    /// Of each block; none for a file of one block, which is no subtree but the root.
    blocks: Vec<OnceLock<ChainingValue>>,
}

impl FileHash {
    /// Opens a file to hash; nothing is read.
    pub fn open(path: &Path) -> Result<Self> {
        let open = || -> io::Result<(File, u64)> {
            let file = File::open(path)?;
            let len = file.metadata()?.len();
            Ok((file, len))
        };
        let (file, len) = open().with_context(|| cannot_read(path))?;
        let count = if len > BLOCK { len.div_ceil(BLOCK) } else { 0 };
        let blocks = (0..count).map(|_| OnceLock::new()).collect();
        Ok(FileHash { path: path.to_path_buf(), file, len, blocks })
    }

    /// Returns the first byte of every block that is not hashed yet, in the file's order.
    pub fn missing(&self) -> impl Iterator<Item = u64> {
        let missing = self.blocks.iter().enumerate().filter(|(_, block)| block.get().is_none());
        missing.map(|(index, _)| index as u64 * BLOCK)
    }

    /// Asks the disk for the block from `start` on, without waiting for it.
    pub fn read_ahead(&self, start: u64) {
        // Advice: a file system that takes none reads later.
        let _ = rustix::fs::fadvise(&self.file, start, std::num::NonZeroU64::new(BLOCK), Advice::WillNeed);
    }

    /// Hashes the block from `start` on; `buffer` is memory to read it into, kept from block to block.
    pub fn hash_block(&self, start: u64, buffer: &mut Vec<u8>) -> Result<()> {
        let bytes = self.read(start, buffer)?;
        let value = Hasher::new().set_input_offset(start).update(bytes).finalize_non_root();
        // Two threads that hash the same block find the same value.
        let _ = self.blocks[(start / BLOCK) as usize].set(value);
        Ok(())
    }

    /// Returns the hash, `blake3:` and lower-case hexadecimal, as `b3sum` prints it. Blocks that are missing are hashed in
    /// parallel.
    pub fn finish(&self) -> Result<String> {
        let missing: Vec<u64> = self.missing().collect();
        missing.par_iter().try_for_each_init(Vec::new, |buffer, &start| self.hash_block(start, buffer))?;
        let values: Vec<ChainingValue> = self.blocks.iter().filter_map(OnceLock::get).copied().collect();
        let hash = match values.is_empty() {
            true => blake3::hash(self.read(0, &mut Vec::new())?),
            false => {
                let (left, right) = children(&values, self.len);
                merge_subtrees_root(&left, &right, Mode::Hash)
            }
        };
        Ok(format!("blake3:{}", hash.to_hex()))
    }

    /// Reads the block from `start` on.
    fn read<'a>(&self, start: u64, buffer: &'a mut Vec<u8>) -> Result<&'a [u8]> {
        let len = (self.len - start).min(BLOCK) as usize;
        if buffer.len() < len {
            buffer.resize(len, 0);
        }
        self.file.read_exact_at(&mut buffer[..len], start).with_context(|| cannot_read(&self.path))?;
        Ok(&buffer[..len])
    }
}

/// Returns the values of both halves of a tree over `len` bytes in two blocks or more.
fn children(blocks: &[ChainingValue], len: u64) -> (ChainingValue, ChainingValue) {
    let left = left_subtree_len(len);
    let (first, second) = blocks.split_at((left / BLOCK) as usize);
    (subtree(first, left), subtree(second, len - left))
}

/// Returns the value of a tree that is a part of a larger one.
fn subtree(blocks: &[ChainingValue], len: u64) -> ChainingValue {
    if let [block] = blocks {
        return *block;
    }
    let (left, right) = children(blocks, len);
    merge_subtrees_non_root(&left, &right, Mode::Hash)
}

fn cannot_read(path: &Path) -> String {
    format!("{}: cannot be read to hash it", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_in_any_order_give_the_hash_of_the_whole_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        let bytes: Vec<u8> = (0..5 * BLOCK + 3).map(|i| ((i * i) >> 7) as u8).collect();
        // Around every number of blocks up to five, where trees are full, and a byte before and behind.
        let lengths = (0..=5).flat_map(|n| [n * BLOCK, (n * BLOCK).saturating_sub(1), n * BLOCK + 1]);
        for len in lengths {
            let whole = &bytes[..len as usize];
            std::fs::write(&path, whole).unwrap();
            let wanted = format!("blake3:{}", blake3::hash(whole).to_hex());
            let hash = FileHash::open(&path).unwrap();
            let mut starts: Vec<u64> = hash.missing().collect();
            starts.reverse();
            // All but one, which `finish` has to find.
            for &start in starts.iter().skip(1) {
                hash.hash_block(start, &mut Vec::new()).unwrap();
            }
            assert_eq!(hash.missing().count(), starts.len().min(1), "{len} bytes");
            assert_eq!(hash.finish().unwrap(), wanted, "{len} bytes");
        }
    }

    #[test]
    fn a_file_that_was_cut_meanwhile_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, vec![1; 3 * BLOCK as usize]).unwrap();
        let hash = FileHash::open(&path).unwrap();
        std::fs::write(&path, vec![1; BLOCK as usize]).unwrap();
        let error = hash.finish().unwrap_err().to_string();
        assert!(error.ends_with("file: cannot be read to hash it"), "{error}");
    }
}
