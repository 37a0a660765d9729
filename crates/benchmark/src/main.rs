//! `thalweg-bench`: see the library's documentation.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ffi::{c_char, CStr};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU8, Ordering};
use thalweg_benchmark::{cli, registry::Registry};

/// candle allocates every intermediate tensor; mimalloc keeps the pages. The peers' stock candle runs
/// in a process with the system's allocator, as in a program that chose none.
struct Allocator;

#[global_allocator]
static ALLOCATOR: Allocator = Allocator;

/// The name of `peers::SYSTEM_ALLOCATOR`, as C reads it.
const SYSTEM: &CStr = c"THALWEG_SYSTEM_ALLOCATOR";

extern "C" {
    /// Of the C library that every program has; unlike `std::env` it allocates nothing.
    fn getenv(name: *const c_char) -> *const c_char;
}

/// Decided at the first allocation and never again: memory goes back to where it came from.
fn is_system() -> bool {
    static CHOICE: AtomicU8 = AtomicU8::new(0);
    match CHOICE.load(Ordering::Relaxed) {
        0 => {
            // SAFETY: a name that ends in a zero; nothing has changed the environment yet.
            let system = !unsafe { getenv(SYSTEM.as_ptr()) }.is_null();
            CHOICE.store(1 + u8::from(system), Ordering::Relaxed);
            system
        }
        choice => choice == 2,
    }
}

// SAFETY: every call goes to one of two allocators, and all of a process to the same one.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe {
            match is_system() {
                true => System.alloc(layout),
                false => mimalloc::MiMalloc.alloc(layout),
            }
        }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller's promise.
        unsafe {
            match is_system() {
                true => System.alloc_zeroed(layout),
                false => mimalloc::MiMalloc.alloc_zeroed(layout),
            }
        }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise, and the same allocator as before.
        unsafe {
            match is_system() {
                true => System.dealloc(at, layout),
                false => mimalloc::MiMalloc.dealloc(at, layout),
            }
        }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: as for `dealloc`.
        unsafe {
            match is_system() {
                true => System.realloc(at, layout, size),
                false => mimalloc::MiMalloc.realloc(at, layout, size),
            }
        }
    }
}

fn main() -> ExitCode {
    ExitCode::from(cli::run(Registry::builtin, std::env::args_os()))
}
