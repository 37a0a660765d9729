//! Guidance rules on predictions that are there already, and the loop of noise optimization.

use super::{Case, Peer, Session};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use flows::Condition;
use guidance::apg::Convention;
use guidance::basic::rescale;
use guidance::reno::{Named, Reno, RenoConfig};
use guidance::{Apg, Cfg};
use serde_json::json;
use tensor_core::random::RandomStream;

const GROUP: &str = "guidance";
/// Latents of Stable Diffusion, and a batch of larger ones.
const SHAPES: [[usize; 4]; 2] = [[1, 4, 64, 64], [8, 16, 128, 128]];
const SCALE: f64 = 7.5;

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
    Ok(())
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
            let generate = |z: &Tensor, _: &Condition| Ok((z * &gain)?.tanh()?);
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
