//! The view over named variables.

use candle_core::{DType, Device, Tensor, Var};
use thalweg_tensor_core::params::Params;
use thalweg_tensor_core::random::RandomStream;
use thalweg_tensor_core::Error;

fn normal(shape: &[usize], label: &str, dtype: DType) -> Tensor {
    let mut stream = RandomStream::new(11).split(label);
    stream.normal(0.0, 1.0, shape, dtype, &Device::Cpu).unwrap()
}

fn numbers(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn params(dtype: DType) -> Params {
    let named = [("b", vec![5]), ("a", vec![3, 4]), ("c", vec![2, 2, 2])].map(|(name, shape)| {
        (
            name.to_string(),
            Var::from_tensor(&normal(&shape, name, dtype)).unwrap(),
        )
    });
    Params::from_named(named).unwrap()
}

fn like(params: &Params, label: &str, dtype: DType) -> Vec<Tensor> {
    let one = |(name, var): &(String, Var)| normal(var.dims(), &format!("{label}{name}"), dtype);
    params.named().iter().map(one).collect()
}

fn all(params: &Params) -> Vec<f64> {
    params
        .named()
        .iter()
        .flat_map(|(_, v)| numbers(v))
        .collect()
}

#[test]
fn flatten_orders_by_name_and_unflatten_writes_back() {
    for dtype in [DType::F32, DType::F64] {
        let params = params(dtype);
        let names: Vec<_> = params.named().iter().map(|(n, _)| n.as_str()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert_eq!((params.len(), params.numel()), (3, 25));
        let flat = params.flatten().unwrap();
        let before = all(&params);
        assert_eq!(numbers(&flat.to_tensor(&Device::Cpu).unwrap()), before);
        assert_eq!(flat.layout().range(1), 12..17);
        params.axpy(-2.0, &like(&params, "x", dtype)).unwrap();
        assert_ne!(all(&params), before);
        params.unflatten(&flat).unwrap();
        assert_eq!(all(&params), before);
    }
}

#[test]
fn reductions_agree_with_plain_sums() {
    let params = params(DType::F64);
    let x = like(&params, "x", DType::F64);
    let (p, q): (Vec<f64>, Vec<f64>) = (all(&params), x.iter().flat_map(numbers).collect());
    let dot: f64 = p.iter().zip(&q).map(|(a, b)| a * b).sum();
    assert!((params.dot(&x).unwrap() - dot).abs() < 1e-13);
    let norm = p.iter().map(|a| a * a).sum::<f64>().sqrt();
    assert!((params.norm().unwrap() - norm).abs() < 1e-13);
    let each = params.norms().unwrap();
    assert_eq!(each.len(), 3);
    assert!((each.iter().map(|n| n * n).sum::<f64>().sqrt() - norm).abs() < 1e-13);
}

#[test]
fn axpy_lerp_and_combine_write_in_place() {
    let params = params(DType::F64);
    let (before, x) = (all(&params), like(&params, "x", DType::F64));
    let q: Vec<f64> = x.iter().flat_map(numbers).collect();
    let snapshot = params.snapshot().unwrap();
    let check = |f: &dyn Fn(f64, f64) -> f64| {
        for (got, (p, q)) in all(&params).iter().zip(before.iter().zip(&q)) {
            assert!((got - f(*p, *q)).abs() < 1e-14);
        }
        params.restore(&snapshot).unwrap();
        assert_eq!(all(&params), before);
    };
    params.axpy(0.3, &x).unwrap();
    check(&|p, q| p + 0.3 * q);
    params.lerp(0.1, &x).unwrap();
    check(&|p, q| 0.9 * p + 0.1 * q);
    params.combine(-2.0, 0.5, &x).unwrap();
    check(&|p, q| -2.0 * p + 0.5 * q);
}

#[test]
fn gradients_come_in_order_with_zeros_for_none() {
    let params = params(DType::F32);
    let [a, b] = [0, 1].map(|i| params.named()[i].1.clone());
    let loss = (a.sqr().unwrap().sum_all().unwrap() + b.sum_all().unwrap()).unwrap();
    let grads = loss.backward().unwrap();
    let got = params.gradients(&grads).unwrap();
    assert_eq!(
        numbers(&got[0]),
        numbers(&a).iter().map(|x| 2.0 * x).collect::<Vec<_>>()
    );
    assert_eq!(numbers(&got[1]), vec![1.0; 5]);
    assert_eq!(numbers(&got[2]), vec![0.0; 8]);
    let flat = params.flatten_gradients(&grads).unwrap();
    assert_eq!(numbers(&flat.get(1, &Device::Cpu).unwrap()), vec![1.0; 5]);
}

#[test]
fn misuse_is_named() {
    let params = params(DType::F32);
    let x = like(&params, "x", DType::F32);
    assert!(matches!(
        params.axpy(1.0, &x[..2]).unwrap_err(),
        Error::ShapeMismatch { .. }
    ));
    assert!(matches!(
        params.lerp(1.5, &x).unwrap_err(),
        Error::InvalidArgument { .. }
    ));
    assert!(matches!(
        params.axpy(f64::NAN, &x).unwrap_err(),
        Error::InvalidArgument { .. }
    ));
    let wrong = like(&params, "x", DType::F64);
    assert!(matches!(
        params.axpy(1.0, &wrong).unwrap_err(),
        Error::DTypeMismatch { .. }
    ));
    let before = all(&params);
    assert!(params.dot(&wrong).is_err());
    assert_eq!(all(&params), before);
    let shared = params.named()[0].1.clone();
    let twice = vec![("p".to_string(), shared.clone()), ("q".to_string(), shared)];
    assert!(matches!(
        Params::new(twice).unwrap_err(),
        Error::SharedStorage { .. }
    ));
    let mixed = [
        Var::from_tensor(&normal(&[2], "m", DType::F32)).unwrap(),
        Var::from_tensor(&normal(&[2], "n", DType::F64)).unwrap(),
    ];
    let mixed = Params::from_vars(mixed).unwrap();
    assert!(matches!(
        mixed.flatten().unwrap_err(),
        Error::DTypeMismatch { .. }
    ));
    assert!(params
        .unflatten(&Params::from_vars([]).unwrap().flatten().unwrap())
        .is_err());
}
