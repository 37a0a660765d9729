use crate::child::gradients_keep_their_graph;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};
use thalweg_tensor_core::autograd::{
    check_gradients, check_second_order, grad_check, hvp, hvp_with, jvp, jvp_with, keeps_graph,
    mixed_vjp, mixed_vjp_with, CheckConfig, Method, Mode,
};
use thalweg_tensor_core::random::RandomStream;
use thalweg_tensor_core::Error;

const CPU: Device = Device::Cpu;
const DIFFERENCES: Mode = Mode::CentralDifferences { step: None };

fn normal(label: &str, shape: impl Into<Shape>, dtype: DType) -> Tensor {
    RandomStream::new(3)
        .split(label)
        .normal(0.0, 1.0, shape, dtype, &CPU)
        .unwrap()
}

fn var(label: &str, shape: impl Into<Shape>, dtype: DType) -> Var {
    Var::from_tensor(&normal(label, shape, dtype)).unwrap()
}

fn values(tensor: &Tensor) -> Vec<f64> {
    tensor
        .to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

/// Largest difference relative to the largest expected entry.
fn distance(got: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(
        (got.dims(), got.dtype()),
        (expected.dims(), expected.dtype())
    );
    let (got, expected) = (values(got), values(expected));
    let scale = expected.iter().fold(0.0_f64, |m, x| m.max(x.abs()));
    got.iter()
        .zip(&expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f64::max)
        / scale
}

fn assert_detached(tensors: &[Tensor]) {
    assert!(tensors.iter().all(|t| !t.track_op()));
}

/// `f(x, y) = sum sin(x) * (M y^2)` with its second derivatives in closed form.
struct Coupled {
    m: Tensor,
    x: Var,
    y: Var,
    v: Tensor,
}

impl Coupled {
    fn new(dtype: DType) -> Self {
        Self {
            m: normal("m", (5, 3), dtype),
            x: var("x", 5, dtype),
            y: var("y", 3, dtype),
            v: normal("v", 5, dtype),
        }
    }

    fn my2(&self, y: &Tensor) -> candle_core::Result<Tensor> {
        self.m.matmul(&y.sqr()?.reshape((3, 1))?)?.flatten_all()
    }

    fn f(&self) -> candle_core::Result<Tensor> {
        (self.x.sin()? * self.my2(&self.y)?)?.sum_all()
    }

    /// `-sin(x) * (M y^2) * v`.
    fn hvp(&self) -> Tensor {
        let second = (self.x.detach().sin().unwrap().neg().unwrap()
            * self.my2(&self.y.detach()).unwrap())
        .unwrap();
        (second * &self.v).unwrap()
    }

    /// `2 y * M^T (cos(x) * v)`.
    fn mixed(&self) -> Tensor {
        let inner = (self.x.detach().cos().unwrap() * &self.v)
            .unwrap()
            .reshape((5, 1))
            .unwrap();
        let back = self
            .m
            .t()
            .unwrap()
            .matmul(&inner)
            .unwrap()
            .flatten_all()
            .unwrap();
        (back * (self.y.detach() * 2.0).unwrap()).unwrap()
    }

    fn assert_right(&self, mode: Mode, tol: f64) -> Method {
        let (x, y, v) = ([self.x.clone()], [self.y.clone()], [self.v.clone()]);
        let h = hvp_with(mode, || self.f(), &x, &v).unwrap();
        assert!(
            distance(&h.value[0], &self.hvp()) < tol,
            "{}",
            distance(&h.value[0], &self.hvp())
        );
        let m = mixed_vjp_with(mode, || self.f(), &x, &y, &v).unwrap();
        assert!(
            distance(&m.value[0], &self.mixed()) < tol,
            "{}",
            distance(&m.value[0], &self.mixed())
        );
        // J of sin(x) * (M y^2) with respect to x.
        let out = || self.x.sin()? * self.my2(&self.y)?;
        let j = jvp_with(mode, out, &x, &v).unwrap();
        let expected =
            (self.x.detach().cos().unwrap() * self.my2(&self.y.detach()).unwrap()).unwrap();
        let expected = (expected * &self.v).unwrap();
        assert!(
            distance(&j.value, &expected) < tol,
            "{}",
            distance(&j.value, &expected)
        );
        assert_detached(&h.value);
        assert_detached(&m.value);
        assert_detached(&[j.value]);
        assert!(
            h.method == j.method
                && std::mem::discriminant(&h.method) == std::mem::discriminant(&m.method)
        );
        h.method
    }
}

#[test]
fn exact_derivatives_agree_with_closed_forms() {
    if gradients_keep_their_graph("autograd::exact_derivatives_agree_with_closed_forms", true) {
        assert!(keeps_graph().unwrap());
        for (dtype, tol) in [(DType::F64, 1e-13), (DType::F32, 1e-5)] {
            let coupled = Coupled::new(dtype);
            assert_eq!(coupled.assert_right(Mode::Auto, tol), Method::Exact);
            assert_eq!(coupled.assert_right(Mode::Exact, tol), Method::Exact);
            // Forced differences work there too, and their results carry no graph either.
            let loose = if dtype == DType::F64 { 1e-7 } else { 5e-3 };
            assert!(matches!(
                coupled.assert_right(DIFFERENCES, loose),
                Method::CentralDifferences { .. }
            ));
        }
    }
}

#[test]
fn central_differences_agree_with_closed_forms() {
    if gradients_keep_their_graph(
        "autograd::central_differences_agree_with_closed_forms",
        false,
    ) {
        assert!(!keeps_graph().unwrap());
        for (dtype, tol) in [(DType::F64, 1e-7), (DType::F32, 5e-3)] {
            let method = Coupled::new(dtype).assert_right(Mode::Auto, tol);
            let Method::CentralDifferences { step } = method else {
                panic!("{method:?}")
            };
            assert!(step > 0.0 && step.log2().fract() == 0.0);
        }
        let c = Coupled::new(DType::F64);
        let exact = hvp_with(Mode::Exact, || c.f(), &[c.x.clone()], &[c.v.clone()]);
        assert!(matches!(exact, Err(Error::Unsupported { .. })));
        assert_eq!(
            check_second_order(|| c.f(), &[("x".into(), c.x.clone())], &[c.v.clone()], 0.1)
                .unwrap(),
            None
        );
        let chosen = Mode::CentralDifferences { step: Some(0.25) };
        let method = hvp_with(chosen, || c.f(), &[c.x.clone()], &[c.v.clone()])
            .unwrap()
            .method;
        assert_eq!(method, Method::CentralDifferences { step: 0.25 });
    }
}

/// A network with two layers; loss and variables.
fn network(
    dtype: DType,
) -> (
    impl Fn() -> candle_core::Result<Tensor>,
    Vec<Var>,
    Vec<Tensor>,
    Vec<Tensor>,
) {
    let vars = vec![
        var("w1", (4, 6), dtype),
        var("b1", 6, dtype),
        var("w2", (6, 2), dtype),
    ];
    let direction = |label: &str| -> Vec<Tensor> {
        let one = |(i, var): (usize, &Var)| normal(&format!("{label}{i}"), var.shape(), dtype);
        vars.iter().enumerate().map(one).collect()
    };
    let (u, v) = (direction("u"), direction("v"));
    let input = normal("input", (7, 4), dtype);
    let held = vars.clone();
    let loss = move || {
        let hidden = input.matmul(&held[0])?.broadcast_add(&held[1])?.tanh()?;
        hidden.matmul(&held[2])?.sqr()?.mean_all()
    };
    (loss, vars, u, v)
}

fn dot(a: &[Tensor], b: &[Tensor]) -> f64 {
    let pair = |(a, b): (&Tensor, &Tensor)| -> f64 {
        values(a).iter().zip(values(b)).map(|(x, y)| x * y).sum()
    };
    a.iter().zip(b).map(pair).sum()
}

#[test]
fn exact_hessians_of_a_network_are_symmetric_and_match_differences() {
    if gradients_keep_their_graph(
        "autograd::exact_hessians_of_a_network_are_symmetric_and_match_differences",
        true,
    ) {
        let (loss, vars, u, v) = network(DType::F64);
        let hu = hvp(&loss, &vars, &u).unwrap().value;
        let hv = hvp(&loss, &vars, &v).unwrap().value;
        assert!((dot(&hu, &v) - dot(&u, &hv)).abs() < 1e-12 * dot(&hu, &v).abs());
        let numeric = hvp_with(DIFFERENCES, &loss, &vars, &v).unwrap().value;
        for (exact, numeric) in hv.iter().zip(&numeric) {
            assert!(distance(numeric, exact) < 1e-7);
        }
        let named: Vec<(String, Var)> = vars.iter().cloned().map(|v| ("w".into(), v)).collect();
        assert!(
            check_second_order(&loss, &named, &v, 1e-6)
                .unwrap()
                .unwrap()
                < 1e-7
        );
    }
}

#[test]
fn the_step_suits_large_and_concentrated_directions_in_f32() {
    // 20000 weights: along one coordinate, along all, far from and near the origin.
    let n = 20_000;
    for scale in [1e-3, 1.0, 30.0] {
        let x = Var::from_tensor(&(normal("big", n, DType::F32) * scale).unwrap()).unwrap();
        let mut one = vec![0_f32; n];
        one[17] = 1.0;
        for v in [
            normal("dense", n, DType::F32),
            Tensor::new(one, &CPU).unwrap(),
        ] {
            let expected = (x.detach().cos().unwrap() * &v).unwrap();
            for factor in [1e-6, 1.0, 1e6] {
                let v = (&v * factor).unwrap();
                let expected = (&expected * factor).unwrap();
                let f = || x.cos()?.neg()?.sum_all();
                let h = hvp_with(DIFFERENCES, f, &[x.clone()], &[v]).unwrap();
                let error = distance(&h.value[0], &expected);
                assert!(
                    error < 2e-2,
                    "scale {scale}, factor {factor}: {error}, {:?}",
                    h.method
                );
            }
        }
    }
}

#[test]
fn sixteen_bit_variables_get_a_coarse_derivative() {
    for dtype in [DType::BF16, DType::F16] {
        let x = Var::from_tensor(
            &Tensor::new(&[0.5_f32, -1.0], &CPU)
                .unwrap()
                .to_dtype(dtype)
                .unwrap(),
        )
        .unwrap();
        let v = Tensor::new(&[1_f32, 0.5], &CPU)
            .unwrap()
            .to_dtype(dtype)
            .unwrap();
        let f = || x.to_dtype(DType::F32)?.sqr()?.sum_all();
        let h = hvp_with(DIFFERENCES, f, &[x.clone()], &[v]).unwrap();
        let expected = Tensor::new(&[2_f32, 1.0], &CPU)
            .unwrap()
            .to_dtype(dtype)
            .unwrap();
        assert!(distance(&h.value[0], &expected) < 0.05, "{dtype:?}");
    }
}

#[test]
fn linear_functions_have_no_second_derivative() {
    for keep in [true, false] {
        if gradients_keep_their_graph("autograd::linear_functions_have_no_second_derivative", keep)
        {
            let (x, y) = (var("x", 4, DType::F64), var("y", 4, DType::F64));
            let v = normal("v", 4, DType::F64);
            let f = || (x.as_tensor() * 3.0)?.sum_all()? + y.sqr()?.sum_all()?;
            let h = hvp(f, &[x.clone()], &[v.clone()]).unwrap().value;
            let m = mixed_vjp(f, &[x.clone()], &[y.clone()], &[v.clone()])
                .unwrap()
                .value;
            assert!(values(&h[0])
                .iter()
                .chain(&values(&m[0]))
                .all(|x| x.abs() < 1e-9));
            // The zero direction gives zeros, not 0 / 0.
            let zero = v.zeros_like().unwrap();
            assert_eq!(
                values(&hvp(f, &[y.clone()], &[zero.clone()]).unwrap().value[0]),
                [0.0; 4]
            );
            assert_eq!(values(&jvp(f, &[y.clone()], &[zero]).unwrap().value), [0.0]);
            return;
        }
    }
}

#[test]
fn a_value_that_is_the_variable_itself_has_the_identity_as_derivative() {
    let x = var("x", (2, 3), DType::F64);
    let v = normal("v", (2, 3), DType::F64);
    let j = jvp_with(DIFFERENCES, || x.t(), &[x.clone()], &[v.clone()])
        .unwrap()
        .value;
    assert!(distance(&j, &v.t().unwrap()) < 1e-9);
}

fn bits(var: &Var) -> Vec<u64> {
    values(var).iter().map(|x| x.to_bits()).collect()
}

#[test]
fn variables_keep_their_bits_whatever_happens() {
    let start = Tensor::new(&[-0.0_f64, 1.0 / 3.0, 1e300, 1e-310], &CPU).unwrap();
    let x = Var::from_tensor(&start).unwrap();
    let before = bits(&x);
    let (vars, v) = ([x.clone()], [Tensor::ones(4, DType::F64, &CPU).unwrap()]);
    hvp_with(DIFFERENCES, || x.sin()?.sum_all(), &vars, &v).unwrap();
    assert_eq!(bits(&x), before);
    // An error at the first and at the second evaluation.
    for fails_at in [1, 2] {
        let mut calls = 0;
        let f = || {
            calls += 1;
            if calls == fails_at {
                candle_core::bail!("out of data")
            }
            x.sin()?.sum_all()
        };
        assert!(hvp_with(DIFFERENCES, f, &vars, &v).is_err());
        assert_eq!(bits(&x), before);
    }
    let panics = || -> candle_core::Result<Tensor> { panic!("in the closure") };
    let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _ = jvp_with(DIFFERENCES, panics, &vars, &v);
    }));
    assert!(caught.is_err());
    assert_eq!(bits(&x), before);
    let named = [("x".to_string(), x.clone())];
    check_gradients(|| x.sin()?.sum_all(), &named, CheckConfig::default()).ok();
    assert_eq!(bits(&x), before);
}

#[test]
fn directions_that_do_not_fit_are_refused() {
    let x = var("x", 3, DType::F64);
    let f = || x.sqr()?.sum_all();
    let run = |vars: &[Var], v: &[Tensor]| hvp_with(DIFFERENCES, f, vars, v).unwrap_err();
    let v = normal("v", 3, DType::F64);
    let one = [x.clone()];
    assert!(matches!(run(&one, &[]), Error::InvalidArgument { .. }));
    assert!(matches!(run(&[], &[]), Error::InvalidArgument { .. }));
    assert!(matches!(
        run(&one, &[normal("v", 4, DType::F64)]),
        Error::ShapeMismatch { .. }
    ));
    assert!(matches!(
        run(&one, &[normal("v", 3, DType::F32)]),
        Error::DTypeMismatch { .. }
    ));
    let two = [x.clone(), x.clone()];
    assert!(matches!(
        run(&two, &[v.clone(), v.clone()]),
        Error::SharedStorage { .. }
    ));
    for bad in [f64::NAN, f64::INFINITY] {
        let v = Tensor::new(&[1.0, bad, 0.0], &CPU).unwrap();
        assert!(matches!(
            run(&one, &[v]),
            Error::InvalidArgument { name: "v", .. }
        ));
    }
    for bad in [0.0, -1.0, f64::NAN] {
        let mode = Mode::CentralDifferences { step: Some(bad) };
        let error = hvp_with(mode, f, &one, std::slice::from_ref(&v)).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { name: "step", .. }));
    }
    let vector = hvp_with(DIFFERENCES, || x.sqr(), &one, std::slice::from_ref(&v));
    assert!(matches!(vector, Err(Error::ShapeMismatch { .. })));
    let nan = hvp_with(
        DIFFERENCES,
        || (x.sqrt()? * 2.0)?.sum_all(),
        &[Var::from_tensor(&v).unwrap()],
        &[v.clone()],
    );
    assert!(matches!(nan, Err(Error::LostGradient(names)) if names == ["vars[0]"]));
    let negative = Var::new(&[-1.0_f64, 1.0, -2.0], &CPU).unwrap();
    let nan = hvp_with(
        DIFFERENCES,
        || negative.sqrt()?.sum_all(),
        &[negative.clone()],
        &[v],
    );
    assert!(
        matches!(nan, Err(Error::NonFinite { count: 2, .. })),
        "{nan:?}"
    );
}

#[test]
fn lost_gradients_are_named() {
    let (w, b) = (var("w", (3, 4), DType::F32), var("b", 4, DType::F32));
    let x = normal("x", (2, 3), DType::F32);
    let named = [("w".to_string(), w.clone()), ("b".to_string(), b.clone())];
    let logits = x.matmul(&w).unwrap().broadcast_add(&b).unwrap();
    grad_check(&[&logits], &named).unwrap();
    let through = |t: &Tensor| (candle_nn::ops::softmax_last_dim(t)? + 0.0)?.broadcast_add(&b);
    let lost = through(&logits).unwrap();
    let error = grad_check(&[&lost], &named).unwrap_err();
    assert!(
        matches!(&error, Error::LostGradient(names) if names == &["w"]),
        "{error}"
    );
    assert!(
        error.to_string().contains("`w`") || error.to_string().contains(" w"),
        "{error}"
    );
    // One output that reaches it is enough.
    grad_check(&[&lost, &logits], &named).unwrap();
    assert!(matches!(grad_check(&[], &named), Err(Error::LostGradient(names)) if names.len() == 2));
    let f = || through(&x.matmul(&w)?.broadcast_add(&b)?)?.sum_all();
    let v = [normal("v", (3, 4), DType::F32), normal("v", 4, DType::F32)];
    let error = hvp_with(DIFFERENCES, f, &[w.clone(), b.clone()], &v).unwrap_err();
    assert!(matches!(error, Error::LostGradient(names) if names == ["vars[0]"]));
}

/// `x^2` elementwise with a backward of choice.
struct Square {
    /// The backward gives this times the right gradient, except for entries above `above`.
    factor: f64,
    above: f64,
    /// Whether the backward's result has lost its graph.
    cut: bool,
}

impl CustomOp1 for Square {
    fn name(&self) -> &'static str {
        "square"
    }

    fn cpu_fwd(&self, s: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let data: Vec<f64> = s.as_slice::<f64>()?[..l.shape().elem_count()]
            .iter()
            .map(|x| x * x)
            .collect();
        Ok((CpuStorage::F64(data), l.shape().clone()))
    }

    fn bwd(
        &self,
        arg: &Tensor,
        _res: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<Option<Tensor>> {
        let arg = if self.cut { arg.detach() } else { arg.clone() };
        let right = ((&arg * 2.0)? * grad)?;
        let wrong = (&right * self.factor)?;
        Ok(Some(arg.gt(self.above)?.where_cond(&right, &wrong)?))
    }
}

#[test]
fn wrong_gradients_are_found_and_the_worst_entry_is_named() {
    let x = Var::new(&[0.5_f64, 1.0, -3.0, 2.0], &CPU).unwrap();
    let y = Var::new(&[1.0_f64, 2.0], &CPU).unwrap();
    let vars = [("x".to_string(), x.clone()), ("y".to_string(), y.clone())];
    let f = |factor: f64| {
        let (x, y) = (x.clone(), y.clone());
        move || {
            let square = Square {
                factor,
                above: 0.0,
                cut: false,
            };
            x.apply_op1(square)?.sum_all()? + y.sin()?.sum_all()?
        }
    };
    let error = check_gradients(f(1.0), &vars, CheckConfig::default()).unwrap();
    assert!(error < 1e-8 && error > 0.0, "{error}");
    match check_gradients(f(1.001), &vars, CheckConfig::default()).unwrap_err() {
        Error::WrongGradient {
            name,
            index,
            analytic,
            numeric,
        } => {
            assert_eq!((name.as_str(), index), ("x", 2));
            assert!((analytic + 6.006).abs() < 1e-12 && (numeric + 6.0).abs() < 1e-8);
        }
        other => panic!("{other}"),
    }
    // Only the entries that are looked at: the first and the last.
    let two = CheckConfig {
        max_entries: 2,
        ..CheckConfig::default()
    };
    check_gradients(f(1.001), &vars, two).unwrap();
    let lost = check_gradients(|| y.sqr()?.sum_all(), &vars, two);
    assert!(matches!(lost, Err(Error::LostGradient(names)) if names == ["x"]));
    assert!(check_gradients(f(1.0), &[], two).is_err());
    for bad in [
        CheckConfig { step: 0.0, ..two },
        CheckConfig {
            tol: f64::NAN,
            ..two
        },
        CheckConfig {
            max_entries: 0,
            ..two
        },
    ] {
        assert!(matches!(
            check_gradients(f(1.0), &vars, bad),
            Err(Error::InvalidArgument { .. })
        ));
    }
}

#[test]
fn gradients_in_single_precision_are_checked_too() {
    let x = var("x", (3, 3), DType::F32);
    let vars = [("x".to_string(), x.clone())];
    check_gradients(
        || x.tanh()?.sqr()?.sum_all(),
        &vars,
        CheckConfig::single_precision(),
    )
    .unwrap();
    let half = || x.detach().tanh()?.sqr()?.sum_all()? + (x.sum_all()? * 0.0001)?;
    let wrong = check_gradients(half, &vars, CheckConfig::single_precision());
    assert!(
        matches!(wrong, Err(Error::WrongGradient { .. })),
        "{wrong:?}"
    );
}

#[test]
fn lost_second_order_terms_are_found() {
    if gradients_keep_their_graph("autograd::lost_second_order_terms_are_found", true) {
        let x = Var::new(&[0.5_f64, 1.0, 3.0], &CPU).unwrap();
        let vars = [("x".to_string(), x.clone())];
        let v = [Tensor::new(&[1.0_f64, -1.0, 0.5], &CPU).unwrap()];
        let f = |cut: bool| {
            let x = x.clone();
            move || {
                let square = Square {
                    factor: 1.0,
                    above: 0.0,
                    cut,
                };
                x.apply_op1(square)?.sum_all()? + x.sin()?.sum_all()?
            }
        };
        assert!(
            check_second_order(f(false), &vars, &v, 1e-6)
                .unwrap()
                .unwrap()
                < 1e-8
        );
        match check_second_order(f(true), &vars, &v, 1e-2).unwrap_err() {
            Error::WrongGradient {
                name,
                analytic,
                numeric,
                ..
            } => {
                assert!(name.contains('x'));
                assert!((numeric - analytic).abs() > 1.0 - 1e-6);
            }
            other => panic!("{other}"),
        }
    }
}
