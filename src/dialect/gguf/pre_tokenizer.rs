//! Which of llama.cpp's pre-tokenizers a `tokenizer.json` describes, decided by its rules; and those rules again, for
//! files that name one.
//!
//! A byte-level BPE tokenizer first cuts the text by regular expressions, then merges bytes within the pieces. GGUF
//! names the expressions by an id that llama.cpp knows (`llama_vocab` in src/llama-vocab.cpp, commit 0c1e57098); an
//! unknown id makes a file unloadable and a wrong one tokenizes wrongly, so anything unrecognised is refused.

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

/// One id of `tokenizer.ggml.pre`.
pub(super) struct PreTokenizer {
    pub id: &'static str,
    /// Other ids that llama.cpp treats alike.
    aliases: &'static [&'static str],
    /// Expressions applied one after the other, each the list of its alternatives.
    splits: &'static [&'static [&'static str]],
    /// Whether a piece that is a token is taken whole; `None`: llama.cpp always does, whatever the file says.
    ignore_merges: Option<bool>,
    /// llama.cpp's default for a file without `tokenizer.ggml.add_bos_token`.
    pub adds_bos: bool,
}

const CONTRACTIONS: &str = "(?i:'s|'t|'re|'ve|'m|'ll|'d)";
const WORD: &str = r"[^\r\n\p{L}\p{N}]?\p{L}+";
const NUMBER: &str = r"\p{N}";
const NUMBER_1_TO_3: &str = r"\p{N}{1,3}";
const SYMBOLS: &str = r" ?[^\s\p{L}\p{N}]+[\r\n]*";
const SYMBOLS_SLASH: &str = r" ?[^\s\p{L}\p{N}]+[\r\n/]*";
const LINE_ENDS: &str = r"\s*[\r\n]+";
const SPACES_BEFORE_LAST: &str = r"\s+(?!\S)";
const SPACES: &str = r"\s+";
const CAPITALIZED: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+";
const UPPERCASE: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*";
const CAPITALIZED_CONTRACTED: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?";
const UPPERCASE_CONTRACTED: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?";

/// What `ByteLevel` applies under `use_regex` (tokenizers, pre_tokenizers/byte_level.rs).
const GPT2: &[&str] = &[
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    r" ?\p{L}+",
    r" ?\p{N}+",
    r" ?[^\s\p{L}\p{N}]+",
    SPACES_BEFORE_LAST,
    SPACES,
];
const LLAMA3: &[&str] = &[CONTRACTIONS, WORD, NUMBER_1_TO_3, SYMBOLS, LINE_ENDS, SPACES_BEFORE_LAST, SPACES];
const QWEN2: &[&str] = &[CONTRACTIONS, WORD, NUMBER, SYMBOLS, LINE_ENDS, SPACES_BEFORE_LAST, SPACES];
const TEKKEN: &[&str] =
    &[CAPITALIZED, UPPERCASE, NUMBER, SYMBOLS_SLASH, LINE_ENDS, SPACES_BEFORE_LAST, SPACES];
const GPT4O: &[&str] = &[
    CAPITALIZED_CONTRACTED,
    UPPERCASE_CONTRACTED,
    NUMBER_1_TO_3,
    SYMBOLS_SLASH,
    LINE_ENDS,
    SPACES_BEFORE_LAST,
    SPACES,
];

/// (spelling, what it equals). Alternatives that cut the same pieces in another notation.
const SPELLINGS: [(&str, &str); 3] = [
    ("'(?i:[sdmt]|ll|ve|re)", CONTRACTIONS),
    ("(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])", CONTRACTIONS),
    // Greedy `\s*` takes line ends too, so both end at the last one of a run.
    (r"\s*[\r\n]", LINE_ENDS),
];

const fn row(id: &'static str, splits: &'static [&'static [&'static str]]) -> PreTokenizer {
    PreTokenizer { id, aliases: &[], splits, ignore_merges: Some(false), adds_bos: false }
}

const PRE_TOKENIZERS: [PreTokenizer; 7] = [
    PreTokenizer {
        aliases: &["llama3", "llama-v3", "falcon3", "pixtral"],
        ignore_merges: Some(true),
        adds_bos: true,
        ..row("llama-bpe", &[LLAMA3])
    },
    PreTokenizer { aliases: &["smaug-bpe"], ..row("dbrx", &[LLAMA3]) },
    PreTokenizer { aliases: &["deepseek-r1-qwen", "stablelm2"], ..row("qwen2", &[QWEN2]) },
    PreTokenizer {
        aliases: &["starcoder", "refact", "command-r", "exaone"],
        ..row("smollm", &[&[NUMBER], GPT2])
    },
    PreTokenizer { aliases: &["mpt", "olmo", "phi-2"], ..row("gpt-2", &[GPT2]) },
    PreTokenizer { ignore_merges: None, adds_bos: true, ..row("tekken", &[TEKKEN]) },
    PreTokenizer { aliases: &["llama4"], ..row("gpt-4o", &[GPT4O]) },
];

/// Returns the pre-tokenizer of a GGUF file. Errors on ids outside the table.
pub(super) fn by_id(id: &str) -> Result<&'static PreTokenizer> {
    match PRE_TOKENIZERS.iter().find(|row| row.id == id || row.aliases.contains(&id)) {
        Some(row) => Ok(row),
        None => bail!("`tokenizer.ggml.pre` is `{id}`; known are {}", known()),
    }
}

/// Returns the pre-tokenizer whose rules are those of `tokenizer.json`.
///
/// # Errors
/// Name the rules that were found, marking those no known pre-tokenizer has, and the ids that would be accepted.
pub(super) fn recognise(tokenizer: &Value) -> Result<&'static PreTokenizer> {
    let normalizer = &tokenizer["normalizer"];
    // llama.cpp normalizes nothing. Composition (NFC) changes only texts that are not composed to begin with, and
    // Qwen's published GGUF files drop it, too.
    ensure!(
        normalizer.is_null() || normalizer["type"] == "NFC",
        "normalizer `{normalizer}`: llama.cpp has none for byte-level BPE; wanted `null` or `NFC`"
    );
    let splits = splits(&tokenizer["pre_tokenizer"])?;
    let ignore_merges = tokenizer["model"]["ignore_merges"] == true;
    let same_rules = |row: &&PreTokenizer| row.splits.iter().copied().eq(splits.iter().map(Vec::as_slice));
    let found = PRE_TOKENIZERS.iter().filter(same_rules);
    let fits = |row: &&PreTokenizer| row.ignore_merges.is_none_or(|wanted| wanted == ignore_merges);
    match found.clone().find(fits) {
        Some(row) => Ok(row),
        None if found.clone().next().is_some() => {
            let ids: Vec<_> = found.map(|row| row.id).collect();
            bail!(
                "pre-tokenizer {} with `ignore_merges` {ignore_merges}: llama.cpp has no such id",
                ids.join(", ")
            )
        }
        None => bail!(
            "unknown pre-tokenizer; its rules are {}; llama.cpp has ids for many more, but this tool recognises \
             only {}",
            described(&splits),
            known()
        ),
    }
}

impl PreTokenizer {
    /// Returns the `pre_tokenizer` entry of a `tokenizer.json`.
    pub fn to_json(&self) -> Value {
        let split = |alternatives: &&[&str]| {
            json!({"type": "Split", "pattern": {"Regex": alternatives.join("|")}, "behavior": "Isolated",
                   "invert": false})
        };
        let mut steps: Vec<Value> = self.splits.iter().map(split).collect();
        steps.push(
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}),
        );
        json!({"type": "Sequence", "pretokenizers": steps})
    }

    /// Whether pieces that are tokens are taken whole.
    pub fn ignores_merges(&self) -> bool {
        self.ignore_merges.unwrap_or(true)
    }
}

fn known() -> String {
    PRE_TOKENIZERS.map(|row| format!("`{}`", row.id)).join(", ")
}

/// Lists the alternatives of each expression; those that no row has are marked.
fn described(splits: &[Vec<&str>]) -> String {
    let is_known = |alternative: &&str| {
        PRE_TOKENIZERS.iter().any(|row| row.splits.iter().any(|split| split.contains(alternative)))
    };
    let describe = |split: &Vec<&str>| {
        let alternatives =
            split.iter().map(|a| format!("`{a}`{}", if is_known(a) { "" } else { " (unknown)" }));
        alternatives.collect::<Vec<_>>().join(" or ")
    };
    splits.iter().map(describe).collect::<Vec<_>>().join(", then ")
}

/// Returns the expressions a `pre_tokenizer` entry applies, each as its alternatives in canonical spelling. The entry
/// must end in `ByteLevel`, which maps bytes to printable characters.
fn splits(pre_tokenizer: &Value) -> Result<Vec<Vec<&str>>> {
    let steps: Vec<&Value> = match pre_tokenizer["type"].as_str() {
        Some("Sequence") => pre_tokenizer["pretokenizers"].as_array().into_iter().flatten().collect(),
        _ => vec![pre_tokenizer],
    };
    let Some((byte_level, steps)) = steps.split_last().filter(|(last, _)| last["type"] == "ByteLevel") else {
        bail!("pre-tokenizer `{pre_tokenizer}`: wanted one that ends in `ByteLevel`");
    };
    ensure!(
        byte_level["add_prefix_space"] == false,
        "pre-tokenizer `{byte_level}`: llama.cpp never puts a space before a text; wanted `add_prefix_space` false"
    );
    let mut splits = steps.iter().map(|step| split(step)).collect::<Result<Vec<_>>>()?;
    if byte_level["use_regex"] != false {
        splits.push(GPT2.to_vec());
    }
    Ok(splits)
}

/// Returns the alternatives of one step before `ByteLevel`.
fn split(step: &Value) -> Result<Vec<&str>> {
    let regex = step["pattern"]["Regex"].as_str();
    let matches_stay_whole = match (step["behavior"].as_str(), step["invert"].as_bool()) {
        (Some("Isolated"), Some(_)) => true,
        // Removing all that does not match leaves the matches: every known expression matches every character.
        (Some("Removed"), Some(true)) => true,
        _ => false,
    };
    match (step["type"].as_str(), regex) {
        (Some("Digits"), _) if step["individual_digits"] == true => Ok(vec![NUMBER]),
        (Some("Split"), Some(regex)) if matches_stay_whole => Ok(alternatives(regex)),
        _ => bail!(
            "pre-tokenizer step `{step}`: wanted `Split` by an isolated `Regex`, or `Digits` one by one"
        ),
    }
}

/// Cuts a regular expression at its outermost `|` and spells the alternatives canonically.
fn alternatives(regex: &str) -> Vec<&str> {
    let (mut depth, mut in_class, mut escaped, mut start) = (0i32, false, false, 0);
    let mut found = Vec::new();
    for (i, c) in regex.char_indices() {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            ']' => in_class = false,
            _ if in_class => {}
            '[' => in_class = true,
            '(' => depth += 1,
            ')' => depth -= 1,
            '|' if depth == 0 => {
                found.push(&regex[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    found.push(&regex[start..]);
    let canonical = |a| SPELLINGS.iter().find(|spelling| spelling.0 == a).map_or(a, |spelling| spelling.1);
    found.into_iter().map(canonical).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte_level(use_regex: bool) -> Value {
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex})
    }

    fn tokenizer(steps: Value, ignore_merges: bool) -> Value {
        json!({"normalizer": null, "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
               "model": {"ignore_merges": ignore_merges}})
    }

    fn split_by(regex: &str) -> Value {
        json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false})
    }

    fn id(tokenizer: &Value) -> &'static str {
        recognise(tokenizer).unwrap().id
    }

    /// The expressions as the models' own files spell them.
    const LLAMA3_FILE: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    const TEKKEN_FILE: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    #[test]
    fn published_tokenizers_are_recognised() {
        let bytes = byte_level(false);
        assert_eq!(id(&tokenizer(json!([split_by(LLAMA3_FILE), bytes]), true)), "llama-bpe");
        assert_eq!(id(&tokenizer(json!([split_by(LLAMA3_FILE), bytes]), false)), "dbrx");
        let single_digits = LLAMA3_FILE.replace("{1,3}", "");
        assert_eq!(id(&tokenizer(json!([split_by(&single_digits), bytes]), false)), "qwen2");
        assert_eq!(id(&tokenizer(json!([split_by(TEKKEN_FILE), bytes]), false)), "tekken");
        let digits = json!({"type": "Digits", "individual_digits": true});
        assert_eq!(id(&tokenizer(json!([digits, byte_level(true)]), false)), "smollm");
        let mut gpt2 = tokenizer(json!([]), false);
        gpt2["pre_tokenizer"] = byte_level(true);
        assert_eq!(id(&gpt2), "gpt-2");
        let contracted = |alternative: &str| format!("{alternative}{CONTRACTIONS}?");
        let gpt4o = [
            &contracted(CAPITALIZED),
            &contracted(UPPERCASE),
            &TEKKEN_FILE[CAPITALIZED.len() + UPPERCASE.len() + 2..],
        ]
        .map(String::from)
        .join("|")
        .replace(r"\p{N}|", r"\p{N}{1,3}|");
        let mut removed = split_by(&gpt4o);
        (removed["behavior"], removed["invert"]) = (json!("Removed"), json!(true));
        assert_eq!(id(&tokenizer(json!([removed, bytes]), false)), "gpt-4o");
    }

    #[test]
    fn other_spellings_of_the_same_cuts_are_recognised() {
        let respelled = LLAMA3_FILE.replace(CONTRACTIONS, SPELLINGS[0].0).replace(r"[\r\n]+|", r"[\r\n]|");
        assert_ne!(respelled, LLAMA3_FILE);
        assert_eq!(id(&tokenizer(json!([split_by(&respelled), byte_level(false)]), true)), "llama-bpe");
    }

    #[test]
    fn every_row_is_recognised_from_its_own_json() {
        for row in &PRE_TOKENIZERS {
            let file =
                json!({"pre_tokenizer": row.to_json(), "model": {"ignore_merges": row.ignores_merges()}});
            assert_eq!(id(&file), row.id);
            assert!(row.aliases.iter().chain([&row.id]).all(|id| by_id(id).unwrap().id == row.id));
        }
    }

    #[test]
    fn unknown_rules_are_refused_by_name() {
        let error = |tokenizer: &Value| recognise(tokenizer).err().unwrap().to_string();
        let cased = LLAMA3_FILE.replace(CONTRACTIONS, "(?:'s|'t)");
        let message = error(&tokenizer(json!([split_by(&cased), byte_level(false)]), true));
        assert!(message.contains("`(?:'s|'t)` (unknown) or `[^\\r\\n\\p{L}\\p{N}]?\\p{L}+` or"), "{message}");
        assert!(message.contains("`qwen2`"), "{message}");
        let message = error(&tokenizer(json!([byte_level(true)]), true));
        assert!(message.contains("gpt-2 with `ignore_merges` true"), "{message}");
        let mut prefixed = byte_level(true);
        prefixed["add_prefix_space"] = json!(true);
        assert!(error(&tokenizer(json!([prefixed]), false)).contains("add_prefix_space"));
        assert!(error(&tokenizer(json!([split_by("x")]), false)).contains("ends in `ByteLevel`"));
        let whitespace = json!({"type": "Whitespace"});
        assert!(error(&tokenizer(json!([whitespace, byte_level(true)]), false)).contains("Whitespace"));
        let mut lowercase = tokenizer(json!([byte_level(true)]), false);
        lowercase["normalizer"] = json!({"type": "Lowercase"});
        assert!(error(&lowercase).contains("Lowercase"));
        assert!(by_id("gpt-5").err().unwrap().to_string().contains("`gpt-5`"));
    }
}
