//! Hugging Face hub ids → a local folder.
//!
//! Files land in the cache that huggingface_hub and transformers share (`$HF_HOME/hub`), so a model that any
//! of them has downloaded is not downloaded again; hf-hub knows its layout. A download that broke off goes on where it stopped. All
//! files come from one commit. The environment is read as huggingface_hub reads it (`environment`),
//! certificates as curl does (`certificates`).

mod certificates;
mod download;
mod environment;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use serde::Deserialize;

use self::download::{Client, Fault, Place, Progress};
use crate::checkpoint::folder::{INDEX, Index, Weights, is_side_file};
use crate::container::gguf::is_gguf;
use crate::container::safetensors::is_safetensors;
use crate::output::{Printer, Unit};

/// A model found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Folder or file.
    pub path: PathBuf,
    /// Commit of a hub model.
    pub commit: Option<String>,
}

/// Returns where a model is: at a path that exists, or, for a hub id, in the cache, downloaded as far as it
/// is needed and not there. `revision` is a branch, tag or commit of a hub id (`main` unless given).
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
    let file = is_gguf(Path::new(text)) || is_safetensors(Path::new(text));
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
    /// Returns a model's folder, after downloading what it lacks: configuration, tokenizer, weights.
    pub fn fetch(&self, id: &str, revision: &str, printer: Printer) -> Result<Found> {
        let cached = self.cached(id, revision)?;
        if self.offline {
            return self.found(&cached, id, revision);
        }
        let client = Client::new(self.token.clone())?;
        let url = format!("{}/api/models/{id}/revision/{}?blobs=true", self.endpoint, escaped(revision, ""));
        let answer = client.json::<Commit>(&url);
        let commit = answer.map_err(|fault| self.explain(id, revision, fault))?;
        // Becomes a folder name.
        let plain = commit.sha.chars().all(|c| c.is_ascii_alphanumeric()) && !commit.sha.is_empty();
        ensure!(plain, "{}: `{id}`: commit `{}` is no hash; check `HF_ENDPOINT`", self.endpoint, commit.sha);
        let path = Download { hub: self, id, commit: &commit, cached: &cached, client, printer }.run()?;
        if revision != commit.sha {
            // What offline runs and other tools look the branch up by.
            let shown = || format!("{}: `refs/{revision}` of `{id}` cannot be written", self.cache.display());
            cached.create_ref(&commit.sha).with_context(shown)?;
        }
        Ok(Found { path, commit: Some(commit.sha) })
    }

    /// Returns a model's place in the cache.
    fn cached(&self, id: &str, revision: &str) -> Result<CacheRepo> {
        let inside = revision.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
        ensure!(inside, "`--revision {revision}`: wanted a branch, tag or commit");
        let repo = Repo::with_revision(id.to_string(), RepoType::Model, revision.to_string());
        Ok(Cache::new(self.cache.clone()).repo(repo))
    }

    /// Returns what the cache holds of a branch, tag or commit.
    fn found(&self, cached: &CacheRepo, id: &str, revision: &str) -> Result<Found> {
        let config =
            cached.get("config.json").unwrap_or_else(|| cached.pointer_path(revision).join("config.json"));
        let path = config.parent().filter(|_| config.is_file()).with_context(|| {
            format!(
                "`{id}` at `{revision}` is not in {}; unset `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE`",
                self.cache.display()
            )
        })?;
        let commit = path.file_name().map(|name| name.to_string_lossy().into_owned());
        Ok(Found { path: path.to_path_buf(), commit })
    }

    /// Returns one clear error with its cure.
    fn explain(&self, id: &str, what: &str, fault: Fault) -> anyhow::Error {
        let Hub { endpoint, token, .. } = self;
        let text = match (fault, token) {
            (Fault::Status(401), None) => {
                "status 401: there is no such public model; check the spelling, or set \
                `HF_TOKEN` if it is private or gated"
                    .to_string()
            }
            (Fault::Status(401), Some(_)) => format!(
                "status 401: the access token is not accepted; get one at {endpoint}/settings/tokens for `HF_TOKEN`"
            ),
            (Fault::Status(403), None) => format!(
                "status 403: access is restricted; accept its terms at {endpoint}/{id}, then set `HF_TOKEN`"
            ),
            (Fault::Status(403), Some(_)) => format!(
                "status 403: your token has no access; accept its terms at {endpoint}/{id}, or use another `HF_TOKEN`"
            ),
            (Fault::Status(404), _) => {
                "status 404: not found; check the id, `--revision` and `HF_ENDPOINT`".to_string()
            }
            (Fault::Status(429), None) => {
                "status 429: too many requests; wait some minutes, or set `HF_TOKEN`".to_string()
            }
            (Fault::Status(429), Some(_)) => {
                "status 429: too many requests; wait some minutes and try again".to_string()
            }
            (Fault::Status(code @ 500..), _) => {
                format!("status {code}: the hub fails; try again later: what is downloaded is kept")
            }
            (Fault::Status(code), _) => format!("status {code}, which was not expected; check `HF_ENDPOINT`"),
            (Fault::Network(error), _) if error.contains("certificate") => format!(
                "{error}; if a proxy or mirror signs with an authority of its own, name its PEM file in `SSL_CERT_FILE`, \
                 or add it to the system's list"
            ),
            (Fault::Network(error), _) => format!(
                "{error}; check the network and `HF_ENDPOINT` and run again: what is downloaded is kept; \
                 `HF_HUB_OFFLINE=1` uses the cache alone"
            ),
            (Fault::Locked(path), _) => {
                format!("{} is locked: another download of it is running; wait for it", path.display())
            }
            (Fault::Disk(error), _) => return error.context(format!("{endpoint}/{id}: `{what}`")),
        };
        anyhow!("{endpoint}: `{id}` ({what}): {text}")
    }
}

/// Returns a text for a URL's path, slashes kept where `kept` has them.
fn escaped(text: &str, kept: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.~".contains(c) || kept.contains(c);
    let mut buffer = [0; 4];
    let mut out = String::new();
    for c in text.chars() {
        match plain(c) {
            true => out.push(c),
            false => c.encode_utf8(&mut buffer).bytes().for_each(|byte| out += &format!("%{byte:02X}")),
        }
    }
    out
}

/// One model at one commit.
struct Download<'a> {
    hub: &'a Hub,
    id: &'a str,
    commit: &'a Commit,
    cached: &'a CacheRepo,
    client: Client,
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
        let commit = self.commit.sha.as_str();
        let path = self.cached.pointer_path(commit).join(name);
        if path.is_file() {
            return Ok(path);
        }
        let file = self.commit.siblings.iter().find(|file| file.name == name);
        let bytes = file.and_then(|file| file.size);
        let folder = Repo::model(self.id.to_string()).folder_name();
        let (repo, locks) = (self.hub.cache.join(&folder), self.hub.cache.join(".locks").join(&folder));
        let place = Place { repo: &repo, locks: &locks, commit, name, bytes };
        let url = format!("{}/{}/resolve/{commit}/{}", self.hub.endpoint, self.id, escaped(name, "/"));
        let mut bar = Progress(self.printer.bar(bytes.unwrap_or_default(), name, Unit::Bytes));
        let downloaded = self.client.download(&url, &place, &mut bar);
        bar.0.finish_and_clear();
        downloaded.map_err(|fault| self.hub.explain(self.id, name, fault))
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
