//! Verdicts on tables of numbers made by hand.

use crate::toy::{registry, Toy};
use std::collections::BTreeMap;
use thalweg_benchmark::scenario::{
    best, constant, metric, setting, Arm, Better, Claim, Definition, Expr, Metric, Relation, Role,
    Scenario, TrialOutcome,
};
use thalweg_benchmark::store::{StoredTrial, TrialKey};
use thalweg_benchmark::verdict::{overall, Table, Verdict};

/// Two arms: `a` tuned over two settings, `b` with one.
fn definition(claims: Vec<Claim>) -> Definition {
    Definition {
        arms: vec![
            Arm::new("a", "a", Role::Baseline).tuned("lr", &[0.1, 1.0], "loss"),
            Arm::new("b", "b", Role::Method),
        ],
        metrics: vec![Metric {
            name: "loss",
            label: "loss",
            better: Better::Lower,
        }],
        claims,
        ..Toy::default().definition()
    }
}

/// Rows: (loss of a at lr 0.1, at lr 1, loss of b), one a seed.
fn trials(d: &Definition, rows: &[(f64, f64, f64)]) -> Vec<StoredTrial> {
    let cell = |arm: &str, setting: &str, seed: usize, loss: f64| StoredTrial {
        run: 1,
        key: TrialKey {
            scenario: d.slug.into(),
            definition: d.hash(),
            arm: arm.into(),
            setting: setting.into(),
            seed: seed as u64,
            suite: "standard".into(),
            device: "cpu".into(),
            data: "x".into(),
            version: "0".into(),
        },
        error: None,
        outcome: TrialOutcome {
            metrics: BTreeMap::from([("loss".into(), loss)]),
            ..Default::default()
        },
        seconds: 1.0,
        finished: 0,
    };
    let row = |(seed, (x, y, z)): (usize, &(f64, f64, f64))| {
        [
            cell("a", "lr=0.1", seed, *x),
            cell("a", "lr=1", seed, *y),
            cell("b", "default", seed, *z),
        ]
    };
    rows.iter().enumerate().flat_map(row).collect()
}

fn judge(claim: Claim, rows: &[(f64, f64, f64)]) -> thalweg_benchmark::verdict::ClaimResult {
    let d = definition(vec![claim]);
    d.validate().unwrap();
    let trials = trials(&d, rows);
    Table::new(&d, &trials).claims().remove(0)
}

fn below(judged: fn(&'static str, &'static str, (Expr, Relation, Expr)) -> Claim) -> Claim {
    judged(
        "c",
        "b is below 0.9 a",
        metric("b", "loss").below(metric("a", "loss") * 0.9),
    )
}

#[test]
fn fewer_than_five_seeds_are_undecided_and_counted() {
    let rows = [(1.0, 2.0, 0.5), (1.0, 2.0, 0.95), (1.0, 2.0, 0.5)];
    let c = judge(below(Claim::every_seed), &rows);
    assert_eq!(
        (c.verdict, c.satisfied, c.seeds),
        (Verdict::Undecided, 2, 3)
    );
    assert_eq!(judge(below(Claim::mean), &[]).verdict, Verdict::NotRun);
}

#[test]
fn every_seed_means_every_seed() {
    let good = [(1.0, 2.0, 0.5); 5];
    let c = judge(below(Claim::every_seed), &good);
    assert_eq!((c.verdict, c.satisfied), (Verdict::Holds, 5));
    // The best setting of a is lr 0.1, so the right side is 0.9 and the margin 0.4.
    assert!((c.right - 0.9).abs() < 1e-15 && (c.margin.mean - 0.4).abs() < 1e-15);
    let mut one_bad = good;
    one_bad[3].2 = 0.95;
    let c = judge(below(Claim::every_seed), &one_bad);
    assert_eq!((c.verdict, c.satisfied), (Verdict::Fails, 4));
}

#[test]
fn a_mean_needs_its_whole_interval() {
    // Better in the mean by 0.28, but one seed in five is worse by 1.
    let rows = [
        (1.0, 9.0, 0.3),
        (1.0, 9.0, 0.3),
        (1.0, 9.0, 0.3),
        (1.0, 9.0, 0.3),
        (1.0, 9.0, 1.9),
    ];
    let c = judge(below(Claim::mean), &rows);
    assert!(c.margin.mean > 0.0 && c.margin.low < 0.0, "{:?}", c.margin);
    assert_eq!((c.verdict, c.satisfied), (Verdict::Fails, 4));
    let rows = [
        (1.0, 9.0, 0.3),
        (1.1, 9.0, 0.4),
        (0.9, 9.0, 0.3),
        (1.0, 9.0, 0.2),
        (1.0, 9.0, 0.92),
    ];
    let c = judge(below(Claim::mean), &rows);
    assert_eq!((c.verdict, c.satisfied), (Verdict::Holds, 4));
}

#[test]
fn equality_satisfies_at_most_but_not_below() {
    let rows = [(1.0, 2.0, 1.0); 5];
    let at_most = Claim::every_seed("c", "", metric("b", "loss").at_most(metric("a", "loss")));
    let strict = Claim::every_seed("c", "", metric("b", "loss").below(metric("a", "loss")));
    assert_eq!(judge(at_most, &rows).verdict, Verdict::Holds);
    assert_eq!(judge(strict, &rows).verdict, Verdict::Fails);
}

#[test]
fn the_best_setting_is_the_best_mean_and_best_is_per_seed() {
    // lr 0.1 has mean 1.2, lr 1 has mean 1.4, but each is best on some seeds.
    let rows = [
        (1.0, 2.0, 0.0),
        (2.0, 1.0, 0.0),
        (1.0, 2.0, 0.0),
        (1.0, 1.0, 0.0),
        (1.0, 1.0, 0.0),
    ];
    let rate = Claim::mean("c", "", setting("a", "lr").at_most(0.1));
    let c = judge(rate, &rows);
    assert_eq!(c.left, 0.1);
    // Resamples that draw the second seed often choose the other rate.
    assert_eq!((c.verdict, c.margin.low), (Verdict::Fails, -0.9));
    let c = judge(
        Claim::every_seed("c", "", best("a", "loss").at_most(1.0)),
        &rows,
    );
    assert_eq!((c.left, c.verdict), (1.0, Verdict::Holds));
    let c = judge(
        Claim::every_seed("c", "", metric("a", "loss").at_most(1.0)),
        &rows,
    );
    assert_eq!((c.left, c.verdict, c.satisfied), (1.2, Verdict::Fails, 4));
}

#[test]
fn absolute_values_are_taken_per_seed_or_of_the_mean_as_judged() {
    // b - a is +0.2 and -0.2 in turn.
    let rows = [
        (1.0, 9.0, 1.2),
        (1.0, 9.0, 0.8),
        (1.0, 9.0, 1.2),
        (1.0, 9.0, 0.8),
        (1.0, 9.0, 1.0),
    ];
    let gap = || (metric("b", "loss") - metric("a", "loss")).abs().below(0.1);
    assert_eq!(judge(Claim::every_seed("c", "", gap()), &rows).satisfied, 1);
    let c = judge(Claim::mean("c", "", gap()), &rows);
    assert!(c.left < 1e-12);
    assert_eq!(c.verdict, Verdict::Fails);
}

#[test]
fn diverged_runs_lose_and_never_win() {
    let inf = f64::INFINITY;
    // A baseline that always diverges is beaten; a method that diverges loses; two prove nothing.
    let c = judge(below(Claim::every_seed), &[(inf, inf, 0.5); 5]);
    assert_eq!(c.verdict, Verdict::Holds);
    let c = judge(below(Claim::every_seed), &[(1.0, 2.0, inf); 5]);
    assert_eq!(c.verdict, Verdict::Fails);
    let c = judge(below(Claim::every_seed), &[(inf, inf, inf); 5]);
    assert_eq!(c.verdict, Verdict::Fails);
    // A setting without a number is never chosen.
    let c = judge(below(Claim::every_seed), &[(f64::NAN, 2.0, 0.5); 5]);
    assert_eq!((c.right, c.verdict), (1.8, Verdict::Holds));
}

#[test]
fn incomplete_seeds_and_other_definitions_do_not_count() {
    let d = definition(vec![below(Claim::mean)]);
    let mut all = trials(&d, &[(1.0, 2.0, 0.5); 6]);
    all[0].error = Some("failed".into());
    all[3].key.definition = "other".into();
    let table = Table::new(&d, &all);
    assert_eq!(table.seeds(), &[2, 3, 4, 5]);
}

/// A claim about what only other data measure is no claim about these; one that must be there is judged.
#[test]
fn claims_about_what_is_not_reported_are_left_out_where_they_may_be() {
    let other = |arm| metric(arm, "other").below(1.0);
    let may = Claim::mean("may", "", other("b")).where_reported();
    let mut d = definition(vec![
        below(Claim::mean),
        may,
        Claim::mean("must", "", other("b")),
    ]);
    d.metrics.push(Metric {
        name: "other",
        label: "other",
        better: Better::Lower,
    });
    let mut trials = trials(&d, &[(1.0, 2.0, 0.5); 5]);
    let judged = |trials: &[StoredTrial]| -> Vec<(String, Verdict)> {
        let claims = Table::new(&d, trials).claims();
        claims.into_iter().map(|c| (c.id, c.verdict)).collect()
    };
    let (c, may, must) = ("c".to_string(), "may".to_string(), "must".to_string());
    let without = [(c.clone(), Verdict::Holds), (must.clone(), Verdict::Fails)];
    assert_eq!(judged(&trials), without);
    for trial in trials.iter_mut().filter(|t| t.key.arm == "b") {
        trial.outcome.metrics.insert("other".into(), 0.5);
    }
    let with = [
        (c, Verdict::Holds),
        (may, Verdict::Holds),
        (must, Verdict::Holds),
    ];
    assert_eq!(judged(&trials), with);
}

#[test]
fn the_worst_claim_decides() {
    let registry = registry(Toy::default());
    assert_eq!(registry.entries()[0].definition.claims.len(), 3);
    let holds = judge(below(Claim::every_seed), &[(1.0, 2.0, 0.5); 5]);
    let fails = judge(below(Claim::every_seed), &[(1.0, 2.0, 1.5); 5]);
    assert_eq!(overall(&[holds.clone(), fails]), Verdict::Fails);
    assert_eq!(overall(&[holds.clone(), holds]), Verdict::Holds);
    assert_eq!(overall(&[]), Verdict::NotRun);
}

#[test]
fn definitions_that_contradict_themselves_are_refused() {
    let bad = |claim: Claim| definition(vec![claim]).validate().unwrap_err().to_string();
    assert!(bad(Claim::mean("c", "", metric("z", "loss").below(1.0))).contains("`z.loss`"));
    assert!(bad(Claim::mean("c", "", metric("a", "gain").below(1.0))).contains("`a.gain`"));
    assert!(bad(Claim::mean("c", "", setting("b", "lr").below(1.0))).contains("`b[lr]`"));
    let mut twice = definition(vec![Claim::mean("c", "", constant(0.0).below(1.0))]);
    twice.arms[1].name = "a";
    assert!(twice
        .validate()
        .unwrap_err()
        .to_string()
        .contains("two arms are called `a`"));
}
