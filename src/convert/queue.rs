//! What the threads of a conversion do, and in which order: that of the source's files, so that the disk reads one stream,
//! every block of a file hashed just before the rows that lie in it are converted.

use std::ops::Range;

use anyhow::Result;

use crate::checkpoint::Checkpoint;
use crate::container::FileHash;
use crate::plan::Step;

/// Weights decoded at a time by one thread: with source bytes, codes and packed bytes about 12 bytes each, which stays in
/// a core's own cache from the read to the write.
pub(super) const CHUNK_WEIGHTS: usize = 1 << 16;
/// Blocks between the one that is hashed and the one that the disk is told to read: 32 MB, a few of the longest reads
/// that disks are given.
const AHEAD: usize = 32;

/// A block of one of the source's files.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Block {
    /// Index of the file.
    pub(super) file: usize,
    /// First byte.
    pub(super) start: u64,
}

/// A piece of work.
#[derive(Debug, PartialEq)]
pub(super) enum Job {
    /// Hash a block; the disk is to read another meanwhile.
    Hash { block: Block, ahead: Option<Block> },
    /// Convert rows of a step.
    Convert { step: usize, rows: Range<usize> },
}

/// Returns all that is to be done for some steps of a plan (each with its index), and for the hashes of the source's weight
/// files, which are given in their order or not at all.
pub(super) fn jobs<'a>(
    source: &Checkpoint,
    steps: impl Iterator<Item = (usize, &'a Step)>,
    hashes: &[FileHash],
) -> Result<Vec<Job>> {
    let blocks: Vec<Block> = (hashes.iter().enumerate())
        .flat_map(|(file, hash)| hash.missing().map(move |start| Block { file, start }))
        .collect();
    let mut placed: Vec<((usize, u64), Job)> = Vec::new();
    for (i, &block) in blocks.iter().enumerate() {
        let ahead = blocks.get(i + AHEAD).copied();
        placed.push(((block.file, block.start), Job::Hash { block, ahead }));
    }
    for (step, content) in steps {
        for rows in chunks(content) {
            placed.push((source.position(content.id, rows.start)?, Job::Convert { step, rows }));
        }
    }
    placed.sort_by_key(|&(place, _)| place);
    Ok(placed.into_iter().map(|(_, job)| job).collect())
}

/// Cuts a step into chunks of whole rows, never across a run of rows that is reordered; none if its values are known.
pub(super) fn chunks(step: &Step) -> impl Iterator<Item = Range<usize>> {
    let run = step.place.rows.run();
    let (rows, matrix) = (step.rows(), step.shape.len() > 1);
    let fitting = (CHUNK_WEIGHTS / step.cols().max(1)).max(1).next_multiple_of(run);
    let chunk = if matrix { fitting.min(rows.max(1)) } else { rows.max(1) };
    let end = if step.values.is_some() { 0 } else { rows };
    (0..end).step_by(chunk).map(move |row| row..(row + chunk).min(rows))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::embedded;
    use crate::plan::Plan;
    use crate::recipe::Recipe;

    #[test]
    fn every_row_is_converted_once_behind_the_block_it_starts_in() {
        let source = Checkpoint::open(&embedded::model_folder().unwrap()).unwrap();
        let plan = Plan::new(&source, &Recipe::new("q8_0", None, None).unwrap()).unwrap();
        let hashes: Vec<_> = source.weight_files().map(|path| FileHash::open(path).unwrap()).collect();
        let wanted: Vec<u64> = hashes[0].missing().collect();
        let mut next = vec![0; plan.steps.len()];
        let mut hashed = Vec::new();
        for job in jobs(&source, plan.steps.iter().enumerate(), &hashes).unwrap() {
            match job {
                Job::Hash { block, ahead } => {
                    assert!(ahead.is_none_or(|ahead| ahead.start > block.start));
                    hashed.push(block.start);
                }
                Job::Convert { step, rows } => {
                    assert_eq!(rows.start, next[step], "rows of {step} come in order");
                    next[step] = rows.end;
                    let (_, start) = source.position(plan.steps[step].id, rows.start).unwrap();
                    let (last, coming) = (hashed.last().copied().unwrap(), wanted.get(hashed.len()));
                    assert!(last <= start && coming.is_none_or(|&coming| start < coming));
                }
            }
        }
        let rows: Vec<usize> =
            plan.steps.iter().map(|s| if s.values.is_some() { 0 } else { s.rows() }).collect();
        assert_eq!(next, rows);
        assert_eq!(hashed, wanted);
    }
}
