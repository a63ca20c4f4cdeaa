//! The baseline's last hidden states on disk, so that it runs once for any number of artifacts, today or next week, and need
//! not lie in memory beside them.
//!
//! A file holds F32 little-endian `[windows · scored positions, hidden]` and is called after the SHA-256 of everything the
//! states depend on: the model's bytes, the text, the windows, the device and its precision. The folder stays below
//! [`LIMIT`]; what was written first goes first.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

use super::samples::Samples;
use super::walk::{Work, groups};
use super::{Schedule, Subject, Text, check_fits};
use crate::backend::Backend;
use crate::backend::parked::{Parked, Room};
use crate::container::output::temporary_in;
use crate::model::layers::{Held, Layers};

/// Most bytes that a folder of states holds: an 8B model's states for a million scored positions.
pub const LIMIT: u64 = 16_000_000_000;

/// A folder of states.
pub struct Cache {
    folder: PathBuf,
    limit: u64,
}

/// The stored states of one baseline on one text.
pub struct States {
    path: PathBuf,
    file: File,
    cols: usize,
}

impl Cache {
    /// Opens a folder, and makes it where there is none.
    pub fn open(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("{}: cannot be made", folder.display()))?;
        Ok(Cache { folder: folder.to_path_buf(), limit: LIMIT })
    }

    /// Returns what the states of a baseline are stored under. `model_hash` is that of all its bytes.
    pub fn key(model_hash: &str, text: &Text, device: &str) -> Result<String> {
        let tokens: Vec<u8> = text.tokens.iter().flat_map(|id| id.to_le_bytes()).collect();
        let hash = Sha256::new()
            .chain_update(b"quant states 1\n")
            .chain_update(format!("{model_hash}\n{device}\n{}\n", serde_json::to_string(&text.protocol)?))
            .chain_update(&tokens)
            .finalize();
        Ok(hash.iter().take(16).map(|byte| format!("{byte:02x}")).collect())
    }

    /// Returns states of `cols` columns that were stored under that key, if they are there and whole.
    pub fn find(&self, key: &str, text: &Text, cols: usize) -> Result<Option<States>> {
        let path = self.path(key);
        let Ok(file) = File::open(&path) else { return Ok(None) };
        let length = file.metadata().with_context(|| format!("{}: cannot be read", path.display()))?.len();
        let wanted = bytes(text, cols);
        ensure!(
            length == wanted,
            "{}: {length} bytes; wanted {wanted}; it was cut short, delete it",
            path.display()
        );
        Ok(Some(States { path, file, cols }))
    }

    /// Runs a baseline and stores its states.
    ///
    /// # Errors
    /// States larger than the folder may grow, a full disk, and whatever running the model refuses.
    pub fn record<B: Backend, M: Layers<B>>(
        &self,
        key: &str,
        (backend, schedule): (&B, Schedule),
        baseline: &Subject<M>,
        text: &Text,
        progress: &dyn Fn(usize),
    ) -> Result<States> {
        let cols = baseline.model.config().hidden_size;
        let wanted = bytes(text, cols);
        ensure!(
            wanted <= self.limit,
            "the baseline's states take {wanted} bytes, more than a cache may hold ({}); use fewer `--windows`, or \
             leave `--chunks-cache` out",
            self.limit
        );
        self.make_room(wanted)?;
        check_fits(baseline.model.config(), text)?;
        let context = || format!("{}: cannot be written", self.folder.display());
        let mut out = BufWriter::new(temporary_in(&self.folder).with_context(context)?);
        let mut samples = Samples::new(text.protocol.scored().len(), false);
        for group in groups(schedule, text) {
            let work = Work { backend, subject: baseline, protocol: &text.protocol, group: &group };
            let hidden = work.hidden(Room::new(schedule.room), &mut samples, progress)?;
            // Its losses are not kept, but must be finite.
            work.score(&hidden, &mut samples)?;
            for hidden in &hidden {
                for value in backend.read(hidden.get(backend)?.as_ref())? {
                    out.write_all(&value.to_le_bytes()).with_context(context)?;
                }
            }
        }
        let path = self.path(key);
        let temporary = out.into_inner().map_err(|error| error.into_error()).with_context(context)?;
        let file = temporary.persist(&path).map_err(|error| error.error).with_context(context)?;
        // Written for reading back at once: the handle that wrote cannot read.
        drop(file);
        self.find(key, text, cols)?.with_context(|| format!("{}: vanished", path.display()))
    }

    /// Deletes the oldest states until `more` bytes fit.
    fn make_room(&self, more: u64) -> Result<()> {
        let context = || format!("{}: cannot be read", self.folder.display());
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.folder).with_context(context)? {
            let path = entry.with_context(context)?.path();
            if path.extension().is_some_and(|extension| extension == EXTENSION) {
                let metadata = fs::metadata(&path).with_context(context)?;
                files.push((metadata.modified().with_context(context)?, metadata.len(), path));
            }
        }
        files.sort();
        let mut total: u64 = files.iter().map(|(_, length, _)| length).sum();
        for (_, length, path) in files {
            if total + more <= self.limit {
                break;
            }
            fs::remove_file(&path).with_context(|| format!("{}: cannot be deleted", path.display()))?;
            total -= length;
        }
        Ok(())
    }

    fn path(&self, key: &str) -> PathBuf {
        self.folder.join(key).with_extension(EXTENSION)
    }
}

const EXTENSION: &str = "states";

fn bytes(text: &Text, cols: usize) -> u64 {
    (text.protocol.windows * text.protocol.scored().len() * cols * 4) as u64
}

impl States {
    /// Returns the states of some windows `[windows · per_window, cols]` on the device.
    fn read<B: Backend>(&self, backend: &B, windows: Range<usize>, per_window: usize) -> Result<B::Tensor> {
        let rows = windows.len() * per_window;
        let mut bytes = vec![0; rows * self.cols * 4];
        let start = (windows.start * per_window * self.cols * 4) as u64;
        self.file
            .read_exact_at(&mut bytes, start)
            .with_context(|| format!("{}: cannot be read", self.path.display()))?;
        let values: Vec<f32> = bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
        backend.tensor(rows, self.cols, &values)
    }
}

/// Returns a baseline's head.
pub type Head<'a, B> = dyn Fn() -> Result<Held<'a, <B as Backend>::Weight>> + 'a;

/// Runs a model against stored states, as [`super::run`] does against a live baseline, of which only the head is needed.
///
/// # Errors
/// As [`super::run`].
pub fn run<B: Backend, M: Layers<B>>(
    (backend, schedule): (&B, Schedule),
    (states, head): (&States, &Head<B>),
    subject: &Subject<M>,
    text: &Text,
    progress: &dyn Fn(usize),
) -> Result<Samples> {
    check_fits(subject.model.config(), text).with_context(|| subject.name.clone())?;
    let per_window = text.protocol.scored().len();
    let mut samples = Samples::new(per_window, true);
    for group in groups(schedule, text) {
        let work = Work { backend, subject, protocol: &text.protocol, group: &group };
        let hidden = work.hidden(Room::new(schedule.room), &mut samples, progress)?;
        let head = head()?;
        for (hidden, pass) in hidden.iter().zip(&group) {
            let reference = states.read(backend, pass.windows.clone(), per_window)?;
            let reference = [Parked::Device(reference)];
            let work = Work { group: std::slice::from_ref(pass), ..work };
            work.compare(&reference, &head, std::slice::from_ref(hidden), &mut samples)?;
        }
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{model, subject, text, tokens};
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::eval::{self, Scored};

    #[test]
    fn stored_states_give_the_numbers_of_a_live_baseline() {
        let (base, other) = (model("qwen3"), model("mistral"));
        let (base, other) = (subject("base", &base), subject("other", &other));
        let text = text(Scored::SecondHalf, tokens());
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(&folder.path().join("states")).unwrap();
        let key = Cache::key("abc", &text, "cpu").unwrap();
        assert!(cache.find(&key, &text, base.model.config.hidden_size).unwrap().is_none());
        let on = (&Cpu, Schedule { pass_tokens: 32, group_tokens: 64, room: Some(0) });
        cache.record(&key, on, &base, &text, &|_| ()).unwrap();
        let states = cache.find(&key, &text, base.model.config.hidden_size).unwrap().unwrap();
        let head = || Ok(Held::Lent(base.model.head()));
        let stored = run(on, (&states, &head), &other, &text, &|_| ()).unwrap();
        let live = eval::run(&Cpu, Schedule::resident(&Cpu), Some(&base), &[other], &text, &|_| ()).unwrap();
        assert_eq!(stored.measures(), live[1].measures());
        assert_eq!(stored.of_baseline().measures(), live[0].measures());
    }

    #[test]
    fn keys_depend_on_model_text_windows_and_device() {
        let text = text(Scored::All, tokens());
        let mut fewer = text.clone();
        fewer.protocol.windows -= 1;
        let mut other = text.clone();
        other.tokens[3] ^= 1;
        let keys =
            [("a", &text, "x"), ("b", &text, "x"), ("a", &text, "y"), ("a", &fewer, "x"), ("a", &other, "x")]
                .map(|(model, text, device)| Cache::key(model, text, device).unwrap());
        for (at, key) in keys.iter().enumerate() {
            assert_eq!(keys.iter().position(|other| other == key), Some(at));
        }
    }

    #[test]
    fn a_cache_stays_below_its_limit_and_what_is_cut_short_is_refused() {
        let base = model("qwen3");
        let base = subject("base", &base);
        let text = text(Scored::SecondHalf, tokens());
        let cols = base.model.config.hidden_size;
        let folder = tempfile::tempdir().unwrap();
        let mut cache = Cache::open(folder.path()).unwrap();
        let on = (&Cpu, Schedule::resident(&Cpu));
        cache.limit = 2 * bytes(&text, cols);
        for key in ["a", "b", "c"] {
            cache.record(key, on, &base, &text, &|_| ()).unwrap();
        }
        let there = ["a", "b", "c"].map(|key| cache.find(key, &text, cols).unwrap().is_some());
        assert_eq!(there.iter().filter(|there| **there).count(), 2);
        assert!(there[2]);
        File::options().write(true).open(cache.path("c")).unwrap().set_len(8).unwrap();
        assert!(cache.find("c", &text, cols).err().unwrap().to_string().contains("8 bytes"));
        cache.limit = 8;
        let refusal = cache.record("d", on, &base, &text, &|_| ()).err().unwrap().to_string();
        assert!(refusal.contains("fewer `--windows`"), "{refusal}");
    }
}
