//! `quant.json`: what was asked, what it was made from, what every tensor became, and what was measured.
//!
//! The same inputs and the same version give the same bytes: no times, no host, no thread counts, no absolute paths.
//! GGUF files carry the same facts, in short, under `quant.*` ([`Manifest::gguf_keys`]).
//!
//! Every file is identified by the BLAKE3 hash of all its bytes, the source's weights included, as `b3sum` prints it.
//! SHA-256 would take longer than the conversion: on one core it reads 1.7 GB a second at best, BLAKE3 about 6.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::container::FileHash;
use crate::container::output::temporary_in;
use crate::method::solve::Outcome;
use crate::num::{Codec, Element};
use crate::scheme::{Activations, Offset, Scheme, Span};
use crate::tensor::Dtype;

/// File name in an artifact folder.
pub const FILE_NAME: &str = "quant.json";

/// `blake3:` and the hash of each file, lower-case hexadecimal, by its path within its folder.
pub type Hashes = BTreeMap<String, String>;

/// Everything an artifact says of its origin.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this program.
    pub quant_version: String,
    /// The command, as [`command_line`] writes it.
    pub command: String,
    /// What was asked: format, dialect, method, scale rule and their settings.
    pub recipe: Value,
    /// What it was made from.
    pub source: Source,
    /// The text that weighed the errors; absent for data-free methods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// What every stored tensor became, by Hugging Face name.
    pub tensors: BTreeMap<String, TensorRecord>,
    /// The files that were written, this one left out.
    pub outputs: Hashes,
    /// Files copied from the source as they were: tokenizer, chat template, generation config.
    pub side_files: Hashes,
    /// What was measured on the written bytes; absent under `--no-validate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub evaluation: Option<Evaluation>,
}

/// The checkpoint that was converted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Source {
    /// Hub id, or the last component of a local path.
    pub name: String,
    /// Hub commit, where there is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// `config.json` and the weight files.
    pub files: Hashes,
}

/// Where activation statistics came from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Calibration {
    /// File name of the text, or the name of the bundled one.
    pub name: String,
    /// Of the text's bytes; of all hashes, where there are several texts.
    pub sha256: String,
    /// The texts it is made of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub texts: Vec<CalibrationText>,
    /// Number of token windows.
    pub windows: usize,
    /// Tokens in each.
    pub n_ctx: usize,
    /// Seed that chose the windows.
    pub seed: u64,
    /// The settings codes were chosen with, and what was tried to find them.
    #[serde(default, skip_serializing_if = "Value::is_null")]
    pub settings: Value,
}

/// One text of a calibration corpus.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CalibrationText {
    /// File name.
    pub name: String,
    /// Of its bytes.
    pub sha256: String,
    /// Under which it may be used, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub licence: Option<String>,
    /// How many tokens of this model it has.
    pub tokens: usize,
}

/// How one tensor is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum TensorRecord {
    /// Codes and scales.
    Quantized {
        /// The exact variant.
        #[serde(flatten)]
        scheme: Box<SchemeRecord>,
        /// How the scales were found: a scale rule, `given` for copied ones.
        scale_rule: String,
        /// How it came out.
        #[serde(flatten)]
        outcome: Outcome,
        /// The scheme that was asked for and does not fit this tensor.
        #[serde(skip_serializing_if = "Option::is_none")]
        fallback_from: Option<String>,
    },
    /// Plain numbers.
    Kept {
        /// Number type as in safetensors.
        dtype: String,
    },
}

/// A [`Scheme`] spelled out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SchemeRecord {
    /// `mxfp4`, `int8`, `q4_k`, …
    pub scheme: String,
    /// `e2m1`, `int8`, `uint4`, …
    pub element: String,
    /// Values that share a scale: a number of columns, `row` or `tensor`.
    pub block: String,
    /// How a scale is stored: `e8m0`, `bf16`, …
    pub scale: String,
    /// Second level: span and codec, e.g. `256 f16`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outer: Option<String>,
    /// `added f16`, `subtracted u6`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<String>,
    /// What engines do to the linear's inputs, unless they leave them alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub activations: Option<String>,
}

/// The measurement that followed the conversion. Speeds are not part of it: they differ from run to run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Evaluation {
    /// `llama.cpp` or `full`.
    pub protocol: String,
    /// Window length in tokens.
    pub n_ctx: usize,
    /// Number of windows.
    pub windows: usize,
    /// File name of the text, or the name of the bundled one.
    pub text: String,
    /// Of the text's bytes.
    pub text_sha256: String,
    /// `ppl`, `delta_ppl`, `kld`, `top1`, … of the artifact against its source.
    pub metrics: BTreeMap<String, f64>,
}

impl Manifest {
    /// Returns the manifest of a conversion that is about to start.
    pub fn new(recipe: Value, source: Source) -> Self {
        Manifest {
            quant_version: env!("CARGO_PKG_VERSION").to_string(),
            command: command_line(std::env::args()),
            recipe,
            source,
            calibration: None,
            tensors: BTreeMap::new(),
            outputs: Hashes::new(),
            side_files: Hashes::new(),
            evaluation: None,
        }
    }

    /// Writes `quant.json` into a folder, in place of one that stands there.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join(FILE_NAME);
        let failed = || format!("{}: cannot be written", path.display());
        let mut file = temporary_in(folder).with_context(failed)?;
        file.write_all(self.to_json()?.as_bytes()).with_context(failed)?;
        file.persist(&path).with_context(failed)?;
        Ok(())
    }

    /// Returns the file's contents.
    pub fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    /// Parses a file's contents.
    pub fn parse(json: &str) -> Result<Self> {
        serde_json::from_str(json).with_context(|| format!("`{FILE_NAME}`"))
    }

    /// Returns the keys and string values a GGUF file carries, whose lengths are known before the first tensor is written.
    pub fn gguf_keys(&self) -> Vec<(String, String)> {
        let mut keys = vec![
            ("quant.version", self.quant_version.clone()),
            ("quant.command", self.command.clone()),
            ("quant.recipe", self.recipe.to_string()),
            ("quant.source.name", self.source.name.clone()),
            ("quant.source.blake3", combined(&self.source.files)),
        ];
        if let Some(revision) = &self.source.revision {
            keys.push(("quant.source.revision", revision.clone()));
        }
        if let Some(calibration) = &self.calibration {
            keys.push(("quant.calibration.name", calibration.name.clone()));
            keys.push(("quant.calibration.sha256", calibration.sha256.clone()));
        }
        keys.into_iter().map(|(key, value)| (key.to_string(), value)).collect()
    }
}

impl SchemeRecord {
    /// Returns the record of a scheme.
    pub fn new(scheme: &Scheme, activations: Activations) -> Self {
        let span = |span: Span| match span {
            Span::Tensor => "tensor".to_string(),
            Span::Row => "row".to_string(),
            Span::Cols(n) => n.to_string(),
        };
        SchemeRecord {
            scheme: scheme.name.to_string(),
            element: match scheme.element {
                Element::E2M1 => "e2m1".into(),
                Element::E4M3 => "e4m3".into(),
                Element::Int(bits) => format!("int{bits}"),
                Element::Uint(bits) => format!("uint{bits}"),
                Element::Table(table) => format!("table {:?}", table.values()),
            },
            block: span(scheme.group),
            scale: codec_name(scheme.scale),
            outer: scheme.outer.map(|(outer, codec)| format!("{} {}", span(outer), codec_name(codec))),
            offset: match scheme.offset {
                Offset::None => None,
                Offset::Added(codec) => Some(format!("added {}", codec_name(codec))),
                Offset::Subtracted(codec) => Some(format!("subtracted {}", codec_name(codec))),
            },
            activations: match activations {
                Activations::Full => None,
                Activations::Int8PerToken => Some("int8 per token".into()),
                Activations::Fp8PerToken => Some("e4m3 per token".into()),
                Activations::Int8PerTensor(()) => Some("int8 per tensor".into()),
            },
        }
    }
}

impl TensorRecord {
    /// Returns the record of a tensor that is not quantized.
    pub fn kept(dtype: Dtype) -> Self {
        TensorRecord::Kept { dtype: dtype.to_string() }
    }
}

fn codec_name(codec: Codec) -> String {
    format!("{codec:?}").to_lowercase()
}

/// Returns the hashes of those files of a folder, computed in parallel.
pub fn hash_files(folder: &Path, names: &[String]) -> Result<Hashes> {
    names.par_iter().map(|name| Ok((name.clone(), hash_file(&folder.join(name))?))).collect()
}

/// Returns the hash of every file of an artifact folder but `quant.json`.
pub fn hash_folder(folder: &Path) -> Result<Hashes> {
    let mut names = Vec::new();
    list(folder, "", &mut names)?;
    names.retain(|name| name != FILE_NAME);
    hash_files(folder, &names)
}

/// Adds the names of all files below a folder, its own name before each.
fn list(folder: &Path, prefix: &str, names: &mut Vec<String>) -> Result<()> {
    let failed = || format!("{}: cannot be listed", folder.display());
    for entry in fs::read_dir(folder).with_context(failed)? {
        let entry = entry.with_context(failed)?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        match entry.path().is_dir() {
            true => list(&entry.path(), &format!("{name}/"), names)?,
            false => names.push(name),
        }
    }
    Ok(())
}

/// Returns the hash of a file, `blake3:` and lower-case hexadecimal; its blocks are hashed in parallel.
pub fn hash_file(path: &Path) -> Result<String> {
    FileHash::open(path)?.finish()
}

/// One hash for several files: of the lines `b3sum` prints for them, sorted by name.
fn combined(files: &Hashes) -> String {
    let bare = |hash: &str| hash.trim_start_matches("blake3:").to_string();
    let lines: String = files.iter().map(|(name, hash)| format!("{}  {name}\n", bare(hash))).collect();
    blake3::hash(lines.as_bytes()).to_hex().to_string()
}

/// Options that do not change what is written, and whether a value follows. A test of [`crate::cli`] holds it against the
/// options there are.
pub(crate) const SILENT: [(&str, bool); 19] = [
    ("--threads", true),
    ("--out", true),
    ("-o", true),
    ("--json", true),
    ("--force", false),
    ("--dry-run", false),
    ("--no-validate", false),
    ("--text", true),
    ("--ctx", true),
    ("--windows", true),
    ("--protocol", true),
    ("--quiet", false),
    ("-q", false),
    ("--verbose", false),
    ("-v", false),
    ("--revision", true),
    ("--fresh", false),
    ("--vram", true),
    ("--ram", true),
];

/// Returns the command that makes these bytes: options that change nothing in them are left out (the hub revision is
/// recorded as the commit it stood for), and a path is its last component, so that folders of one machine do not leak
/// into another's hashes.
pub fn command_line(arguments: impl IntoIterator<Item = String>) -> String {
    let mut words = vec!["quant".to_string()];
    let mut arguments = arguments.into_iter().skip(1);
    while let Some(argument) = arguments.next() {
        let (option, inline) = match argument.split_once('=') {
            Some((option, value)) if option.starts_with('-') => (option, Some(value)),
            _ => (argument.as_str(), None),
        };
        if let Some((_, takes_value)) = SILENT.iter().find(|(name, _)| *name == option) {
            if *takes_value && inline.is_none() {
                arguments.next();
            }
            continue;
        }
        words.push(match inline {
            Some(value) => format!("{option}={}", without_folders(value)),
            None => without_folders(&argument).to_string(),
        });
    }
    words.join(" ")
}

/// Returns a path's last component, and anything else whole: hub ids (`owner/name`) are neither absolute nor dotted.
pub fn without_folders(word: &str) -> &str {
    let is_path = ["/", "./", "../", "~/"].iter().any(|start| word.starts_with(start));
    match Path::new(word).file_name().and_then(|name| name.to_str()) {
        Some(name) if is_path => name,
        _ => word,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scheme::schemes::{INT8, MXFP4, Q4_K, int8_grouped};

    fn manifest() -> Manifest {
        let quantized = |scheme, activations| TensorRecord::Quantized {
            scheme: Box::new(SchemeRecord::new(&scheme, activations)),
            scale_rule: "search".into(),
            outcome: Outcome { error: 0.0125, ..Outcome::default() },
            fallback_from: None,
        };
        let hashes = |names: &[&str]| names.iter().map(|name| (name.to_string(), "ab".repeat(32))).collect();
        Manifest {
            quant_version: "0.1.0".into(),
            command: "quant convert tiny-llama --format mxfp4".into(),
            recipe: serde_json::json!({"format": "mxfp4", "dialect": "compressed-tensors", "method": "rtn"}),
            source: Source {
                name: "tiny-llama".into(),
                revision: None,
                files: hashes(&["config.json", "model.safetensors"]),
            },
            calibration: None,
            tensors: [
                ("b.weight".to_string(), quantized(MXFP4, Activations::Full)),
                ("a.weight".to_string(), TensorRecord::kept(Dtype::BF16)),
                ("c.weight".to_string(), quantized(INT8, Activations::Int8PerToken)),
            ]
            .into(),
            outputs: hashes(&["model.safetensors"]),
            side_files: hashes(&["tokenizer.json"]),
            evaluation: None,
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let written = manifest();
        let json = written.to_json().unwrap();
        assert_eq!(Manifest::parse(&json).unwrap(), written);
        assert!(!json.contains("null"), "absent facts are absent: {json}");
    }

    #[test]
    fn variants_are_spelled_out() {
        let spelled = |scheme: Scheme| {
            let record = SchemeRecord::new(&scheme, Activations::Full);
            format!(
                "{} {} {} {:?} {:?}",
                record.element, record.block, record.scale, record.outer, record.offset
            )
        };
        assert_eq!(spelled(MXFP4), "e2m1 32 e8m0 None None");
        assert_eq!(spelled(INT8), "int8 row bf16 None None");
        assert_eq!(spelled(int8_grouped(128)), "int8 128 bf16 None None");
        assert_eq!(spelled(Q4_K), r#"uint4 32 u6 Some("256 f16") Some("subtracted u6")"#);
    }

    #[test]
    fn commands_that_write_the_same_bytes_read_the_same() {
        let line = |words: &str| command_line(words.split(' ').map(String::from));
        let wanted = "quant convert tiny-llama --format mxfp4 --calib text.txt";
        for words in [
            "/usr/bin/quant convert /models/tiny-llama --format mxfp4 --calib ./text.txt",
            "quant convert ../tiny-llama/ --threads 8 --format mxfp4 -o /tmp/out --calib text.txt --force -q",
            "quant convert tiny-llama --format mxfp4 --threads=2 --out=x --calib ~/a/text.txt --json - --no-validate",
        ] {
            assert_eq!(line(words), wanted);
        }
        assert_eq!(
            line("quant convert owner/name --format=q8_0 --revision main"),
            "quant convert owner/name --format=q8_0"
        );
        assert_eq!(line("quant convert m --calib=/a/b.txt"), "quant convert m --calib=b.txt");
    }

    #[test]
    fn gguf_files_name_the_source_by_one_hash() {
        let keys: BTreeMap<_, _> = manifest().gguf_keys().into_iter().collect();
        assert_eq!(
            keys["quant.recipe"],
            r#"{"format":"mxfp4","dialect":"compressed-tensors","method":"rtn"}"#
        );
        assert!(!keys.contains_key("quant.source.revision"));
        let mut other = manifest();
        other.source.files.insert("model.safetensors".into(), "cd".repeat(32));
        assert_ne!(keys["quant.source.blake3"], combined(&other.source.files));
    }

    #[test]
    fn files_hash_as_b3sum_does() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("a"), "").unwrap();
        // test_vectors.json of the BLAKE3 repository, input length 0, first 32 bytes.
        let wanted = "blake3:af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262";
        assert_eq!(hash_files(folder.path(), &["a".into()]).unwrap()["a"], wanted);
        let error = hash_files(folder.path(), &["b".into()]).unwrap_err().to_string();
        assert!(error.ends_with("b: cannot be read to hash it"), "{error}");
    }
}
