use crate::support::{check_gradients, distance, normal, values, CPU};
use candle_core::{DType, Module, ModuleT, Tensor, Var};
use candle_nn::{Optimizer, VarBuilder, VarMap};
use nn::init::SeededVars;
use nn::models::{Activation, Mlp, MlpConfig};
use nn::norm::{layer_norm, rms_norm, LayerNorm, LayerNormConfig, RmsNorm};
use nn::Error;
use tensor_core::random::RandomStream;

fn probe(y: &Tensor) -> Tensor {
    // A fixed cotangent that is no symmetry of the layer.
    (y * normal(77, y.dims(), y.dtype()))
        .unwrap()
        .sum_all()
        .unwrap()
}

#[test]
fn layer_norm_equals_candle_and_has_its_gradient() {
    let (w, b) = (normal(1, &[5], DType::F64), normal(2, &[5], DType::F64));
    let x = Var::from_tensor(&normal(3, &[2, 3, 5], DType::F64)).unwrap();
    let (w, b) = (Var::from_tensor(&w).unwrap(), Var::from_tensor(&b).unwrap());
    for remove_mean in [true, false] {
        let config = LayerNormConfig {
            remove_mean,
            ..Default::default()
        };
        let ours = LayerNorm::new(w.as_tensor().clone(), Some(b.as_tensor().clone()), config);
        let ours = ours.unwrap();
        if remove_mean {
            // candle's fused path knows f32 only.
            let single = |t: &Tensor| t.to_dtype(DType::F32).unwrap();
            let theirs = candle_nn::LayerNorm::new(single(&w), single(&b), 1e-5);
            let theirs = theirs.forward(&single(&x)).unwrap();
            assert!(distance(&single(&ours.forward(&x).unwrap()), &theirs) < 1e-6);
        }
        let error = check_gradients(&[&x, &w, &b], || probe(&ours.forward(&x).unwrap()));
        assert!(error < 1e-8, "{error}");
    }
}

#[test]
fn rms_norm_equals_its_definition_and_has_its_gradient() {
    let x = Var::from_tensor(&normal(3, &[4, 5], DType::F64)).unwrap();
    let w = Var::from_tensor(&normal(1, &[5], DType::F64)).unwrap();
    let ours = RmsNorm::new(w.as_tensor().clone(), 1e-5).unwrap();
    let (xs, ws) = (values(&x), values(&w));
    for (i, y) in values(&ours.forward(&x).unwrap()).into_iter().enumerate() {
        let row = &xs[i / 5 * 5..i / 5 * 5 + 5];
        let rms = (row.iter().map(|x| x * x).sum::<f64>() / 5.0 + 1e-5).sqrt();
        assert!((y - xs[i] / rms * ws[i % 5]).abs() < 1e-14);
    }
    let error = check_gradients(&[&x, &w], || probe(&ours.forward(&x).unwrap()));
    assert!(error < 1e-8, "{error}");
}

#[test]
fn layer_norm_keeps_its_digits_at_large_means() {
    let noise = normal(3, &[6, 64], DType::F32);
    let x = ((&noise * 1e-2).unwrap() + 100.0).unwrap();
    let one = Tensor::ones(64, DType::F32, &CPU).unwrap();
    let norm = LayerNorm::new(
        one.clone(),
        None,
        LayerNormConfig {
            eps: 0.0,
            ..Default::default()
        },
    );
    let wide = LayerNorm::new(
        one.to_dtype(DType::F64).unwrap(),
        None,
        LayerNormConfig {
            eps: 0.0,
            ..Default::default()
        },
    );
    let exact = wide
        .unwrap()
        .forward(&x.to_dtype(DType::F64).unwrap())
        .unwrap();
    // The mean is rounded to f32 (half an ulp of 100 is 4e-4 of the deviation).
    assert!(distance(&norm.unwrap().forward(&x).unwrap(), &exact) < 2e-3);
}

#[test]
fn norms_share_names_with_candle_and_refuse_what_does_not_fit() {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, &CPU);
    candle_nn::layer_norm(4, 1e-5, vb.pp("n")).unwrap();
    candle_nn::rms_norm(4, 1e-5, vb.pp("r")).unwrap();
    let before = map.all_vars().len();
    let norm = layer_norm(4, LayerNormConfig::default(), vb.pp("n")).unwrap();
    rms_norm(4, 1e-5, vb.pp("r")).unwrap();
    assert_eq!(map.all_vars().len(), before);

    let error = norm
        .forward(&Tensor::zeros((2, 5), DType::F32, &CPU).unwrap())
        .unwrap_err();
    assert!(error.to_string().contains("[.., 4]"), "{error}");
    assert!(norm
        .forward(&Tensor::zeros((0, 4), DType::F32, &CPU).unwrap())
        .is_err());
    assert!(norm
        .forward(&Tensor::zeros((2, 4), DType::U32, &CPU).unwrap())
        .is_err());
    let bad = LayerNormConfig {
        eps: -1.0,
        ..Default::default()
    };
    assert!(matches!(
        layer_norm(4, bad, vb.pp("n")),
        Err(Error::InvalidConfig { .. })
    ));
    assert!(rms_norm(4, f64::NAN, vb.pp("r")).is_err());
}

#[test]
fn half_inputs_keep_their_dtype() {
    let norm = LayerNorm::new(
        Tensor::ones(8, DType::BF16, &CPU).unwrap(),
        None,
        LayerNormConfig::default(),
    );
    let y = norm
        .unwrap()
        .forward(&normal(1, &[3, 8], DType::BF16))
        .unwrap();
    assert_eq!(y.dtype(), DType::BF16);
}

#[test]
fn activations_have_gradients() {
    let x = Var::from_tensor(&normal(3, &[3, 4], DType::F64)).unwrap();
    let all = [
        Activation::Identity,
        Activation::Relu,
        Activation::Gelu,
        Activation::Silu,
        Activation::Tanh,
    ];
    for activation in all {
        let error = check_gradients(&[&x], || probe(&activation.forward(&x).unwrap()));
        assert!(error < 1e-8, "{activation:?}: {error}");
    }
}

#[test]
fn mlp_trains_and_repeats() {
    let run = |threads: usize| {
        crate::support::with_threads(threads, || {
            let vars = SeededVars::new(&RandomStream::new(4));
            let vb = vars.builder(DType::F32, &CPU);
            let mlp = Mlp::new(&MlpConfig::new(&[8, 16, 4]), vb).unwrap();
            let x = normal(1, &[32, 2, 4], DType::F32);
            let labels: Vec<u32> = (0..32).map(|i| i % 4).collect();
            let labels = Tensor::new(labels, &CPU).unwrap();
            let params = vars.trainable().into_iter().map(|(_, v)| v).collect();
            let mut sgd = candle_nn::SGD::new(params, 0.5).unwrap();
            let mut loss = f64::NAN;
            for _ in 0..200 {
                let logits = mlp.forward_t(&x, true).unwrap();
                let l =
                    nn::loss::cross_entropy(&logits, &labels, nn::loss::Reduction::Mean).unwrap();
                sgd.backward_step(&l).unwrap();
                loss = values(&l)[0];
            }
            let logits = mlp.forward_t(&x, false).unwrap();
            (loss, nn::loss::accuracy(&logits, &labels).unwrap())
        })
    };
    let (loss, accuracy) = run(1);
    assert!(
        loss < 0.2 && accuracy > 0.95,
        "loss {loss}, accuracy {accuracy}"
    );
    assert_eq!(run(1).0.to_bits(), run(2).0.to_bits());
}

#[test]
fn mlp_refuses_bad_widths() {
    let vars = SeededVars::new(&RandomStream::new(4));
    for widths in [&[][..], &[3], &[3, 0, 2]] {
        let error = Mlp::new(&MlpConfig::new(widths), vars.builder(DType::F32, &CPU)).unwrap_err();
        assert!(matches!(error, Error::InvalidConfig { .. }), "{error}");
    }
}
