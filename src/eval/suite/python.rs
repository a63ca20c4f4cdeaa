//! Running code that a model wrote, under limits: 10 s of time, 1 GiB of memory, files of 1 MiB, an empty environment, a
//! folder of its own, isolated mode (`python3 -I`).
//!
//! The limits stop accidents. They do not stop malice: the code may read what the user may read, so it runs only where
//! `--allow-exec` says so, best inside a container.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

/// Seconds of processor time, and of waiting.
const SECONDS: u64 = 10;
/// The shell sets the limits (KiB of address space, blocks of 512 or 1024 bytes) and becomes Python.
const LIMITS: &str =
    "ulimit -t 10 && ulimit -v 1048576 && ulimit -f 1024 && ulimit -c 0 && exec \"$0\" -I program.py";

/// Where Python is.
#[derive(Clone, Debug)]
pub struct Sandbox {
    python: PathBuf,
}

impl Sandbox {
    /// Finds Python behind `python3`, which may be a script that starts one of several.
    pub fn find() -> Result<Self> {
        const CURE: &str = "`--allow-exec` runs code with `python3`, which must be on the PATH";
        let asked = Command::new("python3").args(["-I", "-c", "import sys; print(sys.executable)"]).output();
        let output = asked.context(CURE)?;
        let python = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
        ensure!(output.status.success() && python.is_absolute(), "{CURE}");
        Ok(Sandbox { python })
    }

    /// Runs code and then its tests; returns why they failed.
    pub fn run(&self, code: &str, tests: &str) -> Result<(), String> {
        self.try_run(code, tests).unwrap_or_else(|error| Err(format!("could not be run: {error:#}")))
    }

    fn try_run(&self, code: &str, tests: &str) -> Result<Result<(), String>> {
        let folder = tempfile::tempdir().context("a folder for the program")?;
        let path = |name: &str| folder.path().join(name);
        // The program's last line prints a word that code cannot print by accident: code that exits early does not pass.
        let done = folder.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        std::fs::write(path("program.py"), format!("{code}\n\n{tests}\nprint({done:?})\n"))?;
        let mut child = Command::new("/bin/sh")
            .args(["-c", LIMITS])
            .arg(&self.python)
            .env_clear()
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .stdout(File::create(path("out"))?)
            .stderr(File::create(path("errors"))?)
            .process_group(0)
            .spawn()
            .context("/bin/sh")?;
        let Some(status) = wait(&mut child)? else {
            return Ok(Err(format!("ran longer than {SECONDS} s")));
        };
        let read =
            |name: &str| String::from_utf8_lossy(&std::fs::read(path(name)).unwrap_or_default()).into_owned();
        if status.success() && read("out").trim_end().ends_with(&done) {
            return Ok(Ok(()));
        }
        let errors = read("errors");
        let last = errors.lines().rfind(|line| !line.trim().is_empty());
        Ok(Err(match (last, status.success()) {
            (_, true) => "ended before its tests".to_string(),
            (Some(line), false) => line.trim().to_string(),
            (None, false) => format!("ended with {status}"),
        }))
    }
}

/// Waits for a program, `None` if it had to be stopped; nothing that it started outlives it.
fn wait(child: &mut Child) -> Result<Option<ExitStatus>> {
    let end = Instant::now() + Duration::from_secs(SECONDS);
    let mut pause = Duration::from_millis(2);
    let status = loop {
        match child.try_wait()? {
            None if Instant::now() < end => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            status => break status,
        }
    };
    // The group has the child's number; it is empty, and the call fails, where nothing is left.
    let group = format!("kill -9 -{} 2>&1", child.id());
    let _ = Command::new("/bin/sh").args(["-c", &group]).stdout(Stdio::null()).status();
    child.wait()?;
    Ok(status)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_limited_in_memory_files_and_environment() {
        let Ok(sandbox) = Sandbox::find() else { return };
        let run = |code: &str| sandbox.run(code, "");
        // What the shell itself sets is all there is.
        let own = "('PWD', 'OLDPWD', 'SHLVL', '_', 'LC_CTYPE')";
        assert_eq!(run(&format!("import os\nassert not [k for k in os.environ if k not in {own}]")), Ok(()));
        assert!(run("x = bytearray(2 << 30)").unwrap_err().contains("MemoryError"));
        let file = run("f = open('big', 'wb')\nfor _ in range(64): f.write(bytes(1 << 20)); f.flush()");
        assert!(file.is_err(), "a file of 64 MiB");
        assert!(run("import sys\nsys.exit(3)").is_err());
        assert!(run("raise SystemExit").unwrap_err().contains("before its tests"));
    }
}
