//! Whole training steps of networks: ours beside torch and stock candle.

use super::{Row, Session, Worker};
use crate::machine::resident_bytes;
use crate::perf::{median, with_threads};
use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Module, ModuleT, Tensor, Var, D};
use candle_nn::{Optimizer, VarBuilder};
use nn::init::SeededVars;
use nn::loss::{cross_entropy, Reduction};
use nn::models::{
    Activation, BatchNormKind, ConvNet, ConvNetConfig, Mlp, MlpConfig, ResNet, ResNetConfig,
    TransformerConfig, TransformerLm, UNet, UNetConfig,
};
use optim::{AdamW, AdamWConfig};
use serde_json::{json, Value};
use std::io::{BufRead, Write};
use std::path::Path;
use std::time::{Duration, Instant};
use tensor_core::random::RandomStream;

const GROUP: &str = "nn";

/// What a step is divided into.
const PARTS: [&str; 4] = ["forward", "backward", "optimizer step", "whole step"];

/// Half of the entries of a gradient may differ from torch's by this much of their root mean square,
const TOLERANCE: f64 = 1e-4;
/// and all together by this much: a unit whose sum is zero but for rounding may be on in one and off
/// in the other, which moves a few entries.
const FLIPPED: f64 = 0.02;

/// Threads of one side that wait for work without sleep would take a core of the other side.
const PAUSE: Duration = Duration::from_millis(100);

type Loss = Box<dyn Fn() -> Result<Tensor> + Send + Sync>;

/// A network with its data.
struct Network {
    vars: Vec<(String, Var)>,
    /// What the peer needs besides the parameters.
    data: Vec<(&'static str, Tensor)>,
    loss: Loss,
}

/// A kind of network that is compared.
struct Kind {
    slug: &'static str,
    title: &'static str,
    peer: &'static str,
    /// The sizes, for the peer.
    spec: fn() -> Value,
    ours: fn() -> Result<Network>,
    /// Of stock candle layers.
    stock: Option<fn() -> Result<Network>>,
}

const KINDS: &[Kind] = &[
    Kind {
        slug: "mlp",
        title: "MLP 784-1024-1024-10, batch 256",
        peer: "torch mlp",
        spec: || json!({ "widths": MLP }),
        ours: || mlp(|config, vb| Ok(Box::new(Mlp::new(config, vb)?))),
        stock: Some(|| mlp(|config, vb| Ok(Box::new(StockMlp::new(config, vb)?)))),
    },
    Kind {
        slug: "cnn",
        title: "CNN 3-32-64-64 of 3x3, 32x32, batch 64",
        peer: "torch cnn",
        spec: || json!({ "widths": CNN }),
        ours: || cnn(|config, vb| Ok(Box::new(ConvNet::new(config, vb)?))),
        stock: Some(|| cnn(|config, vb| Ok(Box::new(StockConvNet::new(config, vb)?)))),
    },
    Kind {
        slug: "resnet",
        title: "ResNet-8 of width 32 with batch norm, 32x32, batch 64",
        peer: "torch resnet",
        spec: || json!({ "width": 32, "blocks": 1 }),
        ours: resnet,
        stock: None,
    },
    Kind {
        slug: "transformer",
        title: "transformer, d 256, 4 layers, 8 heads, sequence 128, batch 16",
        peer: "torch transformer",
        spec: || {
            json!({
                "dim": 256, "vocabulary": 256, "time": TIME, "heads": 8, "hidden": 1024,
                "layers": 4,
            })
        },
        ours: transformer,
        stock: None,
    },
    Kind {
        slug: "unet",
        title: "UNet 32-64-128, 28x28, batch 32",
        peer: "torch unet",
        spec: || json!({ "channels": [32, 64, 128], "groups": 8, "embedding": 128 }),
        ours: unet,
        stock: None,
    },
];

const MLP: [usize; 4] = [784, 1024, 1024, 10];
const CNN: [usize; 4] = [3, 32, 64, 64];
const TIME: usize = 128;

fn root() -> RandomStream {
    RandomStream::new(0).split("networks")
}

fn normal(label: &str, shape: &[usize]) -> Result<Tensor> {
    let mut stream = root().split(label);
    Ok(stream.normal(0.0, 1.0, shape, DType::F32, &Device::Cpu)?)
}

fn labels(count: usize, classes: usize) -> Result<Tensor> {
    let mut stream = root().split("labels");
    let draw = |_| Ok(stream.below(classes)? as u32);
    let labels: Result<Vec<u32>> = (0..count).map(draw).collect();
    Ok(Tensor::from_vec(labels?, count, &Device::Cpu)?)
}

/// A classifier of `input`, with its variables.
fn classifier(
    input: Tensor,
    make: impl Fn(VarBuilder<'static>) -> Result<Box<dyn ModuleT + Send + Sync>>,
) -> Result<Network> {
    let vars = SeededVars::new(&root());
    let net = make(vars.builder(DType::F32, &Device::Cpu))?;
    let labels = labels(input.dim(0)?, 10)?;
    let data = vec![("input", input.clone()), ("labels", labels.clone())];
    Ok(Network {
        vars: vars.trainable(),
        data,
        loss: Box::new(move || {
            let logits = net.forward_t(&input, true)?;
            Ok(cross_entropy(&logits, &labels, Reduction::Mean)?)
        }),
    })
}

type Make<C> = fn(&C, VarBuilder<'static>) -> Result<Box<dyn ModuleT + Send + Sync>>;

fn mlp(make: Make<MlpConfig>) -> Result<Network> {
    let config = MlpConfig::new(&MLP);
    classifier(normal("input", &[256, MLP[0]])?, |vb| make(&config, vb))
}

fn cnn(make: Make<ConvNetConfig>) -> Result<Network> {
    let config = ConvNetConfig {
        input_channels: CNN[0],
        channels: CNN[1..].to_vec(),
        norm: BatchNormKind::None,
        ..Default::default()
    };
    classifier(normal("input", &[64, 3, 32, 32])?, |vb| make(&config, vb))
}

fn resnet() -> Result<Network> {
    let config = ResNetConfig {
        width: 32,
        ..Default::default()
    };
    classifier(normal("input", &[64, 3, 32, 32])?, |vb| {
        Ok(Box::new(ResNet::new(&config, vb)?))
    })
}

fn transformer() -> Result<Network> {
    let config = TransformerConfig {
        vocabulary: 256,
        dim: 256,
        layers: 4,
        heads: 8,
        feed_forward: 1024,
        max_length: TIME,
        pre_norm: true,
        activation: Activation::Gelu,
        ..Default::default()
    };
    let vars = SeededVars::new(&root());
    let net = TransformerLm::new(&config, vars.builder(DType::F32, &Device::Cpu))?;
    let tokens = labels(16 * (TIME + 1), 256)?.reshape((16, TIME + 1))?;
    let input = tokens.narrow(1, 0, TIME)?.contiguous()?;
    let labels = tokens.narrow(1, 1, TIME)?.contiguous()?;
    let data = vec![("input", input.clone()), ("labels", labels.clone())];
    Ok(Network {
        vars: vars.trainable(),
        data,
        loss: Box::new(move || {
            let logits = net.forward(&input, true)?;
            Ok(cross_entropy(&logits, &labels, Reduction::Mean)?)
        }),
    })
}

fn unet() -> Result<Network> {
    let vars = SeededVars::new(&root());
    let net = UNet::new(
        &UNetConfig::default(),
        vars.builder(DType::F32, &Device::Cpu),
    )?;
    let input = normal("input", &[32, 1, 28, 28])?;
    let target = normal("target", &[32, 1, 28, 28])?;
    let mut levels = root().split("level");
    let level = levels.uniform(0.0, 1.0, 32, DType::F32, &Device::Cpu)?;
    let data = vec![
        ("input", input.clone()),
        ("level", level.clone()),
        ("target", target.clone()),
    ];
    Ok(Network {
        vars: vars.trainable(),
        data,
        loss: Box::new(move || {
            let difference = (net.forward(&input, &level, None)? - &target)?;
            Ok(difference.sqr()?.mean_all()?)
        }),
    })
}

/// The same networks of candle_nn's layers, with the same variables.
struct StockMlp(Vec<candle_nn::Linear>);

impl StockMlp {
    fn new(config: &MlpConfig, vb: VarBuilder) -> Result<Self> {
        let pairs = config.widths.windows(2).enumerate();
        let layers = pairs.map(|(i, w)| candle_nn::linear(w[0], w[1], vb.pp("layers").pp(i)));
        Ok(Self(layers.collect::<candle_core::Result<_>>()?))
    }
}

impl ModuleT for StockMlp {
    fn forward_t(&self, x: &Tensor, _: bool) -> candle_core::Result<Tensor> {
        let mut h = x.clone();
        for (i, layer) in self.0.iter().enumerate() {
            h = layer.forward(&h)?;
            if i + 1 < self.0.len() {
                h = h.relu()?;
            }
        }
        Ok(h)
    }
}

struct StockConvNet(Vec<candle_nn::Conv2d>, candle_nn::Linear);

impl StockConvNet {
    fn new(config: &ConvNetConfig, vb: VarBuilder) -> Result<Self> {
        let padded = candle_nn::Conv2dConfig {
            padding: 1,
            ..Default::default()
        };
        let mut inputs = config.input_channels;
        let mut layers = vec![];
        for (i, outputs) in config.channels.iter().enumerate() {
            let vb = vb.pp("units").pp(i).pp("conv");
            layers.push(candle_nn::conv2d(inputs, *outputs, 3, padded, vb)?);
            inputs = *outputs;
        }
        let head = candle_nn::linear(inputs, config.classes, vb.pp("head"))?;
        Ok(Self(layers, head))
    }
}

impl ModuleT for StockConvNet {
    fn forward_t(&self, x: &Tensor, _: bool) -> candle_core::Result<Tensor> {
        let mut h = x.clone();
        for (i, layer) in self.0.iter().enumerate() {
            h = layer.forward(&h)?.relu()?;
            if i + 1 < self.0.len() {
                h = h.max_pool2d(2)?;
            }
        }
        self.1.forward(&h.mean(D::Minus1)?.mean(D::Minus1)?)
    }
}

/// One side of a comparison: a step, and the seconds of its parts.
type Step<'a> = Box<dyn FnMut() -> Result<Vec<f64>> + Send + 'a>;

fn step(network: &Network, mut optimizer: impl Optimizer + Send + 'static) -> Step<'_> {
    Box::new(move || {
        let mut times = vec![Instant::now()];
        let loss = (network.loss)()?;
        times.push(Instant::now());
        let grads = loss.backward()?;
        // The graph is freed here, as torch frees it while it runs backward.
        drop(loss);
        times.push(Instant::now());
        optimizer.step(&grads)?;
        drop(grads);
        times.push(Instant::now());
        let parts = times.windows(2).map(|t| (t[1] - t[0]).as_secs_f64());
        let mut parts: Vec<f64> = parts.collect();
        parts.push(parts.iter().sum());
        Ok(parts)
    })
}

fn variables(network: &Network) -> Vec<Var> {
    network.vars.iter().map(|(_, var)| var.clone()).collect()
}

fn adamw(network: &Network) -> Result<AdamW> {
    let config = AdamWConfig {
        lr: 1e-6,
        ..Default::default()
    };
    Ok(AdamW::new(variables(network), config)?)
}

pub(super) fn cases(session: &mut Session<'_>) -> Result<()> {
    for kind in KINDS {
        if !session.wants(GROUP, kind.slug) {
            continue;
        }
        let network = (kind.ours)()?;
        if kind.stock.is_some() {
            candle(session, kind, &network)?;
        }
        let mut counts = vec![1, session.threads];
        counts.dedup();
        for threads in counts {
            torch(session, kind, &network, threads)?;
        }
    }
    Ok(())
}

/// Beside stock candle.
fn candle(session: &mut Session<'_>, kind: &Kind, network: &Network) -> Result<()> {
    let threads = session.threads;
    let mut theirs = Worker::candle(threads, true)?;
    let answer = theirs.prepare(kind.slug, threads, json!({ "stock": true }))?;
    let theirs_loss = answer["loss"].as_f64().context("the peer gave no loss")?;
    let loss = f64::from((network.loss)()?.to_scalar::<f32>()?);
    ensure!(
        (loss - theirs_loss).abs() < TOLERANCE * loss.abs(),
        "the loss {loss} differs from stock candle's {theirs_loss}"
    );
    let theirs: Step = Box::new(move || theirs.run_parts());
    rows(session, kind, "candle_nn", threads, theirs)
}

/// Trains networks for another process: requests and answers are JSON, one a line.
///
/// # Errors
/// A request that makes no sense, those of the networks, and of reading and writing.
pub fn serve(input: impl BufRead, out: &mut dyn Write) -> Result<()> {
    let mut lines = input.lines();
    while let Some(line) = lines.next() {
        let request: Value = serde_json::from_str(&line?)?;
        let slug = request["set"].as_str().context("nothing to set")?;
        let kind = KINDS.iter().find(|kind| kind.slug == slug);
        let kind = kind.with_context(|| format!("no network `{slug}`"))?;
        let threads = request["threads"].as_u64().context("no threads")? as usize;
        let stock = request["stock"] == json!(true);
        let network = match (stock, kind.stock) {
            (true, Some(make)) => with_values_of(make()?, &(kind.ours)()?)?,
            (true, None) => bail!("`{slug}` has no form of stock layers"),
            (false, _) => (kind.ours)()?,
        };
        let loss = (network.loss)()?.to_scalar::<f32>()?;
        answer(out, &json!({ "loss": loss }))?;
        let mut step = match stock {
            true => {
                let params = candle_nn::ParamsAdamW {
                    lr: 1e-6,
                    ..Default::default()
                };
                step(
                    &network,
                    candle_nn::AdamW::new(variables(&network), params)?,
                )
            }
            false => step(&network, adamw(&network)?),
        };
        for line in lines.by_ref() {
            let request: Value = serde_json::from_str(&line?)?;
            if request["run"] == json!(true) {
                let parts = with_threads(threads, &mut step)??;
                answer(out, &json!({ "parts": parts }))?;
            } else {
                answer(out, &json!({}))?;
                break;
            }
        }
    }
    Ok(())
}

/// candle_nn's layers ask for other initial values than ours do.
fn with_values_of(network: Network, ours: &Network) -> Result<Network> {
    for (name, var) in &network.vars {
        let value = ours.vars.iter().find(|(other, _)| other == name);
        let (_, value) = value.with_context(|| format!("ours has no variable `{name}`"))?;
        var.set(value)?;
    }
    Ok(network)
}

fn answer(out: &mut dyn Write, value: &Value) -> Result<()> {
    writeln!(out, "{value}")?;
    Ok(out.flush()?)
}

fn torch(session: &mut Session<'_>, kind: &Kind, network: &Network, threads: usize) -> Result<()> {
    let Some(mut worker) = session.worker.take() else {
        tracing::warn!(
            peer = kind.peer,
            "left out: no Python interpreter was given"
        );
        return Ok(());
    };
    let folder = tempfile::tempdir()?;
    let mut spec = (kind.spec)();
    let gradients = folder.path().join("gradients");
    spec["file"] = json!(folder.path().join("tensors"));
    spec["gradients"] = json!(gradients);
    spec["tensors"] = json!(write(network, &folder.path().join("tensors"))?);
    worker.set(kind.peer, threads, spec.clone())?;
    check(network, &gradients)?;
    rows(
        session,
        kind,
        "torch",
        threads,
        Box::new(|| worker.run_parts()),
    )?;
    worker.end()?;
    session.worker = Some(worker);
    let (Some(python), Some(row)) = (session.python, session.rows.last_mut()) else {
        return Ok(());
    };
    // Each in a process that has done nothing else.
    spec["memory"] = json!(true);
    let mut fresh = Worker::start(python)?;
    fresh.set(kind.peer, threads, spec)?;
    let theirs = fresh.run_parts()?;
    let theirs = theirs.first().context("the peer gave no memory")? / 1e6;
    row.memory = Some([in_a_process(kind.slug, threads)? / 1e6, theirs]);
    Ok(())
}

/// Peak bytes of one step of ours in a process of its own.
fn in_a_process(slug: &str, threads: usize) -> Result<f64> {
    let this = std::env::current_exe().context("this program has no path")?;
    let output = std::process::Command::new(this)
        .args(["peers", "--memory-of", slug])
        .env("RAYON_NUM_THREADS", threads.to_string())
        .output()
        .context("this program cannot be started again")?;
    ensure!(
        output.status.success(),
        "the measurement of memory failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8_lossy(&output.stdout);
    text.trim().parse().context("no number of bytes")
}

/// Bytes by which the first step of a network raises this process's resident memory at most.
///
/// # Errors
/// An unknown network, those of the step, and where the system does not tell (it is Linux that does).
pub fn memory(slug: &str) -> Result<f64> {
    let kind = KINDS.iter().find(|kind| kind.slug == slug);
    let kind = kind.with_context(|| format!("no network `{slug}`"))?;
    let before = resident_bytes("VmRSS:")?;
    let network = (kind.ours)()?;
    step(&network, adamw(&network)?)()?;
    Ok(resident_bytes("VmHWM:")? - before)
}

/// All tensors into one file, in f32; gives their names and shapes.
fn write(network: &Network, path: &Path) -> Result<Vec<(String, Vec<usize>)>> {
    let vars = network
        .vars
        .iter()
        .map(|(name, var)| (name.clone(), var.as_tensor()));
    let data = network
        .data
        .iter()
        .map(|(name, tensor)| (name.to_string(), tensor));
    let mut bytes = vec![];
    let mut shapes = vec![];
    for (name, tensor) in vars.chain(data) {
        let flat = tensor
            .flatten_all()?
            .to_dtype(DType::F32)?
            .to_vec1::<f32>()?;
        bytes.extend(flat.into_iter().flat_map(f32::to_ne_bytes));
        shapes.push((name, tensor.dims().to_vec()));
    }
    std::fs::write(path, bytes).context("cannot write the peer's weights")?;
    Ok(shapes)
}

/// Both sides must compute the same before they are timed.
fn check(network: &Network, path: &Path) -> Result<()> {
    let grads = (network.loss)()?.backward()?;
    let bytes = std::fs::read(path).context("the peer wrote no gradients")?;
    let mut theirs = bytes
        .chunks_exact(4)
        .map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
    for (name, var) in &network.vars {
        let grad = grads
            .get(var)
            .with_context(|| format!("`{name}` has no gradient"))?;
        let ours = grad.flatten_all()?.to_vec1::<f32>()?;
        let theirs: Vec<f32> = theirs.by_ref().take(ours.len()).collect();
        ensure!(
            theirs.len() == ours.len(),
            "the peer's gradients end before `{name}`"
        );
        let squares: f64 = theirs.iter().map(|x| f64::from(*x).powi(2)).sum();
        // A gradient that is zero but for rounding has no digits to compare.
        let scale = (squares / ours.len() as f64).sqrt().max(1e-6);
        let errors = ours.iter().zip(&theirs).map(|(a, b)| f64::from(*a - *b));
        let mut errors: Vec<f64> = errors.map(|e| (e / scale).abs()).collect();
        let mean = (errors.iter().map(|e| e * e).sum::<f64>() / errors.len() as f64).sqrt();
        errors.sort_by(f64::total_cmp);
        let middle = errors[errors.len() / 2];
        ensure!(
            mean < FLIPPED && middle < TOLERANCE,
            "the gradient of `{name}` differs from torch's by {mean:.1e} of its norm, half of the \
             entries by {middle:.1e} or more"
        );
    }
    if theirs.next().is_some() {
        bail!("the peer has more gradients than ours");
    }
    Ok(())
}

/// As in a training loop, the measured step follows another one at once.
fn after_a_step(step: &mut dyn FnMut() -> Result<Vec<f64>>) -> Result<Vec<f64>> {
    std::thread::sleep(PAUSE);
    step()?;
    step()
}

/// Runs both sides in turn, each in a process of its own.
fn rows(
    session: &mut Session<'_>,
    kind: &Kind,
    peer: &str,
    threads: usize,
    mut theirs: Step<'_>,
) -> Result<()> {
    tracing::info!(network = kind.title, peer, threads, "measuring");
    let mut ours = Worker::candle(threads, false)?;
    ours.set(kind.slug, threads, json!({}))?;
    let mut times = vec![(vec![], vec![]); PARTS.len()];
    // The first round warms both up.
    for round in 0..=session.rounds {
        let (a, b) = (
            after_a_step(&mut || ours.run_parts())?,
            after_a_step(&mut theirs)?,
        );
        for (times, (a, b)) in times.iter_mut().zip(a.into_iter().zip(b)) {
            if round > 0 {
                times.0.push(a);
                times.1.push(b);
            }
        }
    }
    for (part, (mine, theirs)) in PARTS.iter().zip(times) {
        let ratios = mine.iter().zip(&theirs).map(|(a, b)| b / a).collect();
        session.rows.push(Row {
            slug: kind.slug.to_string(),
            operation: format!("{}: {part}", kind.title),
            ours: "thalweg".to_string(),
            peer: peer.to_string(),
            threads,
            our_milliseconds: 1e3 * median(mine),
            peer_milliseconds: 1e3 * median(theirs),
            ratio: median(ratios),
            memory: None,
        });
    }
    Ok(())
}
