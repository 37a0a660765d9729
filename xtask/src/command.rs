//! Starting programs: print the line that runs, keep the exit status of what failed.

use std::ffi::{OsStr, OsString};
use std::process::{Command, ExitCode, ExitStatus};

use anyhow::{Context, Result};

/// `cargo`, the same one that started this program.
pub fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo")))
}

/// The command as one line to read. `PATH` is left out: it is long and says little.
pub fn line(command: &Command) -> String {
    let set = command
        .get_envs()
        .filter(|(key, _)| *key != "PATH")
        .filter_map(|(key, value)| Some(format!("{}={}", key.to_string_lossy(), word(value?))));
    let program = std::path::Path::new(command.get_program());
    let name = program.file_name().unwrap_or(program.as_os_str());
    let words = std::iter::once(name).chain(command.get_args()).map(word);
    set.chain(words).collect::<Vec<_>>().join(" ")
}

fn word(text: &OsStr) -> String {
    let text = text.to_string_lossy();
    if text.is_empty() || text.contains(char::is_whitespace) {
        format!("'{text}'")
    } else {
        text.into_owned()
    }
}

/// Prints the command, runs it to its end and gives its status.
///
/// # Errors
/// The program cannot be started.
pub fn run(command: &mut Command) -> Result<ExitStatus> {
    let line = line(command);
    eprintln!("$ {line}");
    command
        .status()
        .with_context(|| format!("cannot start `{line}`"))
}

/// Runs the commands in order and stops at the first that fails, with its status.
///
/// # Errors
/// A program cannot be started.
pub fn run_all(commands: impl IntoIterator<Item = Command>) -> Result<ExitCode> {
    for mut command in commands {
        let status = run(&mut command)?;
        if !status.success() {
            eprintln!("failed: {}", line(&command));
            return Ok(code(status));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The exit code that a shell would show for this status (128 + signal when a signal ended it).
pub fn code(status: ExitStatus) -> ExitCode {
    #[cfg(unix)]
    let signal = std::os::unix::process::ExitStatusExt::signal(&status);
    #[cfg(not(unix))]
    let signal: Option<i32> = None;
    let number = status
        .code()
        .or(signal.map(|signal| 128 + signal))
        .unwrap_or(1);
    ExitCode::from(u8::try_from(number).unwrap_or(1))
}

/// Becomes the command where the system can (so that Ctrl-C and the exit status are the
/// program's own), waits for it elsewhere.
///
/// # Errors
/// The program cannot be started.
pub fn replace(mut command: Command) -> Result<ExitCode> {
    #[cfg(unix)]
    {
        let error = std::os::unix::process::CommandExt::exec(&mut command);
        Err(error).with_context(|| format!("cannot start `{}`", line(&command)))
    }
    #[cfg(not(unix))]
    {
        let status = command
            .status()
            .with_context(|| format!("cannot start `{}`", line(&command)))?;
        Ok(code(status))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn a_line_shows_environment_program_and_quoted_arguments() {
        let mut command = Command::new("/somewhere/cargo");
        command
            .env("RUSTDOCFLAGS", "-D warnings")
            .args(["doc", "", "a b"]);
        assert_eq!(
            line(&command),
            "RUSTDOCFLAGS='-D warnings' cargo doc '' 'a b'"
        );
    }

    #[test]
    #[cfg(unix)]
    fn the_first_failure_ends_the_run_with_its_status() {
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("ran");
        let later = shell(&format!("touch {}", mark.display()));
        let code = run_all([shell("exit 0"), shell("exit 7"), later]).unwrap();
        assert_eq!(format!("{code:?}"), format!("{:?}", ExitCode::from(7)));
        assert!(!mark.exists(), "a command after the failed one ran");
    }

    #[test]
    #[cfg(unix)]
    fn a_signal_reads_as_128_plus_its_number() {
        let status = shell("kill -9 $$").status().unwrap();
        assert_eq!(
            format!("{:?}", code(status)),
            format!("{:?}", ExitCode::from(137))
        );
    }

    #[test]
    fn a_program_that_does_not_exist_is_named() {
        let error = run(&mut Command::new("no-such-program-here")).unwrap_err();
        assert!(format!("{error:#}").contains("no-such-program-here"));
    }
}
