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

/// Runs the child to its end and fails with its output unless exactly one test ran and passed.
pub fn run(mut command: Command) {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
    assert!(text.contains("1 passed"), "the child ran no test: {text}");
}

/// True in a child that was started with `CANDLE_GRAD_DO_NOT_DETACH=1` (or without it); elsewhere
/// starts that child for the test `name`, sees it pass, and says false. candle reads the variable
/// once per thread, so one process cannot test both.
pub fn gradients_keep_their_graph(name: &str, keep: bool) -> bool {
    if argument().is_some() {
        return true;
    }
    let mut command = command(name, "graph");
    command.env("CANDLE_GRAD_DO_NOT_DETACH", if keep { "1" } else { "0" });
    run(command);
    false
}
