#!/usr/bin/env bash
# Everything a change must pass: format, lints, tests, documentation. Prints the largest files at the end, as a reminder.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo fmt --check
cargo clippy --all-targets --locked -- -D warnings
cargo test --locked
RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --locked --quiet
echo "largest source files:"
git ls-files 'src/*.rs' 'src/**/*.rs' 'kernels/*' 'tests/*.rs' | sort -u | xargs -r wc -l | sort -rn | sed -n '2,6p'
