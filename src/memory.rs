//! How much memory there is, and how much of it a run may use.

use std::fmt;
use std::fs;
use std::str::FromStr;

use anyhow::{Result, bail, ensure};

use crate::output::size;

/// What the CUDA driver, its libraries and compiled kernels take of a GPU's memory before any tensor.
pub const CUDA_OVERHEAD: u64 = 700_000_000;
/// Share of a device's memory that tensors may fill: allocators leave gaps between them.
const FILLED: f64 = 0.95;

/// A number of bytes as it is typed: `12G`, `800M` (10^9, 10^6), `12GiB` (2^30), or plain bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

impl FromStr for Bytes {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let wanted = || format!("`{text}`: wanted a size such as `12G`, `800M` or `16GiB`");
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        let factor = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1.0,
            "k" | "kb" => 1e3,
            "m" | "mb" => 1e6,
            "g" | "gb" => 1e9,
            "t" | "tb" => 1e12,
            "kib" => 1024.0,
            "mib" => 1024f64.powi(2),
            "gib" => 1024f64.powi(3),
            "tib" => 1024f64.powi(4),
            _ => bail!(wanted()),
        };
        let Ok(number) = number.parse::<f64>() else { bail!(wanted()) };
        ensure!(number > 0.0, wanted());
        Ok(Bytes((number * factor) as u64))
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&size(self.0))
    }
}

/// Limits as they were typed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Of a GPU's memory, for everything this program has there.
    pub vram: Option<Bytes>,
    /// Of the program's resident memory.
    pub ram: Option<Bytes>,
}

/// Bytes that tensors may take; `None`: nobody knows a limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget {
    /// On the device; for the CPU the same memory as `host`.
    pub device: Option<u64>,
    /// In the host's memory.
    pub host: Option<u64>,
    /// Whether the device has memory of its own.
    pub separate: bool,
}

impl Budget {
    /// Returns what may be used on a device that has `free` bytes of its own memory left, `None` for the CPU.
    ///
    /// # Errors
    /// A limit on GPU memory where there is none.
    pub fn new(limits: Limits, free: Option<u64>) -> Result<Self> {
        let own = own_bytes().unwrap_or(0);
        let host = match limits.ram {
            Some(Bytes(ram)) => Some(ram.saturating_sub(own)),
            None => available().map(|bytes| (bytes as f64 * FILLED) as u64),
        };
        let Some(free) = free else {
            ensure!(
                limits.vram.is_none(),
                "`--vram` limits a GPU's memory, but the CPU is used; give `--ram`, or `--device cuda:0`"
            );
            return Ok(Budget { device: host, host, separate: false });
        };
        let free = (free as f64 * FILLED) as u64;
        let device = match limits.vram {
            Some(Bytes(vram)) => free.min((vram.saturating_sub(CUDA_OVERHEAD) as f64 * FILLED) as u64),
            None => free,
        };
        Ok(Budget { device: Some(device), host, separate: true })
    }
}

/// Returns the memory that this machine, or the container the program runs in, has left; `None` where that cannot be told.
pub fn available() -> Option<u64> {
    let machine = meminfo(&fs::read_to_string("/proc/meminfo").ok()?)?;
    Some(container().map_or(machine, |container| machine.min(container)))
}

/// Returns the most resident memory this process ever had, bytes; `None` where that cannot be told.
pub fn peak_bytes() -> Option<u64> {
    status("VmHWM:")
}

/// Returns the resident memory of this process.
fn own_bytes() -> Option<u64> {
    status("VmRSS:")
}

fn status(key: &str) -> Option<u64> {
    kilobytes(&fs::read_to_string("/proc/self/status").ok()?, key)
}

fn meminfo(text: &str) -> Option<u64> {
    kilobytes(text, "MemAvailable:")
}

/// Returns the bytes of a line `KEY   N kB`.
fn kilobytes(text: &str, key: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key))?;
    Some(line.split_whitespace().next()?.parse::<u64>().ok()? * 1024)
}

/// Returns what a control group (version 2) leaves; the pages of files it holds can be taken back.
fn container() -> Option<u64> {
    let read = |name: &str| fs::read_to_string(format!("/sys/fs/cgroup/{name}")).ok();
    let limit: u64 = read("memory.max")?.trim().parse().ok()?;
    let used: u64 = read("memory.current")?.trim().parse().ok()?;
    let files =
        read("memory.stat")?.lines().find_map(|line| line.strip_prefix("file ")?.parse::<u64>().ok())?;
    Some(limit.saturating_sub(used.saturating_sub(files)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in
            [("12G", 12_000_000_000), ("800m", 800_000_000), ("1.5GiB", 1_610_612_736), ("7", 7)]
        {
            assert_eq!(text.parse::<Bytes>().unwrap(), Bytes(bytes), "{text}");
        }
        for text in ["", "G", "12Q", "-3G", "0G", "1.2.3M", "nanG"] {
            assert!(text.parse::<Bytes>().unwrap_err().to_string().contains("12G"), "{text}");
        }
    }

    #[test]
    fn limits_bound_what_there_is() {
        let limits =
            |vram: Option<u64>, ram: Option<u64>| Limits { vram: vram.map(Bytes), ram: ram.map(Bytes) };
        let gpu = |vram, free| Budget::new(limits(vram, None), Some(free)).unwrap().device.unwrap();
        assert_eq!(gpu(None, 1_000_000_000), 950_000_000);
        assert_eq!(gpu(Some(12_000_000_000), 80_000_000_000), 10_735_000_000);
        assert_eq!(gpu(Some(12_000_000_000), 1_000_000_000), 950_000_000);
        let cpu = Budget::new(limits(None, Some(1 << 40)), None).unwrap();
        assert!(!cpu.separate && cpu.device == cpu.host && cpu.host <= Some(1 << 40));
        assert!(Budget::new(limits(Some(1), None), None).unwrap_err().to_string().contains("`--ram`"));
    }

    #[test]
    fn this_machine_tells_its_memory() {
        assert_eq!(meminfo("MemFree:  5 kB\nMemAvailable:   12 kB\n"), Some(12 * 1024));
        if cfg!(target_os = "linux") {
            assert!(available().unwrap() > 0 && peak_bytes() >= own_bytes());
        }
    }
}
