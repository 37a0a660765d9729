use crate::toy::{registry, standard, Toy, TRIALS};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use thalweg_benchmark::registry::{Filter, Registry};
use thalweg_benchmark::runner::{run, Options, Summary};
use thalweg_benchmark::scenario::{DataSource, Suite, TrialOutcome};
use thalweg_benchmark::store::{Query, Store, StoredTrial, TrialKey};
use thalweg_benchmark::Error;

fn go(registry: &Registry, options: &Options, store: &mut Store) -> Summary {
    let entries: Vec<_> = registry.entries().iter().collect();
    run(&entries, options, store, &AtomicBool::new(false)).unwrap()
}

fn new_store(folder: &tempfile::TempDir) -> Store {
    Store::open(&folder.path().join("r.sqlite")).unwrap()
}

fn outcomes(store: &Store) -> BTreeMap<TrialKey, TrialOutcome> {
    let all: Vec<StoredTrial> = store.trials(&Query::default()).unwrap();
    all.into_iter().map(|t| (t.key, t.outcome)).collect()
}

#[test]
fn a_second_run_reuses_and_a_fresh_one_repeats() {
    let folder = tempfile::tempdir().unwrap();
    let (registry, mut store) = (registry(Toy::default()), new_store(&folder));
    let first = go(&registry, &standard(), &mut store);
    assert_eq!((first.ran, first.reused), (5 * TRIALS, 0));
    let before = outcomes(&store);
    let second = go(&registry, &standard(), &mut store);
    assert_eq!((second.ran, second.reused), (0, 5 * TRIALS));
    assert_eq!(
        store.runs().unwrap().len(),
        1,
        "a run that stores nothing leaves no trace"
    );
    let more = go(
        &registry,
        &Options {
            seeds: Some(7),
            ..standard()
        },
        &mut store,
    );
    assert_eq!((more.ran, more.reused), (2 * TRIALS, 5 * TRIALS));
    let fresh = go(
        &registry,
        &Options {
            fresh: true,
            ..standard()
        },
        &mut store,
    );
    assert_eq!((fresh.ran, fresh.reused), (5 * TRIALS, 0));
    let after = outcomes(&store);
    assert!(
        before.iter().all(|(key, outcome)| after[key] == *outcome),
        "same seed, same numbers"
    );
    assert_eq!(
        store
            .trials(&Query {
                run: Some(1),
                ..Query::default()
            })
            .unwrap()
            .len(),
        5 * TRIALS
    );
}

#[test]
fn parallel_trials_give_the_numbers_of_sequential_ones() {
    let (one, four) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let registry = registry(Toy {
        pause: Duration::from_millis(1),
        ..Toy::default()
    });
    let (mut a, mut b) = (new_store(&one), new_store(&four));
    go(&registry, &standard(), &mut a);
    let summary = go(
        &registry,
        &Options {
            jobs: 4,
            ..standard()
        },
        &mut b,
    );
    assert_eq!(summary.ran, 5 * TRIALS);
    assert_eq!(outcomes(&a), outcomes(&b));
}

#[test]
fn errors_and_panics_are_recorded_and_the_run_goes_on() {
    let cases = [
        (
            Toy {
                fails: true,
                ..Toy::default()
            },
            "seed 12 is unlucky",
        ),
        (
            Toy {
                panics: true,
                ..Toy::default()
            },
            "panicked: seed 12 is cursed",
        ),
    ];
    for (toy, message) in cases {
        let folder = tempfile::tempdir().unwrap();
        let mut store = new_store(&folder);
        let summary = go(&registry(toy), &standard(), &mut store);
        assert_eq!((summary.ran, summary.failed.len()), (5 * TRIALS - 1, 1));
        assert_eq!(summary.failed[0].1, message);
        let stored = store.trials(&Query::default()).unwrap();
        let failed: Vec<_> = stored.iter().filter(|t| t.error.is_some()).collect();
        assert_eq!((failed.len(), failed[0].key.seed), (1, 12));
        // A failed trial is tried again; once it succeeds it counts.
        let again = go(&registry(Toy::default()), &standard(), &mut store);
        assert_eq!((again.ran, again.reused), (1, 5 * TRIALS - 1));
        assert!(store
            .trials(&Query::default())
            .unwrap()
            .iter()
            .all(|t| t.error.is_none()));
    }
}

#[test]
fn the_quick_suite_stays_within_its_time_and_decides_the_same_way_again() {
    let folder = tempfile::tempdir().unwrap();
    let registry = registry(Toy {
        pause: Duration::from_millis(30),
        ..Toy::default()
    });
    let mut store = new_store(&folder);
    // One seed takes 0.15 s: a second one fits into 0.4 s, a third does not.
    let short = Options {
        quick_seconds: 0.4,
        ..Options::quick()
    };
    assert_eq!(go(&registry, &short, &mut store).ran, 2 * TRIALS);
    let again = go(&registry, &short, &mut store);
    assert_eq!((again.ran, again.reused), (0, 2 * TRIALS));
    let none = Options {
        quick_seconds: 0.0,
        ..Options::quick()
    };
    let other = tempfile::tempdir().unwrap();
    assert_eq!(
        go(&registry, &none, &mut new_store(&other)).ran,
        TRIALS,
        "one seed at least"
    );
    let mut long = new_store(&tempfile::tempdir().unwrap());
    assert_eq!(
        go(
            &registry,
            &Options {
                quick_seconds: 60.0,
                ..Options::quick()
            },
            &mut long
        )
        .ran,
        3 * TRIALS
    );
}

#[test]
fn seeds_of_the_suites_do_not_overlap() {
    let seeds = |suite| {
        Options {
            suite,
            ..Options::quick()
        }
        .seed_list()
    };
    assert_eq!(seeds(Suite::Quick), [0, 1, 2]);
    assert!(seeds(Suite::Standard).len() >= 5);
    assert!(seeds(Suite::Standard)
        .iter()
        .all(|s| !seeds(Suite::Quick).contains(s)));
}

#[test]
fn a_request_to_stop_keeps_what_is_done() {
    let folder = tempfile::tempdir().unwrap();
    let registry = registry(Toy {
        pause: Duration::from_millis(5),
        ..Toy::default()
    });
    let mut store = new_store(&folder);
    let stop = AtomicBool::new(false);
    let entries: Vec<_> = registry.entries().iter().collect();
    let summary = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(40));
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        run(&entries, &standard(), &mut store, &stop).unwrap()
    });
    assert!(
        summary.interrupted && summary.failed.is_empty(),
        "{summary:?}"
    );
    assert!(summary.ran < 5 * TRIALS);
    assert_eq!(store.trials(&Query::default()).unwrap().len(), summary.ran);
    let rest = go(&registry, &standard(), &mut store);
    assert_eq!(
        (rest.ran, rest.reused),
        (5 * TRIALS - summary.ran, summary.ran)
    );
}

#[test]
fn suites_that_a_scenario_lacks_are_refused_before_anything_runs() {
    let folder = tempfile::tempdir().unwrap();
    let (registry, mut store) = (registry(Toy::default()), new_store(&folder));
    let entries: Vec<_> = registry.entries().iter().collect();
    let full = Options {
        suite: Suite::Full,
        ..Options::quick()
    };
    let error = run(&entries, &full, &mut store, &AtomicBool::new(false)).unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    assert!(error.to_string().contains("no paper-size form"), "{error}");
    assert!(store.runs().unwrap().is_empty());
}

#[test]
fn real_data_is_another_trial() {
    let folder = tempfile::tempdir().unwrap();
    let (registry, mut store) = (registry(Toy::default()), new_store(&folder));
    go(&registry, &standard(), &mut store);
    let real = Options {
        data: DataSource::Directory(PathBuf::from("/data")),
        ..standard()
    };
    assert_eq!(go(&registry, &real, &mut store).reused, 0);
    let names: Vec<String> = store
        .trials(&Query::default())
        .unwrap()
        .into_iter()
        .map(|t| t.key.data)
        .collect();
    assert!(names.contains(&"hills".into()) && names.contains(&"parabola".into()));
}

#[test]
fn filters_name_what_they_do_not_know() {
    let registry = registry(Toy::default());
    let filter = |only: &[&str], krate: &[&str], tag: &[&str]| {
        let own = |names: &[&str]| names.iter().map(ToString::to_string).collect();
        Filter {
            only: own(only),
            krate: own(krate),
            tag: own(tag),
        }
    };
    assert_eq!(registry.select(&Filter::default()).unwrap().len(), 1);
    assert_eq!(
        registry
            .select(&filter(&["toy"], &["thalweg-optim"], &["optimizer"]))
            .unwrap()
            .len(),
        1
    );
    for (filter, words) in [
        (
            filter(&["tyo"], &[], &[]),
            "unknown scenario `tyo`: known are toy",
        ),
        (
            filter(&[], &["nn"], &[]),
            "unknown crate `nn`: known are optim",
        ),
        (
            filter(&[], &[], &["fast"]),
            "unknown tag `fast`: known are optimizer, toy",
        ),
    ] {
        assert_eq!(registry.select(&filter).err().unwrap().to_string(), words);
    }
}
