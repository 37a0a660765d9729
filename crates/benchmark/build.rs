//! Records the compiler's version for the facts that are stored with every run.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=RUSTC");
    let compiler = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let version = Command::new(compiler).arg("--version").output();
    let text = version
        .ok()
        .and_then(|out| String::from_utf8(out.stdout).ok());
    println!(
        "cargo::rustc-env=THALWEG_RUSTC={}",
        text.unwrap_or_default().trim()
    );
}
