//! Routing tokens to experts by sparsity-constrained transport.

use super::{solve, Formulation, OtProblem, OtReg, OtSolver, SparsePlan};
use crate::error::check;
use crate::linalg::matrix;
use crate::{Error, Result};
use candle_core::{DType, Device, Module, Tensor};
use tensor_core::random::RandomStream;

/// How many tokens an expert takes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Capacity {
    /// So many.
    Tokens(usize),
    /// This multiple of an even share `tokens / experts`, rounded up.
    Factor(f64),
}

/// The cost of a pair of token and expert, from the gate `G` (a softmax over experts).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateCost {
    /// `-G`.
    NegGate,
    /// `-log G`.
    NegLogGate,
}

/// Settings of a [`SparseOtRouter`].
#[derive(Debug, Clone)]
pub struct SparseOtRouterConfig {
    /// Number of experts `n`.
    pub experts: usize,
    /// Tokens of an expert: `k` of the transport problem.
    pub capacity: Capacity,
    /// Weight of the quadratic term.
    pub gamma: f64,
    /// ADAM steps on the semi-dual, from zero.
    pub adam_steps: usize,
    /// Their size.
    pub adam_lr: f64,
    /// Standard deviation of the noise on the logits in training; `None` = `1 / experts`.
    pub noise_std: Option<f64>,
    /// The cost of a pair.
    pub cost: GateCost,
}

impl Default for SparseOtRouterConfig {
    fn default() -> Self {
        Self {
            experts: 8,
            capacity: Capacity::Factor(1.0),
            gamma: 1.0,
            adam_steps: 10,
            adam_lr: 1e-2,
            noise_std: None,
            cost: GateCost::NegGate,
        }
    }
}

impl SparseOtRouterConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::at_least("SparseOtRouterConfig::experts", self.experts, 1)?;
        match self.capacity {
            Capacity::Tokens(k) => check::at_least("SparseOtRouterConfig::capacity", k, 1)?,
            Capacity::Factor(f) => check::positive("SparseOtRouterConfig::capacity", f)?,
        }
        check::positive("SparseOtRouterConfig::gamma", self.gamma)?;
        check::positive("SparseOtRouterConfig::adam_lr", self.adam_lr)?;
        check::non_negative(
            "SparseOtRouterConfig::noise_std",
            self.noise_std.unwrap_or(0.0),
        )
    }
}

/// Where each token goes.
#[derive(Debug, Clone)]
pub struct Routing {
    /// The tokens of each expert, ascending: at most the capacity.
    pub tokens: Vec<Vec<u32>>,
    /// `[tokens, experts]`: the gate where a token goes to an expert, else 0. Differentiable through
    /// the gates; the choice itself is not differentiated.
    pub weights: Tensor,
    /// The gates `[tokens, experts]`.
    pub gates: Tensor,
    /// The transport plan behind the choice.
    pub plan: SparsePlan,
    /// The potentials of the tokens after the last step.
    pub alpha: Vec<f64>,
    /// Tokens without an expert.
    pub dropped: usize,
    /// Number of tokens of each expert.
    pub load: Vec<usize>,
}

/// Routes tokens to experts with a hard capacity: a few ADAM steps on the semi-dual of
/// `min <T, C> + gamma/2 |T|^2` with one unit of mass a token, an even share for each expert and at
/// most `k` tokens an expert. Compared with choosing the best expert per token it drops few tokens,
/// compared with an entropic plan nothing has to be cut after it.
#[derive(Debug, Clone)]
pub struct SparseOtRouter {
    config: SparseOtRouterConfig,
}

impl SparseOtRouter {
    /// A router.
    ///
    /// # Errors
    /// Those of [`SparseOtRouterConfig::validate`].
    pub fn new(config: SparseOtRouterConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config })
    }

    /// The settings.
    pub fn config(&self) -> &SparseOtRouterConfig {
        &self.config
    }

    /// Routes by logits `[tokens, experts]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for other shapes or no token, [`Error::NonFinite`] for bad logits.
    pub fn route(&self, logits: &Tensor) -> Result<Routing> {
        let (m, n, _) = matrix("logits", logits)?;
        if n != self.config.experts || m == 0 {
            let expected = format!("[tokens, {}] with a token", self.config.experts);
            return Err(Error::shape("logits", logits.dims(), expected));
        }
        // Half-precision gates would tie where the logits do not.
        let working = match logits.dtype() {
            DType::F64 => DType::F64,
            _ => DType::F32,
        };
        let gates = candle_nn::ops::softmax(&logits.to_dtype(working)?, 1)?;
        let (plan, alpha) = self.plan(&logits.detach().to_dtype(DType::F64)?, m, n)?;
        let tokens: Vec<Vec<u32>> = (0..n)
            .map(|j| plan.column(j).iter().map(|(i, _)| *i).collect())
            .collect();
        let mut placed = vec![false; m];
        let mut mask = vec![0.0f64; m * n];
        for (j, tokens) in tokens.iter().enumerate() {
            for &i in tokens {
                placed[i as usize] = true;
                mask[i as usize * n + j] = 1.0;
            }
        }
        let mask = Tensor::from_vec(mask, (m, n), &Device::Cpu)?
            .to_dtype(working)?
            .to_device(logits.device())?;
        Ok(Routing {
            weights: (&gates * mask)?.to_dtype(logits.dtype())?,
            gates: gates.to_dtype(logits.dtype())?,
            plan,
            alpha,
            dropped: placed.iter().filter(|p| !**p).count(),
            load: tokens.iter().map(Vec::len).collect(),
            tokens,
        })
    }

    /// Routes with noise on the logits, as in training.
    ///
    /// # Errors
    /// As [`route`](Self::route).
    pub fn route_noisy(&self, logits: &Tensor, stream: &mut RandomStream) -> Result<Routing> {
        let std = self
            .config
            .noise_std
            .unwrap_or(1.0 / self.config.experts as f64);
        let noise = stream.normal(0.0, std, logits.dims(), logits.dtype(), logits.device())?;
        self.route(&(logits + noise)?)
    }

    fn plan(&self, logits: &Tensor, m: usize, n: usize) -> Result<(SparsePlan, Vec<f64>)> {
        let config = &self.config;
        let share = m as f64 / n as f64;
        let k = match config.capacity {
            Capacity::Tokens(k) => k,
            Capacity::Factor(f) => (f * share).ceil().max(1.0) as usize,
        };
        let cost = match config.cost {
            GateCost::NegGate => candle_nn::ops::softmax(logits, 1)?.neg()?,
            GateCost::NegLogGate => candle_nn::ops::log_softmax(logits, 1)?.neg()?,
        };
        let cost: Vec<f64> = cost.flatten_all()?.to_vec1()?;
        let problem = OtProblem::from_slices(&vec![1.0; m], &vec![share; n], &cost)?;
        let solver = OtSolver::Adam {
            lr: config.adam_lr,
            steps: config.adam_steps,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
        };
        let reg = OtReg::KSparse {
            gamma: config.gamma,
            k,
        };
        let solution = solve(&problem, &reg, Formulation::SemiDual, &solver)?;
        Ok((solution.plan, solution.alpha))
    }
}

/// A mixture-of-experts layer: tokens go to experts by a [`SparseOtRouter`],
/// `y_i = sum_j G_ij [T_ij > 0] E_j(x_i)`. A token without an expert gives zero, so put the layer on a
/// residual connection.
///
/// ```
/// use candle_core::{DType, Device, Module, Var};
/// use candle_nn::Linear;
/// use tensor_core::random::RandomStream;
/// use thalweg_convex::transport::{SparseMoe, SparseOtRouterConfig};
///
/// let mut stream = RandomStream::new(1);
/// let mut draw = |shape: (usize, usize)| stream.normal(0.0, 0.3, shape, DType::F32, &Device::Cpu);
/// let gate = Var::from_tensor(&draw((4, 8))?)?;
/// let experts: Result<Vec<Linear>, tensor_core::Error> =
///     (0..4).map(|_| Ok(Linear::new(draw((8, 8))?, None))).collect();
/// let config = SparseOtRouterConfig { experts: 4, ..Default::default() };
/// let layer = SparseMoe::new(gate.as_tensor().clone(), experts?, config)?;
/// let x = draw((32, 8))?;
/// let y = (&x + layer.forward(&x)?)?;
/// assert!(y.sqr()?.sum_all()?.backward()?.get(&gate).is_some());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct SparseMoe<E> {
    router: SparseOtRouter,
    gate: Tensor,
    experts: Vec<E>,
}

impl<E: Module> SparseMoe<E> {
    /// Experts that map `[tokens, d]` to `[tokens, e]`, and the gate's weights `[experts, d]`.
    ///
    /// # Errors
    /// [`Error::Shape`] where gate, experts and configuration do not agree.
    pub fn new(gate: Tensor, experts: Vec<E>, config: SparseOtRouterConfig) -> Result<Self> {
        let expected = format!("[{}, features]", config.experts);
        if gate.rank() != 2 || gate.dim(0)? != config.experts {
            return Err(Error::shape("gate", gate.dims(), expected));
        }
        check::length("experts", experts.len(), config.experts)?;
        Ok(Self {
            router: SparseOtRouter::new(config)?,
            gate,
            experts,
        })
    }

    /// Output `[.., e]` and routing for `x` `[.., d]`; with a stream, noise is put on the logits.
    ///
    /// # Errors
    /// As [`SparseOtRouter::route`], and those of the experts.
    pub fn forward_t(
        &self,
        x: &Tensor,
        noise: Option<&mut RandomStream>,
    ) -> Result<(Tensor, Routing)> {
        let features = self.gate.dim(1)?;
        if x.dims().last() != Some(&features) {
            let expected = format!("[.., {features}]");
            return Err(Error::shape("x", x.dims(), expected));
        }
        let flat = x.reshape(((), features))?;
        let logits = flat.matmul(&self.gate.t()?)?;
        let routing = match noise {
            Some(stream) => self.router.route_noisy(&logits, stream)?,
            None => self.router.route(&logits)?,
        };
        let mut out: Option<Tensor> = None;
        for (j, (tokens, expert)) in routing.tokens.iter().zip(&self.experts).enumerate() {
            if tokens.is_empty() {
                continue;
            }
            let index = Tensor::from_vec(tokens.clone(), tokens.len(), x.device())?;
            let y = expert.forward(&flat.index_select(&index, 0)?)?;
            let weight = routing.weights.index_select(&index, 0)?.narrow(1, j, 1)?;
            let y = y.broadcast_mul(&weight)?;
            let so_far = match out {
                Some(out) => out,
                None => Tensor::zeros((flat.dim(0)?, y.dim(1)?), y.dtype(), y.device())?,
            };
            out = Some(so_far.index_add(&index, &y, 0)?);
        }
        // Every column of the plan carries mass, so some expert has a token.
        let out = out.ok_or_else(|| Error::config("tokens", 0, "at least 1"))?;
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = out.dim(1)?;
        }
        Ok((out.reshape(shape)?, routing))
    }
}

impl<E: Module> Module for SparseMoe<E> {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.forward_t(x, None)?.0)
    }
}
