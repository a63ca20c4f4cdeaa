//! Calibration text as a first-class object: where it is from, its hash, and the token windows drawn from it.
//!
//! Plain text is one document. JSON lines hold one document each: `text`, or `messages` of a conversation, which the
//! model's own chat template renders. Documents are joined by an empty line, tokenised whole and cut into
//! non-overlapping windows, as evaluation cuts its text.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::container::text;

/// How the names of files of JSON lines end.
const JSON_LINES: [&str; 3] = ["jsonl", "ndjson", "json"];

/// A text that comes with the program; provenance in `calib-data/README.md`.
#[derive(Clone, Copy, Debug)]
pub struct Bundled {
    /// File name in `calib-data/`.
    pub name: &'static str,
    /// Under which it may be used.
    pub licence: &'static str,
    content: &'static str,
}

const GENERAL: Bundled = Bundled {
    name: "general.txt",
    licence: "MIT, Apache-2.0, PSF-2.0, public domain",
    content: include_str!("../../calib-data/general.txt"),
};
const CHAT: Bundled = Bundled {
    name: "chat.jsonl",
    licence: "Apache-2.0",
    content: include_str!("../../calib-data/chat.jsonl"),
};
const LANGUAGES: Bundled = Bundled {
    name: "languages.txt",
    licence: "Apache-2.0",
    content: include_str!("../../calib-data/languages.txt"),
};

/// A named selection of the bundled texts: (what users type after `--calib`, what it holds).
pub const MIXES: [(&str, &[Bundled]); 4] = [
    ("default", &[GENERAL, CHAT, LANGUAGES]),
    ("general", &[GENERAL]),
    ("chat", &[CHAT]),
    ("languages", &[LANGUAGES]),
];

/// Words in a row that must agree before two texts are said to overlap (as in GPT-3's contamination check,
/// arXiv 2005.14165, appendix C).
const SHINGLE: usize = 13;

/// Renders the `messages` of a conversation with the model's chat template.
pub type RenderChat<'a> = &'a dyn Fn(&Value) -> Result<String>;

/// One text of a corpus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CorpusPart {
    /// File name.
    pub name: String,
    /// SHA-256 of the file's bytes, hexadecimal.
    pub sha256: String,
    /// Under which it may be used, where that is known.
    pub licence: Option<String>,
    /// Its documents, joined by empty lines.
    pub text: String,
}

/// Calibration text with its provenance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Corpus {
    /// What reports call it: mixes and files as they were named, joined by commas.
    pub name: String,
    /// The texts, in order.
    pub parts: Vec<CorpusPart>,
}

impl Corpus {
    /// Returns the plain text of the default mix: everything but its conversations.
    pub fn bundled() -> Self {
        let parts = [GENERAL, LANGUAGES].map(|text| CorpusPart::bundled(&text, text.content.to_string()));
        Corpus { name: "default".into(), parts: parts.into() }
    }

    /// Opens mixes and files by name, in order. Conversations are rendered by the model's chat template; without one,
    /// those of a mix are left out and those of a file are refused.
    ///
    /// # Errors
    /// As [`CorpusPart::open`], and if a name is neither a mix nor a file.
    pub fn open(names: &[String], render: Option<RenderChat>) -> Result<Self> {
        let mut parts = Vec::new();
        for name in names {
            let Some((_, texts)) = MIXES.iter().find(|(mix, _)| mix == name) else {
                let path = Path::new(name);
                let mixes: Vec<_> = MIXES.iter().map(|(mix, _)| *mix).collect();
                if path.is_dir() {
                    bail!("`--calib {name}`: found a folder, wanted text files; name the files in it");
                }
                if !path.is_file() {
                    bail!("`--calib {name}`: no such file, and no mix; mixes: {}", mixes.join(", "));
                }
                parts.push(CorpusPart::open(path, render)?);
                continue;
            };
            for text in *texts {
                let content = match (text.name.ends_with(".jsonl"), render) {
                    (false, _) => text.content.to_string(),
                    (true, Some(_)) => documents(text.content, text.name, render)?.join("\n\n"),
                    (true, None) => continue,
                };
                parts.push(CorpusPart::bundled(text, content));
            }
        }
        if parts.is_empty() {
            bail!("the calibration text holds conversations only, but this model has no chat template");
        }
        Ok(Corpus { name: names.join(","), parts })
    }

    /// Whether one of its mixes holds conversations that are not among its texts.
    pub fn lacks_conversations(&self) -> bool {
        let named = |mix: &str| self.name.split(',').any(|name| name == mix);
        let texts = MIXES.iter().filter(|(mix, _)| named(mix)).flat_map(|(_, texts)| *texts);
        texts
            .filter(|text| text.name.ends_with(".jsonl"))
            .any(|text| self.parts.iter().all(|part| part.name != text.name))
    }

    /// Returns one hash for the whole: a single text's own, else that of all hashes.
    pub fn sha256(&self) -> String {
        match &self.parts[..] {
            [part] => part.sha256.clone(),
            parts => hash(parts.iter().map(|part| part.sha256.as_str()).collect::<String>().as_bytes()),
        }
    }

    /// Returns all texts, joined by empty lines.
    pub fn text(&self) -> String {
        self.parts.iter().map(|part| part.text.as_str()).collect::<Vec<_>>().join("\n\n")
    }

    /// Returns up to `tokens / context` windows of `context` tokens, each led by `bos` where the model wants one. Which
    /// windows of a longer text are drawn depends on `seed` alone; they come in the order of the text.
    ///
    /// # Errors
    /// If the text is shorter than one window.
    pub fn windows(&self, ids: &[u32], shape: WindowShape, seed: u64) -> Result<Vec<Vec<u32>>> {
        let WindowShape { context, tokens, bos } = shape;
        let body = context - bos.map_or(0, |_| 1);
        let available: Vec<&[u32]> = ids.chunks_exact(body).collect();
        if available.is_empty() {
            bail!(
                "{}: {} tokens are less than one window of {context}; use a longer text or a smaller --calib-ctx",
                self.name,
                ids.len()
            );
        }
        let mut chosen: Vec<usize> = (0..available.len()).collect();
        chosen.sort_by_key(|&index| mix(seed, index as u64));
        chosen.truncate((tokens / context).max(1));
        chosen.sort_unstable();
        let window = |index: usize| bos.iter().copied().chain(available[index].iter().copied()).collect();
        Ok(chosen.into_iter().map(window).collect())
    }

    /// Returns the share of `evaluation`'s runs of 13 words that also occur here. More than a few percent means that
    /// numbers measured on it flatter the artifact.
    pub fn overlap(&self, evaluation: &str) -> f64 {
        let known: HashSet<u64> = shingles(&self.text()).collect();
        let (mut common, mut all) = (0usize, 0usize);
        for shingle in shingles(evaluation) {
            all += 1;
            common += known.contains(&shingle) as usize;
        }
        common as f64 / all.max(1) as f64
    }
}

impl CorpusPart {
    fn bundled(text: &Bundled, content: String) -> Self {
        CorpusPart {
            name: text.name.into(),
            sha256: hash(text.content.as_bytes()),
            licence: Some(text.licence.into()),
            text: content,
        }
    }

    /// Reads a text file, or JSON lines where the name ends in `.jsonl`, `.ndjson` or `.json`. Conversations need the model's chat template.
    ///
    /// # Errors
    /// If the file cannot be read, is empty or not UTF-8, or a line is not a JSON object with `text` or `messages`.
    pub fn open(path: &Path, render: Option<RenderChat>) -> Result<Self> {
        let shown = path.display().to_string();
        let bytes = std::fs::read(path).with_context(|| format!("{shown}: cannot be read"))?;
        let sha256 = hash(&bytes);
        let text = text::decode(path, bytes)?;
        let is_lines = |end: &std::ffi::OsStr| JSON_LINES.iter().any(|name| end.eq_ignore_ascii_case(name));
        let lines = path.extension().is_some_and(is_lines);
        let text = if lines { documents(&text, &shown, render)?.join("\n\n") } else { text };
        if text.trim().is_empty() {
            bail!("{shown}: the text is empty");
        }
        let name = path.file_name().map_or(shown, |name| name.to_string_lossy().into_owned());
        Ok(CorpusPart { name, sha256, licence: None, text })
    }
}

/// How token windows are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowShape {
    /// Tokens in a window, a leading `bos` included.
    pub context: usize,
    /// Tokens wanted in all.
    pub tokens: usize,
    /// The token every window starts with.
    pub bos: Option<u32>,
}

fn documents(text: &str, name: &str, render: Option<RenderChat>) -> Result<Vec<String>> {
    let mut out = Vec::new();
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let at = || format!("{name}: line {}", index + 1);
        let value: Value = serde_json::from_str(line)
            .with_context(|| format!("{}: wanted a JSON object with `text` or `messages`", at()))?;
        if let Some(text) = value.get("text").and_then(Value::as_str) {
            out.push(text.to_string());
        } else if let Some(messages) = value.get("messages") {
            let Some(render) = render else {
                bail!(
                    "{}: has `messages`, but this model has no chat template; give documents as `text`",
                    at()
                )
            };
            out.push(render(messages).with_context(at)?);
        } else {
            bail!("{}: wanted an object with `text` or `messages`", at());
        }
    }
    Ok(out)
}

fn hash(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Hashes of every run of [`SHINGLE`] words.
fn shingles(text: &str) -> impl Iterator<Item = u64> {
    let words: Vec<u64> = text.split_whitespace().map(|word| hash_of(&word)).collect();
    let runs: Vec<u64> = words.windows(SHINGLE).map(|run| hash_of(&run)).collect();
    runs.into_iter()
}

fn hash_of(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// SplitMix64 of seed and index: a draw that depends on nothing else.
fn mix(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: WindowShape = WindowShape { context: 8, tokens: 24, bos: None };

    fn corpus(text: &str) -> Corpus {
        let part =
            CorpusPart { name: "test".into(), sha256: String::new(), licence: None, text: text.into() };
        Corpus { name: "test".into(), parts: vec![part] }
    }

    fn written(name: &str, content: &str, render: Option<RenderChat>) -> Result<Corpus> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        std::fs::write(&path, content).unwrap();
        Corpus::open(&[path.display().to_string()], render)
    }

    #[test]
    fn windows_depend_on_the_seed_alone_and_never_overlap() {
        let ids: Vec<u32> = (0..103).collect();
        let first = corpus("").windows(&ids, SHAPE, 7).unwrap();
        assert_eq!(first, corpus("").windows(&ids, SHAPE, 7).unwrap());
        assert_ne!(first, corpus("").windows(&ids, SHAPE, 8).unwrap());
        assert_eq!(first.len(), 3);
        for window in &first {
            assert_eq!((window.len(), window[0] % 8), (8, 0));
            assert!(window.windows(2).all(|pair| pair[1] == pair[0] + 1));
        }
        assert!(first.windows(2).all(|pair| pair[0] < pair[1]));
    }

    #[test]
    fn a_leading_token_is_part_of_the_window() {
        let ids: Vec<u32> = (0..14).collect();
        let windows = corpus("").windows(&ids, WindowShape { bos: Some(99), ..SHAPE }, 0).unwrap();
        assert_eq!(windows, [[99, 0, 1, 2, 3, 4, 5, 6], [99, 7, 8, 9, 10, 11, 12, 13]]);
    }

    #[test]
    fn a_text_shorter_than_a_window_is_refused() {
        let message = corpus("").windows(&[1, 2, 3], SHAPE, 0).unwrap_err().to_string();
        assert!(message.contains("--calib-ctx"), "{message}");
    }

    #[test]
    fn json_lines_give_documents_and_rendered_conversations() {
        let lines = "{\"text\": \"a\"}\n\n{\"messages\": [{\"role\": \"user\", \"content\": \"b\"}]}\n";
        let render = |messages: &Value| Ok(format!("<{}>", messages[0]["content"].as_str().unwrap()));
        assert_eq!(written("a.jsonl", lines, Some(&render)).unwrap().text(), "a\n\n<b>");
        let refused = written("a.jsonl", lines, None).unwrap_err().to_string();
        assert!(refused.contains("line 3") && refused.contains("chat template"), "{refused}");
        assert!(written("a.jsonl", "{\"txt\": 1}", None).unwrap_err().to_string().contains("line 1"));
        assert!(written("a.txt", " \n", None).is_err());
    }

    #[test]
    fn overlap_counts_shared_runs_of_words() {
        let words: Vec<String> = (0..100).map(|i| format!("w{i}")).collect();
        let text = words.join(" ");
        assert_eq!(corpus(&text).overlap(&text), 1.0);
        assert_eq!(corpus(&text).overlap(&text.replace('w', "v")), 0.0);
        let half = format!("{} {}", words[..50].join(" "), text.replace('w', "v"));
        assert!((0.2..0.4).contains(&corpus(&text).overlap(&half)));
    }

    #[test]
    fn bundled_texts_are_those_their_readme_describes() {
        let readme = include_str!("../../calib-data/README.md");
        for text in MIXES[0].1 {
            let row = readme.lines().find(|line| line.contains(&hash(text.content.as_bytes())));
            let row = row.unwrap_or_else(|| panic!("{} is another text", text.name));
            assert!(row.contains(text.name) && row.contains(&text.content.len().to_string()), "{row}");
        }
    }

    #[test]
    fn mixes_and_files_are_joined_in_order_and_unknown_names_are_refused() {
        let names = |names: &[&str]| names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
        let render = |messages: &Value| Ok(messages[0]["role"].as_str().unwrap().to_string());
        let both = Corpus::open(&names(&["languages", "chat"]), Some(&render)).unwrap();
        assert_eq!(
            (both.parts[0].name.as_str(), both.parts[1].name.as_str()),
            ("languages.txt", "chat.jsonl")
        );
        assert_eq!(both.parts[1].licence.as_deref(), Some("Apache-2.0"));
        assert_eq!(both.name, "languages,chat");
        let plain = Corpus::open(&names(&["default"]), None).unwrap();
        assert_eq!(plain.parts.len(), 2, "conversations are left out");
        assert!(plain.lacks_conversations() && !both.lacks_conversations());
        assert!(Corpus::open(&names(&["chat"]), None).is_err());
        let message = Corpus::open(&names(&["nowhere"]), None).unwrap_err().to_string();
        assert!(message.contains("mixes: default, general"), "{message}");
    }

    #[test]
    fn bundled_texts_share_little_with_the_embedded_evaluation_text() {
        // Stock phrases of documentation and manual pages: 4.9 %, far below what is warned of.
        assert!(Corpus::bundled().overlap(crate::embedded::EVAL_TEXT) < 0.05);
    }
}
