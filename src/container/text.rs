//! Texts and JSON files that people give, in whatever shape they come: with a byte order mark, in UTF-16, as
//! a Git LFS pointer instead of the file, as a folder or something packed.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

/// How the text file begins that Git leaves where a large file has not been fetched
/// (github.com/git-lfs/git-lfs, docs/spec.md).
const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// How files begin that are no text: (first bytes, what it is).
const BINARY: [(&[u8], &str); 8] = [
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"%PDF", "PDF"),
    (b"GGUF", "GGUF"),
    (b"\xfd7zXZ", "xz"),
];

/// Reads a text: UTF-8 or, with a byte order mark, UTF-16. The mark is no part of it; line ends stay as they
/// are.
///
/// # Errors
/// Name the file and what it is if it is no text.
pub fn read(path: &Path) -> Result<String> {
    ensure!(!path.is_dir(), "{}: found a folder, wanted a text file; name a file in it", path.display());
    let bytes = fs::read(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    decode(path, bytes)
}

/// Returns the text that a file's bytes are; see [`read`].
pub fn decode(path: &Path, bytes: Vec<u8>) -> Result<String> {
    let shown = path.display();
    refuse_pointer(path, &bytes)?;
    let wide = |from: fn([u8; 2]) -> u16| -> Result<String> {
        let (pairs, rest) = bytes[2..].as_chunks::<2>();
        let units: Vec<u16> = pairs.iter().map(|&pair| from(pair)).collect();
        let text = String::from_utf16(&units).ok().filter(|_| rest.is_empty());
        text.with_context(|| format!("{shown}: starts as UTF-16, but is damaged; save it as UTF-8"))
    };
    match &bytes[..] {
        [0xff, 0xfe, ..] => return wide(u16::from_le_bytes),
        [0xfe, 0xff, ..] => return wide(u16::from_be_bytes),
        _ => {}
    }
    if let Some((_, kind)) = BINARY.iter().find(|(start, _)| bytes.starts_with(start)) {
        bail!("{shown}: found {kind}, wanted UTF-8 text; unpack or convert it first");
    }
    let text = String::from_utf8(bytes).map_err(|error| error.utf8_error().valid_up_to());
    let text =
        text.or_else(|at| bail!("{shown}: byte {at} is no UTF-8; if it is a text, save it as UTF-8"))?;
    ensure!(!text.contains('\0'), "{shown}: holds zero bytes, so it is no text; save it as UTF-8");
    Ok(text.strip_prefix('\u{feff}').map(str::to_string).unwrap_or(text))
}

/// Reads a JSON file; `None` if there is none.
///
/// # Errors
/// Name the file and what is wrong with it.
pub fn read_json(path: &Path) -> Result<Option<Value>> {
    let shown = path.display();
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == ErrorKind::NotFound && path.symlink_metadata().is_err() => {
            return Ok(None);
        }
        read => read.with_context(|| format!("{shown}: cannot be read; is it a link that leads nowhere?"))?,
    };
    let json = serde_json::from_str(&decode(path, bytes)?);
    json.with_context(|| format!("{shown}: not valid JSON; download it again")).map(Some)
}

/// Refuses a Git LFS pointer by name.
pub fn refuse_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    ensure!(
        !bytes.starts_with(POINTER),
        "{}: a Git LFS pointer, not the file itself; run `git lfs pull` where it was cloned, or download it",
        path.display()
    );
    Ok(())
}

/// Returns the first few of many names for a message.
pub fn some_of<T: AsRef<str>>(names: &[T]) -> String {
    const SHOWN: usize = 6;
    let mut text: Vec<_> = names.iter().take(SHOWN).map(|name| format!("`{}`", name.as_ref())).collect();
    if names.len() > SHOWN {
        text.push(format!("and {} more", names.len() - SHOWN));
    }
    text.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(bytes: &[u8]) -> Result<String> {
        decode(Path::new("t.txt"), bytes.to_vec())
    }

    #[test]
    fn one_text_is_read_alike_in_every_encoding() {
        let text = "é 😀\r\nx";
        let wide = |to: fn(u16) -> [u8; 2]| -> Vec<u8> {
            ['\u{feff}']
                .into_iter()
                .chain(text.chars())
                .collect::<String>()
                .encode_utf16()
                .flat_map(to)
                .collect()
        };
        let marked = format!("\u{feff}{text}");
        for bytes in [text.as_bytes(), marked.as_bytes(), &wide(u16::to_le_bytes), &wide(u16::to_be_bytes)] {
            assert_eq!(decoded(bytes).unwrap(), text);
        }
    }

    #[test]
    fn what_is_no_text_is_refused_by_name() {
        for (bytes, word) in [
            (&b"PAR1\x15\x04"[..], "Parquet"),
            (b"\x1f\x8b\x08", "gzip"),
            (b"GGUF\x03", "GGUF"),
            (b"caf\xe9", "byte 3 is no UTF-8"),
            (b"a\0b\0", "zero bytes"),
            (b"\xff\xfea", "UTF-16"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        ] {
            let message = decoded(bytes).unwrap_err().to_string();
            assert!(message.contains(word) && message.contains("t.txt"), "{message}");
        }
        assert!(read(Path::new(".")).unwrap_err().to_string().contains("found a folder"));
    }
}
