//! Training steps of GFlowNets, sampling, steering and fine-tuning of masked diffusion, design steps,
//! hypervolumes.

use super::{Case, Peer, Session};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use guidance::svdd::{PosteriorMeanValue, Svdd};
use nn::activation::Activation;
use nn::init::SeededVars;
use optim::{AdamW, AdamWConfig, ParamGroup};
use sequence_design::bidirectional::{
    Bidirectional, DesignConfig, EncoderConfig, Encoding, KmerTransformer, OfflineTable,
    RidgeConfig,
};
use sequence_design::gflownet::pareto::hypervolume;
use sequence_design::gflownet::{
    Environment, Exploration, GflowConfig, GflowTrainer, HyperGrid, Policy, PolicyConfig,
    RewardSignal,
};
use sequence_design::masked_diffusion::{
    CnnConfig, CnnDenoiser, DrakesConfig, DrakesTrainer, MaskedDiffusion, SampleConfig,
};
use sequence_design::svdd::{MaskedKernel, Tokens};
use serde_json::json;
use tensor_core::random::RandomStream;

const GROUP: &str = "sequence-design";
/// Letters of a sampled sequence.
const LENGTH: usize = 100;

pub(super) fn cases(session: &mut Session<'_>) -> Result<()> {
    if session.wants(GROUP, "op-gfn") {
        training(session)?;
        volume(session)?;
    }
    if session.wants(GROUP, "drakes") {
        sampling(session)?;
        fine_tuning(session)?;
    }
    if session.wants(GROUP, "svdd") {
        steering(session)?;
    }
    if session.wants(GROUP, "bib") {
        designing(session)?;
    }
    Ok(())
}

/// Ten training steps of trajectory balance on the grid with 4 dimensions of 8, against the same loop
/// in torch: torchgfn does not install beside the other packages, since it wants numpy below 2.
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
    let group = ParamGroup::named(vars.trainable(), AdamWConfig::adam(1e-3));
    let adam = AdamW::with_groups(vec![group])?;
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

/// A small convolutional denoiser with its variables, and the same one without.
fn models() -> Result<(SeededVars, [MaskedDiffusion<CnnDenoiser>; 2])> {
    let config = CnnConfig {
        hidden: 64,
        dilations: vec![1, 4],
        stacks: 2,
        time: false,
        ..CnnConfig::dna()
    };
    let vars = SeededVars::new(&RandomStream::new(0));
    let over = |vb| -> Result<MaskedDiffusion<CnnDenoiser>> {
        let net = CnnDenoiser::new(&config, vb, &RandomStream::new(0))?;
        Ok(MaskedDiffusion::new(net, 4, DType::F32, &Device::Cpu)?)
    };
    let trained = over(vars.builder(DType::F32, &Device::Cpu))?;
    let frozen = over(vars.frozen(DType::F32, &Device::Cpu)?)?;
    Ok((vars, [trained, frozen]))
}

/// Whole samples of a convolutional denoiser, against the plain loop over all steps.
fn sampling(session: &mut Session<'_>) -> Result<()> {
    const STEPS: usize = 64;
    let (_, [_, model]) = models()?;
    for (what, cache) in [("every step", false), ("changed rows", true)] {
        let config = SampleConfig {
            steps: STEPS,
            cache,
            ..SampleConfig::default()
        };
        let (model, rng) = (&model, RandomStream::new(3));
        session.measure(Case {
            slug: "drakes",
            operation: format!("16 samples of {LENGTH} letters, {STEPS} steps, network at {what}"),
            ours: "MaskedDiffusion::sample",
            call: Box::new(move || {
                std::hint::black_box(model.sample(16, LENGTH, None, &config, &rng)?.evaluations);
                Ok(())
            }),
            peer: Peer::Python("torch masked diffusion", json!({ "steps": STEPS })),
        })?;
    }
    Ok(())
}

/// One update of DRAKES.
fn fine_tuning(session: &mut Session<'_>) -> Result<()> {
    const STEPS: usize = 16;
    const SOFT: usize = 6;
    const BATCH: usize = 8;
    let (vars, [model, frozen]) = models()?;
    let shape = (1, LENGTH, 4);
    let weights = RandomStream::new(4).normal(0.0, 1.0, shape, DType::F32, &Device::Cpu)?;
    let reward = move |x: &Tensor| -> sequence_design::Result<Tensor> {
        Ok(x.broadcast_mul(&weights)?.sum(2)?.sum(1)?)
    };
    let config = DrakesConfig {
        steps_per_traj: STEPS,
        truncate_steps: SOFT,
        batch: BATCH,
        accumulate: 1,
        ..DrakesConfig::default()
    };
    let mut rng = RandomStream::new(5);
    session.measure(Case {
        slug: "drakes",
        operation: format!(
            "an update, {BATCH} trajectories of {STEPS} steps ({SOFT} relaxed), {LENGTH} letters"
        ),
        ours: "DrakesTrainer",
        call: Box::new(move || {
            // A trainer does not cross threads: each call makes its own.
            let over = |net| MaskedDiffusion::new(net, 4, DType::F32, &Device::Cpu);
            let pair = (over(&model.denoiser)?, over(&frozen.denoiser)?);
            let all = vars.trainable();
            let group = ParamGroup::named(all.clone(), AdamWConfig::adam(1e-4));
            let adam = AdamW::with_groups(vec![group])?;
            let config = config.clone();
            let mut trainer =
                DrakesTrainer::new(pair.0, pair.1, all, &reward, adam, config, LENGTH)?;
            trainer.step(&mut rng)?;
            Ok(())
        }),
        peer: Peer::Python(
            "torch DRAKES",
            json!({ "steps": STEPS, "soft": SOFT, "batch": BATCH }),
        ),
    })
}

/// Samples steered by posterior means.
fn steering(session: &mut Session<'_>) -> Result<()> {
    const STEPS: usize = 32;
    const CANDIDATES: usize = 5;
    const BATCH: usize = 8;
    let (_, [_, model]) = models()?;
    let weights = RandomStream::new(4).normal(0.0, 1.0, (LENGTH, 4), DType::F32, &Device::Cpu)?;
    let weights = weights.to_vec2::<f32>()?;
    let reward = move |x: &Tokens| -> guidance::Result<Tensor> {
        let one = |s: &Vec<u32>| -> f32 {
            let letters = s.iter().zip(&weights);
            letters.map(|(letter, w)| w[*letter as usize]).sum()
        };
        let rewards: Vec<f32> = x.sequences().iter().map(one).collect();
        Ok(Tensor::new(rewards, &Device::Cpu)?)
    };
    let rng = RandomStream::new(6);
    session.measure(Case {
        slug: "svdd",
        operation: format!(
            "{BATCH} samples of {LENGTH} letters, {STEPS} steps, {CANDIDATES} candidates"
        ),
        ours: "Svdd over MaskedKernel",
        call: Box::new(move || {
            let kernel = MaskedKernel::new(&model, LENGTH, STEPS)?;
            let value = PosteriorMeanValue::new(&kernel, &reward);
            let svdd = Svdd::new(&kernel, &value).duplicates(CANDIDATES);
            std::hint::black_box(svdd.sample(BATCH, &rng)?.reward_calls);
            Ok(())
        }),
        peer: Peer::Python(
            "torch SVDD",
            json!({ "steps": STEPS, "candidates": CANDIDATES, "batch": BATCH }),
        ),
    })
}

/// Steps of bidirectional design with a small transformer in f64.
fn designing(session: &mut Session<'_>) -> Result<()> {
    const STEPS: usize = 5;
    const STARTS: usize = 64;
    const ROWS: usize = 1000;
    let encoding = Encoding::Kmers { k: 3, alphabet: 4 };
    let config = EncoderConfig::small(encoding, 8);
    let mut rng = RandomStream::new(7);
    let vars = SeededVars::new(&rng);
    KmerTransformer::new(&config, vars.builder(DType::F64, &Device::Cpu))?;
    let model = KmerTransformer::new(&config, vars.frozen(DType::F64, &Device::Cpu)?)?;
    let mut sequences: Vec<Vec<u8>> = vec![];
    for _ in 0..ROWS {
        let code = rng.below(1 << 16)?;
        sequences.push((0..8).map(|i| (code >> (2 * i) & 3) as u8).collect());
    }
    let mut scores = vec![0.0; ROWS];
    rng.fill_normal(&mut scores);
    let phi = encoding.features_of(&model, &sequences)?;
    let table = OfflineTable::fit(&phi, &scores, RidgeConfig::default())?;
    let heads = table.bootstrap_heads(5, &mut rng)?;
    let config = DesignConfig {
        steps: STEPS,
        ..DesignConfig::default()
    };
    session.measure(Case {
        slug: "bib",
        operation: format!("{STEPS} steps of {STARTS} designs, adaptive gamma, 2 layers of 64"),
        ours: "Bidirectional",
        call: Box::new(move || {
            let designer = Bidirectional::new(
                &model,
                table.clone(),
                encoding,
                heads.clone(),
                config.clone(),
            )?;
            std::hint::black_box(designer.optimize(&sequences[..STARTS], &mut rng)?);
            Ok(())
        }),
        peer: Peer::Python(
            "torch BIB",
            json!({ "steps": STEPS, "starts": STARTS, "rows": ROWS }),
        ),
    })
}
