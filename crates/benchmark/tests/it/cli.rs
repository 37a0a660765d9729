//! The program as users start it.

use crate::toy::{output, program, TRIALS};
use std::fs;
use std::process::Command;

/// The real program.
fn real(args: &[&str]) -> (i32, String, String) {
    let folder = tempfile::tempdir().unwrap();
    output(
        Command::new(env!("CARGO_BIN_EXE_thalweg-bench"))
            .args(args)
            .current_dir(folder.path()),
    )
}

#[test]
fn bad_arguments_are_explained() {
    for (args, code, words) in [
        (
            &["run", "--only", "lyon"][..],
            1,
            "unknown scenario `lyon`: known are ",
        ),
        (
            &["run", "--suite", "huge"],
            2,
            "possible values: quick, standard, full",
        ),
        (&["run", "--seeds", "0"], 2, "0 is not in 1.."),
        (&["run", "--jobs", "none"], 2, "invalid digit"),
        (&["run", "--device", "tpu"], 1, "unknown device `tpu`"),
        (
            &["run", "--data", "/nowhere/at/all"],
            1,
            "/nowhere/at/all: there is no such folder",
        ),
        (&["run", "--crate", "nix"], 1, "unknown crate `nix`"),
        (&["run", "--tag", "nix"], 1, "unknown tag `nix`"),
        (
            &["run", "--nonsense"],
            2,
            "unexpected argument '--nonsense'",
        ),
        (&["nonsense"], 2, "unrecognized subcommand"),
        (&["export"], 2, "required"),
        (
            &["export", "--csv", "x.csv"],
            1,
            "results.sqlite: there is no such file",
        ),
        (
            &["verify", "--reference", "/nowhere"],
            1,
            "/nowhere: No such file",
        ),
        (
            &["methods", "--docs", "/nowhere"],
            1,
            "/nowhere/results.json",
        ),
    ] {
        let (status, out, err) = real(args);
        assert_eq!(status, code, "{args:?}: {out}{err}");
        assert!(err.contains(words), "{args:?}: `{err}` lacks `{words}`");
    }
}

#[test]
fn help_and_list_name_everything() {
    let (code, out, _) = real(&["--help"]);
    for word in [
        "run", "report", "compare", "verify", "list", "methods", "export", "data",
    ] {
        assert!(code == 0 && out.contains(word), "{out}");
    }
    let (code, out, _) = real(&["list"]);
    assert_eq!(code, 0);
    for entry in thalweg_benchmark::registry::Registry::builtin()
        .unwrap()
        .entries()
    {
        assert!(out.contains(entry.definition.slug), "{out}");
    }
}

#[test]
fn a_run_prints_verdicts_and_the_report() {
    let folder = tempfile::tempdir().unwrap();
    let go = |args: &[&str]| output(&mut program(folder.path(), "", args));
    let (code, out, err) = go(&["run"]);
    assert_eq!(code, 0, "{out}{err}");
    for word in [
        "averaging has the lower loss",
        "undecided",
        "3/3",
        "target/thalweg/report/index.html",
    ] {
        assert!(out.contains(word), "{out}");
    }
    assert!(
        out.contains(&format!("{} trials run, 0 reused, 0 failed", 3 * TRIALS)),
        "{out}"
    );
    assert!(folder
        .path()
        .join("target/thalweg/report/index.html")
        .is_file());
    let (code, out, _) = go(&["run", "--suite", "standard", "--json-log"]);
    assert!(
        code == 0 && out.contains("holds") && !out.contains("undecided"),
        "{out}"
    );
    let (code, out, _) = go(&["run", "--suite", "standard", "--json-log"]);
    assert!(
        code == 0 && out.contains(&format!("0 trials run, {} reused", 5 * TRIALS)),
        "{out}"
    );
}

#[test]
fn json_log_is_one_object_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let (_, _, err) = output(&mut program(
        folder.path(),
        "",
        &["--json-log", "run", "--seeds", "1"],
    ));
    let lines: Vec<serde_json::Value> = err
        .lines()
        .map(|l| serde_json::from_str(l).unwrap())
        .collect();
    assert_eq!(
        lines
            .iter()
            .filter(|l| l["fields"]["message"] == "stored")
            .count(),
        TRIALS
    );
    assert_eq!(lines[0]["fields"]["scenario"], "toy");
}

#[test]
fn exit_status_tells_failed_trials_and_failed_claims() {
    let go = |mode: &str, args: &[&str]| {
        let folder = tempfile::tempdir().unwrap();
        output(&mut program(folder.path(), mode, args))
    };
    let (code, out, _) = go("fails", &["run", "--suite", "standard"]);
    assert_eq!(code, 1);
    assert!(
        out.contains("1 failed") && out.contains("seed 12: seed 12 is unlucky"),
        "{out}"
    );
    let (code, out, err) = go("panics", &["run", "--suite", "standard"]);
    assert_eq!(code, 1);
    assert!(
        out.contains("seed 12 is cursed") && err.contains("trial failed"),
        "{out}{err}"
    );
    let (code, out, _) = go("worse", &["run", "--suite", "standard"]);
    assert!(code == 0 && out.contains("fails"), "{out}");
    assert_eq!(
        go("worse", &["run", "--suite", "standard", "--strict"]).0,
        3
    );
    assert_eq!(
        go("worse", &["run", "--strict"]).0,
        0,
        "undecided is not failed"
    );
    assert_eq!(go("", &["run", "--suite", "standard", "--strict"]).0, 0);
}

#[test]
fn unwritable_places_are_named_before_anything_runs() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("file"), "x").unwrap();
    let (code, _, err) = output(&mut program(
        folder.path(),
        "",
        &["run", "--db", "file/r.sqlite"],
    ));
    assert!(code == 1 && err.contains("file/r.sqlite"), "{err}");
    let (code, _, err) = output(&mut program(
        folder.path(),
        "",
        &["run", "--out", "file/report"],
    ));
    assert!(code == 1 && err.contains("file/report"), "{err}");
    fs::write(
        folder.path().join("letter"),
        "not a database, but long enough to be one".repeat(40),
    )
    .unwrap();
    let (code, _, err) = output(&mut program(folder.path(), "", &["run", "--db", "letter"]));
    assert!(
        code == 1 && err.contains("letter") && err.contains("not an SQLite database"),
        "{err}"
    );
}

#[cfg(unix)]
#[test]
fn ctrl_c_keeps_what_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let mut child = program(folder.path(), "slow", &["run", "--suite", "standard"])
        .spawn()
        .unwrap();
    // Wait for the first stored trial, then interrupt.
    let mut log = std::io::BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("stored") {
        line.clear();
        assert!(
            std::io::BufRead::read_line(&mut log, &mut line).unwrap() > 0,
            "ended early"
        );
    }
    let killed = Command::new("kill")
        .args(["-INT", &child.id().to_string()])
        .status()
        .unwrap();
    assert!(killed.success());
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut log, &mut rest).unwrap();
    let mut out = String::new();
    std::io::Read::read_to_string(&mut child.stdout.take().unwrap(), &mut out).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{out}{rest}");
    assert!(
        out.contains("Interrupted; run the same command again"),
        "{out}"
    );
    let (code, out, _) = output(&mut program(
        folder.path(),
        "slow",
        &["run", "--suite", "standard"],
    ));
    assert!(code == 0 && !out.contains(" 0 reused"), "{out}");
}

#[test]
fn data_sets_are_listed_with_those_that_are_there() {
    let (code, out, err) = real(&["data", "--data", "/nowhere"]);
    assert!(
        code == 0 && out.contains("mnist") && out.contains("/nowhere/mnist"),
        "{out}{err}"
    );
    assert!(!out.contains("yes"), "{out}");
}
