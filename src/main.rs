//! Entry point: parse the command line, run it, turn the result into an exit code.

use std::process::ExitCode;

/// One heap for Rust and for RocksDB, with pages given back soon: nodes share machines.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    tombolo::cli::main()
}
