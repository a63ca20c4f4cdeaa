//! The `quant` command.

fn main() {}
