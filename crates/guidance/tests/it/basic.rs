//! The rules that everything else is compared with.

use crate::support::*;
use candle_core::{DType, Device, Tensor};
use flows::guidance::{CondRole, Unguided};
use flows::*;
use proptest::prelude::*;
use thalweg_guidance::basic::{ClassifierForm, GradNorm, Unit};
use thalweg_guidance::{
    Autoguidance, Cfg, ClassifierGuidance, Interval, Rescaled, Scheduled, Space, Sum, Then,
};

fn posterior(x: &Tensor, level: &Level, _: &Condition) -> Result<Tensor> {
    let all = mixture(DType::F64).log_posterior(x, &(*level).into())?;
    Ok(all.narrow(1, 1, 1)?.squeeze(1)?)
}

proptest! {
    #![proptest_config(cases(8))]

    /// Classifier guidance by the exact posterior is classifier-free guidance.
    #[test]
    fn the_exact_classifier_gives_classifier_free_guidance(w in 0.0f64..5.0) {
        let free = run(Cfg::new(w), 4);
        let by_classifier = run(ClassifierGuidance::new(posterior, w), 4);
        prop_assert!(distance(&free.x, &by_classifier.x) < 1e-8);
        prop_assert_eq!((by_classifier.nfe.classifier_forward, by_classifier.nfe.classifier_backward), if w == 0.0 { (0, 0) } else { (48 + 8, 48) });
    }

    /// A scheduled scale, a weighted sum and the scale itself are the same for a linear rule.
    #[test]
    fn linear_rules_compose(w in 1.5f64..5.0, s in 0.1f64..2.0) {
        let direct = run(Cfg::new(1.0 + s * (w - 1.0)), 3).x;
        let scheduled = run(Scheduled { inner: Cfg::new(w), scale: |_: &StepCx| s }, 3);
        prop_assert!(distance(&direct, &scheduled.x) < 1e-9);
        // What two rules ask is evaluated once.
        prop_assert_eq!(scheduled.nfe.main, 2 * 3 * 12);
        let halves = run(Sum::new().and(0.5 * s, Cfg::new(w)).and(0.5 * s, Cfg::new(w)), 3);
        prop_assert!(distance(&direct, &halves.x) < 1e-9);
        prop_assert_eq!((halves.nfe.main, halves.nfe.sequential_calls), (2 * 3 * 12, 12));
    }
}

#[test]
fn scales_of_one_and_zero() {
    let plain = run(Unguided, 3);
    let one = run(Cfg::new(1.0), 3);
    assert_eq!((bits(&one.x), one.nfe.main), (bits(&plain.x), 36));
    let zero = run(Cfg::new(0.0), 3);
    let mixture = mixture(DType::F64);
    let schedule = schedule::VpSde::default();
    let grid = Grid::uniform_lambda_between(&schedule, 1.0, 0.02, 12).unwrap();
    let noise = normal(17, &[3, 3], DType::F64);
    let free = Sampler::new(&mixture, grid)
        .sample(&noise, &Condition::Null, None, &RandomStream::new(0))
        .unwrap();
    assert!(distance(&zero.x, &free.x) < 1e-12);
    let none = ClassifierGuidance {
        base: CondRole::Positive,
        ..ClassifierGuidance::new(posterior, 0.0)
    };
    assert_eq!(bits(&run(none, 3).x), bits(&plain.x));
}

#[test]
fn autoguidance_by_the_model_itself_is_no_guidance() {
    let (main, weak) = (mixture(DType::F64), mixture(DType::F64));
    let schedule = schedule::VpSde::default();
    let grid = Grid::uniform_lambda_between(&schedule, 1.0, 0.02, 12).unwrap();
    let class = Condition::classes(&[1], &Device::Cpu).unwrap();
    let noise = normal(17, &[3, 3], DType::F64);
    let out = Sampler::new(&main, grid)
        .weak(&weak)
        .guidance(Autoguidance { w: 3.0 })
        .sample(&noise, &class, None, &RandomStream::new(0))
        .unwrap();
    assert!(distance(&out.x, &run(Unguided, 3).x) < 1e-12);
    assert_eq!((out.nfe.main, out.nfe.weak), (36, 36));
}

#[test]
fn intervals_save_evaluations() {
    let all = Interval {
        inner: Cfg::new(3.0),
        lo: 0.0,
        hi: f64::INFINITY,
        unit: Unit::Rho,
    };
    assert_eq!(bits(&run(all.clone(), 2).x), bits(&run(Cfg::new(3.0), 2).x));
    let half = Interval {
        lo: 0.49,
        hi: 1.0,
        unit: Unit::Progress,
        ..all
    };
    assert_eq!(run(half, 2).nfe.main, 2 * (12 + 6));
    let switched = run(
        Then::new(Cfg::new(3.0), |cx: &StepCx| cx.step >= 4, Unguided),
        2,
    );
    assert_eq!(switched.nfe.main, 2 * (12 + 4));
}

#[test]
fn rescaling_gives_back_the_spread() {
    let full = Rescaled {
        inner: Cfg::new(6.0),
        phi: 1.0,
        space: Space::X0,
    };
    let off = Rescaled {
        phi: 0.0,
        ..full.clone()
    };
    assert!(distance(&run(off, 3).x, &run(Cfg::new(6.0), 3).x) < 1e-12);
    assert!(distance(&run(full, 3).x, &run(Cfg::new(6.0), 3).x) > 1e-3);
}

/// One ancestral step: the classifier moves its mean by `w s^2 g`, or by a multiple of its norm.
#[test]
fn a_classifier_can_move_the_mean() {
    let model = mixture(DType::F64);
    let schedule = schedule::VpSde::default();
    let levels = [0.6, 0.4].map(|t| Schedule::level(&schedule, t).unwrap());
    let grid = Grid::custom(levels.to_vec()).unwrap();
    let (x, z) = (
        normal(1, &[4, 3], DType::F64),
        normal(2, &[4, 3], DType::F64),
    );
    let class = Condition::classes(&[1], &Device::Cpu).unwrap();
    let step = |w: f64, grad_norm| {
        let rule = ClassifierGuidance {
            form: ClassifierForm::Mean,
            grad_norm,
            ..ClassifierGuidance::new(posterior, w)
        };
        let mut sampler = Sampler::new(&model, grid.clone())
            .guidance(rule)
            .stepper(Ddim::ancestral());
        let noise = Noise::given(vec![z.clone()]);
        sampler.sample_from(&x, &class, None, noise).unwrap().x
    };
    let free = step(0.0, GradNorm::None);
    let at = candle_core::Var::from_tensor(&x).unwrap();
    let log_p = posterior(at.as_tensor(), &levels[0], &class.for_rows(4).unwrap()).unwrap();
    let grads = log_p.sum_all().unwrap().backward().unwrap();
    let g = grads.get(&at).unwrap();
    let [on_x, on_clean, s] = Ddim::ancestral()
        .coefficients(&levels[0], &levels[1])
        .unwrap();
    let moved = (step(1.5, GradNorm::None) - &free).unwrap();
    assert!(distance(&moved, &(g * (1.5 * s * s)).unwrap()) < 1e-12);
    let null = model
        .denoise(&x, &levels[0].into(), &Condition::Null)
        .unwrap();
    let mean = ((&x * on_x).unwrap() + (null.x0 * on_clean).unwrap()).unwrap();
    let norms = |x: &Tensor| x.sqr().unwrap().sum_keepdim(1).unwrap().sqrt().unwrap();
    let along = g
        .broadcast_mul(&(norms(&mean) / norms(g)).unwrap())
        .unwrap();
    let moved = (step(0.5, GradNorm::MeanMatched) - &free).unwrap();
    assert!(distance(&moved, &(along * (0.5 * s * s)).unwrap()) < 1e-12);
    // Elsewhere there is no such mean.
    let mean = || ClassifierGuidance {
        form: ClassifierForm::Mean,
        ..ClassifierGuidance::new(posterior, 1.0)
    };
    let matched = ClassifierGuidance {
        grad_norm: GradNorm::MeanMatched,
        ..ClassifierGuidance::new(posterior, 1.0)
    };
    for rule in [mean(), matched] {
        let mut sampler = Sampler::new(&model, grid.clone()).guidance(rule);
        let error = sampler.sample(&x, &class, None, &RandomStream::new(0));
        assert!(error.unwrap_err().to_string().contains("Mean"));
    }
}

#[test]
fn bad_rules_are_named() {
    let fails = |rule: Box<dyn Guidance>, words: &str| {
        let mixture = mixture(DType::F64);
        let grid = Grid::uniform_lambda(&schedule::VpSde::default(), 3).unwrap();
        let noise = normal(1, &[2, 3], DType::F64);
        let error = Sampler::new(&mixture, grid)
            .guidance(rule)
            .sample(&noise, &Condition::Null, None, &RandomStream::new(0))
            .unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    };
    fails(Box::new(Cfg::new(f64::NAN)), "Cfg::w");
    fails(Box::new(Autoguidance { w: 2.0 }), "Weak");
    fails(
        Box::new(Interval {
            inner: Cfg::new(2.0),
            lo: 2.0,
            hi: 1.0,
            unit: Unit::Rho,
        }),
        "Interval::hi",
    );
    let nan = |x: &Tensor, _: &Level, _: &Condition| Ok((x.sum(1)? * f64::NAN)?);
    fails(
        Box::new(ClassifierGuidance::new(nan, 1.0)),
        "the clean sample of ClassifierGuidance",
    );
    let cut = |x: &Tensor, _: &Level, _: &Condition| Ok(x.detach().sum(1)?);
    fails(Box::new(ClassifierGuidance::new(cut, 1.0)), "classifier");
    let wrong = |x: &Tensor, _: &Level, _: &Condition| Ok(x.clone());
    fails(
        Box::new(ClassifierGuidance::new(wrong, 1.0)),
        "log-probability",
    );
}

/// The combinations as functions of tensors, for a loop of one's own.
#[test]
fn rules_combine_predictions_that_are_there() {
    use thalweg_guidance::basic::rescale;
    let (wanted, unwanted) = (
        normal(1, &[2, 3, 4], DType::F64),
        normal(2, &[2, 3, 4], DType::F64),
    );
    let guided = Cfg::new(3.0).combine(&wanted, &unwanted).unwrap();
    let by_hand = ((&wanted * 3.0).unwrap() - (&unwanted * 2.0).unwrap()).unwrap();
    assert!(distance(&guided, &by_hand) < 1e-12);
    let spread = |x: &Tensor| {
        let flat = x.flatten_from(1).unwrap();
        values(&flat.var(1).unwrap().sqrt().unwrap())
    };
    let full = rescale(&guided, &wanted, 1.0).unwrap();
    for (a, b) in spread(&full).iter().zip(spread(&wanted)) {
        assert!((a - b).abs() < 1e-12);
    }
    assert_eq!(
        bits(&rescale(&guided, &wanted, 0.0).unwrap()),
        bits(&guided)
    );

    let other = normal(1, &[2, 4, 3], DType::F64);
    assert!(Cfg::new(3.0).combine(&wanted, &other).is_err());
    assert!(rescale(&wanted, &other, 0.5).is_err());
}
