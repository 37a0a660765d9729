//! The convex program by the alternating direction method of multipliers (algorithm 3.1).

mod finish;
mod grow;
mod primal;

pub use grow::{GrowConfig, Grown};

use super::{ConvexLoss, ConvexReluModel, Data, Patterns};
use crate::error::check;
use crate::{Error, Result};
use candle_core::Tensor;
use faer::{Mat, MatRef};
use primal::Factor;

/// How the quadratic problem of each step is solved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Primal {
    /// One `n x n` system by the Woodbury identity, factored once. Right unless `n` is far above
    /// `P d`.
    Woodbury,
    /// One `2 P d` system, factored once.
    Cholesky,
    /// Conjugate gradients from the last step's solution.
    Cg {
        /// Relative residual at which they stop.
        tol: f64,
        /// Most iterations of a step.
        max_iter: usize,
    },
    /// Random block coordinate descent over the units; for losses other than the squared one.
    Rbcd {
        /// Seed of the order.
        seed: u64,
        /// Most block steps of one step.
        steps: usize,
        /// Mean decrease of a pass over the blocks at which they stop.
        tol: f64,
    },
}

/// Settings of [`AdmmRelu`].
#[derive(Debug, Clone, PartialEq)]
pub struct AdmmConfig {
    /// The loss: squared, or logistic with [`Primal::Rbcd`].
    pub loss: ConvexLoss,
    /// Weight of the group norms; half of it is the network's weight decay.
    pub beta: f64,
    /// Penalty of the splitting, at the start with [`balance`](Self::balance). It acts on the scale of
    /// `X`.
    pub rho: f64,
    /// The multipliers move by `gamma_a / rho`; at most about 1.6 times `rho`.
    pub gamma_a: f64,
    /// Whether `rho`, and `gamma_a` with it, are raised where the iterates are far from feasible and
    /// lowered where they are far from optimal, at ever rarer steps. The paper leaves them alone.
    pub balance: bool,
    /// Most steps.
    pub max_iter: usize,
    /// Relative residual at which it stops.
    pub tol: f64,
    /// How the quadratic problem is solved.
    pub primal: Primal,
    /// A weight of at least 0 for each sample's loss; `None` = all 1.
    pub sample_weights: Option<Vec<f64>>,
}

impl Default for AdmmConfig {
    fn default() -> Self {
        Self {
            loss: ConvexLoss::Squared,
            beta: 1e-4,
            rho: 0.1,
            gamma_a: 0.1,
            balance: false,
            max_iter: 4000,
            tol: 1e-6,
            primal: Primal::Woodbury,
            sample_weights: None,
        }
    }
}

impl AdmmConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one, [`Error::Unsupported`] for a loss that
    /// the primal solver cannot take.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("AdmmConfig::beta", self.beta)?;
        check::positive("AdmmConfig::rho", self.rho)?;
        check::positive("AdmmConfig::gamma_a", self.gamma_a)?;
        check::non_negative("AdmmConfig::tol", self.tol)?;
        check::at_least("AdmmConfig::max_iter", self.max_iter, 1)?;
        match (self.loss, self.primal) {
            (ConvexLoss::Squared, Primal::Cg { tol, max_iter }) => {
                check::positive("Primal::Cg::tol", tol)?;
                check::at_least("Primal::Cg::max_iter", max_iter, 1)
            }
            (ConvexLoss::Squared | ConvexLoss::Logistic, Primal::Rbcd { steps, tol, .. }) => {
                check::at_least("Primal::Rbcd::steps", steps, 1)?;
                check::non_negative("Primal::Rbcd::tol", tol)
            }
            (ConvexLoss::Squared, _) => Ok(()),
            (ConvexLoss::Logistic, _) => Err(Error::unsupported(
                "the logistic loss",
                "with a linear system: take Primal::Rbcd",
            )),
            (ConvexLoss::Hinge, _) => Err(Error::unsupported(
                "the hinge loss",
                "here: take AdversarialRelu with eps = 0",
            )),
        }
    }
}

/// Trains by operator splitting; see the [module](super) page.
#[derive(Debug, Clone)]
pub struct AdmmRelu {
    config: AdmmConfig,
}

/// Everything that changes. All zero at the start; a run that is given it goes on with the same bits.
#[derive(Debug, Clone, PartialEq)]
pub struct AdmmState {
    /// Units of the loss, `[2, P, d]`: positive ones, then negative ones.
    pub u: Vec<f64>,
    /// Units of the norms, `[2, P, d]`.
    pub v: Vec<f64>,
    /// Slacks of the cones, `[2, n, P]`.
    pub s: Vec<f64>,
    /// Scaled multipliers of `u = v`.
    pub lambda: Vec<f64>,
    /// Scaled multipliers of `G u = s`.
    pub nu: Vec<f64>,
    /// The penalty, which changes with [`AdmmConfig::balance`].
    pub rho: f64,
    /// Steps done.
    pub iterations: usize,
}

impl AdmmRelu {
    /// A solver.
    ///
    /// # Errors
    /// Those of [`AdmmConfig::validate`].
    pub fn new(config: AdmmConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config })
    }

    /// Trains on `x` `[n, d]`, `y` `[n]`; units end on their cones, so that outputs are the network's.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`], [`Error::InvalidConfig`] for labels that the loss does
    /// not take, [`Error::Indefinite`] where `rho` is too small for the data's scale.
    pub fn fit(&self, x: &Tensor, y: &Tensor, patterns: &Patterns) -> Result<ConvexReluModel> {
        let mut run = self.start(x, y, patterns)?;
        run.finish()?;
        Ok(run.model())
    }

    /// A model for each weight of the group norms, from one run: each starts where the last one ended,
    /// and the systems are factored once. Descending weights start from few units.
    ///
    /// # Errors
    /// As [`fit`](Self::fit), and [`Error::InvalidConfig`] for a weight that is negative or none.
    pub fn path(
        &self,
        x: &Tensor,
        y: &Tensor,
        patterns: &Patterns,
        betas: &[f64],
    ) -> Result<Vec<ConvexReluModel>> {
        check::at_least("weights of the path", betas.len(), 1)?;
        let mut run = self.start(x, y, patterns)?;
        let at = |beta: &f64| {
            check::non_negative("AdmmConfig::beta", *beta)?;
            run.config.beta = *beta;
            run.iterations = 0;
            run.finish()?;
            Ok(run.model())
        };
        betas.iter().map(at).collect()
    }

    /// A run to be stepped by hand.
    ///
    /// # Errors
    /// As [`fit`](Self::fit).
    pub fn start(&self, x: &Tensor, y: &Tensor, patterns: &Patterns) -> Result<AdmmRun> {
        let weights = self.config.sample_weights.as_deref();
        let data = Data::new(x, y, self.config.loss, weights)?;
        patterns.fits(data.x.nrows(), data.x.ncols())?;
        AdmmRun::new(self.config.clone(), data, patterns.clone())
    }
}

/// A run of [`AdmmRelu`], stepped by hand.
pub struct AdmmRun {
    config: AdmmConfig,
    data: Data,
    patterns: Patterns,
    gates: Gates,
    factor: Factor,
    /// `X'X`
    gram: Mat<f64>,
    /// Units: a column of length `d` each, positive ones first.
    u: Vec<f64>,
    v: Vec<f64>,
    lambda: Vec<f64>,
    /// Slacks: a column of length `n` for each unit.
    s: Vec<f64>,
    nu: Vec<f64>,
    /// `X u`, likewise.
    scores: Vec<f64>,
    residuals: [f64; 4],
    iterations: usize,
}

/// The patterns as numbers.
struct Gates {
    /// `2 D - I`: a column of length `n` for each pattern.
    signs: Vec<f64>,
    n: usize,
    patterns: usize,
}

impl Gates {
    fn new(patterns: &Patterns) -> Self {
        let sign = |active: &bool| if *active { 1.0 } else { -1.0 };
        Self {
            signs: patterns.columns.iter().flatten().map(sign).collect(),
            n: patterns.n,
            patterns: patterns.len(),
        }
    }

    /// The signs of unit `c`, and its own sign.
    fn of(&self, c: usize) -> (&[f64], f64) {
        let i = c % self.patterns;
        let own = if c < self.patterns { 1.0 } else { -1.0 };
        (&self.signs[i * self.n..(i + 1) * self.n], own)
    }

    fn units(&self) -> usize {
        2 * self.patterns
    }
}

/// An entry of `D` from one of `2 D - I`, with the unit's own sign.
fn gate(sign: f64, own: f64) -> f64 {
    if sign > 0.0 {
        own
    } else {
        0.0
    }
}

/// Columns of length `rows` as a matrix.
fn columns(x: &[f64], rows: usize) -> MatRef<'_, f64> {
    MatRef::from_column_major_slice(x, rows, x.len() / rows)
}

impl AdmmRun {
    fn new(config: AdmmConfig, data: Data, patterns: Patterns) -> Result<Self> {
        let data = match config.loss {
            ConvexLoss::Squared => data.absorbed(),
            _ => data,
        };
        let (n, d, units) = (data.x.nrows(), data.x.ncols(), 2 * patterns.len());
        let gates = Gates::new(&patterns);
        let gram = data.x.transpose() * &data.x;
        let factor = Factor::new(&config, &data, &gates, gram.as_ref())?;
        Ok(Self {
            factor,
            gram,
            gates,
            u: vec![0.0; units * d],
            v: vec![0.0; units * d],
            lambda: vec![0.0; units * d],
            s: vec![0.0; units * n],
            nu: vec![0.0; units * n],
            scores: vec![0.0; units * n],
            residuals: [f64::INFINITY; 4],
            iterations: 0,
            config,
            data,
            patterns,
        })
    }

    /// Steps to the tolerance or the last step.
    fn finish(&mut self) -> Result<()> {
        while self.iterations < self.config.max_iter {
            self.step()?;
            if self.met(self.config.tol) {
                break;
            }
        }
        Ok(())
    }

    /// One step of the method.
    ///
    /// # Errors
    /// [`Error::NonFinite`] where the iterates leave the numbers.
    pub fn step(&mut self) -> Result<()> {
        let correction = self.primal()?;
        self.update(correction.as_deref());
        self.iterations += 1;
        match self.residuals.iter().find(|r| !r.is_finite()) {
            None => self.rebalance(),
            Some(&value) => Err(Error::NonFinite {
                what: "the residuals",
                position: self.iterations,
                value,
            }),
        }
    }

    /// Primal and dual residual, relative to the iterates.
    fn relative(&self) -> [f64; 2] {
        let norm = crate::linalg::norm;
        let scale = 1.0 + norm(&self.u).max(norm(&self.scores));
        let dual = 1.0 + self.config.rho * norm(&self.lambda).max(norm(&self.nu));
        let [a, b, c, d] = self.residuals;
        [a.max(b) / scale, self.config.rho * c.max(d) / dual]
    }

    /// Whether both are small.
    fn met(&self, tol: f64) -> bool {
        self.relative().iter().all(|r| *r <= tol)
    }

    /// Another penalty where one residual is far above the other.
    fn rebalance(&mut self) -> Result<()> {
        const FIRST: usize = 16;
        const FAR: f64 = 4.0;
        let due = self.iterations.is_power_of_two() || self.iterations.is_multiple_of(500);
        if !self.config.balance || !due || self.iterations < FIRST {
            return Ok(());
        }
        let [primal, dual] = self.relative();
        let ratio = primal / dual;
        if !ratio.is_finite() || (1.0 / FAR..FAR).contains(&ratio) {
            return Ok(());
        }
        self.set_penalty(self.config.rho * ratio.sqrt().clamp(0.1, 10.0))
    }

    /// Changes the penalty and all that is scaled by it.
    fn set_penalty(&mut self, rho: f64) -> Result<()> {
        if rho == self.config.rho {
            return Ok(());
        }
        let change = rho / self.config.rho;
        self.config.rho = rho;
        self.config.gamma_a *= change;
        let multipliers = self.lambda.iter_mut().chain(&mut self.nu);
        multipliers.for_each(|x| *x /= change);
        self.factor = Factor::new(&self.config, &self.data, &self.gates, self.gram.as_ref())?;
        Ok(())
    }

    /// Everything that changes.
    pub fn state(&self) -> AdmmState {
        let (n, p) = (self.gates.n, self.gates.patterns);
        let rows = |x: &[f64]| -> Vec<f64> {
            let at = |e: usize| x[(e / (n * p) * p + e % p) * n + e / p % n];
            (0..x.len()).map(at).collect()
        };
        AdmmState {
            u: self.u.clone(),
            v: self.v.clone(),
            s: rows(&self.s),
            lambda: self.lambda.clone(),
            nu: rows(&self.nu),
            rho: self.config.rho,
            iterations: self.iterations,
        }
    }

    /// Goes on from a state.
    ///
    /// # Errors
    /// [`Error::Shape`] for a state of another size.
    pub fn restore(&mut self, state: &AdmmState) -> Result<()> {
        let (n, p) = (self.gates.n, self.gates.patterns);
        for (what, x) in [("u", &state.u), ("v", &state.v), ("lambda", &state.lambda)] {
            check::length(what, x.len(), self.u.len())?;
        }
        for (what, x) in [("s", &state.s), ("nu", &state.nu)] {
            check::length(what, x.len(), self.s.len())?;
        }
        check::positive("AdmmState::rho", state.rho)?;
        self.set_penalty(state.rho)?;
        let rows = |x: &[f64]| -> Vec<f64> {
            let at = |e: usize| {
                let (k, c) = (e % n, e / n);
                x[c / p * n * p + k * p + c % p]
            };
            (0..x.len()).map(at).collect()
        };
        self.u.clone_from(&state.u);
        self.v.clone_from(&state.v);
        self.lambda.clone_from(&state.lambda);
        self.s = rows(&state.s);
        self.nu = rows(&state.nu);
        self.iterations = state.iterations;
        Ok(())
    }
}
