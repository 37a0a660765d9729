//! Training steps of GFlowNets, sampling steps of masked diffusion, hypervolumes.

use super::{Case, Peer, Session};
use anyhow::Result;
use candle_core::{DType, Device};
use nn::activation::Activation;
use nn::init::SeededVars;
use optim::{AdamW, AdamWConfig, ParamGroup};
use sequence_design::gflownet::pareto::hypervolume;
use sequence_design::gflownet::{
    Environment, Exploration, GflowConfig, GflowTrainer, HyperGrid, Policy, PolicyConfig,
    RewardSignal,
};
use sequence_design::masked_diffusion::{CnnConfig, CnnDenoiser, MaskedDiffusion, SampleConfig};
use serde_json::json;
use tensor_core::random::RandomStream;

const GROUP: &str = "sequence-design";

pub(super) fn cases(session: &mut Session<'_>) -> Result<()> {
    if session.wants(GROUP, "op-gfn") {
        training(session)?;
        volume(session)?;
    }
    if session.wants(GROUP, "drakes") {
        sampling(session)?;
    }
    Ok(())
}

/// Ten training steps of trajectory balance on the grid with 4 dimensions of 8.
fn training(session: &mut Session<'_>) -> Result<()> {
    const STEPS: usize = 10;
    const BATCH: usize = 16;
    let grid = HyperGrid::new(4, 8)?;
    let vars = SeededVars::new(&RandomStream::new(0));
    let config = PolicyConfig {
        hidden: vec![256, 256],
        activation: Activation::Relu,
        backward: true,
        ..PolicyConfig::default()
    };
    let vb = vars.builder(DType::F32, &Device::Cpu);
    let policy = Policy::new(grid.feature_width(), grid.actions(), &config, vb)?;
    let adam = AdamW::with_groups(vec![ParamGroup::named(
        vars.trainable(),
        AdamWConfig::adam(1e-3),
    )])?;
    let config = GflowConfig {
        signal: RewardSignal::scalar(1.0),
        batch: BATCH,
        exploration: Exploration::default(),
        ..GflowConfig::default()
    };
    let rewards = grid.clone();
    let score = move |states: &[Vec<u16>]| -> sequence_design::Result<Vec<Vec<f64>>> {
        Ok(states.iter().map(|s| vec![rewards.reward(s)]).collect())
    };
    let mut trainer = GflowTrainer::new(grid, policy, adam, config, score)?;
    let mut rng = RandomStream::new(1);
    session.measure(Case {
        slug: "op-gfn",
        operation: format!("{STEPS} steps of TB, HyperGrid(4, 8), {BATCH} trajectories"),
        ours: "GflowTrainer",
        call: Box::new(move || {
            for _ in 0..STEPS {
                trainer.step(&mut rng)?;
            }
            Ok(())
        }),
        peer: Peer::Python("torch GFlowNet", json!({ "steps": STEPS, "batch": BATCH })),
    })
}

/// The volume of a front of random points.
fn volume(session: &mut Session<'_>) -> Result<()> {
    for (n, d) in [(200, 3), (100, 4)] {
        let mut points = vec![0.0; n * d];
        RandomStream::new(2).fill_normal(&mut points);
        let on_sphere = |p: &[f64]| {
            let norm = p.iter().map(|x| x * x).sum::<f64>().sqrt();
            p.iter().map(|x| x.abs() / norm).collect()
        };
        let points: Vec<Vec<f64>> = points.chunks(d).map(on_sphere).collect();
        let reference = vec![0.0; d];
        let spec = json!({ "points": points });
        session.measure(Case {
            slug: "op-gfn",
            operation: format!("hypervolume of {n} points, {d} objectives"),
            ours: "hypervolume",
            call: Box::new(move || {
                std::hint::black_box(hypervolume(&points, &reference)?);
                Ok(())
            }),
            peer: Peer::Python("pymoo", spec),
        })?;
    }
    Ok(())
}

/// Whole samples of a convolutional denoiser, against the plain loop over all steps.
fn sampling(session: &mut Session<'_>) -> Result<()> {
    const STEPS: usize = 64;
    let config = CnnConfig {
        hidden: 64,
        dilations: vec![1, 4],
        stacks: 2,
        time: false,
        ..CnnConfig::dna()
    };
    let vars = SeededVars::new(&RandomStream::new(0));
    let net = CnnDenoiser::new(
        &config,
        vars.builder(DType::F32, &Device::Cpu),
        &RandomStream::new(0),
    )?;
    let model = MaskedDiffusion::new(net, 4, DType::F32, &Device::Cpu)?;
    for (what, cache) in [("every step", false), ("changed rows", true)] {
        let config = SampleConfig {
            steps: STEPS,
            cache,
            ..SampleConfig::default()
        };
        let (model, rng) = (&model, RandomStream::new(3));
        session.measure(Case {
            slug: "drakes",
            operation: format!("16 samples of 100 letters, {STEPS} steps, network at {what}"),
            ours: "MaskedDiffusion::sample",
            call: Box::new(move || {
                std::hint::black_box(model.sample(16, 100, None, &config, &rng)?.evaluations);
                Ok(())
            }),
            peer: Peer::Python("torch masked diffusion", json!({ "steps": STEPS })),
        })?;
    }
    Ok(())
}
