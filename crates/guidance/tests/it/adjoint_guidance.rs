//! Tasks for gradients through a sampler.

use crate::support::*;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{AdamW, Optimizer, ParamsAdamW};
use flows::adjoint::{AdjointSolver, RhoOde};
use flows::ode::Method;
use flows::schedule::VpSde;
use flows::{
    Closure, Condition, Denoiser, Grid, Levels, Prediction, RandomStream, Sampler, Schedule,
};
use guidance::adjoint_guidance::*;
use guidance::Result;

fn solver() -> AdjointSolver {
    let grid = Grid::uniform_lambda_between(&VpSde::default(), 1.0, 0.02, 12).unwrap();
    AdjointSolver::new(grid).method(Method::Heun)
}

fn goal(x: &Tensor) -> Result<Tensor> {
    Ok((x - 0.4)?.sqr()?.sum(1)?)
}

fn total(losses: &[f64]) -> f64 {
    losses.iter().sum()
}

#[test]
fn noise_follows_the_loss_of_its_sample() {
    let (model, schedule, solver) = (mixture(DType::F64), VpSde::default(), solver());
    let ode = RhoOde::new(&model, &schedule, &Condition::Null);
    let noise = normal(1, &[5, 3], DType::F64);
    let search = NoiseOptimizer {
        lr: 0.1,
        iters: 25,
        ..NoiseOptimizer::new(&solver)
    };
    let down = search.minimize(&ode, &noise, goal).unwrap();
    assert_eq!(down.losses.len(), 26);
    assert!(total(&down.losses[25]) < 0.7 * total(&down.losses[0]));
    let again = values(&goal(&down.sample).unwrap());
    assert_eq!(down.losses[25], again);
    assert_eq!(
        bits(&solver.solve(&ode, &down.noise).unwrap().x_end),
        bits(&down.sample)
    );
    let bounded = NoiseOptimizer {
        bound: Bound::LInf(0.1),
        ..search.clone()
    };
    let up = bounded.maximize(&ode, &noise, goal).unwrap();
    assert!(total(&up.losses[25]) > total(&up.losses[0]));
    assert!(distance(&up.noise, &noise) <= 0.1 + 1e-12);
    let round = NoiseOptimizer {
        bound: Bound::Norm,
        ..search.clone()
    };
    let kept = round.minimize(&ode, &noise, goal).unwrap();
    let norms = |x: &Tensor| values(&x.sqr().unwrap().sum(1).unwrap());
    let pairs = norms(&kept.noise).into_iter().zip(norms(&noise));
    assert!(pairs.into_iter().all(|(a, b)| (a - b).abs() < 1e-9));
    // A row does not see the others.
    let one = search
        .minimize(&ode, &noise.narrow(0, 3, 1).unwrap(), goal)
        .unwrap();
    assert!(distance(&one.noise, &down.noise.narrow(0, 3, 1).unwrap()) < 1e-9);
}

/// A model whose mean is its condition.
fn conditioned(base: &flows::AnalyticMixture) -> impl Denoiser + '_ {
    Closure::new(
        Prediction::X0,
        move |x: &Tensor, levels: &Levels, c: &Condition| {
            let Condition::Embedding(e) = c else {
                return Err(flows::Error::other("no embedding"));
            };
            let shift = levels.scale(&e.broadcast_as(x.shape())?, |l| l.alpha)?;
            let moved = (x - shift)?;
            Ok(base
                .raw(&moved, levels, &Condition::Null)?
                .broadcast_add(e)?)
        },
    )
}

#[test]
fn a_condition_is_found_from_a_sample() {
    let base = mixture(DType::F64);
    let (model, schedule, solver) = (conditioned(&base), VpSde::default(), solver());
    let noise = normal(2, &[4, 3], DType::F64);
    let truth = normal(3, &[1, 3], DType::F64);
    let sample = |e: &Tensor| {
        let c = Condition::Embedding(e.broadcast_as((4, 3)).unwrap());
        solver
            .solve(&RhoOde::new(&model, &schedule, &c), &noise)
            .unwrap()
            .x_end
    };
    let target = sample(&truth);
    let e = Var::zeros((1, 3), DType::F64, &Device::Cpu).unwrap();
    let condition = Condition::Embedding(e.as_tensor().clone());
    let ode = RhoOde::new(&model, &schedule, &condition);
    let params = ParamsAdamW {
        lr: 0.1,
        weight_decay: 0.0,
        ..ParamsAdamW::default()
    };
    let mut optimizer = AdamW::new(vec![e.clone()], params).unwrap();
    let loss = |x: &Tensor| Ok((x - &target)?.sqr()?.sum(1)?);
    let tuner = Tuner {
        solver: &solver,
        iters: 60,
    };
    let losses = tuner
        .tune(&ode, &noise, std::slice::from_ref(&e), &mut optimizer, loss)
        .unwrap();
    assert!(
        losses[59] < 0.02 * losses[0],
        "{} {}",
        losses[0],
        losses[59]
    );
    assert!(distance(&e, &truth) < 0.2);
    // The noise itself is found in the same way.
    let wanted = Condition::Embedding(truth.clone());
    let ode_there = RhoOde::new(&model, &schedule, &wanted);
    let start = Var::from_tensor(&normal(9, &[4, 3], DType::F64)).unwrap();
    let params = ParamsAdamW {
        lr: 0.1,
        ..ParamsAdamW::default()
    };
    let mut over_noise = AdamW::new(vec![start.clone()], params).unwrap();
    let found = tuner
        .tune_noise(&ode_there, &start, &mut over_noise, loss)
        .unwrap();
    assert!(found[59] < 0.05 * found[0], "{} {}", found[0], found[59]);
    assert!(distance(&start, &normal(9, &[4, 3], DType::F64)) > 0.1);
    assert!(tuner.tune(&ode, &noise, &[], &mut optimizer, loss).is_err());
    let nan = |x: &Tensor| Ok((x.sum(1)? * f64::NAN)?);
    let error = tuner
        .tune(&ode, &noise, std::slice::from_ref(&e), &mut optimizer, nan)
        .unwrap_err();
    assert!(error.to_string().contains("Tuner"), "{error}");
}

#[test]
fn a_prediction_of_several_steps_guides() {
    let (model, schedule) = (mixture(DType::F64), VpSde::default());
    let grid = Grid::uniform_lambda_between(&schedule, 1.0, 0.02, 15).unwrap();
    let noise = normal(4, &[6, 3], DType::F64);
    let end = schedule.level(0.02).unwrap();
    let class = Condition::classes(&[1], &Device::Cpu).unwrap();
    let guided = || StepLength::Guidance {
        against: Condition::Null,
        w: 2.0,
    };
    let residual = |x: &Tensor| Ok((x - 0.4)?);
    let start = |length: StepLength| {
        SymplecticGuidance::new(&model, &schedule, (class.clone(), length), end, residual)
    };
    let run = |length: StepLength, scale: f64, inner_steps: usize, repeat: usize| {
        let mut hook = start(length);
        (hook.scale, hook.inner_steps, hook.repeat) = (scale, inner_steps, repeat);
        let mut sampler = Sampler::new(&model, grid.clone()).hook(hook);
        sampler.sample(&noise, &class, None, &RandomStream::new(0))
    };
    let off = |x: &Tensor| total(&values(&goal(x).unwrap()));
    let free = run(guided(), 0.0, 4, 1).unwrap().x;
    let plain = Sampler::new(&model, grid.clone())
        .sample(&noise, &class, None, &RandomStream::new(0))
        .unwrap()
        .x;
    assert_eq!(bits(&free), bits(&plain));
    for length in [guided(), StepLength::Noise] {
        for (steps, repeat) in [(1, 1), (4, 1), (4, 3)] {
            let led = run(length.clone(), 0.1, steps, repeat).unwrap().x;
            assert!(off(&led) < off(&free), "{length:?} {steps} {repeat}");
            let again = run(length.clone(), 0.1, steps, repeat).unwrap().x;
            assert_eq!(bits(&led), bits(&again));
        }
    }
    // Nothing is led away from where the two conditions are one.
    let same = StepLength::Guidance {
        against: class.clone(),
        w: 2.0,
    };
    assert_eq!(bits(&run(same, 0.1, 4, 1).unwrap().x), bits(&plain));
    for bad in [
        run(guided(), 0.1, 0, 1),
        run(guided(), 0.1, 4, 0),
        run(guided(), f64::NAN, 4, 1),
    ] {
        assert!(bad.unwrap_err().to_string().contains("SymplecticGuidance"));
    }
}

/// The correction of one step: `scale w |eps_c - eps_u|` long, along the gradient of the finished sample
/// of the data form's Euler steps.
#[test]
fn a_correction_has_the_length_of_guidance() {
    let (model, schedule) = (mixture(DType::F64), VpSde::default());
    let levels = [0.6, 0.5].map(|t| schedule.level(t).unwrap());
    let grid = Grid::custom(levels.to_vec()).unwrap();
    let (x, end) = (
        normal(4, &[5, 3], DType::F64),
        schedule.level(0.02).unwrap(),
    );
    let class = Condition::classes(&[2], &Device::Cpu).unwrap();
    let length = StepLength::Guidance {
        against: Condition::Null,
        w: 3.0,
    };
    let residual = |x: &Tensor| Ok((x - 0.4)?);
    let run = |hooked: bool| {
        let mut sampler = Sampler::new(&model, grid.clone());
        if hooked {
            let asked = (class.clone(), length.clone());
            sampler = sampler.hook(SymplecticGuidance::new(
                &model, &schedule, asked, end, residual,
            ));
        }
        let noise = flows::Noise::given(vec![]);
        sampler.sample_from(&x, &class, None, noise).unwrap().x
    };
    let moved = (run(false) - run(true)).unwrap();
    let eps = |c: &Condition| {
        let d = model.denoise(&x, &levels[0].into(), &c.for_rows(5).unwrap());
        d.unwrap().eps().unwrap()
    };
    let difference = (eps(&class) - eps(&Condition::Null)).unwrap();
    let squares = |x: &Tensor| values(&x.sqr().unwrap().sum(1).unwrap());
    for (moved, wanted) in squares(&moved).iter().zip(squares(&difference)) {
        assert!((moved.sqrt() - 0.6 * wanted.sqrt()).abs() < 1e-12);
    }
    // Four Euler steps of x / sigma over alpha / sigma by hand.
    let at = Var::from_tensor(&x).unwrap();
    let (from, to) = (levels[0].lambda(), end.lambda());
    let mut y = (at.as_tensor() / levels[0].sigma).unwrap();
    for i in 0..4 {
        let level = |i: usize| match i {
            0 => levels[0],
            4 => end,
            _ => schedule
                .at_lambda(from + (to - from) * i as f64 / 4.0)
                .unwrap(),
        };
        let (now, next) = (level(i), level(i + 1));
        let x = (&y * now.sigma).unwrap();
        let d = model.denoise(&x, &now.into(), &class.for_rows(5).unwrap());
        let h = next.alpha / next.sigma - now.alpha / now.sigma;
        y = (y + (d.unwrap().x0 * h).unwrap()).unwrap();
    }
    let last = ((y * end.sigma).unwrap() - 0.4).unwrap();
    let norms = last.sqr().unwrap().sum(1).unwrap().sqrt().unwrap();
    let grads = norms.sum_all().unwrap().backward().unwrap();
    let g = grads.get(&at).unwrap();
    let inner = values(&(&moved * g).unwrap().sum(1).unwrap());
    for ((inner, a), b) in inner.iter().zip(squares(&moved)).zip(squares(g)) {
        assert!(
            (inner / (a * b).sqrt() - 1.0).abs() < 1e-9,
            "{inner} {a} {b}"
        );
    }
}

#[test]
fn bad_input_is_named() {
    let (model, schedule, solver) = (mixture(DType::F64), VpSde::default(), solver());
    let ode = RhoOde::new(&model, &schedule, &Condition::Null);
    let noise = normal(1, &[2, 3], DType::F64);
    let new = || NoiseOptimizer::new(&solver);
    let fails =
        |search: NoiseOptimizer| search.minimize(&ode, &noise, goal).unwrap_err().to_string();
    assert!(fails(NoiseOptimizer { iters: 0, ..new() }).contains("iters"));
    assert!(fails(NoiseOptimizer { lr: 0.0, ..new() }).contains("lr"));
    assert!(fails(NoiseOptimizer {
        bound: Bound::LInf(-1.0),
        ..new()
    })
    .contains("LInf"));
    let scalar = |x: &Tensor| Ok(x.sum_all()?);
    assert!(new()
        .minimize(&ode, &noise, scalar)
        .unwrap_err()
        .to_string()
        .contains("the loss"));
}
