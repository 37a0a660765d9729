//! Block coordinate descent with greedy rules, better block updates and message passing.
//!
//! For fitting wide sparse models (least squares, logistic, multinomial, L1 and non-negative) and
//! graph quadratics, where a few coordinates a step beat whole gradients. *Let's Make Block Coordinate
//! Descent Converge Faster*, Nutini, Laradji, Schmidt, JMLR 2022, arXiv 1712.08859.
//!
//! `min f(x) + sum_i g_i(x_i)`: pick a block `b`, then `x_b <- x_b + d_b`. With `g_b` the block's
//! gradient, `H_b` a bound of its Hessian, `L_b` the largest eigenvalue of `H_b`, `L_i` the
//! coordinates' constants:
//!
//! ```text
//! rules     GS |g_b|^2    GSL |g_b|^2 / L_b    GSD sum g_i^2 / D_i    GSQ g_b' H_b^-1 g_b
//! updates   -g_b / L_b    -pinv(H_b) g_b       Newton with a line search, exact along a tree
//! prox      x_b <- prox_{g / L_b}(x_b - g_b / L_b), two-metric projection, proximal Newton
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `tau` | [`BlockCdConfig::block_size`] |
//! | `g` | [`Penalty`] |
//! | rule, blocks, update | [`Select`], [`Partition`], [`Update`] |
//!
//! Greedy rules need the whole gradient at every step, random and cyclic ones a block of it: compare
//! seconds, not steps. Blocks larger than the number of non-zeros with [`Update::TwoMetric`] or
//! [`Update::ProxNewton`] find the non-zeros and then end in a few steps.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use thalweg_convex::block_cd::*;
//! use thalweg_convex::RandomStream;
//!
//! let a = Tensor::new(&[[1.0, 0.5, 0.0], [0.0, 1.0, 0.2], [0.3, 0.0, 1.0], [1.0, 1.0, 1.0]], &Device::Cpu)?;
//! let mut lasso = LeastSquares::new(Columns::new(&a)?, &[1.0, 0.1, 0.0, 1.0])?;
//! let solver = BlockCd::new(BlockCdConfig {
//!     penalty: Penalty::L1(0.1),
//!     select: Select::ProxGsq,
//!     update: Update::ProxGradient,
//!     block_size: 1,
//!     tol: 1e-9,
//!     ..Default::default()
//! })?;
//! let report = solver.solve(&mut lasso, &[0.0; 3], &mut RandomStream::new(0))?;
//! assert!(report.converged && report.gap.unwrap() < 1e-8);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod columns;
mod objective;
mod partition;
mod select;
mod tree;
mod update;

pub use columns::Columns;
pub use objective::{LabelPropagation, LeastSquares, Logistic, SmoothObjective, Softmax};
pub use partition::fixed_blocks;
pub use select::block_scores;
pub use tree::{
    color_graph, forest_partition, greedy_forest, lattice_red_black, lattice_trees, solve_forest,
    Graph,
};

use crate::error::check;
use crate::linalg::max_abs;
use crate::{Error, RandomStream, Result};
#[cfg(feature = "verify")]
pub(crate) use select::threshold_iteratively;
use select::Selector;
use std::time::Instant;
use update::Step;

/// The separable term `sum_i g_i(x_i)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Penalty {
    /// None.
    None,
    /// `l1 |x|_1`
    L1(f64),
    /// `x >= 0`, with `l1 sum x`.
    NonNegative {
        /// Weight of the sum; 0 for the constraint alone.
        l1: f64,
    },
    /// `lo <= x <= hi`
    Box {
        /// Lower end.
        lo: f64,
        /// Upper end.
        hi: f64,
    },
}

impl Penalty {
    /// Checks weights and ends.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a negative weight or an empty box.
    pub fn validate(&self) -> Result<()> {
        match *self {
            Self::None => Ok(()),
            Self::L1(l1) => check::non_negative("Penalty::L1", l1),
            Self::NonNegative { l1 } => check::non_negative("Penalty::NonNegative::l1", l1),
            Self::Box { lo, hi } if lo <= hi => Ok(()),
            Self::Box { lo, hi } => Err(Error::config(
                "Penalty::Box",
                format!("[{lo}, {hi}]"),
                "lo <= hi",
            )),
        }
    }

    /// `sum_i g_i(x_i)`; infinite outside the constraints.
    pub fn value(&self, x: &[f64]) -> f64 {
        let sum = || x.iter().map(|x| x.abs()).sum::<f64>();
        match *self {
            Self::None => 0.0,
            Self::L1(l1) => l1 * sum(),
            Self::NonNegative { l1 } if x.iter().all(|x| *x >= 0.0) => l1 * sum(),
            Self::Box { lo, hi } if x.iter().all(|x| (lo..=hi).contains(x)) => 0.0,
            _ => f64::INFINITY,
        }
    }

    /// `g(x + d) - g(x)` inside the constraints, without cancellation where it is linear.
    fn change(&self, x: f64, d: f64) -> f64 {
        match *self {
            Self::L1(l1) if x * (x + d) > 0.0 => l1 * d * x.signum(),
            Self::L1(l1) => l1 * ((x + d).abs() - x.abs()),
            Self::NonNegative { l1 } => l1 * d,
            Self::None | Self::Box { .. } => 0.0,
        }
    }

    /// `argmin_y g(y) + (y - v)^2 / (2 step)`
    pub fn prox(&self, v: f64, step: f64) -> f64 {
        match *self {
            Self::None => v,
            Self::L1(l1) => v.signum() * (v.abs() - l1 * step).max(0.0),
            Self::NonNegative { l1 } => (v - l1 * step).max(0.0),
            Self::Box { lo, hi } => v.clamp(lo, hi),
        }
    }
}

/// Where blocks come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Partition {
    /// Any `tau` coordinates.
    Variable,
    /// One of these blocks, cut once.
    Fixed(FixedRule),
}

/// How coordinates are cut into blocks; the last one is shorter where `tau` does not divide.
#[derive(Debug, Clone, PartialEq)]
pub enum FixedRule {
    /// As they come.
    Order,
    /// By ascending `L_i`: alike with alike. The best rule in the paper.
    Sort,
    /// Smallest, largest, second smallest, second largest, ... `L_i`.
    Avg,
    /// As `Sort`, by `sum_j |H_ij|`.
    HSort,
    /// As `Avg`, by `sum_j |H_ij|`.
    HAvg,
    /// These.
    Given(Vec<Vec<usize>>),
}

/// The diagonal `D` of the GSD rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiagBound {
    /// `sum_j |H_ij|`
    RowSum,
    /// `tau L_i`, a valid bound for blocks of `tau`.
    TauLi,
    /// `L_i`
    Li,
}

/// How GSQ finds its block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GsqSolver {
    /// Tries all blocks; for fixed ones.
    Exact,
    /// Iterative hard thresholding of the quadratic model; for variable ones, where the exact rule is
    /// NP-hard.
    Iht {
        /// Most iterations.
        iters: usize,
    },
}

impl Select {
    /// Whether blocks are chosen by the gradient of the smooth part alone.
    fn scores_gradients(&self) -> bool {
        match self {
            Self::Gs | Self::Gsl | Self::Gsd(_) | Self::Gsq(_) => true,
            Self::Tree(rule) => matches!(
                rule,
                TreeRule::GreedyGs
                    | TreeRule::GreedyGsd
                    | TreeRule::GreedyGsl
                    | TreeRule::Dense { .. }
            ),
            Self::Random | Self::Cyclic | Self::Perm | Self::LipschitzSampling | Self::ProxGsq => {
                false
            }
        }
    }
}

/// Which nodes a graph rule takes.
#[derive(Debug, Clone, PartialEq)]
pub enum TreeRule {
    /// Greedy forest by `|g_i|`.
    GreedyGs,
    /// Greedy forest by `|g_i| / sqrt(L_i)`.
    GreedyGsd,
    /// Greedy forest by `|g_i| / sqrt(sum_j |H_ij|)`.
    GreedyGsl,
    /// Greedy forest in random order.
    RandomTree,
    /// A partition into forests, in turn.
    TreePartition(Layout),
    /// A coloring, in turn: each block is diagonal.
    RedBlack(Layout),
    /// The `size` coordinates with the largest `|g_i|`, solved densely; `None` = the cube root of the
    /// number of coordinates, for the same cost as a tree.
    Dense {
        /// How many.
        size: Option<usize>,
    },
}

/// The shape of a graph.
#[derive(Debug, Clone, PartialEq)]
pub enum Layout {
    /// A lattice whose node at row `r` of column `c` has the number `c * rows + r`.
    Lattice {
        /// Rows.
        rows: usize,
        /// Columns.
        columns: usize,
        /// The node of each coordinate.
        nodes: Vec<usize>,
    },
    /// Any: nodes go to blocks one by one, by descending `L_i`.
    General,
}

/// Which block comes next.
#[derive(Debug, Clone, PartialEq)]
pub enum Select {
    /// Uniformly at random.
    Random,
    /// In order; variable blocks are cut from the order of the coordinates.
    Cyclic,
    /// In an order that is drawn again each time all have had their turn.
    Perm,
    /// With probability proportional to the Lipschitz constant (of blocks or coordinates).
    LipschitzSampling,
    /// Largest gradient.
    Gs,
    /// Largest `|g_b|^2 / L_b`; for fixed blocks.
    Gsl,
    /// Largest `sum g_i^2 / D_i`.
    Gsd(DiagBound),
    /// Largest `g_b' H_b^-1 g_b`.
    Gsq(GsqSolver),
    /// Blocks along a graph; the objective must have one.
    Tree(TreeRule),
    /// Largest progress of a proximal coordinate step.
    ProxGsq,
}

/// What happens to the block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Update {
    /// `-g_b / L_b`
    Gradient,
    /// `-g_b / L` with an estimate that starts at 1 and doubles until the step decreases enough. The
    /// estimates stand in for `L_i` in the rules.
    AdaptiveLipschitz,
    /// `-pinv(H_b) g_b`
    MatrixBound,
    /// `-alpha pinv(hess_b) g_b`
    Newton {
        /// Whether `alpha` is found by backtracking; else it is 1.
        line_search: bool,
    },
    /// `A_bb d = -g_b` by message passing; the block must be a forest.
    ExactTree,
    /// A proximal gradient step with `1 / L_b`.
    ProxGradient,
    /// Two-metric projection: Newton on the coordinates that are free, a scaled gradient on those at
    /// zero; for [`Penalty::NonNegative`].
    TwoMetric,
    /// Minimises the quadratic model with the penalty exactly, then backtracks.
    ProxNewton,
}

/// How gradients of a fixed block are measured by GS, GSL and GSD.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScoreNorm {
    /// Squares, as in the paper.
    L2,
    /// Absolute values, as in the authors' code.
    L1,
}

/// Settings of [`BlockCd`].
#[derive(Debug, Clone, PartialEq)]
pub struct BlockCdConfig {
    /// The separable term.
    pub penalty: Penalty,
    /// Where blocks come from.
    pub partition: Partition,
    /// Which comes next.
    pub select: Select,
    /// What happens to it.
    pub update: Update,
    /// How fixed blocks are scored.
    pub score_norm: ScoreNorm,
    /// Coordinates of a block, `tau`.
    pub block_size: usize,
    /// Most steps.
    pub max_iter: usize,
    /// Stops when a proximal coordinate step moves nothing by more than this, in units of the
    /// gradient; 0 = never.
    pub tol: f64,
    /// Stops when the duality gap is at most this, for objectives that have one; looked at whenever the
    /// rule computes the whole gradient.
    pub gap_tol: Option<f64>,
    /// Stops when the objective is at most this.
    pub target: Option<f64>,
    /// Sufficient decrease of line searches.
    pub armijo: f64,
}

impl Default for BlockCdConfig {
    fn default() -> Self {
        Self {
            penalty: Penalty::None,
            partition: Partition::Variable,
            select: Select::Gsd(DiagBound::Li),
            update: Update::MatrixBound,
            score_norm: ScoreNorm::L2,
            block_size: 5,
            max_iter: 500,
            tol: 1e-8,
            gap_tol: None,
            target: None,
            armijo: 1e-4,
        }
    }
}

impl BlockCdConfig {
    /// Checks every field, and that rule, blocks, update and penalty fit together.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] and [`Error::Unsupported`] that name the first bad one.
    pub fn validate(&self) -> Result<()> {
        self.penalty.validate()?;
        check::at_least("BlockCdConfig::block_size", self.block_size, 1)?;
        check::non_negative("BlockCdConfig::tol", self.tol)?;
        check::rate("BlockCdConfig::armijo", self.armijo)?;
        check::non_negative("BlockCdConfig::gap_tol", self.gap_tol.unwrap_or(0.0))?;
        let fixed = matches!(self.partition, Partition::Fixed(_));
        let no = |what: &str, context: &str| Err(Error::unsupported(what, context));
        match &self.select {
            Select::Gsl if !fixed => return no("GSL", "with variable blocks: take GSD"),
            Select::Gsq(GsqSolver::Exact) if !fixed => {
                return no("exact GSQ", "with variable blocks: it is NP-hard, take Iht")
            }
            Select::Gsq(GsqSolver::Iht { .. }) if fixed => {
                return no("GSQ by thresholding", "with fixed blocks: take Exact")
            }
            Select::Gsq(GsqSolver::Iht { iters }) => {
                check::at_least("GsqSolver::Iht::iters", *iters, 1)?;
            }
            Select::Tree(_) if fixed => return no("a graph rule", "with fixed blocks"),
            Select::Tree(TreeRule::Dense { size: Some(size) }) => {
                check::at_least("TreeRule::Dense::size", *size, 1)?;
            }
            _ => {}
        }
        let smooth = self.penalty == Penalty::None;
        if !smooth && self.select.scores_gradients() {
            // A coordinate at its bound may have the largest gradient and yet not move.
            return no(
                "a rule that scores gradients",
                "with a penalty: take ProxGsq, or one without scores",
            );
        }
        match self.update {
            Update::TwoMetric if !matches!(self.penalty, Penalty::NonNegative { .. }) => no(
                "the two-metric update",
                "without a non-negativity constraint",
            ),
            Update::ProxGradient | Update::TwoMetric | Update::ProxNewton => Ok(()),
            _ if !smooth => no("this update", "with a penalty: take a proximal one"),
            _ => Ok(()),
        }
    }
}

/// What a run did, with its certificate.
#[derive(Debug, Clone)]
pub struct Report {
    /// The point.
    pub x: Vec<f64>,
    /// `f + g` at the start and after every step.
    pub f_history: Vec<f64>,
    /// The block of every step.
    pub blocks: Vec<Vec<usize>>,
    /// Number of non-zeros after every step.
    pub support_history: Vec<usize>,
    /// The step after which the set of non-zeros never changed again.
    pub active_set_iter: usize,
    /// Largest entry of `L_i (x_i - prox(x_i - g_i / L_i))`: zero at a minimum.
    pub residual: f64,
    /// A bound of the distance to the minimum, for objectives that have one.
    pub gap: Option<f64>,
    /// Whether `tol` or `target` was met.
    pub converged: bool,
    /// Estimates of [`Update::AdaptiveLipschitz`].
    pub lipschitz_estimates: Vec<f64>,
    /// Wall-clock time.
    pub seconds: f64,
}

/// The solver; see the [module](self) page.
#[derive(Debug, Clone)]
pub struct BlockCd {
    config: BlockCdConfig,
}

impl BlockCd {
    /// A solver.
    ///
    /// # Errors
    /// Those of [`BlockCdConfig::validate`].
    pub fn new(config: BlockCdConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config })
    }

    /// Runs from `x0`. The stream is drawn from by random rules alone.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::NonFinite`] for `x0`, [`Error::InvalidConfig`] where it violates
    /// the constraints or given blocks are no partition, [`Error::Unsupported`] for a graph rule
    /// without graph, [`Error::Indefinite`] for a block that is not convex.
    pub fn solve<O: SmoothObjective>(
        &self,
        objective: &mut O,
        x0: &[f64],
        stream: &mut RandomStream,
    ) -> Result<Report> {
        let start = Instant::now();
        let config = &self.config;
        check::length("x0", x0.len(), objective.dim())?;
        check::finite("x0", x0)?;
        if config.penalty.value(x0).is_infinite() {
            return Err(Error::config(
                "x0",
                "outside the constraints",
                "a feasible point",
            ));
        }
        objective.reset(x0);
        let mut selector = Selector::new(config, objective)?;
        let mut step = Step::new(config, objective.dim());
        let mut run = History::new(objective, &config.penalty);
        let refresh = (objective.dim() / config.block_size).max(50);
        for t in 0..config.max_iter {
            let met = config.target.is_some_and(|f| run.last() <= f);
            if met {
                run.converged = true;
                break;
            }
            let picked = selector.pick(config, objective, &step.estimates, stream)?;
            let residual = match &picked.grad {
                Some(grad) => Some(residual(objective, grad, &config.penalty)),
                None if config.tol > 0.0 && t % refresh == 0 => {
                    Some(residual(objective, &objective.grad(), &config.penalty))
                }
                None => None,
            };
            let small = config.tol > 0.0 && residual.is_some_and(|r| r <= config.tol);
            if small || gap_met(objective, picked.grad.as_deref(), config) {
                run.converged = true;
                break;
            }
            step.take(config, objective, &picked.block)?;
            run.push(objective, &config.penalty, picked.block)?;
            // Sums of many small changes drift from the product that they stand for.
            if (t + 1) % refresh == 0 {
                let x = objective.point().to_vec();
                objective.reset(&x);
            }
        }
        Ok(run.finish(objective, config, step, start))
    }
}

fn residual(objective: &impl SmoothObjective, grad: &[f64], penalty: &Penalty) -> f64 {
    let constants = objective.coord_lipschitz().iter();
    let steps = objective.point().iter().zip(grad).zip(constants);
    let moves = steps.map(|((x, g), l)| {
        // A column of zeros has no gradient; its proximal step has any length.
        let l = if *l > 0.0 { *l } else { 1.0 };
        l * (x - penalty.prox(x - g / l, 1.0 / l))
    });
    max_abs(&moves.collect::<Vec<_>>())
}

fn gap_met(objective: &impl SmoothObjective, grad: Option<&[f64]>, config: &BlockCdConfig) -> bool {
    let (Some(grad), Some(tol)) = (grad, config.gap_tol) else {
        return false;
    };
    let gap = objective.duality_gap(&config.penalty, grad);
    gap.is_some_and(|gap| gap <= tol)
}

struct History {
    values: Vec<f64>,
    blocks: Vec<Vec<usize>>,
    supports: Vec<usize>,
    support: Vec<bool>,
    active_set_iter: usize,
    converged: bool,
}

impl History {
    fn new(objective: &impl SmoothObjective, penalty: &Penalty) -> Self {
        let x = objective.point();
        Self {
            values: vec![objective.value() + penalty.value(x)],
            blocks: vec![],
            supports: vec![],
            support: x.iter().map(|x| *x != 0.0).collect(),
            active_set_iter: 0,
            converged: false,
        }
    }

    fn last(&self) -> f64 {
        self.values.last().copied().unwrap_or(f64::INFINITY)
    }

    fn push(
        &mut self,
        objective: &impl SmoothObjective,
        penalty: &Penalty,
        block: Vec<usize>,
    ) -> Result<()> {
        let x = objective.point();
        let value = objective.value() + penalty.value(x);
        if !value.is_finite() {
            return Err(Error::NonFinite {
                what: "the objective",
                position: self.values.len(),
                value,
            });
        }
        for &i in &block {
            let nonzero = x[i] != 0.0;
            if nonzero != self.support[i] {
                self.support[i] = nonzero;
                self.active_set_iter = self.blocks.len() + 1;
            }
        }
        self.supports
            .push(self.support.iter().filter(|s| **s).count());
        self.values.push(value);
        self.blocks.push(block);
        Ok(())
    }

    fn finish(
        self,
        objective: &impl SmoothObjective,
        config: &BlockCdConfig,
        step: Step,
        start: Instant,
    ) -> Report {
        let grad = objective.grad();
        let residual = residual(objective, &grad, &config.penalty);
        let met = config.target.is_some_and(|f| self.last() <= f);
        Report {
            x: objective.point().to_vec(),
            f_history: self.values,
            blocks: self.blocks,
            support_history: self.supports,
            active_set_iter: self.active_set_iter,
            residual,
            gap: objective.duality_gap(&config.penalty, &grad),
            converged: self.converged || met || (config.tol > 0.0 && residual <= config.tol),
            lipschitz_estimates: step.estimates,
            seconds: start.elapsed().as_secs_f64(),
        }
    }
}
