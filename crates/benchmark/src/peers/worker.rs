//! The processes that run the peers.

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
    include_str!("flows.py"),
    include_str!("guidance.py"),
    include_str!("convex.py"),
    include_str!("sequence_design.py"),
    "main()\n"
);

/// Where it is set, the program takes the system's allocator instead of its own.
pub const SYSTEM_ALLOCATOR: &str = "THALWEG_SYSTEM_ALLOCATOR";
/// How long candle's own threads spin after an operation.
const SPIN_LIMIT: &str = "CANDLE_BARRIER_POOL_SPIN_LIMIT";

/// A process that runs peers, a Python interpreter with the worker script or this program; it ends
/// when this is dropped.
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
        Self::spawn(Command::new(python).args(["-u", "-c", SCRIPT]))
    }

    /// Starts this program again, to train one of the networks on that many threads, candle's own
    /// included: of our layers, or of stock ones in the surroundings that a program has which does
    /// nothing about them (the system's allocator, candle's settings).
    ///
    /// # Errors
    /// When the program cannot be started.
    pub fn candle(threads: usize, stock: bool) -> Result<Self> {
        let this = std::env::current_exe().context("this program has no path")?;
        let mut command = Command::new(this);
        command.args(["peers", "--serve"]);
        for name in ["RAYON_NUM_THREADS", "CANDLE_NUM_THREADS"] {
            command.env(name, threads.to_string());
        }
        if stock {
            command.env(SYSTEM_ALLOCATOR, "1").env_remove(SPIN_LIMIT);
        }
        Self::spawn(&mut command)
    }

    fn spawn(command: &mut Command) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start `{name}`"))?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("`{name}` has no pipes");
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
    pub fn set(&mut self, operation: &str, threads: usize, spec: Value) -> Result<()> {
        self.prepare(operation, threads, spec).map(|_| ())
    }

    /// [`set`](Self::set), with what was answered.
    ///
    /// # Errors
    /// As [`set`](Self::set).
    pub fn prepare(&mut self, operation: &str, threads: usize, mut spec: Value) -> Result<Value> {
        spec["set"] = json!(operation);
        spec["threads"] = json!(threads);
        self.ask(&spec)
            .with_context(|| format!("the peer `{operation}` cannot be prepared"))
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
        writeln!(self.input, "{request}").context("the peer's process has ended")?;
        let mut line = String::new();
        if self.output.read_line(&mut line)? == 0 {
            let status = self.child.wait()?;
            bail!("the peer's process ended with {status}");
        }
        let answer: Value = serde_json::from_str(&line)
            .with_context(|| format!("the peer's process answered `{}`", line.trim()))?;
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
