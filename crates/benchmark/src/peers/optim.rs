//! One optimizer step over the 148 tensors of GPT-2 (124 million parameters), gradients given; and
//! the operations of the other methods in the crate.

use super::{Case, Peer, Session};
use crate::perf::{gpt2_shapes, Workload};
use anyhow::Result;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{Conv2dConfig, Optimizer};
use nn::activation::Activation;
use nn::linear::Linear;
use nn::loss::Reduction;
use optim::bilevel::{hypergradient, LinearSolve, LossProblem};
use optim::consensus::{test_functions::rastrigin, Cbo, CboConfig};
use optim::diagnostics::gradsign::{gradsign, GradSignConfig, SignConv2d, SignTape};
use optim::diagnostics::opposing::loss_sharpness;
use optim::discovery::{Program, ProgramConfig, ProgramOptimizer};
use optim::perp_grad::{PerpGrad, PerpGradConfig};
use optim::{
    AdamW, AdamWConfig, Lion, LionConfig, ParamGroup, SgdConfig, SgdMomentum, Spam, SpamConfig,
};
use serde_json::json;
use tensor_core::random::RandomStream;

const GROUP: &str = "optim";

pub(super) fn cases(session: &mut Session<'_>) -> Result<()> {
    steps(session)?;
    if session.wants(GROUP, "cbo") {
        consensus(session)?;
    }
    if session.wants(GROUP, "gradsign") {
        perceptron_signs(session)?;
        convolution_signs(session)?;
        residual_signs(session)?;
    }
    if session.wants(GROUP, "bo-rep") {
        hyper(session, "torch.autograd hyper-gradient")?;
        hyper(session, "jaxopt root_vjp")?;
    }
    if session.wants(GROUP, "opposing-signals") {
        eigenvalue(session)?;
    }
    Ok(())
}

fn steps(session: &mut Session<'_>) -> Result<()> {
    let wanted: Vec<_> = ["adamw", "sgd", "lion", "spam", "perp-grad"]
        .into_iter()
        .filter(|slug| session.wants(GROUP, slug))
        .collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let shapes = gpt2_shapes();
    // Drawn once: the steps of all optimizers go over the same parameters.
    let work = Workload::new(&shapes)?;
    let python = |name| Peer::Python(name, json!({ "shapes": shapes }));
    for slug in wanted {
        for name in torch_peers(slug) {
            compare(session, slug, &work, python(name))?;
        }
        match slug {
            "adamw" => stock(session, &work)?,
            "spam" => sparse(session, &work, python("AdamW fused"))?,
            "lion" => program(session, &work, python("lion-pytorch"))?,
            _ => {}
        }
    }
    Ok(())
}

/// What a user of Python would take for the method.
fn torch_peers(slug: &str) -> &'static [&'static str] {
    match slug {
        "adamw" => &["AdamW fused", "AdamW foreach"],
        "sgd" => &["SGD fused", "SGD foreach"],
        "lion" => &["lion-pytorch", "AdamW fused"],
        "spam" => &["pytorch-optimizer SPAM", "AdamW fused"],
        _ => &["pytorch-optimizer OrthoGrad over AdamW fused"],
    }
}

fn stock(session: &mut Session<'_>, work: &Workload) -> Result<()> {
    let mut stock = candle_nn::AdamW::new(work.vars.clone(), candle_nn::ParamsAdamW::default())?;
    let peer = Peer::Rust(
        "candle_nn::AdamW",
        Box::new(|| Ok(stock.step(&work.grads)?)),
    );
    compare(session, "adamw", work, peer)
}

fn sparse(session: &mut Session<'_>, work: &Workload, peer: Peer<'_>) -> Result<()> {
    let config = SpamConfig {
        density: Some(0.25),
        delta_t: 0,
        ..SpamConfig::default()
    };
    let group = ParamGroup::new(work.vars.clone(), config);
    let spam = Spam::with_groups(vec![group], &RandomStream::new(0))?;
    step(session, "spam", "Spam, density 0.25", work, spam, peer)
}

/// Lion as an interpreted program.
fn program(session: &mut Session<'_>, work: &Workload, peer: Peer<'_>) -> Result<()> {
    let config = ProgramConfig::new(Program::lion()?);
    let optimizer = ProgramOptimizer::new(work.vars.clone(), config)?;
    step(
        session,
        "lion",
        "ProgramOptimizer, Lion",
        work,
        optimizer,
        peer,
    )
}

/// Our optimizer for a method beside one peer.
fn compare(
    session: &mut Session<'_>,
    slug: &'static str,
    work: &Workload,
    peer: Peer<'_>,
) -> Result<()> {
    let vars = work.vars.clone();
    match slug {
        "sgd" => {
            let sgd = SgdMomentum::new(vars, SgdConfig::default())?;
            step(session, slug, "SgdMomentum", work, sgd, peer)
        }
        "lion" => {
            let lion = Lion::new(vars, LionConfig::default())?;
            step(session, slug, "Lion", work, lion, peer)
        }
        "spam" => {
            let spam = Spam::new(vars, SpamConfig::default())?;
            step(session, slug, "Spam", work, spam, peer)
        }
        "perp-grad" => {
            let config = (PerpGradConfig::default(), AdamWConfig::default());
            let perp = <PerpGrad<AdamW> as Optimizer>::new(vars, config)?;
            step(session, slug, "PerpGrad<AdamW>", work, perp, peer)
        }
        _ => {
            let adam = AdamW::new(vars, AdamWConfig::default())?;
            step(session, slug, "AdamW", work, adam, peer)
        }
    }
}

fn step<O: Optimizer + Send>(
    session: &mut Session<'_>,
    slug: &'static str,
    ours: &'static str,
    work: &Workload,
    mut optimizer: O,
    peer: Peer<'_>,
) -> Result<()> {
    session.measure(Case {
        slug,
        operation: "step, GPT-2 124M".to_string(),
        ours,
        call: Box::new(move || Ok(optimizer.step(&work.grads)?)),
        peer,
    })
}

/// Consensus-based optimization, all of a step.
fn consensus(session: &mut Session<'_>) -> Result<()> {
    const N: usize = 10_000;
    const D: usize = 100;
    let mut stream = RandomStream::new(0);
    let start = stream.normal(1.0, 1.0, (N, D), DType::F64, &Device::Cpu)?;
    let config = CboConfig {
        sigma: 0.1,
        alpha: 1.0,
        ..CboConfig::default()
    };
    let mut cbo = Cbo::new(&start, config, stream.split("noise"))?;
    let objective = rastrigin();
    session.measure(Case {
        slug: "cbo",
        operation: "step, Rastrigin, 10,000 particles in 100 dimensions".to_string(),
        ours: "Cbo",
        call: Box::new(move || {
            cbo.step(&objective)?;
            Ok(())
        }),
        peer: Peer::Python("cbx CBO", json!({ "n": N, "d": D })),
    })
}

fn normal(stream: &mut RandomStream, std: f64, shape: &[usize]) -> Result<Tensor> {
    Ok(stream.normal(0.0, std, shape, DType::F32, &Device::Cpu)?)
}

/// Mean cross entropy.
fn entropy(logits: &Tensor, labels: &Tensor) -> candle_core::Result<Tensor> {
    Ok(nn::loss::cross_entropy(logits, labels, Reduction::Mean)?)
}

fn labels(n: usize) -> Result<Tensor> {
    Ok(Tensor::new(
        (0..n as u32).map(|i| i % 10).collect::<Vec<_>>(),
        &Device::Cpu,
    )?)
}

/// The score of a perceptron: one backward pass and products of sign matrices.
fn perceptron_signs(session: &mut Session<'_>) -> Result<()> {
    const WIDTHS: [usize; 4] = [784, 512, 512, 10];
    const N: usize = 128;
    let (mut stream, tape) = (RandomStream::new(0), SignTape::new());
    let (mut layers, mut params) = (Vec::new(), Vec::new());
    for (i, pair) in WIDTHS.windows(2).enumerate() {
        let w = Var::from_tensor(&normal(&mut stream, 0.05, &[pair[1], pair[0]])?)?;
        layers.push(tape.linear(&w, None)?);
        params.push((format!("layer{i}"), w));
    }
    let (x, y) = (normal(&mut stream, 1.0, &[N, WIDTHS[0]])?, labels(N)?);
    let config = GradSignConfig {
        tape: Some(tape),
        ..GradSignConfig::default()
    };
    let call = move || {
        let model = |x: &Tensor| {
            let hidden = layers[1].forward(&layers[0].forward(x)?.relu()?)?;
            layers[2].forward(&hidden.relu()?)
        };
        gradsign(model, &params, &x, &y, entropy, &config)?;
        Ok(())
    };
    session.measure(Case {
        slug: "gradsign",
        operation: "score, perceptron 784-512-512-10, 128 examples".to_string(),
        ours: "gradsign, factored",
        call: Box::new(call),
        peer: Peer::Python(
            "torch.func perceptron signs",
            json!({ "n": N, "widths": WIDTHS }),
        ),
    })
}

/// The score of a small convolutional network.
fn convolution_signs(session: &mut Session<'_>) -> Result<()> {
    const N: usize = 128;
    const CHANNELS: [usize; 5] = [3, 16, 16, 16, 16];
    let (mut stream, tape) = (RandomStream::new(0), SignTape::new());
    let same = Conv2dConfig {
        padding: 1,
        ..Conv2dConfig::default()
    };
    let (mut layers, mut params) = (Vec::new(), Vec::new());
    for (i, pair) in CHANNELS.windows(2).enumerate() {
        let w = Var::from_tensor(&normal(&mut stream, 0.1, &[pair[1], pair[0], 3, 3])?)?;
        layers.push(tape.conv2d(&w, None, same)?);
        params.push((format!("layer{i}"), w));
    }
    let w = Var::from_tensor(&normal(&mut stream, 0.1, &[10, 16])?)?;
    let head = tape.linear(&w, None)?;
    params.push(("head".to_string(), w));
    let (x, y) = (normal(&mut stream, 1.0, &[N, 3, 16, 16])?, labels(N)?);
    let config = GradSignConfig {
        tape: Some(tape),
        ..GradSignConfig::default()
    };
    let call = move || {
        let model = |x: &Tensor| {
            let mut h = x.clone();
            for layer in &layers {
                h = layer.forward(&h)?.relu()?;
            }
            head.forward(&h.mean((2, 3))?)
        };
        gradsign(model, &params, &x, &y, entropy, &config)?;
        Ok(())
    };
    session.measure(Case {
        slug: "gradsign",
        operation: "score, four 3x3 convolutions of 16 channels, 128 examples of 16x16".to_string(),
        ours: "gradsign, factored",
        call: Box::new(call),
        peer: Peer::Python(
            "torch.func convolution signs",
            json!({ "n": N, "channels": CHANNELS }),
        ),
    })
}

/// Channels and stride of the two convolutions of every block of ResNet-20.
const BLOCKS: [(usize, usize); 9] = [
    (16, 1),
    (16, 1),
    (16, 1),
    (32, 2),
    (32, 1),
    (32, 1),
    (64, 2),
    (64, 1),
    (64, 1),
];

/// The score of a network of ResNet-20's shape, without norms.
fn residual_signs(session: &mut Session<'_>) -> Result<()> {
    const N: usize = 128;
    let (mut stream, tape) = (RandomStream::new(0), SignTape::new());
    let mut params = Vec::new();
    let mut conv =
        |inputs: usize, out: usize, kernel: usize, stride: usize| -> Result<SignConv2d> {
            let std = (2.0 / (inputs * kernel * kernel) as f64).sqrt();
            let weight = normal(&mut stream, std, &[out, inputs, kernel, kernel])?;
            let weight = Var::from_tensor(&weight)?;
            params.push((format!("layer{}", params.len()), weight.clone()));
            let config = Conv2dConfig {
                padding: kernel / 2,
                stride,
                ..Conv2dConfig::default()
            };
            Ok(tape.conv2d(&weight, None, config)?)
        };
    let stem = conv(3, 16, 3, 1)?;
    let (mut blocks, mut inputs) = (Vec::new(), 16);
    for (out, stride) in BLOCKS {
        let pair = (conv(inputs, out, 3, stride)?, conv(out, out, 3, 1)?);
        let shortcut = match stride {
            1 => None,
            _ => Some(conv(inputs, out, 1, stride)?),
        };
        blocks.push((pair, shortcut));
        inputs = out;
    }
    let w = Var::from_tensor(&normal(&mut stream, 0.1, &[10, inputs])?)?;
    let head = tape.linear(&w, None)?;
    params.push(("head".to_string(), w));
    let (x, y) = (normal(&mut stream, 1.0, &[N, 3, 32, 32])?, labels(N)?);
    let config = GradSignConfig {
        tape: Some(tape),
        ..GradSignConfig::default()
    };
    let call = move || {
        let model = |x: &Tensor| {
            let mut h = stem.forward(x)?.relu()?;
            for ((first, second), shortcut) in &blocks {
                let inner = second.forward(&first.forward(&h)?.relu()?)?;
                let beside = match shortcut {
                    Some(layer) => layer.forward(&h)?,
                    None => h,
                };
                h = ((inner * 0.5)? + beside)?.relu()?;
            }
            head.forward(&h.mean((2, 3))?)
        };
        gradsign(model, &params, &x, &y, entropy, &config)?;
        Ok(())
    };
    session.measure(Case {
        slug: "gradsign",
        operation: "score, ResNet-20 without norms, 128 examples of 32x32".to_string(),
        ours: "gradsign, factored",
        call: Box::new(call),
        peer: Peer::Python(
            "torch.func residual signs",
            json!({ "n": N, "blocks": BLOCKS }),
        ),
    })
}

/// A hyper-gradient by ten iterations of conjugate gradient.
fn hyper(session: &mut Session<'_>, peer: &'static str) -> Result<()> {
    const N: usize = 10_000;
    const D: usize = 784;
    let mut stream = RandomStream::new(0);
    let (x, y) = (normal(&mut stream, 1.0, &[N, D])?, labels(N)?);
    let valid = (normal(&mut stream, 1.0, &[1000, D])?, labels(1000)?);
    let w = Var::zeros((10, D), DType::F32, &Device::Cpu)?;
    let layer = Linear::new(w.as_tensor().clone(), None);
    let decay = Var::zeros(1, DType::F32, &Device::Cpu)?;
    let call = move || {
        let lower = |_: &()| {
            let penalty = decay.exp()?.broadcast_mul(&w.sqr()?)?.sum_all()?;
            entropy(&layer.forward(&x)?, &y)? + (penalty * 0.5)?
        };
        let upper = |_: &()| entropy(&layer.forward(&valid.0)?, &valid.1);
        let named = |name: &str, var: &Var| vec![(name.to_string(), var.clone())];
        let (above, below) = (named("decay", &decay), named("w", &w));
        let mut problem = LossProblem::new(above, below, lower, upper, |_| Ok(()))?;
        let (a, b) = (problem.upper()?, problem.lower()?);
        let solve = LinearSolve::ConjugateGradient {
            iters: 10,
            tol: 0.0,
            damping: 0.0,
        };
        hypergradient(&mut problem, &a, &b, &solve, None)?;
        Ok(())
    };
    session.measure(Case {
        slug: "bo-rep",
        operation: "hyper-gradient, 10 iterations, logistic 10,000 x 784 x 10".to_string(),
        ours: "hypergradient, conjugate gradient",
        call: Box::new(call),
        peer: Peer::Python(peer, json!({ "n": N, "d": D })),
    })
}

/// The top eigenvalue of a perceptron's Hessian by ten products.
fn eigenvalue(session: &mut Session<'_>) -> Result<()> {
    const WIDTHS: [usize; 4] = [784, 256, 256, 10];
    const N: usize = 512;
    let mut stream = RandomStream::new(0);
    let mut vars = Vec::new();
    for pair in WIDTHS.windows(2) {
        vars.push(Var::from_tensor(&normal(
            &mut stream,
            0.05,
            &[pair[1], pair[0]],
        )?)?);
    }
    let layer = |i: usize, activation| {
        Linear::new(vars[i].as_tensor().clone(), None).with_activation(activation)
    };
    let [first, second] = [0, 1].map(|i| layer(i, Activation::Tanh));
    let last = layer(2, Activation::Identity);
    let (x, y) = (normal(&mut stream, 1.0, &[N, WIDTHS[0]])?, labels(N)?);
    let call = move || {
        let loss = || {
            let h = second.forward(&first.forward(&x)?)?;
            entropy(&last.forward(&h)?, &y)
        };
        let config = optim::diagnostics::opposing::LanczosConfig {
            k: 1,
            iters: 10,
            tol: 0.0,
        };
        loss_sharpness(loss, &vars, config, &mut RandomStream::new(1))?;
        Ok(())
    };
    session.measure(Case {
        slug: "opposing-signals",
        operation: "top Hessian eigenvalue, 10 products, perceptron 784-256-256-10, 512 examples"
            .to_string(),
        ours: "loss_sharpness",
        call: Box::new(call),
        peer: Peer::Python(
            "torch power iteration on Hessian products",
            json!({ "n": N, "widths": WIDTHS, "products": 11 }),
        ),
    })
}
