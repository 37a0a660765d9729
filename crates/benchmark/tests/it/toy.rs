//! A scenario that costs nothing: noisy gradient descent on `x^2 / 2`, with and without averaging
//! of the iterates.

use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use thalweg_benchmark::cli;
use thalweg_benchmark::registry::Registry;
use thalweg_benchmark::runner::Options;
use thalweg_benchmark::scenario::{
    best, constant, metric, setting, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper,
    Picture, PictureFormat, Role, Scenario, Setting, Suite, TrialContext, TrialOutcome,
};
use thalweg_benchmark::{Error, Result};

#[derive(Debug, Clone, Copy, Default)]
pub struct Toy {
    /// What each trial sleeps, so that it can be interrupted.
    pub pause: Duration,
    /// The arm `average` ends with an error on seed 12.
    pub fails: bool,
    /// The arm `average` panics on seed 12.
    pub panics: bool,
    /// The method is no better than the baseline.
    pub worse: bool,
}

pub const STEPS: usize = 40;

impl Scenario for Toy {
    fn definition(&self) -> Definition {
        Definition {
            slug: "toy",
            title: "Averaged iterates",
            paper: Paper {
                title: "A <toy> & nothing more",
                venue: "Nowhere 2000",
                arxiv: "0000.00000",
            },
            krate: "optim",
            module: "toy",
            tags: &["optimizer", "toy"],
            version: 1,
            summary: "Noisy descent on a parabola.",
            notes: "A note.",
            data: Data {
                embedded: "parabola",
                real: Some("hills"),
            },
            arms: vec![
                Arm::new("plain", "plain", Role::Baseline).tuned("lr", &[0.05, 0.2, 0.8], "loss"),
                Arm::new("average", "averaged", Role::Method),
                Arm::new("clock", "clock", Role::Diagnostic).timed(),
            ],
            metrics: vec![
                Metric {
                    name: "loss",
                    label: "final loss",
                    better: Better::Lower,
                },
                Metric {
                    name: "steps",
                    label: "steps",
                    better: Better::Neither,
                },
            ],
            claims: vec![
                Claim::mean(
                    "lower",
                    "averaging has the lower loss",
                    metric("average", "loss").below(metric("plain", "loss") * 0.9 + 0.1),
                ),
                Claim::every_seed(
                    "bounded",
                    "the loss stays below 1 on every seed",
                    best("plain", "loss").below(constant(1.0)),
                ),
                Claim::mean(
                    "rate",
                    "the best rate is at least 0.05",
                    setting("plain", "lr").at_least(0.05),
                ),
            ],
            full: None,
        }
    }

    fn trade_offs(&self) -> &'static [(&'static str, &'static str)] {
        &[("steps", "loss")]
    }

    fn run(&self, arm: &Arm, setting: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        std::thread::sleep(self.pause);
        if trial.seed == 12 && arm.name == "average" {
            if self.panics {
                panic!("seed 12 is cursed");
            }
            if self.fails {
                return Err(Error::Trial("seed 12 is unlucky".into()));
            }
        }
        let mut noise = trial.stream("noise");
        let lr = setting.values.get("lr").copied().unwrap_or(0.2);
        let (mut x, mut average) = (2.0_f64, 0.0_f64);
        let mut curve = Curve::new("loss", "step").log_y();
        for step in 0..STEPS {
            trial.step(step, STEPS)?;
            x -= lr * (x + 0.5 * noise.next_normal());
            average += (x - average)
                * if step < 10 {
                    1.0
                } else {
                    1.0 / (step - 8) as f64
                };
            let at = if arm.name == "average" && !self.worse {
                average
            } else {
                x
            };
            curve.push(step as f64, at * at / 2.0);
        }
        let loss = *curve.y.last().unwrap()
            + if arm.name == "average" && self.worse {
                1.0
            } else {
                0.0
            };
        Ok(TrialOutcome::default()
            .metric("loss", loss)
            .metric(
                "steps",
                if arm.name == "clock" {
                    f64::INFINITY
                } else {
                    STEPS as f64
                },
            )
            .curve(curve)
            .picture(Picture {
                caption: "where it went".into(),
                format: PictureFormat::Text,
                bytes: format!("x = {x} <&>").into_bytes(),
            }))
    }
}

/// Trials of one seed.
pub const TRIALS: usize = 5;

pub fn registry(toy: Toy) -> Registry {
    Registry::new(vec![Box::new(toy)]).unwrap()
}

pub fn standard() -> Options {
    Options {
        suite: Suite::Standard,
        ..Options::quick()
    }
}

/// Variables by which a child process is told what to do.
const ARGS: &str = "THALWEG_TEST_CHILD_ARGS";
const MODE: &str = "THALWEG_TEST_CHILD_MODE";

/// The command line program with the toy as its only scenario: what [`program`] starts.
#[test]
#[ignore = "started by other tests as their child process"]
fn child_process() {
    let Ok(args) = std::env::var(ARGS) else {
        return;
    };
    let mode = std::env::var(MODE).unwrap_or_default();
    let toy = Toy {
        pause: if mode == "slow" {
            Duration::from_millis(6)
        } else {
            Duration::ZERO
        },
        fails: mode == "fails",
        panics: mode == "panics",
        worse: mode == "worse",
    };
    let args = std::iter::once("thalweg-bench")
        .chain(args.split('\n'))
        .map(Into::into);
    std::process::exit(cli::run(|| Registry::new(vec![Box::new(toy)]), args).into());
}

/// A process of the command line program with the toy as its only scenario, run in `folder`.
pub fn program(folder: &Path, mode: &str, args: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args([
            "--exact",
            "toy::child_process",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env(ARGS, args.join("\n"))
        .env(MODE, mode)
        .env_remove("RUST_LOG")
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

pub fn output(command: &mut Command) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}
