use super::*;

#[test]
fn a_zero_right_hand_side_is_solved_by_zero() {
    for dtype in [DType::F32, DType::F64] {
        let b = Tensor::zeros(4, dtype, &CPU).unwrap();
        let start = Tensor::ones(4, dtype, &CPU).unwrap();
        let cg =
            conjugate_gradient(|x| Ok(x.clone()), &b, Some(&start), &CgConfig::default()).unwrap();
        let series = neumann(|x| Ok(x.clone()), &b, &NeumannConfig::default()).unwrap();
        for solution in [cg, series] {
            assert!(solution.converged && solution.iterations == 0 && solution.residuals == [0.0]);
            assert_eq!(host(&solution.x), [0.0; 4]);
        }
    }
}

/// What every solver says to a vector and an operator, as one list.
fn all_solvers(v: &Tensor, apply: &dyn Fn(&Tensor) -> Result<Tensor>) -> Vec<Error> {
    let mut stream = RandomStream::new(1);
    vec![
        conjugate_gradient(apply, v, None, &CgConfig::default()).unwrap_err(),
        neumann(apply, v, &NeumannConfig::default()).unwrap_err(),
        picard(apply, v, &PicardConfig::default()).unwrap_err(),
        anderson(apply, v, &AndersonConfig::default()).unwrap_err(),
        power_iteration(apply, v, &PowerConfig::default(), &mut stream).unwrap_err(),
        lanczos(apply, v, &LanczosConfig::default(), &mut stream).unwrap_err(),
    ]
}

#[test]
fn vectors_and_operators_that_do_not_fit_are_refused() {
    let same = |x: &Tensor| Ok(x.clone());
    let good = normal(1, 4);
    let is = |errors: Vec<Error>, what: fn(&Error) -> bool| {
        assert!(errors.iter().all(what), "{errors:?}")
    };
    let empty = Tensor::zeros(0, DType::F64, &CPU).unwrap();
    is(all_solvers(&empty, &same), |e| {
        matches!(e, Error::InvalidArgument { .. })
    });
    for dtype in [DType::BF16, DType::U32] {
        let other = good.abs().unwrap().to_dtype(dtype).unwrap();
        is(all_solvers(&other, &same), |e| {
            matches!(e, Error::DTypeMismatch { .. })
        });
    }
    let shrinks = |x: &Tensor| Ok(x.narrow(0, 0, 2)?);
    is(all_solvers(&good, &shrinks), |e| {
        matches!(e, Error::ShapeMismatch { .. })
    });
    let narrows = |x: &Tensor| Ok(x.to_dtype(DType::F32)?);
    is(all_solvers(&good, &narrows), |e| {
        matches!(e, Error::DTypeMismatch { .. })
    });
    let fails = |_: &Tensor| Err(Error::UnknownDevice("mine".into()));
    is(all_solvers(&good, &fails), |e| {
        matches!(e, Error::UnknownDevice(_))
    });
    for bad in [f64::NAN, f64::INFINITY] {
        let v = vector(&[1.0, bad], DType::F64);
        // The eigenvalue solvers do not look at the values.
        let cg = conjugate_gradient(same, &v, None, &CgConfig::default());
        assert!(matches!(cg, Err(Error::InvalidArgument { name: "b", .. })));
        let start = conjugate_gradient(
            same,
            &vector(&[1.0, 1.0], DType::F64),
            Some(&v),
            &CgConfig::default(),
        );
        assert!(matches!(
            start,
            Err(Error::InvalidArgument { name: "start", .. })
        ));
        assert!(neumann(same, &v, &NeumannConfig::default()).is_err());
        assert!(picard(same, &v, &PicardConfig::default()).is_err());
    }
    let start = conjugate_gradient(same, &good, Some(&normal(1, 5)), &CgConfig::default());
    assert!(matches!(start, Err(Error::ShapeMismatch { .. })));
    let nan = conjugate_gradient(|x| Ok((x * f64::NAN)?), &good, None, &CgConfig::default());
    assert!(matches!(nan, Err(Error::Diverged { .. })));
}

#[test]
fn configurations_that_make_no_sense_are_refused_by_name() {
    fn named(result: Result<()>, expected: &str) {
        match result {
            Err(Error::InvalidArgument { name, .. }) => assert_eq!(name, expected),
            other => panic!("{expected}: {other:?}"),
        }
    }
    let (cg, series, power) = (
        CgConfig::default(),
        NeumannConfig::default(),
        PowerConfig::default(),
    );
    let (ends, plain, fast) = (
        LanczosConfig::default(),
        PicardConfig::default(),
        AndersonConfig::default(),
    );
    for bad in [-1.0, f64::NAN, f64::INFINITY] {
        named(
            CgConfig {
                tolerance: bad,
                ..cg
            }
            .validate(),
            "tolerance",
        );
        named(
            NeumannConfig {
                tolerance: bad,
                ..series
            }
            .validate(),
            "tolerance",
        );
        named(
            NeumannConfig {
                step: bad,
                ..series
            }
            .validate(),
            "step",
        );
        named(
            PowerConfig {
                tolerance: bad,
                ..power
            }
            .validate(),
            "tolerance",
        );
        named(
            LanczosConfig {
                tolerance: bad,
                ..ends
            }
            .validate(),
            "tolerance",
        );
        named(
            PicardConfig {
                tolerance: bad,
                ..plain
            }
            .validate(),
            "tolerance",
        );
        named(
            PicardConfig {
                mixing: bad,
                ..plain
            }
            .validate(),
            "mixing",
        );
        named(
            AndersonConfig {
                regularization: bad,
                ..fast
            }
            .validate(),
            "regularization",
        );
        named(
            AndersonConfig {
                mixing: bad,
                ..fast
            }
            .validate(),
            "mixing",
        );
    }
    named(
        CgConfig {
            max_iterations: 0,
            ..cg
        }
        .validate(),
        "max_iterations",
    );
    named(
        NeumannConfig {
            max_terms: 0,
            ..series
        }
        .validate(),
        "max_terms",
    );
    named(
        NeumannConfig {
            max_growth: 1.0,
            ..series
        }
        .validate(),
        "max_growth",
    );
    named(
        PowerConfig {
            max_iterations: 0,
            ..power
        }
        .validate(),
        "max_iterations",
    );
    named(
        LanczosConfig {
            max_iterations: 1,
            smallest: 2,
            ..ends
        }
        .validate(),
        "max_iterations",
    );
    named(
        LanczosConfig {
            smallest: 0,
            largest: 0,
            ..ends
        }
        .validate(),
        "smallest and largest",
    );
    named(
        PicardConfig {
            max_growth: f64::NAN,
            ..plain
        }
        .validate(),
        "max_growth",
    );
    named(
        PicardConfig {
            mixing: 0.0,
            ..plain
        }
        .validate(),
        "mixing",
    );
    // The solvers look at their configuration.
    let b = normal(1, 3);
    assert!(conjugate_gradient(
        |x| Ok(x.clone()),
        &b,
        None,
        &CgConfig {
            max_iterations: 0,
            ..cg
        }
    )
    .is_err());
    assert!(anderson(
        |x| Ok(x.clone()),
        &b,
        &AndersonConfig {
            mixing: 2.0,
            ..fast
        }
    )
    .is_err());
}

#[test]
fn results_carry_no_graph() {
    let scale = Var::new(&[2.0_f64, 3.0], &CPU).unwrap();
    let b = Var::new(&[1.0_f64, 1.0], &CPU).unwrap();
    let apply = |x: &Tensor| Ok((x * scale.as_tensor())?);
    let cg = conjugate_gradient(apply, &b, None, &CgConfig::default()).unwrap();
    let halve = |x: &Tensor| Ok((x / scale.as_tensor())?);
    let fixed = anderson(halve, &b, &AndersonConfig::default()).unwrap();
    let pair = power_iteration(
        apply,
        &b,
        &PowerConfig::default(),
        &mut RandomStream::new(1),
    )
    .unwrap()
    .pair;
    assert!(!cg.x.track_op() && !fixed.x.track_op() && !pair.vector.track_op());
}
