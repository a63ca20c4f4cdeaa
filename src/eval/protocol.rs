//! How a text is cut into windows and which positions are scored. Numbers of different protocols are never comparable.

use std::fmt;
use std::ops::Range;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// Which positions of a window are scored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scored {
    /// The second half, as llama-perplexity does: positions `n_ctx / 2 .. n_ctx - 1` predict their next token.
    #[default]
    #[serde(rename = "llama.cpp")]
    SecondHalf,
    /// All that have a next token in the window, as papers do.
    #[serde(rename = "full")]
    All,
}

/// The names users type after `--protocol`.
const NAMES: [(&str, Scored); 2] = [("llama.cpp", Scored::SecondHalf), ("full", Scored::All)];

impl Scored {
    /// Returns the protocol of that name.
    pub fn by_name(name: &str) -> Option<Self> {
        NAMES.iter().find(|row| row.0 == name).map(|row| row.1)
    }
}

impl fmt::Display for Scored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMES[*self as usize].0)
    }
}

/// Everything a number depends on beside the model; recorded with every result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protocol {
    /// Which positions of each window count.
    pub name: Scored,
    /// Tokens per window.
    pub n_ctx: usize,
    /// Number of windows, from the start of the text, without overlap.
    pub windows: usize,
    /// SHA-256 of the text's UTF-8 bytes, hexadecimal.
    pub text_sha256: String,
    /// Token that replaces the first of every window, for models whose texts start with one (llama-perplexity's rule).
    pub bos: Option<u32>,
}

impl Protocol {
    /// Returns the protocol for a text and its `tokens` (of the whole text, BOS included if the model wants one).
    /// It uses as many windows as the text fills, at most `max_windows`.
    ///
    /// # Errors
    /// If the text does not fill one window, or no position of a window would be scored.
    pub fn new(
        name: Scored,
        n_ctx: usize,
        max_windows: Option<usize>,
        text: &str,
        tokens: &[u32],
        bos: Option<u32>,
    ) -> Result<Self> {
        ensure!(!tokens.is_empty(), "the evaluation text is empty; name another with `--text`");
        ensure!(n_ctx >= 4, "a window of {n_ctx} tokens scores nothing; use `--ctx` 4 or more");
        let filled = tokens.len() / n_ctx;
        ensure!(
            filled > 0,
            "the evaluation text has {} tokens and does not fill one window of {n_ctx}; use a longer text or `--ctx {}`",
            tokens.len(),
            tokens.len().max(4)
        );
        let windows = filled.min(max_windows.unwrap_or(filled));
        ensure!(windows > 0, "`--windows 0` evaluates nothing; use 1 or more");
        let text_sha256 = Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Protocol { name, n_ctx, windows, text_sha256, bos })
    }

    /// Returns the positions of a window whose next token is scored.
    pub fn scored(&self) -> Range<usize> {
        match self.name {
            Scored::SecondHalf => self.n_ctx / 2..self.n_ctx - 1,
            Scored::All => 0..self.n_ctx - 1,
        }
    }

    /// Returns the rows of the scored positions where that many windows follow one another.
    pub fn scored_rows(&self, windows: usize) -> Vec<usize> {
        (0..windows).flat_map(|window| self.scored().map(move |at| window * self.n_ctx + at)).collect()
    }

    /// Returns the tokens of window `index`.
    pub fn window(&self, tokens: &[u32], index: usize) -> Vec<u32> {
        let mut window = tokens[index * self.n_ctx..(index + 1) * self.n_ctx].to_vec();
        if let Some(bos) = self.bos {
            window[0] = bos;
        }
        window
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn protocol(name: Scored, n_ctx: usize, tokens: usize) -> Result<Protocol> {
        Protocol::new(name, n_ctx, Some(60), "text", &vec![7; tokens], None)
    }

    #[test]
    fn sixty_windows_of_512_score_15300_positions() {
        let protocol = protocol(Scored::SecondHalf, 512, 40_000).unwrap();
        assert_eq!((protocol.windows, protocol.scored()), (60, 256..511));
        assert_eq!(protocol.windows * protocol.scored().len(), 15_300);
    }

    #[test]
    fn the_full_protocol_scores_every_position_that_has_a_next_token() {
        assert_eq!(protocol(Scored::All, 2048, 5000).unwrap().scored(), 0..2047);
        assert_eq!(protocol(Scored::All, 2048, 5000).unwrap().windows, 2);
    }

    #[test]
    fn windows_start_with_the_bos_token_where_the_model_wants_one() {
        let protocol = Protocol { bos: Some(1), ..protocol(Scored::All, 4, 12).unwrap() };
        assert_eq!(protocol.window(&[5, 6, 7, 8, 9, 10, 11, 12], 1), [1, 10, 11, 12]);
    }

    #[test]
    fn texts_that_fill_no_window_are_refused() {
        for (tokens, word) in [(0, "empty"), (511, "511 tokens")] {
            let message = protocol(Scored::SecondHalf, 512, tokens).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
        assert!(protocol(Scored::All, 3, 100).unwrap_err().to_string().contains("--ctx"));
    }

    #[test]
    fn the_text_is_recorded_by_its_hash() {
        // sha256sum of the four bytes `text`.
        let expected = "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1";
        assert_eq!(protocol(Scored::All, 4, 9).unwrap().text_sha256, expected);
    }
}
