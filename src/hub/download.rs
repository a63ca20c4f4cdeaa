//! One file of a hub → huggingface_hub's cache: `blobs/ETAG`, locked and resumed as `blobs/ETAG.incomplete`,
//! and a link `snapshots/COMMIT/NAME` to it (huggingface_hub 1.33, `file_download.py`).

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use indicatif::ProgressBar;
use serde::de::DeserializeOwned;
use sha2::{Digest, Sha256};
use ureq::config::RedirectAuthHeaders;
use ureq::http::Response;
use ureq::{Agent, Body};

use super::certificates;

/// Attempts in a row that bring nothing, before giving up.
const RETRIES: u32 = 5;
/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(30);
/// Redirects within the hub, to a repository's new name.
const RENAMES: usize = 5;

/// What a request comes down to when it fails.
#[derive(Debug)]
pub(super) enum Fault {
    /// The hub's refusal.
    Status(u16),
    /// No answer, or one that breaks off.
    Network(String),
    /// Another process downloads the file; its lock.
    Locked(PathBuf),
    /// The cache cannot be written.
    Disk(anyhow::Error),
}

impl From<ureq::Error> for Fault {
    fn from(error: ureq::Error) -> Self {
        match error {
            ureq::Error::StatusCode(code) => Fault::Status(code),
            ureq::Error::Json(_) => Fault::Network("the answer is no model description".to_string()),
            error => Fault::Network(error.to_string()),
        }
    }
}

impl From<anyhow::Error> for Fault {
    fn from(error: anyhow::Error) -> Self {
        Fault::Disk(error)
    }
}

/// Talks to a hub.
pub(super) struct Client {
    agent: Agent,
    token: Option<String>,
}

/// What the hub says of a file.
struct Described {
    /// Names its content.
    etag: String,
    bytes: u64,
}

impl Client {
    pub(super) fn new(token: Option<String>) -> Result<Self> {
        let config = Agent::config_builder()
            .tls_config(certificates::tls()?)
            .redirect_auth_headers(RedirectAuthHeaders::SameHost)
            .user_agent(concat!("quant/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(Some(CONNECT));
        Ok(Client { agent: config.build().into(), token })
    }

    /// Returns the answer to a request for JSON.
    pub(super) fn json<T: DeserializeOwned>(&self, url: &str) -> Result<T, Fault> {
        Ok(self.get(url, None, true)?.body_mut().read_json()?)
    }

    fn get(&self, url: &str, range: Option<&str>, follow: bool) -> Result<Response<Body>, ureq::Error> {
        let mut request = self.agent.get(url);
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if let Some(range) = range {
            request = request.header("Range", range);
        }
        match follow {
            true => request.call(),
            false => request.config().max_redirects(0).build().call(),
        }
    }

    /// Asks for a file's name in the cache and its size, which the hub knows and the content server behind it
    /// does not.
    fn describe(&self, url: &str) -> Result<Described, Fault> {
        let missing = |name: &str| Fault::Network(format!("the answer has no `{name}`"));
        let mut answer = self.get(url, Some("bytes=0-0"), false)?;
        for _ in 0..RENAMES {
            let Some(moved) = header(&answer, "location").filter(|to| to.starts_with('/')) else { break };
            answer = self.get(&format!("{}{moved}", origin(url)), Some("bytes=0-0"), false)?;
        }
        let etag = header(&answer, "x-linked-etag").or_else(|| header(&answer, "etag"));
        let etag = etag.ok_or_else(|| missing("etag"))?;
        let etag = etag.trim_start_matches("W/").trim_matches('"').to_string();
        // Becomes a file name.
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        if etag.is_empty() || !etag.chars().all(plain) {
            return Err(Fault::Network(format!("the answer's `etag` is `{etag}`, which is no hash")));
        }
        let linked = header(&answer, "x-linked-size").and_then(|size| size.parse().ok());
        let answer = match (linked, header(&answer, "location")) {
            // The token is for the hub alone.
            (None, Some(content)) if origin(&content) == origin(url) => {
                self.get(&content, Some("bytes=0-0"), true)?
            }
            (None, Some(content)) => self.agent.get(&content).header("Range", "bytes=0-0").call()?,
            _ => answer,
        };
        let ranged = || header(&answer, "content-range")?.rsplit('/').next()?.parse().ok();
        let bytes = linked.or_else(ranged).ok_or_else(|| missing("content-range"))?;
        Ok(Described { etag, bytes })
    }

    /// Downloads a file into a repository's folder of the cache and verifies it. Returns its name in the
    /// snapshot.
    pub(super) fn download(&self, url: &str, place: &Place, bar: &mut Progress) -> Result<PathBuf, Fault> {
        let Described { etag, bytes } = self.describe(url)?;
        let blob = place.repo.join("blobs").join(&etag);
        let _lock = lock(&place.locks.join(format!("{etag}.lock")))?;
        if !blob.is_file() {
            create_parent(&blob)?;
            let part = place.repo.join("blobs").join(format!("{etag}.incomplete"));
            self.complete(url, &part, bytes, bar)?;
            if let Err(fault) = verify(&part, &etag, place.bytes) {
                // The next run starts afresh.
                fs::remove_file(&part).context("the damaged download cannot be removed")?;
                return Err(Fault::Disk(fault));
            }
            fs::rename(&part, &blob).with_context(|| blob.display().to_string())?;
        }
        let name = place.repo.join("snapshots").join(place.commit).join(place.name);
        create_parent(&name)?;
        let up = "../".repeat(2 + place.name.matches('/').count());
        if name.symlink_metadata().is_ok() {
            fs::remove_file(&name).with_context(|| name.display().to_string())?;
        }
        // Some file systems know no links.
        symlink(format!("{up}blobs/{etag}"), &name)
            .or_else(|_| fs::rename(&blob, &name))
            .with_context(|| name.display().to_string())?;
        Ok(name)
    }

    /// Fetches what a partial file lacks, again and again as long as that gets on.
    fn complete(&self, url: &str, part: &Path, bytes: u64, bar: &mut Progress) -> Result<(), Fault> {
        let shown = || format!("{}: cannot be written", part.display());
        let open = OpenOptions::new().create(true).truncate(false).write(true).open(part);
        let mut file = open.with_context(shown)?;
        let mut have = file.seek(SeekFrom::End(0)).with_context(shown)?;
        if have > bytes {
            (have, _) = (0, file.set_len(0).with_context(shown)?);
        }
        bar.start(bytes, have);
        let mut failures = 0;
        while have < bytes {
            let before = have;
            let fetched = self.append(url, &mut file, &mut have, bar);
            failures = if have > before { 0 } else { failures + 1 };
            match fetched {
                Err(Fault::Status(code @ 400..=428)) => return Err(Fault::Status(code)),
                Err(fault) if failures >= RETRIES => return Err(fault),
                Err(Fault::Disk(error)) => return Err(Fault::Disk(error)),
                Err(_) => thread::sleep(Duration::from_millis(200 << failures)),
                Ok(()) if have < bytes && failures >= RETRIES => {
                    return Err(Fault::Network(format!("ends at {have} of {bytes} bytes")));
                }
                Ok(()) => {}
            }
        }
        file.sync_all().with_context(shown)?;
        Ok(())
    }

    /// Appends what comes in one answer.
    fn append(&self, url: &str, file: &mut File, have: &mut u64, bar: &mut Progress) -> Result<(), Fault> {
        let answer = self.get(url, Some(&format!("bytes={have}-")), true)?;
        if answer.status().as_u16() != 206 {
            // The server sends all of it, whatever it was asked for.
            file.set_len(0).context("the partial file")?;
            *have = 0;
        }
        file.seek(SeekFrom::Start(*have)).context("the partial file")?;
        let mut body = answer.into_body().into_reader();
        let mut buffer = vec![0; 1 << 16];
        loop {
            match body.read(&mut buffer).map_err(|error| Fault::Network(error.to_string()))? {
                0 => return Ok(()),
                n => {
                    file.write_all(&buffer[..n]).context("cannot write the download; is the disk full?")?;
                    *have += n as u64;
                    bar.0.inc(n as u64);
                }
            }
        }
    }
}

/// Where a file goes, and how long it should be.
pub(super) struct Place<'a> {
    /// `CACHE/models--org--name`.
    pub(super) repo: &'a Path,
    /// `CACHE/.locks/models--org--name`.
    pub(super) locks: &'a Path,
    pub(super) commit: &'a str,
    pub(super) name: &'a str,
    pub(super) bytes: Option<u64>,
}

/// A file's progress on standard error.
pub(super) struct Progress(pub(super) ProgressBar);

impl Progress {
    fn start(&self, bytes: u64, have: u64) {
        self.0.set_length(bytes);
        self.0.set_position(have);
    }
}

/// Returns scheme and host of an address.
fn origin(url: &str) -> &str {
    url.match_indices('/').nth(2).map_or(url, |(end, _)| &url[..end])
}

fn header(answer: &Response<Body>, name: &str) -> Option<String> {
    Some(answer.headers().get(name)?.to_str().ok()?.to_string())
}

/// Takes huggingface_hub's own lock, so that two programs do not write one file.
fn lock(path: &Path) -> Result<File, Fault> {
    create_parent(path)?;
    let open = OpenOptions::new().create(true).truncate(false).write(true).open(path);
    let file = open.with_context(|| format!("{}: cannot be written", path.display()))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(Fault::Locked(path.to_path_buf())),
        // File systems without locks.
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

fn create_parent(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder).with_context(|| format!("{}: cannot be created", folder.display()))
}

/// Compares a download with what the hub said of it: its size, and its SHA-256 where its name is one (large
/// files; others are named by a git hash).
fn verify(path: &Path, etag: &str, bytes: Option<u64>) -> Result<()> {
    let found = fs::metadata(path)?.len();
    let wanted = bytes.unwrap_or(found);
    ensure!(wanted == found, "{found} bytes came, wanted {wanted}; run again");
    if etag.len() == 64 && etag.bytes().all(|b| b.is_ascii_hexdigit()) {
        let hash = sha256(path)?;
        ensure!(hash == etag, "SHA-256 {hash} came, wanted {etag}; run again");
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
