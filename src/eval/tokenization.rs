//! Whether a model's own tokenizer cuts texts as the baseline's does. All models are fed the baseline's ids,
//! so a wrong tokenizer shows in none of their numbers, and in every text that an engine gives them.

use anyhow::Result;

use super::report::GateVerdict;
use crate::model::tokenizer::Tokenizer;

/// What tokenizers part over: numbers, runs of spaces and line ends, contractions, accents in either form,
/// other scripts, emoji, what byte fallback takes.
const PROBE: &str = "It's 1234567 or 3.14159,\tI'LL say\r\n\n   so:  x=[0]*10;  // é e\u{301} ﬁ ü\n中文字符と日本語 한국어 \
    Привет мир العربية हिन्दी 🙂👩‍🚀 ¡ \u{a0}\u{2009}| __init__ HTTPServer2 /usr/bin \u{10ffff} end  ";

/// Where two tokenizers part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parting {
    /// Tokens that are equal before it.
    pub equal: usize,
    /// What the baseline reads there, and what the model's own tokenizer does: an id and its text, or the
    /// end.
    pub wanted: String,
    /// See [`Parting::wanted`].
    pub found: String,
}

impl Parting {
    /// Returns a sentence that follows the model's name.
    pub fn sentence(&self) -> String {
        let Parting { equal, wanted, found } = self;
        format!(
            "its own tokenizer cuts text otherwise than the baseline's: after {equal} equal tokens it reads {found} instead of \
             {wanted}; its numbers are those of the baseline's tokens, and an engine that uses its own will do worse"
        )
    }

    /// Returns it as a gate that failed.
    pub fn verdict(&self, model: &str) -> GateVerdict {
        GateVerdict {
            gate: "same-tokens".to_string(),
            model: model.to_string(),
            value: self.equal as f64,
            interval: None,
            limit: self.equal as f64 + 1.0,
            passed: false,
            shown: format!("{} after {} equal tokens", self.found, self.equal),
            shown_limit: format!("{} as the baseline", self.wanted),
        }
    }
}

/// Returns where `own` parts from `baseline`: over the first `count` tokens of `text`, over a probe of what
/// tokenizers differ in, or over the baseline's added tokens; `None` if it does not.
///
/// # Errors
/// If one of them cannot read the texts.
pub fn parting(baseline: &Tokenizer, own: &Tokenizer, text: &str, count: usize) -> Result<Option<Parting>> {
    let added = baseline.added_tokens().join("a ");
    for (text, count) in [(text, count), (PROBE, usize::MAX), (added.as_str(), usize::MAX)] {
        let read = |tokenizer: &Tokenizer| {
            let mut ids = tokenizer.encode_start(text, true, count)?;
            ids.truncate(count);
            anyhow::Ok(ids)
        };
        let (wanted, found) = (read(baseline)?, read(own)?);
        if wanted == found {
            continue;
        }
        let equal = wanted.iter().zip(&found).take_while(|(a, b)| a == b).count();
        let shown = |tokenizer: &Tokenizer, ids: &[u32]| match ids.get(equal) {
            Some(&id) => format!("{id} (`{}`)", tokenizer.piece(id).escape_debug()),
            None => "its end".to_string(),
        };
        return Ok(Some(Parting { equal, wanted: shown(baseline, &wanted), found: shown(own, &found) }));
    }
    Ok(None)
}
