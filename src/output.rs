//! Where output goes: results to standard output, progress and notes to standard error.

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use comfy_table::{ContentArrangement, Table, presets};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// Owns both streams. Nothing else in the project prints.
#[derive(Clone, Copy, Debug)]
pub struct Printer {
    quiet: bool,
    verbose: bool,
}

impl Printer {
    /// `quiet` hides notes and bars; `verbose` shows details.
    pub fn new(quiet: bool, verbose: bool) -> Self {
        Printer { quiet, verbose }
    }

    /// Returns one that prints results and errors only.
    pub fn silent(self) -> Self {
        Printer { quiet: true, verbose: false }
    }

    /// Prints a result to standard output.
    pub fn result(&self, text: &str) -> Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        if !text.ends_with('\n') {
            out.write_all(b"\n")?;
        }
        Ok(out.flush()?)
    }

    /// Prints a line a user should see to standard error, unless quiet.
    pub fn note(&self, text: impl AsRef<str>) {
        if !self.quiet {
            // A closed standard error must not stop a conversion.
            let _ = writeln!(io::stderr(), "{}", text.as_ref());
        }
    }

    /// Prints why the exit status will not be 0 to standard error, quiet or not.
    pub fn failure(&self, text: impl AsRef<str>) {
        let _ = writeln!(io::stderr(), "{}", text.as_ref());
    }

    /// Prints a detail to standard error, only when verbose.
    pub fn detail(&self, text: impl AsRef<str>) {
        if self.verbose {
            self.note(text);
        }
    }

    /// Returns a bar on standard error; hidden when quiet or when standard error is no terminal.
    pub fn bar(&self, length: u64, what: &str, unit: Unit) -> ProgressBar {
        if self.quiet || !io::stderr().is_terminal() {
            return ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::hidden());
        }
        let template = match unit {
            Unit::Bytes => "{msg:>10} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            Unit::Count => "{msg:>10} {wide_bar} {pos}/{len} {eta}",
        };
        let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::stderr())
            .with_style(style)
            .with_message(what.to_string())
    }
}

/// What a bar counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Bytes, shown with binary prefixes and a rate.
    Bytes,
    /// Things.
    Count,
}

/// Writes a report: `-` is standard output, anything else a file.
pub fn write_report(path: &Path, text: &str, printer: Printer) -> Result<()> {
    if path == Path::new("-") {
        return printer.result(text);
    }
    fs::write(path, text).with_context(|| format!("{}: cannot write the report", path.display()))
}

/// Refuses reports that could not be written, or that would write over each other, before any work is done for them.
pub fn check_reports<'a>(paths: impl IntoIterator<Item = &'a Path>) -> Result<()> {
    let mut seen = Vec::new();
    for path in paths {
        ensure!(
            !seen.contains(&path),
            "{}: two reports want this file; name another for one",
            path.display()
        );
        seen.push(path);
        let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let file = if path.exists() { path } else { folder };
        if path == Path::new("-") {
            continue;
        }
        ensure!(!path.is_dir(), "{}: found a folder, wanted to write a report; name a file", path.display());
        ensure!(
            folder.is_dir(),
            "{}: cannot write the report: there is no folder `{}`; create it",
            path.display(),
            folder.display()
        );
        rustix::fs::access(file, rustix::fs::Access::WRITE_OK)
            .with_context(|| format!("{}: cannot write the report", path.display()))?;
    }
    Ok(())
}

/// Returns a borderless table with that header; numbers are right-aligned by [`right_align`].
pub fn table<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table
        .load_style(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Disabled)
        .set_header(header);
    table
}

/// Right-aligns all columns from `first` on.
pub fn right_align(table: &mut Table, first: usize) {
    for column in table.column_iter_mut().skip(first) {
        column.set_cell_alignment(comfy_table::CellAlignment::Right);
    }
}

/// Returns a size as people read it: `11.5 MB` (10^6), as disks are sold and as Hugging Face shows.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit < UNITS.len() - 1 {
        value /= 1000.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_read_naturally() {
        assert_eq!([size(0), size(999), size(1000), size(11_547_040)], ["0 B", "999 B", "1.0 kB", "11.5 MB"]);
    }
}
