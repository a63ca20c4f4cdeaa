//! The hub, stood in for by a local HTTP server: files, redirects, error codes, a dropped connection.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use quant::hub::{self, Hub};
use quant::output::Printer;
use serde_json::json;
use sha2::{Digest, Sha256};

const ID: &str = "acme/tiny";
const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one model at one commit. Large files are redirected to a content server, as the real one does.
#[derive(Default)]
struct Server {
    files: BTreeMap<String, Vec<u8>>,
    /// Answered to every request instead, if set.
    status: Option<u16>,
    /// Bytes after which the next download of a file breaks off.
    break_after: Option<(String, usize)>,
    /// (request line, `Range`, `Authorization`) of each request.
    log: Vec<(String, String, String)>,
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Server {
    /// Serves on a free port, and returns the address.
    fn start(self) -> (String, Arc<Mutex<Server>>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let server = Arc::new(Mutex::new(self));
        let (shared, address) = (server.clone(), endpoint.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (shared, address) = (shared.clone(), address.clone());
                thread::spawn(move || answer(stream.unwrap(), &shared, &address));
            }
        });
        (endpoint, server)
    }
}

/// Answers one request and closes the connection.
fn answer(stream: TcpStream, server: &Mutex<Server>, endpoint: &str) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let request = lines.next()?.ok()?;
    let (mut range, mut token) = (String::new(), String::new());
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        let (name, value) = line.split_once(": ")?;
        match name.to_ascii_lowercase().as_str() {
            "range" => range = value.to_string(),
            "authorization" => token = value.to_string(),
            _ => {}
        }
    }
    let path = request.split(' ').nth(1)?.to_string();
    let mut server = server.lock().unwrap();
    server.log.push((path.clone(), range.clone(), token));
    if let Some(status) = server.status {
        return send(stream, &format!("{status} Bad"), &[], b"{}", 2);
    }
    if path.starts_with(&format!("/api/models/{ID}/revision/main")) {
        let files: Vec<_> = server
            .files
            .iter()
            .map(|(name, bytes)| json!({"rfilename": name, "size": bytes.len()}))
            .collect();
        let body = json!({"sha": SHA, "siblings": files}).to_string();
        return send(stream, "200 OK", &[], body.as_bytes(), body.len());
    }
    let name = path.rsplit('/').next()?.to_string();
    let Some(bytes) = server.files.get(&name).cloned() else {
        return send(stream, "404 Not Found", &[], b"", 0);
    };
    let large = name.ends_with(".safetensors");
    if path.starts_with(&format!("/{ID}/resolve/{SHA}/")) && large {
        let headers = [
            format!("Location: {endpoint}/content/{name}"),
            format!("X-Linked-Etag: \"{}\"", sha256(&bytes)),
            format!("X-Repo-Commit: {SHA}"),
        ];
        return send(stream, "302 Found", &headers, b"", 0);
    }
    let (first, last) = range.strip_prefix("bytes=")?.split_once('-')?;
    let first: usize = first.parse().ok()?;
    let end = last.parse::<usize>().map_or(bytes.len(), |last| (last + 1).min(bytes.len()));
    let headers = [
        format!("Content-Range: bytes {first}-{}/{}", end - 1, bytes.len()),
        format!("ETag: \"{}\"", &sha256(&bytes)[..40]),
        format!("X-Repo-Commit: {SHA}"),
    ];
    let sent = match &server.break_after {
        Some((broken, after)) if *broken == name && end - first > *after => first..first + after,
        _ => first..end,
    };
    if sent.end < end {
        server.break_after = None;
    }
    send(stream, "206 Partial Content", &headers, &bytes[sent], end - first)
}

/// Sends `body` under a promise of `length` bytes, and closes.
fn send(mut stream: TcpStream, status: &str, headers: &[String], body: &[u8], length: usize) -> Option<()> {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let head = format!("HTTP/1.1 {status}\r\nConnection: close\r\nContent-Length: {length}\r\n{headers}\r\n");
    stream.write_all(head.as_bytes()).ok()?;
    stream.write_all(body).ok()
}

/// A repository as they are: weights of several kinds, of which the index names two.
fn model() -> Server {
    let index = json!({"weight_map": {
        "a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors",
    }});
    let files = [
        ("config.json", "{}".into()),
        ("tokenizer.json", vec![b't'; 1000]),
        ("chat_template.jinja", b"{{ messages }}".to_vec()),
        ("model.safetensors.index.json", index.to_string().into_bytes()),
        ("model-00001-of-00002.safetensors", vec![1; 300_000]),
        ("model-00002-of-00002.safetensors", vec![2; 5000]),
        ("consolidated.safetensors", vec![3; 10]),
        ("pytorch_model.bin", vec![4; 10]),
        ("README.md", vec![5; 10]),
    ];
    let files = files.into_iter().map(|(name, bytes): (_, Vec<u8>)| (name.to_string(), bytes)).collect();
    Server { files, ..Server::default() }
}

fn hub(endpoint: &str, cache: &Path) -> Hub {
    Hub { endpoint: endpoint.to_string(), cache: cache.to_path_buf(), token: None, offline: false }
}

fn quiet() -> Printer {
    Printer::new(true, false)
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn what_a_conversion_needs_is_downloaded_once_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, server) = model().start();
    let mut hub = hub(&endpoint, dir.path());
    hub.token = Some("secret".to_string());
    let found = hub.fetch(ID, "main", quiet()).unwrap();
    assert_eq!(found.commit.as_deref(), Some(SHA));
    assert_eq!(
        names(&found.path),
        [
            "chat_template.jinja",
            "config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "tokenizer.json"
        ]
    );
    for name in names(&found.path) {
        assert_eq!(fs::read(found.path.join(&name)).unwrap(), server.lock().unwrap().files[&name], "{name}");
    }
    assert!(server.lock().unwrap().log.iter().all(|(_, _, token)| token == "Bearer secret"));

    // The second time only the commit is asked for; offline, nothing.
    server.lock().unwrap().log.clear();
    assert_eq!(hub.fetch(ID, "main", quiet()).unwrap(), found);
    assert_eq!(server.lock().unwrap().log.len(), 1);
    hub.offline = true;
    assert_eq!(hub.fetch(ID, "main", quiet()).unwrap(), found);
    assert_eq!(server.lock().unwrap().log.len(), 1);
    let error = format!("{:#}", hub.fetch(ID, "other", quiet()).unwrap_err());
    assert!(
        error.contains("`acme/tiny` at `other` is not in") && error.contains("HF_HUB_OFFLINE"),
        "{error}"
    );
}

#[test]
fn a_broken_download_goes_on_where_it_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let name = "model-00001-of-00002.safetensors";
    let (endpoint, server) = Server { break_after: Some((name.to_string(), 123_456)), ..model() }.start();
    let found = hub(&endpoint, dir.path()).fetch(ID, "main", quiet()).unwrap();
    assert_eq!(fs::read(found.path.join(name)).unwrap(), vec![1; 300_000]);
    let log = &server.lock().unwrap().log;
    let resumed: Vec<_> = log.iter().filter(|(_, range, _)| range == "bytes=123456-").collect();
    assert!(!resumed.is_empty(), "{log:?}");
}

#[test]
fn damaged_downloads_are_refused_and_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let (endpoint, server) = model().start();
    let hub = hub(&endpoint, dir.path());
    let found = hub.fetch(ID, "main", quiet()).unwrap();
    // A partial file left behind with wrong bytes is completed to a file with a wrong hash.
    let name = "model-00002-of-00002.safetensors";
    let blob = fs::canonicalize(found.path.join(name)).unwrap();
    fs::remove_file(found.path.join(name)).unwrap();
    fs::remove_file(&blob).unwrap();
    fs::write(blob.with_extension("incomplete"), [9; 100]).unwrap();
    let error = format!("{:#}", hub.fetch(ID, "main", quiet()).unwrap_err());
    assert!(error.contains(name) && error.contains("SHA-256") && error.contains("run again"), "{error}");
    assert!(!found.path.join(name).exists());
    assert_eq!(hub.fetch(ID, "main", quiet()).unwrap(), found);
    assert_eq!(fs::read(found.path.join(name)).unwrap(), server.lock().unwrap().files[name]);
}

#[test]
fn every_refusal_of_the_hub_says_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    for (status, token, parts) in [
        (401, None, ["no such public model", "HF_TOKEN"]),
        (401, Some("wrong"), ["token is not accepted", "settings/tokens"]),
        (403, None, ["accept its terms at", "HF_TOKEN"]),
        (403, Some("poor"), ["your token has no access", "accept its terms"]),
        (404, Some("t"), ["not found", "--revision"]),
        (429, None, ["too many requests", "HF_TOKEN"]),
        (500, None, ["the hub fails", "try again later"]),
        (503, Some("t"), ["status 503", "try again later"]),
        (418, None, ["status 418", "HF_ENDPOINT"]),
    ] {
        let (endpoint, _) = Server { status: Some(status), ..model() }.start();
        let mut hub = hub(&endpoint, dir.path());
        hub.token = token.map(str::to_string);
        let error = format!("{:#}", hub.fetch(ID, "main", quiet()).unwrap_err());
        for part in [endpoint.as_str(), "`acme/tiny`", &format!("status {status}"), parts[0], parts[1]] {
            assert!(error.contains(part), "wanted {part:?} in: {error}");
        }
        assert!(!error.contains("wrong"), "the token itself is never shown");
    }
    assert!(names(dir.path()).is_empty(), "nothing is left in the cache");
}

#[test]
fn a_hub_that_does_not_answer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    // Bound and closed again: nothing listens there.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let error = hub(&format!("http://{address}"), dir.path()).fetch(ID, "main", quiet()).unwrap_err();
    let error = format!("{error:#}");
    for part in [address.to_string().as_str(), "efused", "HF_ENDPOINT", "HF_HUB_OFFLINE=1"] {
        assert!(error.contains(part), "wanted {part:?} in: {error}");
    }
}

#[test]
fn repositories_without_a_model_are_refused_before_anything_large_is_fetched() {
    for (removed, part) in [
        ("config.json", "no `config.json`"),
        ("safetensors", "`pytorch_model.bin` is a pickle"),
        ("00002.safetensors", "1 of the model's files missing: `model-00002-of-00002.safetensors`"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut server = model();
        let ends =
            |name: &String| name.contains(removed) && !(removed.starts_with('0') && name.contains("00001"));
        server.files.retain(|name, _| !ends(name));
        let (endpoint, server) = server.start();
        let error = format!("{:#}", hub(&endpoint, dir.path()).fetch(ID, "main", quiet()).unwrap_err());
        assert!(error.contains(ID) && error.contains(part), "wanted {part:?} in: {error}");
        assert!(!server.lock().unwrap().log.iter().any(|(path, ..)| path.contains("content")));
    }
}

#[test]
fn paths_are_taken_as_they_are_and_typos_are_no_hub_ids() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_str().unwrap();
    assert_eq!(hub::resolve(path, None, quiet()).unwrap().path, PathBuf::from(path));
    let error = hub::resolve(path, Some("main"), quiet()).unwrap_err().to_string();
    assert!(error.contains("--revision"), "{error}");
    let error = hub::resolve("./no/such", None, quiet()).unwrap_err().to_string();
    assert!(error.contains("`./no/such`") && error.contains("org/name"), "{error}");
}
