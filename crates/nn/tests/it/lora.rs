//! Low-rank adapters.

use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{Conv2dConfig, Optimizer};
use nn::conv::Conv2d;
use nn::linear::Linear;
use nn::lora::{Adapters, LoraConv2d, LoraLinear, PeftSpec};
use nn::RandomStream;
use std::collections::BTreeMap;

fn normal(seed: u64, shape: &[usize]) -> Tensor {
    let mut stream = RandomStream::new(seed);
    stream
        .normal(0.0, 1.0, shape, DType::F64, &Device::Cpu)
        .unwrap()
}

fn values(x: &Tensor) -> Vec<f64> {
    x.flatten_all().unwrap().to_vec1().unwrap()
}

fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let pairs = values(a).into_iter().zip(values(b));
    pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
}

fn conv() -> LoraConv2d {
    let config = Conv2dConfig {
        padding: 1,
        stride: 2,
        ..Default::default()
    };
    let base = Conv2d::new(normal(1, &[4, 3, 3, 3]), Some(normal(2, &[4])), config);
    LoraConv2d::new(base, 2, 1.0, &mut RandomStream::new(3)).unwrap()
}

#[test]
fn an_untrained_adapter_changes_nothing_and_a_merged_one_is_the_same() {
    let x = normal(4, &[2, 3, 7, 7]);
    let mut layer = conv();
    let before = layer.forward(&x).unwrap();
    layer.set_enabled(false);
    assert_eq!(values(&layer.forward(&x).unwrap()), values(&before));
    layer.set_enabled(true);
    layer.factors()[1].set(&normal(5, &[12, 6])).unwrap();
    let adapted = layer.forward(&x).unwrap();
    assert!(distance(&adapted, &before) > 0.1);
    assert!(distance(&layer.merge().unwrap().forward(&x).unwrap(), &adapted) < 1e-12);

    let x = normal(6, &[5, 7]);
    let base = Linear::new(normal(7, &[3, 7]), None);
    let layer = LoraLinear::new(base.clone(), 2, 4.0, &mut RandomStream::new(8)).unwrap();
    assert_eq!(
        values(&layer.forward(&x).unwrap()),
        values(&base.forward(&x).unwrap())
    );
    layer.factors()[1].set(&normal(9, &[3, 2])).unwrap();
    let [a, b] = layer.factors();
    // y + alpha / r (x A^T) B^T
    let low = x
        .matmul(&a.t().unwrap())
        .unwrap()
        .matmul(&b.t().unwrap())
        .unwrap();
    let wanted = (base.forward(&x).unwrap() + (low * 2.0).unwrap()).unwrap();
    assert!(distance(&layer.forward(&x).unwrap(), &wanted) < 1e-12);
    assert!(distance(&layer.merge().unwrap().forward(&x).unwrap(), &wanted) < 1e-12);
}

/// Gradients of the factors against central differences.
#[test]
fn the_factors_get_their_gradients() {
    let (layer, x) = (conv(), normal(10, &[1, 3, 5, 5]));
    layer.factors()[1].set(&normal(11, &[12, 6])).unwrap();
    let loss = || layer.forward(&x).unwrap().sqr().unwrap().sum_all().unwrap();
    let grads = loss().backward().unwrap();
    for var in layer.factors() {
        let (g, at) = (values(grads.get(var).unwrap()), values(var));
        for k in [0, at.len() / 2, at.len() - 1] {
            let shifted = |h: f64| {
                let mut moved = at.clone();
                moved[k] += h;
                var.set(&Tensor::from_vec(moved, var.shape(), &Device::Cpu).unwrap())
                    .unwrap();
                loss().to_scalar::<f64>().unwrap()
            };
            let numeric = (shifted(1e-5) - shifted(-1e-5)) / 2e-5;
            shifted(0.0);
            assert!((numeric - g[k]).abs() < 1e-5 * (1.0 + numeric.abs()));
        }
    }
}

fn network() -> BTreeMap<String, Tensor> {
    let tensors = [
        ("body.weight", normal(1, &[6, 4])),
        ("body.bias", normal(2, &[6])),
        ("norm.weight", normal(3, &[6])),
        ("head.weight", normal(4, &[3, 6])),
        ("head.bias", normal(5, &[3])),
    ];
    tensors
        .into_iter()
        .map(|(n, t)| (n.to_string(), t))
        .collect()
}

fn forward(adapters: &Adapters, x: &Tensor) -> Tensor {
    let vb = adapters.builder().unwrap();
    let body = nn::linear::linear(4, 6, vb.pp("body")).unwrap();
    let norm = vb.get(6, "norm.weight").unwrap();
    let head = nn::linear::linear(6, 3, vb.pp("head")).unwrap();
    let h = body.forward(x).unwrap().broadcast_mul(&norm).unwrap();
    head.forward(&h.tanh().unwrap()).unwrap()
}

#[test]
fn only_what_is_to_be_trained_is_trained() {
    let spec = PeftSpec {
        rank: 2,
        alpha: 2.0,
        ..PeftSpec::default()
    };
    let adapters = Adapters::new(network(), &spec, &mut RandomStream::new(1)).unwrap();
    assert_eq!(adapters.vars().len(), 4);
    assert!((adapters.trainable_fraction() - 32.0 / 57.0).abs() < 1e-12);
    let x = normal(6, &[5, 4]);
    let before = forward(&adapters, &x);
    let mut sgd = candle_nn::SGD::new(adapters.vars(), 0.1).unwrap();
    for _ in 0..3 {
        sgd.backward_step(&forward(&adapters, &x).sqr().unwrap().mean_all().unwrap())
            .unwrap();
    }
    let merged = adapters.merge().unwrap();
    for (name, old) in network() {
        let changed = distance(&merged[&name], &old) > 0.0;
        assert_eq!(changed, !name.starts_with("head"), "{name}");
    }
    let delta = adapters.delta_weight("body.weight").unwrap().unwrap();
    assert!(
        distance(
            &(&network()["body.weight"] + delta).unwrap(),
            &merged["body.weight"]
        ) < 1e-12
    );
    assert!(adapters.delta_weight("head.weight").unwrap().is_none());

    // A state restores the bits; a fork is independent; off is the base.
    let state = adapters.state().unwrap();
    let after = values(&forward(&adapters, &x));
    let fork = adapters.fork().unwrap();
    sgd.backward_step(&forward(&adapters, &x).sqr().unwrap().mean_all().unwrap())
        .unwrap();
    assert_ne!(values(&forward(&adapters, &x)), after);
    assert_eq!(values(&forward(&fork, &x)), after);
    let fresh = Adapters::new(network(), &spec, &mut RandomStream::new(9)).unwrap();
    fresh.load_state(&state).unwrap();
    assert_eq!(values(&forward(&fresh, &x)), after);
    let mut off = fork;
    off.set_enabled(false);
    assert_eq!(values(&forward(&off, &x)), values(&before));
}

/// A batch norm in training mode updates the statistics of its adapters, which are saved and forked.
#[test]
fn running_statistics_belong_to_the_adapters() {
    use candle_core::ModuleT;
    let ones = Tensor::ones(4, DType::F64, &Device::Cpu).unwrap();
    let base: BTreeMap<String, Tensor> = [
        ("norm.weight", ones.clone()),
        ("norm.bias", ones.zeros_like().unwrap()),
        ("norm.running_mean", ones.zeros_like().unwrap()),
        ("norm.running_var", ones.clone()),
    ]
    .into_iter()
    .map(|(n, t)| (n.to_string(), t))
    .collect();
    let new = || {
        Adapters::new(
            base.clone(),
            &PeftSpec::default(),
            &mut RandomStream::new(1),
        )
        .unwrap()
    };
    let build = |adapters: &Adapters| {
        let vb = adapters.builder().unwrap();
        candle_nn::batch_norm(4, 1e-5, vb.pp("norm")).unwrap()
    };
    let x = (normal(2, &[16, 4]) + 3.0).unwrap();
    let adapters = new();
    let fork = adapters.fork().unwrap();
    assert_eq!(adapters.vars().len(), 2);
    // Built anew for every step, as training does.
    for _ in 0..3 {
        build(&adapters).forward_t(&x, true).unwrap();
    }
    let mean = values(&adapters.merge().unwrap()["norm.running_mean"]);
    assert!(mean.iter().all(|m| *m > 0.5), "{mean:?}");
    let off = |a: &Adapters| values(&build(a).forward_t(&x, false).unwrap());
    let learned = off(&adapters);
    assert_ne!(learned, off(&fork));
    assert_eq!(off(&fork), off(&new()));
    let fresh = new();
    fresh.load_state(&adapters.state().unwrap()).unwrap();
    assert_eq!(off(&fresh), learned);
    let mut plain = adapters.clone();
    plain.set_enabled(false);
    assert_eq!(off(&plain), off(&fork));
}

#[test]
fn weights_can_be_trained_whole() {
    let spec = PeftSpec {
        full: true,
        ..PeftSpec::default()
    };
    let adapters = Adapters::new(network(), &spec, &mut RandomStream::new(1)).unwrap();
    assert_eq!(adapters.vars().len(), 3);
    assert!((adapters.trainable_fraction() - 36.0 / 57.0).abs() < 1e-12);
    assert!(adapters.state().unwrap().contains_key("body.weight"));
}

#[test]
fn bad_adapters_are_named() {
    let rng = &mut RandomStream::new(1);
    let spec = |rank| PeftSpec {
        rank,
        ..PeftSpec::default()
    };
    assert!(Adapters::new(network(), &spec(0), rng).is_err());
    let nothing = PeftSpec {
        train_bias: false,
        train_norm: false,
        targets: Box::new(|_| false),
        ..spec(2)
    };
    assert!(Adapters::new(network(), &nothing, rng).is_err());
    let wide = Linear::new(normal(1, &[2, 3, 4]), None);
    assert!(LoraLinear::new(wide, 2, 1.0, rng).is_err());
    let nan = Linear::new(normal(1, &[3, 4]), None);
    assert!(LoraLinear::new(nan, 2, f64::NAN, rng).is_err());
    let adapters = Adapters::new(network(), &spec(2), rng).unwrap();
    let mut state = adapters.state().unwrap();
    state.remove("body.bias");
    let error = adapters.load_state(&state).unwrap_err().to_string();
    assert!(error.contains("body.bias"), "{error}");
    let a = Var::from_tensor(&normal(1, &[2, 4])).unwrap();
    assert!(nn::lora::delta_weight(&[6, 4], &a, &a, 2, 1.0).is_err());
}
