//! The ways to join two pieces of a vocabulary into a third: what a SentencePiece model has in place of merges.

/// Pieces in which the halves of others are looked for, in time that grows with a piece's length, not with its square.
pub struct Joins<'a> {
    /// In the order of their bytes.
    forwards: Vec<&'a [u8]>,
    /// Each turned round, in the order of their bytes.
    backwards: Vec<Vec<u8>>,
}

impl<'a> Joins<'a> {
    /// Looks among these pieces.
    pub fn of(pieces: impl Iterator<Item = &'a str>) -> Self {
        let mut forwards: Vec<_> = pieces.map(str::as_bytes).collect();
        let mut backwards: Vec<Vec<u8>> =
            forwards.iter().map(|piece| piece.iter().rev().copied().collect()).collect();
        forwards.sort_unstable();
        backwards.sort_unstable();
        Joins { forwards, backwards }
    }

    /// Returns all pairs of pieces that make up `text`, the shortest left one first.
    pub fn halves<'b>(&self, text: &'b str) -> impl DoubleEndedIterator<Item = (&'b str, &'b str)> {
        let bytes = text.as_bytes();
        let right = starts(&self.backwards, bytes.iter().rev());
        let cuts = starts(&self.forwards, bytes.iter()).into_iter();
        // Pieces are whole characters, so every cut lies between two.
        cuts.filter(move |at| right.binary_search(&(bytes.len() - at)).is_ok()).map(|at| text.split_at(at))
    }
}

/// Returns the lengths of the pieces that a text starts with, in ascending order; `pieces` are in the order of their bytes.
fn starts<'a>(pieces: &[impl AsRef<[u8]>], text: impl Iterator<Item = &'a u8>) -> Vec<usize> {
    let (mut alike, mut lengths) = (pieces, Vec::new());
    for (at, byte) in text.enumerate() {
        // All that share the bytes before this one; those that end there come first.
        let first = alike.partition_point(|piece| piece.as_ref().get(at) < Some(byte));
        let last = alike.partition_point(|piece| piece.as_ref().get(at) <= Some(byte));
        alike = &alike[first..last];
        match alike.first() {
            None => break,
            Some(piece) if piece.as_ref().len() == at + 1 => lengths.push(at + 1),
            Some(_) => {}
        }
    }
    lengths
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn the_halves_of_a_piece_are_those_that_trying_every_cut_finds() {
        let mut random = fastrand::Rng::with_seed(3);
        let pieces: Vec<String> = (0..400)
            .map(|_| (0..random.usize(1..7)).map(|_| ['a', 'b', 'ü', '中'][random.usize(..4)]).collect())
            .collect();
        let joins = Joins::of(pieces.iter().map(String::as_str));
        let known: HashSet<&str> = pieces.iter().map(String::as_str).collect();
        let mut found = 0;
        for text in &pieces {
            let cuts = text.char_indices().skip(1).map(|(at, _)| text.split_at(at));
            let wanted: Vec<_> = cuts.filter(|(l, r)| known.contains(l) && known.contains(r)).collect();
            assert_eq!(joins.halves(text).collect::<Vec<_>>(), wanted, "{text}");
            found += wanted.len();
        }
        assert!(found > 300, "{found}");
    }

    #[test]
    fn one_long_piece_takes_no_longer_than_many_short_ones() {
        let long = "a".repeat(4 << 20);
        let start = Instant::now();
        let joins = Joins::of([long.as_str(), "a"].into_iter());
        assert_eq!(joins.halves(&long).count(), 0);
        // Every cut with its halves compared anew would be 9e12 bytes: an hour.
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    }
}
