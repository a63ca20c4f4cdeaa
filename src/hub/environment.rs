//! The environment variables of huggingface_hub, read as it reads them (1.33: `constants.py`,
//! `utils/_auth.py`).

use std::env;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};

use super::Hub;

/// What counts as yes, in any case; everything else is no.
const TRUE: [&str; 4] = ["1", "ON", "YES", "TRUE"];

/// Looks a variable up.
pub(super) type Lookup<'a> = &'a dyn Fn(&str) -> Option<String>;

impl Hub {
    /// Returns the hub that the environment describes.
    pub fn from_env() -> Result<Self> {
        Self::from_variables(&|name| env::var(name).ok())
    }

    pub(super) fn from_variables(var: Lookup) -> Result<Self> {
        let set = |name: &str| var(name).filter(|value| !value.is_empty());
        let home = match (set("HF_HOME"), set("XDG_CACHE_HOME"), set("HOME")) {
            (Some(home), ..) => expanded(&home, var),
            (None, Some(cache), _) => expanded(&cache, var).join("huggingface"),
            (None, None, Some(home)) => PathBuf::from(home).join(".cache/huggingface"),
            (None, None, None) => env::home_dir()
                .context("there is no home folder for the download cache; set `HF_HOME`")?
                .join(".cache/huggingface"),
        };
        let cache = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE"));
        let endpoint = set("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".to_string());
        let offline = set("HF_HUB_OFFLINE").or_else(|| set("TRANSFORMERS_OFFLINE"));
        Ok(Hub {
            endpoint: endpoint.trim().trim_end_matches('/').to_string(),
            cache: cache.map_or_else(|| home.join("hub"), |cache| expanded(&cache, var)),
            token: token(&home, var),
            offline: offline.is_some_and(|value| is_true(&value)),
        })
    }
}

/// Returns the access token: of the environment, else the one that `hf auth login` saved.
fn token(home: &std::path::Path, var: Lookup) -> Option<String> {
    let set = |name: &str| var(name).filter(|value| !value.is_empty());
    if set("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(|value| is_true(&value)) {
        return None;
    }
    let given = set("HF_TOKEN").or_else(|| set("HUGGING_FACE_HUB_TOKEN"));
    given.and_then(|token| cleaned(&token)).or_else(|| {
        let path = set("HF_TOKEN_PATH").map_or_else(|| home.join("token"), |path| expanded(&path, var));
        cleaned(&fs::read_to_string(path).ok()?)
    })
}

/// Returns a token without the line ends and spaces that copying adds; `None` if nothing is left.
fn cleaned(token: &str) -> Option<String> {
    let token = token.replace(['\r', '\n'], "").trim().to_string();
    Some(token).filter(|token| !token.is_empty())
}

fn is_true(value: &str) -> bool {
    TRUE.contains(&value.to_ascii_uppercase().as_str())
}

/// Returns a path with a leading `~` and variables (`$NAME`, `${NAME}`) put in, as Python's `expanduser` and
/// `expandvars` do; unknown variables stay as they are.
fn expanded(path: &str, var: Lookup) -> PathBuf {
    let home = || var("HOME").or_else(|| Some(env::home_dir()?.to_string_lossy().into_owned()));
    let path = match path.strip_prefix('~') {
        Some(rest) if rest.is_empty() || rest.starts_with('/') => home().unwrap_or_default() + rest,
        _ => path.to_string(),
    };
    let (mut out, mut rest) = (String::new(), path.as_str());
    while let Some(at) = rest.find('$') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let (name, len) = match rest[1..].strip_prefix('{').and_then(|braced| braced.split_once('}')) {
            Some((name, _)) => (name, name.len() + 3),
            None => {
                let end = rest[1..].find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
                let name = &rest[1..end.map_or(rest.len(), |end| end + 1)];
                (name, name.len() + 1)
            }
        };
        out.push_str(var(name).as_deref().unwrap_or(&rest[..len]));
        rest = &rest[len..];
    }
    PathBuf::from(out + rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Hub {
        let find = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| value.to_string()).or_else(|| (name == "HOME").then(|| "/h".to_string()))
        };
        Hub::from_variables(&find).unwrap()
    }

    /// Values of huggingface_hub 1.33 for the same variables: `constants.HF_HUB_CACHE`, `get_token()`,
    /// `constants.HF_HUB_OFFLINE`.
    #[test]
    fn variables_mean_what_they_mean_to_huggingface_hub() {
        for (variables, cache) in [
            (&[][..], "/h/.cache/huggingface/hub"),
            (&[("XDG_CACHE_HOME", "/x")], "/x/huggingface/hub"),
            (&[("HF_HOME", "~/hf")], "/h/hf/hub"),
            (&[("HF_HOME", "~")], "/h/hub"),
            (&[("HF_HOME", "~other/hf")], "~other/hf/hub"),
            (&[("HF_HOME", "$D/hf"), ("D", "/d")], "/d/hf/hub"),
            (&[("HF_HOME", "${D}x/$NONE/$"), ("D", "/d")], "/dx/$NONE/$/hub"),
            (&[("HF_HUB_CACHE", "~/c"), ("HF_HOME", "/hf")], "/h/c"),
            (&[("HUGGINGFACE_HUB_CACHE", "/old"), ("HF_HOME", "/hf")], "/old"),
        ] {
            assert_eq!(hub(variables).cache, PathBuf::from(cache), "{variables:?}");
        }
        for (value, offline) in [
            ("1", true),
            ("true", true),
            ("Yes", true),
            ("ON", true),
            ("0", false),
            ("false", false),
            ("no", false),
            ("off", false),
            ("2", false),
            ("", false),
        ] {
            for name in ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"] {
                assert_eq!(hub(&[(name, value)]).offline, offline, "{name}={value}");
            }
        }
        let both = [("HF_HUB_OFFLINE", "0"), ("TRANSFORMERS_OFFLINE", "1")];
        assert!(!hub(&both).offline, "the newer name wins");
        assert_eq!(hub(&[("HF_ENDPOINT", "http://m/")]).endpoint, "http://m");
    }

    #[test]
    fn tokens_are_cleaned_and_come_from_the_first_place_that_has_one() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("token"), "hf_saved\n").unwrap();
        fs::write(dir.path().join("other"), "\n").unwrap();
        let home = ("HF_HOME", dir.path().to_str().unwrap());
        let other = dir.path().join("other").display().to_string();
        for (variables, token) in [
            (&[("HF_TOKEN", "hf_x\n")][..], Some("hf_x")),
            (&[("HF_TOKEN", " hf_x\r\n")], Some("hf_x")),
            (&[("HF_TOKEN", "hf\n_x")], Some("hf_x")),
            (&[("HUGGING_FACE_HUB_TOKEN", "hf_old")], Some("hf_old")),
            (&[("HF_TOKEN", "hf_x"), ("HUGGING_FACE_HUB_TOKEN", "hf_old")], Some("hf_x")),
            (&[("HF_TOKEN", " \n"), ("HUGGING_FACE_HUB_TOKEN", "hf_old"), home], Some("hf_saved")),
            (&[home], Some("hf_saved")),
            (&[("HF_TOKEN_PATH", &other), home], None),
            (&[("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1"), ("HF_TOKEN", "hf_x")], None),
        ] {
            assert_eq!(hub(variables).token.as_deref(), token, "{variables:?}");
        }
    }
}
