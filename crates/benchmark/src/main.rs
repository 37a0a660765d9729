//! `thalweg-bench`: see the library's documentation.

use std::process::ExitCode;
use thalweg_benchmark::{cli, registry::Registry};

/// candle allocates every intermediate tensor; this allocator keeps the pages.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    ExitCode::from(cli::run(Registry::builtin, std::env::args_os()))
}
