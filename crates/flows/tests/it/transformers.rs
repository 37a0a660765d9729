//! candle-transformers' denoisers in tiny configurations with seeded weights.

use crate::support::*;
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::flux;
use candle_transformers::models::mmdit::model::{Config as MmditConfig, MMDiT};
use candle_transformers::models::stable_diffusion::ddim::DDIMSchedulerConfig;
use candle_transformers::models::stable_diffusion::euler_ancestral_discrete::EulerAncestralDiscreteSchedulerConfig;
use candle_transformers::models::stable_diffusion::schedulers::{Scheduler, SchedulerConfig};
use candle_transformers::models::stable_diffusion::unet_2d::{
    BlockConfig, UNet2DConditionModel, UNet2DConditionModelConfig,
};
use candle_transformers::models::stable_diffusion::uni_pc::UniPCSchedulerConfig;
use flows::denoiser::grad_check;
use flows::schedule::{Beta, Ddpm};
use flows::transformers::*;
use flows::*;
use nn::init::SeededVars;

const F32: DType = DType::F32;

fn vars(seed: u64) -> SeededVars {
    SeededVars::new(&RandomStream::new(seed))
}

fn unet() -> UNet2DConditionModel {
    let block = |out_channels, use_cross_attn| BlockConfig {
        out_channels,
        use_cross_attn,
        attention_head_dim: 4,
    };
    let config = UNet2DConditionModelConfig {
        blocks: vec![block(32, Some(1)), block(64, None)],
        layers_per_block: 1,
        norm_num_groups: 8,
        cross_attention_dim: 6,
        ..UNet2DConditionModelConfig::default()
    };
    let vb = vars(1).builder(F32, &Device::Cpu);
    UNet2DConditionModel::new(vb, 4, 4, false, config).unwrap()
}

fn mmdit() -> MMDiT {
    let config = MmditConfig {
        patch_size: 2,
        in_channels: 4,
        out_channels: 4,
        depth: 2,
        head_size: 8,
        adm_in_channels: 6,
        pos_embed_max_size: 8,
        context_embed_size: 10,
        frequency_embedding_size: 16,
    };
    MMDiT::new(&config, false, vars(2).builder(DType::F16, &Device::Cpu)).unwrap()
}

fn flux_model(guidance_embed: bool) -> flux::model::Flux {
    let config = flux::model::Config {
        in_channels: 16,
        vec_in_dim: 6,
        context_in_dim: 10,
        hidden_size: 16,
        mlp_ratio: 2.0,
        num_heads: 2,
        depth: 1,
        depth_single_blocks: 1,
        axes_dim: vec![2, 2, 4],
        theta: 10_000,
        qkv_bias: true,
        guidance_embed,
    };
    flux::model::Flux::new(&config, vars(3).builder(F32, &Device::Cpu)).unwrap()
}

/// Latents, token embeddings, pooled embedding.
fn inputs(rows: usize, width: usize) -> [Tensor; 3] {
    [
        normal(5, &[rows, 4, 8, 8], F32),
        normal(6, &[rows, 5, width], F32),
        normal(7, &[rows, 6], F32),
    ]
}

/// candle's own loop: the scheduler on the raw prediction.
fn own_loop(
    unet: &UNet2DConditionModel,
    mut s: Box<dyn Scheduler>,
    x: &Tensor,
    text: &Tensor,
) -> Tensor {
    let mut x = x.clone();
    for t in s.timesteps().to_vec() {
        let input = s.scale_model_input(x.clone(), t).unwrap();
        let raw = unet.forward(&input, t as f64, text).unwrap();
        x = s.step(&raw, t, &x).unwrap();
    }
    x
}

#[test]
fn stable_diffusion_is_sampled_as_by_its_own_loop() {
    let unet = unet();
    let [x, text, _] = inputs(2, 6);
    let model = StableDiffusion::new(&unet, Prediction::Eps, F32);
    let condition = Condition::Embedding(text.clone());
    let schedule = Ddpm::new(Beta::STABLE_DIFFUSION, 1000).unwrap();
    let configs: [fn() -> Box<dyn SchedulerConfig>; 2] = [
        || Box::new(DDIMSchedulerConfig::default()),
        || Box::new(UniPCSchedulerConfig::default()),
    ];
    for config in configs {
        let wanted = own_loop(&unet, config().build(6).unwrap(), &x, &text);
        let stepper = CandleScheduler::new(config(), Prediction::Eps, 6).unwrap();
        let grid = stepper.grid(&schedule).unwrap();
        let mut sampler = Sampler::new(&model, grid).stepper(stepper);
        // Twice: no history is left from the first run.
        for _ in 0..2 {
            let noise = Noise::given(Vec::new());
            let found = sampler.sample_from(&x, &condition, None, noise).unwrap();
            assert!(
                distance(&found.x, &wanted) < 1e-3,
                "{}",
                distance(&found.x, &wanted)
            );
            assert_eq!(found.nfe.main, 12);
        }
    }
    // Our own DDIM on the same levels differs by what the last step ends at alone.
    let scheduler = DDIMSchedulerConfig::default();
    let ours = CandleScheduler::new(Box::new(scheduler), Prediction::Eps, 6).unwrap();
    let grid = ours.grid(&schedule).unwrap();
    let run = |stepper: Box<dyn Stepper>| {
        let mut sampler = Sampler::new(&model, grid.clone())
            .stepper(stepper)
            .record(true);
        let out = sampler.sample_from(&x, &condition, None, Noise::given(Vec::new()));
        out.unwrap().trace.unwrap().x
    };
    let (theirs, mine) = (run(Box::new(ours)), run(Box::<Ddim>::default()));
    for (a, b) in theirs.iter().zip(&mine).take(6) {
        assert!(distance(a, b) < 1e-3, "{}", distance(a, b));
    }
}

#[test]
fn a_level_per_row_is_that_row_alone() {
    let (unet, mmdit, flux) = (unet(), mmdit(), flux_model(true));
    let [x, text, _] = inputs(2, 6);
    let [_, context, pooled] = inputs(2, 10);
    let models: [(&dyn Denoiser, Condition); 3] = [
        (
            &StableDiffusion::new(&unet, Prediction::V, F32),
            Condition::Embedding(text),
        ),
        (
            &StableDiffusion3::new(&mmdit),
            text_condition(&context, &pooled),
        ),
        (
            &Flux::new(&flux, Some(3.5), F32),
            text_condition(&context, &pooled),
        ),
    ];
    let levels = [
        Level::new(0.6, 0.8, 300.0).unwrap(),
        Level::new(0.8, 0.6, 20.0).unwrap(),
    ];
    for (model, condition) in models {
        let all = model
            .raw(&x, &Levels::PerRow(levels.to_vec()), &condition)
            .unwrap();
        for (i, level) in levels.iter().enumerate() {
            let row = condition.take_rows(&[i as u32]).unwrap();
            let one = model
                .raw(&x.narrow(0, i, 1).unwrap(), &(*level).into(), &row)
                .unwrap();
            assert!(distance(&all.narrow(0, i, 1).unwrap(), &one) < 5e-3);
        }
        let wrong = model
            .raw(&x, &levels[0].into(), &Condition::Null)
            .unwrap_err();
        assert!(wrong.to_string().contains("condition"), "{wrong}");
    }
}

#[test]
fn flux_is_sampled_as_by_its_own_loop() {
    let model = flux_model(true);
    let [x, context, pooled] = inputs(1, 10);
    let state = flux::sampling::State::new(&context, &pooled, &x).unwrap();
    let times = flux::sampling::get_schedule(5, Some((16, 0.5, 1.15)));
    let wanted = flux::sampling::denoise(
        &model,
        &state.img,
        &state.img_ids,
        &state.txt,
        &state.txt_ids,
        &state.vec,
        &times,
        3.5,
    )
    .unwrap();
    // Their function takes the size in pixels, 8 per latent.
    let wanted = flux::sampling::unpack(&wanted, 64, 64).unwrap();
    let adaptor = Flux::new(&model, Some(3.5), F32);
    let grid = Grid::uniform_time(&flux_schedule(8, 8, false), 5).unwrap();
    let mut sampler = Sampler::new(&adaptor, grid).stepper(Ddim::default());
    let condition = text_condition(&context, &pooled);
    let found = sampler
        .sample(&x, &condition, None, &RandomStream::new(0))
        .unwrap();
    assert!(
        distance(&found.x, &wanted) < 1e-4,
        "{}",
        distance(&found.x, &wanted)
    );
    // The quiet model is told nothing; odd sizes cannot be packed.
    let schnell = flux_model(false);
    let grid = Grid::uniform_time(&flux_schedule(8, 8, true), 2).unwrap();
    let adaptor = Flux::new(&schnell, None, F32);
    let mut sampler = Sampler::new(&adaptor, grid).stepper(Ddim::default());
    assert!(sampler
        .sample(&x, &condition, None, &RandomStream::new(0))
        .is_ok());
    let odd = x.narrow(3, 0, 7).unwrap();
    let error = sampler
        .sample(&odd, &condition, None, &RandomStream::new(0))
        .unwrap_err();
    assert!(error.to_string().contains("even"), "{error}");
}

#[test]
fn stable_diffusion_3_is_eulers_method_on_its_velocity() {
    let mmdit = mmdit();
    let [x, context, pooled] = inputs(2, 10);
    let shifted = |s: f64| 3.0 * s / (1.0 + 2.0 * s);
    let mut wanted = x.clone();
    for i in 0..4 {
        let (s, next) = (
            shifted(1.0 - i as f64 / 4.0),
            shifted(0.75 - i as f64 / 4.0),
        );
        let t = Tensor::full(1000.0 * s as f32, 2, &Device::Cpu).unwrap();
        let half = |x: &Tensor| x.to_dtype(DType::F16).unwrap();
        let v = mmdit
            .forward(&half(&wanted), &t, &half(&pooled), &half(&context), None)
            .unwrap();
        let v = v.to_dtype(F32).unwrap();
        wanted = (wanted + (v * (next - s)).unwrap()).unwrap();
    }
    let model = StableDiffusion3::new(&mmdit);
    let grid = Grid::uniform_time(&stable_diffusion_3_schedule(), 4).unwrap();
    let mut sampler = Sampler::new(&model, grid).stepper(Ddim::default());
    let condition = text_condition(&context, &pooled);
    let found = sampler
        .sample(&x, &condition, None, &RandomStream::new(0))
        .unwrap();
    assert!(
        distance(&found.x, &wanted) < 2e-2,
        "{}",
        distance(&found.x, &wanted)
    );
    let weak = StableDiffusion3::new(&mmdit).without_layers(&[0]);
    let level = Levels::Same(Level::new(0.5, 0.5, 500.0).unwrap());
    let [full, less] = [&model, &weak].map(|m| m.raw(&x, &level, &condition).unwrap());
    assert!(distance(&full, &less) > 1e-6);
}

/// Half precision stays inside the network.
#[test]
fn the_network_runs_in_the_dtype_of_its_weights() {
    let mmdit = mmdit();
    let [x, context, pooled] = inputs(1, 10);
    let model = StableDiffusion3::new(&mmdit);
    let level = Levels::Same(Level::new(0.5, 0.5, 500.0).unwrap());
    let double = x.to_dtype(DType::F64).unwrap();
    let condition = text_condition(&context, &pooled);
    let out = model.raw(&double, &level, &condition).unwrap();
    assert_eq!(out.dtype(), DType::F64);
    assert!(distance(&out, &model.raw(&x, &level, &condition).unwrap()) < 1e-6);
}

/// Their attention drops gradients: that is an error, not a wrong image.
#[test]
fn differentiating_through_their_attention_is_refused() {
    let unet = unet();
    let [x, text, _] = inputs(1, 6);
    let model = StableDiffusion::new(&unet, Prediction::Eps, F32);
    let level = Levels::Same(Level::new(0.6, 0.8, 300.0).unwrap());
    let found = grad_check(
        &model,
        &x,
        &level,
        &Condition::Embedding(text),
        &mut RandomStream::new(1),
    );
    assert!(found.is_err());
}

#[test]
fn schedulers_of_other_scales_are_refused() {
    let euler = Box::new(EulerAncestralDiscreteSchedulerConfig::default());
    let error = CandleScheduler::new(euler, Prediction::Eps, 5)
        .err()
        .unwrap();
    assert!(error.to_string().contains("variance-preserving"), "{error}");
    // A grid of another length than the scheduler's.
    let unet = unet();
    let [x, text, _] = inputs(1, 6);
    let model = StableDiffusion::new(&unet, Prediction::Eps, F32);
    let schedule = Ddpm::new(Beta::STABLE_DIFFUSION, 1000).unwrap();
    let new = |steps| {
        CandleScheduler::new(
            Box::new(DDIMSchedulerConfig::default()),
            Prediction::Eps,
            steps,
        )
        .unwrap()
    };
    let mut sampler = Sampler::new(&model, new(3).grid(&schedule).unwrap()).stepper(new(4));
    let error = sampler.sample(&x, &Condition::Embedding(text), None, &RandomStream::new(0));
    assert!(error.unwrap_err().to_string().contains("steps of the grid"));
}
