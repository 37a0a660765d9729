//! FlowChef against backpropagation through the network, on flows of digits.

use super::digit_flow::digit_flows;
use super::judge::{neighbor_accuracy, split, Logistic};
use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::scenarios::generation::{digits, frechet, image_grid, Cloud};
use crate::statistics::quantile;
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use flows::{Condition, GradientCheck, Velocity};
use guidance::flowchef::{
    BackpropGuidance, ClassifierCost, FlowChef, GuidedOutput, LinearMeasurement, StepRule,
};
use std::time::Instant;
use tensor_core::operator::{AveragePool, Blur, LinearOperator, Mask};

const TRAINING: usize = 1500;
const SIDE: usize = 8;
const STEPS: usize = 20;
/// Of inpainting and super-resolution, in units of the cost's curvature.
const GAMMA: f64 = 0.6;
const BLUR_STEPS: usize = 100;
const BLUR_GAMMA: f64 = 1.0;
/// Pairs of runs that are timed in turn.
const TIMED: usize = 7;
/// Of classifier guidance.
const CLASS_SAMPLES: usize = 300;
const CLASS_STEPS: usize = 50;
const CLASS_SCALES: [f64; 3] = [0.1, 0.3, 1.0];

pub(in crate::scenarios) struct FlowChefScenario;

impl Scenario for FlowChefScenario {
    fn definition(&self) -> Definition {
        let number = |name, label, better| Metric {
            name,
            label,
            better,
        };
        let psnr = |arm| metric(arm, "psnr");
        Definition {
            slug: "flowchef",
            title: "FlowChef",
            paper: Paper {
                title: "Steering Rectified Flow Models in the Vector Field for Controlled Image Generation",
                venue: "ICCV 2025",
                arxiv: "2412.00100",
            },
            krate: "guidance",
            module: "flowchef",
            tags: &["guidance", "flow", "inverse problems"],
            version: 2,
            summary: "Flows of handwritten digits (the perceptron of the rectified-flow scenario, trained on 1500 \
                      digits: a first flow and one after a reflow). The 297 other digits lose a 4 x 4 box in the \
                      middle, half their resolution, or their sharpness (5 x 5 Gaussian, sigma 1); 20 Euler steps and \
                      gamma 0.6 (100 steps and 1.0 for the blur), the same for FlowChef and for backpropagation through \
                      the network. Then 300 samples are guided to a class by logistic regression, 50 steps, scales 0.1 to \
                      1; the class is judged by the five nearest digits. PSNR has a peak of 2, distances are Fréchet \
                      distances to all digits, on pixels.",
            notes: "The flows of a seed are trained once per process. The blur has no pseudo-inverse.",
            data: Data { embedded: "digits", real: None },
            arms: vec![
                Arm::new("inverse", "pseudo-inverse", Role::Baseline),
                Arm::new("free", "unguided, reflowed", Role::Baseline),
                Arm::new("backprop", "backpropagation, reflowed", Role::Baseline),
                Arm::new("backprop-one", "backpropagation, first flow", Role::Baseline),
                Arm::new("chef", "FlowChef, reflowed", Role::Method).timed(),
                Arm::new("chef-one", "FlowChef, first flow", Role::Method).timed(),
            ],
            metrics: vec![
                number("psnr", "PSNR, box", Better::Higher),
                number("measured", "mean square error of the measurements, box", Better::Lower),
                number("psnr_sr", "PSNR, half resolution", Better::Higher),
                number("psnr_blur", "PSNR, blur", Better::Higher),
                number("time", "seconds of FlowChef over those of backpropagation, in turn", Better::Lower),
                number("success", "class hit, scale 0.3", Better::Higher),
                number("fd", "Fréchet distance, class guidance at 0.3", Better::Lower),
            ],
            claims: vec![
                Claim::every_seed(
                    "better-than-inverse",
                    "reflowed, the box is filled 0.4 dB better than by the pseudo-inverse",
                    psnr("chef").at_least(psnr("inverse") + 0.4),
                ),
                Claim::every_seed(
                    "better-than-free",
                    "and 4 dB better than by an unguided sample",
                    psnr("chef").at_least(psnr("free") + 4.0),
                ),
                Claim::every_seed(
                    "measurements",
                    "the measurements' error is less than half of backpropagation's",
                    metric("chef", "measured").below(metric("backprop", "measured") * 0.5),
                ),
                Claim::every_seed(
                    "near-backprop",
                    "PSNR is within 1.5 dB of backpropagation's",
                    psnr("chef").at_least(psnr("backprop") - 1.5),
                ),
                Claim::every_seed(
                    "time",
                    "in at most 0.65 of its time",
                    metric("chef", "time").at_most(0.65),
                ),
                Claim::every_seed(
                    "class",
                    "guided by a classifier the reflowed flow hits 97 % of the classes",
                    metric("chef", "success").at_least(0.97),
                ),
                Claim::every_seed(
                    "class-one",
                    "and so does the first flow",
                    metric("chef-one", "success").at_least(0.97),
                ),
                Claim::every_seed(
                    "class-distance",
                    "within 1.3 of the data",
                    metric("chef", "fd").at_most(1.3),
                ),
                Claim::every_seed(
                    "straightness",
                    "three times nearer than the first flow",
                    metric("chef", "fd").below(metric("chef-one", "fd") * (1.0 / 3.0)),
                ),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, _: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        let data = digits(trial)?;
        let (known, held) = split(&data, TRAINING)?;
        let images = held.inputs.reshape((held.len(), 1, SIDE, SIDE))?;
        let [first, second] = digit_flows(trial, &known.inputs)?;
        let flow = match arm.name {
            "chef-one" | "backprop-one" => first,
            _ => second,
        };
        let flow = Square(flow);
        let noise = trial.stream("noise").normal(
            0.0,
            1.0,
            images.shape(),
            images.dtype(),
            &trial.device,
        )?;
        let task = Task {
            arm: arm.name,
            flow: &flow,
            noise: &noise,
            images: &images,
        };
        let device = &trial.device;
        let hole = Mask::hide_box((SIDE, SIDE), 4, None, images.dtype(), device)?;
        let half = AveragePool { factor: 2 };
        let blur = Blur::gaussian(5, 1.0, true, images.dtype(), device)?;

        trial.step(1, 5)?;
        let filled = task.solve(&hole, STEPS, GAMMA)?;
        trial.step(2, 5)?;
        let sharp = task.solve(&half, STEPS, GAMMA)?;
        let mut outcome = TrialOutcome::default()
            .metric("psnr", psnr(&filled, &images)?)
            .metric(
                "measured",
                mean_square(&hole.apply(&filled)?, &hole.apply(&images)?)?,
            )
            .metric("psnr_sr", psnr(&sharp, &images)?)
            .picture(strip(
                "box: digits, measurements, result",
                &images,
                &hole.apply(&images)?,
                &filled,
            )?);
        trial.step(3, 5)?;
        if arm.name != "inverse" {
            let clear = task.solve(&blur, BLUR_STEPS, BLUR_GAMMA)?;
            outcome = outcome
                .metric("psnr_blur", psnr(&clear, &images)?)
                .picture(strip(
                    "blur: digits, measurements, result",
                    &images,
                    &blur.apply(&images)?,
                    &clear,
                )?);
        }
        trial.step(4, 5)?;
        match arm.name {
            "chef" | "chef-one" => {
                outcome = outcome.metric("time", task.time_ratio(&hole)?);
                classes(trial, &flow, &known, &data, outcome)
            }
            _ => Ok(outcome),
        }
    }
}

/// A flow of vectors as one of images.
struct Square<V>(V);

impl<V: Velocity> Velocity for Square<V> {
    fn velocity(&self, x: &Tensor, t: &Tensor, condition: &Condition) -> flows::Result<Tensor> {
        let flat = x.flatten_from(1)?;
        let v = self.0.velocity(&flat, t, condition)?;
        Ok(v.reshape(x.shape())?)
    }
}

struct Task<'a> {
    arm: &'a str,
    flow: &'a dyn Velocity,
    noise: &'a Tensor,
    images: &'a Tensor,
}

impl Task<'_> {
    fn solve(&self, operator: &dyn LinearOperator, steps: usize, gamma: f64) -> Result<Tensor> {
        let y = operator.apply(self.images)?;
        let cost = LinearMeasurement::new(operator, &y);
        let chef = |gamma| FlowChef {
            steps,
            rule: StepRule::Normalized { gamma },
            // Its evaluations would count for the time of backpropagation.
            gradient_check: GradientCheck::off(),
            ..FlowChef::default()
        };
        let null = Condition::Null;
        let guided = |chef: FlowChef| -> Result<GuidedOutput> {
            Ok(chef.sample(self.flow, self.noise, &null, &cost, None)?)
        };
        Ok(match self.arm {
            "inverse" => operator
                .pseudo_inverse(&y)?
                .ok_or_else(|| Error::Trial("an operator without a pseudo-inverse".into()))?,
            "free" => guided(chef(0.0))?.x,
            "chef" | "chef-one" => guided(chef(gamma))?.x,
            "backprop" | "backprop-one" => {
                let baseline = BackpropGuidance::new(chef(gamma));
                baseline
                    .sample(self.flow, self.noise, &null, &cost, None)?
                    .x
            }
            other => return Err(Error::Trial(format!("no solver for arm `{other}`"))),
        })
    }

    /// The time of FlowChef over that of backpropagation on the same flow: the median over pairs of
    /// runs, one after the other, so that a change of the machine's speed meets both.
    fn time_ratio(&self, operator: &dyn LinearOperator) -> Result<f64> {
        let seconds = |arm| -> Result<f64> {
            let start = Instant::now();
            Task { arm, ..*self }.solve(operator, STEPS, GAMMA)?;
            Ok(start.elapsed().as_secs_f64())
        };
        let ratios = (0..TIMED).map(|_| Ok(seconds("chef")? / seconds("backprop")?));
        Ok(quantile(&ratios.collect::<Result<Vec<_>>>()?, 0.5))
    }
}

fn mean_square(a: &Tensor, b: &Tensor) -> Result<f64> {
    let off = (a - b)?.sqr()?.mean_all()?;
    Ok(off.to_dtype(DType::F64)?.to_scalar()?)
}

/// In decibels, the mean over the images, with a peak of 2.
fn psnr(a: &Tensor, b: &Tensor) -> Result<f64> {
    let off = (a - b)?.sqr()?.flatten_from(1)?.mean(1)?;
    let off = off.to_dtype(DType::F64)?.to_vec1::<f64>()?;
    let each = off.iter().map(|e| 10.0 * (4.0 / e.max(1e-12)).log10());
    Ok(each.sum::<f64>() / off.len() as f64)
}

/// Ten images, what was measured, what came of it, one row each.
fn strip(
    caption: &str,
    images: &Tensor,
    seen: &Tensor,
    found: &Tensor,
) -> Result<crate::scenario::Picture> {
    let ten = |x: &Tensor| x.narrow(0, 0, 10)?.flatten_from(1);
    let rows = Tensor::cat(&[ten(images)?, ten(seen)?, ten(found)?], 0)?;
    image_grid(caption, &rows, 10)
}

/// Guidance to classes by a classifier of clean samples.
fn classes(
    trial: &TrialContext,
    flow: &dyn Velocity,
    known: &datasets::Classification,
    all: &datasets::Classification,
    mut outcome: TrialOutcome,
) -> Result<TrialOutcome> {
    let guide = Logistic::fit(known, 0.1)?;
    let wanted: Vec<u32> = (0..CLASS_SAMPLES as u32)
        .map(|i| i % known.classes as u32)
        .collect();
    let labels = Tensor::new(wanted, &trial.device)?;
    let cost = ClassifierCost {
        net: |x: &Tensor| Ok(guide.logits(x)?),
        labels: labels.clone(),
    };
    let shape = (CLASS_SAMPLES, SIDE * SIDE);
    let noise =
        trial
            .stream("class-noise")
            .normal(0.0, 1.0, shape, known.inputs.dtype(), &trial.device)?;
    let reference = Cloud::new(&all.inputs)?;
    let mut hits = Curve::new("class hit", "scale of the guidance").log_x();
    let mut distances = Curve::new("Fréchet distance", "scale of the guidance")
        .log_x()
        .log_y();
    for scale in CLASS_SCALES {
        let chef = FlowChef {
            steps: CLASS_STEPS,
            rule: StepRule::Gd { scale },
            ..FlowChef::default()
        };
        let x = chef
            .sample(&Flat(flow), &noise, &Condition::Null, &cost, None)?
            .x;
        let success = neighbor_accuracy(&x, all, &labels)?;
        let distance = frechet(&Cloud::new(&x)?, &reference)?;
        hits.push(scale, success);
        distances.push(scale, distance);
        if scale == 0.3 {
            outcome = outcome
                .metric("success", success)
                .metric("fd", distance)
                .picture(image_grid(
                    "guided to the classes 0 to 9",
                    &x.narrow(0, 0, 40)?,
                    10,
                )?);
        }
    }
    Ok(outcome.curve(hits).curve(distances))
}

/// A flow of images as one of vectors.
struct Flat<'a>(&'a dyn Velocity);

impl Velocity for Flat<'_> {
    fn velocity(&self, x: &Tensor, t: &Tensor, condition: &Condition) -> flows::Result<Tensor> {
        let images = x.reshape((x.dims()[0], 1, SIDE, SIDE))?;
        Ok(self.0.velocity(&images, t, condition)?.flatten_from(1)?)
    }
}
