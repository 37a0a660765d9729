//! Gradient-free classifier guidance.

use crate::support::*;
use candle_core::{DType, Device, Tensor};

use flows::schedule::VpSde;
use flows::{
    AnalyticMixture, Condition, Denoised, Denoiser, Grid, Heun, Level, Levels, RandomStream,
    Sampled, Sampler,
};
use guidance::gfcg::*;
use guidance::{Autoguidance, Cfg, Interval, Result, Sum};
use proptest::prelude::*;

/// The mixture's own classifier: perfect, also for noisy samples.
fn posterior(model: &AnalyticMixture) -> OnNoisy<impl Fn(&Tensor, &Levels) -> Result<Tensor> + '_> {
    OnNoisy {
        net: |x: &Tensor, levels: &Levels| Ok(model.log_posterior(x, levels)?),
        temperature: 1.0,
    }
}

/// The same probabilities for every row.
struct Fixed(Vec<f64>);

impl StepClassifier for Fixed {
    fn probs(&self, d: &Denoised) -> Result<Tensor> {
        let rows = d.x.dims()[0];
        Ok(Tensor::new(self.0.clone(), &Device::Cpu)?
            .unsqueeze(0)?
            .repeat((rows, 1))?)
    }
}

fn grid() -> Grid {
    Grid::uniform_lambda_between(&VpSde::default(), 1.0, 0.02, 12).unwrap()
}

fn guided(rule: impl flows::Guidance, classes: &[u32]) -> Sampled {
    let model = mixture(DType::F64).with_leak(0.25).unwrap();
    let weak = mixture(DType::F64).with_leak(0.5).unwrap();
    let wanted = Condition::classes(classes, &Device::Cpu).unwrap();
    let null = Condition::classes(&[3], &Device::Cpu).unwrap();
    let noise = normal(17, &[classes.len(), 3], DType::F64);
    let mut sampler = Sampler::new(&model, grid())
        .weak(&weak)
        .null(null)
        .guidance(rule);
    let out = sampler.sample(&noise, &wanted, None, &RandomStream::new(3));
    out.unwrap()
}

#[test]
fn a_scale_of_one_is_no_guidance() {
    let classes = [0, 1, 2, 1];
    let plain = guided(Cfg::new(1.0), &classes);
    let rule = Gfcg::new(Fixed(vec![0.2, 0.5, 0.3]));
    let out = guided(rule, &classes);
    assert_eq!(bits(&plain.x), bits(&out.x));
    assert_eq!(out.nfe.main, 4 * 12);
    // A classifier that is sure leaves nothing to do, and costs no second evaluation.
    let sure = Gfcg::new(Fixed(vec![0.0, 1.0, 0.0])).scale(5.0);
    let out = guided(sure, &[1; 4]);
    assert_eq!(bits(&guided(Cfg::new(1.0), &[1; 4]).x), bits(&out.x));
    assert_eq!((out.nfe.main, out.nfe.classifier_forward), (4 * 12, 4 * 12));
}

/// With two classes and a constant weight the other class is a negative condition.
#[test]
fn two_classes_and_a_constant_weight_are_a_negative_condition() {
    let means = normal(5, &[4, 3], DType::F64);
    let model = AnalyticMixture::new(&means, &[0.1; 4], &[1.0; 4])
        .unwrap()
        .with_classes(&[0, 1, 0, 1])
        .unwrap();
    let class = |k: u32| Condition::classes(&[k], &Device::Cpu).unwrap();
    let noise = normal(6, &[5, 3], DType::F64);
    let rng = RandomStream::new(0);
    let rule = Gfcg::new(posterior(&model))
        .scale(3.0)
        .rule(ScaleRule::Constant);
    let a = Sampler::new(&model, grid())
        .guidance(rule)
        .sample(&noise, &class(0), None, &rng)
        .unwrap();
    let b = Sampler::new(&model, grid())
        .guidance(Cfg::new(3.0))
        .sample(&noise, &class(0), Some(&class(1)), &rng)
        .unwrap();
    assert!(distance(&a.x, &b.x) < 1e-12);
    assert_eq!(a.nfe.main, b.nfe.main);
}

proptest! {
    #![proptest_config(cases(12))]

    /// `D_c - D_r = sigma^2 / alpha grad log (p(x | c) / p(x | r))`.
    #[test]
    fn the_direction_is_the_gradient_of_a_log_ratio(seed in 0u64..1000, lambda in -3.0f64..3.0) {
        let model = mixture(DType::F64);
        let level: Level = flows::Schedule::at_lambda(&VpSde::default(), lambda).unwrap();
        let class = |k: u32| Condition::classes(&[k; 4], &Device::Cpu).unwrap();
        let x = candle_core::Var::from_tensor(&normal(seed, &[4, 3], DType::F64)).unwrap();
        let density = |k| model.log_density(&x, &level.into(), &class(k)).unwrap();
        let ratio = (density(0) - density(2)).unwrap().sum_all().unwrap();
        let gradient = ratio.backward().unwrap().get(&x).unwrap().clone();
        let clean = |k| model.denoise(&x, &level.into(), &class(k)).unwrap().x0;
        let direction = (clean(0) - clean(2)).unwrap();
        let factor = level.sigma * level.sigma / level.alpha;
        prop_assert!(distance(&direction, &(gradient * factor).unwrap()) < 1e-9 * (1.0 + factor));
    }

    /// Naming the classes differently changes nothing.
    #[test]
    fn names_of_classes_do_not_matter(seed in 0u64..1000, w in 1.5f64..5.0) {
        let means = normal(seed, &[6, 3], DType::F64);
        let (names, other) = ([0u32, 1, 2, 0, 1, 2], [2u32, 0, 1, 2, 0, 1]);
        let sample = |names: &[u32], wanted: u32| {
            let model = AnalyticMixture::new(&means, &[0.1; 6], &[1.0; 6]).unwrap();
            let model = model.with_classes(names).unwrap().with_leak(0.2).unwrap();
            let wanted = Condition::classes(&[wanted], &Device::Cpu).unwrap();
            let rule = Gfcg::new(posterior(&model)).scale(w);
            let noise = normal(seed + 1, &[3, 3], DType::F64);
            let mut sampler = Sampler::new(&model, grid()).guidance(rule);
            let out = sampler.sample(&noise, &wanted, None, &RandomStream::new(0));
            out.unwrap().x
        };
        prop_assert!(distance(&sample(&names, 0), &sample(&other, 2)) < 1e-9);
    }
}

#[test]
fn rows_do_not_depend_on_each_other() {
    let model = mixture(DType::F64).with_leak(0.25).unwrap();
    let classes = [0u32, 1, 2, 1];
    let rule = || Gfcg::new(posterior(&model)).scale(3.0).with_cfg(1.5);
    let all = guided(rule(), &classes);
    let noise = normal(17, &[4, 3], DType::F64);
    let null = Condition::classes(&[3], &Device::Cpu).unwrap();
    for (i, class) in classes.iter().enumerate() {
        let wanted = Condition::classes(&[*class], &Device::Cpu).unwrap();
        let one = Sampler::new(&model, grid())
            .null(null.clone())
            .guidance(rule())
            .sample(
                &noise.narrow(0, i, 1).unwrap(),
                &wanted,
                None,
                &RandomStream::new(3),
            )
            .unwrap();
        assert_eq!(bits(&one.x), bits(&all.x.narrow(0, i, 1).unwrap()));
    }
}

#[test]
fn every_mode_costs_what_it_says() {
    let rows = 4;
    let unsure = || Fixed(vec![0.4, 0.35, 0.25]);
    let per_step = |rule: Gfcg<Fixed>| {
        let out = guided(rule.scale(3.0), &[1; 4]);
        let count = |n: usize| n / (rows * 12);
        assert_eq!(out.nfe.classifier_forward, rows * 12);
        (
            count(out.nfe.main),
            count(out.nfe.weak),
            out.nfe.sequential_calls / 12,
        )
    };
    assert_eq!(per_step(Gfcg::new(unsure())), (2, 0, 2));
    // The null prediction shares a call with the reference's.
    assert_eq!(per_step(Gfcg::new(unsure()).with_cfg(1.5)), (3, 0, 2));
    assert_eq!(
        per_step(Gfcg::new(unsure()).with_weak(SwapMode::Adaptive)),
        (1, 1, 2)
    );
    assert_eq!(
        per_step(Gfcg::new(unsure()).with_weak(SwapMode::WhenUnsure { p: 0.5 })),
        (1, 1, 2)
    );
    // Lagged: one call from the second step on.
    let lagged = guided(Gfcg::new(unsure()).scale(3.0).lagged(), &[1; 4]);
    assert_eq!(
        (lagged.nfe.main, lagged.nfe.sequential_calls),
        (2 * 4 * 12, 13)
    );
    // The reference never changes here, so that it makes no difference.
    assert_eq!(
        bits(&lagged.x),
        bits(&guided(Gfcg::new(unsure()).scale(3.0), &[1; 4]).x)
    );
    let rare = guided(Gfcg::new(unsure()).scale(3.0).every(5), &[1; 4]);
    assert_eq!(rare.nfe.classifier_forward, 3 * 4);
    assert_eq!(bits(&rare.x), bits(&lagged.x));
}

#[test]
fn a_weak_model_that_is_asked_for_the_wanted_class_is_autoguidance() {
    let sure = Gfcg::new(Fixed(vec![0.2, 0.6, 0.2]))
        .scale(2.5)
        .with_weak(SwapMode::WhenUnsure { p: 0.5 });
    let (a, b) = (
        guided(sure, &[1; 3]),
        guided(Autoguidance { w: 2.5 }, &[1; 3]),
    );
    assert!(distance(&a.x, &b.x) < 1e-12);
    assert_eq!((a.nfe.main, a.nfe.weak), (b.nfe.main, b.nfe.weak));
}

#[test]
fn references_and_weights_follow_their_rules() {
    let decide = |rule: Gfcg<Fixed>, class: u32| {
        let mut rule = rule.scale(3.0);
        guided(&mut rule, &[class]);
        let first = rule.trace()[0].clone();
        assert_eq!(rule.trace().len(), 12);
        (first.reference[0], first.weight[0])
    };
    let p = || Fixed(vec![0.3, 0.5, 0.2]);
    assert_eq!(decide(Gfcg::new(p()), 1), (Some(0), 1.0));
    assert_eq!(
        decide(Gfcg::new(p()).rule(ScaleRule::Constant), 1),
        (Some(0), 2.0)
    );
    let ratio = decide(Gfcg::new(p()).rule(ScaleRule::Ratio), 1);
    assert!((ratio.1 - 2.0 * 0.3 / 0.8).abs() < 1e-12);
    let custom = ScaleRule::Custom(|c, r, level| c + r + level.sigma * 0.0);
    assert_eq!(decide(Gfcg::new(p()).rule(custom), 1), (Some(0), 0.8));
    assert_eq!(
        decide(Gfcg::new(p()).reference(RefRule::Argmax), 1),
        (None, 0.0)
    );
    assert_eq!(
        decide(Gfcg::new(p()).reference(RefRule::Argmax), 0).0,
        Some(1)
    );
    let pool = RefRule::Restricted(vec![2, 1]);
    assert_eq!(decide(Gfcg::new(p()).reference(pool.clone()), 1).0, Some(2));
    assert_eq!(
        decide(Gfcg::new(p()).reference(RefRule::Restricted(vec![1])), 1),
        (None, 0.0)
    );
    // Ties go to the lowest index; a floor keeps a little guidance.
    assert_eq!(
        decide(Gfcg::new(Fixed(vec![0.25, 0.5, 0.25])), 1).0,
        Some(0)
    );
    assert_eq!(
        decide(Gfcg::new(Fixed(vec![0.0, 1.0, 0.0])).floor(0.4), 1),
        (Some(0), 0.4)
    );
    // A single class has no other.
    let mut one = Gfcg::new(Fixed(vec![1.0])).scale(3.0);
    let out = guided(&mut one, &[0]);
    assert_eq!(out.nfe.main, 12);
}

#[test]
fn classifiers_see_what_they_should() {
    let d = Denoised {
        x: Tensor::new(&[[3.0f64, -4.0]], &Device::Cpu).unwrap(),
        x0: Tensor::new(&[[2.0f64, 0.5]], &Device::Cpu).unwrap(),
        levels: Level::new(0.6, 0.8, 0.0).unwrap().into(),
    };
    let close = |found: Tensor, logits: [f64; 2]| {
        let total: f64 = logits.iter().map(|l| l.exp()).sum();
        for (p, l) in values(&found).into_iter().zip(logits) {
            assert!((p - l.exp() / total).abs() < 1e-12);
        }
    };
    let same = |x: &Tensor| Ok(x.clone());
    close(OnDenoised::new(same).probs(&d).unwrap(), [1.0, 0.5]);
    close(
        OnDenoised::new(same)
            .clip(None)
            .temperature(2.0)
            .probs(&d)
            .unwrap(),
        [1.0, 0.25],
    );
    let decoded = OnDenoised::new(same)
        .clip(Some(0.8))
        .decode(|x| Ok((x * 0.5)?));
    close(decoded.probs(&d).unwrap(), [0.8, 0.25]);
    let noisy = OnNoisy {
        net: |x: &Tensor, l: &Levels| Ok(l.scale(x, |l| l.sigma)?),
        temperature: 1.0,
    };
    close(noisy.probs(&d).unwrap(), [2.4, -3.2]);
    let text = Tensor::new(&[[2.0f64, 0.0], [0.0, 3.0]], &Device::Cpu).unwrap();
    let zero = ZeroShot {
        image_encoder: same,
        text_embeddings: text,
        temperature: 0.5,
    };
    let norm = (4.0f64 + 0.25).sqrt();
    close(zero.probs(&d).unwrap(), [4.0 / norm, 1.0 / norm]);
    assert!(OnDenoised::new(same).temperature(0.0).probs(&d).is_err());
}

/// A model of embeddings: each class has a prompt.
#[test]
fn prompts_stand_for_classes() {
    let model = mixture(DType::F64);
    let prompted = flows::Closure::new(
        flows::Prediction::X0,
        |x: &Tensor, l: &Levels, c: &Condition| {
            let Condition::Embedding(e) = c else {
                return Err(flows::Error::other("no embedding"));
            };
            let class = e.argmax(1)?;
            model.raw(x, l, &Condition::Class(class))
        },
    );
    let prompt = |k: usize| {
        let mut e = vec![0.0; 3];
        e[k] = 1.0;
        Condition::Embedding(Tensor::from_vec(e, (1, 3), &Device::Cpu).unwrap())
    };
    let noise = normal(1, &[4, 3], DType::F64);
    let rng = RandomStream::new(0);
    let rule = Gfcg::new(posterior(&model))
        .scale(4.0)
        .prompts(&[1], (0..3).map(prompt).collect());
    let a = Sampler::new(&prompted, grid())
        .guidance(rule)
        .sample(&noise, &prompt(1), None, &rng)
        .unwrap();
    let class = Condition::classes(&[1], &Device::Cpu).unwrap();
    let rule = Gfcg::new(posterior(&model)).scale(4.0);
    let b = Sampler::new(&model, grid())
        .guidance(rule)
        .sample(&noise, &class, None, &rng)
        .unwrap();
    assert!(distance(&a.x, &b.x) < 1e-12);
    let unnamed = Gfcg::new(posterior(&model)).scale(4.0);
    let error =
        Sampler::new(&prompted, grid())
            .guidance(unnamed)
            .sample(&noise, &prompt(1), None, &rng);
    assert!(error.unwrap_err().to_string().contains("Gfcg::prompts"));
}

#[test]
fn it_composes_and_works_with_two_stage_steps() {
    let model = mixture(DType::F64);
    let inner = Gfcg::new(posterior(&model)).scale(3.0);
    let late = Interval {
        inner,
        lo: -1.0,
        hi: 1.0,
        unit: Default::default(),
    };
    let out = guided(Sum::new().and(1.0, late).and(0.5, Cfg::new(2.0)), &[1, 2]);
    assert!(values(&out.x).iter().all(|x| x.is_finite()));
    let class = Condition::classes(&[1], &Device::Cpu).unwrap();
    let single = Gfcg::new(posterior(&model)).scale(3.0);
    let noise = normal(2, &[1, 3], DType::F32);
    let out = Sampler::new(&model, grid()).stepper(Heun).guidance(single);
    let out = { out }
        .sample(&noise, &class, None, &RandomStream::new(0))
        .unwrap();
    assert_eq!(out.x.dtype(), DType::F32);
}

#[test]
fn bad_input_is_named() {
    let fails = |rule: Gfcg<Fixed>, classes: &[u32]| {
        let model = mixture(DType::F64);
        let wanted = Condition::classes(classes, &Device::Cpu).unwrap();
        let noise = normal(1, &[classes.len(), 3], DType::F64);
        let out = Sampler::new(&model, grid()).guidance(rule).sample(
            &noise,
            &wanted,
            None,
            &RandomStream::new(0),
        );
        out.unwrap_err().to_string()
    };
    let p = || Gfcg::new(Fixed(vec![0.3, 0.5, 0.2])).scale(2.0);
    assert!(fails(p().scale(f64::NAN), &[0]).contains("Gfcg::scale = NaN"));
    assert!(fails(p().every(0), &[0]).contains("Gfcg::every"));
    assert!(fails(p().skip_below(-1.0), &[0]).contains("skip_below"));
    assert!(fails(p().floor(-1.0), &[0]).contains("floor"));
    assert!(fails(p().with_weak(SwapMode::WhenUnsure { p: 2.0 }), &[0]).contains("WhenUnsure"));
    assert!(fails(p().with_weak(SwapMode::Always), &[0]).contains("Weak"));
    assert!(fails(p().lagged().every(2), &[0]).contains("lagged"));
    assert!(fails(p().reference(RefRule::Restricted(vec![7])), &[0])
        .contains("class of RefRule::Restricted = 7"));
    assert!(fails(Gfcg::new(Fixed(vec![0.5, 0.5])).scale(2.0), &[2]).contains("wanted class = 2"));
    assert!(fails(Gfcg::new(Fixed(vec![0.5, f64::NAN, 0.1])).scale(2.0), &[0]).contains("GFCG"));
    // No number is not the floor.
    let none = p().rule(ScaleRule::Custom(|_, _, _| f64::NAN));
    assert!(fails(none, &[0]).contains("the weight of row 0"));
    assert_eq!(SwapMode::default(), SwapMode::WhenUnsure { p: 0.5 });
    assert!(fails(p().prompts(&[0, 1], vec![]), &[0]).contains("number of wanted classes"));
    let narrow = Gfcg::new(Fixed(vec![])).scale(2.0);
    assert!(fails(narrow, &[0]).contains("[1, classes]"));
}
