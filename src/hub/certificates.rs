//! Which certificate authorities a hub's certificate may come from.
//!
//! `SSL_CERT_FILE`, or the names that requests and curl know, replaces all others; so does `SSL_CERT_DIR`.
//! Without them the system's list counts, which holds what an organisation added for its proxies and mirrors;
//! where the system has none, Mozilla's, which is built in.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig, TlsProvider, parse_pem};

use crate::container::text;

/// Variables that name one file of authorities, in PEM.
const FILES: [&str; 3] = ["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"];

/// Where systems keep all of theirs in one file (the list of Go's crypto/x509, root_linux.go).
const SYSTEM: [&str; 6] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/pki/tls/cacert.pem",
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",
    "/etc/ssl/cert.pem",
];

/// Returns how connections are secured.
///
/// # Errors
/// Files that the environment names and that hold no certificate.
pub(super) fn tls() -> Result<TlsConfig> {
    let named = FILES.iter().chain(&["SSL_CERT_DIR"]).find_map(|&name| {
        let value = env::var_os(name).filter(|value| !value.is_empty())?;
        Some((name, PathBuf::from(value)))
    });
    let certificates = match named {
        Some((name, path)) => {
            let found = read(&path).with_context(|| format!("`{name}`"))?;
            ensure!(!found.is_empty(), "`{name}`: {}: holds no certificate in PEM", path.display());
            found
        }
        None => SYSTEM.iter().find_map(|path| read(Path::new(path)).ok()).unwrap_or_default(),
    };
    let roots = match certificates.is_empty() {
        true => RootCerts::WebPki,
        false => RootCerts::Specific(Arc::new(certificates)),
    };
    Ok(TlsConfig::builder().provider(TlsProvider::Rustls).root_certs(roots).build())
}

/// Reads the certificates of a file, or of all files in a folder.
fn read(path: &Path) -> Result<Vec<Certificate<'static>>> {
    if !path.is_dir() {
        return of_pem(&text::read(path)?);
    }
    let mut found = Vec::new();
    for entry in fs::read_dir(path).with_context(|| format!("{}: cannot be listed", path.display()))? {
        // Other things lie there too.
        let text = fs::read_to_string(entry?.path()).unwrap_or_default();
        found.extend(of_pem(&text).unwrap_or_default());
    }
    Ok(found)
}

fn of_pem(text: &str) -> Result<Vec<Certificate<'static>>> {
    let items = parse_pem(text.as_bytes()).collect::<Result<Vec<_>, _>>()?;
    let certificates = items.into_iter().filter_map(|item| match item {
        PemItem::Certificate(certificate) => Some(certificate),
        _ => None,
    });
    Ok(certificates.collect())
}
