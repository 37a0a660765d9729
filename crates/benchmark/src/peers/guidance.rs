//! Guidance rules on predictions that are there already, the loop of noise optimization, operators of
//! inverse problems, guides with adapters.

use super::{Case, Peer, Session};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use candle_nn::{ModuleT, VarBuilder};
use flows::grid::Spacing;
use flows::schedule::{Beta, Ddpm, VpSde};
use flows::{
    Closure, Condition, GradientCheck, Grid, Guidance, Level, Levels, Prediction, Sampler,
};
use guidance::apg::Convention;
use guidance::basic::rescale;
use guidance::gfcg::{Gfcg, OnDenoised};
use guidance::ppap::{ExpertBank, ExpertGuide, Ranges};
use guidance::reno::{Named, Reno, RenoConfig};
use guidance::{AdaptiveGuidance, Apg, Cfg, ClassifierGuidance};
use nn::init::SeededVars;
use nn::lora::PeftSpec;
use nn::models::{Activation, Mlp, MlpConfig, ResNet, ResNetConfig};
use nn::softmax::log_softmax;
use serde_json::json;
use tensor_core::operator::{AveragePool, LinearOperator, Mask};
use tensor_core::random::RandomStream;

const GROUP: &str = "guidance";
/// Latents of Stable Diffusion, and a batch of larger ones.
const SHAPES: [[usize; 4]; 2] = [[1, 4, 64, 64], [8, 16, 128, 128]];
const SCALE: f64 = 7.5;
const CLASSES: usize = 10;

pub(super) fn cases(session: &mut Session<'_>) -> Result<()> {
    if session.wants(GROUP, "guidance-core") {
        combinations(session)?;
    }
    if session.wants(GROUP, "apg") {
        projections(session)?;
    }
    if session.wants(GROUP, "reno") {
        noise_optimization(session)?;
    }
    if session.wants(GROUP, "flowchef") {
        operators(session)?;
    }
    if session.wants(GROUP, "ppap") {
        experts(session)?;
    }
    if session.wants(GROUP, "adaptive-guidance") {
        fewer_evaluations(session)?;
    }
    if session.wants(GROUP, "gfcg") {
        forward_only(session)?;
    }
    Ok(())
}

/// A perceptron with weights that are not trained, without a graph to them.
fn perceptron(label: &str, widths: &[usize]) -> Result<Mlp> {
    let config = MlpConfig {
        widths: widths.to_vec(),
        activation: Activation::Silu,
        ..MlpConfig::default()
    };
    let vars = SeededVars::new(&RandomStream::new(0).split(label));
    Mlp::new(&config, vars.builder(DType::F32, &Device::Cpu))?;
    let weights = vars.trainable().into_iter();
    let weights = weights.map(|(name, var)| (name, var.as_detached_tensor()));
    let weights = VarBuilder::from_tensors(weights.collect(), DType::F32, &Device::Cpu);
    Ok(Mlp::new(&config, weights)?)
}

/// Its input: the sample and its class, one of these and none.
fn with_class(x: &Tensor, condition: &Condition, eye: &Tensor) -> flows::Result<Tensor> {
    let Condition::Class(classes) = condition else {
        return Err(flows::Error::other("a network of classes"));
    };
    Ok(Tensor::cat(&[x, &eye.index_select(classes, 0)?], 1)?)
}

/// Guided DDIM around a network, with all of its evaluations and with the paper's three quarters of them.
fn fewer_evaluations(session: &mut Session<'_>) -> Result<()> {
    const STEPS: usize = 20;
    let (rows, d, hidden) = (64, 1024, 1024);
    let widths = [d + CLASSES + 1, hidden, hidden, d];
    let net = perceptron("denoiser", &widths)?;
    let eye = Tensor::eye(CLASSES + 1, DType::F32, &Device::Cpu)?;
    let model = Closure::new(Prediction::Eps, |x: &Tensor, _: &Levels, c: &Condition| {
        Ok(net.forward_t(&with_class(x, c, &eye)?, false)?)
    });
    let noise = normal("noise", &[rows, d])?;
    let wanted = Condition::classes(&[3], &Device::Cpu)?;
    let null = Condition::classes(&[CLASSES as u32], &Device::Cpu)?;
    let grid = Grid::uniform_lambda(&VpSde::default(), STEPS)?;
    let levels: Vec<[f64; 2]> = grid.levels().iter().map(|l| [l.alpha, l.sigma]).collect();
    let spec = json!({ "rows": rows, "widths": widths, "scale": SCALE, "levels": levels });
    for (guided, calls) in [(STEPS, "all"), (STEPS / 2, "30 of 40")] {
        session.measure(Case {
            slug: "adaptive-guidance",
            operation: format!("{STEPS} guided DDIM steps around a perceptron {widths:?}, batch {rows}, {calls} evaluations"),
            ours: "AdaptiveGuidance",
            call: Box::new(|| {
                // The weights are not trained: when guidance ends is not up to their cosines.
                let ends = if guided == STEPS { 2.0 } else { -1.0 };
                let rule = AdaptiveGuidance::new(SCALE).threshold(ends).min_steps(guided);
                let mut sampler = Sampler::new(&model, grid.clone())
                    .guidance(rule)
                    .null(null.clone());
                let out = sampler.sample(&noise, &wanted, None, &RandomStream::new(0))?;
                anyhow::ensure!(out.nfe.main == rows * (STEPS + guided), "other evaluations");
                Ok(())
            }),
            peer: Peer::Python("diffusers guided loop", spec.clone()),
        })?;
    }
    Ok(())
}

/// A classifier that is asked against one that is differentiated, in the same loop.
fn forward_only(session: &mut Session<'_>) -> Result<()> {
    const STEPS: usize = 20;
    let (rows, d) = (64, 1024);
    let net = perceptron("denoiser", &[d + CLASSES + 1, 1024, 1024, d])?;
    let judge = perceptron("classifier", &[d, 1024, 1024, CLASSES])?;
    let eye = Tensor::eye(CLASSES + 1, DType::F32, &Device::Cpu)?;
    let model = Closure::new(Prediction::Eps, |x: &Tensor, _: &Levels, c: &Condition| {
        Ok(net.forward_t(&with_class(x, c, &eye)?, false)?)
    });
    let noise = normal("noise", &[rows, d])?;
    let wanted = Condition::classes(&[3], &Device::Cpu)?;
    let null = Condition::classes(&[CLASSES as u32], &Device::Cpu)?;
    let grid = Grid::uniform_lambda_between(&VpSde::default(), 0.99, 0.02, STEPS)?;
    let logits = |x: &Tensor| Ok(judge.forward_t(x, false)?);
    let log_prob = |x: &Tensor, _: &Level, c: &Condition| -> flows::Result<Tensor> {
        let Condition::Class(classes) = c else {
            return Err(flows::Error::other("a classifier of classes"));
        };
        let log_p = log_softmax(&judge.forward_t(x, false)?, 1)?;
        Ok(log_p.gather(&classes.unsqueeze(1)?, 1)?.squeeze(1)?)
    };
    let sample = |rule: &mut dyn Guidance| -> Result<()> {
        let mut sampler = Sampler::new(&model, grid.clone())
            .guidance(rule)
            .null(null.clone());
        std::hint::black_box(
            sampler
                .sample(&noise, &wanted, None, &RandomStream::new(0))?
                .x,
        );
        Ok(())
    };
    session.measure(Case {
        slug: "gfcg",
        operation: format!(
            "{STEPS} DDIM steps guided by a perceptron as large as the denoiser's, batch {rows}"
        ),
        ours: "Gfcg: two evaluations of the denoiser, one of the classifier",
        call: Box::new(|| {
            sample(
                &mut Gfcg::new(OnDenoised::new(&logits))
                    .scale(SCALE)
                    .skip_below(0.0),
            )
        }),
        peer: Peer::Rust(
            "ClassifierGuidance: one of the denoiser, the classifier forward and backward",
            Box::new(|| {
                let mut rule = ClassifierGuidance::new(&log_prob, 1.0);
                rule.gradient_check = GradientCheck::off();
                sample(&mut rule)
            }),
        ),
    })
}

fn normal(label: &str, shape: &[usize]) -> Result<Tensor> {
    let mut stream = RandomStream::new(0).split(label);
    Ok(stream.normal(0.0, 1.0, shape, DType::F32, &Device::Cpu)?)
}

/// The two predictions of a step.
fn predictions(shape: &[usize]) -> Result<[Tensor; 2]> {
    Ok([normal("wanted", shape)?, normal("unwanted", shape)?])
}

fn combinations(session: &mut Session<'_>) -> Result<()> {
    const PHI: f64 = 0.7;
    for shape in SHAPES {
        let [wanted, unwanted] = predictions(&shape)?;
        let cfg = Cfg::new(SCALE);
        let spec = |phi: f64| json!({ "shape": shape, "scale": SCALE, "rescale": phi });
        session.measure(Case {
            slug: "guidance-core",
            operation: format!("classifier-free guidance {shape:?}"),
            ours: "Cfg",
            call: Box::new(|| {
                std::hint::black_box(cfg.combine(&wanted, &unwanted)?);
                Ok(())
            }),
            peer: Peer::Python("diffusers ClassifierFreeGuidance", spec(0.0)),
        })?;
        session.measure(Case {
            slug: "guidance-core",
            operation: format!("the same, rescaled {shape:?}"),
            ours: "Cfg and rescale",
            call: Box::new(|| {
                let guided = cfg.combine(&wanted, &unwanted)?;
                std::hint::black_box(rescale(&guided, &wanted, PHI)?);
                Ok(())
            }),
            peer: Peer::Python("diffusers ClassifierFreeGuidance", spec(PHI)),
        })?;
    }
    Ok(())
}

/// Ten steps, so that the running sum is there.
fn projections(session: &mut Session<'_>) -> Result<()> {
    const STEPS: usize = 10;
    for shape in SHAPES {
        let [wanted, unwanted] = predictions(&shape)?;
        let (momentum, threshold, eta) = (-0.5, 15.0, 0.0);
        let apg = Apg::new(SCALE)
            .eta(eta)
            .norm_threshold(threshold)
            .momentum(momentum)
            .convention(Convention::DiffusersNative);
        let spec = json!({
            "shape": shape, "scale": SCALE, "steps": STEPS,
            "momentum": momentum, "threshold": threshold, "eta": eta,
        });
        session.measure(Case {
            slug: "apg",
            operation: format!("{STEPS} projected combinations {shape:?}"),
            ours: "Apg",
            call: Box::new(|| {
                let mut running = None;
                for _ in 0..STEPS {
                    let (guided, sum) = apg.combine(&wanted, &unwanted, running.as_ref())?;
                    std::hint::black_box(guided);
                    running = Some(sum);
                }
                Ok(())
            }),
            peer: Peer::Python("diffusers AdaptiveProjectedGuidance", spec),
        })?;
    }
    Ok(())
}

/// The loop around a generator that costs next to nothing.
fn noise_optimization(session: &mut Session<'_>) -> Result<()> {
    const ITERATIONS: usize = 20;
    for shape in SHAPES {
        let noise = normal("noise", &shape)?;
        let (gain, target) = (normal("gain", &shape)?, normal("target", &shape)?);
        let call = || {
            let generate = |z: &Tensor, _: &Condition| Ok(Activation::Tanh.of(&(z * &gain)?)?);
            let reward = Named::new("square", |x: &Tensor, _: &Condition| {
                Ok((x - &target)?.sqr()?.flatten_from(1)?.mean(1)?)
            });
            let config = RenoConfig {
                iters: ITERATIONS,
                // The peer makes no such check.
                gradient_check: false,
                ..RenoConfig::default()
            };
            let reno = Reno::new(&generate, vec![(1.0, &reward)], config)?;
            let mut run = reno.start(&noise, &Condition::Null)?;
            while run.step()?.is_some() {}
            std::hint::black_box(run.finish()?.best_z);
            Ok(())
        };
        session.measure(Case {
            slug: "reno",
            operation: format!("{ITERATIONS} iterations around a multiplication {shape:?}"),
            ours: "Reno",
            call: Box::new(call),
            peer: Peer::Python(
                "torch SGD with Nesterov momentum",
                json!({ "shape": shape, "iterations": ITERATIONS }),
            ),
        })?;
    }
    Ok(())
}

/// Measurements and what they say about the image: `A` and `A^T`.
fn operators(session: &mut Session<'_>) -> Result<()> {
    let (shape, size, factor) = ([64, 3, 256, 256], 128, 4);
    let x = normal("images", &shape)?;
    let mask = Mask::hide_box((256, 256), size, None, DType::F32, &Device::Cpu)?;
    let pool = AveragePool { factor };
    let all: [(&str, &str, &(dyn LinearOperator + Sync), &str); 2] = [
        ("a box hidden", "Mask", &mask, "deepinv Inpainting"),
        ("pooling by 4", "AveragePool", &pool, "deepinv Downsampling"),
    ];
    for (operation, ours, operator, peer) in all {
        session.measure(Case {
            slug: "flowchef",
            operation: format!("{operation}, and back {shape:?}"),
            ours,
            call: Box::new(|| {
                std::hint::black_box(operator.adjoint(&operator.apply(&x)?)?);
                Ok(())
            }),
            peer: Peer::Python(
                peer,
                json!({ "shape": shape, "size": size, "factor": factor }),
            ),
        })?;
    }
    Ok(())
}

/// Steps guided by one expert of a bank, around a denoiser that costs one multiplication.
fn experts(session: &mut Session<'_>) -> Result<()> {
    const STEPS: usize = 4;
    let (shape, width) = ([16, 3, 32, 32], 32);
    let config = ResNetConfig {
        width,
        ..ResNetConfig::default()
    };
    let vars = SeededVars::new(&RandomStream::new(0).split("resnet"));
    ResNet::new(&config, vars.builder(DType::F32, &Device::Cpu))?;
    let weights = vars.varmap().data().lock();
    let weights = weights.map_err(|_| anyhow::anyhow!("the weights are locked"))?;
    let weights = weights
        .iter()
        .map(|(name, var)| (name.clone(), var.as_detached_tensor()));
    let spec = PeftSpec {
        targets: Box::new(|name| name.contains("conv")),
        ..PeftSpec::default()
    };
    let train_steps = 1000;
    let schedule = Ddpm::new(Beta::LINEAR, train_steps)?;
    let build = move |vb: VarBuilder| Ok(ResNet::new(&config, vb)?);
    let mut rng = RandomStream::new(1);
    let ranges = Ranges::new(5, train_steps)?;
    let bank = ExpertBank::<ResNet>::new(build, weights.collect(), ranges, &spec, &mut rng)?;
    let grid = Grid::discrete(&schedule, Spacing::Trailing, STEPS)?;
    let levels: Vec<[f64; 2]> = grid.levels().iter().map(|l| [l.alpha, l.sigma]).collect();
    let (noise, wanted) = (
        normal("noise", &shape)?,
        Condition::classes(&[3], &Device::Cpu)?,
    );
    let model = Closure::new(Prediction::Eps, |x: &Tensor, _: &Levels, _: &Condition| {
        Ok((x * 0.1)?)
    });
    for peer in ["peft LoRA, merged", "peft LoRA"] {
        session.measure(Case {
            slug: "ppap",
            operation: format!(
                "{STEPS} DDIM steps guided by a ResNet-8 of width {width} with adapters {shape:?}"
            ),
            ours: "ExpertGuide",
            call: Box::new(|| {
                let mut rule = ClassifierGuidance::new(ExpertGuide::new(&bank), SCALE);
                rule.gradient_check = GradientCheck::off();
                let mut sampler =
                    Sampler::new(&model, grid.clone()).guidance(&mut rule as &mut dyn Guidance);
                std::hint::black_box(
                    sampler
                        .sample(&noise, &wanted, None, &RandomStream::new(0))?
                        .x,
                );
                Ok(())
            }),
            peer: Peer::Python(
                peer,
                json!({
                    "shape": shape, "width": width, "blocks": 1, "adapter": [spec.rank, spec.alpha],
                    "scale": SCALE, "levels": levels,
                }),
            ),
        })?;
    }
    Ok(())
}
