//! Guidance rules in a pipeline of candle-transformers: Stable Diffusion 3 with adaptive projected and
//! with adaptive guidance. The network is a tiny one with random weights, so that the example runs
//! anywhere; in a pipeline `vb` holds the published weights and the embeddings come from its text encoders.
//!
//! ```text
//! cargo run -p thalweg-guidance --features transformers --example pipelines
//! ```

#![allow(clippy::print_stdout)]

extern crate flows as thalweg_flows;

use candle_core::{DType, Device, Tensor};
use nn::init::SeededVars;
use thalweg_flows::transformers::candle_transformers::models::mmdit::model::{Config, MMDiT};
use thalweg_flows::transformers::{stable_diffusion_3_schedule, text_condition, StableDiffusion3};
use thalweg_flows::{Grid, RandomStream, Sampler};
use thalweg_guidance::{AdaptiveGuidance, Apg};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let config = Config {
        patch_size: 2,
        in_channels: 4,
        out_channels: 4,
        depth: 2,
        head_size: 16,
        adm_in_channels: 12,
        pos_embed_max_size: 16,
        context_embed_size: 20,
        frequency_embedding_size: 32,
    };
    let rng = RandomStream::new(1);
    let vars = SeededVars::new(&rng.split("weights"));
    let mmdit = MMDiT::new(&config, false, vars.builder(DType::F16, &Device::Cpu))?;
    let normal = |label: &str, shape: &[usize]| {
        let mut stream = rng.split(label);
        stream.normal(0.0, 1.0, shape, DType::F32, &Device::Cpu)
    };
    let prompt = text_condition(
        &normal("prompt", &[1, 7, 20])?,
        &normal("pooled", &[1, 12])?,
    );
    let empty = text_condition(
        &normal("empty", &[1, 7, 20])?,
        &normal("empty pooled", &[1, 12])?,
    );
    let noise = normal("noise", &[2, 4, 16, 16])?;

    // The three lines: the network as a denoiser, the levels, the loop with a rule.
    let model = StableDiffusion3::new(&mmdit);
    let grid = Grid::uniform_time(&stable_diffusion_3_schedule(), 12)?;
    let mut sampler =
        Sampler::new(&model, grid.clone()).guidance(Apg::new(7.0).norm_threshold_rms(0.06));
    let projected = sampler.sample(&noise, &prompt, Some(&empty), &rng)?;
    report(
        "adaptive projected guidance",
        &projected.x,
        projected.nfe.per_sample(2),
    )?;

    // Another rule is another line; what it recorded can be read afterwards.
    let mut rule = AdaptiveGuidance::new(5.0).threshold(0.999);
    let mut sampler = Sampler::new(&model, grid).guidance(&mut rule);
    let adaptive = sampler.sample(&noise, &prompt, Some(&empty), &rng)?;
    drop(sampler);
    report("adaptive guidance", &adaptive.x, adaptive.nfe.per_sample(2))?;
    let steps = rule.trace();
    let guided = steps.iter().filter(|s| s.active.contains(&true)).count();
    println!("guided in {guided} of {} steps", steps.len());
    Ok(())
}

fn report(name: &str, latents: &Tensor, evaluations: f64) -> candle_core::Result<()> {
    let rms = latents.sqr()?.mean_all()?.sqrt()?.to_scalar::<f32>()?;
    println!(
        "{name}: latents {:?} of size {rms:.2}, {evaluations} evaluations each",
        latents.dims()
    );
    Ok(())
}
