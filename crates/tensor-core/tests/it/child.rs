//! Starts one test of this binary again in a process of its own, for what depends on the
//! environment at the start of a process or must be killed.

use std::process::{Command, Stdio};

/// Set in the child: the value is the child's argument.
const ARGUMENT: &str = "THALWEG_TEST_CHILD";

/// The argument when this process is a child, else nothing.
pub fn argument() -> Option<String> {
    std::env::var(ARGUMENT).ok()
}

/// The command that runs the test `name` (its whole path) alone in a child.
pub fn command(name: &str, argument: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(ARGUMENT, argument)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}
