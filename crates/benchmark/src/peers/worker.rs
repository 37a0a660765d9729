//! The Python process that runs the peers.

use anyhow::{bail, Context, Result};
use serde_json::{json, Value};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

/// The loop over requests, and the operations of every crate.
const SCRIPT: &str = concat!(
    include_str!("worker.py"),
    include_str!("optim.py"),
    include_str!("nn.py"),
    include_str!("graph_learning.py"),
    include_str!("networks.py"),
    include_str!("convex.py"),
    include_str!("sequence_design.py"),
    "main()\n"
);

/// A running interpreter with the worker script; it ends when this is dropped.
pub struct Worker {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Worker {
    /// Starts `python`, which must have torch and the other pinned packages.
    ///
    /// # Errors
    /// When the interpreter cannot be started.
    pub fn start(python: &Path) -> Result<Self> {
        let mut child = Command::new(python)
            .args(["-u", "-c", SCRIPT])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start `{}`", python.display()))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("`{}` has no pipes", python.display());
        };
        Ok(Self {
            child,
            input,
            output: BufReader::new(output),
        })
    }

    /// Prepares an operation.
    ///
    /// # Errors
    /// What the operation raised, or that the process ended.
    pub fn set(&mut self, operation: &str, threads: usize, mut spec: Value) -> Result<()> {
        spec["set"] = json!(operation);
        spec["threads"] = json!(threads);
        self.ask(&spec)
            .with_context(|| format!("the peer `{operation}` cannot be prepared"))?;
        Ok(())
    }

    /// Runs the prepared operation once and gives its seconds.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn run(&mut self) -> Result<f64> {
        let answer = self.ask(&json!({"run": true}))?;
        answer["seconds"].as_f64().context("the peer gave no time")
    }

    /// Runs the prepared operation once and gives the seconds of its parts.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn run_parts(&mut self) -> Result<Vec<f64>> {
        let answer = self.ask(&json!({"run": true}))?;
        serde_json::from_value(answer["parts"].clone()).context("the peer gave no parts")
    }

    /// Frees the prepared operation's memory.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn end(&mut self) -> Result<()> {
        self.ask(&json!({"end": true}))?;
        Ok(())
    }

    fn ask(&mut self, request: &Value) -> Result<Value> {
        writeln!(self.input, "{request}").context("the Python process has ended")?;
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            let status = self.child.wait()?;
            bail!("the Python process ended with {status}");
        }
        let answer: Value = serde_json::from_str(&line)
            .with_context(|| format!("the Python process answered `{}`", line.trim()))?;
        match answer.get("error") {
            Some(error) => bail!("{error}"),
            None => Ok(answer),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Nothing can be done about a process that is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
