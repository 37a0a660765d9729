//! Certified adversarial training, and the plain program for every loss.

use super::interior::{self, Program};
use super::model::{group_norms, outputs_and_slack, violation};
use super::{ConvexLoss, ConvexReluModel, Data, Patterns};
use crate::error::check;
use crate::linalg::{conjugate_gradient, norm};
use crate::{Error, Result};
use candle_core::Tensor;
use faer::linalg::solvers::{Llt, Solve};
use faer::{Mat, Side};

/// How the program is solved.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum AdversarialSolver {
    /// As a cone program by an interior-point method; for up to some thousand units times columns.
    InteriorPoint {
        /// Gap and infeasibility, absolute and relative, at which it stops.
        tol: f64,
    },
    /// By splitting, with proximal steps; a few digits, and no bound: the gap is infinite. Up to 4000
    /// unknowns (two times patterns times columns and one) with one factorization, beyond by conjugate
    /// gradients without a matrix.
    SplitAdmm {
        /// Penalty at the start; `None` = `0.1 / n`. It is doubled or halved where primal and dual
        /// residual differ by ten.
        rho: Option<f64>,
        /// Most steps.
        max_iter: usize,
        /// Relative residual at which it stops.
        tol: f64,
    },
}

impl AdversarialSolver {
    /// The interior point to ten digits.
    pub fn interior_point() -> Self {
        Self::InteriorPoint { tol: 1e-10 }
    }
}

/// Settings of [`AdversarialRelu`].
#[derive(Debug, Clone, PartialEq)]
pub struct AdversarialConfig {
    /// Largest change of a column.
    pub eps: f64,
    /// Weight of the group norms.
    pub beta: f64,
    /// The loss.
    pub loss: ConvexLoss,
    /// Which columns may change; `None` = all. Leave a column of ones out.
    pub perturb_mask: Option<Vec<bool>>,
    /// How it is solved.
    pub solver: AdversarialSolver,
    /// A weight of at least 0 for each sample's loss; `None` = all 1.
    pub sample_weights: Option<Vec<f64>>,
}

impl Default for AdversarialConfig {
    fn default() -> Self {
        Self {
            eps: 0.1,
            beta: 1e-4,
            loss: ConvexLoss::Hinge,
            perturb_mask: None,
            solver: AdversarialSolver::interior_point(),
            sample_weights: None,
        }
    }
}

/// Trains against all perturbations of at most `eps` a column:
///
/// ```text
/// min sum_k l(f_k, y_k; eps |Q_k|_1) + beta sum_i (|v_i| + |w_i|)
/// s.t. (2 D_i - I) X v_i >= eps |v_i|_1, the same for w_i       Q_k = sum_i d_ik (v_i - w_i)
/// ```
///
/// The optimal loss is the worst case of the recovered network's: [`certificate`](super::certificate).
/// The constraints are severe: patterns without margin get no unit, and the model can come out as
/// zero. With `eps = 0` it is the plain program.
#[derive(Debug, Clone)]
pub struct AdversarialRelu {
    config: AdversarialConfig,
}

impl AdversarialRelu {
    /// A solver.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad field.
    pub fn new(config: AdversarialConfig) -> Result<Self> {
        check::non_negative("AdversarialConfig::eps", config.eps)?;
        check::non_negative("AdversarialConfig::beta", config.beta)?;
        match config.solver {
            AdversarialSolver::InteriorPoint { tol } => {
                check::positive("AdversarialSolver::InteriorPoint::tol", tol)?;
            }
            AdversarialSolver::SplitAdmm { rho, max_iter, tol } => {
                check::positive("AdversarialSolver::SplitAdmm::rho", rho.unwrap_or(1.0))?;
                check::at_least("AdversarialSolver::SplitAdmm::max_iter", max_iter, 1)?;
                check::non_negative("AdversarialSolver::SplitAdmm::tol", tol)?;
            }
        }
        Ok(Self { config })
    }

    /// Objective and largest violation of a constraint at given units `v` and `w` `[P, d]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`], [`Error::InvalidConfig`] for labels that the loss does
    /// not take.
    pub fn evaluate(
        &self,
        x: &Tensor,
        y: &Tensor,
        patterns: &Patterns,
        v: &[f64],
        w: &[f64],
    ) -> Result<(f64, f64)> {
        let data = self.data(x, y, patterns)?;
        let perturbed = self.perturbed(data.x.ncols())?;
        let program = self.program(&data, patterns, &perturbed);
        for (what, units) in [("v", v), ("w", w)] {
            check::length(what, units.len(), patterns.len() * data.x.ncols())?;
            check::finite(what, units)?;
        }
        let eps = self.config.eps;
        let violated = |units| violation(&data.x, patterns, units, eps, &perturbed);
        Ok((objective(&program, v, w), violated(v).max(violated(w))))
    }

    fn data(&self, x: &Tensor, y: &Tensor, patterns: &Patterns) -> Result<Data> {
        let weights = self.config.sample_weights.as_deref();
        let data = Data::new(x, y, self.config.loss, weights)?;
        patterns.fits(data.x.nrows(), data.x.ncols())?;
        Ok(data)
    }

    fn perturbed(&self, d: usize) -> Result<Vec<bool>> {
        let given = self.config.perturb_mask.clone();
        let perturbed = given.unwrap_or_else(|| vec![true; d]);
        check::length("AdversarialConfig::perturb_mask", perturbed.len(), d)?;
        Ok(perturbed)
    }

    fn program<'a>(
        &self,
        data: &'a Data,
        patterns: &'a Patterns,
        perturbed: &'a [bool],
    ) -> Program<'a> {
        Program {
            data,
            patterns,
            loss: self.config.loss,
            beta: self.config.beta,
            eps: self.config.eps,
            perturbed,
        }
    }

    /// Trains on `x` `[n, d]`, `y` `[n]`.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`], [`Error::InvalidConfig`] for labels that the loss does
    /// not take, [`Error::Numerical`] where the interior-point method fails.
    pub fn fit(&self, x: &Tensor, y: &Tensor, patterns: &Patterns) -> Result<ConvexReluModel> {
        let config = &self.config;
        let data = self.data(x, y, patterns)?;
        let perturbed = self.perturbed(data.x.ncols())?;
        let program = self.program(&data, patterns, &perturbed);
        let (v, w, bound, iterations, converged) = match config.solver {
            AdversarialSolver::InteriorPoint { tol } => {
                let solved = interior::solve(&program, tol)?;
                (solved.v, solved.w, solved.bound, solved.iterations, true)
            }
            AdversarialSolver::SplitAdmm { rho, max_iter, tol } => {
                let rho = rho.unwrap_or(0.1 / data.y.len() as f64);
                let mut split = Split::new(&program, rho, DENSE)?;
                let converged = split.run(max_iter, tol)?;
                let (v, w) = split.units();
                (v, w, f64::NEG_INFINITY, split.iterations, converged)
            }
        };
        let objective = objective(&program, &v, &w);
        let violated = |units| violation(&data.x, patterns, units, config.eps, &perturbed);
        Ok(ConvexReluModel {
            patterns: patterns.clone(),
            gap: objective - bound,
            violation: violated(&v).max(violated(&w)),
            objective,
            v,
            w,
            iterations,
            converged,
        })
    }
}

fn objective(p: &Program<'_>, v: &[f64], w: &[f64]) -> f64 {
    let (outputs, sizes) = outputs_and_slack(&p.data.x, p.patterns, v, w, p.perturbed);
    let slack: Vec<f64> = sizes.iter().map(|s| p.eps * s).collect();
    let d = p.patterns.d;
    p.data.loss(p.loss, &outputs, Some(&slack)) + p.beta * (group_norms(v, d) + group_norms(w, d))
}

/// Scaled ADMM on `p = (v_i, w_i, t_i)` with copies `q = K p` in the blocks
/// `[V, t | (2 D - I) X V - eps t | V | r = y F, Q]`.
struct Split<'a> {
    program: &'a Program<'a>,
    rho: f64,
    /// Of `K'K`, where it is small enough.
    factor: Option<Llt<f64>>,
    /// `[d + 1, 2 P]`
    p: Mat<f64>,
    q: Copies,
    dual: Copies,
    iterations: usize,
}

/// The copies, or anything of their form.
#[derive(Clone)]
struct Copies {
    /// In the epigraphs of the absolute values, `[d + 1, 2 P]`.
    sizes: Mat<f64>,
    /// Slacks of the cones, `[n, 2 P]`.
    slacks: Mat<f64>,
    /// Under the group norm, `[d, 2 P]`.
    groups: Mat<f64>,
    /// Output and `Q` of each sample, `[d + 1, n]`.
    samples: Mat<f64>,
}

impl Copies {
    fn zip(&mut self, other: &Self, f: impl Fn(f64, f64) -> f64) {
        let each = |a: &mut Mat<f64>, b: &Mat<f64>| {
            for c in 0..a.ncols() {
                for r in 0..a.nrows() {
                    a[(r, c)] = f(a[(r, c)], b[(r, c)]);
                }
            }
        };
        each(&mut self.sizes, &other.sizes);
        each(&mut self.slacks, &other.slacks);
        each(&mut self.groups, &other.groups);
        each(&mut self.samples, &other.samples);
    }

    fn norm(&self) -> f64 {
        let parts = [&self.sizes, &self.slacks, &self.groups, &self.samples];
        parts
            .iter()
            .map(|m| m.squared_norm_l2())
            .sum::<f64>()
            .sqrt()
    }
}

/// Unknowns up to which `K'K` is factored.
const DENSE: usize = 4000;
/// Relative residual at which conjugate gradients stop; they start at the step before.
const RESIDUAL: f64 = 1e-10;

impl<'a> Split<'a> {
    fn new(program: &'a Program<'a>, rho: f64, dense: usize) -> Result<Self> {
        let (n, d) = (program.patterns.n, program.patterns.d);
        let columns = 2 * program.patterns.len();
        let size = columns * (d + 1);
        let copies = Copies {
            sizes: Mat::zeros(d + 1, columns),
            slacks: Mat::zeros(n, columns),
            groups: Mat::zeros(d, columns),
            samples: Mat::zeros(d + 1, n),
        };
        let factor = match size <= dense {
            true => Some(factor(program, size)?),
            false => None,
        };
        Ok(Self {
            program,
            rho,
            factor,
            p: Mat::zeros(d + 1, columns),
            q: copies.clone(),
            dual: copies,
            iterations: 0,
        })
    }

    /// `(K'K)^-1 right`.
    fn solve(&self, right: &Mat<f64>) -> Mat<f64> {
        let rows = right.nrows();
        let flat = |m: &Mat<f64>| -> Vec<f64> {
            let columns = (0..m.ncols()).flat_map(|c| (0..rows).map(move |j| (j, c)));
            columns.map(|at| m[at]).collect()
        };
        let shaped = |x: &[f64]| Mat::from_fn(rows, right.ncols(), |j, c| x[c * rows + j]);
        if let Some(factor) = &self.factor {
            let b = flat(right);
            let mut x = Mat::from_fn(b.len(), 1, |e, _| b[e]);
            factor.solve_in_place(x.as_mut());
            return Mat::from_fn(rows, right.ncols(), |j, c| x[(c * rows + j, 0)]);
        }
        let product = |p: &[f64]| flat(&adjoint(self.program, &apply(self.program, &shaped(p))));
        let (b, start) = (flat(right), flat(&self.p));
        let most = b.len();
        shaped(&conjugate_gradient(product, &b, start, RESIDUAL, most))
    }

    fn units(&self) -> (Vec<f64>, Vec<f64>) {
        let (d, count) = (self.program.patterns.d, self.program.patterns.len());
        let range = |from: usize| {
            (from..from + count)
                .flat_map(|c| (0..d).map(move |j| (j, c)))
                .map(|at| self.q.groups[at])
                .collect()
        };
        (range(0), range(count))
    }

    fn run(&mut self, max_iter: usize, tol: f64) -> Result<bool> {
        while self.iterations < max_iter {
            let (primal, dual, scale) = self.step();
            if !primal.is_finite() {
                return Err(Error::NonFinite {
                    what: "the residual of the splitting",
                    position: self.iterations,
                    value: primal,
                });
            }
            self.iterations += 1;
            if primal.max(dual) <= tol * scale {
                return Ok(true);
            }
            // Residual balancing; ever rarer, so that it comes to rest.
            let due = self.iterations.is_power_of_two() || self.iterations.is_multiple_of(500);
            if due && self.iterations >= 16 {
                let change = if primal > 10.0 * dual {
                    2.0
                } else if dual > 10.0 * primal {
                    0.5
                } else {
                    1.0
                };
                self.rho *= change;
                let zero = self.dual.clone();
                self.dual.zip(&zero, |u, _| u / change);
            }
        }
        Ok(false)
    }

    /// Primal and dual residual, and what they are relative to.
    fn step(&mut self) -> (f64, f64, f64) {
        let mut right = self.q.clone();
        right.zip(&self.dual, |q, u| q - u);
        let back = adjoint(self.program, &right);
        self.p = self.solve(&back);
        let image = apply(self.program, &self.p);
        let mut next = image.clone();
        next.zip(&self.dual, |k, u| k + u);
        self.prox(&mut next);
        let mut change = next.clone();
        change.zip(&self.q, |a, b| a - b);
        let mut gap = image.clone();
        gap.zip(&next, |a, b| a - b);
        self.dual.zip(&gap, |u, g| u + g);
        self.q = next;
        let scale = 1.0 + image.norm().max(self.q.norm());
        (gap.norm(), change.norm(), scale)
    }

    fn prox(&self, q: &mut Copies) {
        let p = self.program;
        for c in 0..q.sizes.ncols() {
            let mut column: Vec<f64> = (0..p.patterns.d).map(|j| q.sizes[(j, c)]).collect();
            let t = project_epigraph(&mut column, q.sizes[(p.patterns.d, c)], p.perturbed);
            column
                .iter()
                .enumerate()
                .for_each(|(j, x)| q.sizes[(j, c)] = *x);
            q.sizes[(p.patterns.d, c)] = t;
            for k in 0..q.slacks.nrows() {
                q.slacks[(k, c)] = q.slacks[(k, c)].max(0.0);
            }
            let group: Vec<f64> = (0..p.patterns.d).map(|j| q.groups[(j, c)]).collect();
            let (size, shrink) = (norm(&group), p.beta / self.rho);
            let factor = if size > shrink {
                1.0 - shrink / size
            } else {
                0.0
            };
            (0..p.patterns.d).for_each(|j| q.groups[(j, c)] *= factor);
        }
        for k in 0..q.samples.ncols() {
            self.sample_prox(k, &mut q.samples);
        }
    }

    /// `argmin l(r; eps |q|_1) + rho/2 |(r, q) - (r0, q0)|^2`: both follow from the slope `m` of the
    /// loss, which is found by bisection.
    fn sample_prox(&self, k: usize, samples: &mut Mat<f64>) {
        let (p, rho) = (self.program, self.rho);
        let d = p.patterns.d;
        let n = p.patterns.n as f64;
        let weight = p.data.weights[k];
        let (output, y) = (samples[(d, k)], p.data.y[k]);
        let soft = |x: f64, by: f64| x.signum() * (x.abs() - by).max(0.0);
        let squared = p.loss == ConvexLoss::Squared;
        let start = if squared { output - y } else { y * output };
        // What the outputs become at slope m: towards the target, or with the label.
        let moved = |m: f64| {
            if squared {
                soft(start, m / rho)
            } else {
                start + m / rho
            }
        };
        let size = |m: f64| -> f64 {
            let perturbed = (0..d).filter(|&j| p.perturbed[j]);
            perturbed
                .map(|j| (samples[(j, k)].abs() - m * p.eps / rho).max(0.0))
                .sum()
        };
        let slope = |m: f64| {
            let reach = p.eps * size(m);
            match p.loss {
                ConvexLoss::Squared => weight * (moved(m).abs() + reach),
                ConvexLoss::Hinge => {
                    let active = 1.0 - moved(m) + reach > 0.0;
                    weight * f64::from(u8::from(active)) / n
                }
                ConvexLoss::Logistic => weight / (1.0 + (moved(m) - reach).exp()) / n,
            }
        };
        let (mut low, mut high) = (0.0, if squared { slope(0.0) } else { weight / n });
        if slope(high) >= high {
            low = high;
        }
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            if slope(middle) > middle {
                low = middle;
            } else {
                high = middle;
            }
        }
        let m = 0.5 * (low + high);
        samples[(d, k)] = if squared { y + moved(m) } else { y * moved(m) };
        for j in (0..d).filter(|&j| p.perturbed[j]) {
            samples[(j, k)] = soft(samples[(j, k)], m * p.eps / rho);
        }
    }
}

/// The factorization of `K'K`, which is made a column at a time.
fn factor(program: &Program<'_>, size: usize) -> Result<Llt<f64>> {
    let (columns, rows) = (2 * program.patterns.len(), program.patterns.d + 1);
    let mut normal = Mat::zeros(size, size);
    for e in 0..size {
        let mut unit = Mat::zeros(rows, columns);
        unit[(e % rows, e / rows)] = 1.0;
        let back = adjoint(program, &apply(program, &unit));
        (0..size).for_each(|f| normal[(f, e)] = back[(f % rows, f / rows)]);
    }
    normal
        .llt(Side::Lower)
        .map_err(|e| Error::numerical("the factorization of K'K", e))
}

/// Projects on `{|a|_1 <= t}` over the perturbed entries; the others stay. Gives `t`.
fn project_epigraph(a: &mut [f64], t: f64, perturbed: &[bool]) -> f64 {
    let mut sizes: Vec<f64> = a
        .iter()
        .zip(perturbed)
        .filter(|(_, p)| **p)
        .map(|(x, _)| x.abs())
        .collect();
    if sizes.iter().sum::<f64>() <= t {
        return t;
    }
    sizes.sort_by(|a, b| b.total_cmp(a));
    let (mut sum, mut by) = (0.0, f64::INFINITY);
    for (r, s) in sizes.iter().enumerate() {
        sum += s;
        let next = (sum - t) / (r + 2) as f64;
        if *s > next {
            by = next;
        }
    }
    let apex = by.is_infinite();
    for (x, _) in a.iter_mut().zip(perturbed).filter(|(_, p)| **p) {
        *x = if apex {
            0.0
        } else {
            x.signum() * (x.abs() - by).max(0.0)
        };
    }
    if apex {
        0.0
    } else {
        t + by
    }
}

fn apply(program: &Program<'_>, p: &Mat<f64>) -> Copies {
    let (n, d) = (program.patterns.n, program.patterns.d);
    let (count, columns) = (program.patterns.len(), p.ncols());
    let x = &program.data.x;
    let scores = x * p.subrows(0, d);
    let slacks = Mat::from_fn(n, columns, |k, c| {
        let sign = if program.patterns.columns[c % count][k] {
            1.0
        } else {
            -1.0
        };
        sign * scores[(k, c)] - program.eps * p[(d, c)]
    });
    let mut samples = Mat::zeros(d + 1, n);
    for c in 0..columns {
        let sign = if c < count { 1.0 } else { -1.0 };
        for k in (0..n).filter(|&k| program.patterns.columns[c % count][k]) {
            (0..d).for_each(|j| samples[(j, k)] += sign * p[(j, c)]);
            samples[(d, k)] += sign * scores[(k, c)];
        }
    }
    Copies {
        sizes: p.clone(),
        slacks,
        groups: p.subrows(0, d).to_owned(),
        samples,
    }
}

fn adjoint(program: &Program<'_>, q: &Copies) -> Mat<f64> {
    let (n, d) = (program.patterns.n, program.patterns.d);
    let count = program.patterns.len();
    let x = &program.data.x;
    let mut out = q.sizes.clone();
    for c in 0..out.ncols() {
        let own = if c < count { 1.0 } else { -1.0 };
        (0..d).for_each(|j| out[(j, c)] += q.groups[(j, c)]);
        for k in 0..n {
            let active = program.patterns.columns[c % count][k];
            let mut along = if active {
                q.slacks[(k, c)]
            } else {
                -q.slacks[(k, c)]
            };
            out[(d, c)] -= program.eps * q.slacks[(k, c)];
            if active {
                along += own * q.samples[(d, k)];
                (0..d).for_each(|j| out[(j, c)] += own * q.samples[(j, k)]);
            }
            (0..d).for_each(|j| out[(j, c)] += along * x[(k, j)]);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RandomStream;
    use candle_core::{DType, Device};

    /// Steps with and without a matrix end at the same units.
    #[test]
    fn conjugate_gradients_take_the_steps_of_the_factorization() -> Result<()> {
        let mut stream = RandomStream::new(3);
        let x = stream.normal(0.0, 1.0, (9, 3), DType::F64, &Device::Cpu)?;
        let y = x.narrow(1, 0, 1)?.squeeze(1)?.sign()?;
        let patterns = Patterns::sample(&x, 8, &mut stream)?;
        let solver = AdversarialRelu::new(AdversarialConfig::default())?;
        let data = solver.data(&x, &y, &patterns)?;
        let perturbed = solver.perturbed(3)?;
        let program = solver.program(&data, &patterns, &perturbed);
        let run = |dense| -> Result<Vec<f64>> {
            let mut split = Split::new(&program, 0.05, dense)?;
            split.run(60, 0.0)?;
            let (v, w) = split.units();
            Ok([v, w].concat())
        };
        let (factored, iterated) = (run(DENSE)?, run(0)?);
        assert!(factored.iter().any(|x| x.abs() > 1e-3));
        for (a, b) in factored.iter().zip(&iterated) {
            assert!((a - b).abs() < 1e-7, "{a} {b}");
        }
        Ok(())
    }
}
