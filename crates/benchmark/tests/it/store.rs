use crate::toy::{output, program, registry, standard, Toy, TRIALS};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use thalweg_benchmark::runner::run;
use thalweg_benchmark::scenario::{Curve, Picture, PictureFormat, TrialOutcome};
use thalweg_benchmark::store::{Query, Store, StoredTrial, TrialKey};

fn trial(run: i64, seed: u64) -> StoredTrial {
    let mut curve = Curve::new("loss", "step").log_x();
    curve.push(1.0, 0.1 + 0.2);
    curve.push(2.0, f64::INFINITY);
    StoredTrial {
        run,
        key: TrialKey {
            scenario: "s".into(),
            definition: "d".into(),
            arm: "a".into(),
            setting: "lr=0.1".into(),
            seed,
            suite: "quick".into(),
            device: "cpu".into(),
            data: "digits".into(),
            version: thalweg_benchmark::VERSION.into(),
        },
        error: None,
        outcome: TrialOutcome::default()
            .metric("loss", 1.0 / 3.0)
            .metric("worst", f64::NEG_INFINITY)
            .curve(curve)
            .picture(Picture {
                caption: "c".into(),
                format: PictureFormat::Png,
                bytes: vec![0, 255, 7],
            }),
        seconds: 1.25,
        finished: 1_700_000_000,
    }
}

#[test]
fn what_is_stored_comes_back_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/er/results.sqlite");
    let mut store = Store::open(&path).unwrap();
    let facts = BTreeMap::from([("processor".to_string(), "abacus".to_string())]);
    let id = store.begin_run("quick", &facts).unwrap();
    let t = trial(id, u64::MAX);
    store.insert(&t).unwrap();
    drop(store);
    let store = Store::open_existing(&path).unwrap();
    assert_eq!(store.find(&t.key).unwrap().unwrap(), t);
    assert_eq!(store.trials(&Query::default()).unwrap(), vec![t.clone()]);
    assert_eq!(store.runs().unwrap()[0].facts, facts);
    let other = TrialKey {
        definition: "e".into(),
        ..t.key
    };
    assert_eq!(store.find(&other).unwrap(), None);
}

#[test]
fn later_rows_replace_earlier_ones_but_a_failure_never_a_success() {
    let folder = tempfile::tempdir().unwrap();
    let mut store = Store::open(&folder.path().join("r.sqlite")).unwrap();
    let failed = |run| StoredTrial {
        error: Some("no".into()),
        outcome: TrialOutcome::default(),
        ..trial(run, 1)
    };
    let runs: Vec<i64> = (0..4)
        .map(|_| store.begin_run("quick", &BTreeMap::new()).unwrap())
        .collect();
    store.insert(&failed(runs[0])).unwrap();
    assert_eq!(store.find(&trial(0, 1).key).unwrap(), None);
    assert_eq!(
        store.trials(&Query::default()).unwrap()[0].error.as_deref(),
        Some("no")
    );
    store.insert(&trial(runs[1], 1)).unwrap();
    let newer = StoredTrial {
        seconds: 9.0,
        ..trial(runs[2], 1)
    };
    store.insert(&newer).unwrap();
    store.insert(&failed(runs[3])).unwrap();
    assert_eq!(store.find(&newer.key).unwrap().unwrap(), newer);
    assert_eq!(store.trials(&Query::default()).unwrap(), vec![newer]);
    let second = Query {
        run: Some(runs[1]),
        ..Query::default()
    };
    assert_eq!(store.trials(&second).unwrap(), vec![trial(runs[1], 1)]);
}

/// A database as the first version of the schema wrote it.
fn version_1(path: &Path) {
    let old = rusqlite::Connection::open(path).unwrap();
    old.execute_batch(
        "CREATE TABLE run (id INTEGER PRIMARY KEY, started INTEGER NOT NULL, suite TEXT NOT NULL,
            version TEXT NOT NULL, facts TEXT NOT NULL);
         CREATE TABLE trial (id INTEGER PRIMARY KEY, run INTEGER NOT NULL REFERENCES run(id),
            scenario TEXT NOT NULL, definition TEXT NOT NULL, arm TEXT NOT NULL,
            setting TEXT NOT NULL, seed INTEGER NOT NULL, suite TEXT NOT NULL, device TEXT NOT NULL,
            data TEXT NOT NULL, version TEXT NOT NULL, error TEXT, metrics TEXT NOT NULL,
            curves TEXT NOT NULL, seconds REAL NOT NULL, finished INTEGER NOT NULL);
         CREATE UNIQUE INDEX trial_key ON trial (scenario, definition, arm, setting, seed, suite,
            device, data, version, run);
         INSERT INTO run VALUES (1, 5, 'quick', '0.0.1', '{\"device\":\"cpu\"}');
         INSERT INTO trial VALUES (1, 1, 's', 'd', 'a', 'x', 3, 'quick', 'cpu', 'digits', '0.0.1',
            NULL, '{\"loss\":0.25,\"worst\":\"inf\"}', '[]', 2.0, 6);
         PRAGMA application_id = 1953000567; PRAGMA user_version = 1;",
    )
    .unwrap();
}

#[test]
fn an_older_schema_is_brought_up_to_date_with_its_trials() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("old.sqlite");
    version_1(&path);
    let mut store = Store::open(&path).unwrap();
    let old = store.trials(&Query::default()).unwrap();
    assert_eq!(old.len(), 1);
    assert_eq!(
        (
            old[0].outcome.metrics["loss"],
            old[0].outcome.metrics["worst"]
        ),
        (0.25, f64::INFINITY)
    );
    store.insert(&trial(1, 8)).unwrap();
    assert_eq!(
        store
            .find(&trial(1, 8).key)
            .unwrap()
            .unwrap()
            .outcome
            .pictures
            .len(),
        1
    );
    drop(store);
    let version: i64 = rusqlite::Connection::open(&path)
        .unwrap()
        .pragma_query_value(None, "user_version", |r| r.get(0))
        .unwrap();
    assert_eq!(version, 2);
}

/// Opens what must be refused; the message names the file and the file keeps its bytes.
fn refused(path: &Path, words: &[&str]) {
    let before = fs::read(path).ok();
    let message = Store::open(path).unwrap_err().to_string();
    for word in words.iter().copied().chain([path.to_str().unwrap()]) {
        assert!(message.contains(word), "`{message}` lacks `{word}`");
    }
    assert_eq!(fs::read(path).ok(), before);
}

#[test]
fn files_that_are_something_else_are_refused_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("letter.sqlite");
    fs::write(&text, "Dear reader, this is not a database. ".repeat(99)).unwrap();
    refused(&text, &["not an SQLite database", "--db"]);

    let foreign = folder.path().join("foreign.sqlite");
    rusqlite::Connection::open(&foreign)
        .unwrap()
        .execute_batch("CREATE TABLE cats (name)")
        .unwrap();
    refused(&foreign, &["not one of results"]);

    let future = folder.path().join("future.sqlite");
    version_1(&future);
    rusqlite::Connection::open(&future)
        .unwrap()
        .pragma_update(None, "user_version", 99)
        .unwrap();
    refused(&future, &["schema version 99", "up to 2"]);
}

#[test]
fn a_damaged_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.sqlite");
    let mut store = Store::open(&path).unwrap();
    let id = store.begin_run("quick", &BTreeMap::new()).unwrap();
    for seed in 0..40 {
        store.insert(&trial(id, seed)).unwrap();
    }
    drop(store);
    let mut bytes = fs::read(&path).unwrap();
    let pages = bytes.len() / 4096;
    assert!(pages > 4, "{pages} pages");
    for page in 1..pages {
        bytes[page * 4096..page * 4096 + 64].fill(0xa5);
    }
    fs::write(&path, bytes).unwrap();
    let message = Store::open(&path).unwrap_err().to_string();
    assert!(
        message.contains("damaged") && message.contains(path.to_str().unwrap()),
        "{message}"
    );
}

#[test]
fn places_that_cannot_be_written_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    fs::write(&file, "x").unwrap();
    let path = file.join("results.sqlite");
    let message = Store::open(&path).unwrap_err().to_string();
    assert!(message.contains(path.to_str().unwrap()), "{message}");
    let message = Store::open(folder.path()).unwrap_err().to_string();
    assert!(
        message.contains(folder.path().to_str().unwrap()),
        "{message}"
    );
    let none = folder.path().join("none.sqlite");
    let message = Store::open_existing(&none).unwrap_err().to_string();
    assert!(
        message.contains("no such file") && !none.exists(),
        "{message}"
    );
}

#[cfg(unix)]
#[test]
fn a_read_only_file_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.sqlite");
    drop(Store::open(&path).unwrap());
    let chmod = |mode| {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode | 0o111)).unwrap();
    };
    chmod(0o444);
    // Whoever may write everywhere (root) is not stopped by permissions.
    let privileged = fs::OpenOptions::new().write(true).open(&path).is_ok();
    let opened = Store::open(&path);
    chmod(0o644);
    if privileged {
        eprintln!("skipped: this user may write read-only files");
        return;
    }
    let message = opened.unwrap_err().to_string();
    assert!(
        message.contains("cannot be written") && message.contains("r.sqlite"),
        "{message}"
    );
}

/// A process that may write no file beyond 64 KiB stands for a full disk.
#[cfg(unix)]
#[test]
fn a_full_disk_loses_nothing_that_was_stored() {
    let folder = tempfile::tempdir().unwrap();
    let first = ["run", "--suite", "standard", "--seeds", "2"];
    let (code, _, err) = output(&mut program(folder.path(), "", &first));
    assert_eq!(code, 0, "{err}");
    let all = ["run", "--suite", "standard", "--seeds", "60", "--fresh"];
    let inner = program(folder.path(), "", &all);
    let mut limited = std::process::Command::new("sh");
    limited
        .args(["-c", "trap '' XFSZ; ulimit -f 64; exec \"$@\"", "sh"])
        .arg(inner.get_program());
    limited.args(inner.get_args()).current_dir(folder.path());
    for (name, value) in inner.get_envs() {
        if let Some(value) = value {
            limited.env(name, value);
        }
    }
    let (code, out, err) = output(&mut limited);
    assert_eq!(code, 1, "{out}{err}");
    assert!(
        err.contains("results.sqlite") && err.contains("kept"),
        "{err}"
    );
    let path = folder.path().join("target/thalweg/results.sqlite");
    let stored = Store::open(&path)
        .unwrap()
        .trials(&Query::default())
        .unwrap();
    assert!(
        stored.len() >= 2 * TRIALS && stored.len() < 60 * TRIALS,
        "{}",
        stored.len()
    );
    assert!(stored
        .iter()
        .all(|t| t.outcome.metrics.contains_key("loss")));
    // With room again the same command goes on.
    let (code, out, err) = output(&mut program(folder.path(), "", &all[..5]));
    assert_eq!(code, 0, "{out}{err}");
    assert_eq!(
        Store::open(&path)
            .unwrap()
            .trials(&Query::default())
            .unwrap()
            .len(),
        60 * TRIALS
    );
}

#[test]
fn two_processes_share_a_database() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("r.sqlite");
    let go = |toy: Toy| {
        let (registry, path) = (registry(toy), path.clone());
        std::thread::spawn(move || {
            let entries: Vec<_> = registry.entries().iter().collect();
            let mut store = Store::open(&path).unwrap();
            run(&entries, &standard(), &mut store, &AtomicBool::new(false)).unwrap()
        })
    };
    let both = [go(Toy::default()), go(Toy::default())].map(|t| t.join().unwrap());
    assert!(
        both.iter().all(|s| s.ran + s.reused == 5 * TRIALS),
        "{both:?}"
    );
    let stored = Store::open(&path)
        .unwrap()
        .trials(&Query::default())
        .unwrap();
    assert_eq!(stored.len(), 5 * TRIALS);
}
