//! Which files of a folder or repository make a model.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use super::foreign;
use crate::container::gguf::is_gguf;
use crate::container::safetensors::{Safetensors, is_safetensors};
use crate::container::text::some_of;
use crate::container::{InputFile, Located, text};
use crate::dialect::opened::Folder;
use crate::model::config::Config;

/// The index of a sharded checkpoint.
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Side files by exact name; see also [`is_side_file`].
const SIDE_FILES: [&str; 18] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "sentencepiece.bpe.model",
    "spiece.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
];
/// The folder of further chat templates, `NAME.jinja` each (transformers' `CHAT_TEMPLATE_DIR`).
const TEMPLATES: &str = "additional_chat_templates";

/// How names begin that were saved from the bare decoder, without `model.`; transformers adds it.
const BARE: [&str; 3] = ["embed_tokens.", "layers.", "norm."];

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
    if is_gguf(path) {
        return Ok(Kind::Gguf);
    }
    if is_safetensors(path) {
        return Ok(Kind::Folder { folder: parent_of(path).to_path_buf(), weights: Some(path.to_path_buf()) });
    }
    // Ollama and the hub's cache store files under their hashes.
    let file = InputFile::open(path)?;
    if file.read(0, file.len.min(4))? == *b"GGUF" {
        return Ok(Kind::Gguf);
    }
    bail!("{shown}: wanted a folder, a `.safetensors` or a GGUF file")
}

/// Opens a folder: its configuration, and the header of every weight file (or only of `weights`).
pub(super) fn open(folder: &Path, weights: Option<PathBuf>) -> Result<Folder> {
    let config_path = folder.join("config.json");
    foreign::refuse_adapter(folder)?;
    foreign::refuse_dangling(folder, "config.json")?;
    let Some(json) = text::read_json(&config_path)? else {
        bail!(foreign::no_config(folder, &list(folder).unwrap_or_default()))
    };
    let config_json = text::read(&config_path)?;
    foreign::refuse_quantized(&json).with_context(|| format!("{}", config_path.display()))?;
    let config = Config::from_json(&json).with_context(|| format!("{}", config_path.display()))?;
    let paths = match weights {
        Some(path) => shards_with(path)?,
        None => weight_files(folder)?,
    };
    let (files, tensors) = open_files(&paths)?;
    Ok(Folder { config, config_json, json, files, tensors })
}

/// Which weight files of a repository make the model.
pub(crate) enum Weights {
    /// These.
    Files(Vec<String>),
    /// Those that [`INDEX`] names.
    Indexed,
}

impl Weights {
    /// Chooses among the names of a repository's files as transformers does: `model.safetensors`, else what
    /// the index says; without an index, all shards of one numbering, else all safetensors files.
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
        // Files beside a numbering, such as `consolidated.safetensors`, hold the same model once more.
        let numbered = expected_shards(&found);
        refuse_missing(numbered.clone(), names)?;
        Ok(Weights::Files(if numbered.is_empty() { found } else { numbered }))
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
        let index = serde_json::from_str(&text::read(path)?);
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
}

/// Returns the weight files of a folder.
fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let names = list(folder)?;
    let shown = || format!("{}", folder.display());
    let files = match Weights::among(&names).with_context(shown)? {
        Weights::Files(files) => files,
        Weights::Indexed => Index::read(&folder.join(INDEX))?.shards(&names).with_context(shown)?,
    };
    files.iter().try_for_each(|name| foreign::refuse_dangling(folder, name))?;
    Ok(files.into_iter().map(|name| folder.join(name)).collect())
}

/// Returns a weight file, and the others of its numbering: as with GGUF, any part of a model names all of it.
fn shards_with(path: PathBuf) -> Result<Vec<PathBuf>> {
    let folder = parent_of(&path);
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let shards = expected_shards(&name.into_iter().collect::<Vec<_>>());
    refuse_missing(shards.clone(), &list(folder)?)
        .with_context(|| format!("{}: one shard of {}", path.display(), shards.len()))?;
    let all = shards.iter().map(|name| folder.join(name)).collect();
    Ok(if shards.is_empty() { vec![path] } else { all })
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

/// Returns the folder a file is in.
fn parent_of(path: &Path) -> &Path {
    path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
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

/// Opens weight files. An index says which files there are, not what they hold: a tensor counts wherever it
/// is, as in transformers, and one that an index names in vain is missed only if the model needs it.
fn open_files(paths: &[PathBuf]) -> Result<(Vec<InputFile>, Vec<Located>)> {
    let (mut files, mut tensors) = (Vec::new(), Vec::<Located>::new());
    let mut known: BTreeMap<String, usize> = BTreeMap::new();
    for (number, path) in paths.iter().enumerate() {
        let opened = Safetensors::open(path, is_buffer)?;
        files.push(opened.file);
        for tensor in opened.tensors {
            let mut tensor = Located { file: number, ..tensor };
            if BARE.iter().any(|start| tensor.spec.name.starts_with(start)) {
                tensor.spec.name.insert_str(0, "model.");
            }
            match known.get(&tensor.spec.name) {
                None => {
                    known.insert(tensor.spec.name.clone(), tensors.len());
                    tensors.push(tensor);
                }
                Some(&other) => {
                    let other = &tensors[other];
                    ensure!(
                        same_bytes(&files, &tensor, other)?,
                        "{}: `{}` is in `{}` too, with other values; remove one",
                        path.display(),
                        tensor.spec.name,
                        paths[other.file].display()
                    );
                }
            }
        }
    }
    Ok((files, tensors))
}

/// Whether two tensors have the same type, shape and bytes.
pub(super) fn same_bytes(files: &[InputFile], a: &Located, b: &Located) -> Result<bool> {
    const PIECE: u64 = 1 << 22;
    let bytes = a.spec.bytes();
    if (a.spec.storage, &a.spec.shape) != (b.spec.storage, &b.spec.shape) {
        return Ok(false);
    }
    for at in (0..bytes).step_by(PIECE as usize) {
        let read = |tensor: &Located| files[tensor.file].read(tensor.start + at, PIECE.min(bytes - at));
        if read(a)? != read(b)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether a tensor is no weight but a table that old checkpoints saved along.
fn is_buffer(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq") || name.ends_with(".masked_bias") || name.ends_with(".attn.bias")
}

/// Returns the names of a folder's side files, sorted, those of chat templates in a folder of their own with
/// its name.
pub(super) fn side_files(folder: &Path) -> Result<Vec<String>> {
    let mut names = list(folder)?;
    let templates = folder.join(TEMPLATES);
    if templates.is_dir() {
        names.extend(list(&templates)?.into_iter().map(|name| format!("{TEMPLATES}/{name}")));
    }
    names.retain(|name| is_side_file(name));
    names.iter().try_for_each(|name| foreign::refuse_dangling(folder, name))?;
    names.sort();
    Ok(names)
}

/// Whether a converted model takes that file along unchanged: what defines the tokenizer, processors, chat
/// templates and generation, and licences.
pub(crate) fn is_side_file(name: &str) -> bool {
    if let Some((folder, file)) = name.split_once('/') {
        return folder == TEMPLATES && file.ends_with(".jinja") && !file.contains('/');
    }
    let upper = name.to_ascii_uppercase();
    SIDE_FILES.contains(&name)
        || name.starts_with("chat_template.")
        || name.ends_with(".tiktoken")
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
        // A link that leads nowhere is a file that is missing, not a name that is not there.
        let listed = path.is_file() || !path.exists();
        if let (true, Some(name)) = (listed, path.file_name().and_then(|name| name.to_str())) {
            names.push(name.to_string());
        }
    }
    names.sort();
    Ok(names)
}
