//! Code of others on files of strangers: what panics there comes back as an error.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

use anyhow::{Result, anyhow};

thread_local! {
    /// Whether a panic on this thread will be caught and told as an error.
    static GUARDED: Cell<bool> = const { Cell::new(false) };
}

/// Returns what `work` does. A panic in it becomes an error that names `library`, and is not printed.
pub fn guarded<T>(library: &str, work: impl FnOnce() -> T) -> Result<T> {
    static SILENCE: Once = Once::new();
    SILENCE.call_once(|| {
        let print = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !GUARDED.get() {
                print(info);
            }
        }));
    });
    let outer = GUARDED.replace(true);
    // Nothing that `work` may leave half changed is used again: every caller drops it with the error.
    let done = panic::catch_unwind(AssertUnwindSafe(work));
    GUARDED.set(outer);
    done.map_err(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("it does not say why");
        anyhow!("{library} broke down on this file ({text}); it is damaged or hostile: download it again")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_that_names_the_library() {
        let empty: &[u8] = &[];
        let error = guarded("a library", || empty[std::hint::black_box(3)]).unwrap_err().to_string();
        assert!(error.contains("a library") && error.contains("index out of bounds"), "{error}");
        assert_eq!(guarded("a library", || 7).unwrap(), 7);
    }
}
