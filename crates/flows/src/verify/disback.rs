//! The reference of score distillation: affine networks inside EDM's preconditioning.

use super::{bad, input, values};
use crate::condition::Condition;
use crate::denoiser::{Denoiser, EdmPrecond};
use crate::distillation::{
    discriminator_loss, fake_loss, generator_gan_loss, matching, Backtracker, GradWeight,
    KarrasSigmas, Path, WeightFn,
};
use crate::error::Result;
use crate::level::{mix, Level, Levels};
use candle_core::{Tensor, Var};
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-10);

/// Checks levels, the student's gradients, the fake denoiser's loss, the discriminator's and the
/// schedule of targets.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn disback(reference: &mut Reference) -> Result<()> {
    let karras = KarrasSigmas {
        n: reference.number("num_steps")?,
        min: reference.number("sigma_min")?,
        max: reference.number("sigma_max")?,
        rho: reference.number("rho")?,
    };
    reference.compare("karras_sigmas", &karras.sigmas()?, TOLERANCE)?;
    let levels = karras.levels()?;
    let sigma_data: f64 = reference.number("sigma_data")?;
    let x = input(reference, "x")?;
    let real = EdmPrecond::new(affine(reference, "real")?, sigma_data)?;
    let fake = EdmPrecond::new(affine(reference, "fake")?, sigma_data)?;
    student(reference, (&real, &fake), &x, &levels)?;
    let at = picked(reference, "fake_step", &levels)?;
    let noise = input(reference, "fake_noise")?;
    let loss = fake_loss(&fake, &x, &noise, &at, sigma_data, &Condition::Null)?;
    reference.compare("fake_loss", &values(&loss)?, TOLERANCE)?;
    let logits = (
        input(reference, "gan_logit_real")?,
        input(reference, "gan_logit_fake")?,
    );
    let found = values(&generator_gan_loss(&logits.1)?)?;
    reference.compare("gan_gen_loss", &found, TOLERANCE)?;
    let found = values(&discriminator_loss(&logits.0, &logits.1)?)?;
    reference.compare("gan_disc_loss", &found, TOLERANCE)?;
    targets(reference)
}

/// `F(u) = A u + b` over each row read as a vector.
fn affine(
    reference: &mut Reference,
    name: &str,
) -> Result<impl Fn(&Tensor, &Tensor, &Condition) -> Result<Tensor>> {
    let a = input(reference, &format!("A_{name}"))?;
    let b = input(reference, &format!("b_{name}"))?;
    Ok(move |u: &Tensor, _: &Tensor, _: &Condition| {
        let flat = u.reshape((u.dims()[0], ()))?;
        let out = flat.matmul(&a.t()?)?.broadcast_add(&b)?;
        Ok(out.reshape(u.shape())?)
    })
}

/// The levels whose indices the file names.
fn picked(reference: &mut Reference, name: &str, levels: &[Level]) -> Result<Levels> {
    let indices = reference.input(name)?.indices()?;
    let one = |i: &u32| levels.get(*i as usize).copied();
    match indices.iter().map(one).collect::<Option<Vec<_>>>() {
        Some(levels) => Ok(Levels::PerRow(levels)),
        None => Err(bad(reference, format!("`{name}` is beyond the levels"))),
    }
}

fn student(
    reference: &mut Reference,
    (real, fake): (&dyn Denoiser, &dyn Denoiser),
    x: &Tensor,
    levels: &[Level],
) -> Result<()> {
    let at = picked(reference, "dm_step", levels)?;
    let noise = input(reference, "dm_noise")?;
    let null = Condition::Null;
    let by = |weight| matching((real, fake), x, &noise, &at, weight, &null);
    let found = by(GradWeight::DmdL1Norm)?;
    reference.compare_tensor("dm_pred_real", &found.real, TOLERANCE)?;
    reference.compare_tensor("dm_pred_fake", &found.fake, TOLERANCE)?;
    reference.compare_tensor("dm_grad", &found.gradient, TOLERANCE)?;
    reference.compare("dm_loss", &[found.loss()?], TOLERANCE)?;
    // The sign of what the student descends, through the graph.
    let samples = Var::from_tensor(x)?;
    let grads = found.surrogate(samples.as_tensor())?.backward()?;
    let grad = grads.get(&samples).cloned();
    let grad = grad.ok_or_else(|| bad(reference, "the surrogate has no gradient"))?;
    reference.compare_tensor("dm_dloss_dx", &grad, TOLERANCE)?;
    let x_t = mix(x, &noise, &at)?;
    for (name, denoiser) in [("score_real", real), ("score_fake", fake)] {
        let score = denoiser.denoise(&x_t, &at, &null)?.score()?;
        reference.compare_tensor(name, &score, TOLERANCE)?;
    }
    let weights = [
        ("di_grad_w1", WeightFn::One),
        ("di_grad_wsigma2", WeightFn::SigmaSquared),
    ];
    for (name, weight) in weights {
        let found = by(GradWeight::DiffInstruct(weight))?;
        reference.compare_tensor(name, &found.gradient, TOLERANCE)?;
    }
    Ok(())
}

/// `sched_path_len` counts the targets: a recorded path has one snapshot more.
fn targets(reference: &mut Reference) -> Result<()> {
    let count: usize = reference.number("sched_path_len")?;
    let mut path = Path::of(&[])?;
    for _ in 0..count {
        path.record(&[])?;
    }
    let tracker = Backtracker::new(&path, reference.number("sched_interval")?)?;
    let iterations = reference.input("sched_iter")?.indices()?;
    let found: Vec<f64> = iterations
        .iter()
        .map(|i| tracker.target_at(*i as usize) as f64)
        .collect();
    Ok(reference.compare("sched_target_index", &found, Tolerance::Mismatches(0))?)
}
