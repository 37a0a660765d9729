//! When NaN is looked for, and what is kept of a solve.

use crate::support::*;
use candle_core::{DType, Tensor};
use flows::adjoint::{AdjointSolver, GradientMode, RhoOde, States};
use flows::guidance::{Evaluator, Unguided};
use flows::ode::{FixedStep, Method, OdeSolver};
use flows::schedule::VpSde;
use flows::*;

/// A rule that gives NaN from step 3 on.
struct Broken;

impl Guidance for Broken {
    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> Result<Denoised> {
        let d = net.conditional()?;
        match cx.step >= 3 {
            true => Ok(d.with_x0((&d.x0 * f64::NAN)?)),
            false => Ok(d),
        }
    }
}

#[test]
fn the_step_and_the_rule_are_named_however_late_nan_is_found() {
    let model = mixture(DType::F64);
    let grid = Grid::uniform_lambda(&VpSde::default(), 8).unwrap();
    let noise = normal(1, &[4, 3], DType::F64);
    let (null, rng) = (Condition::Null, RandomStream::new(0));
    let checks = [
        FiniteCheck::Auto,
        FiniteCheck::Every(2),
        FiniteCheck::Every(5),
        FiniteCheck::AtEnd,
    ];
    for check in checks {
        let mut sampler = Sampler::new(&model, grid.clone())
            .guidance(Broken)
            .check(check);
        let error = sampler
            .sample(&noise, &null, None, &rng)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("Broken") && error.contains("step 3"),
            "{check:?}: {error}"
        );
        let mut sampler = Sampler::new(&model, grid.clone())
            .guidance(Unguided)
            .check(check);
        assert!(sampler.sample(&noise, &null, None, &rng).is_ok());
        let bad = |y: &Tensor, t: &Tensor| {
            let late = t.ge(0.4)?.to_dtype(y.dtype())?.unsqueeze(1)?;
            y.broadcast_div(&(late.neg()? + 1.0)?)
        };
        let solver = FixedStep {
            check,
            ..FixedStep::euler(10)
        };
        let error = solver
            .solve(&bad, &noise, 0.0, 1.0)
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("Euler") && error.contains("step 4"),
            "{check:?}: {error}"
        );
    }
    // An unfinished run can be asked.
    let mut sampler = Sampler::new(&model, grid.clone())
        .guidance(Broken)
        .check(FiniteCheck::AtEnd);
    let mut run = sampler.iter(&noise, &null, None, &rng).unwrap();
    assert!(run.by_ref().take(5).all(|event| event.is_ok()));
    assert!(run.check_now().unwrap_err().to_string().contains("step 3"));
    let mut sampler = Sampler::new(&model, grid).check(FiniteCheck::Every(0));
    assert!(sampler.sample(&noise, &null, None, &rng).is_err());
}

#[test]
fn what_a_solve_keeps_depends_on_the_mode() {
    let model = mixture(DType::F64);
    let schedule = VpSde::default();
    let grid = Grid::uniform_lambda_between(&schedule, 1.0, 0.05, 12).unwrap();
    let ode = RhoOde::new(&model, &schedule, &Condition::Null);
    let x = normal(3, &[2, 3], DType::F64);
    let solver = |mode| {
        AdjointSolver::new(grid.clone())
            .method(Method::Heun)
            .mode(mode)
    };
    let reconstructed = solver(GradientMode::Continuous(States::Reconstructed));
    let short = reconstructed.solve(&ode, &x).unwrap().tape;
    assert_eq!(short.states().len(), 1);
    let discrete = solver(GradientMode::Discrete);
    let long = discrete.solve(&ode, &x).unwrap();
    assert_eq!(long.tape.states().len(), 13);
    // The last state serves both; a whole gradient needs all of them.
    let a = reconstructed
        .pullback(&ode, &short, &long.x_end, &[])
        .unwrap();
    let b = reconstructed
        .pullback(&ode, &long.tape, &long.x_end, &[])
        .unwrap();
    assert_eq!(bits(&a.start), bits(&b.start));
    assert!(discrete.pullback(&ode, &short, &long.x_end, &[]).is_err());
    let offloaded = discrete.clone().offload(true);
    let kept = offloaded.solve(&ode, &x).unwrap();
    let c = offloaded
        .pullback(&ode, &kept.tape, &kept.x_end, &[])
        .unwrap();
    let d = discrete
        .pullback(&ode, &long.tape, &long.x_end, &[])
        .unwrap();
    assert_eq!(bits(&c.start), bits(&d.start));
}

#[test]
fn a_gradient_can_be_checked_by_differences() {
    let model = mixture(DType::F64);
    let schedule = VpSde::default();
    let ode = RhoOde::new(&model, &schedule, &Condition::Null);
    let x = normal(3, &[2, 3], DType::F64);
    let error = |mode| {
        let grid = Grid::uniform_lambda_between(&schedule, 1.0, 0.02, 10).unwrap();
        let solver = AdjointSolver::new(grid).mode(mode);
        let loss = |x: &Tensor| Ok(x.sqr()?.sum_all()?);
        solver
            .check_gradient(&ode, &x, loss, &mut RandomStream::new(5))
            .unwrap()
    };
    assert!(error(GradientMode::Discrete) < 1e-6);
    assert!(error(GradientMode::Continuous(States::Stored)) > 0.1);
}

/// Samples and steps are in single precision; the models see halves, and the result is one.
#[test]
fn half_precision_is_the_networks_alone() {
    let single = mixture(DType::F32);
    let seen = std::cell::RefCell::new(Vec::new());
    let half = |weight: f64| {
        let seen = &seen;
        let single = &single;
        Closure::new(
            Prediction::X0,
            move |x: &Tensor, l: &Levels, c: &Condition| {
                seen.borrow_mut().push(x.dtype());
                let d = single.denoise(&x.to_dtype(DType::F32)?, l, c)?;
                Ok((d.x0 * weight)?.to_dtype(x.dtype())?)
            },
        )
    };
    let (main, weak) = (half(1.0), half(0.9));
    let grid = Grid::uniform_lambda(&VpSde::default(), 12).unwrap();
    let rng = RandomStream::new(1);
    for dtype in [DType::F16, DType::BF16] {
        let noise = normal(2, &[4, 3], DType::F32).to_dtype(dtype).unwrap();
        let mut sampler = Sampler::new(&main, grid.clone())
            .weak(&weak)
            .stepper(DpmSolverPP2M::default());
        let out = sampler
            .sample(&noise, &Condition::Null, None, &rng)
            .unwrap();
        assert_eq!(out.x.dtype(), dtype);
        assert!(seen.take().iter().all(|d| *d == dtype));
        let wide = Sampler::new(&single, grid.clone())
            .stepper(DpmSolverPP2M::default())
            .sample(
                &noise.to_dtype(DType::F32).unwrap(),
                &Condition::Null,
                None,
                &rng,
            )
            .unwrap();
        let off = distance(&out.x.to_dtype(DType::F32).unwrap(), &wide.x);
        assert!(off < 0.05, "{off}");
        // In single precision a run is what it was.
        let mut run = sampler.iter(&noise, &Condition::Null, None, &rng).unwrap();
        assert_eq!(run.next().unwrap().unwrap().x.dtype(), DType::F32);
        seen.take();
    }
}
