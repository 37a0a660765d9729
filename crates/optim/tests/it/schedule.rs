use crate::support::cases;
use optim::schedule::*;
use proptest::prelude::*;
use std::sync::Arc;

fn close(a: f64, b: f64) {
    assert!((a - b).abs() <= 1e-12 * b.abs().max(1e-3), "{a} for {b}");
}

#[test]
fn closed_forms() {
    assert_eq!(Constant::new(0.3).unwrap().at(usize::MAX), 0.3);
    let step = Step::new(1.0, 3, 0.5).unwrap();
    let seen: Vec<f64> = [0, 2, 3, 5, 6].map(|t| step.at(t)).to_vec();
    assert_eq!(seen, [1.0, 1.0, 0.5, 0.5, 0.25]);
    let multi = MultiStep::new(0.8, [2, 5], 0.1).unwrap();
    close(multi.at(1), 0.8);
    close(multi.at(2), 0.08);
    close(multi.at(5), 0.008);
    close(Exponential::new(2.0, 0.9).unwrap().at(3), 2.0 * 0.729);
    close(Linear::new(1.0, 0.0, 4).unwrap().at(1), 0.75);
    let cosine = Cosine::new(1.0, 0.1, 8).unwrap();
    close(cosine.at(4), 0.55);
    close(cosine.at(2), 0.1 + 0.45 * (1.0 + 0.5f64.sqrt()));
    assert_eq!(cosine.at(0), 1.0);
    assert_eq!((cosine.at(8), cosine.at(1000)), (0.1, 0.1));
    close(Polynomial::new(1.0, 0.0, 4, 2.0).unwrap().at(1), 0.5625);
    let root = InverseSqrt::new(1.0, 4).unwrap();
    close(root.at(0), 0.25);
    assert_eq!(root.at(3), 1.0);
    close(root.at(15), 0.5);
}

#[test]
fn composition() {
    let warm = Warmup::new(4, Cosine::new(1.0, 0.0, 10).unwrap()).unwrap();
    assert_eq!([0, 1, 3, 4].map(|t| warm.at(t)), [0.25, 0.5, 1.0, 1.0]);
    assert_eq!(warm.at(14), 0.0);
    let from = Warmup::from_factor(2, 0.5, 2.0).unwrap();
    assert_eq!([0, 1, 2].map(|t| from.at(t)), [1.5, 2.0, 2.0]);
    let sequence = Sequence::new(1.0)
        .then_at(3, Linear::new(1.0, 0.0, 2).unwrap())
        .unwrap()
        .then_at(6, 0.25)
        .unwrap();
    let seen = [0, 2, 3, 4, 5, 6, 100].map(|t| sequence.at(t));
    assert_eq!(seen, [1.0, 1.0, 1.0, 0.5, 0.0, 0.25, 0.25]);
    let product = Product(0.5, Arc::new(Step::new(1.0, 2, 0.5).unwrap()));
    assert_eq!(product.at(2), 0.25);
    let boxed: Box<dyn Schedule> = Box::new(product);
    assert_eq!(boxed.at(4), 0.125);
}

#[test]
fn one_cycle_has_torchs_phases() {
    let config = OneCycleConfig {
        max_lr: 1.0,
        total: 11,
        ..OneCycleConfig::default()
    };
    let cycle = OneCycle::new(config).unwrap();
    // Phase ends at 0.3 * 11 - 1 = 2.3 and 10, as torch's OneCycleLR has them.
    close(cycle.at(0), 0.04);
    let up = |t: f64| 1.0 + (0.04 - 1.0) * 0.5 * (1.0 + (std::f64::consts::PI * t / 2.3).cos());
    close(cycle.at(2), up(2.0));
    let last = 0.04 / 1e4;
    let share = (3.0 - 2.3) / 7.7;
    close(
        cycle.at(3),
        last + (1.0 - last) * 0.5 * (1.0 + (std::f64::consts::PI * share).cos()),
    );
    close(cycle.at(10), last);
    assert_eq!(cycle.at(10), cycle.at(1_000_000));
    let three = OneCycle::new(OneCycleConfig {
        three_phase: true,
        anneal: Anneal::Linear,
        total: 20,
        pct_start: 0.25,
        ..config
    })
    .unwrap();
    // Up to step 4, down to the first value at step 8, down to the last one at step 19.
    close(three.at(4), 1.0);
    close(three.at(6), 0.52);
    close(three.at(8), 0.04);
    close(three.at(19), 0.04 / 1e4);
}

#[test]
fn bad_arguments_are_named() {
    let cases: [(optim::Result<()>, &str); 12] = [
        (Constant::new(f64::NAN).map(drop), "Constant::value"),
        (Step::new(1.0, 0, 0.5).map(drop), "Step::every"),
        (Step::new(-1.0, 1, 0.5).map(drop), "Step::initial"),
        (MultiStep::new(1.0, [3, 3], 0.5).map(drop), "milestones"),
        (Cosine::new(1.0, 0.0, 0).map(drop), "Cosine::total"),
        (
            Polynomial::new(1.0, 0.0, 3, 0.0).map(drop),
            "Polynomial::power",
        ),
        (InverseSqrt::new(1.0, 0).map(drop), "InverseSqrt::warmup"),
        (Exponential::new(1.0, -1.0).map(drop), "Exponential::gamma"),
        (Warmup::new(0, 1.0).map(drop), "Warmup::steps"),
        (Warmup::from_factor(1, 1.5, 1.0).map(drop), "Warmup::start"),
        (
            Sequence::new(1.0).then_at(0, 2.0).map(drop),
            "Sequence::then_at",
        ),
        (
            OneCycle::new(OneCycleConfig {
                pct_start: 1.5,
                ..Default::default()
            })
            .map(drop),
            "OneCycleConfig::pct_start",
        ),
    ];
    for (result, name) in cases {
        let message = result.unwrap_err().to_string();
        assert!(message.contains(name), "{message}");
    }
}

proptest! {
    #![proptest_config(cases(64))]

    #[test]
    fn decays_are_monotone_and_end_where_they_should(
        initial in 1e-6f64..10.0, share in 0.0f64..1.0, total in 1usize..500, t in 0usize..1000,
    ) {
        let end = initial * share;
        let all: [Box<dyn Schedule>; 3] = [
            Box::new(Cosine::new(initial, end, total).unwrap()),
            Box::new(Linear::new(initial, end, total).unwrap()),
            Box::new(Polynomial::new(initial, end, total, 1.7).unwrap()),
        ];
        for schedule in &all {
            prop_assert!(schedule.at(t + 1) <= schedule.at(t) * (1.0 + 1e-12));
            prop_assert!((schedule.at(0) - initial).abs() <= 1e-12 * initial);
            prop_assert!((schedule.at(total) - end).abs() <= 1e-12 * initial);
        }
    }
}
