//! Consensus-based optimization against gradient descent on rugged functions, its relaxation law,
//! and a classifier trained from loss values alone.

use super::pictures::Landscape;
use crate::scenario::{
    best, metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario,
    Setting, TrialContext, TrialOutcome,
};
use crate::scenarios::training::{digits, scalar};
use crate::statistics::quantile;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, Var, D};
use nn::loss::accuracy;
use optim::consensus::diagnostics::{effective_sample_size, implicit_step};
use optim::consensus::test_functions::{grand_canyon, rastrigin};
use optim::consensus::{
    weights, BatchUpdate, Batching, Cbo as Swarm, CboConfig, CboEnsemble, ConsensusHopping,
    Cooling, Diffusion, Langevin, Objective, Particles, PerParticle,
};
use tensor_core::random::RandomStream;

/// Independent runs on the canyon.
const RUNS: usize = 50;
/// Independent runs on Rastrigin's function.
const RASTRIGIN_RUNS: usize = 20;

pub(in crate::scenarios) struct Cbo;

impl Scenario for Cbo {
    fn definition(&self) -> Definition {
        Definition {
            slug: "cbo",
            title: "Consensus-based optimization",
            paper: Paper {
                title: "Gradient is All You Need?",
                venue: "2023",
                arxiv: "2306.09778",
            },
            krate: "optim",
            module: "consensus",
            tags: &["global", "derivative-free"],
            version: 1,
            summary: "A bent canyon with ripples and a barrier, 50 runs from (8, 8): consensus-based optimization and \
                      consensus hopping with 200 particles and 250 steps, gradient descent and annealed Langevin \
                      dynamics with 10,000 steps. Rastrigin's function in 4 dimensions, 20 runs of 100 particles and \
                      1000 steps, against gradient descent from every particle. The distance of a hop from an \
                      implicit gradient step, for 100 to 100,000 particles. A softmax layer on the digits (1380 for \
                      training, 417 for testing), 100 particles, 30 epochs, from loss values alone.",
            notes: "Both searches on the digits have the evaluations of CBO: the best of the one so far and nine others \
                    on each batch, drawn like CBO's particles, or around the best so far with the best of four step \
                    sizes. The local one beats CBO on this convex problem; the claim is against plain random search, \
                    which is the independent draws. With alpha = 1000 one particle takes all the weight and the \
                    relaxation law fails, as it must.",
            data: Data { embedded: "digits", real: None },
            arms: vec![
                Arm::new("canyon-gd", "gradient descent, canyon", Role::Baseline),
                Arm::new("canyon-langevin", "Langevin dynamics, canyon", Role::Baseline),
                Arm::new("canyon-cbo", "CBO, canyon", Role::Method),
                Arm::new("canyon-ch", "consensus hopping, canyon", Role::Method),
                Arm::new("rastrigin-gd", "gradient descent, Rastrigin", Role::Baseline)
                    .tuned("lr", &[0.001, 0.01, 0.1], "energy"),
                Arm::new("rastrigin-isotropic", "CBO isotropic, Rastrigin", Role::Method).fixed(&[("sigma", 0.7)]),
                Arm::new("rastrigin-anisotropic", "CBO anisotropic, Rastrigin", Role::Variant)
                    .fixed(&[("sigma", 1.264_911_064_067_351_8)]),
                Arm::new("relaxation", "distance from a gradient step", Role::Diagnostic),
                Arm::new("digits-random", "independent draws, digits", Role::Baseline),
                Arm::new("digits-local", "local random search, digits", Role::Baseline)
                    .tuned("step", &[0.03, 0.1, 0.3, 1.0], "accuracy"),
                Arm::new("digits-cbo", "CBO, digits", Role::Method),
            ],
            metrics: vec![
                Metric { name: "success", label: "fraction of runs at the minimum", better: Better::Higher },
                Metric { name: "energy", label: "median final energy", better: Better::Lower },
                Metric { name: "accuracy", label: "test accuracy", better: Better::Higher },
                Metric { name: "ratio_low", label: "smallest ratio of residuals, 10 times the particles", better: Better::Neither },
                Metric { name: "ratio_high", label: "largest ratio of residuals", better: Better::Neither },
                Metric { name: "collapsed", label: "residual at alpha = 1000, 100,000 particles", better: Better::Neither },
            ],
            claims: vec![
                Claim::every_seed("canyon", "CBO reaches the minimum in at least 0.9 of the runs",
                    metric("canyon-cbo", "success").at_least(0.9)),
                Claim::every_seed("canyon-energy", "CBO's median energy is at most 0.05",
                    metric("canyon-cbo", "energy").at_most(0.05)),
                Claim::every_seed("hopping", "consensus hopping reaches it in at least 0.85",
                    metric("canyon-ch", "success").at_least(0.85)),
                Claim::every_seed("descent", "gradient descent never does",
                    metric("canyon-gd", "success").at_most(0.0)),
                Claim::every_seed("langevin", "Langevin dynamics does in at most 0.7",
                    metric("canyon-langevin", "success").at_most(0.7)),
                Claim::mean("rastrigin", "isotropic CBO solves at least 0.6 of the Rastrigin runs",
                    metric("rastrigin-isotropic", "success").at_least(0.6)),
                Claim::every_seed("rastrigin-descent", "gradient descent from 100 starts solves none",
                    best("rastrigin-gd", "success").at_most(0.0)),
                Claim::every_seed("root-low", "ten times the particles bring at least 2.2 times less residual",
                    metric("relaxation", "ratio_low").at_least(2.2)),
                Claim::every_seed("root-high", "and at most 4.5 times less",
                    metric("relaxation", "ratio_high").at_most(4.5)),
                Claim::every_seed("digits", "the classifier reaches 0.78 without a gradient",
                    metric("digits-cbo", "accuracy").at_least(0.78)),
                Claim::mean("digits-search", "more than the best of as many independent draws",
                    metric("digits-cbo", "accuracy").above(metric("digits-random", "accuracy"))),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, setting: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        match arm.name {
            "canyon-cbo" => canyon_cbo(trial),
            "canyon-ch" => canyon_hopping(trial),
            "canyon-gd" => canyon_chains(trial, 0.0),
            "canyon-langevin" => canyon_chains(trial, 10.0),
            "rastrigin-gd" => rastrigin_descent(trial, setting.get("lr")?),
            "rastrigin-isotropic" => {
                rastrigin_cbo(trial, Diffusion::Isotropic, setting.get("sigma")?)
            }
            "rastrigin-anisotropic" => {
                rastrigin_cbo(trial, Diffusion::Anisotropic, setting.get("sigma")?)
            }
            "relaxation" => relaxation(trial),
            "digits-cbo" => digits_cbo(trial),
            "digits-local" => digits_search(trial, Some(setting.get("step")?)),
            _ => digits_search(trial, None),
        }
    }
}

fn pairs(points: &Tensor) -> Result<Vec<[f64; 2]>> {
    let rows = points.to_dtype(DType::F64)?.to_vec2::<f64>()?;
    Ok(rows.iter().map(|row| [row[0], row[1]]).collect())
}

/// Success and median energy of where the runs end.
fn judge(
    ends: &Tensor,
    objective: &PerParticle,
    success: impl Fn(&[f64], f64) -> bool,
) -> Result<TrialOutcome> {
    let energies = objective.values(ends)?.to_vec1::<f64>()?;
    let rows = ends.to_vec2::<f64>()?;
    let good = rows.iter().zip(&energies).filter(|(x, e)| success(x, **e));
    let fraction = good.count() as f64 / rows.len() as f64;
    Ok(TrialOutcome::default()
        .metric("success", fraction)
        .metric("energy", quantile(&energies, 0.5)))
}

fn near_origin(x: &[f64], _: f64) -> bool {
    x.iter().map(|x| x * x).sum::<f64>().sqrt() <= 0.5
}

fn landscape() -> (PerParticle, impl Fn(f64, f64) -> f64) {
    let objective = grand_canyon(true);
    let height = move |a: f64, b: f64| {
        let point = Tensor::new(&[[a, b]], &Device::Cpu);
        let value = point
            .map_err(optim::Error::from)
            .and_then(|p| objective.values(&p));
        let value = value.and_then(|v| Ok(v.to_vec1::<f64>()?));
        value.map_or(0.0, |v| v[0])
    };
    (grand_canyon(true), height)
}

fn canyon_cbo(trial: &TrialContext) -> Result<TrialOutcome> {
    let (objective, height) = landscape();
    let config = CboConfig {
        sigma: 1.6,
        alpha: 100.0,
        ..CboConfig::default()
    };
    let mut runs = Vec::with_capacity(RUNS);
    for i in 0..RUNS {
        let mut stream = trial.stream("cbo").split_index("run", i as u64);
        let start = stream.normal(8.0, 0.5, (200, 2), DType::F64, &Device::Cpu)?;
        runs.push(Swarm::new(&start, config.clone(), stream)?);
    }
    let mut ensemble = CboEnsemble::new(runs)?;
    let mut curve = Curve::new("median energy of the consensus", "step").log_y();
    let mut snapshots = Vec::new();
    for step in 0..250 {
        trial.step(step, 250)?;
        if step == 0 || step == 60 {
            snapshots.push(pairs(&ensemble.runs()[0].particles()?)?);
        }
        let reports = ensemble.step(&objective)?;
        let points: Vec<Tensor> = reports.iter().map(|r| r.consensus.clone()).collect();
        if step % 5 == 0 {
            let energies = objective.values(&Tensor::stack(&points, 0)?)?;
            curve.push(
                step as f64,
                quantile(&energies.to_vec1::<f64>()?, 0.5).max(1e-6),
            );
        }
    }
    let ends = ensemble.consensus(&objective)?;
    let clouds = [
        ("#d55e00", std::mem::take(&mut snapshots[0])),
        ("#e69f00", std::mem::take(&mut snapshots[1])),
        ("#56b4e9", pairs(&ensemble.runs()[0].particles()?)?),
    ];
    let map = Landscape {
        low: [-3.0, -4.0],
        high: [11.0, 11.0],
        height: &height,
    };
    let caption =
        "particles of one run at the start (red), after 60 steps (orange), at the end (blue)";
    Ok(judge(&ends, &objective, near_origin)?
        .curve(curve)
        .picture(map.draw(caption, &clouds)))
}

fn canyon_hopping(trial: &TrialContext) -> Result<TrialOutcome> {
    let (objective, height) = landscape();
    let hopping = ConsensusHopping::default();
    let start = Tensor::new(&[8f64, 8.0], &Device::Cpu)?;
    let (mut ends, mut path) = (Vec::new(), None);
    for i in 0..RUNS {
        trial.step(i, RUNS)?;
        let mut stream = trial.stream("hopping").split_index("run", i as u64);
        let found = hopping.run(&objective, &start, 250, &mut stream)?;
        path.get_or_insert(found.trajectory);
        ends.push(found.consensus);
    }
    let outcome = judge(&Tensor::stack(&ends, 0)?, &objective, near_origin)?;
    let Some(path) = path else {
        return Err(Error::Trial("no run".into()));
    };
    let map = Landscape {
        low: [-3.0, -4.0],
        high: [11.0, 11.0],
        height: &height,
    };
    let caption = "consensus points of one run of consensus hopping";
    Ok(outcome.picture(map.draw(caption, &[("#56b4e9", pairs(&path)?)])))
}

fn canyon_chains(trial: &TrialContext, sigma: f64) -> Result<TrialOutcome> {
    let objective = grand_canyon(true);
    let langevin = Langevin {
        sigma,
        ..Langevin::default()
    };
    let start = Tensor::new(&[[8f64, 8.0]], &Device::Cpu)?.repeat((RUNS, 1))?;
    trial.step(0, 1)?;
    let mut stream = trial.stream("langevin");
    let ends = langevin.run(&objective, &start, 10_000, &mut stream, |_, _| ())?;
    judge(&ends, &objective, near_origin)
}

/// Solved: no coordinate is in a wrong well (the next minimum is at about 0.96).
fn solved(_: &[f64], energy: f64) -> bool {
    energy < 0.8
}

fn rastrigin_start(trial: &TrialContext, i: usize) -> Result<(Tensor, RandomStream)> {
    let mut stream = trial.stream("rastrigin").split_index("run", i as u64);
    let start = stream.normal(4.0, 1.0, (100, 4), DType::F64, &Device::Cpu)?;
    Ok((start, stream))
}

fn rastrigin_cbo(trial: &TrialContext, diffusion: Diffusion, sigma: f64) -> Result<TrialOutcome> {
    let config = CboConfig {
        diffusion,
        sigma,
        alpha: 1000.0,
        ..CboConfig::default()
    };
    let mut runs = Vec::with_capacity(RASTRIGIN_RUNS);
    for i in 0..RASTRIGIN_RUNS {
        let (start, stream) = rastrigin_start(trial, i)?;
        runs.push(Swarm::new(&start, config.clone(), stream)?);
    }
    let mut ensemble = CboEnsemble::new(runs)?;
    let objective = rastrigin();
    for step in 0..1000 {
        trial.step(step, 1000)?;
        ensemble.step(&objective)?;
    }
    judge(&ensemble.consensus(&objective)?, &objective, solved)
}

/// The best of gradient descent from every particle of each run's cloud.
fn rastrigin_descent(trial: &TrialContext, lr: f64) -> Result<TrialOutcome> {
    let objective = rastrigin();
    let descent = Langevin {
        lr,
        dt: 1.0,
        sigma: 0.0,
        ..Langevin::default()
    };
    let mut ends = Vec::new();
    for i in 0..RASTRIGIN_RUNS {
        trial.step(i, RASTRIGIN_RUNS)?;
        let (start, mut stream) = rastrigin_start(trial, i)?;
        let end = descent.run(&objective, &start, 1000, &mut stream, |_, _| ())?;
        let lowest = objective.values(&end)?.argmin(0)?.to_scalar::<u32>()?;
        ends.push(end.get(lowest as usize)?);
    }
    judge(&Tensor::stack(&ends, 0)?, &objective, solved)
}

/// `sum a x^2 / 2 + cos(x) / 2`.
const CURVATURES: [f64; 4] = [1.0, 2.0, 0.5, 3.0];

fn smooth() -> PerParticle {
    PerParticle::new(|x| {
        let terms = x.iter().zip(CURVATURES);
        terms.map(|(x, a)| a * x * x / 2.0 + x.cos() / 2.0).sum()
    })
}

/// The mean distance of a hop from the implicit gradient step over 20 draws.
fn mean_residual(stream: &mut RandomStream, n: usize, alpha: f64) -> Result<(f64, f64)> {
    const TAU: f64 = 0.05;
    const DRAWS: usize = 20;
    let x = Tensor::new(&[1f64, -1.0, 2.0, 0.5], &Device::Cpu)?;
    let curvatures = Tensor::new(&CURVATURES, &Device::Cpu)?;
    let grad = |x: &Tensor| Ok(((x * &curvatures)? - (x.sin()? * 0.5)?)?);
    let implicit = implicit_step(grad, &x, TAU)?;
    let hopping = ConsensusHopping {
        alpha,
        sigma: (TAU / alpha).sqrt(),
        n,
        sigma_decay: None,
    };
    let (mut distance, mut effective) = (0.0, 0.0);
    for _ in 0..DRAWS {
        let found = hopping.run(&smooth(), &x, 0, stream)?;
        distance += scalar(&(found.consensus - &implicit)?.sqr()?.sum_all()?)?.sqrt();
        effective += found.effective[0];
    }
    Ok((distance / DRAWS as f64, effective / DRAWS as f64))
}

fn relaxation(trial: &TrialContext) -> Result<TrialOutcome> {
    let mut outcome = TrialOutcome::default();
    let (mut low, mut high) = (f64::INFINITY, 0.0_f64);
    let mut curves = [
        Curve::new(
            "distance from the implicit gradient step, alpha = 10",
            "particles",
        ),
        Curve::new(
            "distance from the implicit gradient step, alpha = 1000",
            "particles",
        ),
        Curve::new("effective particles, alpha = 10", "particles"),
    ]
    .map(|curve| curve.log_x().log_y());
    let (mut before, mut collapsed) = (None, 0.0);
    for (k, n) in [100, 1000, 10_000, 100_000].into_iter().enumerate() {
        trial.step(k, 4)?;
        let (distance, effective) = mean_residual(&mut trial.stream("relaxation"), n, 10.0)?;
        collapsed = mean_residual(&mut trial.stream("relaxation"), n, 1000.0)?.0;
        curves[0].push(n as f64, distance);
        curves[1].push(n as f64, collapsed);
        curves[2].push(n as f64, effective);
        if let Some(before) = before.replace(distance) {
            let ratio: f64 = before / distance;
            (low, high) = (low.min(ratio), high.max(ratio));
        }
    }
    for curve in curves {
        outcome = outcome.curve(curve);
    }
    Ok(outcome
        .metric("ratio_low", low)
        .metric("ratio_high", high)
        .metric("collapsed", collapsed))
}

/// A softmax layer on the digits, all particles' networks in one product.
struct Softmax {
    particles: Particles,
    train: datasets::Classification,
    test: datasets::Classification,
}

const EPOCHS: usize = 30;
const BATCH: usize = 60;

impl Softmax {
    fn new(trial: &TrialContext) -> Result<Self> {
        let mut parts = digits(trial, &[1380, 417])?.into_iter();
        let (Some(train), Some(test)) = (parts.next(), parts.next()) else {
            return Err(Error::Trial("the digits could not be split".into()));
        };
        let var = |shape: &[usize]| Var::zeros(shape, DType::F32, &trial.device);
        let params = vec![
            ("bias".to_string(), var(&[10])?),
            ("weight".to_string(), var(&[64, 10])?),
        ];
        Ok(Self {
            particles: Particles::new(params)?,
            train,
            test,
        })
    }

    /// Logits `[N, B, 10]`.
    fn logits(&self, particles: &Tensor, x: &Tensor) -> optim::Result<Tensor> {
        let parts = self.particles.unpack(particles)?;
        let n = particles.dim(0)?;
        let x = x.unsqueeze(0)?.repeat((n, 1, 1))?;
        let out = x.matmul(&parts[1].contiguous()?)?;
        Ok(out.broadcast_add(&parts[0].unsqueeze(1)?)?)
    }

    /// Mean cross entropy over 10, per particle.
    fn energies(&self, particles: &Tensor, x: &Tensor, y: &Tensor) -> optim::Result<Tensor> {
        let logits = self.logits(particles, x)?;
        let top = logits.max_keepdim(D::Minus1)?;
        let shifted = logits.broadcast_sub(&top)?;
        let log_sum = shifted.exp()?.sum(D::Minus1)?.log()?;
        let index = y.reshape((1, (), 1))?.repeat((particles.dim(0)?, 1, 1))?;
        let own = shifted.gather(&index.contiguous()?, 2)?.squeeze(2)?;
        Ok(((log_sum - own)?.mean(1)? / 10.0)?)
    }

    fn accuracy(&self, particle: &Tensor) -> Result<f64> {
        let logits = self.logits(&particle.unsqueeze(0)?, &self.test.inputs)?;
        Ok(accuracy(&logits.squeeze(0)?, &self.test.labels)?)
    }

    /// Calls `step` with every batch, and gives the curve of what `now` gives after each epoch.
    fn epochs(
        &self,
        trial: &TrialContext,
        mut step: impl FnMut(&Tensor, &Tensor) -> Result<()>,
        mut after: impl FnMut(usize) -> Result<f64>,
    ) -> Result<Curve> {
        let order = datasets::BatchConfig::shuffled(BATCH);
        let mut stream = trial.stream("batches");
        let mut batches = datasets::Batches::new(self.train.len(), order, &mut stream)?;
        let mut curve = Curve::new("test accuracy", "epoch");
        let per_epoch = self.train.len() / BATCH;
        for epoch in 0..EPOCHS {
            for _ in 0..per_epoch {
                let (x, y) = batches.draw(&self.train)?;
                step(&x, &y)?;
            }
            trial.step(epoch + 1, EPOCHS)?;
            curve.push((epoch + 1) as f64, after(epoch)?);
        }
        Ok(curve)
    }
}

/// The energies of a batch.
struct OnBatch<'a>(&'a Softmax, &'a Tensor, &'a Tensor);

impl Objective for OnBatch<'_> {
    fn values(&self, particles: &Tensor) -> optim::Result<Tensor> {
        self.0.energies(particles, self.1, self.2)
    }
}

fn digits_cbo(trial: &TrialContext) -> Result<TrialOutcome> {
    let net = Softmax::new(trial)?;
    let start = net
        .particles
        .draw(100, 1.0, &mut trial.stream("particles"))?;
    let config = CboConfig {
        sigma: 0.4f64.sqrt(),
        alpha: 50.0,
        dt: 0.1,
        diffusion: Diffusion::Anisotropic,
        batching: Some(Batching {
            particles: 10,
            update: BatchUpdate::Full,
        }),
        stall_kick: Some(1e-5),
        cooling: Some(Cooling::default()),
        ..CboConfig::default()
    };
    let swarm = std::cell::RefCell::new(Swarm::new(&start, config, trial.stream("noise"))?);
    let last = std::cell::RefCell::new(start.get(0)?);
    let step = |x: &Tensor, y: &Tensor| {
        let report = swarm.borrow_mut().step(&OnBatch(&net, x, y))?;
        *last.borrow_mut() = report.consensus;
        Ok(())
    };
    let after = |_| {
        swarm.borrow_mut().end_epoch()?;
        net.accuracy(&last.borrow())
    };
    let curve = net.epochs(trial, step, after)?;
    // The consensus of all particles on the training data.
    let objective = OnBatch(&net, &net.train.inputs, &net.train.labels);
    let consensus = swarm.borrow_mut().consensus(&objective)?;
    let particles = swarm.borrow().particles()?;
    let energies = objective
        .values(&particles)?
        .to_dtype(DType::F64)?
        .to_vec1()?;
    let alpha = swarm.borrow().temperature().1;
    tracing::debug!(
        effective = effective_sample_size(&weights(&energies, alpha)?)?,
        "particles of the last consensus"
    );
    Ok(TrialOutcome::default()
        .metric("accuracy", net.accuracy(&consensus)?)
        .curve(curve))
}

/// The best so far against nine candidates on the same batch: around it at this distance, or drawn
/// like particles.
fn digits_search(trial: &TrialContext, size: Option<f64>) -> Result<TrialOutcome> {
    let net = Softmax::new(trial)?;
    let mut stream = trial.stream("candidates");
    let start = net.particles.draw(1, 1.0, &mut trial.stream("particles"))?;
    let best = std::cell::RefCell::new(start);
    let step = |x: &Tensor, y: &Tensor| {
        // As many evaluations as ten batches of ten particles.
        for _ in 0..10 {
            let current = best.borrow().clone();
            let moved = net.particles.draw(9, size.unwrap_or(1.0), &mut stream)?;
            let moved = match size {
                Some(_) => moved.broadcast_add(&current)?,
                None => moved,
            };
            let candidates = Tensor::cat(&[&current, &moved], 0)?;
            let lowest = net
                .energies(&candidates, x, y)?
                .argmin(0)?
                .to_scalar::<u32>()?;
            *best.borrow_mut() = candidates.narrow(0, lowest as usize, 1)?;
        }
        Ok(())
    };
    let curve = net.epochs(trial, step, |_| net.accuracy(&best.borrow().squeeze(0)?))?;
    let accuracy = net.accuracy(&best.borrow().squeeze(0)?)?;
    Ok(TrialOutcome::default()
        .metric("accuracy", accuracy)
        .curve(curve))
}
