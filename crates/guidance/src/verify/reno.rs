//! The reference of noise optimization: whole runs with every optimizer of the file.

use crate::reno::{LrMode, Named, NoiseOptimizer, Reno, RenoConfig};
use crate::Result;
use candle_core::{Tensor, D};
use flows::verify::{bad, input, setting, setting_text};
use flows::Condition;
use tensor_core::verify::{Reference, Tolerance};

/// Checks noise, losses and the best sample of every case.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn reno(reference: &mut Reference) -> Result<()> {
    let (w, b) = (input(reference, "W")?, input(reference, "b")?);
    let (target, direction) = (input(reference, "target")?, input(reference, "direction")?);
    let start = input(reference, "z0")?;
    let generator = |z: &Tensor, _: &Condition| {
        let flat = z.flatten_from(1)?;
        Ok(flat.matmul(&w.t()?)?.broadcast_add(&b)?.tanh()?)
    };
    let near = Named::new("near", |x: &Tensor, _: &Condition| {
        Ok(x.broadcast_sub(&target)?.sqr()?.mean(D::Minus1)?)
    });
    let along = Named::new("along", |x: &Tensor, _: &Condition| {
        let size = x.sqr()?.sum(D::Minus1)?.sqrt()?;
        let length = direction.sqr()?.sum_all()?.sqrt()?;
        let inner = x.broadcast_mul(&direction)?.sum(D::Minus1)?;
        Ok((inner / size)?.broadcast_div(&length)?.affine(-1.0, 1.0)?)
    });
    for case in reference.cases("_latents") {
        let number = |key: &str| setting(reference, &case, key);
        let optimizer = match setting_text(reference, &case, "optim")?.as_str() {
            "sgd" => NoiseOptimizer::Sgd {
                momentum: 0.9,
                nesterov: matches!(
                    setting_text(reference, &case, "nesterov")?.as_str(),
                    "True" | "true" | "1"
                ),
            },
            "adam" => NoiseOptimizer::Adam { eps: 1e-2 },
            other => return Err(bad(reference, format!("optimizer `{other}`")).into()),
        };
        let config = RenoConfig {
            iters: number("iters")? as usize,
            lr: number("lr")?,
            lr_mode: LrMode::Absolute,
            optimizer,
            grad_clip: number("clip")?,
            reg_weight: number("reg")?,
            ..RenoConfig::default()
        };
        let weights = (number("wa")?, number("wb")?);
        let reno = Reno::new(
            &generator,
            vec![(weights.0, &near), (weights.1, &along)],
            config.clone(),
        )?;
        one(reference, &case, &reno, &config, &start)?;
    }
    Ok(())
}

fn one(
    reference: &mut Reference,
    case: &str,
    reno: &Reno,
    config: &RenoConfig,
    start: &Tensor,
) -> Result<()> {
    // The file's norm went through single precision.
    let tolerance = match config.reg_weight == 0.0 {
        true => Tolerance::Mixed(1e-10),
        false => Tolerance::Mixed(2e-6),
    };
    let name = |part: &str| format!("{case}_{part}");
    let mut run = reno.start(start, &Condition::Null)?;
    let mut latents = Vec::new();
    loop {
        let z = run.z().flatten_all()?;
        match run.step()? {
            Some(_) => latents.push(z),
            None => break,
        }
    }
    let out = run.finish()?;
    reference.compare_tensor(&name("latents"), &Tensor::stack(&latents, 0)?, tolerance)?;
    let losses: Vec<f64> = out.losses.iter().map(|l| l[0]).collect();
    reference.compare(&name("total_loss"), &losses, tolerance)?;
    let best = out.best_index[0];
    let exact = Tolerance::Mismatches(0);
    reference.compare(&name("best_index"), &[best as f64], exact)?;
    reference.compare_tensor(&name("best_latent"), &out.best_z.flatten_all()?, tolerance)?;
    let image = out.best_sample.flatten_all()?;
    reference.compare_tensor(&name("best_image"), &image, tolerance)?;
    let mut rewards: Vec<f64> = out.per_reward[best].iter().map(|l| l[0]).collect();
    // The authors' code takes the norm with the regularizer only.
    let norm = match config.reg_weight == 0.0 {
        true => 0.0,
        false => out.norms[best][0],
    };
    rewards.extend([losses[best], norm]);
    Ok(reference.compare(&name("best_rewards"), &rewards, tolerance)?)
}
