//! Which files of a folder or repository make a model.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::container::safetensors::Safetensors;
use crate::container::{InputFile, Located};
use crate::dialect::compressed_tensors::config::Quantization;
use crate::model::config::Config;

/// The index of a sharded checkpoint.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Side files by exact name; see also [`is_side_file`].
const SIDE_FILES: [&str; 9] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "preprocessor_config.json",
];

/// What a path holds.
pub(super) enum Kind {
    /// A GGUF file.
    Gguf,
    /// A Hugging Face folder, and the one weight file that was named, if any.
    Folder { folder: PathBuf, weights: Option<PathBuf> },
}

/// Returns what stands at a path.
pub(super) fn kind_of(path: &Path) -> Result<Kind> {
    let shown = path.display();
    let metadata = fs::metadata(path).with_context(|| {
        format!("{shown}: not found; name a model folder, a safetensors or GGUF file, or a hub id `org/name`")
    })?;
    if metadata.is_dir() {
        return Ok(Kind::Folder { folder: path.to_path_buf(), weights: None });
    }
    match path.extension().and_then(|extension| extension.to_str()) {
        Some("gguf") => Ok(Kind::Gguf),
        Some("safetensors") => {
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            let folder = parent.unwrap_or(Path::new(".")).to_path_buf();
            Ok(Kind::Folder { folder, weights: Some(path.to_path_buf()) })
        }
        _ => bail!("{shown}: wanted a folder, a `.safetensors` or a `.gguf` file"),
    }
}

/// An opened folder, tensors not yet understood.
pub(super) struct OpenedFolder {
    pub(super) config: Config,
    pub(super) config_json: String,
    /// What `quantization_config` says.
    pub(super) quantization: Option<Quantization>,
    pub(super) files: Vec<InputFile>,
    pub(super) tensors: Vec<Located>,
}

/// Opens a folder: its configuration, and the header of every weight file (or only of `weights`).
pub(super) fn open(folder: &Path, weights: Option<PathBuf>) -> Result<OpenedFolder> {
    let config_path = folder.join("config.json");
    let config_json = match fs::read_to_string(&config_path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => bail!(no_config(folder)),
        read => read.with_context(|| format!("{}: cannot be read", config_path.display()))?,
    };
    let json: Value = serde_json::from_str(&config_json)
        .with_context(|| format!("{}: no valid JSON; download it again", config_path.display()))?;
    let config = Config::from_json(&json).with_context(|| format!("{}", config_path.display()))?;
    let quantization = match json.get("quantization_config") {
        None | Some(Value::Null) => None,
        Some(json) => Some(Quantization::parse(json).with_context(|| format!("{}", config_path.display()))?),
    };
    let (paths, index) = match weights {
        Some(path) => (vec![path], None),
        None => weight_files(folder)?,
    };
    let (files, tensors) = open_files(&paths, index.as_ref())?;
    Ok(OpenedFolder { config, config_json, quantization, files, tensors })
}

fn no_config(folder: &Path) -> String {
    let shown = folder.display();
    match list(folder).unwrap_or_default().iter().find(|name| name.ends_with(".gguf")) {
        Some(name) => {
            format!("{shown}: a GGUF model is named by its file: `{}`", folder.join(name).display())
        }
        None => format!("{shown}: there is no `config.json`; copy it from the model's repository"),
    }
}

/// Which weight files of a repository make the model.
pub(crate) enum Weights {
    /// These.
    Files(Vec<String>),
    /// Those that [`INDEX`] names.
    Indexed,
}

impl Weights {
    /// Chooses among the names of a repository's files as transformers does: `model.safetensors`, else what the index
    /// says; without an index, all shards of one numbering, else all safetensors files.
    pub(crate) fn among(names: &[String]) -> Result<Self> {
        if names.iter().any(|name| name == "model.safetensors") {
            return Ok(Weights::Files(vec!["model.safetensors".to_string()]));
        }
        if names.iter().any(|name| name == INDEX) {
            return Ok(Weights::Indexed);
        }
        let plain = |name: &&String| name.ends_with(".safetensors") && !name.contains('/');
        let found: Vec<_> = names.iter().filter(plain).cloned().collect();
        if found.is_empty() {
            match names.iter().find(|name| name.ends_with(".bin") || name.ends_with(".pth")) {
                Some(name) => bail!("`{name}` is a pickle, which is not read; save the model as safetensors"),
                None => bail!("there is no `.safetensors` file; name a folder that holds the weights"),
            }
        }
        refuse_missing(expected_shards(&found), names)?;
        Ok(Weights::Files(found))
    }
}

/// The index of a sharded checkpoint: which file holds which tensor.
#[derive(Deserialize)]
pub(crate) struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Index {
    /// Reads an index file.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("{}: cannot be read", path.display()))?;
        let index = serde_json::from_str(&text);
        index.with_context(|| format!("{}: no valid index; download it again", path.display()))
    }

    /// Returns the files it names, all of which must be among `names`.
    pub(crate) fn shards(&self, names: &[String]) -> Result<Vec<String>> {
        let shards: BTreeSet<_> = self.weight_map.values().cloned().collect();
        for name in &shards {
            // An index from a stranger must not reach outside its folder.
            let plain = Path::new(name).file_name().is_some_and(|file| file == name.as_str());
            ensure!(plain, "{INDEX}: `{name}` is no file name");
        }
        let shards: Vec<_> = shards.into_iter().collect();
        refuse_missing(shards.clone(), names)?;
        Ok(shards)
    }

    /// Checks that each tensor is in the file it names; `holders` says which of `paths` holds a tensor.
    fn check(&self, holders: &BTreeMap<String, usize>, paths: &[PathBuf]) -> Result<()> {
        let holds = |name: &str, file: &str| holders.get(name).is_some_and(|&i| paths[i].ends_with(file));
        let absent = self.weight_map.iter().filter(|(name, file)| !is_buffer(name) && !holds(name, file));
        let absent: Vec<_> = absent.map(|(name, file)| format!("{name} (in {file})")).collect();
        ensure!(
            absent.is_empty(),
            "{INDEX} names {} tensors that the files do not hold: {}; download index and files again",
            absent.len(),
            some_of(&absent)
        );
        Ok(())
    }
}

/// Returns the weight files of a folder, and the index if that names them.
fn weight_files(folder: &Path) -> Result<(Vec<PathBuf>, Option<Index>)> {
    let names = list(folder)?;
    let shown = || format!("{}", folder.display());
    let (files, index) = match Weights::among(&names).with_context(shown)? {
        Weights::Files(files) => (files, None),
        Weights::Indexed => {
            let index = Index::read(&folder.join(INDEX))?;
            (index.shards(&names).with_context(shown)?, Some(index))
        }
    };
    Ok((files.into_iter().map(|name| folder.join(name)).collect(), index))
}

/// Returns all names of the numbering `NAME-00001-of-00003.safetensors` that some file follows.
fn expected_shards(found: &[String]) -> Vec<String> {
    let numbering = found.iter().find_map(|name| {
        let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
        let (stem, number) = rest.rsplit_once('-')?;
        number.parse::<usize>().ok()?;
        Some((stem, count, count.parse::<usize>().ok().filter(|&n| n <= 99_999)?))
    });
    let Some((stem, text, count)) = numbering else { return Vec::new() };
    let width = text.len();
    (1..=count).map(|number| format!("{stem}-{number:0width$}-of-{text}.safetensors")).collect()
}

fn refuse_missing(mut wanted: Vec<String>, names: &[String]) -> Result<()> {
    wanted.retain(|name| !names.contains(name));
    ensure!(
        wanted.is_empty(),
        "{} of the model's files missing: {}; download them",
        wanted.len(),
        some_of(&wanted)
    );
    Ok(())
}

/// Opens weight files; with an index, each tensor must be where it says.
fn open_files(paths: &[PathBuf], index: Option<&Index>) -> Result<(Vec<InputFile>, Vec<Located>)> {
    let (mut files, mut tensors) = (Vec::new(), Vec::new());
    let mut holders: BTreeMap<String, usize> = BTreeMap::new();
    for (number, path) in paths.iter().enumerate() {
        let opened = Safetensors::open(path, is_buffer)?;
        for tensor in opened.tensors {
            let name = tensor.spec.name.clone();
            if let Some(&other) = holders.get(&name) {
                bail!("{}: `{name}` is in `{}` too; remove one", path.display(), paths[other].display());
            }
            holders.insert(name, number);
            tensors.push(Located { file: number, ..tensor });
        }
        files.push(opened.file);
    }
    if let Some(index) = index {
        index.check(&holders, paths)?;
    }
    Ok((files, tensors))
}

/// Whether a tensor is no weight but a table that old checkpoints saved along.
fn is_buffer(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || name.ends_with(".masked_bias") || name.ends_with(".attn.bias")
}

/// Returns the paths of a folder's side files, sorted.
pub(super) fn side_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let names = list(folder)?;
    Ok(names.iter().filter(|name| is_side_file(name)).map(|name| folder.join(name)).collect())
}

/// Whether a converted model takes that file along unchanged.
pub(crate) fn is_side_file(name: &str) -> bool {
    let upper = name.to_ascii_uppercase();
    SIDE_FILES.contains(&name)
        || name.starts_with("chat_template.")
        || ["LICENSE", "LICENCE", "NOTICE", "COPYING", "USE_POLICY"]
            .iter()
            .any(|start| upper.starts_with(start))
}

/// Returns the names of a folder's files, sorted.
fn list(folder: &Path) -> Result<Vec<String>> {
    let shown = folder.display();
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("{shown}: cannot be listed"))? {
        let path = entry.with_context(|| format!("{shown}: cannot be listed"))?.path();
        if let (true, Some(name)) = (path.is_file(), path.file_name().and_then(|name| name.to_str())) {
            names.push(name.to_string());
        }
    }
    names.sort();
    Ok(names)
}

/// Returns the first few of many names for a message.
pub(super) fn some_of<T: AsRef<str>>(names: &[T]) -> String {
    const SHOWN: usize = 6;
    let mut text: Vec<_> = names.iter().take(SHOWN).map(|name| format!("`{}`", name.as_ref())).collect();
    if names.len() > SHOWN {
        text.push(format!("and {} more", names.len() - SHOWN));
    }
    text.join(", ")
}
