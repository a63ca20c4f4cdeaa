//! Writes an output to the disk while it is still being made, so that its end has little to wait for.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{self, Sender};
use std::thread::JoinHandle;

/// Bytes written to a file after which they are sent to the disk: long sequential writes, a fraction of a second each.
const INTERVAL: u64 = 64 << 20;

/// A thread that waits for the disk so that no other has to.
#[derive(Debug)]
pub(super) struct Flusher {
    /// Bytes written to each file.
    written: Vec<AtomicU64>,
    sender: Sender<usize>,
    thread: JoinHandle<Result<(), (usize, io::Error)>>,
}

impl Flusher {
    /// Starts the thread.
    pub(super) fn new(files: Vec<Arc<File>>) -> Self {
        let (sender, receiver) = mpsc::channel();
        let shared = files.clone();
        // An error is told once, here or to who flushes the file at its end; `finish` passes it on.
        let flush = move |file: usize| shared[file].sync_data().map_err(|error| (file, error));
        let thread = std::thread::spawn(move || receiver.into_iter().try_for_each(flush));
        let written = files.iter().map(|_| AtomicU64::new(0)).collect();
        Flusher { written, sender, thread }
    }

    /// Counts bytes that were written to a file, and flushes it when they are many.
    pub(super) fn wrote(&self, file: usize, bytes: u64) {
        let before = self.written[file].fetch_add(bytes, Ordering::Relaxed);
        if before / INTERVAL != (before + bytes) / INTERVAL {
            // Nobody receives it after an error, which `finish` reports.
            let _ = self.sender.send(file);
        }
    }

    /// Waits until all that was sent is on the disk. Returns the first error of any flush, with its file.
    pub(super) fn finish(self) -> Result<(), (usize, io::Error)> {
        drop(self.sender);
        self.thread.join().unwrap_or_else(|_| Err((0, io::Error::other("the thread that flushes died"))))
    }
}
