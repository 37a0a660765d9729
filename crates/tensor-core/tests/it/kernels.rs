//! The fused engine against the same updates written plainly, element by element.

use candle_core::{DType, Device, Tensor, Var};
use half::{bf16, f16};
use proptest::prelude::*;
use std::sync::Arc;
use thalweg_tensor_core::flat::{FlatLayout, FlatTensor};
use thalweg_tensor_core::kernels::{
    check_on_host, dot, moments, sum_squares, FusedUpdate, GradMap, Mask, Moments, Real, Rule,
    StateDType, Updated, Work,
};
use thalweg_tensor_core::random::RandomStream;
use thalweg_tensor_core::{Error, Result};

const CPU: Device = Device::Cpu;

/// `m <- b m + g; v <- v + g^2; p <- p - lr m`; an event wherever `g < 0`.
#[derive(Clone, Copy)]
struct Toy {
    lr: f64,
    b: f64,
}

impl Rule<2, 2> for Toy {
    const NAME: &'static str = "toy";
    const DEVICE_BODY: Option<&'static str> =
        Some("s0 = k[1] * s0 + g; p = p - k[0] * s0; s1 = s1 + g * g; event = g < 0;");

    fn scalars(&self) -> [f64; 2] {
        [self.lr, self.b]
    }

    #[inline(always)]
    fn update<T: Real>(k: &[T; 2], param: T, grad: T, [m, v]: [T; 2]) -> Updated<T, 2> {
        let m = k[1] * m + grad;
        Updated {
            param: param - k[0] * m,
            state: [m, v + grad * grad],
            event: grad < T::ZERO,
        }
    }
}

const TOY: Toy = Toy { lr: 0.25, b: 0.5 };

fn values(n: usize, label: &str) -> Vec<f64> {
    let mut data = vec![0.0; n];
    RandomStream::new(3).split(label).fill_normal(&mut data);
    data
}

fn tensor(data: &[f64], shape: &[usize], dtype: DType) -> Tensor {
    Tensor::from_slice(data, shape, &CPU)
        .unwrap()
        .to_dtype(dtype)
        .unwrap()
}

fn numbers(t: &Tensor) -> Vec<f64> {
    t.to_dtype(DType::F64)
        .unwrap()
        .flatten_all()
        .unwrap()
        .to_vec1()
        .unwrap()
}

fn var(data: &[f64], shape: &[usize], dtype: DType) -> Var {
    Var::from_tensor(&tensor(data, shape, dtype)).unwrap()
}

/// Rounds like storing in `dtype`.
fn rounded(x: f64, dtype: DType) -> f64 {
    match dtype {
        DType::F64 => x,
        DType::F32 => f64::from(x as f32),
        DType::BF16 => bf16::from_f32(x as f32).to_f64(),
        _ => f16::from_f32(x as f32).to_f64(),
    }
}

/// Two steps of [`Toy`], element by element, computed in `f32` unless the parameter is `f64`.
fn plain(p: f64, grads: &[f64], param: DType, state: DType) -> (f64, [f64; 2]) {
    let compute = if param == DType::F64 {
        DType::F64
    } else {
        DType::F32
    };
    let c = |x: f64| rounded(x, compute);
    let (mut p, mut m, mut v) = (p, 0.0, 0.0);
    for &g in grads {
        let new_m = c(c(0.5 * m) + g);
        p = rounded(c(p - c(0.25 * new_m)), param);
        v = rounded(c(v + c(g * g)), state);
        m = rounded(new_m, state);
    }
    (p, [m, v])
}

fn work<'a>(grad: &'a Tensor) -> Result<Option<Work<'a, Toy>>> {
    Ok(Some(Work {
        grad,
        rule: TOY,
        map: GradMap::default(),
    }))
}

#[test]
fn every_dtype_matches_the_plain_loop_bit_for_bit() {
    // Sizes on both sides of a vector, a tile and a task.
    let sizes = [1, 7, 1023, 1024, 40_000, 3];
    for (param, state) in [
        (DType::F32, StateDType::Compute),
        (DType::F32, StateDType::Fixed(DType::BF16)),
        (DType::F64, StateDType::Compute),
        (DType::BF16, StateDType::Compute),
        (DType::BF16, StateDType::Fixed(DType::BF16)),
        (DType::F16, StateDType::Compute),
        (DType::F16, StateDType::Fixed(DType::BF16)),
    ] {
        // What the tensors hold, after rounding to their dtype.
        let held = |n: usize, label: &str| numbers(&tensor(&values(n, label), &[n], param));
        let init: Vec<_> = sizes.iter().map(|n| held(*n, &format!("p{n}"))).collect();
        let vars: Vec<_> = init.iter().map(|d| var(d, &[d.len()], param)).collect();
        let named = vars
            .iter()
            .enumerate()
            .map(|(i, v)| (i.to_string(), v.clone()));
        let mut fused = FusedUpdate::<2>::new(named.collect(), state).unwrap();
        let steps: Vec<Vec<Vec<f64>>> = (0..2)
            .map(|t| {
                sizes
                    .iter()
                    .map(|n| held(*n, &format!("g{t}{n}")))
                    .collect()
            })
            .collect();
        for step in &steps {
            let grads: Vec<_> = step.iter().map(|g| tensor(g, &[g.len()], param)).collect();
            fused.step(true, |i| work(&grads[i])).unwrap();
            for (i, grad) in grads.iter().enumerate() {
                let negative = numbers(grad).iter().filter(|g| **g < 0.0).count();
                assert_eq!((fused.events(i), fused.held(i)), (negative as u64, 0));
            }
        }
        let state_dtype = fused.state(0, 0).unwrap().dtype();
        for (i, init) in init.iter().enumerate() {
            let got = [
                numbers(&vars[i]),
                numbers(&fused.state(i, 0).unwrap()),
                numbers(&fused.state(i, 1).unwrap()),
            ];
            for (j, p) in init.iter().enumerate() {
                let grads = [steps[0][i][j], steps[1][i][j]];
                let (p, [m, v]) = plain(*p, &grads, param, state_dtype);
                assert_eq!(
                    [got[0][j], got[1][j], got[2][j]],
                    [p, m, v],
                    "{param:?} {state:?} {i} {j}"
                );
            }
        }
    }
}

#[test]
fn the_device_text_computes_the_same_bits() {
    check_on_host(TOY).unwrap();
}

/// A rule without a device form, and one whose device form is wrong.
#[derive(Clone, Copy)]
struct Bad<const HAS_TEXT: bool>;

impl<const HAS_TEXT: bool> Rule<0, 0> for Bad<HAS_TEXT> {
    const NAME: &'static str = "bad";
    const DEVICE_BODY: Option<&'static str> = if HAS_TEXT { Some("p = p - g;") } else { None };

    fn scalars(&self) -> [f64; 0] {
        []
    }

    #[inline(always)]
    fn update<T: Real>(_: &[T; 0], param: T, grad: T, _: [T; 0]) -> Updated<T, 0> {
        Updated {
            param: param + grad,
            state: [],
            event: false,
        }
    }
}

#[test]
fn a_wrong_or_missing_device_text_is_noticed() {
    let error = check_on_host(Bad::<true>).unwrap_err().to_string();
    assert!(error.contains("differs"), "{error}");
    let error = check_on_host(Bad::<false>).unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
}

#[test]
fn threads_do_not_change_a_bit() {
    let sizes = [100_003, 5, 70_000, 1, 33_000];
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let vars: Vec<_> = sizes
                .iter()
                .map(|n| var(&values(*n, "p"), &[*n], DType::F32))
                .collect();
            let grads: Vec<_> = sizes
                .iter()
                .map(|n| tensor(&values(*n, "g"), &[*n], DType::F32))
                .collect();
            let named = vars
                .iter()
                .enumerate()
                .map(|(i, v)| (i.to_string(), v.clone()));
            let mut fused = FusedUpdate::<2>::new(named.collect(), StateDType::Compute).unwrap();
            fused.step(true, |i| work(&grads[i])).unwrap();
            let items: Vec<_> = vars
                .iter()
                .zip(&grads)
                .map(|(v, g)| (Some(v.as_tensor()), g, GradMap::default()))
                .collect();
            (
                vars.iter().map(|v| numbers(v)).collect::<Vec<_>>(),
                moments(&items).unwrap(),
            )
        })
    };
    let one = run(1);
    assert_eq!(one, run(2));
    assert_eq!(one, run(7));
}

#[test]
fn many_tensors_are_locked_in_batches() {
    let vars: Vec<_> = (0..700)
        .map(|i| var(&[f64::from(i)], &[1], DType::F32))
        .collect();
    let grad = tensor(&[4.0], &[1], DType::F32);
    let named = vars
        .iter()
        .enumerate()
        .map(|(i, v)| (i.to_string(), v.clone()));
    let mut fused = FusedUpdate::<2>::new(named.collect(), StateDType::Compute).unwrap();
    // Every third tensor has no gradient.
    fused
        .step(true, |i| if i % 3 == 0 { Ok(None) } else { work(&grad) })
        .unwrap();
    for (i, v) in vars.iter().enumerate() {
        let expected = if i % 3 == 0 { i as f64 } else { i as f64 - 1.0 };
        assert_eq!(numbers(v), [expected]);
    }
}

#[test]
fn masked_state_is_compact_and_leaves_the_rest_alone() {
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        let n = 40_001;
        let (init, grads) = (values(n, "p"), [values(n, "g0"), values(n, "g1")]);
        let flags: Vec<bool> = values(n, "mask").iter().map(|x| *x > 0.7).collect();
        let sparse = var(&init, &[n], dtype);
        let dense = var(&init, &[n], dtype);
        let mut a =
            FusedUpdate::<2>::new(vec![("a".into(), sparse.clone())], StateDType::Compute).unwrap();
        let mut b =
            FusedUpdate::<2>::new(vec![("b".into(), dense.clone())], StateDType::Compute).unwrap();
        let dense_bytes = a.state_bytes();
        a.set_mask(0, Some(Mask::from_bools(&flags).unwrap()))
            .unwrap();
        let count = flags.iter().filter(|f| **f).count();
        let density = count as f64 / n as f64;
        assert!((a.state_bytes() as f64) < density * dense_bytes as f64 + n as f64 / 8.0 * 1.05);
        for g in &grads {
            let g = tensor(g, &[n], dtype);
            a.step(true, |_| work(&g)).unwrap();
            b.step(true, |_| work(&g)).unwrap();
        }
        let (got, all, init) = (
            numbers(&sparse),
            numbers(&dense),
            numbers(&tensor(&init, &[n], dtype)),
        );
        let full = numbers(&b.state(0, 1).unwrap());
        let mut kept = vec![];
        for i in 0..n {
            assert_eq!(got[i], if flags[i] { all[i] } else { init[i] });
            if flags[i] {
                kept.push(full[i]);
            }
        }
        assert_eq!(numbers(&a.state(0, 1).unwrap()), kept);
        assert_eq!(a.state(0, 0).unwrap().dims(), [count]);
    }
}

#[test]
fn non_finite_gradients_are_held_or_propagated() {
    let init = [1.0, 2.0, 3.0, 4.0];
    let grad = tensor(&[f64::NAN, 1.0, f64::INFINITY, -1.0], &[4], DType::F32);
    let v = var(&init, &[4], DType::F32);
    let mut fused =
        FusedUpdate::<2>::new(vec![("v".into(), v.clone())], StateDType::Compute).unwrap();
    fused.step(true, |_| work(&grad)).unwrap();
    assert_eq!(numbers(&v), [1.0, 1.75, 3.0, 4.25]);
    assert_eq!(numbers(&fused.state(0, 0).unwrap()), [0.0, 1.0, 0.0, -1.0]);
    assert_eq!((fused.held(0), fused.events(0)), (2, 1));
    fused.step(false, |_| work(&grad)).unwrap();
    let after = numbers(&v);
    assert!(after[0].is_nan() && after[2] == f64::NEG_INFINITY);
    assert_eq!(fused.held(0), 0);
}

#[test]
fn strided_gradients_and_missing_ones() {
    let v = var(&values(6, "p"), &[2, 3], DType::F64);
    let before = numbers(&v);
    let grad = tensor(&values(6, "g"), &[3, 2], DType::F64).t().unwrap();
    assert!(!grad.is_contiguous());
    let mut fused =
        FusedUpdate::<2>::new(vec![("v".into(), v.clone())], StateDType::Compute).unwrap();
    fused.step(true, |_| Ok(None::<Work<'_, Toy>>)).unwrap();
    assert_eq!(numbers(&v), before);
    fused.step(true, |_| work(&grad)).unwrap();
    let expected: Vec<f64> = before
        .iter()
        .zip(numbers(&grad))
        .map(|(p, g)| p - 0.25 * g)
        .collect();
    assert_eq!(numbers(&v), expected);
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let v = var(&[1.0, 2.0], &[2], DType::F32);
    let w = var(&[3.0], &[1], DType::F32);
    let named = vec![("v".to_string(), v.clone()), ("w".to_string(), w.clone())];
    let mut fused = FusedUpdate::<2>::new(named, StateDType::Compute).unwrap();
    let good = tensor(&[1.0, 1.0], &[2], DType::F32);
    for bad in [
        tensor(&[1.0, 1.0], &[2], DType::F32),
        tensor(&[1.0], &[1], DType::F64),
    ] {
        let error = fused
            .step(true, |i| work(if i == 0 { &good } else { &bad }))
            .unwrap_err();
        assert!(error.to_string().contains("gradient of `w`"), "{error}");
    }
    let error = fused
        .step(true, |i| work(if i == 0 { &good } else { w.as_tensor() }))
        .unwrap_err();
    assert!(matches!(error, Error::SharedStorage { .. }), "{error}");
    let nan = GradMap {
        scale: f64::NAN,
        ..GradMap::default()
    };
    let error = fused.step(true, |i| {
        Ok((i == 0).then_some(Work {
            grad: &good,
            rule: TOY,
            map: nan,
        }))
    });
    assert!(matches!(error.unwrap_err(), Error::InvalidArgument { .. }));
    assert_eq!((numbers(&v), numbers(&w)), (vec![1.0, 2.0], vec![3.0]));

    let twice = vec![("a".to_string(), v.clone()), ("b".to_string(), v.clone())];
    let error = FusedUpdate::<2>::new(twice, StateDType::Compute).unwrap_err();
    assert_eq!(
        error.to_string(),
        "parameters `a` and `b` share their storage; pass tied weights once"
    );
    let integer = Var::from_tensor(&Tensor::new(&[1u32], &CPU).unwrap()).unwrap();
    let error =
        FusedUpdate::<1>::new(vec![("i".into(), integer)], StateDType::Compute).unwrap_err();
    assert!(matches!(error, Error::DTypeMismatch { .. }));
    let error = FusedUpdate::<1>::new(vec![("v".into(), v.clone())], StateDType::Fixed(DType::F16));
    assert!(matches!(error.unwrap_err(), Error::DTypeMismatch { .. }));
    assert!(fused
        .set_mask(0, Some(Mask::from_bools(&[true]).unwrap()))
        .is_err());
    assert!(fused.sample_state(0, 2, 1).is_err());
    assert!(fused.sample_state(0, 0, 0).is_err());
    assert!(fused.load_state(0, 0, &w).is_err());
    assert!(fused.state(0, 2).is_err());
    assert!(Mask::from_indices(3, &[3]).is_err());
}

#[test]
fn an_empty_tensor_is_no_trouble() {
    let v = var(&[], &[0], DType::F32);
    let mut fused =
        FusedUpdate::<2>::new(vec![("v".into(), v.clone())], StateDType::Compute).unwrap();
    let grad = tensor(&[], &[0], DType::F32);
    fused.step(true, |_| work(&grad)).unwrap();
    assert_eq!(sum_squares(&v).unwrap(), 0.0);
    assert!(moments(&[]).unwrap().is_empty());
    let mut none = FusedUpdate::<2>::new(vec![], StateDType::Compute).unwrap();
    none.step(true, |_| Ok(None::<Work<'_, Toy>>)).unwrap();
}

#[test]
fn flat_and_separate_parameters_take_the_same_step() {
    let shapes: Vec<Vec<usize>> = vec![vec![300, 7], vec![5], vec![40_000]];
    let layout = Arc::new(FlatLayout::new(
        shapes
            .iter()
            .enumerate()
            .map(|(i, s)| (i.to_string(), s.clone())),
    ));
    let data = |label: &str| -> Vec<Tensor> {
        shapes
            .iter()
            .enumerate()
            .map(|(i, s)| {
                tensor(
                    &values(s.iter().product(), &format!("{label}{i}")),
                    s,
                    DType::F32,
                )
            })
            .collect()
    };
    let (params, grads) = (data("p"), data("g"));
    let vars: Vec<_> = params
        .iter()
        .map(|p| Var::from_tensor(p).unwrap())
        .collect();
    let named = || {
        vars.iter()
            .enumerate()
            .map(|(i, v)| (i.to_string(), v.clone()))
            .collect()
    };
    let mut separate = FusedUpdate::<2>::new(named(), StateDType::Compute).unwrap();
    let mut together = FusedUpdate::<2>::new(named(), StateDType::Compute).unwrap();
    let mut flat = FlatTensor::from_tensors(layout.clone(), &params).unwrap();
    let flat_grads = FlatTensor::from_tensors(layout, &grads).unwrap();
    for _ in 0..3 {
        together
            .step_flat(&mut flat, &flat_grads, true, |_| {
                Ok(Some((TOY, GradMap::default())))
            })
            .unwrap();
        separate.step(true, |i| work(&grads[i])).unwrap();
    }
    for (i, v) in vars.iter().enumerate() {
        assert_eq!(numbers(&flat.get(i, &CPU).unwrap()), numbers(v));
        assert_eq!(
            numbers(&together.state(i, 1).unwrap()),
            numbers(&separate.state(i, 1).unwrap())
        );
    }
    let other = Arc::new(FlatLayout::new([("0".to_string(), vec![3])]));
    let mut wrong = FlatTensor::zeros(other.clone(), DType::F32).unwrap();
    let wrong_grads = FlatTensor::zeros(other, DType::F32).unwrap();
    assert!(together
        .step_flat(&mut wrong, &wrong_grads, true, |_| Ok(Some((
            TOY,
            GradMap::default()
        ))))
        .is_err());
}

#[test]
fn state_survives_export_and_import() {
    let v = var(&values(50, "p"), &[50], DType::F32);
    let w = Var::from_tensor(&v.as_tensor().copy().unwrap()).unwrap();
    let grads: Vec<_> = (0..4)
        .map(|t| tensor(&values(50, &format!("g{t}")), &[50], DType::F32))
        .collect();
    let mut a = FusedUpdate::<2>::new(vec![("v".into(), v.clone())], StateDType::Compute).unwrap();
    for g in &grads[..2] {
        a.step(true, |_| work(g)).unwrap();
    }
    let mut b = FusedUpdate::<2>::new(vec![("w".into(), w.clone())], StateDType::Compute).unwrap();
    w.set(&v).unwrap();
    for slot in 0..2 {
        b.load_state(0, slot, &a.state(0, slot).unwrap()).unwrap();
        let all = numbers(&a.state(0, slot).unwrap());
        assert_eq!(a.sample_state(0, slot, 1).unwrap(), all);
        let every_seventh: Vec<f64> = all.into_iter().step_by(7).collect();
        assert_eq!(a.sample_state(0, slot, 7).unwrap(), every_seventh);
    }
    for g in &grads[2..] {
        a.step(true, |_| work(g)).unwrap();
        b.step(true, |_| work(g)).unwrap();
    }
    assert_eq!(numbers(&v), numbers(&w));
    b.zero_state().unwrap();
    assert_eq!(numbers(&b.state(0, 0).unwrap()), vec![0.0; 50]);
}

#[test]
fn moments_are_the_plain_sums_and_count_what_is_not_finite() {
    let (p, g) = (values(70_001, "p"), values(70_001, "g"));
    let map = GradMap {
        scale: 2.0,
        clip: 1.5,
        outer: -0.5,
        along: 0.25,
    };
    for dtype in [DType::F64, DType::F32, DType::BF16] {
        let (pt, gt) = (tensor(&p, &[p.len()], dtype), tensor(&g, &[g.len()], dtype));
        let got = moments(&[(Some(&pt), &gt, map)]).unwrap()[0];
        let (pn, gn) = (
            numbers(&pt),
            numbers(
                &map.apply(
                    &gt.to_dtype(DType::F64).unwrap(),
                    &pt.to_dtype(DType::F64).unwrap(),
                )
                .unwrap(),
            ),
        );
        let sum = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
        let tol = if dtype == DType::F64 { 1e-12 } else { 1e-6 } * p.len() as f64;
        for (got, want) in [
            (got.pp, sum(&pn, &pn)),
            (got.pg, sum(&pn, &gn)),
            (got.gg, sum(&gn, &gn)),
        ] {
            assert!((got - want).abs() <= tol, "{dtype:?} {got} {want}");
        }
    }
    let bad = tensor(&[1.0, f64::NAN, f64::NEG_INFINITY], &[3], DType::F32);
    assert_eq!(
        moments(&[(None, &bad, GradMap::default())]).unwrap()[0].nonfinite,
        2
    );
    assert_eq!(
        dot(
            &tensor(&[1.0, 2.0], &[2], DType::F64),
            &tensor(&[3.0, -1.0], &[2], DType::F64)
        )
        .unwrap(),
        1.0
    );
    assert!(dot(&bad, &tensor(&[1.0], &[1], DType::F32)).is_err());
    assert!(moments(&[(None, &bad, map)]).is_err());
    // A difference of large numbers keeps its digits: the sums run in f64.
    let big = tensor(&[1e8, 1.0, -1e8], &[3], DType::F32);
    let ones = tensor(&[1.0, 1.0, 1.0], &[3], DType::F32);
    assert_eq!(dot(&big, &ones).unwrap(), 1.0);
    assert_eq!(Moments::default().gg, 0.0);
}

/// Projecting out the parameter from a gradient that is nearly parallel to it leaves nothing along
/// the parameter, in spite of `f32`.
#[test]
fn a_projection_in_registers_is_as_sharp_as_single_precision_allows() {
    let n = 4096;
    let p = values(n, "p");
    for tilt in [1.0, 0.1, 0.01] {
        let g: Vec<f64> = p
            .iter()
            .zip(values(n, "g"))
            .map(|(p, e)| 3.0 * p + tilt * e)
            .collect();
        let (pt, gt) = (tensor(&p, &[n], DType::F32), tensor(&g, &[n], DType::F32));
        let sums = moments(&[(Some(&pt), &gt, GradMap::default())]).unwrap()[0];
        let c = sums.pg / sums.pp;
        let rescale = (sums.gg / (sums.gg - sums.pg * sums.pg / sums.pp)).sqrt();
        let map = GradMap::default().then_affine(1.0, c).then_scale(rescale);
        let projected = moments(&[(Some(&pt), &gt, map)]).unwrap()[0];
        let cosine = projected.pg / (projected.pp * projected.gg).sqrt();
        // The length is restored; along the parameter only the rounding of the entries is left.
        assert!((projected.gg / sums.gg - 1.0).abs() < 1e-5, "{tilt}");
        assert!(cosine.abs() < 2e-7, "{tilt}: {cosine:e}");
    }
}

proptest! {
    #![proptest_config(crate::few(200))]

    /// A composed map gives what its parts give one after the other, in registers and as tensors.
    #[test]
    fn maps_compose(ops in prop::collection::vec((0..3u8, -2.0..2.0f64, -2.0..2.0f64), 0..6), p in -3.0..3.0f64, g in -9.0..9.0f64) {
        let (mut map, mut value) = (GradMap::default(), g);
        for (kind, a, b) in ops {
            match kind {
                0 => { map = map.then_scale(a); value *= a; }
                1 => { map = map.then_affine(a, b); value = a * value - b * p; }
                _ => match map.then_clip(a.abs()) {
                    Some(next) => { map = next; value = value.clamp(-a.abs(), a.abs()); }
                    None => prop_assert!(map.along != 0.0),
                },
            }
        }
        let (pt, gt) = (tensor(&[p], &[1], DType::F64), tensor(&[g], &[1], DType::F64));
        let applied = numbers(&map.apply(&gt, &pt).unwrap())[0];
        prop_assert!((applied - value).abs() < 1e-9 * (1.0 + value.abs()), "{applied} {value}");
        let v = var(&[p], &[1], DType::F64);
        let mut fused = FusedUpdate::<2>::new(vec![("v".into(), v.clone())], StateDType::Compute).unwrap();
        fused.step(true, |_| Ok(Some(Work { grad: &gt, rule: TOY, map }))).unwrap();
        let m = numbers(&fused.state(0, 0).unwrap())[0];
        prop_assert!((m - value).abs() < 1e-9 * (1.0 + value.abs()), "{m} {value}");
    }

    #[test]
    fn masks_remember_their_flags(flags in prop::collection::vec(any::<bool>(), 0..3000)) {
        let mask = Mask::from_bools(&flags).unwrap();
        prop_assert_eq!(mask.to_bools(), flags.clone());
        prop_assert_eq!(mask.count(), flags.iter().filter(|f| **f).count());
        let indices: Vec<u32> = (0..flags.len() as u32).filter(|i| flags[*i as usize]).rev().collect();
        prop_assert_eq!(&Mask::from_indices(flags.len(), &indices).unwrap(), &mask);
        prop_assert_eq!(mask.overlap(&mask).unwrap(), mask.count());
        prop_assert!(!mask.get(flags.len()));
    }
}
