//! The convex program by the alternating direction method of multipliers (algorithm 3.1).

use super::model::{group_norms, outputs_and_slack, violation};
use super::{ConvexLoss, ConvexReluModel, Data, Patterns};
use crate::block_cd::{
    BlockCd, BlockCdConfig, Columns, LeastSquares, Penalty, Select, SmoothObjective, Update,
};
use crate::error::check;
use crate::linalg::{dot, norm, product};
use crate::{Error, RandomStream, Result};
use candle_core::Tensor;
use faer::linalg::solvers::{Llt, Solve};
use faer::{Mat, Side};

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
    /// Penalty of the splitting. It acts on the scale of `X`.
    pub rho: f64,
    /// The multipliers move by `gamma_a / rho`; at most about 1.6 times `rho`.
    pub gamma_a: f64,
    /// Most steps.
    pub max_iter: usize,
    /// Relative residual at which it stops.
    pub tol: f64,
    /// How the quadratic problem is solved.
    pub primal: Primal,
}

impl Default for AdmmConfig {
    fn default() -> Self {
        Self {
            loss: ConvexLoss::Squared,
            beta: 1e-4,
            rho: 0.1,
            gamma_a: 0.1,
            max_iter: 4000,
            tol: 1e-6,
            primal: Primal::Woodbury,
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
        while run.iterations < self.config.max_iter {
            run.step()?;
            if run.met(self.config.tol) {
                break;
            }
        }
        run.model()
    }

    /// A run to be stepped by hand.
    ///
    /// # Errors
    /// As [`fit`](Self::fit).
    pub fn start(&self, x: &Tensor, y: &Tensor, patterns: &Patterns) -> Result<AdmmRun> {
        let data = Data::new(x, y, self.config.loss)?;
        patterns.fits(data.x.nrows(), data.x.ncols())?;
        AdmmRun::new(self.config.clone(), data, patterns.clone())
    }
}

/// The systems that are factored once.
enum Factor {
    /// `(I + X'X)^-1`, `X (I + X'X)^-1`, and the factor of the `n x n` system.
    Woodbury {
        inverse: Mat<f64>,
        times_inverse: Mat<f64>,
        small: Llt<f64>,
    },
    Cholesky(Llt<f64>),
    None,
}

/// A run of [`AdmmRelu`], stepped by hand.
pub struct AdmmRun {
    config: AdmmConfig,
    data: Data,
    patterns: Patterns,
    factor: Factor,
    /// `X'X`
    gram: Mat<f64>,
    /// `2 D - I`, `[n, 2 P]`.
    signs: Mat<f64>,
    /// `D` for positive units, `-D` for negative ones, `[n, 2 P]`.
    gates: Mat<f64>,
    u: Mat<f64>,
    v: Mat<f64>,
    lambda: Mat<f64>,
    s: Mat<f64>,
    nu: Mat<f64>,
    /// `X u`, `[n, 2 P]`.
    scores: Mat<f64>,
    residuals: [f64; 4],
    iterations: usize,
}

fn factorize(matrix: &Mat<f64>, what: &'static str, rho: f64) -> Result<Llt<f64>> {
    matrix.llt(Side::Lower).map_err(|e| Error::Indefinite {
        what,
        kind: "definite",
        detail: format!("its Cholesky factorization failed ({e:?}) at rho = {rho}: raise it"),
    })
}

impl AdmmRun {
    fn new(config: AdmmConfig, data: Data, patterns: Patterns) -> Result<Self> {
        let (n, d, p) = (data.x.nrows(), data.x.ncols(), patterns.len());
        let active = |k: usize, c: usize| patterns.columns[c % p][k];
        let signs = Mat::from_fn(n, 2 * p, |k, c| if active(k, c) { 1.0 } else { -1.0 });
        let gates = Mat::from_fn(n, 2 * p, |k, c| match (active(k, c), c < p) {
            (false, _) => 0.0,
            (true, true) => 1.0,
            (true, false) => -1.0,
        });
        let gram = data.x.transpose() * &data.x;
        let mut run = Self {
            factor: Factor::None,
            gram,
            signs,
            gates,
            u: Mat::zeros(d, 2 * p),
            v: Mat::zeros(d, 2 * p),
            lambda: Mat::zeros(d, 2 * p),
            s: Mat::zeros(n, 2 * p),
            nu: Mat::zeros(n, 2 * p),
            scores: Mat::zeros(n, 2 * p),
            residuals: [f64::INFINITY; 4],
            iterations: 0,
            config,
            data,
            patterns,
        };
        run.factor = run.factors()?;
        Ok(run)
    }

    fn factors(&self) -> Result<Factor> {
        let (n, d) = (self.data.x.nrows(), self.data.x.ncols());
        let (rho, columns) = (self.config.rho, self.gates.ncols());
        match self.config.primal {
            Primal::Woodbury => {
                let b = &self.gram + Mat::<f64>::identity(d, d);
                let mut inverse = Mat::identity(d, d);
                factorize(&b, "I + X'X", rho)?.solve_in_place(inverse.as_mut());
                let times_inverse = &self.data.x * &inverse;
                let kernel = &times_inverse * self.data.x.transpose();
                // Both signs of each pattern: twice `D D'`.
                let overlap = &self.gates * self.gates.transpose();
                let small = Mat::from_fn(n, n, |k, l| {
                    let ridge = if k == l { rho } else { 0.0 };
                    ridge + kernel[(k, l)] * overlap[(k, l)]
                });
                Ok(Factor::Woodbury {
                    small: factorize(&small, "the n x n system", rho)?,
                    inverse,
                    times_inverse,
                })
            }
            Primal::Cholesky => {
                let size = columns * d;
                let f = Mat::from_fn(n, size, |k, e| {
                    self.gates[(k, e / d)] * self.data.x[(k, e % d)]
                });
                let mut full = f.transpose() * &f;
                for e in 0..size {
                    for g in 0..size {
                        full[(e, g)] /= rho;
                        if e / d == g / d {
                            full[(e, g)] += self.gram[(e % d, g % d)];
                        }
                    }
                    full[(e, e)] += 1.0;
                }
                Ok(Factor::Cholesky(factorize(&full, "the full system", rho)?))
            }
            _ => Ok(Factor::None),
        }
    }

    /// One step of the method.
    ///
    /// # Errors
    /// [`Error::NonFinite`] where the iterates leave the numbers.
    pub fn step(&mut self) -> Result<()> {
        let mut right = self.right_side();
        match (&self.factor, self.config.primal) {
            (
                Factor::Woodbury {
                    inverse,
                    times_inverse,
                    small,
                },
                _,
            ) => {
                // u = B^-1 r - B^-1 F' S^-1 F B^-1 r
                product(self.u.as_mut(), inverse.as_ref(), right.as_ref());
                product(self.scores.as_mut(), self.data.x.as_ref(), self.u.as_ref());
                let mut t = self.gated_outputs();
                small.solve_in_place(t.as_mut());
                let spread = self.spread(&t);
                product(right.as_mut(), times_inverse.transpose(), spread.as_ref());
                self.u -= &right;
            }
            (Factor::Cholesky(llt), _) => {
                let (d, size) = (right.nrows(), right.nrows() * right.ncols());
                let mut x = Mat::from_fn(size, 1, |e, _| right[(e % d, e / d)]);
                llt.solve_in_place(x.as_mut());
                self.u = Mat::from_fn(d, right.ncols(), |j, c| x[(c * d + j, 0)]);
            }
            (Factor::None, Primal::Cg { tol, max_iter }) => self.conjugate(&right, tol, max_iter),
            (Factor::None, _) => self.blocks()?,
        }
        product(self.scores.as_mut(), self.data.x.as_ref(), self.u.as_ref());
        self.update();
        self.iterations += 1;
        match self.residuals.iter().find(|r| !r.is_finite()) {
            None => Ok(()),
            Some(&value) => Err(Error::NonFinite {
                what: "the residuals",
                position: self.iterations,
                value,
            }),
        }
    }

    /// `F'y / rho + v - lambda + G'(s - nu)`
    fn right_side(&self) -> Mat<f64> {
        let (n, columns) = (self.s.nrows(), self.s.ncols());
        let rho = self.config.rho;
        let inner = Mat::from_fn(n, columns, |k, c| {
            self.signs[(k, c)] * (self.s[(k, c)] - self.nu[(k, c)])
                + self.gates[(k, c)] * self.data.y[k] / rho
        });
        let mut out = Mat::zeros(self.u.nrows(), columns);
        product(out.as_mut(), self.data.x.transpose(), inner.as_ref());
        out += &self.v;
        out -= &self.lambda;
        out
    }

    /// `F u` from the scores.
    fn gated_outputs(&self) -> Mat<f64> {
        let (n, columns) = (self.s.nrows(), self.s.ncols());
        let mut out = Mat::zeros(n, 1);
        for c in 0..columns {
            for k in 0..n {
                out[(k, 0)] += self.gates[(k, c)] * self.scores[(k, c)];
            }
        }
        out
    }

    fn spread(&self, t: &Mat<f64>) -> Mat<f64> {
        Mat::from_fn(self.s.nrows(), self.s.ncols(), |k, c| {
            self.gates[(k, c)] * t[(k, 0)]
        })
    }

    /// The v-prox with its multipliers, and the clamp of the slacks with theirs: one pass each.
    fn update(&mut self) {
        let (rho, rate) = (self.config.rho, self.config.gamma_a / self.config.rho);
        let shrink = self.config.beta / rho;
        let mut sums = [0.0f64; 4];
        for c in 0..self.u.ncols() {
            let sums_of = |x: f64, y: f64| (x + y) * (x + y);
            let pairs = (0..self.u.nrows()).map(|j| sums_of(self.u[(j, c)], self.lambda[(j, c)]));
            let size = pairs.sum::<f64>().sqrt();
            let factor = if size > shrink {
                1.0 - shrink / size
            } else {
                0.0
            };
            for j in 0..self.u.nrows() {
                let u = self.u[(j, c)];
                let v = factor * (u + self.lambda[(j, c)]);
                sums[0] += (u - v) * (u - v);
                sums[2] += (v - self.v[(j, c)]) * (v - self.v[(j, c)]);
                self.lambda[(j, c)] += rate * (u - v);
                self.v[(j, c)] = v;
            }
            for k in 0..self.s.nrows() {
                let g = self.signs[(k, c)] * self.scores[(k, c)];
                let s = (g + self.nu[(k, c)]).max(0.0);
                sums[1] += (g - s) * (g - s);
                sums[3] += (s - self.s[(k, c)]) * (s - self.s[(k, c)]);
                self.nu[(k, c)] += rate * (g - s);
                self.s[(k, c)] = s;
            }
        }
        self.residuals = sums.map(f64::sqrt);
    }

    /// Whether all residuals are small beside the iterates.
    fn met(&self, tol: f64) -> bool {
        let scale = 1.0 + self.u.norm_l2().max(self.scores.norm_l2());
        let dual = 1.0 + self.config.rho * self.lambda.norm_l2().max(self.nu.norm_l2());
        let [a, b, c, d] = self.residuals;
        a.max(b) <= tol * scale && self.config.rho * c.max(d) <= tol * dual
    }

    /// Conjugate gradients on `(I + F'F / rho + G'G) u = right`.
    fn conjugate(&mut self, right: &Mat<f64>, tol: f64, max_iter: usize) {
        let apply = |run: &mut Self, p: &Mat<f64>| {
            product(run.scores.as_mut(), run.data.x.as_ref(), p.as_ref());
            let t = run.gated_outputs();
            let inner = Mat::from_fn(run.s.nrows(), run.s.ncols(), |k, c| {
                run.gates[(k, c)] * t[(k, 0)] / run.config.rho + run.scores[(k, c)]
            });
            let mut out = p.clone();
            out += run.data.x.transpose() * &inner;
            out
        };
        let inner = |a: &Mat<f64>, b: &Mat<f64>| -> f64 {
            (0..a.ncols())
                .map(|c| (0..a.nrows()).map(|j| a[(j, c)] * b[(j, c)]).sum::<f64>())
                .sum()
        };
        let mut u = self.u.clone();
        let mut r = right - apply(self, &u);
        let mut p = r.clone();
        let mut size = inner(&r, &r);
        let enough = (tol * right.norm_l2()).powi(2);
        for _ in 0..max_iter {
            if size <= enough {
                break;
            }
            let ap = apply(self, &p);
            let alpha = size / inner(&p, &ap);
            u += faer::Scale(alpha) * &p;
            r -= faer::Scale(alpha) * &ap;
            let next = inner(&r, &r);
            p = &r + faer::Scale(next / size) * &p;
            size = next;
        }
        self.u = u;
    }

    /// Random block coordinate descent with backtracking on the problem of this step.
    fn blocks(&mut self) -> Result<()> {
        let Primal::Rbcd { seed, steps, tol } = self.config.primal else {
            return Ok(());
        };
        let columns = self.u.ncols();
        let mut stream = RandomStream::new(seed).split_index("step", self.iterations as u64);
        product(self.scores.as_mut(), self.data.x.as_ref(), self.u.as_ref());
        let mut outputs: Vec<f64> = {
            let t = self.gated_outputs();
            (0..t.nrows()).map(|k| t[(k, 0)]).collect()
        };
        let inner = Mat::from_fn(self.s.nrows(), columns, |k, c| {
            self.signs[(k, c)] * (self.s[(k, c)] - self.nu[(k, c)])
        });
        let pull = self.data.x.transpose() * &inner;
        let (mut start, mut decrease) = (1.0, 0.0);
        for t in 0..steps {
            let c = stream.below(columns)?;
            decrease += self.block_step(c, &pull, &mut outputs, &mut start);
            if (t + 1) % columns == 0 {
                if decrease / columns as f64 <= tol {
                    break;
                }
                decrease = 0.0;
            }
        }
        Ok(())
    }

    /// One step on column `c`; gives by how much the objective of the step decreased.
    fn block_step(
        &mut self,
        c: usize,
        pull: &Mat<f64>,
        outputs: &mut [f64],
        start: &mut f64,
    ) -> f64 {
        let (n, d, rho) = (self.s.nrows(), self.u.nrows(), self.config.rho);
        let x = &self.data.x;
        let slopes = self.slopes(outputs);
        // The smooth quadratic part's gradient, and the loss's.
        let quadratic: Vec<f64> = (0..d)
            .map(|j| {
                let own: f64 = (0..d).map(|i| self.gram[(j, i)] * self.u[(i, c)]).sum();
                rho * (self.u[(j, c)] - self.v[(j, c)] + self.lambda[(j, c)] + own - pull[(j, c)])
            })
            .collect();
        let gradient: Vec<f64> = (0..d)
            .map(|j| {
                let loss: f64 = (0..n)
                    .map(|k| x[(k, j)] * self.gates[(k, c)] * slopes[k])
                    .sum();
                loss + quadratic[j]
            })
            .collect();
        let zeros = vec![0.0; n];
        let before = self.config.loss.worst(outputs, &self.data.y, &zeros);
        let mut alpha = *start;
        for _ in 0..40 {
            let step: Vec<f64> = gradient.iter().map(|g| -alpha * g).collect();
            let scores: Vec<f64> = (0..n)
                .map(|k| (0..d).map(|j| x[(k, j)] * step[j]).sum())
                .collect();
            let moved: Vec<f64> = (0..n)
                .map(|k| outputs[k] + self.gates[(k, c)] * scores[k])
                .collect();
            let change = self.config.loss.worst(&moved, &self.data.y, &zeros) - before
                + dot(&quadratic, &step)
                + 0.5 * rho * (dot(&step, &step) + dot(&scores, &scores));
            if change <= -1e-3 * norm(&step) * norm(&gradient) || change == 0.0 {
                (0..d).for_each(|j| self.u[(j, c)] += step[j]);
                outputs.copy_from_slice(&moved);
                *start = alpha * 1.05;
                return -change;
            }
            alpha /= 2.5;
        }
        *start /= 1.5;
        0.0
    }

    /// The derivative of the loss by each output.
    fn slopes(&self, outputs: &[f64]) -> Vec<f64> {
        let n = outputs.len() as f64;
        let pairs = outputs.iter().zip(&self.data.y);
        pairs
            .map(|(f, y)| match self.config.loss {
                ConvexLoss::Squared => f - y,
                _ => -y / (1.0 + (y * f).exp()) / n,
            })
            .collect()
    }

    /// Everything that changes.
    pub fn state(&self) -> AdmmState {
        let units = |m: &Mat<f64>| -> Vec<f64> {
            (0..m.ncols())
                .flat_map(|c| (0..m.nrows()).map(move |j| m[(j, c)]))
                .collect()
        };
        let p = self.patterns.len();
        let rows = |m: &Mat<f64>| -> Vec<f64> {
            let at = |e: usize| m[(e / p % m.nrows(), e % p + p * (e / (p * m.nrows())))];
            (0..m.nrows() * m.ncols()).map(at).collect()
        };
        AdmmState {
            u: units(&self.u),
            v: units(&self.v),
            s: rows(&self.s),
            lambda: units(&self.lambda),
            nu: rows(&self.nu),
            iterations: self.iterations,
        }
    }

    /// Goes on from a state.
    ///
    /// # Errors
    /// [`Error::Shape`] for a state of another size.
    pub fn restore(&mut self, state: &AdmmState) -> Result<()> {
        let (d, n, p) = (self.u.nrows(), self.s.nrows(), self.patterns.len());
        for (what, x) in [("u", &state.u), ("v", &state.v), ("lambda", &state.lambda)] {
            check::length(what, x.len(), 2 * p * d)?;
        }
        for (what, x) in [("s", &state.s), ("nu", &state.nu)] {
            check::length(what, x.len(), 2 * p * n)?;
        }
        let units = |x: &[f64]| Mat::from_fn(d, 2 * p, |j, c| x[c * d + j]);
        let rows = |x: &[f64]| Mat::from_fn(n, 2 * p, |k, c| x[c / p * n * p + k * p + c % p]);
        self.u = units(&state.u);
        self.v = units(&state.v);
        self.lambda = units(&state.lambda);
        self.s = rows(&state.s);
        self.nu = rows(&state.nu);
        self.iterations = state.iterations;
        Ok(())
    }

    /// The objective of `v` with gated outputs, `|u - v|`, `|G u - s|`, and the largest violation of
    /// `v`'s cones.
    pub fn progress(&self) -> [f64; 4] {
        let (v, w) = self.units();
        let all = vec![true; self.u.nrows()];
        let violated = violation(&self.data.x, &self.patterns, &v, 0.0, &all).max(violation(
            &self.data.x,
            &self.patterns,
            &w,
            0.0,
            &all,
        ));
        let [primal, slack, ..] = self.residuals;
        [self.objective(&v, &w), primal, slack, violated]
    }

    fn units(&self) -> (Vec<f64>, Vec<f64>) {
        let mut v = self.state().v;
        let w = v.split_off(v.len() / 2);
        (v, w)
    }

    fn objective(&self, v: &[f64], w: &[f64]) -> f64 {
        let d = self.u.nrows();
        let all = vec![true; d];
        let (outputs, _) = outputs_and_slack(&self.data.x, &self.patterns, v, w, &all);
        let zeros = vec![0.0; outputs.len()];
        self.config.loss.worst(&outputs, &self.data.y, &zeros)
            + self.config.beta * (group_norms(v, d) + group_norms(w, d))
    }

    /// The model at this point, its units projected on their cones.
    ///
    /// # Errors
    /// Those of the projection.
    pub fn model(&self) -> Result<ConvexReluModel> {
        let (mut v, mut w) = self.units();
        self.project(&mut v)?;
        self.project(&mut w)?;
        let objective = self.objective(&v, &w);
        let all = vec![true; self.u.nrows()];
        let violation = violation(&self.data.x, &self.patterns, &v, 0.0, &all).max(violation(
            &self.data.x,
            &self.patterns,
            &w,
            0.0,
            &all,
        ));
        let bound = self.lower_bound(&v, &w);
        Ok(ConvexReluModel {
            patterns: self.patterns.clone(),
            gap: bound.map_or(f64::INFINITY, |b| objective - b),
            violation,
            objective,
            v,
            w,
            iterations: self.iterations,
            converged: self.met(self.config.tol),
        })
    }

    /// Each unit to the nearest point of its cone: `v + A'q` with `q >= 0` of least `|v + A'q|`.
    fn project(&self, units: &mut [f64]) -> Result<()> {
        let (n, d) = (self.s.nrows(), self.u.nrows());
        let solver = BlockCd::new(BlockCdConfig {
            penalty: Penalty::NonNegative { l1: 0.0 },
            select: Select::ProxGsq,
            update: Update::TwoMetric,
            block_size: n,
            tol: 1e-12,
            max_iter: 200,
            ..BlockCdConfig::default()
        })?;
        for (i, unit) in units.chunks_mut(d).enumerate() {
            let sign = |k: usize| self.signs[(k, i)];
            let score = |k: usize| -> f64 { (0..d).map(|j| self.data.x[(k, j)] * unit[j]).sum() };
            if (0..n).all(|k| sign(k) * score(k) >= 0.0) {
                continue;
            }
            let cone: Vec<f64> = (0..d * n)
                .map(|e| sign(e % n) * self.data.x[(e % n, e / n)])
                .collect();
            let target: Vec<f64> = unit.iter().map(|x| -x).collect();
            let mut nearest = LeastSquares::new(Columns::from_slice(d, n, &cone)?, &target)?;
            let report = solver.solve(&mut nearest, &vec![0.0; n], &mut RandomStream::new(0))?;
            nearest.reset(&report.x);
            for (j, x) in unit.iter_mut().enumerate() {
                let row = &cone[j * n..(j + 1) * n];
                *x += dot(row, &report.x);
            }
        }
        Ok(())
    }

    /// A bound of the optimum by the dual problem, at the residual and the cones' multipliers scaled
    /// until they are feasible; for the squared loss.
    fn lower_bound(&self, v: &[f64], w: &[f64]) -> Option<f64> {
        if self.config.loss != ConvexLoss::Squared {
            return None;
        }
        let (n, d) = (self.s.nrows(), self.u.nrows());
        let all = vec![true; d];
        let (outputs, _) = outputs_and_slack(&self.data.x, &self.patterns, v, w, &all);
        let residual: Vec<f64> = (0..n).map(|k| self.data.y[k] - outputs[k]).collect();
        let inner = Mat::from_fn(n, self.s.ncols(), |k, c| {
            let multiplier = (-self.config.rho * self.nu[(k, c)]).max(0.0);
            self.gates[(k, c)] * residual[k] + self.signs[(k, c)] * multiplier
        });
        let forces = self.data.x.transpose() * &inner;
        let largest = (0..forces.ncols())
            .map(|c| forces.col(c).norm_l2())
            .fold(0.0, f64::max);
        let (square, along) = (dot(&residual, &residual), dot(&residual, &self.data.y));
        let most = if largest > 0.0 {
            self.config.beta / largest
        } else {
            f64::INFINITY
        };
        let best = if square > 0.0 { along / square } else { 0.0 };
        let scale = best.min(most).max(0.0);
        Some(scale * along - 0.5 * scale * scale * square)
    }
}
