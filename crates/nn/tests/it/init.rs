use crate::support::{bits, values, CPU};
use candle_core::{DType, Tensor};
use candle_nn::VarMap;
use nn::init::{is_buffer, trainable, Fan, Gain, Initializer, SeededVars};
use nn::Error;
use tensor_core::random::RandomStream;

fn moments(t: &Tensor) -> (f64, f64, f64) {
    let v = values(t);
    let n = v.len() as f64;
    let mean = v.iter().sum::<f64>() / n;
    let var = v.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    (
        mean,
        var.sqrt(),
        v.iter().fold(0.0, |m: f64, x| m.max(x.abs())),
    )
}

/// Standard deviation and bound of each distribution, on a weight `[120, 50, 3, 3]`.
#[test]
fn scales_are_the_definitions() {
    let (fan_in, fan_out) = (450.0_f64, 1080.0_f64);
    let cases = [
        (
            Initializer::xavier_uniform(Gain::Linear),
            2.0 / (fan_in + fan_out),
            true,
        ),
        (
            Initializer::xavier_normal(Gain::Tanh),
            2.0 / (fan_in + fan_out) * 25.0 / 9.0,
            false,
        ),
        (Initializer::he_uniform(Gain::Relu), 2.0 / fan_in, true),
        (Initializer::he_normal(Gain::Relu), 2.0 / fan_in, false),
        (
            Initializer::he_normal(Gain::Relu).with_fan(Fan::Out),
            2.0 / fan_out,
            false,
        ),
        (
            Initializer::he_normal(Gain::LeakyRelu(1.0)),
            1.0 / fan_in,
            false,
        ),
        (Initializer::lecun_uniform(), 1.0 / fan_in, true),
        (Initializer::lecun_normal(), 1.0 / fan_in, false),
        (Initializer::torch_linear(), 1.0 / (3.0 * fan_in), true),
    ];
    for (i, (init, variance, uniform)) in cases.into_iter().enumerate() {
        let mut stream = RandomStream::new(i as u64);
        let w = init
            .tensor((120, 50, 3, 3), &mut stream, DType::F64, &CPU)
            .unwrap();
        let (mean, std, max) = moments(&w);
        let expected = variance.sqrt();
        // 54 000 draws: the standard error of the mean is 0.0043 std, of the std 0.003 std.
        assert!(mean.abs() < 0.02 * expected, "{init:?}: mean {mean}");
        assert!(
            (std / expected - 1.0).abs() < 0.015,
            "{init:?}: std {std} for {expected}"
        );
        let bound = 3f64.sqrt() * expected;
        if uniform {
            assert!(
                max <= bound && max > 0.999 * bound,
                "{init:?}: {max} for {bound}"
            );
        } else {
            assert!(max > 1.5 * bound, "{init:?}: {max} is no normal tail");
        }
    }
}

#[test]
fn orthogonal_rows_or_columns() {
    for shape in [vec![7, 20], vec![20, 7], vec![6, 2, 2, 2], vec![5, 5]] {
        let init = Initializer::Orthogonal {
            gain: Gain::Explicit(3.0),
        };
        let w = init
            .tensor(shape.clone(), &mut RandomStream::new(3), DType::F64, &CPU)
            .unwrap();
        assert_eq!(w.dims(), shape);
        let m = w.flatten_from(1).unwrap();
        let m = if m.dim(0).unwrap() > m.dim(1).unwrap() {
            m.t().unwrap()
        } else {
            m
        };
        let gram = values(&m.matmul(&m.t().unwrap().contiguous().unwrap()).unwrap());
        let n = m.dim(0).unwrap();
        for (k, g) in gram.iter().enumerate() {
            let expected = if k / n == k % n { 9.0 } else { 0.0 };
            assert!(
                (g - expected).abs() < 1e-13,
                "{shape:?}: {g} for {expected}"
            );
        }
    }
    let init = Initializer::Orthogonal { gain: Gain::Linear };
    let error = init
        .tensor(4, &mut RandomStream::new(3), DType::F64, &CPU)
        .unwrap_err();
    assert!(matches!(error, Error::Shape { .. }), "{error}");
}

#[test]
fn truncated_normal_stays_inside_and_has_its_moments() {
    for (low, high) in [(-2.0, 2.0), (-0.5, 0.25), (0.0, 3.0)] {
        let init = Initializer::TruncatedNormal {
            mean: 0.0,
            std: 1.0,
            low,
            high,
        };
        let t = init
            .tensor(40_000, &mut RandomStream::new(9), DType::F64, &CPU)
            .unwrap();
        let v = values(&t);
        assert!(v.iter().all(|x| (low..=high).contains(x)));
        // E z and E z^2 of the truncated density, by the trapezoid rule.
        let n = 4000;
        let (mut mass, mut first, mut second) = (0.0, 0.0, 0.0);
        for k in 0..=n {
            let z: f64 = low + (high - low) * f64::from(k) / f64::from(n);
            let w = (-0.5 * z * z).exp() * if k == 0 || k == n { 0.5 } else { 1.0 };
            mass += w;
            first += w * z;
            second += w * z * z;
        }
        let (mean, std, _) = moments(&t);
        let (m, s) = (
            first / mass,
            (second / mass - (first / mass).powi(2)).sqrt(),
        );
        assert!((mean - m).abs() < 0.02 * s, "mean {mean} for {m}");
        assert!((std / s - 1.0).abs() < 0.02, "std {std} for {s}");
    }
    for (mean, std, low, high) in [
        (0.0, 1.0, 1.0, 2.0),
        (0.0, 0.0, -1.0, 1.0),
        (0.0, 1.0, 0.0, 0.0),
    ] {
        let init = Initializer::TruncatedNormal {
            mean,
            std,
            low,
            high,
        };
        let error = init
            .tensor(4, &mut RandomStream::new(9), DType::F64, &CPU)
            .unwrap_err();
        assert!(matches!(error, Error::InvalidConfig { .. }), "{error}");
    }
}

#[test]
fn values_depend_on_seed_and_name_only() {
    let build = |seed: u64, reverse: bool, extra: bool| {
        let vars = SeededVars::new(&RandomStream::new(seed));
        let vb = vars.builder(DType::F32, &CPU);
        if extra {
            candle_nn::linear(9, 9, vb.pp("extra")).unwrap();
        }
        let mut names = vec!["a", "b", "c"];
        if reverse {
            names.reverse();
        }
        for name in names {
            candle_nn::linear(6, 5, vb.pp(name)).unwrap();
        }
        let all = vars.trainable();
        let kept = all
            .into_iter()
            .filter(|(name, _)| !name.starts_with("extra"));
        kept.map(|(name, var)| (name, bits(&var)))
            .collect::<Vec<_>>()
    };
    let first = build(1, false, false);
    assert_eq!(first.len(), 6);
    assert_eq!(first, build(1, true, false));
    assert_eq!(first, build(1, false, true));
    assert_ne!(first, build(2, false, false));
    assert_ne!(
        first[1].1, first[3].1,
        "two layers must not get the same weights"
    );
}

#[test]
fn candle_hints_are_honored() {
    let vars = SeededVars::new(&RandomStream::new(5));
    let vb = vars.builder(DType::F64, &CPU);
    let linear = candle_nn::linear(400, 300, vb.pp("l")).unwrap();
    let (mean, std, max) = moments(linear.weight());
    // candle's linear layer asks for Kaiming normal with the gain of ReLU over the fan-in.
    let expected = (2.0_f64 / 400.0).sqrt();
    assert!(mean.abs() < 0.02 * expected && (std / expected - 1.0).abs() < 0.01);
    assert!(
        max > 4.0 * expected,
        "120 000 normal draws reach past 4 deviations"
    );
    assert!(moments(linear.bias().unwrap()).2 <= 1.0 / 20.0);
    let norm = candle_nn::layer_norm(8, 1e-5, vb.pp("n")).unwrap();
    assert_eq!(values(norm.weight()), [1.0; 8]);
}

#[test]
fn the_same_name_gives_the_same_variable_and_checks_its_shape() {
    let vars = SeededVars::new(&RandomStream::new(5));
    let vb = vars.builder(DType::F64, &CPU);
    let (a, b) = (vb.get((2, 3), "w").unwrap(), vb.get((2, 3), "w").unwrap());
    assert_eq!(a.id(), b.id());
    assert!(vb.contains_tensor("w") && !vb.contains_tensor("v"));
    let error = vb.get((3, 2), "w").unwrap_err().to_string();
    assert!(error.contains("[3, 2]") && error.contains("`w`"), "{error}");
}

#[test]
fn buffers_are_saved_but_not_trained() {
    let map = VarMap::new();
    let vars = SeededVars::new(&RandomStream::new(5)).with_varmap(map.clone());
    let vb = vars.builder(DType::F32, &CPU);
    candle_nn::batch_norm(4, 1e-5, vb.pp("bn")).unwrap();
    let names: Vec<String> = trainable(&map).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["bn.bias", "bn.weight"]);
    assert_eq!(map.all_vars().len(), 4);
    assert!(is_buffer("bn.running_mean") && is_buffer("iters") && !is_buffer("iters.weight"));
}

#[test]
fn hints_say_what_they_cannot_express() {
    let error = Initializer::Orthogonal { gain: Gain::Linear }
        .hint(&[2, 2])
        .unwrap_err();
    assert!(error.to_string().contains("with_rule"), "{error}");
    let error = Initializer::he_normal(Gain::Explicit(f64::NAN))
        .tensor((2, 2), &mut RandomStream::new(0), DType::F32, &CPU)
        .unwrap_err();
    assert!(matches!(error, Error::InvalidConfig { .. }), "{error}");
}
