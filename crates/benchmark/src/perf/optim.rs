//! Optimizer steps: pure memory traffic, so their ceiling is the copy bandwidth.

use super::{Ceiling, Kernel, Session};
use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::Optimizer;
use optim::consensus::{Cbo, CboConfig, Diffusion};
use optim::discovery::{Program, ProgramConfig, ProgramOptimizer};
use optim::{
    AdamW, AdamWConfig, Lion, LionConfig, ParamGroup, SgdConfig, SgdMomentum, Spam, SpamConfig,
};
use tensor_core::random::RandomStream;

/// Parameters with gradients that are there already.
pub struct Workload {
    /// The parameters.
    pub vars: Vec<Var>,
    /// A gradient for each.
    pub grads: GradStore,
}

impl Workload {
    /// Parameters of the given shapes, normal with a standard deviation of 0.02, and gradients
    /// of 0.001, in `f32` on the CPU.
    ///
    /// # Errors
    /// Those of candle.
    pub fn new(shapes: &[Vec<usize>]) -> Result<Self> {
        let mut stream = RandomStream::new(0).split("perf");
        let mut draw =
            |std: f64, shape: &[usize]| stream.normal(0.0, std, shape, DType::F32, &Device::Cpu);
        let (mut vars, mut grads) = (vec![], GradStore::default());
        for shape in shapes {
            let var = Var::from_tensor(&draw(0.02, shape)?)?;
            grads.insert(&var, draw(0.001, shape)?);
            vars.push(var);
        }
        Ok(Self { vars, grads })
    }

    /// Number of parameters.
    pub fn numel(&self) -> usize {
        self.vars.iter().map(|v| v.elem_count()).sum()
    }
}

/// About 200 tensors of very different sizes that together hold `parameters` numbers.
pub fn mixed_shapes(parameters: usize) -> Vec<Vec<usize>> {
    let unit = (parameters / 25_000).max(1);
    let mut shapes: Vec<Vec<usize>> = vec![];
    let mut left = parameters;
    for i in 0..199 {
        let size = match i % 4 {
            0 => unit,
            1 => 12 * unit,
            2 => 100 * unit,
            _ => 380 * unit,
        };
        let size = size.min(left.saturating_sub(1));
        if size > 0 {
            shapes.push(vec![size]);
            left -= size;
        }
    }
    shapes.push(vec![left]);
    shapes
}

/// The 148 tensors of GPT-2 with 124 million parameters.
pub fn gpt2_shapes() -> Vec<Vec<usize>> {
    let d = 768;
    let mut shapes = vec![vec![50_257, d], vec![1024, d]];
    for _ in 0..12 {
        shapes.extend([
            vec![d],
            vec![d],
            vec![d, 3 * d],
            vec![3 * d],
            vec![d, d],
            vec![d],
        ]);
        shapes.extend([
            vec![d],
            vec![d],
            vec![d, 4 * d],
            vec![4 * d],
            vec![4 * d, d],
            vec![d],
        ]);
    }
    shapes.extend([vec![d], vec![d]]);
    shapes
}

type Take<'a> = Box<dyn FnMut(&GradStore) -> Result<()> + Send + 'a>;

/// A named step, and the bytes per parameter that it must move.
struct Step<'a> {
    name: &'static str,
    bytes: f64,
    take: Take<'a>,
}

fn step<'a, O: Optimizer + Send + 'a>(
    name: &'static str,
    bytes: f64,
    mut optimizer: O,
) -> Step<'a> {
    Step {
        name,
        bytes,
        take: Box::new(move |grads| Ok(optimizer.step(grads)?)),
    }
}

const GROUP: &str = "optim";

/// The step of every rule.
pub(super) fn kernels(session: &mut Session<'_>) -> Result<()> {
    if !session.wants(GROUP) {
        return Ok(());
    }
    let work = Workload::new(&mixed_shapes(session.parameters()))?;
    for make in STEPS {
        let mut step = make(&work)?;
        let kernel = Kernel {
            name: step.name.to_string(),
            ceiling: Ceiling::Copy,
            per_element: step.bytes,
            elements: work.numel(),
            call: Box::new(|| (step.take)(&work.grads)),
        };
        session.measure(GROUP, kernel)?;
    }
    consensus(session)
}

/// A step of consensus-based optimization whose energies are there already and that draws no noise:
/// the consensus, the drift, and what the objective is handed.
fn consensus(session: &mut Session<'_>) -> Result<()> {
    const D: usize = 100;
    let n = (session.parameters() / (4 * D)).max(2);
    let mut stream = RandomStream::new(0);
    let start = stream.normal(0.0, 1.0, (n, D), DType::F64, &Device::Cpu)?;
    let energies = stream.normal(0.0, 1.0, n, DType::F64, &Device::Cpu)?;
    let config = CboConfig {
        diffusion: Diffusion::None,
        alpha: 1.0,
        ..CboConfig::default()
    };
    let mut cbo = Cbo::new(&start, config, stream)?;
    let known = |_: &Tensor| Ok(energies.clone());
    let kernel = Kernel {
        name: "consensus step, f64".to_string(),
        ceiling: Ceiling::Copy,
        // Read for the consensus; read and written by the drift.
        per_element: 24.0,
        elements: n * D,
        call: Box::new(|| {
            cbo.step(&known)?;
            Ok(())
        }),
    };
    session.measure(GROUP, kernel)
}

type Make = for<'a> fn(&'a Workload) -> Result<Step<'a>>;

/// One at a time: their states would not all fit into a small machine.
const STEPS: &[Make] = &[
    |w| {
        let config = SgdConfig::default();
        // Parameter, gradient and momentum in, parameter and momentum out.
        Ok(step(
            "SGD with momentum",
            20.0,
            SgdMomentum::new(w.vars.clone(), config)?,
        ))
    },
    |w| {
        let config = AdamWConfig::default();
        Ok(step("AdamW", 28.0, AdamW::new(w.vars.clone(), config)?))
    },
    |w| {
        let config = LionConfig::default();
        Ok(step("Lion", 20.0, Lion::new(w.vars.clone(), config)?))
    },
    |w| {
        let config = LionConfig {
            momentum_dtype: Some(DType::BF16),
            ..LionConfig::default()
        };
        Ok(step(
            "Lion, bf16 momentum",
            16.0,
            Lion::new(w.vars.clone(), config)?,
        ))
    },
    |w| {
        let config = ProgramConfig::new(Program::lion()?);
        Ok(step(
            "Lion as a program",
            // The tree that goes through unchanged is not touched.
            20.0,
            ProgramOptimizer::new(w.vars.clone(), config)?,
        ))
    },
    plain_lion,
    |w| {
        let config = SpamConfig::default();
        Ok(step(
            "SPAM, dense",
            28.0,
            Spam::new(w.vars.clone(), config)?,
        ))
    },
    |w| sparse(w, "SPAM, density 0.25", 1),
    |w| sparse(w, "SPAM, density 0.25 in blocks of 16", 16),
];

/// Lion by operations on tensors: what a rule costs that is neither a kernel nor a program.
fn plain_lion(w: &Workload) -> Result<Step<'_>> {
    let LionConfig {
        lr, beta1, beta2, ..
    } = LionConfig::default();
    let vars = w.vars.clone();
    let zeros = vars.iter().map(|v| v.zeros_like());
    let mut momenta: Vec<Tensor> = zeros.collect::<candle_core::Result<_>>()?;
    let take = move |grads: &GradStore| {
        for (var, m) in vars.iter().zip(&mut momenta) {
            let Some(g) = grads.get(var) else {
                continue;
            };
            let blend = ((&*m * beta1)? + (g * (1.0 - beta1))?)?;
            var.set(&(var.as_tensor() - (blend.sign()? * lr)?)?)?;
            *m = ((&*m * beta2)? + (g * (1.0 - beta2))?)?;
        }
        Ok(())
    };
    Ok(Step {
        name: "Lion by tensor operations",
        bytes: 20.0,
        take: Box::new(take),
    })
}

/// SPAM with momentum for a quarter of the entries.
fn sparse<'a>(w: &'a Workload, name: &'static str, block: usize) -> Result<Step<'a>> {
    let density = 0.25;
    let config = SpamConfig {
        density: Some(density),
        mask_block: block,
        // Never: a new mask is a rare event, not part of the step.
        delta_t: 0,
        ..SpamConfig::default()
    };
    let group = ParamGroup::new(w.vars.clone(), config);
    let spam = Spam::with_groups(vec![group], &RandomStream::new(0))?;
    let bytes = match block {
        // All of parameter and gradient move, because hardly a cache line has no set entry.
        1 => 12.0 + 1.0 / 8.0 + 16.0 * density,
        _ => 1.0 / 8.0 + 28.0 * density,
    };
    Ok(step(name, bytes, spam))
}
