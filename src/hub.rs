//! Hugging Face hub ids → a local folder.
//!
//! Files land in the cache that huggingface_hub and transformers share (`$HF_HOME/hub`), so a model that any of them
//! has downloaded is not downloaded again. A download that broke off goes on where it stopped. All files come from one
//! commit. Environment: `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, as huggingface_hub
//! reads them.

use std::env;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail, ensure};
use hf_hub::api::Progress;
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use indicatif::ProgressBar;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::checkpoint::folder::{INDEX, Index, Weights, is_side_file};
use crate::output::{Printer, Unit};

/// Attempts to go on with a download that broke off, before giving up.
const RETRIES: usize = 5;

/// A model found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Folder or file.
    pub path: PathBuf,
    /// Commit of a hub model.
    pub commit: Option<String>,
}

/// Returns where a model is: at a path that exists, or, for a hub id, in the cache, downloaded as far as it is needed and
/// not there. `revision` is a branch, tag or commit of a hub id (`main` unless given).
///
/// # Errors
/// Neither a path nor a hub id; whatever the hub answers, with the cure.
pub fn resolve(model: &str, revision: Option<&str>, printer: Printer) -> Result<Found> {
    let path = Path::new(model);
    if path.exists() {
        ensure!(
            revision.is_none(),
            "`{model}` is a local path, and `--revision` is for hub ids; drop one of them"
        );
        return Ok(Found { path: path.to_path_buf(), commit: None });
    }
    ensure!(
        is_hub_id(model),
        "`{model}`: there is no such file or folder, and it is no hub id (`org/name`); check the spelling"
    );
    Hub::from_env()?.fetch(model, revision.unwrap_or("main"), printer)
}

/// Whether a text can be a hub id: `org/name` of letters, digits, `-`, `_` and `.`, as huggingface_hub's
/// `validate_repo_id` has it. Ids without organisation are left out: they look like mistyped folders.
fn is_hub_id(text: &str) -> bool {
    let part = |part: &str| {
        let edge = |c: char| c == '-' || c == '.';
        !part.is_empty()
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
            && !part.starts_with(edge)
            && !part.ends_with(edge)
            && !part.contains("..")
            && !part.contains("--")
    };
    let file = text.ends_with(".gguf") || text.ends_with(".safetensors");
    text.len() <= 96 && !file && text.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}

/// A hub and the cache before it.
#[derive(Clone, Debug)]
pub struct Hub {
    /// Base address, `https://huggingface.co` unless a mirror is used.
    pub endpoint: String,
    /// The folder that holds `models--org--name`.
    pub cache: PathBuf,
    /// Access token for private and gated models.
    pub token: Option<String>,
    /// Use the cache alone.
    pub offline: bool,
}

/// What the hub says of a commit.
#[derive(Deserialize)]
struct Commit {
    sha: String,
    siblings: Vec<RemoteFile>,
}

#[derive(Deserialize)]
struct RemoteFile {
    #[serde(rename = "rfilename")]
    name: String,
    size: Option<u64>,
}

impl Hub {
    /// Returns the hub that the environment describes.
    pub fn from_env() -> Result<Self> {
        let var = |name| env::var(name).ok().filter(|value| !value.is_empty());
        let home = match (var("HF_HOME"), env::home_dir()) {
            (Some(home), _) => PathBuf::from(home),
            (None, Some(home)) => home.join(".cache/huggingface"),
            (None, None) => bail!("there is no home folder for the download cache; set `HF_HOME`"),
        };
        let cache = var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let saved_token = || Cache::new(home.join("hub")).token();
        let endpoint = var("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        Ok(Hub {
            endpoint: endpoint.trim_end_matches('/').to_string(),
            cache,
            token: var("HF_TOKEN").or_else(saved_token),
            offline: var("HF_HUB_OFFLINE").is_some_and(|value| value != "0"),
        })
    }

    /// Returns a model's folder, after downloading what it lacks: configuration, tokenizer, weights.
    pub fn fetch(&self, id: &str, revision: &str, printer: Printer) -> Result<Found> {
        let cache = Cache::new(self.cache.clone());
        let branch = Repo::with_revision(id.to_string(), RepoType::Model, revision.to_string());
        if self.offline {
            let config = cache.repo(branch).get("config.json");
            let folder = config.as_deref().and_then(Path::parent).with_context(|| {
                format!("`{id}` at `{revision}` is not in {}; unset `HF_HUB_OFFLINE`", self.cache.display())
            })?;
            let commit = folder.file_name().map(|name| name.to_string_lossy().into_owned());
            return Ok(Found { path: folder.to_path_buf(), commit });
        }
        let api = self.api().with_context(|| format!("cannot use the hub at {}", self.endpoint))?;
        let commit = self.commit(&api, &branch, id, revision)?;
        let pinned = Repo::with_revision(id.to_string(), RepoType::Model, commit.sha.clone());
        let repo = api.repo(pinned.clone());
        let path = Download { hub: self, id, commit: &commit, pinned, repo, printer }.run()?;
        // What offline runs and other tools look the branch up by.
        let recorded = cache.repo(branch).create_ref(&commit.sha);
        recorded.with_context(|| format!("{}: cannot be written", self.cache.display()))?;
        Ok(Found { path, commit: Some(commit.sha) })
    }

    fn api(&self) -> Result<Api, ApiError> {
        ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_endpoint(self.endpoint.clone())
            .with_token(self.token.clone())
            .with_progress(false)
            .with_retries(RETRIES)
            .with_user_agent("quant", env!("CARGO_PKG_VERSION"))
            .build()
    }

    /// Asks which commit a revision is, and for its files.
    fn commit(&self, api: &Api, branch: &Repo, id: &str, revision: &str) -> Result<Commit> {
        let request = api.repo(branch.clone()).info_request().query("blobs", "true");
        let answer = request.call().and_then(|mut response| response.body_mut().read_json::<Commit>());
        let commit =
            answer.map_err(|error| self.explain(id, revision, &ApiError::RequestError(Box::new(error))))?;
        // Becomes a folder name.
        let plain = commit.sha.chars().all(|c| c.is_ascii_alphanumeric()) && !commit.sha.is_empty();
        ensure!(plain, "{}: `{id}`: commit `{}` is no hash; check `HF_ENDPOINT`", self.endpoint, commit.sha);
        Ok(commit)
    }

    /// Returns one clear error with its cure.
    fn explain(&self, id: &str, what: &str, error: &ApiError) -> anyhow::Error {
        let Hub { endpoint, token, .. } = self;
        let text = match (cause(error), token) {
            (Cause::Status(401), None) => {
                "status 401: there is no such public model; check the spelling, or set \
                 `HF_TOKEN` if it is private or gated"
                    .to_string()
            }
            (Cause::Status(401), Some(_)) => {
                format!(
                    "status 401: the access token is not accepted; get one at {endpoint}/settings/tokens for `HF_TOKEN`"
                )
            }
            (Cause::Status(403), None) => format!(
                "status 403: access is restricted; accept its terms at {endpoint}/{id}, then set `HF_TOKEN`"
            ),
            (Cause::Status(403), Some(_)) => {
                format!(
                    "status 403: your token has no access; accept its terms at {endpoint}/{id}, or use another `HF_TOKEN`"
                )
            }
            (Cause::Status(404), _) => {
                "status 404: not found; check the id, `--revision` and `HF_ENDPOINT`".to_string()
            }
            (Cause::Status(429), None) => {
                "status 429: too many requests; wait some minutes, or set `HF_TOKEN`".to_string()
            }
            (Cause::Status(429), Some(_)) => {
                "status 429: too many requests; wait some minutes and try again".to_string()
            }
            (Cause::Status(code @ 500..), _) => {
                format!("status {code}: the hub fails; try again later: what is downloaded is kept")
            }
            (Cause::Status(code), _) => format!("status {code}, which was not expected; check `HF_ENDPOINT`"),
            (Cause::Network(error), _) => format!(
                "{error}; check the network and `HF_ENDPOINT` and run again: what is downloaded is kept; \
                 `HF_HUB_OFFLINE=1` uses the cache alone"
            ),
            (Cause::Locked(path), _) => format!(
                "{} is locked: another download of it is running; wait for it, or delete the lock",
                path.display()
            ),
            (Cause::Other, _) => format!(
                "{error}; run again, and delete its folder in {} if that does not help",
                self.cache.display()
            ),
        };
        anyhow!("{endpoint}: `{id}` ({what}): {text}")
    }
}

/// What an error comes down to.
enum Cause<'a> {
    Status(u16),
    Network(String),
    Locked(&'a Path),
    Other,
}

fn cause(error: &ApiError) -> Cause<'_> {
    match error {
        ApiError::TooManyRetries(inner) => cause(inner),
        ApiError::LockAcquisition(path) => Cause::Locked(path),
        ApiError::IoError(error) => Cause::Network(error.to_string()),
        ApiError::RequestError(error) => match error.as_ref() {
            ureq::Error::StatusCode(code) => Cause::Status(*code),
            ureq::Error::Json(_) => Cause::Network("the answer is no model description".to_string()),
            error => Cause::Network(error.to_string()),
        },
        _ => Cause::Other,
    }
}

/// One model at one commit.
struct Download<'a> {
    hub: &'a Hub,
    id: &'a str,
    commit: &'a Commit,
    pinned: Repo,
    repo: ApiRepo,
    printer: Printer,
}

impl Download<'_> {
    /// Returns the folder once all files are there.
    fn run(&self) -> Result<PathBuf> {
        let names: Vec<String> = self.commit.siblings.iter().map(|file| file.name.clone()).collect();
        let shown = || format!("{}/{}", self.hub.endpoint, self.id);
        // Decided before anything large is fetched.
        ensure!(
            names.iter().any(|name| name == "config.json"),
            "{}: there is no `config.json`; if the repository holds GGUF files, download one and name it",
            shown()
        );
        let weights = Weights::among(&names).with_context(shown)?;
        let folder = self.file("config.json")?.parent().map(Path::to_path_buf).unwrap_or_default();
        let shards = match weights {
            Weights::Files(files) => files,
            Weights::Indexed => Index::read(&self.file(INDEX)?)?.shards(&names).with_context(shown)?,
        };
        for name in names.iter().filter(|name| is_side_file(name)).chain(&shards) {
            self.file(name)?;
        }
        Ok(folder)
    }

    /// Returns a file of the model, from the cache or downloaded and verified.
    fn file(&self, name: &str) -> Result<PathBuf> {
        if let Some(path) = Cache::new(self.hub.cache.clone()).repo(self.pinned.clone()).get(name) {
            return Ok(path);
        }
        let bar = Bar { printer: self.printer, bar: ProgressBar::hidden() };
        let downloaded = self.repo.download_with_progress(name, bar);
        let path = downloaded.map_err(|error| self.hub.explain(self.id, name, &error))?;
        let size = self.commit.siblings.iter().find(|file| file.name == name).and_then(|file| file.size);
        if let Err(fault) = verify(&path, size) {
            // Neither the name nor the bytes behind it stay, so that the next run starts afresh.
            let blob = fs::canonicalize(&path);
            fs::remove_file(&path)?;
            fs::remove_file(blob?)?;
            return Err(fault.context(format!("{}/{}: `{name}`", self.hub.endpoint, self.id)));
        }
        Ok(path)
    }
}

/// Compares a download with what the hub said of it: its size, and its SHA-256 where the cache's name for it is one
/// (large files; others are named by a git hash).
fn verify(path: &Path, size: Option<u64>) -> Result<()> {
    let blob = fs::canonicalize(path)?;
    let found = fs::metadata(&blob)?.len();
    ensure!(
        size.is_none_or(|size| size == found),
        "{found} bytes came, wanted {}; run again",
        size.unwrap_or_default()
    );
    let name = blob.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit()) {
        let hash = sha256(&blob)?;
        ensure!(hash == name, "SHA-256 {hash} came, wanted {name}; run again");
    }
    Ok(())
}

/// Returns the SHA-256 of a file, lower-case hexadecimal: the hub's name for a large file's content.
fn sha256(path: &Path) -> Result<String> {
    let (mut file, mut hasher, mut buffer) = (File::open(path)?, Sha256::new(), vec![0; 1 << 16]);
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// A file's progress on standard error.
struct Bar {
    printer: Printer,
    bar: ProgressBar,
}

impl Progress for Bar {
    fn init(&mut self, size: usize, filename: &str) {
        self.bar = self.printer.bar(size as u64, filename, Unit::Bytes);
    }

    fn update(&mut self, size: usize) {
        self.bar.inc(size as u64);
    }

    fn finish(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_told_from_paths() {
        for id in ["Qwen/Qwen3-0.6B", "meta-llama/Llama-3.2-1B", "a/b_c.d"] {
            assert!(is_hub_id(id), "{id}");
        }
        for path in
            ["model", "./a/b", "a/b/c", "/a/b", "a/", "a/../b", "~/x", "a/b.gguf", "a b/c", "a/b--c", ""]
        {
            assert!(!is_hub_id(path), "{path}");
        }
    }
}
