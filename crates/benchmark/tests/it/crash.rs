//! A process killed without warning loses at most the trial that was running.

use crate::toy::{output, program, TRIALS};
use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::time::Duration;
use tensor_core::random::RandomStream;
use thalweg_benchmark::scenario::TrialOutcome;
use thalweg_benchmark::store::{Query, Store, TrialKey};

const RUN: [&str; 3] = ["run", "--suite", "standard"];

fn stored(folder: &Path) -> BTreeMap<TrialKey, TrialOutcome> {
    let path = folder.join("target/thalweg/results.sqlite");
    if !path.exists() {
        return BTreeMap::new();
    }
    let trials = Store::open(&path)
        .unwrap()
        .trials(&Query::default())
        .unwrap();
    trials.into_iter().map(|t| (t.key, t.outcome)).collect()
}

#[test]
fn kill_at_random_moments_then_resume() {
    let (whole, broken) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (code, out, err) = output(&mut program(whole.path(), "slow", &RUN));
    assert_eq!(code, 0, "{out}{err}");
    let expected = stored(whole.path());
    assert_eq!(expected.len(), 5 * TRIALS);

    let mut moments = RandomStream::new(2024);
    let (mut kills, mut before) = (0, 0);
    for _ in 0..12 {
        let mut child = program(broken.path(), "slow", &RUN).spawn().unwrap();
        let pause = 5.0 + 75.0 * moments.next_uniform();
        std::thread::sleep(Duration::from_micros((1000.0 * pause) as u64));
        child.kill().unwrap();
        let mut log = String::new();
        child
            .stderr
            .take()
            .unwrap()
            .read_to_string(&mut log)
            .unwrap();
        if !child.wait().unwrap().success() {
            kills += 1;
        }
        let now = stored(broken.path());
        // A line is written after its trial is committed: no reported trial may be missing.
        let reported = log.lines().filter(|line| line.contains("stored")).count();
        assert!(
            now.len() >= before + reported,
            "{} < {before} + {reported}\n{log}",
            now.len()
        );
        assert!(now.iter().all(|(key, outcome)| expected[key] == *outcome));
        before = now.len();
        if before == expected.len() {
            break;
        }
    }
    assert!(kills >= 2, "only {kills} kills hit a running process");
    let (code, out, err) = output(&mut program(broken.path(), "slow", &RUN));
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains(&format!("{before} reused, 0 failed")), "{out}");
    assert_eq!(stored(broken.path()), expected);
}
