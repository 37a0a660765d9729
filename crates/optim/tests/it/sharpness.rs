use crate::support::*;
use candle_core::{DType, Tensor, Var};
use candle_nn::Optimizer;
use optim::schedule::Linear;
use optim::sharpness::*;
use optim::{ClosureOptimizer, Error, RandomStream, SgdConfig, SgdMomentum};
use proptest::prelude::*;
use std::sync::{Arc, Mutex};

#[test]
fn reference() {
    let report = FILES.verify("udim", optim::verify::sharpness);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 7);
    let later = |(name, _): &(String, String)| name.starts_with("udim_");
    assert!(report.uncovered.iter().all(later));
}

/// A small net without biases, so that its layers can be rescaled against each other.
struct Net {
    x: Tensor,
    y: Tensor,
    w1: Var,
    w2: Var,
}

impl Net {
    fn new(seed: u64, dtype: DType) -> Self {
        let mut rng = RandomStream::new(seed);
        Self {
            x: normal(&mut rng, &[10, 4], dtype),
            y: normal(&mut rng, &[10, 2], dtype),
            w1: normal_var(&mut rng, &[4, 6], dtype),
            w2: normal_var(&mut rng, &[6, 2], dtype),
        }
    }

    fn vars(&self) -> Vec<Var> {
        vec![self.w1.clone(), self.w2.clone()]
    }

    fn loss(&self) -> candle_core::Result<Tensor> {
        let z = self.x.matmul(&self.w1)?.relu()?.matmul(&self.w2)?;
        (z - &self.y)?.sqr()?.mean_all()
    }

    fn wrap(&self, kind: Sharpness) -> SharpnessAware<SgdMomentum> {
        let config = SgdConfig {
            lr: 0.05,
            ..SgdConfig::default()
        };
        let sgd = SgdMomentum::new(self.vars(), config).unwrap();
        SharpnessAware::new(self.vars(), kind, sgd).unwrap()
    }

    fn flat_gradient(&self) -> Vec<f64> {
        let grads = self.loss().unwrap().backward().unwrap();
        self.vars()
            .iter()
            .flat_map(|v| values(grads.get(v).unwrap()))
            .collect()
    }

    fn direction(&self, kind: Sharpness) -> (Vec<f64>, SharpReport) {
        let (grads, report) = self.wrap(kind).gradient(&mut || self.loss()).unwrap();
        let flat = self
            .vars()
            .iter()
            .flat_map(|v| values(grads.get(v).unwrap()))
            .collect();
        (flat, report)
    }

    fn bits(&self) -> Vec<Vec<u64>> {
        self.vars().iter().map(|v| bits(v)).collect()
    }
}

fn all() -> [Sharpness; 6] {
    [
        Sharpness::sam(),
        Sharpness::asam(),
        Sharpness::gsam(),
        Sharpness::Gsam {
            rho: 0.3,
            alpha: 0.4,
            adaptive: true,
        },
        Sharpness::sagm(),
        Sharpness::gam(),
    ]
}

fn inner(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn without_radius_all_is_the_plain_gradient() {
    let net = Net::new(1, DType::F64);
    let plain = net.flat_gradient();
    let zero = [
        Sharpness::Sam { rho: 0.0 },
        Sharpness::Asam {
            rho: 0.0,
            eta: 0.01,
        },
        Sharpness::Gsam {
            rho: 0.0,
            alpha: 0.0,
            adaptive: false,
        },
        Sharpness::Sagm {
            rho: 0.0,
            alpha: 0.0,
        },
    ];
    for kind in zero {
        assert_close(&net.direction(kind).0, &plain, 1e-14);
    }
}

#[test]
fn parameters_come_back_bit_for_bit_and_passes_are_counted() {
    for dtype in [DType::F32, DType::F64] {
        let net = Net::new(2, dtype);
        let before = net.bits();
        for (kind, passes) in all().into_iter().zip([2, 2, 2, 2, 2, 4]) {
            let (_, report) = net.direction(kind);
            assert_eq!(net.bits(), before, "{kind:?}");
            assert_eq!(report.passes, passes, "{kind:?}");
            assert!((report.loss - values(&net.loss().unwrap())[0]).abs() < 1e-6);
        }
    }
}

#[test]
fn the_perturbation_has_the_length_of_the_radius() {
    let net = Net::new(3, DType::F64);
    let g = net.flat_gradient();
    let size = inner(&g, &g).sqrt();
    for rho in [0.01, 0.5] {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (record, vars) = (seen.clone(), net.vars());
        let mut sam = net.wrap(Sharpness::Sam { rho });
        let mut loss = || {
            let flat: Vec<f64> = vars.iter().flat_map(|v| values(v)).collect();
            record.lock().unwrap().push(flat);
            net.loss()
        };
        sam.gradient(&mut loss).unwrap();
        let seen = seen.lock().unwrap();
        let e: Vec<f64> = seen[1].iter().zip(&seen[0]).map(|(a, b)| a - b).collect();
        assert!((inner(&e, &e).sqrt() - rho).abs() < 1e-12);
        assert!((inner(&e, &g) - rho * size).abs() < 1e-10);
    }
}

proptest! {
    #![proptest_config(cases(12))]

    /// What GSAM subtracts has no component along the perturbed gradient.
    #[test]
    fn gsam_changes_the_direction_only_across(seed in 0u64..500, alpha in 0.0f64..2.0) {
        let net = Net::new(seed, DType::F64);
        let (gp, _) = net.direction(Sharpness::Sam { rho: 0.05 });
        let (d, _) = net.direction(Sharpness::Gsam { rho: 0.05, alpha, adaptive: false });
        let change: Vec<f64> = d.iter().zip(&gp).map(|(d, g)| d - g).collect();
        prop_assert!(inner(&change, &gp).abs() <= 1e-10 * inner(&gp, &gp));
    }

    /// ASAM with `eta = 0` climbs equally high whatever scale the layers share out.
    #[test]
    fn asam_does_not_see_the_scale_of_layers(seed in 0u64..500, k in 0.1f64..10.0) {
        let net = Net::new(seed, DType::F64);
        let kind = Sharpness::Asam { rho: 0.5, eta: 0.0 };
        let (_, plain) = net.direction(kind);
        net.w1.set(&net.w1.affine(k, 0.0).unwrap()).unwrap();
        net.w2.set(&net.w2.affine(1.0 / k, 0.0).unwrap()).unwrap();
        let (_, rescaled) = net.direction(kind);
        prop_assert!((plain.perturbed_loss - rescaled.perturbed_loss).abs() < 1e-9 * plain.perturbed_loss);
        // SAM does.
        let adaptive = Sharpness::Gsam { rho: 0.5, alpha: 0.0, adaptive: true };
        let (_, same) = net.direction(adaptive);
        prop_assert!((same.perturbed_loss - rescaled.perturbed_loss).abs() < 1e-9 * plain.perturbed_loss);
    }
}

#[test]
fn a_step_is_the_optimizers_step_on_the_direction() {
    for kind in all() {
        let (one, two) = (Net::new(4, DType::F32), Net::new(4, DType::F32));
        let mut whole = one.wrap(kind);
        let mut halves = two.wrap(kind);
        for _ in 0..3 {
            whole.step(&mut || one.loss()).unwrap();
            let (grads, _) = halves.gradient(&mut || two.loss()).unwrap();
            halves.inner_mut().step(&grads).unwrap();
        }
        assert_eq!(one.bits(), two.bits());
    }
}

#[test]
fn errors_leave_the_parameters_alone() {
    let net = Net::new(5, DType::F64);
    let before = net.bits();
    let mut sam = net.wrap(Sharpness::sam());
    let mut calls = 0;
    let mut failing = || {
        calls += 1;
        let loss = net.loss()?;
        if calls == 2 {
            loss * f64::NAN
        } else {
            Ok(loss)
        }
    };
    let error = sam.step(&mut failing).unwrap_err();
    assert!(matches!(error, Error::NonFiniteLoss { .. }));
    assert!(error.to_string().contains("pass 1"), "{error}");
    assert_eq!(net.bits(), before);
    let mut broken = || candle_core::bail!("no data");
    assert!(sam
        .step(&mut broken)
        .unwrap_err()
        .to_string()
        .contains("no data"));
    // A loss that is finite with a gradient that is not.
    let w = var(&[0.0]);
    let sgd = SgdMomentum::new(vec![w.clone()], SgdConfig::default()).unwrap();
    let mut steep = SharpnessAware::new(vec![w.clone()], Sharpness::sam(), sgd).unwrap();
    let error = steep.step(&mut || w.sqrt()?.sum_all()).unwrap_err();
    assert!(matches!(error, Error::NonFiniteGradient(_)));
    assert_eq!(values(&w), [0.0]);
}

#[test]
fn a_perfect_fit_has_nowhere_to_climb() {
    let (w, unused) = (var(&[0.0, 0.0]), var(&[1.0]));
    let sgd = SgdMomentum::new(vec![w.clone(), unused.clone()], SgdConfig::default()).unwrap();
    let vars = vec![w.clone(), unused.clone()];
    for kind in all() {
        let mut sharp = SharpnessAware::new(
            vars.clone(),
            kind,
            SgdMomentum::new(vars.clone(), SgdConfig::default()).unwrap(),
        )
        .unwrap();
        let report = sharp.step(&mut || w.sqr()?.sum_all()).unwrap();
        assert_eq!((report.grad_norm, report.passes), (0.0, 1));
        assert_eq!((values(&w), values(&unused)), (vec![0.0; 2], vec![1.0]));
    }
    // A variable that the loss does not use gets no gradient, and so no decay.
    let mut sam = SharpnessAware::new(vars, Sharpness::sam(), sgd).unwrap();
    w.set(&tensor(&[1.0, 1.0])).unwrap();
    let (grads, _) = sam.gradient(&mut || w.sqr()?.sum_all()).unwrap();
    assert!(grads.get(&w).is_some() && grads.get(&unused).is_none());
}

#[test]
fn the_hook_sees_every_pass() {
    let net = Net::new(6, DType::F64);
    let seen = Arc::new(Mutex::new(Vec::new()));
    let record = seen.clone();
    let mut gam = net
        .wrap(Sharpness::gam())
        .with_pass_hook(move |pass| record.lock().unwrap().push(pass));
    gam.step(&mut || net.loss()).unwrap();
    gam.step(&mut || net.loss()).unwrap();
    assert_eq!(*seen.lock().unwrap(), [0, 1, 2, 3, 0, 1, 2, 3]);
}

#[test]
fn radii_follow_step_or_rate_and_resume() {
    let net = Net::new(7, DType::F64);
    let schedule = || RhoSchedule::Of(Box::new(Linear::new(0.1, 0.0, 4).unwrap()));
    let mut sam = net.wrap(Sharpness::sam()).with_rho(schedule()).unwrap();
    let mut radii = Vec::new();
    for _ in 0..3 {
        radii.push(sam.step(&mut || net.loss()).unwrap().rho);
    }
    assert_close(&radii, &[0.1, 0.075, 0.05], 1e-15);
    let other = Net::new(7, DType::F64);
    other
        .w1
        .set(&net.w1.as_detached_tensor().copy().unwrap())
        .unwrap();
    other
        .w2
        .set(&net.w2.as_detached_tensor().copy().unwrap())
        .unwrap();
    let mut resumed = other.wrap(Sharpness::sam()).with_rho(schedule()).unwrap();
    resumed.load_state(&sam.state().unwrap()).unwrap();
    assert_eq!(resumed.rho(), sam.rho());
    for _ in 0..3 {
        sam.step(&mut || net.loss()).unwrap();
        resumed.step(&mut || other.loss()).unwrap();
    }
    assert_eq!(net.bits(), other.bits());
    assert!(resumed.load_state(&Default::default()).is_err());

    let follows = RhoSchedule::ProportionalTo {
        lr_min: 0.0,
        lr_max: 0.1,
        min: 0.02,
        max: 0.06,
    };
    let mut sam = net.wrap(Sharpness::sam()).with_rho(follows).unwrap();
    for (lr, rho) in [(0.05, 0.04), (0.0, 0.02), (1.0, 0.06)] {
        sam.set_learning_rate(lr);
        assert_close(&[sam.rho()], &[rho], 1e-15);
    }
    let bad = RhoSchedule::ProportionalTo {
        lr_min: 0.1,
        lr_max: 0.1,
        min: 0.0,
        max: 1.0,
    };
    assert!(net.wrap(Sharpness::sam()).with_rho(bad).is_err());
    let sgd = SgdMomentum::new(net.vars(), SgdConfig::default()).unwrap();
    assert!(SharpnessAware::new(net.vars(), Sharpness::Sam { rho: -1.0 }, sgd).is_err());
}

#[test]
fn the_profile_rises_along_the_gradient() {
    let net = Net::new(8, DType::F64);
    let before = net.bits();
    let profile = sharpness_profile(&mut || net.loss(), net.vars(), &[0.0, 0.01, 0.02]).unwrap();
    assert_eq!(net.bits(), before);
    assert!((profile[0] - values(&net.loss().unwrap())[0]).abs() < 1e-14);
    let g = net.flat_gradient();
    let slope = (profile[1] - profile[0]) / 0.01;
    assert!((slope / inner(&g, &g).sqrt() - 1.0).abs() < 0.1);
    assert!(profile[2] > profile[1]);
    assert!(sharpness_profile(&mut || net.loss(), net.vars(), &[f64::NAN]).is_err());
}
