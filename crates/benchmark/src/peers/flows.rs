//! Solvers and adjoints on a closed-form field, the loop of a sampler around a denoiser that costs
//! nothing, a training step, an iteration of distillation.

use super::{Case, Peer, Session};
use crate::scenarios::flows::disback::{score_distill, settings, Net, STUDENT_SIGMA};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::ModuleT;
use flows::adjoint::{AdjointSolver, GradientMode, RhoOde, States};
use flows::distillation::{Batch, DenoiserGenerator};
use flows::grid::Spacing;
use flows::ode::{FixedStep, Method, OdeSolver, Rk45};
use flows::schedule::{Beta, Ddpm, VpSde};
use flows::train::{FlowLoss, TrainConfig, Trainer};
use flows::{
    AnalyticMixture, Closure, Condition, Ddim, Denoiser, DpmSolverPP2M, Grid, Levels, Prediction,
    Sampler, Stepper,
};
use nn::init::SeededVars;
use nn::models::{Activation, Mlp, MlpConfig, UNet, UNetConfig};
use optim::{AdamW, AdamWConfig};
use serde_json::{json, Value};
use tensor_core::random::RandomStream;

const GROUP: &str = "flows";
const COMPONENTS: usize = 10;
const VARIANCE: f64 = 0.09;

pub(super) fn cases(session: &mut Session<'_>) -> Result<()> {
    if session.wants(GROUP, "rectified-flow") {
        solves(session)?;
        training(session)?;
    }
    if session.wants(GROUP, "disback") {
        distillation(session)?;
    }
    if session.wants(GROUP, "adjoint-dpm") {
        gradients(session)?;
    }
    if session.wants(GROUP, "guidance-core") {
        loops(session)?;
        overhead(session)?;
    }
    Ok(())
}

fn normal(label: &str, shape: &[usize]) -> Result<Tensor> {
    let mut stream = RandomStream::new(0).split(label);
    Ok(stream.normal(0.0, 1.0, shape, DType::F32, &Device::Cpu)?)
}

/// A mixture and what the peer needs of it.
fn mixture(shape: &[usize]) -> Result<(AnalyticMixture, Value)> {
    let centers = normal("centers", &[COMPONENTS, shape[1]])?;
    let model = AnalyticMixture::new(&centers, &[VARIANCE; COMPONENTS], &[1.0; COMPONENTS])?;
    let spec = json!({
        "shape": shape, "variance": VARIANCE, "centers": centers.to_vec2::<f32>()?,
    });
    Ok((model, spec))
}

fn solves(session: &mut Session<'_>) -> Result<()> {
    let shape = [4096, 64];
    let steps = 50;
    let x = normal("start", &shape)?;
    let (model, mut spec) = mixture(&shape)?;
    spec["steps"] = json!(steps);
    let solvers: [(&str, &str, Box<dyn OdeSolver + Send + Sync>, &str); 3] = [
        (
            "adaptive solve to 1e-5",
            "Rk45",
            Box::new(Rk45::default()),
            "torchdiffeq dopri5",
        ),
        (
            "adaptive solve to 1e-5",
            "Rk45",
            Box::new(Rk45::default()),
            "scipy solve_ivp RK45",
        ),
        (
            "50 Euler steps",
            "FixedStep",
            Box::new(FixedStep::euler(steps)),
            "torchdiffeq euler",
        ),
    ];
    for (operation, ours, solver, peer) in solvers {
        session.measure(Case {
            slug: "rectified-flow",
            operation: format!("{operation} of a mixture's field {shape:?}"),
            ours,
            call: Box::new(|| {
                std::hint::black_box(solver.solve(&model, &x, 0.0, 1.0)?.nfe);
                Ok(())
            }),
            peer: Peer::Python(peer, spec.clone()),
        })?;
    }
    Ok(())
}

/// The gradient of a loss on the sample with respect to the noise, 20 midpoint steps.
fn gradients(session: &mut Session<'_>) -> Result<()> {
    let shape = [256, 64];
    let x = normal("start", &shape)?;
    let (model, mut spec) = mixture(&shape)?;
    let schedule = VpSde::default();
    let grid = Grid::uniform_lambda_between(&schedule, 1.0, 0.02, 20)?;
    spec["rho"] = json!(grid.levels().iter().map(|l| l.rho()).collect::<Vec<_>>());
    let condition = Condition::Null;
    let modes = [
        (
            "Continuous",
            GradientMode::Continuous(States::Stored),
            "torchdiffeq odeint_adjoint midpoint",
        ),
        (
            "Discrete",
            GradientMode::Discrete,
            "torch checkpoint of each step",
        ),
        (
            "Backprop",
            GradientMode::Backprop { checkpoint: false },
            "torch autograd through all steps",
        ),
    ];
    for (ours, mode, peer) in modes {
        let solver = AdjointSolver::new(grid.clone())
            .method(Method::Midpoint)
            .mode(mode);
        session.measure(Case {
            slug: "adjoint-dpm",
            operation: format!("gradient through 20 midpoint steps {shape:?}"),
            ours,
            call: Box::new(|| {
                let ode = RhoOde::new(&model, &schedule, &condition);
                solver.value_and_grad(&ode, &x, &[], |x| Ok(x.sqr()?.sum_all()?))?;
                Ok(())
            }),
            peer: Peer::Python(peer, spec.clone()),
        })?;
    }
    Ok(())
}

fn loops(session: &mut Session<'_>) -> Result<()> {
    type Make = fn() -> Box<dyn Stepper>;
    let steps = 50;
    let kinds: [(&str, Make, &str); 2] = [
        ("Ddim", || Box::new(Ddim::default()), "diffusers DDIM"),
        (
            "DpmSolverPP2M",
            || Box::new(DpmSolverPP2M::default()),
            "diffusers DPM-Solver++ 2M",
        ),
    ];
    for shape in [[1, 4, 64, 64], [8, 16, 128, 128]] {
        let x = normal("start", &shape)?;
        for (ours, make, peer) in kinds {
            let model = Closure::new(Prediction::Eps, |x: &Tensor, _: &Levels, _: &Condition| {
                Ok((x * 0.1)?)
            });
            session.measure(Case {
                slug: "guidance-core",
                operation: format!("50 steps around a multiplication {shape:?}"),
                ours,
                call: Box::new(|| {
                    let schedule = Ddpm::new(Beta::STABLE_DIFFUSION, 1000)?;
                    let grid = Grid::discrete(&schedule, Spacing::Leading { offset: 1 }, steps)?;
                    let mut sampler = Sampler::new(&model, grid).stepper(make());
                    sampler.sample(&x, &Condition::Null, None, &RandomStream::new(0))?;
                    Ok(())
                }),
                peer: Peer::Python(peer, json!({ "shape": shape, "steps": steps })),
            })?;
        }
    }
    Ok(())
}

/// How much of the sampler's time the network takes: the loop beside its evaluations alone.
fn overhead(session: &mut Session<'_>) -> Result<()> {
    const STEPS: usize = 10;
    let shape = [8, 1, 28, 28];
    let x = normal("start", &shape)?;
    let vars = SeededVars::new(&RandomStream::new(0).split("unet"));
    let net = UNet::new(
        &UNetConfig::default(),
        vars.builder(DType::F32, &Device::Cpu),
    )?;
    let evaluate = |x: &Tensor, levels: &Levels, _: &Condition| -> flows::Result<Tensor> {
        let times = levels.model_time(x.dims()[0], x.dtype(), x.device())?;
        Ok(net.forward(x, &times, None)?)
    };
    let model = Closure::new(Prediction::Eps, evaluate);
    let grid = Grid::uniform_lambda(&VpSde::default(), STEPS)?;
    let levels: Vec<Levels> = grid.levels()[..STEPS].iter().map(|l| (*l).into()).collect();
    session.measure(Case {
        slug: "guidance-core",
        operation: format!("{STEPS} steps around a UNet 32-64-128 {shape:?}"),
        ours: "Sampler with DpmSolverPP2M",
        call: Box::new(|| {
            let mut sampler = Sampler::new(&model, grid.clone()).stepper(DpmSolverPP2M::default());
            sampler.sample(&x, &Condition::Null, None, &RandomStream::new(0))?;
            Ok(())
        }),
        peer: Peer::Rust(
            "its evaluations alone",
            Box::new(|| {
                for level in &levels {
                    std::hint::black_box(model.raw(&x, level, &Condition::Null)?);
                }
                Ok(())
            }),
        ),
    })
}

fn training(session: &mut Session<'_>) -> Result<()> {
    for peer in ["torch flow training step", "flow_matching training step"] {
        let (rows, widths) = (256, vec![65, 256, 256, 256, 64]);
        let spec = json!({ "rows": rows, "widths": widths });
        let config = MlpConfig {
            widths,
            activation: Activation::Silu,
            ..MlpConfig::default()
        };
        let vars = SeededVars::new(&RandomStream::new(0).split("mlp"));
        let mlp = Mlp::new(&config, vars.builder(DType::F32, &Device::Cpu))?;
        let net =
            |x: &Tensor, t: &Tensor| mlp.forward_t(&Tensor::cat(&[x, &t.unsqueeze(1)?], 1)?, true);
        let adam = AdamWConfig {
            weight_decay: 0.0,
            ..AdamWConfig::default()
        };
        let all = vars.trainable().into_iter().map(|(_, v)| v).collect();
        let optimizer = <AdamW as candle_nn::Optimizer>::new(all, adam)?;
        let config = TrainConfig {
            lr: 1e-3,
            warmup: 0,
            ema_decay: 0.0,
            ..TrainConfig::default()
        };
        let mut trainer = Trainer::new(vars.trainable(), optimizer, config)?;
        let data = normal("data", &[rows, 64])?;
        let mut rng = RandomStream::new(1);
        session.measure(Case {
            slug: "rectified-flow",
            operation: format!("training step of a perceptron 65-256-256-256-64, batch {rows}"),
            ours: "FlowLoss and Trainer",
            call: Box::new(move || {
                let noise = rng.normal(0.0, 1.0, data.shape(), DType::F32, &Device::Cpu)?;
                let loss = FlowLoss::default().sample_and_loss(&net, &noise, &data, &mut rng)?;
                trainer.step(&loss)?;
                Ok(())
            }),
            peer: Peer::Python(peer, spec),
        })?;
    }
    Ok(())
}

/// An iteration of score distillation: a step of the student, one of the fake denoiser.
fn distillation(session: &mut Session<'_>) -> Result<()> {
    let (rows, d) = (128, 64);
    let shape = Tensor::zeros((1, d), DType::F32, &Device::Cpu)?;
    let net = |label: &str| Net::new(&RandomStream::new(0).split(label), &shape);
    let (student, fake, target) = (net("student")?, net("fake")?, net("target")?);
    let (config, levels) = settings();
    let spec = json!({
        "rows": rows, "d": d, "sigma_data": config.sigma_data, "student_sigma": STUDENT_SIGMA,
        "levels": levels.sigmas()?, "range": config.step_range(levels.n),
        "lr": [config.gen_lr, config.fake_lr], "clip": config.max_grad_norm,
    });
    let call = || {
        let generator = DenoiserGenerator::edm(student.denoiser()?, STUDENT_SIGMA)?;
        let (fake_denoiser, target_denoiser) = (fake.denoiser()?, target.denoiser()?);
        let base = score_distill(
            (&student, &generator),
            (&fake, &fake_denoiser),
            &target_denoiser,
        );
        let mut base = base?;
        let mut rng = RandomStream::new(1);
        for _ in 0..10 {
            let z = rng.normal(0.0, 1.0, (rows, d), DType::F32, &Device::Cpu)?;
            base.step(&Batch::new(&z), &mut rng)?;
        }
        Ok(())
    };
    session.measure(Case {
        slug: "disback",
        operation: format!(
            "10 iterations of matching, perceptrons 73-256-256-256-64, batch {rows}"
        ),
        ours: "ScoreDistill",
        call: Box::new(call),
        peer: Peer::Python("torch distribution matching", spec),
    })
}
