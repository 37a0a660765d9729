//! Guidance of flows without their gradient.

use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use flows::ode::{FixedStep, OdeSolver};
use flows::{AnalyticMixture, Condition, GradientCheck, Velocity};
use guidance::flowchef::*;
use guidance::Result;
use proptest::prelude::*;
use std::ops::ControlFlow;
use tensor_core::operator::{AveragePool, Blur, LinearOperator, Mask};

const NONE: Condition = Condition::Null;

fn field(dtype: DType) -> AnalyticMixture {
    let centers = normal(1, &[6, 2, 4, 4], dtype);
    AnalyticMixture::new(&centers, &[0.05; 6], &[1.0; 6]).unwrap()
}

fn hole(dtype: DType) -> Mask {
    Mask::hide_box((4, 4), 2, None, dtype, &Device::Cpu).unwrap()
}

fn exact(steps: usize) -> FlowChef {
    FlowChef {
        steps,
        start_eps: 0.0,
        ..FlowChef::default()
    }
}

#[test]
fn without_a_step_it_is_the_plain_solver() {
    let (field, noise) = (field(DType::F64), normal(2, &[3, 2, 4, 4], DType::F64));
    let mask = hole(DType::F64);
    let cost = LinearMeasurement::new(&mask, &noise);
    let plain = FixedStep::euler(20)
        .solve(&field, &noise, 0.0, 1.0)
        .unwrap()
        .x;
    for rule in [
        StepRule::Gd { scale: 0.0 },
        StepRule::Normalized { gamma: 0.0 },
    ] {
        let chef = FlowChef { rule, ..exact(20) };
        let out = chef.sample(&field, &noise, &NONE, &cost, None).unwrap();
        assert!(distance(&out.x, &plain) < 1e-12);
        assert_eq!(
            (out.nfe.main, out.nfe.sequential_calls, out.grad_evals),
            (60, 20, 57)
        );
        assert!(out.costs.is_empty());
    }
    let heun = FlowChef {
        rule: StepRule::Gd { scale: 0.0 },
        solver: Solver::Heun,
        ..exact(20)
    };
    let out = heun.sample(&field, &noise, &NONE, &cost, None).unwrap();
    assert_eq!(out.nfe.main, 3 * 39);
    let fine = FixedStep::euler(2000)
        .solve(&field, &noise, 0.0, 1.0)
        .unwrap()
        .x;
    assert!(distance(&out.x, &fine) < distance(&plain, &fine));
}

/// A field that cannot be differentiated: guidance does not notice.
struct Opaque(AnalyticMixture);

impl Velocity for Opaque {
    fn velocity(&self, x: &Tensor, t: &Tensor, condition: &Condition) -> flows::Result<Tensor> {
        self.0
            .velocity(&x.detach(), t, condition)
            .map(|v| v.detach())
    }
}

#[test]
fn the_network_is_never_differentiated() {
    let noise = normal(3, &[2, 2, 4, 4], DType::F64);
    let mask = hole(DType::F64);
    let y = mask.apply(&normal(4, &[1, 2, 4, 4], DType::F64)).unwrap();
    let cost = LinearMeasurement::new(&mask, &y);
    let chef = || exact(10);
    let a = chef()
        .sample(&field(DType::F64), &noise, &NONE, &cost, None)
        .unwrap();
    let b = chef()
        .sample(&Opaque(field(DType::F64)), &noise, &NONE, &cost, None)
        .unwrap();
    assert_eq!(bits(&a.x), bits(&b.x));
    assert_eq!(a.nfe.denoiser_backward, 0);
    let baseline = BackpropGuidance::new(chef());
    let out = baseline
        .sample(&field(DType::F64), &noise, &NONE, &cost, None)
        .unwrap();
    assert_eq!(out.nfe.denoiser_backward, 2 * 9);
    // The check of the first gradient is counted, and is made once.
    assert_eq!(out.nfe.main, 2 * (10 + 2));
    let again = baseline
        .sample(&field(DType::F64), &noise, &NONE, &cost, None)
        .unwrap();
    assert_eq!((again.nfe.main, bits(&again.x)), (2 * 10, bits(&out.x)));
    // x itself is in x1, so a gradient arrives; it is the skipped one.
    let opaque = Opaque(field(DType::F64));
    let fresh = || BackpropGuidance::new(chef());
    let error = fresh().sample(&opaque, &noise, &NONE, &cost, None);
    assert!(error.unwrap_err().to_string().contains("the velocity"));
    let trusting = BackpropGuidance::new(FlowChef {
        gradient_check: GradientCheck::off(),
        ..chef()
    });
    let out = trusting
        .sample(&opaque, &noise, &NONE, &cost, None)
        .unwrap();
    assert!(distance(&out.x, &a.x) < 1e-12);
}

proptest! {
    #![proptest_config(cases(16))]

    /// For the exact field of independent pairs what is skipped is positive semi-definite, and
    /// `J = t / (1 - t)^2 Cov(x1 | x)`.
    #[test]
    fn the_skipped_gradient_descends(seed in 0u64..10_000, t in 0.05f64..0.95) {
        let field = field(DType::F64);
        let x = normal(seed, &[6, 2, 4, 4], DType::F64);
        let mask = hole(DType::F64);
        let y = normal(seed + 1, &[1, 2, 4, 4], DType::F64);
        let cost = LinearMeasurement::new(&mask, &y);
        let skipped = skipped_gradient(&field, &x, t, &NONE, &cost).unwrap();
        let exact = exact_gradient(&field, &x, t, &NONE, &cost).unwrap();
        let rows = (&skipped * &exact).unwrap().flatten_from(1).unwrap().sum(1).unwrap();
        prop_assert!(values(&rows).iter().all(|inner| *inner >= -1e-12));
        // J^T g from the covariance, row by row.
        let one = x.narrow(0, 0, 1).unwrap();
        let g = skipped.narrow(0, 0, 1).unwrap();
        let turned = covariance_times(&field, &one, t, &g);
        let wanted = exact.narrow(0, 0, 1).unwrap();
        prop_assert!(distance(&turned, &wanted) < 1e-8 * (1.0 + distance(&wanted, &wanted.zeros_like().unwrap())));
    }

    /// Closed-form gradients are those of backpropagation.
    #[test]
    fn gradients_in_closed_form_are_right(seed in 0u64..10_000) {
        let x = normal(seed, &[3, 2, 4, 4], DType::F64);
        let blur = Blur::gaussian(3, 0.8, false, DType::F64, &Device::Cpu).unwrap();
        let pool = AveragePool { factor: 2 };
        let mask = hole(DType::F64);
        let operators: [&dyn LinearOperator; 3] = [&blur, &pool, &mask];
        for operator in operators {
            let y = operator.apply(&normal(seed + 1, &[3, 2, 4, 4], DType::F64)).unwrap();
            for reduction in [Reduction::MeanPerSample, Reduction::SumPerSample, Reduction::MeanAll] {
                let cost = LinearMeasurement::new(operator, &y).reduction(reduction).weight(1.7);
                prop_assert!(distance(&cost.grad(&x).unwrap(), &by_backpropagation(&cost, &x)) < 1e-12);
            }
        }
        let keep = normal(seed + 2, &[4, 4], DType::F64).gt(0.0).unwrap().to_dtype(DType::F64).unwrap();
        let target = normal(seed + 3, &[1, 2, 4, 4], DType::F64);
        let reduction = [Reduction::MeanPerSample, Reduction::MeanAll][seed as usize % 2];
        let cost = MaskedTarget { target: target.clone(), keep, weight: 0.3, reduction };
        prop_assert!(distance(&cost.grad(&x).unwrap(), &by_backpropagation(&cost, &x)) < 1e-12);
        let square = |x: &Tensor| Ok(x.sqr()?.broadcast_mul(&target)?);
        let latent = LatentCost { decoder: square, inner: &cost };
        prop_assert!(distance(&latent.grad(&x).unwrap(), &by_backpropagation(&latent, &x)) < 1e-12);
        let sum = SumCost(vec![(2.0, &cost as &dyn Cost), (-0.5, &latent)]);
        prop_assert!(distance(&sum.grad(&x).unwrap(), &by_backpropagation(&sum, &x)) < 1e-12);
    }
}

fn by_backpropagation(cost: &dyn Cost, x: &Tensor) -> Tensor {
    let at = Var::from_tensor(x).unwrap();
    let sum = cost.value(at.as_tensor()).unwrap().sum_all().unwrap();
    sum.backward().unwrap().get(&at).unwrap().clone()
}

/// `t / (1 - t)^2 Cov(x1 | x) g` of a mixture, by differences of the posterior mean along `g`: the
/// derivative of the mean at `x` is the covariance times `t / (1 - t)^2`.
fn covariance_times(field: &AnalyticMixture, x: &Tensor, t: f64, g: &Tensor) -> Tensor {
    let mean = |x: &Tensor| {
        let time = Tensor::full(t, 1, &Device::Cpu).unwrap();
        let v = field.velocity(x, &time, &NONE).unwrap();
        (x + (v * (1.0 - t)).unwrap()).unwrap()
    };
    let h = 1e-5;
    let step = (g * h).unwrap();
    let difference = (mean(&(x + &step).unwrap()) - mean(&(x - &step).unwrap())).unwrap();
    (difference / (2.0 * h)).unwrap()
}

#[test]
fn a_sample_does_not_depend_on_its_batch() {
    let (field, noise) = (field(DType::F32), normal(5, &[4, 2, 4, 4], DType::F32));
    let pool = AveragePool { factor: 2 };
    let y = pool.apply(&normal(6, &[4, 2, 4, 4], DType::F32)).unwrap();
    let solve = |rows: std::ops::Range<usize>| {
        let part = |x: &Tensor| x.narrow(0, rows.start, rows.len()).unwrap();
        let y = part(&y);
        let cost = LinearMeasurement::new(&pool, &y);
        FlowChef::default()
            .sample(&field, &part(&noise), &NONE, &cost, None)
            .unwrap()
            .x
    };
    let all = solve(0..4);
    for i in 0..4 {
        assert!(distance(&solve(i..i + 1), &all.narrow(0, i, 1).unwrap()) < 1e-4);
    }
}

/// A field that goes straight to one point leaves guidance nothing to do.
#[test]
fn a_straight_field_ends_where_it_should() {
    let target = normal(7, &[1, 2, 4, 4], DType::F64);
    let flow = AnalyticMixture::kernel_density(&target, 0.0).unwrap();
    let mask = hole(DType::F64);
    let y = mask.apply(&target).unwrap();
    let cost = LinearMeasurement::new(&mask, &y);
    let noise = normal(8, &[3, 2, 4, 4], DType::F64);
    let out = FlowChef {
        record: true,
        ..exact(10)
    }
    .sample(&flow, &noise, &NONE, &cost, None)
    .unwrap();
    assert!(distance(&out.x, &target.broadcast_as(out.x.shape()).unwrap()) < 1e-9);
    assert_eq!((out.x1_hats.len(), out.costs.len()), (10, 10));
    assert!(out.costs.iter().flat_map(values).all(|c| c < 1e-18));
}

#[test]
fn guidance_satisfies_the_measurements() {
    let field = field(DType::F64);
    let image = normal(1, &[6, 2, 4, 4], DType::F64)
        .narrow(0, 2, 1)
        .unwrap();
    let noise = normal(9, &[5, 2, 4, 4], DType::F64);
    let mask = hole(DType::F64);
    let y = mask.apply(&image).unwrap();
    let cost = LinearMeasurement::new(&mask, &y);
    let ends = |chef: FlowChef| {
        let out = chef.sample(&field, &noise, &NONE, &cost, None).unwrap();
        let off = values(&cost.value(&out.x).unwrap());
        off.iter().sum::<f64>() / 5.0
    };
    let none = ends(FlowChef {
        rule: StepRule::Gd { scale: 0.0 },
        ..exact(50)
    });
    assert!(ends(exact(50)) < 0.3 * none);
    assert!(
        ends(FlowChef {
            rule: StepRule::Adam { lr: 0.1 },
            inner_steps: 3,
            ..exact(50)
        }) < 0.3 * none
    );
    let falling = StepRule::Schedule(Box::new(|step, t| {
        assert!((t - step as f64 / 50.0).abs() < 1e-12);
        4.0 * (1.0 - t)
    }));
    assert!(
        ends(FlowChef {
            rule: falling,
            ..exact(50)
        }) < 0.6 * none
    );
    // Only the first steps, and the last one too.
    let early = ends(FlowChef {
        guide_until: Some(5),
        ..exact(50)
    });
    let all = ends(FlowChef {
        guide_last: true,
        ..exact(50)
    });
    assert!(all < early);
    // A sample within its noise is left alone.
    let blind = LinearMeasurement::new(&mask, &y).noise_floor(1e3);
    let out = exact(50)
        .sample(&field, &noise, &NONE, &blind, None)
        .unwrap();
    let plain = FixedStep::euler(50)
        .solve(&field, &noise, 0.0, 1.0)
        .unwrap()
        .x;
    assert!(distance(&out.x, &plain) < 1e-12);
}

#[test]
fn a_callback_sees_all_and_ends_the_run() {
    let (field, noise) = (field(DType::F64), normal(5, &[2, 2, 4, 4], DType::F64));
    let mask = hole(DType::F64);
    let cost = LinearMeasurement::new(&mask, &noise);
    let mut seen = Vec::new();
    let mut look = |step: &GuidedStep| {
        seen.push((step.step, values(&step.cost).len()));
        match step.step {
            3 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    };
    let out = exact(10)
        .sample(&field, &noise, &NONE, &cost, Some(&mut look))
        .unwrap();
    assert_eq!(seen, [(0, 2), (1, 2), (2, 2), (3, 2)]);
    assert_eq!(out.nfe.main, 8);
}

#[test]
fn classifiers_and_features_are_costs() {
    let x = normal(10, &[3, 8], DType::F64);
    let labels = Tensor::new(&[0u32, 2, 1], &Device::Cpu).unwrap();
    let weights = normal(11, &[8, 3], DType::F64);
    let net = |x: &Tensor| Ok(x.matmul(&weights)?);
    let cost = ClassifierCost {
        net,
        labels: labels.clone(),
    };
    let wanted =
        nn::loss::cross_entropy(&net(&x).unwrap(), &labels, nn::loss::Reduction::None).unwrap();
    assert!(distance(&cost.value(&x).unwrap(), &wanted) < 1e-12);
    assert!(cost.curvature(&x).unwrap().is_none());
    let features = FeatureCost {
        encoder: net,
        target: normal(12, &[1, 3], DType::F64),
        weight: 2.0,
    };
    assert_eq!(features.grad(&x).unwrap().dims(), x.dims());
    // An encoder with a layer that loses its gradient is found.
    let blind = FeatureCost {
        encoder: |x: &Tensor| Ok((x + candle_nn::ops::softmax_last_dim(&(x * 3.0)?)?)?),
        target: x.clone(),
        weight: 2.0,
    };
    let flow = AnalyticMixture::new(&normal(1, &[2, 8], DType::F64), &[0.1; 2], &[1.0; 2]).unwrap();
    let chef = FlowChef {
        rule: StepRule::Gd { scale: 0.1 },
        ..exact(4)
    };
    let error = chef.sample(&flow, &x, &NONE, &blind, None).unwrap_err();
    assert!(error.to_string().contains("the cost"), "{error}");
    // Guidance by a class moves samples there.
    let means = Tensor::new(&[[2.0f64, 0.0], [-2.0, 0.0]], &Device::Cpu).unwrap();
    let flow = AnalyticMixture::new(&means, &[0.1, 0.1], &[1.0, 1.0]).unwrap();
    let first = |x: &Tensor| -> Result<Tensor> {
        Ok(Tensor::cat(
            &[x.narrow(1, 0, 1)?, x.narrow(1, 0, 1)?.neg()?],
            1,
        )?)
    };
    let labels = Tensor::zeros(20, DType::U32, &Device::Cpu).unwrap();
    let cost = ClassifierCost { net: first, labels };
    let chef = FlowChef {
        rule: StepRule::Gd { scale: 1.0 },
        ..exact(40)
    };
    let out = chef
        .sample(&flow, &normal(13, &[20, 2], DType::F64), &NONE, &cost, None)
        .unwrap();
    let right = values(&out.x.narrow(1, 0, 1).unwrap())
        .iter()
        .filter(|x| **x > 1.0)
        .count();
    assert!(right >= 19, "{right}");
}

#[test]
fn a_zero_gradient_is_no_step_for_adam() {
    let (field, noise) = (field(DType::F64), normal(5, &[1, 2, 4, 4], DType::F64));
    let nothing = MaskedTarget {
        target: noise.clone(),
        keep: noise.zeros_like().unwrap(),
        weight: 1.0,
        reduction: Reduction::MeanPerSample,
    };
    let chef = FlowChef {
        rule: StepRule::Adam { lr: 0.5 },
        ..exact(8)
    };
    let out = chef.sample(&field, &noise, &NONE, &nothing, None).unwrap();
    let plain = FixedStep::euler(8)
        .solve(&field, &noise, 0.0, 1.0)
        .unwrap()
        .x;
    assert!(distance(&out.x, &plain) < 1e-12);
    // A flat cost has no curvature to divide by, and no gradient.
    assert!(exact(8)
        .sample(&field, &noise, &NONE, &nothing, None)
        .is_ok());
}

/// Where everything is kept the source comes back; where nothing is, the new condition decides.
#[test]
fn edits_keep_what_they_should() {
    let means = Tensor::new(&[[2.0f64, 2.0], [-2.0, -2.0]], &Device::Cpu).unwrap();
    let flow = AnalyticMixture::new(&means, &[0.05, 0.05], &[1.0, 1.0])
        .unwrap()
        .with_classes(&[0, 1])
        .unwrap();
    let class = |k: u32| Condition::classes(&[k], &Device::Cpu).unwrap();
    let source = Tensor::new(&[[2.1f64, 1.9]], &Device::Cpu).unwrap();
    let noise = normal(14, &[1, 2], DType::F64);
    let conditions = (&class(0), &class(1));
    let keep = |a: f64, b: f64| Tensor::new(&[a, b], &Device::Cpu).unwrap();
    let edit = FlowEdit {
        rule: StepRule::Adam { lr: 0.1 },
        cfg: 0.0,
        full_source_steps: 5,
        ..FlowEdit::default()
    };
    let free = values(
        &edit
            .edit(&flow, &noise, &source, &keep(0.0, 0.0), conditions)
            .unwrap(),
    );
    assert!(free.iter().all(|x| (x + 2.0).abs() < 1.0), "{free:?}");
    let same = (&class(0), &class(0));
    let out = edit.edit(&flow, &noise, &source, &keep(1.0, 1.0), same);
    assert!(values(&out.unwrap()).iter().all(|x| (x - 2.0).abs() < 1.0));
    // The other preset is for latents of thousands of numbers.
    let pictures = normal(15, &[3, 4096], DType::F32);
    let flow = AnalyticMixture::kernel_density(&pictures, 0.3).unwrap();
    let source = pictures.narrow(0, 1, 1).unwrap();
    let all = Tensor::ones(4096, DType::F32, &Device::Cpu).unwrap();
    let noise = normal(16, &[1, 4096], DType::F32);
    let near = |edit: FlowEdit| {
        let out = edit
            .edit(&flow, &noise, &source, &all, (&NONE, &NONE))
            .unwrap();
        values(&(out - &source).unwrap().sqr().unwrap().mean_all().unwrap())[0]
    };
    assert!(near(FlowEdit::flux()) < 0.2);
    // After its last corrected step FLUX asks for the wanted velocity alone.
    let calls = std::cell::Cell::new(0);
    let counted = |x: &Tensor, _: &Tensor| {
        calls.set(calls.get() + 1);
        x.neg()
    };
    let asked = |edit: FlowEdit| {
        calls.set(0);
        edit.edit(&counted, &noise, &source, &all, (&NONE, &NONE))
            .unwrap();
        calls.get()
    };
    assert_eq!(asked(FlowEdit::flux()), 2 * 5 + 23);
    assert_eq!(asked(FlowEdit::default()), 2 * 50);
    let bad = FlowEdit {
        steps: 0,
        ..FlowEdit::default()
    };
    assert!(bad
        .edit(&flow, &noise, &source, &keep(1.0, 1.0), conditions)
        .is_err());
    let narrow = Tensor::new(&[[1.0f64]], &Device::Cpu).unwrap();
    let error = FlowEdit::default().edit(&flow, &noise, &narrow, &keep(1.0, 1.0), conditions);
    assert!(error.unwrap_err().to_string().contains("the source"));
}

#[test]
fn bad_input_is_named() {
    let (field, noise) = (field(DType::F64), normal(5, &[2, 2, 4, 4], DType::F64));
    let mask = hole(DType::F64);
    let cost = LinearMeasurement::new(&mask, &noise);
    let fails = |chef: FlowChef, noise: &Tensor, cost: &dyn Cost| {
        chef.sample(&field, noise, &NONE, cost, None)
            .unwrap_err()
            .to_string()
    };
    assert!(fails(exact(0), &noise, &cost).contains("FlowChef::steps"));
    assert!(fails(
        FlowChef {
            inner_steps: 0,
            ..exact(3)
        },
        &noise,
        &cost
    )
    .contains("inner_steps"));
    assert!(fails(
        FlowChef {
            start_eps: 1.0,
            ..exact(3)
        },
        &noise,
        &cost
    )
    .contains("start_eps"));
    assert!(fails(
        FlowChef {
            rule: StepRule::Normalized { gamma: 2.5 },
            ..exact(3)
        },
        &noise,
        &cost
    )
    .contains("gamma"));
    assert!(fails(
        FlowChef {
            rule: StepRule::Adam { lr: 0.0 },
            ..exact(3)
        },
        &noise,
        &cost
    )
    .contains("lr"));
    let far = FlowChef {
        rule: StepRule::Gd { scale: 1e300 },
        ..exact(9)
    };
    let message = fails(far, &noise, &cost);
    assert!(
        message.contains("FlowChef") && message.contains("step 0"),
        "{message}"
    );
    let wrong = LinearMeasurement::new(&mask, &noise.narrow(3, 0, 2).unwrap());
    assert!(fails(exact(3), &noise, &wrong).contains("the measurements"));
    let x = normal(1, &[2, 8], DType::F64);
    let labels = Tensor::new(&[0u32], &Device::Cpu).unwrap();
    let classes = ClassifierCost {
        net: |x: &Tensor| Ok(x.clone()),
        labels,
    };
    assert!(classes
        .value(&x)
        .unwrap_err()
        .to_string()
        .contains("the labels"));
    let field =
        AnalyticMixture::new(&normal(1, &[2, 8], DType::F64), &[0.1; 2], &[1.0; 2]).unwrap();
    let labels = Tensor::new(&[0u32, 1], &Device::Cpu).unwrap();
    let classes = ClassifierCost {
        net: |x: &Tensor| Ok(x.clone()),
        labels,
    };
    let error = exact(3)
        .sample(&field, &x, &NONE, &classes, None)
        .unwrap_err();
    assert!(error.to_string().contains("curvature"), "{error}");
    let cut = ClassifierCost {
        net: |x: &Tensor| Ok(x.detach()),
        labels: Tensor::new(&[0u32, 1], &Device::Cpu).unwrap(),
    };
    let chef = FlowChef {
        rule: StepRule::Gd { scale: 1.0 },
        ..exact(3)
    };
    let error = chef.sample(&field, &x, &NONE, &cut, None).unwrap_err();
    assert!(error.to_string().contains("through the cost"), "{error}");
    assert!(SumCost(vec![]).value(&x).is_err());
    let heun = BackpropGuidance::new(FlowChef {
        solver: Solver::Heun,
        ..exact(3)
    });
    assert!(heun.sample(&field, &x, &NONE, &classes, None).is_err());
    // No rows, no work.
    let none = exact(3)
        .sample(&field, &x.narrow(0, 0, 0).unwrap(), &NONE, &classes, None)
        .unwrap();
    assert_eq!(none.x.dims(), [0, 8]);
}
