//! Solvers, adjoints, likelihood.

use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use flows::adjoint::{AdjointSample, AdjointSolver, Form, GradientMode, RhoOde, States};
use flows::likelihood::{bits_per_dim, log_likelihood, Divergence};
use flows::ode::*;
use flows::schedule::VpSde;
use flows::velocity::{Conditioned, WithTimeScale};
use flows::*;

/// `y' = -y + sin t`, with its solution from `y(0) = 1`.
fn field(y: &Tensor, t: &Tensor) -> candle_core::Result<Tensor> {
    t.sin()?.unsqueeze(1)?.broadcast_sub(y)
}

fn exact(t: f64) -> f64 {
    1.5 * (-t).exp() + 0.5 * (t.sin() - t.cos())
}

fn one() -> Tensor {
    Tensor::ones((1, 1), DType::F64, &Device::Cpu).unwrap()
}

#[test]
fn fixed_steps_have_their_order() {
    let methods = [
        (Method::Euler, 1.0),
        (Method::Midpoint, 2.0),
        (Method::Heun, 2.0),
        (Method::Rk4, 4.0),
        (Method::Rk38, 4.0),
        (Method::AdamsBashforth(2), 2.0),
        (Method::AdamsBashforth(3), 3.0),
        (Method::AdamsBashforth(4), 4.0),
    ];
    for (method, order) in methods {
        let error = |n| {
            let end = FixedStep::new(method, n)
                .solve(&field, &one(), 0.0, 2.0)
                .unwrap();
            (values(&end.x)[0] - exact(2.0)).abs().ln()
        };
        let found = (error(40) - error(80)) / 2.0_f64.ln();
        assert!((found - order).abs() < 0.25, "{method:?}: {found}");
        // Uneven steps keep the order too.
        let uneven = |n: usize| {
            let times = (0..=n)
                .map(|i| 2.0 * (i as f64 / n as f64).powf(1.5))
                .collect();
            let solver = FixedStep {
                steps: Steps::At(times),
                ..FixedStep::new(method, n)
            };
            let end = solver.solve(&field, &one(), 0.0, 2.0).unwrap();
            (values(&end.x)[0] - exact(2.0)).abs().ln()
        };
        let found = (uneven(40) - uneven(80)) / 2.0_f64.ln();
        assert!(found > order - 0.4, "{method:?}: {found}");
    }
}

#[test]
fn adaptive_steps_meet_their_tolerance_in_both_norms_and_directions() {
    for norm in [ErrorNorm::Global, ErrorNorm::PerSample] {
        let solver = Rk45 {
            norm,
            ..Rk45::with_tolerance(1e-8)
        };
        let there = solver.solve(&field, &one(), 0.0, 2.0).unwrap();
        assert!((values(&there.x)[0] - exact(2.0)).abs() < 1e-6);
        assert_eq!(there.nfe, 2 + 6 * (there.accepted + there.rejected));
        let back = solver.solve(&field, &there.x, 2.0, 0.0).unwrap();
        assert!((values(&back.x)[0] - 1.0).abs() < 1e-6);
    }
    // Forward and back through a flow.
    let mixture = mixture(DType::F64);
    let x = normal(3, &[6, 3], DType::F64);
    let solver = Rk45::with_tolerance(1e-9);
    let end = solver.solve(&mixture, &x, 0.0, 1.0).unwrap().x;
    let start = solver.solve(&mixture, &end, 1.0, 0.0).unwrap().x;
    assert!(distance(&start, &x) < 1e-6);
}

/// With steps of its own a row does not feel its neighbors.
#[test]
fn rows_with_their_own_steps_are_independent() {
    let stiff = |y: &Tensor, _: &Tensor| y.sqr()?.neg();
    let rows = Tensor::new(&[[1.0_f64], [40.0], [3.0]], &Device::Cpu).unwrap();
    let solver = Rk45 {
        norm: ErrorNorm::PerSample,
        ..Rk45::default()
    };
    let all = values(&solver.solve(&stiff, &rows, 0.0, 1.0).unwrap().x);
    for (i, found) in all.iter().enumerate() {
        let one = rows.narrow(0, i, 1).unwrap();
        let alone = values(&solver.solve(&stiff, &one, 0.0, 1.0).unwrap().x)[0];
        assert_eq!(alone.to_bits(), found.to_bits());
    }
    let coupled = values(&Rk45::default().solve(&stiff, &rows, 0.0, 1.0).unwrap().x);
    assert!(coupled
        .iter()
        .zip(&all)
        .any(|(a, b)| a.to_bits() != b.to_bits()));
}

#[test]
fn solvers_refuse_what_cannot_be_solved() {
    let fails = |result: Result<Solution>, words: &str| {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    };
    let nan = |y: &Tensor, _: &Tensor| y * f64::NAN;
    fails(Rk45::default().solve(&nan, &one(), 0.0, 1.0), "Rk45");
    fails(FixedStep::euler(3).solve(&nan, &one(), 0.0, 1.0), "step 0");
    fails(
        FixedStep::euler(0).solve(&field, &one(), 0.0, 1.0),
        "at least 1",
    );
    let adams = FixedStep::new(Method::AdamsBashforth(5), 3);
    fails(adams.solve(&field, &one(), 0.0, 1.0), "AdamsBashforth");
    let wrong = |y: &Tensor, _: &Tensor| y.sum_keepdim(0);
    let two = Tensor::ones((2, 1), DType::F64, &Device::Cpu).unwrap();
    fails(
        FixedStep::euler(3).solve(&wrong, &two, 0.0, 1.0),
        "field's value",
    );
    let steps = FixedStep {
        steps: Steps::At(vec![0.0, 0.7, 0.4, 1.0]),
        ..FixedStep::euler(3)
    };
    fails(steps.solve(&field, &one(), 0.0, 1.0), "monotone");
    let blow_up = |y: &Tensor, _: &Tensor| y.sqr();
    fails(Rk45::default().solve(&blow_up, &one(), 0.0, 2.0), "stopped");
    let none = Tensor::zeros((0, 2), DType::F64, &Device::Cpu).unwrap();
    let empty = Rk45::default().solve(&field, &none, 0.0, 1.0).unwrap();
    assert_eq!((empty.nfe, empty.x.dims()), (0, &[0, 2][..]));
    let bad = Rk45 {
        atol: 0.0,
        ..Rk45::default()
    };
    fails(bad.solve(&field, &one(), 0.0, 1.0), "atol");
}

#[test]
fn wrappers_of_fields() {
    let mixture = mixture(DType::F64);
    let x = normal(3, &[2, 3], DType::F64);
    let t = Tensor::new(&[0.3_f64, 0.6], &Device::Cpu).unwrap();
    let class = Condition::classes(&[1, 2], &Device::Cpu).unwrap();
    let wanted = mixture.velocity(&x, &t, &class).unwrap();
    let fixed = Conditioned {
        velocity: &mixture,
        condition: class.clone(),
    };
    let found = fixed.velocity(&x, &t, &Condition::Null).unwrap();
    assert_eq!(bits(&found), bits(&wanted));
    assert!(fixed.velocity(&x, &t, &class).is_err());
    let slow = WithTimeScale {
        inner: |_: &Tensor, t: &Tensor| Ok(t.clone()),
        scale: 999.0,
    };
    let seen = slow.velocity(&x, &t, &Condition::Null).unwrap();
    assert!((values(&seen)[0] - 299.7).abs() < 1e-9);
}

/// Euler-Maruyama keeps the law of a Gaussian target.
#[test]
fn the_stochastic_sampler_keeps_the_marginals() {
    let (mean, std) = (1.5, 0.5);
    let means = Tensor::new(&[[mean]], &Device::Cpu).unwrap();
    let target = AnalyticMixture::new(&means, &[std * std], &[1.0]).unwrap();
    let rows = 8000;
    let x0 = normal(5, &[rows, 1], DType::F64);
    let sampler = EulerMaruyama {
        steps: 200,
        sigma: 1.0,
        source_std: 1.0,
    };
    let mut given = Noise::given(
        (0..200)
            .map(|i| normal(1000 + i, &[rows, 1], DType::F64))
            .collect(),
    );
    let out = sampler
        .sample(&target, &x0, &Condition::Null, &mut given)
        .unwrap();
    let x = values(&out.x);
    let m = x.iter().sum::<f64>() / rows as f64;
    let v = x.iter().map(|x| (x - m).powi(2)).sum::<f64>() / rows as f64;
    assert!((m - mean).abs() < 0.02, "{m}");
    assert!((v.sqrt() / std - 1.0).abs() < 0.03, "{v}");
}

#[test]
fn densities_of_a_flow_and_their_estimate() {
    let mixture = mixture(DType::F64);
    let x = normal(8, &[4, 3], DType::F64);
    let clean = Levels::Same(Level::new(1.0, 0.0, 1.0).unwrap());
    let data = mixture
        .posterior_mean(
            &x,
            &Levels::Same(Level::new(0.5, 0.5, 0.5).unwrap()),
            &Condition::Null,
            |_| 1.0,
            |_| 0.0,
        )
        .unwrap();
    let exact = mixture
        .log_density(&data, &clean, &Condition::Null)
        .unwrap();
    let solver = FixedStep::rk4(60);
    let mut rng = RandomStream::new(1);
    let by = |divergence, rng: &mut RandomStream| {
        log_likelihood(&mixture, &data, &Condition::Null, &solver, divergence, rng).unwrap()
    };
    let (flow, z) = by(Divergence::Exact, &mut rng);
    assert!(distance(&flow, &exact) < 1e-3);
    assert_eq!(z.dims(), data.dims());
    // Signs are exact for a field whose Jacobian is diagonal; here they are right in the mean.
    let (many, _) = by(Divergence::Hutchinson { probes: 400 }, &mut rng);
    assert!(distance(&many, &exact) < 0.5, "{}", distance(&many, &exact));
    assert!((bits_per_dim(-3.0 * std::f64::consts::LN_2, 3) - 8.0).abs() < 1e-12);
}

struct Setup {
    mixture: AnalyticMixture,
    schedule: VpSde,
    x: Tensor,
    target: Tensor,
}

fn setup() -> Setup {
    Setup {
        mixture: mixture(DType::F64),
        schedule: VpSde::default(),
        x: normal(21, &[4, 3], DType::F64),
        target: normal(22, &[4, 3], DType::F64),
    }
}

impl Setup {
    fn gradient(&self, method: Method, mode: GradientMode, steps: usize, form: Form) -> Tensor {
        let ode = RhoOde::new(&self.mixture, &self.schedule, &Condition::Null).form(form);
        let grid = Grid::uniform_lambda_between(&self.schedule, 1.0, 0.05, steps).unwrap();
        let solver = AdjointSolver::new(grid).method(method).mode(mode);
        let loss = |x: &Tensor| Ok((x - &self.target)?.sqr()?.sum_all()?);
        solver
            .value_and_grad(&ode, &self.x, &[], loss)
            .unwrap()
            .1
            .start
    }
}

fn relative(a: &Tensor, b: &Tensor) -> f64 {
    let norm = |x: &Tensor| values(x).iter().map(|v| v * v).sum::<f64>().sqrt();
    norm(&(a - b).unwrap()) / norm(b)
}

#[test]
fn the_discrete_adjoint_is_backpropagation() {
    let s = setup();
    for form in [Form::Noise, Form::Data] {
        for method in [
            Method::Euler,
            Method::Heun,
            Method::Rk4,
            Method::AdamsBashforth(3),
        ] {
            let full = GradientMode::Backprop { checkpoint: false };
            let wanted = s.gradient(method, full, 8, form);
            let steps = s.gradient(method, GradientMode::Discrete, 8, form);
            assert!(relative(&steps, &wanted) < 1e-10, "{method:?}");
            if !matches!(method, Method::AdamsBashforth(_)) {
                let stages = s.gradient(method, GradientMode::Symplectic, 8, form);
                assert!(relative(&stages, &wanted) < 1e-10, "{method:?}");
            }
        }
    }
}

#[test]
fn the_continuous_adjoint_converges_with_its_order() {
    let s = setup();
    let discrete = GradientMode::Discrete;
    let truth = s.gradient(Method::Rk4, discrete, 320, Form::Noise);
    let error = |method, mode, n| relative(&s.gradient(method, mode, n, Form::Noise), &truth);
    let stored = GradientMode::Continuous(States::Stored);
    let ratio = |method, mode| error(method, mode, 40) / error(method, mode, 80);
    assert!(ratio(Method::Heun, stored) >= 3.0);
    assert!(ratio(Method::Rk4, stored) >= 10.0);
    assert!(ratio(Method::Euler, GradientMode::Scaled) >= 1.6);
    // On coarse Euler steps the paper's adjoint is lost, the scaled and the discrete are not.
    let coarse = |mode| error(Method::Euler, mode, 10);
    assert!(coarse(stored) > 0.8, "{}", coarse(stored));
    assert!(coarse(GradientMode::Scaled) < 0.4 && coarse(discrete) < 0.4);
}

/// For Gaussian data the sample is a multiple of the noise, and so is the gradient.
#[test]
fn gradients_of_a_gaussian_have_a_closed_form() {
    let v = 0.3;
    let means = Tensor::zeros((1, 3), DType::F64, &Device::Cpu).unwrap();
    let model = AnalyticMixture::new(&means, &[v], &[1.0]).unwrap();
    let schedule = VpSde::default();
    let ode = RhoOde::new(&model, &schedule, &Condition::Null);
    let grid = Grid::uniform_lambda_between(&schedule, 1.0, 0.02, 200).unwrap();
    let spread = |l: &Level| l.alpha.powi(2) * v + l.sigma.powi(2);
    let kappa = (spread(&grid.levels()[200]) / spread(&grid.levels()[0])).sqrt();
    let solver = AdjointSolver::new(grid).method(Method::Rk4);
    let x = normal(1, &[2, 3], DType::F64);
    let forward = solver.solve(&ode, &x).unwrap();
    assert!(distance(&forward.x_end, &(&x * kappa).unwrap()) < 1e-6);
    let end = normal(2, &[2, 3], DType::F64);
    for mode in [
        GradientMode::Discrete,
        GradientMode::Continuous(States::Stored),
    ] {
        let solver = solver.clone().mode(mode);
        let pull = |g: &Tensor| solver.pullback(&ode, &forward.tape, g, &[]).unwrap().start;
        assert!(distance(&pull(&end), &(&end * kappa).unwrap()) < 1e-6);
        // Linear in the gradient at the end.
        let twice = pull(&(&end * -2.0).unwrap());
        assert!(distance(&twice, &(pull(&end) * -2.0).unwrap()) < 1e-12);
    }
}

/// Gradients of a weight and of a condition, against finite differences.
#[test]
fn variables_of_the_model_get_their_gradient() {
    let s = setup();
    let shift = Var::new(&[0.1_f64, -0.2, 0.3], &Device::Cpu).unwrap();
    let moved = Closure::new(Prediction::Eps, |x, levels, c| {
        let shift = levels.scale(shift.as_tensor(), |l| l.alpha)?;
        s.mixture
            .denoise(&x.broadcast_sub(&shift)?, levels, c)?
            .eps()
    });
    let ode = RhoOde::new(&moved, &s.schedule, &Condition::Null);
    let grid = Grid::uniform_lambda_between(&s.schedule, 1.0, 0.05, 12).unwrap();
    let solver = AdjointSolver::new(grid).method(Method::Midpoint);
    let loss = |x: &Tensor| Ok((x - &s.target)?.sqr()?.sum_all()?);
    let vars = [shift.clone()];
    let found = |mode| {
        let solver = solver.clone().mode(mode);
        values(
            &solver
                .value_and_grad(&ode, &s.x, &vars, loss)
                .unwrap()
                .1
                .vars[0],
        )
    };
    let at = |i: usize, h: f64| {
        let mut moved = vec![0.1, -0.2, 0.3];
        moved[i] += h;
        shift
            .set(&Tensor::new(moved, &Device::Cpu).unwrap())
            .unwrap();
        let end = solver.solve(&ode, &s.x).unwrap().x_end;
        values(&loss(&end).unwrap())[0]
    };
    let numeric: Vec<f64> = (0..3)
        .map(|i| (at(i, 1e-5) - at(i, -1e-5)) / 2e-5)
        .collect();
    at(0, 0.0);
    for mode in [
        GradientMode::Discrete,
        GradientMode::Symplectic,
        GradientMode::Backprop { checkpoint: false },
    ] {
        for (a, b) in found(mode).iter().zip(&numeric) {
            assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{mode:?}: {a} {b}");
        }
    }
    let other = Var::new(1.0_f64, &Device::Cpu).unwrap();
    let lost = solver
        .value_and_grad(&ode, &s.x, &[other], loss)
        .unwrap_err();
    assert!(lost.to_string().contains("vars[0]"), "{lost}");
}

#[test]
fn adjoints_refuse_what_they_cannot_do() {
    let s = setup();
    let ode = RhoOde::new(&s.mixture, &s.schedule, &Condition::Null);
    let grid = Grid::uniform_lambda_between(&s.schedule, 1.0, 0.05, 4).unwrap();
    let solver = AdjointSolver::new(grid.clone());
    let forward = solver.solve(&ode, &s.x).unwrap();
    let short = normal(1, &[2, 3], DType::F64);
    assert!(solver.pullback(&ode, &forward.tape, &short, &[]).is_err());
    let scaled = solver.clone().mode(GradientMode::Scaled);
    let data = ode.form(Form::Data);
    assert!(scaled.pullback(&data, &forward.tape, &s.x, &[]).is_err());
    let clean = Grid::with_clean_end(grid.levels().to_vec()).unwrap();
    assert!(AdjointSolver::new(clean).solve(&data, &s.x).is_err());
    let loss = |x: &Tensor| Ok(x.sqr()?);
    assert!(solver.value_and_grad(&ode, &s.x, &[], loss).is_err());
    let cut = Closure::new(Prediction::X0, |x, _, _| Ok(x.detach()));
    let ode = RhoOde::new(&cut, &s.schedule, &Condition::Null);
    let sum = |x: &Tensor| Ok(x.sum_all()?);
    // The state is passed on, so a gradient arrives; it is not the model's.
    let data = ode.form(Form::Data);
    let wrong = solver.value_and_grad(&data, &s.x, &[], sum);
    assert!(
        matches!(wrong, Err(Error::WrongGradient { .. })),
        "{wrong:?}"
    );
    let trusting = solver.clone().gradient_check(GradientCheck::off());
    assert!(trusting.value_and_grad(&data, &s.x, &[], sum).is_ok());
    // What was refused is refused again.
    assert!(solver.value_and_grad(&data, &s.x, &[], sum).is_err());
    let blind = |x: &Tensor| Ok(((x.detach().sqr()? * 5.0)? + x)?.sum_all()?);
    let ode = RhoOde::new(&s.mixture, &s.schedule, &Condition::Null);
    // Another loss of the same solver is not checked again, but for a fresh check.
    assert!(solver.value_and_grad(&ode, &s.x, &[], blind).is_ok());
    let anew = solver.clone().gradient_check(solver.gradient_check.fresh());
    let wrong = anew.value_and_grad(&ode, &s.x, &[], blind).unwrap_err();
    assert!(wrong.to_string().contains("the loss"), "{wrong}");
}

/// The check costs evaluations, of the first gradient alone, and changes no bit.
#[test]
fn a_gradient_is_checked_once() {
    let s = setup();
    let grid = Grid::uniform_lambda_between(&s.schedule, 1.0, 0.05, 4).unwrap();
    let calls = std::cell::Cell::new(0);
    let counted = Closure::new(Prediction::X0, |x: &Tensor, l: &Levels, c: &Condition| {
        calls.set(calls.get() + 1);
        Ok(s.mixture.denoise(x, l, c)?.x0)
    });
    let ode = RhoOde::new(&counted, &s.schedule, &Condition::Null);
    let loss = |x: &Tensor| Ok(x.sqr()?.sum_all()?);
    for method in [Method::Euler, Method::Heun, Method::AdamsBashforth(2)] {
        let cost = |solver: &AdjointSolver| {
            calls.set(0);
            let found = solver.value_and_grad(&ode, &s.x, &[], loss).unwrap();
            (calls.get(), bits(&found.1.start))
        };
        let checked = AdjointSolver::new(grid.clone()).method(method);
        let trusting = checked.clone().gradient_check(GradientCheck::off());
        let (first, again, plain) = (cost(&checked), cost(&checked), cost(&trusting));
        assert_eq!((&first.1, &again), (&plain.1, &plain));
        assert!(
            first.0 > plain.0 && first.0 <= plain.0 + 4,
            "{} {}",
            first.0,
            plain.0
        );
    }
}

/// In the middle of somebody's graph the sampler has the gradient of its pullback.
#[test]
fn a_sampler_is_an_operation_of_the_graph() {
    let s = setup();
    let grid = Grid::uniform_lambda_between(&s.schedule, 1.0, 0.05, 8).unwrap();
    let solver = AdjointSolver::new(grid).method(Method::Heun);
    let ode = RhoOde::new(&s.mixture, &s.schedule, &Condition::Null);
    let loss = |x: &Tensor| Ok((x - &s.target)?.sqr()?.sum_all()?);
    let (value, wanted) = solver.value_and_grad(&ode, &s.x, &[], loss).unwrap();
    let sampler = AdjointSample::new(
        solver,
        std::sync::Arc::new(s.mixture.clone()),
        std::sync::Arc::new(s.schedule),
    );
    // The start is itself a function of a variable.
    let half = Var::from_tensor(&(&s.x * 0.5).unwrap()).unwrap();
    let samples = sampler
        .apply(&(half.as_tensor() * 2.0).unwrap(), &Condition::Null)
        .unwrap();
    let end = loss(&samples).unwrap();
    assert!((values(&end)[0] - value).abs() < 1e-12);
    let grads = end.backward().unwrap();
    let found = grads.get(&half).unwrap();
    assert!(distance(found, &(wanted.start * 2.0).unwrap()) < 1e-12);
}
