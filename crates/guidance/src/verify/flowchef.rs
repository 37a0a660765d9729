//! The reference of FlowChef: guided runs for every operator of the file, the two gradients, and
//! the inner loop of editing.

use crate::flowchef::{
    correct, exact_gradient, skipped_gradient, Adam, FlowChef, LinearMeasurement, MaskedTarget,
    Reduction, Scale, StepRule,
};
use crate::Result;
use candle_core::{Device, Tensor};
use flows::verify::{bad, input, setting, values};
use flows::{AnalyticMixture, Condition};
use std::ops::ControlFlow;
use tensor_core::operator::{AveragePool, Blur, LinearOperator, Mask};
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-10);
/// What the authors' loop starts with in the place of time 0.
const START: f64 = 1e-5;

/// Checks all parts of the file.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn flowchef(reference: &mut Reference) -> Result<()> {
    let centers = input(reference, "mix_centers")?;
    let weights = reference.input("mix_weights")?.values;
    let std: f64 = reference.number("mix_std")?;
    let field = AnalyticMixture::new(&centers, &vec![std * std; weights.len()], &weights)?;
    let image = input(reference, "image")?;
    let start = input(reference, "x_noise")?;
    // The file's start is scaled already.
    let noise = start.affine(1.0 / (1.0 - START), 0.0)?;
    for name in reference.cases("_final") {
        let y = input(reference, &format!("{name}_y"))?;
        let operator = operator(reference, &name, &image, &y)?;
        guided(reference, &name, &field, &noise, operator.as_ref(), &y)?;
        if name == "inpaint" && reference.has("grad_x") {
            gradients(reference, &field, operator.as_ref(), &y)?;
        }
    }
    match reference.has("edit_out") {
        true => edit(reference),
        false => Ok(()),
    }
}

/// The operator of a name: `inpaint`, `sr{factor}`, `deblur`.
fn operator(
    reference: &mut Reference,
    name: &str,
    image: &Tensor,
    y: &Tensor,
) -> Result<Box<dyn LinearOperator>> {
    if name == "inpaint" {
        return Ok(Box::new(Mask::new(&seen(reference, image, y)?)?));
    }
    if name == "deblur" {
        return Ok(Box::new(Blur::new(&input(reference, "deblur_kernel")?)?));
    }
    match name.strip_prefix("sr").and_then(|f| f.parse().ok()) {
        Some(factor) => Ok(Box::new(AveragePool { factor })),
        None => Err(bad(reference, format!("operator `{name}`")).into()),
    }
}

/// 1 where a pixel of `image` `[C, H, W]` is seen in `y`, 0 where it is hidden: where all of its channels
/// are exactly 0. A pixel that is 0 in the image itself says nothing; it is hidden where the others hide
/// a box around it.
fn seen(reference: &Reference, image: &Tensor, y: &Tensor) -> Result<Tensor> {
    let (channels, height, width) = image.dims3()?;
    if y.elem_count() != image.elem_count() {
        return Err(bad(reference, "`inpaint_y` has not the form of `image`").into());
    }
    let (image, y) = (values(image)?, values(y)?);
    let pixels = height * width;
    let zero = |of: &[f64], p: usize| (0..channels).all(|c| of[c * pixels + p] == 0.0);
    let surely: Vec<usize> = (0..pixels)
        .filter(|p| zero(&y, *p) && !zero(&image, *p))
        .collect();
    let span = |of: fn(usize, usize) -> usize| {
        let places = surely.iter().map(|p| of(*p, width));
        places.clone().min().zip(places.max())
    };
    let (rows, columns) = (span(|p, w| p / w), span(|p, w| p % w));
    let within = |span: Option<(usize, usize)>, at: usize| {
        span.is_some_and(|(first, last)| (first..=last).contains(&at))
    };
    let boxed = |p: usize| within(rows, p / width) && within(columns, p % width);
    let hidden: Vec<bool> = (0..pixels).map(|p| zero(&y, p) && boxed(p)).collect();
    for (i, (a, b)) in y.iter().zip(&image).enumerate() {
        if !hidden[i % pixels] && a != b {
            return Err(bad(
                reference,
                format!("`inpaint_y` is neither hidden nor `image` at {i}"),
            )
            .into());
        }
    }
    let seen = (0..channels * pixels).map(|i| f64::from(u8::from(!hidden[i % pixels])));
    let shape = (channels, height, width);
    Ok(Tensor::from_vec(seen.collect(), shape, &Device::Cpu)?)
}

fn guided(
    reference: &mut Reference,
    name: &str,
    field: &AnalyticMixture,
    noise: &Tensor,
    operator: &dyn LinearOperator,
    y: &Tensor,
) -> Result<()> {
    let chef = FlowChef {
        steps: reference.number("N")?,
        rule: StepRule::Gd {
            scale: reference.number("gradient_scale")?,
        },
        start_eps: START,
        ..FlowChef::default()
    };
    let cost = LinearMeasurement::new(operator, y).reduction(Reduction::MeanAll);
    let prefix = format!("{name}_after");
    let early: Vec<(usize, String)> = reference
        .names()
        .into_iter()
        .filter_map(|n| Some((n.strip_prefix(&prefix)?.parse().ok()?, n)))
        .collect();
    let (mut states, mut last) = (Vec::new(), None);
    let out = chef.sample(
        field,
        noise,
        &Condition::Null,
        &cost,
        Some(&mut |step| {
            states.push(step.x.clone());
            last = Some(step.x1.clone());
            ControlFlow::Continue(())
        }),
    )?;
    for (steps, tensor) in early {
        let Some(state) = steps.checked_sub(1).and_then(|k| states.get(k)) else {
            return Err(bad(reference, format!("`{tensor}`, but {} steps", chef.steps)).into());
        };
        reference.compare_tensor(&tensor, state, TOLERANCE)?;
    }
    reference.compare_tensor(&format!("{name}_final"), &out.x, TOLERANCE)?;
    let prediction = format!("{name}_x1hat_last");
    if let Some(x1) = last.filter(|_| reference.has(&prediction)) {
        reference.compare_tensor(&prediction, &x1, TOLERANCE)?;
    }
    Ok(())
}

/// Of half the square of the measurements' error.
fn gradients(
    reference: &mut Reference,
    field: &AnalyticMixture,
    operator: &dyn LinearOperator,
    y: &Tensor,
) -> Result<()> {
    let (x, t) = (input(reference, "grad_x")?, reference.number("grad_t")?);
    let cost = LinearMeasurement::new(operator, y)
        .reduction(Reduction::SumPerSample)
        .weight(0.5);
    let exact = exact_gradient(field, &x, t, &Condition::Null, &cost)?;
    reference.compare_tensor("grad_exact_t", &exact, TOLERANCE)?;
    let skipped = skipped_gradient(field, &x, t, &Condition::Null, &cost)?;
    Ok(reference.compare_tensor("grad_skip_t", &skipped, TOLERANCE)?)
}

fn edit(reference: &mut Reference) -> Result<()> {
    let (x, v) = (
        input(reference, "edit_latents")?,
        input(reference, "edit_velocity")?,
    );
    let cost = MaskedTarget {
        target: input(reference, "edit_source")?,
        keep: input(reference, "edit_keep_mask")?,
        weight: reference.number("edit_loss_weight")?,
        // Of the authors' cost, over the whole batch.
        reduction: Reduction::MeanAll,
    };
    let (noise, steps) = (
        reference.number("edit_t_noise")?,
        reference.number("edit_steps")?,
    );
    let mut adam = Adam::new(reference.number("edit_lr")?);
    if reference.metadata().contains_key("adam") {
        adam.beta1 = setting(reference, "adam", "b1")?;
        adam.beta2 = setting(reference, "adam", "b2")?;
        adam.eps = setting(reference, "adam", "eps")?;
    }
    let scale = Scale::Adam(adam);
    let found = correct(&x, &v, noise, &cost, &scale, steps)?;
    Ok(reference.compare_tensor("edit_out", &found, Tolerance::Mixed(1e-9))?)
}
