use crate::support::*;
use candle_core::{DType, Device, Tensor, Var, D};
use candle_nn::{Optimizer, SGD};
use optim::perp_grad::*;
use optim::{
    AdamW, AdamWConfig, Error, Foreign, Lion, LionConfig, ParamFilter, ParamGroup, RandomStream,
    SgdConfig, SgdMomentum,
};
use proptest::prelude::*;

#[test]
fn reference() {
    let report = FILES.verify("perp-grad", optim::verify::perp_grad);
    assert_passed(&report, |name| name.starts_with("stablemax."));
    assert_eq!(report.comparisons.len(), 5 * 2 + 3 * 2 + 4 + 1 + 3 + 2);
}

fn dot(a: &Tensor, b: &Tensor) -> f64 {
    values(a).iter().zip(values(b)).map(|(a, b)| a * b).sum()
}

fn length(a: &Tensor) -> f64 {
    dot(a, a).sqrt()
}

fn project(w: &Tensor, g: &Tensor) -> Tensor {
    orthogonalize(w, g, &PerpGradConfig::default()).unwrap()
}

proptest! {
    #![proptest_config(cases(48))]

    /// `mix` pushes the gradient towards the weights, up to where the sums cancel.
    #[test]
    fn what_is_left_is_orthogonal_and_as_long(
        seed in 0u64..10_000, n in 2usize..40, mix in prop::sample::select(vec![0.0, 1.0, 30.0, 1e4, 1e8]),
    ) {
        let mut rng = RandomStream::new(seed);
        let w = normal(&mut rng, &[n], DType::F64);
        let g = (normal(&mut rng, &[n], DType::F64) + w.affine(mix, 0.0).unwrap()).unwrap();
        let p = project(&w, &g);
        let size = length(&g);
        prop_assert!(dot(&w, &p).abs() <= 1e-12 * length(&w) * size);
        prop_assert!((length(&p) - size).abs() <= 1e-12 * size);
        // Twice is once.
        let again = values(&project(&w, &p));
        for (a, b) in again.iter().zip(values(&p)) {
            prop_assert!((a - b).abs() <= 1e-12 * size);
        }
    }

    /// In single precision too, and by what a fused step really moves.
    #[test]
    fn the_cosine_left_in_single_precision_is_below_a_millionth(
        seed in 0u64..10_000, n in 2usize..200, mix in prop::sample::select(vec![0.0, 1.0, 10.0, 25.0, 1e3]),
    ) {
        let mut rng = RandomStream::new(seed);
        let w = normal(&mut rng, &[n], DType::F32);
        let g = (normal(&mut rng, &[n], DType::F32) + w.affine(mix, 0.0).unwrap()).unwrap();
        let cosine = |p: &Tensor| (dot(&w, p) / (length(&w) * length(p))).abs();
        prop_assert!(cosine(&project(&w, &g)) < 1e-6);
        // And by what a plain step moves, in double precision.
        let var = Var::from_tensor(&w.to_dtype(DType::F64).unwrap()).unwrap();
        let wide = g.to_dtype(DType::F64).unwrap();
        let sgd = SgdConfig { lr: 1.0, momentum: 0.0, ..SgdConfig::default() };
        let config = (PerpGradConfig::default(), sgd);
        let mut optimizer = PerpGrad::<SgdMomentum>::new(vec![var.clone()], config).unwrap();
        optimizer.step(&store(&var, &wide)).unwrap();
        let moved = (var.as_tensor() - w.to_dtype(DType::F64).unwrap()).unwrap();
        let w = w.to_dtype(DType::F64).unwrap();
        prop_assert!((dot(&w, &moved) / (length(&w) * length(&moved))).abs() < 1e-11);
    }

    #[test]
    fn the_weights_scale_does_not_matter_and_the_gradients_does(
        seed in 0u64..10_000, power in -12i32..30,
    ) {
        let c = f64::powi(2.0, power);
        let mut rng = RandomStream::new(seed);
        let (w, g) = (normal(&mut rng, &[9], DType::F64), normal(&mut rng, &[9], DType::F64));
        let plain = values(&project(&w, &g));
        let size = length(&g);
        for (a, b) in values(&project(&(&w * c).unwrap(), &g)).iter().zip(&plain) {
            prop_assert!((a - b).abs() <= 1e-13 * size);
        }
        for (a, b) in values(&project(&w, &(&g * c).unwrap())).iter().zip(&plain) {
            prop_assert!((a - c * b).abs() <= 1e-13 * c * size);
        }
    }
}

#[test]
fn a_parallel_gradient_is_degenerate() {
    let w = tensor(&[0.3, -1.7, 2.2]);
    for dtype in [DType::F64, DType::F32] {
        let w = w.to_dtype(dtype).unwrap();
        let g = w.affine(-0.7, 0.0).unwrap();
        let with = |degenerate| {
            let config = PerpGradConfig {
                degenerate,
                ..PerpGradConfig::default()
            };
            orthogonalize(&w, &g, &config).unwrap()
        };
        assert_eq!(values(&with(Degenerate::Zero)), [0.0; 3]);
        assert_eq!(bits(&with(Degenerate::Keep)), bits(&g));
        // The official rule blows the noise up to the whole length, or finds none at all.
        let official = length(&with(Degenerate::Official));
        assert!(official == 0.0 || (official / length(&g) - 1.0).abs() < 1e-5);
    }
}

#[test]
fn corner_cases_of_the_projection() {
    let g = tensor(&[1.0, -2.0]);
    let zero = tensor(&[0.0, 0.0]);
    assert_eq!(bits(&project(&zero, &g)), bits(&g));
    assert_eq!(values(&project(&g, &zero)), [0.0, 0.0]);
    // One element is all parallel: left alone.
    assert_eq!(values(&project(&tensor(&[3.0]), &tensor(&[5.0]))), [5.0]);
    let config = PerpGradConfig {
        rescale: false,
        ..PerpGradConfig::default()
    };
    let plain = orthogonalize(&tensor(&[1.0, 0.0]), &tensor(&[3.0, 4.0]), &config).unwrap();
    assert_eq!(values(&plain), [0.0, 4.0]);
    let nan = project(&tensor(&[1.0, 1.0, 0.0]), &tensor(&[2.0, 0.0, f64::NAN]));
    assert_close(&values(&nan)[..2], &[2f64.sqrt(), -(2f64.sqrt())], 1e-12);
    assert!(values(&nan)[2].is_nan());
    assert!(orthogonalize(&zero, &tensor(&[1.0]), &config).is_err());
    let single = g.to_dtype(DType::F32).unwrap();
    assert!(matches!(
        orthogonalize(&zero, &single, &config),
        Err(Error::DType { .. })
    ));
    let bad = PerpGradConfig {
        eps: -1.0,
        ..PerpGradConfig::default()
    };
    assert!(OrthogonalProjection::new(bad).is_err());
}

#[test]
fn half_precision_gradients_are_projected_in_single() {
    let mut rng = RandomStream::new(1);
    let w = normal(&mut rng, &[64], DType::BF16);
    let g = normal(&mut rng, &[64], DType::BF16);
    let p = project(&w, &g);
    assert_eq!(p.dtype(), DType::BF16);
    assert!(dot(&w, &p).abs() < 0.01 * length(&w) * length(&g));
}

/// The projection inside a fused step is the projection of the gradients before a plain one.
#[test]
fn fused_and_written_out_agree() {
    let params = named_params(1, DType::F64);
    let twin = copies(&params);
    let third = copies(&params);
    let vars = |params: &[(String, Var)]| params.iter().map(|(_, v)| v.clone()).collect();
    let config = PerpGradConfig::default();
    let sgd = SgdConfig {
        lr: 0.1,
        momentum: 0.0,
        ..SgdConfig::default()
    };
    let mut fused = PerpGrad::<SgdMomentum>::new(vars(&params), (config.clone(), sgd)).unwrap();
    let mut foreign = PerpGrad::<Foreign<SGD>>::new(vars(&twin), (config.clone(), 0.1)).unwrap();
    for t in 0..5 {
        fused.step(&gradients(&params, 3, t)).unwrap();
        foreign.step(&gradients(&twin, 3, t)).unwrap();
        let grads = gradients(&third, 3, t);
        for (_, var) in &third {
            let g = orthogonalize(var, grads.get(var).unwrap(), &config).unwrap();
            var.set(&(var.as_tensor() - (g * 0.1).unwrap()).unwrap())
                .unwrap();
        }
    }
    for ((a, b), c) in params.iter().zip(&twin).zip(&third) {
        assert_close(&values(&a.1), &values(&c.1), 1e-12);
        assert_close(&values(&b.1), &values(&c.1), 1e-12);
    }
    foreign.set_learning_rate(0.5);
    assert_eq!(foreign.inner().learning_rate(), 0.5);
}

#[test]
fn the_filter_and_other_optimizers() {
    let params = named_params(1, DType::F64);
    let config = PerpGradConfig {
        filter: ParamFilter::NoOneDimensional,
        ..PerpGradConfig::default()
    };
    let lion = LionConfig {
        lr: 0.1,
        beta1: 0.0,
        ..LionConfig::default()
    };
    let group = ParamGroup::named(params.clone(), lion);
    let inner = Lion::with_groups(vec![group]).unwrap();
    let mut optimizer = PerpGrad::wrap(config, inner).unwrap();
    // A gradient along the weights: only the unfiltered tensors move.
    let mut grads = gradients(&params, 1, 0);
    for (_, var) in &params {
        grads.insert(var, var.as_detached_tensor().copy().unwrap());
    }
    let before = all_bits(&params);
    optimizer.step(&grads).unwrap();
    let moved: Vec<bool> = before
        .iter()
        .zip(all_bits(&params))
        .map(|(a, b)| *a != b)
        .collect();
    assert_eq!(moved, [false, true, false, true]);
}

/// A bias-free ReLU network, its loss, and the gradients.
fn relu_net(seed: u64, sizes: &[usize]) -> (Vec<(String, Var)>, Tensor, Tensor) {
    let mut rng = RandomStream::new(seed);
    let params: Vec<(String, Var)> = sizes
        .windows(2)
        .enumerate()
        .map(|(i, pair)| {
            (
                format!("w{i}"),
                normal_var(&mut rng, &[pair[1], pair[0]], DType::F64),
            )
        })
        .collect();
    let mut z = normal(&mut rng, &[16, sizes[0]], DType::F64);
    for (i, (_, w)) in params.iter().enumerate() {
        if i > 0 {
            z = z.relu().unwrap();
        }
        z = z.matmul(&w.t().unwrap()).unwrap();
    }
    let classes = *sizes.last().unwrap();
    let labels: Vec<u32> = (0..16).map(|i| (i % classes) as u32).collect();
    let labels = Tensor::new(labels, &Device::Cpu).unwrap();
    (params, z, labels)
}

fn cross_entropy(z: &Tensor, labels: &Tensor) -> Tensor {
    let max = z.detach().max_keepdim(D::Minus1).unwrap();
    let shifted = z.broadcast_sub(&max).unwrap();
    let sum = shifted.exp().unwrap().sum_keepdim(D::Minus1).unwrap();
    let log_p = shifted.broadcast_sub(&sum.log().unwrap()).unwrap();
    let own = log_p.gather(&labels.unsqueeze(1).unwrap(), 1).unwrap();
    own.mean_all().unwrap().neg().unwrap()
}

#[test]
fn homogeneous_layers_share_their_inner_product() {
    let (params, z, labels) = relu_net(4, &[5, 7, 6, 4]);
    let grads = cross_entropy(&z, &labels).backward().unwrap();
    let inner: Vec<f64> = params
        .iter()
        .map(|(_, w)| -dot(grads.get(w).unwrap(), w))
        .collect();
    assert!(inner[0].abs() > 1e-3);
    for other in &inner {
        assert!((other - inner[0]).abs() <= 1e-12 * inner[0].abs().max(1.0));
    }
    let report = NlmMonitor::measure(&params, &grads).unwrap();
    let growth: f64 = params
        .iter()
        .zip(&inner)
        .map(|((_, w), i)| i / dot(w, w))
        .sum();
    assert!((report.logit_scale_growth - growth).abs() < 1e-12);
    // After the projection nothing points along the weights.
    let mut projected = candle_core::backprop::GradStore::default();
    for (_, w) in &params {
        projected.insert(w, project(w, grads.get(w).unwrap()));
    }
    let report = NlmMonitor::measure(&params, &projected).unwrap();
    assert!(report.cos_per_tensor.iter().all(|(_, c)| c.abs() < 1e-12));
    let mut nan = gradients(&params, 1, 0);
    nan.insert(
        &params[1].1,
        (params[1].1.zeros_like().unwrap() / 0.0).unwrap(),
    );
    let error = NlmMonitor::measure(&params, &nan).unwrap_err();
    assert!(error.to_string().contains("w1"), "{error}");
}

#[test]
fn the_scale_growth_is_the_growth_of_the_logits() {
    let (params, z, labels) = relu_net(6, &[4, 6, 3]);
    // A gradient along the weights: w <- w (1 + lr r), so that logits grow by the product.
    let mut grads = candle_core::backprop::GradStore::default();
    for (i, (_, w)) in params.iter().enumerate() {
        grads.insert(w, w.affine(-(i as f64 + 1.0), 0.0).unwrap().detach());
    }
    let report = NlmMonitor::measure(&params, &grads).unwrap();
    assert_close(
        &[report.cos_global.signum(), report.logit_scale_growth],
        &[1.0, 3.0],
        1e-12,
    );
    assert_eq!(z.dims()[0], labels.dims()[0]);
}

#[test]
fn collapse_by_precision() {
    // Gaps of 9 nats: absorbed in half precision, not in single.
    let logits = Tensor::new(
        &[[9f32, 0.0, 0.0], [0.0, 9.0, 0.0], [0.0, 1.0, 2.0]],
        &Device::Cpu,
    )
    .unwrap();
    let labels = Tensor::new(&[0u32, 0, 2], &Device::Cpu).unwrap();
    let f16 = SoftmaxCollapse::measure(&logits, &labels, DType::F16).unwrap();
    assert_close(
        &[f16.collapsed, f16.zero_loss, f16.zero_correct_grad],
        &[2.0 / 3.0, 1.0 / 3.0, 1.0 / 3.0],
        1e-15,
    );
    let f32 = SoftmaxCollapse::measure(&logits, &labels, DType::F32).unwrap();
    assert_eq!((f32.collapsed, f32.zero_loss), (0.0, 0.0));
    for (dtype, enough, too_little) in [
        (DType::F32, 17.5, 16.0),
        (DType::F16, 8.5, 7.0),
        (DType::BF16, 6.5, 5.0),
        (DType::F64, 38.0, 36.0),
    ] {
        let row = |gap: f64| Tensor::new(&[[gap, 0.0]], &Device::Cpu).unwrap();
        let label = Tensor::new(&[0i64], &Device::Cpu).unwrap();
        let measure = |gap| SoftmaxCollapse::measure(&row(gap), &label, dtype).unwrap();
        let collapsed = measure(enough);
        assert_eq!(
            (collapsed.collapsed, collapsed.zero_correct_grad),
            (1.0, 1.0),
            "{dtype:?}"
        );
        assert_eq!(measure(too_little).collapsed, 0.0, "{dtype:?}");
    }
}

#[test]
fn collapse_refuses_and_counts_bad_input() {
    let logits = Tensor::new(
        &[
            [f32::NAN, 0.0],
            [f32::INFINITY, 0.0],
            [f32::NEG_INFINITY, 0.0],
        ],
        &Device::Cpu,
    )
    .unwrap();
    let labels = Tensor::new(&[0u32, 1, 1], &Device::Cpu).unwrap();
    let report = SoftmaxCollapse::measure(&logits, &labels, DType::F32).unwrap();
    assert_close(
        &[report.nonfinite, report.collapsed],
        &[2.0 / 3.0, 1.0 / 3.0],
        1e-15,
    );
    let measure =
        |logits: &Tensor, labels: &Tensor, dtype| SoftmaxCollapse::measure(logits, labels, dtype);
    let outside = Tensor::new(&[0u32, 1, 2], &Device::Cpu).unwrap();
    assert!(measure(&logits, &outside, DType::F32).is_err());
    assert!(measure(&logits, &labels, DType::U8).is_err());
    assert!(measure(&logits, &labels.narrow(0, 0, 2).unwrap(), DType::F32).is_err());
    let empty = Tensor::zeros((0, 3), DType::F32, &Device::Cpu).unwrap();
    let none = Tensor::zeros(0, DType::U32, &Device::Cpu).unwrap();
    assert!(measure(&empty, &none, DType::F32).is_err());
}

#[test]
fn weight_decay_underneath_still_acts_along_the_weights() {
    let w = var(&[1.0, 2.0]);
    let adamw = AdamWConfig {
        lr: 0.1,
        weight_decay: 0.5,
        ..AdamWConfig::default()
    };
    let mut optimizer =
        PerpGrad::<AdamW>::new(vec![w.clone()], (PerpGradConfig::default(), adamw)).unwrap();
    optimizer.step(&store(&w, &tensor(&[1.0, 2.0]))).unwrap();
    assert_close(&values(&w), &[0.95, 1.9], 1e-15);
}
