//! Adaptive guidance.

use crate::support::*;
use candle_core::{DType, Device, Tensor};
use flows::schedule::VpSde;
use flows::{
    Closure, Condition, Ddim, Grid, Heun, Level, Prediction, RandomStream, Sampled, Sampler,
};
use guidance::adaptive::policy::{options, Policy, PolicySearch, SoftPolicy};
use guidance::adaptive::*;
use guidance::{Cfg, LinearAg, LinearAgFitter, Space};

fn grid(steps: usize) -> Grid {
    Grid::uniform_lambda_between(&VpSde::default(), 1.0, 0.02, steps).unwrap()
}

#[test]
fn thresholds_beyond_the_ends() {
    let (never, cfg) = (
        run(AdaptiveGuidance::new(3.0).threshold(1.1), 4),
        run(Cfg::new(3.0), 4),
    );
    assert_eq!((bits(&never.x), never.nfe), (bits(&cfg.x), cfg.nfe));
    let mut rule = AdaptiveGuidance::new(3.0).threshold(-1.0);
    let once = run(&mut rule, 4);
    assert_eq!(once.nfe.main, 4 * (12 + 1));
    let guided: Vec<bool> = rule.trace().iter().map(|s| s.active[0]).collect();
    assert!(guided[0] && guided[1..].iter().all(|on| !on));
    let plain = run(AdaptiveGuidance::new(1.0), 4);
    assert_eq!(plain.nfe.main, 4 * 12);
    let later = run(AdaptiveGuidance::new(3.0).threshold(-1.0).min_steps(5), 4);
    assert_eq!(later.nfe.main, 4 * (12 + 5));
}

#[test]
fn samples_decide_for_themselves() {
    let mut rule = AdaptiveGuidance::new(4.0).threshold(0.97);
    let all = run(&mut rule, 6);
    let guided = |row: usize| rule.trace().iter().filter(|s| s.active[row]).count();
    let counts: Vec<usize> = (0..6).map(guided).collect();
    assert!(counts.iter().any(|c| *c != counts[0]), "{counts:?}");
    assert_eq!(all.nfe.main, 6 * 12 + counts.iter().sum::<usize>());
    // The first rows of a larger batch are those of a smaller one.
    let some = run(AdaptiveGuidance::new(4.0).threshold(0.97), 3);
    assert!(distance(&all.x.narrow(0, 0, 3).unwrap(), &some.x) < 1e-10);
    let mut whole = AdaptiveGuidance::new(4.0)
        .threshold(0.97)
        .rows(CosineRows::WholeBatch);
    run(&mut whole, 6);
    assert!(whole
        .trace()
        .iter()
        .all(|s| s.active.iter().all(|on| *on == s.active[0])));
}

/// A model whose two predictions differ by a polynomial of the step.
fn polynomial(rule: AdaptiveGuidance, degree: i32) -> Sampled {
    let grid = grid(8);
    let levels: Vec<Level> = grid.levels().to_vec();
    let model = Closure::new(Prediction::X0, |x, at, c| {
        let level = at.first().copied().unwrap_or(levels[0]);
        let i = levels.iter().position(|l| *l == level).unwrap_or(0) as f64;
        let shift = if matches!(c, Condition::Null) {
            0.0
        } else {
            0.3 + 0.1 * i.powi(degree)
        };
        Ok(x.affine(0.2, shift)?)
    });
    let noise = normal(2, &[3, 2], DType::F64);
    let class = Condition::classes(&[0], &Device::Cpu).unwrap();
    let mut sampler = Sampler::new(&model, grid).guidance(rule);
    sampler
        .sample(&noise, &class, None, &RandomStream::new(0))
        .unwrap()
}

#[test]
fn differences_are_held_and_extrapolated() {
    let early = |after| {
        AdaptiveGuidance::new(3.0)
            .threshold(-2.0)
            .min_steps(3)
            .after(after)
    };
    for (degree, order) in [(0, 0), (1, 1), (2, 2)] {
        let full = polynomial(AdaptiveGuidance::new(3.0).threshold(2.0), degree);
        let saved = polynomial(early(After::ExtrapolateDelta { order }), degree);
        assert!(distance(&full.x, &saved.x) < 1e-10, "{degree}");
        assert_eq!(saved.nfe.main, 3 * (8 + 3));
        let plain = polynomial(early(After::Conditional), degree);
        assert!(distance(&full.x, &plain.x) > 1e-3);
    }
    let (held, zeroth) = (
        early(After::HoldDelta),
        early(After::ExtrapolateDelta { order: 0 }),
    );
    assert_eq!(bits(&polynomial(held, 2).x), bits(&polynomial(zeroth, 2).x));
}

#[test]
fn a_threshold_is_suggested_from_recorded_cosines() {
    let mut recording = AdaptiveGuidance::new(4.0).threshold(2.0);
    run(&mut recording, 6);
    for target in [14.0, 18.0, 22.0] {
        let threshold = suggest_threshold(&[recording.trace()], target).unwrap();
        let spent = run(AdaptiveGuidance::new(4.0).threshold(threshold), 6)
            .nfe
            .per_sample(6);
        assert!((spent - target).abs() < 3.0, "{target}: {spent}");
    }
    assert!(suggest_threshold(&[recording.trace()], 40.0).is_err());
    assert!(suggest_threshold(&[], 14.0).is_err());
    let mut ended = AdaptiveGuidance::new(4.0).threshold(-1.0);
    run(&mut ended, 2);
    assert!(suggest_threshold(&[ended.trace()], 14.0).is_err());
}

/// A model whose unconditional noise is half of the conditional one.
fn half(x: &Tensor, levels: &flows::Levels, c: &Condition) -> flows::Result<Tensor> {
    let eps = levels.scale(&x.tanh()?, |l| l.sigma)?;
    Ok(if matches!(c, Condition::Null) {
        (eps * 0.5)?
    } else {
        eps
    })
}

#[test]
fn what_is_a_combination_is_found_and_can_be_kept() {
    let model = Closure::new(Prediction::Eps, half);
    let kinds = StepKind::alternating(8, 6);
    let class = Condition::classes(&[0], &Device::Cpu).unwrap();
    let rng = RandomStream::new(0);
    let noise = normal(3, &[40, 2], DType::F64);
    let fitter = LinearAgFitter::new(3.0, kinds.clone());
    let mut rule = fitter
        .fit(Sampler::new(&model, grid(8)), &noise, &class, None, &rng)
        .unwrap();
    assert_eq!(rule.nfe(), 8 + 3);
    let fresh = normal(4, &[5, 2], DType::F64);
    let sample = |rule: &mut LinearAg, grid: Grid| {
        Sampler::new(&model, grid)
            .guidance(rule)
            .sample(&fresh, &class, None, &rng)
    };
    let found = sample(&mut rule, grid(8)).unwrap();
    assert_eq!(found.nfe.main, 5 * 11);
    // The same steps with the true prediction.
    struct True(Vec<StepKind>);
    impl flows::Guidance for True {
        fn guide(
            &mut self,
            cx: &flows::StepCx,
            net: &mut flows::Evaluator,
        ) -> flows::Result<flows::Denoised> {
            let w = if self.0[cx.step] == StepKind::Cond {
                1.0
            } else {
                3.0
            };
            Cfg::new(w).guide(cx, net)
        }
    }
    let exact = Sampler::new(&model, grid(8))
        .guidance(True(kinds))
        .sample(&fresh, &class, None, &rng)
        .unwrap();
    assert!(distance(&found.x, &exact.x) < 1e-4);
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("linear.safetensors");
    rule.save(&file).unwrap();
    let mut loaded = LinearAg::load(&file).unwrap();
    assert_eq!(
        (loaded.w(), loaded.kinds(), loaded.coef()),
        (rule.w(), rule.kinds(), rule.coef())
    );
    assert_eq!(
        bits(&sample(&mut loaded, grid(8)).unwrap().x),
        bits(&found.x)
    );
    let other = Grid::uniform_time(&VpSde::default(), 8).unwrap();
    let refused = sample(&mut loaded, other).unwrap_err().to_string();
    assert!(refused.contains("another grid"), "{refused}");
    let mut stochastic = Sampler::new(&model, grid(8))
        .guidance(&mut loaded)
        .stepper(Ddim { eta: 0.5 });
    let refused = stochastic.sample(&fresh, &class, None, &rng).unwrap_err();
    assert!(
        refused.to_string().contains("Ddim { eta: 0.0 }"),
        "{refused}"
    );
    drop(stochastic);
    // Without its first steps, and in a part of a run, there is nothing to combine.
    let late = guidance::Interval {
        inner: &mut loaded,
        lo: 0.3,
        hi: 2.0,
        unit: guidance::basic::Unit::Progress,
    };
    let mut sampler = Sampler::new(&model, grid(8)).guidance(late);
    let refused = sampler.sample(&fresh, &class, None, &rng).unwrap_err();
    assert!(refused.to_string().contains("a part of a run"), "{refused}");
    drop(sampler);
    let mut heun = Sampler::new(&model, grid(8))
        .guidance(&mut loaded)
        .stepper(Heun);
    assert!(heun.sample(&fresh, &class, None, &rng).is_err());
    // With a shorter history and a constant.
    let shorter = LinearAgFitter {
        history: FitHistory::Last(2),
        intercept: true,
        ..fitter
    };
    let rule = shorter
        .fit(Sampler::new(&model, grid(8)), &noise, &class, None, &rng)
        .unwrap();
    let coef = rule.coef()[5].as_ref().unwrap();
    assert_eq!(
        (coef.first, coef.weights.len(), coef.intercept.is_some()),
        (4, 3, true)
    );
}

#[test]
fn fits_refuse_what_cannot_be_fitted() {
    let model = Closure::new(Prediction::Eps, half);
    let noise = normal(3, &[4, 2], DType::F64);
    let fails = |fitter: LinearAgFitter, words: &str| {
        let sampler = Sampler::new(&model, grid(3));
        let error = fitter
            .fit(
                sampler,
                &noise,
                &Condition::Null,
                None,
                &RandomStream::new(0),
            )
            .unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    };
    fails(LinearAgFitter::new(3.0, vec![StepKind::Linear; 3]), "kinds");
    fails(
        LinearAgFitter::new(3.0, StepKind::alternating(4, 2)),
        "kinds",
    );
    let ridge = LinearAgFitter {
        ridge: 0.0,
        ..LinearAgFitter::new(3.0, StepKind::alternating(3, 2))
    };
    fails(ridge, "ridge");
    let levels = grid(2).levels().to_vec();
    let cfg = vec![StepKind::Cfg; 2];
    assert!(LinearAg::new(3.0, cfg.clone(), vec![None; 2], levels.clone()).is_ok());
    assert!(LinearAg::new(3.0, cfg, vec![None], levels.clone()).is_err());
    let beyond = LinCoef {
        first: 2,
        weights: vec![1.0],
        intercept: None,
    };
    let kinds = vec![StepKind::Cfg, StepKind::Linear];
    assert!(LinearAg::new(3.0, kinds, vec![None, Some(beyond)], levels).is_err());
    let bad = LinearAg::new(
        3.0,
        vec![StepKind::Linear],
        vec![None],
        grid(1).levels().to_vec(),
    );
    assert!(bad.is_err());
}

#[test]
fn policies_choose_and_mix() {
    let logits = Tensor::new(&[[0.0_f64, 0.0, 0.0, 50.0, 0.0]], &Device::Cpu).unwrap();
    let logits = logits.broadcast_as((12, 5)).unwrap().contiguous().unwrap();
    let soft = SoftPolicy {
        logits: logits.clone(),
        tau: 0.1,
        options: options(3.0),
    };
    assert!((values(&soft.cost().unwrap())[0] - 24.0).abs() < 1e-9);
    assert!(distance(&run(soft, 3).x, &run(Cfg::new(3.0), 3).x) < 1e-10);
    let hard = Policy::new(logits.to_vec2().unwrap(), options(3.0)).unwrap();
    assert_eq!((hard.nfe(), hard.choice.clone()), (24.0, vec![3; 12]));
    assert_eq!(bits(&run(hard, 3).x), bits(&run(Cfg::new(3.0), 3).x));
    let mut mixed = vec![vec![0.0; 5]; 12];
    mixed[0][0] = 1.0;
    mixed[1][1] = 1.0;
    let mixed = Policy::new(mixed, options(3.0)).unwrap();
    // Without a preference the first option, here unconditional, is taken.
    assert_eq!(run(mixed, 2).nfe.main, 2 * 12);
    let short = Policy::new(vec![vec![0.0; 5]; 3], options(3.0)).unwrap();
    let mixture = mixture(DType::F64);
    let noise = normal(1, &[2, 3], DType::F64);
    let refused = Sampler::new(&mixture, grid(4)).guidance(short).sample(
        &noise,
        &Condition::Null,
        None,
        &RandomStream::new(0),
    );
    assert!(refused.is_err());
    assert!(Policy::new(vec![vec![0.0; 2]], options(3.0)).is_err());
}

#[test]
fn a_search_drops_evaluations_that_do_nothing() {
    // Both predictions agree: guidance is worth nothing, and one evaluation is cheaper.
    let model = Closure::new(Prediction::X0, |x, _, _| Ok(x.tanh()?));
    let search = PolicySearch {
        iterations: 60,
        batch: 4,
        lambda: 0.1,
        ..PolicySearch::new(3.0)
    };
    let draw = |n: usize, rng: &mut RandomStream| {
        let noise = rng.normal(0.0, 1.0, (n, 2), DType::F32, &Device::Cpu)?;
        Ok((noise, Condition::classes(&[0], &Device::Cpu)?))
    };
    let mut rng = RandomStream::new(1);
    let policy = search
        .search(&model, &grid(4), &Condition::Null, draw, &mut rng)
        .unwrap();
    assert_eq!(policy.nfe(), 4.0, "{:?}", policy.choice);
    let cut = Closure::new(Prediction::X0, |x, _, _| {
        Ok((x.detach().tanh()? + (x * 0.1)?)?)
    });
    let lost = search
        .search(&cut, &grid(4), &Condition::Null, draw, &mut rng)
        .unwrap_err();
    assert!(lost.to_string().contains("gradient"), "{lost}");
}

#[test]
fn forms_differ_and_nan_is_named() {
    let early = |space| {
        let mut rule = AdaptiveGuidance::new(3.0).threshold(0.991).space(space);
        run(&mut rule, 3).nfe.main
    };
    // Noise predictions agree from the start.
    assert!(early(Space::Eps) < early(Space::X0));
    let bad = AdaptiveGuidance::new(f64::NAN);
    let mixture = mixture(DType::F64);
    let noise = normal(1, &[2, 3], DType::F64);
    let mut sampler = Sampler::new(&mixture, grid(3)).guidance(bad);
    let error = sampler
        .sample(&noise, &Condition::Null, None, &RandomStream::new(0))
        .unwrap_err();
    assert!(error.to_string().contains("AdaptiveGuidance::w"), "{error}");
}

/// Coefficients that were fitted on true predictions do not survive their own estimates.
#[test]
fn fits_on_the_own_trajectories_are_better() {
    let model = mixture(DType::F64);
    let rng = RandomStream::new(0);
    let classes: Vec<u32> = (0..60).map(|i| i % 3).collect();
    let fit_classes = Condition::classes(&classes, &Device::Cpu).unwrap();
    let noise = normal(5, &[60, 3], DType::F64);
    let sampler = || {
        let null = Condition::classes(&[3], &Device::Cpu).unwrap();
        Sampler::new(&model, grid(16)).null(null)
    };
    let fresh = normal(6, &[60, 3], DType::F64);
    let full = sampler()
        .guidance(Cfg::new(4.0))
        .sample(&fresh, &fit_classes, None, &rng)
        .unwrap()
        .x;
    let error = |mode| {
        let fitter = LinearAgFitter {
            mode,
            ..LinearAgFitter::new(4.0, StepKind::alternating(16, 16))
        };
        let mut rule = fitter
            .fit(sampler(), &noise, &fit_classes, None, &rng)
            .unwrap();
        let x = sampler()
            .guidance(&mut rule)
            .sample(&fresh, &fit_classes, None, &rng);
        // An explosion may end in numbers that are none.
        x.map_or(f64::INFINITY, |out| distance(&out.x, &full))
    };
    let (own, teacher) = (error(FitMode::OnPolicy), error(FitMode::TeacherForced));
    assert!(teacher > 1.5 * own, "{own} {teacher}");
}
