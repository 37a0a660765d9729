//! Linear layers, activations, softmax.

use crate::support::{
    bits, check_directions, check_gradients, distance, normal, with_threads, CPU,
};
use candle_core::{DType, Module, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use nn::activation::Activation;
use nn::linear::{linear, linear_activation, linear_no_bias, Linear};
use nn::softmax::{log_softmax, softmax};
use nn::Error;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, RngSeed, TestRunner};

pub const ALL: [Activation; 10] = [
    Activation::Identity,
    Activation::Relu,
    Activation::LeakyRelu(0.1),
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Silu,
    Activation::Mish,
    Activation::Tanh,
    Activation::Sigmoid,
    Activation::Softplus,
];

/// Cases from a fixed seed.
pub fn runner(cases: u32) -> TestRunner {
    let config = Config {
        cases,
        rng_seed: RngSeed::Fixed(7),
        rng_algorithm: RngAlgorithm::ChaCha,
        failure_persistence: None,
        ..Config::default()
    };
    TestRunner::new(config)
}

pub fn var(seed: u64, shape: &[usize], dtype: DType) -> Var {
    Var::from_tensor(&normal(seed, shape, dtype)).unwrap()
}

/// A fixed cotangent that is no symmetry of a layer.
pub fn probe(y: &Tensor) -> Tensor {
    (y * normal(77, y.dims(), y.dtype()))
        .unwrap()
        .sum_all()
        .unwrap()
}

fn definition(x: f64, activation: Activation) -> f64 {
    let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
    let erf = candle_core::cpu::erf::erf_f64;
    match activation {
        Activation::Identity => x,
        Activation::Relu => x.max(0.0),
        Activation::LeakyRelu(s) => {
            if x > 0.0 {
                x
            } else {
                s * x
            }
        }
        Activation::Gelu => 0.5 * x * (1.0 + erf(x / 2f64.sqrt())),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Silu => x * sigmoid(x),
        Activation::Mish => x * x.exp().ln_1p().tanh(),
        Activation::Tanh => x.tanh(),
        Activation::Sigmoid => sigmoid(x),
        Activation::Softplus => x.exp().ln_1p(),
    }
}

#[test]
fn activations_are_their_definitions_with_gradients() {
    let points: Vec<f64> = (-240..=240).map(|i| f64::from(i) / 20.0 + 0.003).collect();
    let x = Tensor::new(points.as_slice(), &CPU).unwrap();
    let exact = |a: Activation| {
        points
            .iter()
            .map(|x| definition(*x, a))
            .collect::<Vec<f64>>()
    };
    for activation in ALL {
        let exact = Tensor::new(exact(activation), &CPU).unwrap();
        let double = distance(&activation.forward(&x).unwrap(), &exact);
        assert!(double < 1e-12, "{activation:?}: {double}");
        let single = x.to_dtype(DType::F32).unwrap();
        let exact = exact.to_dtype(DType::F32).unwrap();
        let single = distance(&activation.forward(&single).unwrap(), &exact);
        assert!(single < 1e-6, "{activation:?}: {single}");
        let x = var(3, &[5, 7], DType::F64);
        let error = check_gradients(&[&x], || probe(&activation.forward(&x).unwrap()));
        assert!(error < 1e-8, "{activation:?}: {error}");
    }
}

#[test]
fn single_precision_gradients_of_activations_follow_double_ones() {
    for activation in ALL {
        let gradient = |dtype| {
            let x = Var::from_tensor(&normal(3, &[400], DType::F64).to_dtype(dtype).unwrap());
            let x = x.unwrap();
            let y = activation.forward(&(x.as_tensor() * 3.0).unwrap()).unwrap();
            let grads = y.sum_all().unwrap().backward().unwrap();
            grads.get(&x).unwrap().to_dtype(DType::F64).unwrap()
        };
        let error = distance(&gradient(DType::F32), &gradient(DType::F64));
        assert!(error < 5e-6, "{activation:?}: {error}");
    }
}

#[test]
fn activations_of_sums_are_two_steps_in_one() {
    let (a, b) = (var(3, &[5, 7], DType::F64), var(4, &[5, 7], DType::F64));
    for activation in ALL {
        let f = || activation.of_sum(&a, &b).unwrap();
        let two = activation.forward(&(&*a + &*b).unwrap()).unwrap();
        assert!(distance(&f(), &two) < 1e-15);
        let error = check_gradients(&[&a, &b], || probe(&f()));
        assert!(error < 1e-8, "{activation:?}: {error}");
    }
    assert!(ALL[1].of_sum(&a, &normal(1, &[7], DType::F64)).is_err());
}

#[test]
fn linear_equals_candle_with_every_activation() {
    for (dtype, tolerance) in [(DType::F32, 1e-6), (DType::F64, 1e-12)] {
        for shape in [&[5][..], &[3, 5], &[2, 3, 5]] {
            let x = var(1, shape, dtype);
            let (w, b) = (var(2, &[4, 5], dtype), var(3, &[4], dtype));
            for (activation, bias) in ALL.iter().flat_map(|a| [(*a, true), (*a, false)]) {
                let bias = bias.then(|| b.as_tensor().clone());
                let ours = Linear::new(w.as_tensor().clone(), bias.clone());
                let ours = ours.with_activation(activation).forward(&x).unwrap();
                let rows = x.reshape(((), 5)).unwrap();
                let z = candle_nn::Linear::new(w.as_tensor().clone(), bias.clone());
                let y = activation.forward(&z.forward(&rows).unwrap()).unwrap();
                let error = distance(
                    &ours
                        .flatten_to(ours.rank().max(2) - 2)
                        .unwrap()
                        .reshape(y.shape())
                        .unwrap(),
                    &y,
                );
                assert!(error < tolerance, "{activation:?}: {error}");
                if dtype == DType::F64 {
                    let layer = || linear_activation(&x, &w, bias.as_ref(), activation).unwrap();
                    let vars = [&x, &w, &b];
                    let vars = if bias.is_some() {
                        &vars[..]
                    } else {
                        &vars[..2]
                    };
                    let error = check_directions(vars, || probe(&layer()));
                    assert!(error < 1e-8, "{activation:?}: {error}");
                }
            }
        }
    }
}

#[test]
fn linear_over_random_shapes() {
    let shapes = (
        1usize..70,
        1usize..40,
        1usize..40,
        any::<bool>(),
        0usize..10,
    );
    runner(40)
        .run(&shapes, |(rows, inputs, outputs, transposed, a)| {
            let x = match transposed {
                true => normal(1, &[inputs, rows], DType::F64).t().unwrap(),
                false => normal(1, &[rows, inputs], DType::F64),
            };
            let (w, b) = (
                var(2, &[outputs, inputs], DType::F64),
                var(3, &[outputs], DType::F64),
            );
            let loss = |y: Tensor| probe(&ALL[a].forward(&y).unwrap());
            let ours = linear_activation(&x, &w, Some(&b), Activation::Identity).unwrap();
            let theirs = x
                .matmul(&w.t().unwrap())
                .unwrap()
                .broadcast_add(&b)
                .unwrap();
            let (g, h) = (
                loss(ours).backward().unwrap(),
                loss(theirs).backward().unwrap(),
            );
            for v in [&w, &b] {
                let error = distance(g.get(v).unwrap(), h.get(v).unwrap());
                prop_assert!(error < 1e-11, "{error}");
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn threads_do_not_change_a_bit_of_dense_layers() {
    let run = |threads| {
        with_threads(threads, || {
            let x = var(1, &[300, 257], DType::F32);
            let (w, b) = (var(2, &[515, 257], DType::F32), var(3, &[515], DType::F32));
            let y = linear_activation(&x, &w, Some(&b), Activation::Gelu).unwrap();
            let y = softmax(&log_softmax(&y, 1).unwrap(), 1).unwrap();
            let grads = probe(&y).backward().unwrap();
            let all = [&x, &w, &b].map(|v| bits(grads.get(v).unwrap()));
            (bits(&y), all)
        })
    };
    let one = run(1);
    assert!(one == run(2));
    assert!(one == run(7));
}

#[test]
fn only_what_is_part_of_the_graph_gets_a_gradient() {
    let x = normal(1, &[3, 5], DType::F32);
    let (w, b) = (var(2, &[4, 5], DType::F32), normal(3, &[4], DType::F32));
    let y = linear_activation(&x, &w, Some(&b), Activation::Relu).unwrap();
    let grads = probe(&y).backward().unwrap();
    assert!(grads.get(&w).is_some());
    assert!(grads.get(&x).is_none() && grads.get(&b).is_none());
}

#[test]
fn linear_shares_candles_names_and_refuses_what_does_not_fit() {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, &CPU);
    candle_nn::linear(5, 4, vb.pp("a")).unwrap();
    let layer = linear(5, 4, vb.pp("a")).unwrap();
    linear_no_bias(5, 4, vb.pp("a")).unwrap();
    assert_eq!(map.all_vars().len(), 2);
    let zeros = |shape: &[usize], dtype| Tensor::zeros(shape, dtype, &CPU).unwrap();
    for (x, word) in [
        (zeros(&[3, 4], DType::F32), "[.., 5]"),
        (zeros(&[0, 5], DType::F32), "non-empty"),
        (zeros(&[3, 5], DType::F64), "F32"),
    ] {
        let error = layer.forward(&x).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    let (x, w) = (zeros(&[3, 5], DType::F32), zeros(&[4, 5], DType::F32));
    let bad = linear_activation(&x, &w, Some(&zeros(&[5], DType::F32)), Activation::Relu);
    assert!(matches!(bad, Err(Error::Shape { tensor: "bias", .. })));
}

#[test]
fn softmax_over_random_rows() {
    let cases = (1usize..20, 1usize..100, -50.0..50.0f64, any::<bool>());
    runner(60)
        .run(&cases, |(rows, width, shift, log)| {
            let x = normal(5, &[rows, width], DType::F64);
            let x = Var::from_tensor(&((x * 3.0).unwrap() + shift).unwrap()).unwrap();
            let f = if log { log_softmax } else { softmax };
            let y = f(&x, 1).unwrap();
            // Along the other dimension candle operations run.
            let other = f(&x.t().unwrap().contiguous().unwrap(), 0).unwrap();
            prop_assert!(distance(&y, &other.t().unwrap()) < 1e-12);
            let (g, h) = (
                probe(&y).backward().unwrap(),
                probe(&other.t().unwrap()).backward().unwrap(),
            );
            prop_assert!(distance(g.get(&x).unwrap(), h.get(&x).unwrap()) < 1e-12);
            let single = f(&x.to_dtype(DType::F32).unwrap(), 1).unwrap();
            prop_assert!(distance(&single, &y.to_dtype(DType::F32).unwrap()) < 1e-5);
            Ok(())
        })
        .unwrap();
}

#[test]
fn short_rows_have_the_bits_of_long_ones() {
    for dtype in [DType::F32, DType::F64] {
        for (rows, width) in [(1, 1), (3, 2), (37, 5), (16, 9), (40, 17), (33, 31)] {
            let short = normal(5, &[rows, width], dtype);
            let weights = normal(6, &[rows, width], dtype);
            let empty = Tensor::full(f64::NEG_INFINITY, (rows, 40 - width), &CPU).unwrap();
            let empty = empty.to_dtype(dtype).unwrap();
            let zeros = empty.zeros_like().unwrap();
            let long = Tensor::cat(&[&short, &empty], 1).unwrap();
            let long_weights = Tensor::cat(&[&weights, &zeros], 1).unwrap();
            for log in [false, true] {
                let run = |x: &Tensor, w: &Tensor| {
                    let x = Var::from_tensor(x).unwrap();
                    let y = match log {
                        true => log_softmax(&x, 1).unwrap(),
                        false => softmax(&x, 1).unwrap(),
                    };
                    let loss = (&y * w).unwrap().sum_all().unwrap();
                    let grads = loss.backward().unwrap();
                    let first = |t: &Tensor| bits(&t.narrow(1, 0, width).unwrap());
                    (first(&y), first(grads.get(&x).unwrap()))
                };
                assert!(run(&short, &weights) == run(&long, &long_weights));
            }
        }
    }
}

#[test]
fn masked_entries_get_no_probability() {
    let x = Tensor::new(&[[0f32, f32::NEG_INFINITY, 0.0]], &CPU).unwrap();
    let p = softmax(&x, 1).unwrap().to_vec2::<f32>().unwrap();
    assert_eq!(p, [[0.5, 0.0, 0.5]]);
    let nan = Tensor::new(&[[0f32, f32::NAN, 0.0]], &CPU).unwrap();
    let p = softmax(&nan, 1).unwrap().to_vec2::<f32>().unwrap();
    assert!(p[0].iter().all(|p| p.is_nan()));
}
