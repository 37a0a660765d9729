//! Rectified flow between two domains, and what a reflow does to its paths: two Gaussians on the left are
//! carried to two on the right. Prints how straight the paths are before and after, and draws both.
//!
//! ```text
//! cargo run -p thalweg-flows --example transfer -- paths.svg
//! ```

#![allow(clippy::print_stdout)]

use candle_core::{DType, Device, ModuleT, Tensor};
use candle_nn::AdamW;
use nn::init::SeededVars;
use nn::models::{Activation, Mlp, MlpConfig};
use std::fmt::Write;
use thalweg_flows::coupling::{reflow, Coupling, Independent};
use thalweg_flows::metrics::{relative_straightness, transport_cost, Cost};
use thalweg_flows::ode::{FixedStep, OdeSolver};
use thalweg_flows::train::{FlowLoss, TrainConfig, Trainer};
use thalweg_flows::{RandomStream, Result, Velocity};

const STEPS: usize = 3000;
const BATCH: usize = 256;

/// Two Gaussians above each other at this abscissa.
fn pair_at(x: f64) -> impl FnMut(usize, &mut RandomStream) -> Result<Tensor> {
    move |n, rng| {
        let noise = rng.normal(0.0, 0.3, (n, 2), DType::F32, &Device::Cpu)?;
        let side = rng.bernoulli(0.5, (n, 1), DType::F32, &Device::Cpu)?;
        let y = side.affine(4.0, -2.0)?;
        let centers = Tensor::cat(&[y.ones_like()?.affine(x, 0.0)?, y], 1)?;
        Ok((noise + centers)?)
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let root = RandomStream::new(1);
    let vars = SeededVars::new(&root.split("weights"));
    let config = MlpConfig {
        widths: vec![3, 64, 64, 64, 2],
        activation: Activation::Silu,
        ..MlpConfig::default()
    };
    let mlp = Mlp::new(&config, vars.builder(DType::F32, &Device::Cpu))?;
    let net =
        |x: &Tensor, t: &Tensor| mlp.forward_t(&Tensor::cat(&[x, &t.unsqueeze(1)?], 1)?, true);
    let train = |pairs: &mut dyn Coupling, label: &str| -> Result<()> {
        let variables = vars.trainable();
        let all = variables.iter().map(|(_, v)| v.clone()).collect();
        let config = TrainConfig {
            lr: 3e-3,
            warmup: 0,
            ema_decay: 0.0,
            grad_clip: None,
        };
        let mut trainer = Trainer::new(variables, AdamW::new_lr(all, config.lr)?, config)?;
        let mut rng = root.split(label);
        for step in 0..STEPS {
            trainer.set_learning_rate(config.lr * (1.0 - step as f64 / STEPS as f64));
            let (x0, x1) = pairs.batch(BATCH, &mut rng)?;
            trainer.step(&FlowLoss::default().sample_and_loss(&net, &x0, &x1, &mut rng)?)?;
        }
        Ok(())
    };

    let mut rng = root.split("pairs");
    train(
        &mut Independent {
            source: pair_at(-3.0),
            target: pair_at(3.0),
        },
        "first",
    )?;
    let first = paths("independent pairs", &net)?;
    // The pairs of the next round are those that the flow itself makes.
    let solver = FixedStep::rk4(20);
    let mut pairs = reflow(&net, &mut pair_at(-3.0), 20_000, 5000, &solver, &mut rng)?;
    train(&mut pairs, "second")?;
    let second = paths("after one reflow", &net)?;
    if let Some(file) = std::env::args().nth(1) {
        std::fs::write(&file, draw(&[first, second])?)?;
        println!("drawn in {file}");
    }
    Ok(())
}

/// The states of 60 points at every step.
fn paths(name: &str, net: &impl Velocity) -> Result<Vec<Tensor>> {
    let start = pair_at(-3.0)(2000, &mut RandomStream::new(7))?;
    let solved = FixedStep::euler(50)
        .recorded()
        .solve(net, &start, 0.0, 1.0)?;
    let states = solved.trajectory.unwrap_or_default();
    let bent = relative_straightness(&states, &solved.times)?;
    let cost = transport_cost(&start, &solved.x, Cost::SquaredL2)?;
    println!(
        "{name}: straightness {:.3} % of the squared distance {cost:.2}",
        100.0 * bent
    );
    let few = states.iter().map(|s| s.narrow(0, 0, 60));
    Ok(few.collect::<candle_core::Result<_>>()?)
}

/// Panels side by side, 200 units each.
fn draw(panels: &[Vec<Tensor>]) -> Result<String> {
    let width = 200 * panels.len();
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} 160\" fill=\"none\">\n"
    );
    for (k, states) in panels.iter().enumerate() {
        let place = |p: &[f32]| {
            let x = 100.0 + 200.0 * k as f32 + 22.0 * p[0];
            (x, 80.0 - 22.0 * p[1])
        };
        let rows = states.iter().map(|s| s.to_vec2::<f32>());
        let rows = rows.collect::<candle_core::Result<Vec<_>>>()?;
        let count = rows.first().map_or(0, Vec::len);
        for i in 0..count {
            let points: Vec<_> = rows
                .iter()
                .step_by(5)
                .map(|state| place(&state[i]))
                .collect();
            let line: Vec<_> = points
                .iter()
                .map(|(x, y)| format!("{x:.0},{y:.0}"))
                .collect();
            // Where it starts decides the color. Writing to a string cannot fail.
            let color = if rows[0][i][1] > 0.0 {
                "#4477aa"
            } else {
                "#cc6677"
            };
            let _ = writeln!(
                svg,
                "<polyline points=\"{}\" stroke=\"{color}\" stroke-width=\"0.7\"/>",
                line.join(" ")
            );
            if let Some((x, y)) = points.last() {
                let _ = writeln!(
                    svg,
                    "<circle cx=\"{x:.0}\" cy=\"{y:.0}\" r=\"1.5\" fill=\"{color}\"/>"
                );
            }
        }
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}
