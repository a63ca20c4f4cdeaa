//! When a text ends.

use anyhow::Result;

use super::{Finish, Generated};
use crate::model::tokenizer::Tokenizer;

/// What ends a text before its limit of tokens: whichever comes first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stop {
    /// Tokens that end a text, usually the end-of-sequence and end-of-turn tokens.
    pub tokens: Vec<u32>,
    /// Texts that end a text and are left out of it.
    pub strings: Vec<String>,
}

impl Stop {
    /// Returns what was generated if the newest token ends it, by itself or as token number `limit`.
    pub fn ended(&self, new: &[u32], limit: usize, tokenizer: &Tokenizer) -> Result<Option<Generated>> {
        let end = |tokens: &[u32], text: String, finish| {
            Ok(Some(Generated { tokens: tokens.to_vec(), text, finish }))
        };
        if let Some((last, before)) = new.split_last()
            && self.tokens.contains(last)
        {
            return end(new, tokenizer.decode(before)?, Finish::Stop);
        }
        let at_limit = new.len() >= limit;
        if self.strings.is_empty() && !at_limit {
            return Ok(None);
        }
        let text = tokenizer.decode(new)?;
        match self.strings.iter().filter_map(|stop| text.find(stop.as_str())).min() {
            Some(at) => end(new, text[..at].to_string(), Finish::Stop),
            None if at_limit => end(new, text, Finish::Length),
            None => Ok(None),
        }
    }
}
