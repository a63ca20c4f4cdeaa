//! An output must not be what the work reads, nor hold it: replacing it would destroy the only copy.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};

use super::output::parent_of;

/// Refuses an output that is one of the inputs, under whatever name, or a folder around one.
pub fn ensure_apart<'a>(out: &Path, inputs: impl IntoIterator<Item = &'a Path>) -> Result<()> {
    let place = resolved(out);
    let inode = |path: &Path| fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
    let found = inode(out);
    for input in inputs {
        // A link to the input counts as well as what it leads to.
        let same = found.is_some() && found == inode(input);
        let within = [resolved(input), parent_resolved(input)].iter().any(|path| path.starts_with(&place));
        ensure!(
            !same && !within,
            "{}: writing it would destroy `{}`, which is read; choose another output",
            out.display(),
            input.display()
        );
    }
    Ok(())
}

/// Returns where a path leads, links followed as far as it exists.
fn resolved(path: &Path) -> PathBuf {
    path.canonicalize().unwrap_or_else(|_| parent_resolved(path))
}

/// Returns a path with links followed but in its last component.
fn parent_resolved(path: &Path) -> PathBuf {
    match path.file_name() {
        None => path.to_path_buf(),
        Some(name) => {
            let parent = parent_of(path);
            let parent = if parent == path { parent.to_path_buf() } else { resolved(parent) };
            parent.join(name)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn an_output_that_is_or_holds_an_input_is_refused_under_every_name() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("a/src/sub")).unwrap();
        fs::write(at("a/src/w.safetensors"), "w").unwrap();
        symlink(at("a/src"), at("link")).unwrap();
        symlink(at("a/src/w.safetensors"), at("w-link")).unwrap();
        fs::hard_link(at("a/src/w.safetensors"), at("hard.gguf")).unwrap();
        let [folder, file] = [at("a/src"), at("a/src/w.safetensors")];
        let refused = |out: &Path| ensure_apart(out, [folder.as_path(), &file]).is_err();
        for name in [
            "a/src",
            "a/src/",
            "a/./src/.",
            "a/src/sub/..",
            "a",
            "link",
            "link/",
            "a/src/w.safetensors",
            "w-link",
            "hard.gguf",
            "link/w.safetensors",
            ".",
        ] {
            assert!(refused(&at(name)), "{name}");
        }
        for name in ["a/src/int8", "a/src/new.gguf", "a/src-int8", "b", "b/c/d", "a/sr", "link/x.gguf"] {
            assert!(!refused(&at(name)), "{name}");
        }
        // An input that is a link itself, as in the hub's cache: neither it nor what it leads to.
        for out in ["w-link", "a/src/w.safetensors"] {
            assert!(ensure_apart(&at(out), [at("w-link").as_path()]).is_err(), "{out}");
        }
    }
}
