//! Rotation of queries and keys by their positions: rotary embedding, its angles worked out.

use std::borrow::Cow;

/// Which two values of a head turn together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pairing {
    /// (i, i + n) of the first 2n values: Hugging Face's arrangement (`rotate_half`).
    Halves,
    /// (2i, 2i + 1): the arrangement of the paper (Su et al., "RoFormer", 2021), of GLM-4 and Command-R.
    Neighbours,
}

/// The rotation of every head: pair i of a token at position p turns by p · `inverse_frequencies[i]`, and is multiplied
/// with `magnitude`. The values of a head past the pairs stay as they are.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Width of a head; the first `2 · inverse_frequencies.len()` of it turn.
    pub head_dim: usize,
    /// Which values turn together.
    pub pairing: Pairing,
    /// Angle per position of each pair, `[pairs]`, scaling already applied.
    pub inverse_frequencies: Vec<f32>,
    /// What takes the place of `inverse_frequencies` in long sequences.
    pub long: Option<LongAngles>,
    /// How angles shrink in sequences longer than a context; not together with `long`.
    pub dynamic: Option<DynamicAngles>,
    /// Factor of cosines and sines, so of queries and of keys (YaRN's and LongRoPE's attention factor).
    pub magnitude: f32,
}

/// Angles of sequences longer than some number of tokens (LongRoPE).
#[derive(Clone, Debug, PartialEq)]
pub struct LongAngles {
    /// Sequences of more tokens than these take them, from their first token on.
    pub beyond: usize,
    /// `[pairs]`
    pub inverse_frequencies: Vec<f32>,
}

/// Angles that shrink with the length n of a sequence past the context c (dynamic NTK): pair i of m by
/// (factor · n / c - (factor - 1))^(-i / (m - 1)). This is transformers' θ · (…)^(d / (d - 2)) for heads of d = 2m.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DynamicAngles {
    /// Sequences of more tokens than these turn slower, from their first token on.
    pub context: usize,
    /// How fast angles shrink.
    pub factor: f32,
}

impl Rope {
    /// Returns plain rotation of whole heads of `2 · inverse_frequencies.len()` values, in halves.
    pub fn plain(inverse_frequencies: Vec<f32>) -> Rope {
        Rope {
            head_dim: 2 * inverse_frequencies.len(),
            pairing: Pairing::Halves,
            inverse_frequencies,
            long: None,
            dynamic: None,
            magnitude: 1.0,
        }
    }

    /// Returns the angles of a sequence of `tokens` tokens, `[pairs]`.
    pub fn angles(&self, tokens: usize) -> Cow<'_, [f32]> {
        let angles = &self.inverse_frequencies;
        match (&self.long, self.dynamic) {
            (Some(long), _) if tokens > long.beyond => Cow::Borrowed(&long.inverse_frequencies),
            (None, Some(DynamicAngles { context, factor })) if tokens > context => {
                let factor = factor as f64;
                let slower = factor * tokens as f64 / context as f64 - (factor - 1.0);
                let last = (angles.len() - 1) as f64;
                let shrunk =
                    |(i, angle): (usize, &f32)| (*angle as f64 * slower.powf(-(i as f64) / last)) as f32;
                Cow::Owned(angles.iter().enumerate().map(shrunk).collect())
            }
            _ => Cow::Borrowed(angles),
        }
    }

    /// Returns the rotation for sequences that may grow to `tokens` tokens: their keys stay in a cache, so that the angles
    /// cannot change on the way. vLLM and llama.cpp choose by the length they reserve, too.
    pub fn for_length(&self, tokens: usize) -> Rope {
        let inverse_frequencies = self.angles(tokens).into_owned();
        Rope { inverse_frequencies, long: None, dynamic: None, ..self.clone() }
    }

    /// Returns the transposed rotation, which carries gradients back: the other way, with the same magnitude.
    pub fn reversed(&self) -> Rope {
        let negated = |angles: &[f32]| angles.iter().map(|angle| -angle).collect();
        Rope {
            inverse_frequencies: negated(&self.inverse_frequencies),
            long: self.long.as_ref().map(|long| LongAngles {
                beyond: long.beyond,
                inverse_frequencies: negated(&long.inverse_frequencies),
            }),
            ..self.clone()
        }
    }

    /// Returns how many pairs of a head turn.
    pub fn pairs(&self) -> usize {
        self.inverse_frequencies.len()
    }
}
