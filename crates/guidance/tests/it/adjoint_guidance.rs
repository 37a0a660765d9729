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
    let run = |scale: f64, steps: usize| {
        let mut hook =
            SymplecticGuidance::new(&model, &schedule, Condition::Null, end, |x: &Tensor| {
                Ok((x - 0.4)?)
            });
        hook.scale = scale;
        hook.inner_steps = steps;
        let mut sampler = Sampler::new(&model, grid.clone()).hook(hook);
        sampler.sample(&noise, &Condition::Null, None, &RandomStream::new(0))
    };
    let off = |x: &Tensor| total(&values(&goal(x).unwrap()));
    let free = run(0.0, 4).unwrap().x;
    let plain = Sampler::new(&model, grid.clone())
        .sample(&noise, &Condition::Null, None, &RandomStream::new(0))
        .unwrap()
        .x;
    assert_eq!(bits(&free), bits(&plain));
    for steps in [1, 4] {
        assert!(off(&run(0.1, steps).unwrap().x) < off(&free), "{steps}");
    }
    assert!(run(0.1, 0).is_err());
    assert!(run(f64::NAN, 4).is_err());
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
