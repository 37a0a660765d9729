//! The quadratic problem of a step, and the proximal updates after it.

use super::{columns, gate, AdmmConfig, AdmmRun, Gates, Primal};
use crate::linalg::{axpy, conjugate_gradient, dot, norm, product};
use crate::relu::Data;
use crate::{Error, RandomStream, Result};
use faer::linalg::matmul::matmul;
use faer::linalg::solvers::{Llt, Solve};
use faer::{Accum, Mat, MatMut, MatRef, Par, Side};
use rayon::prelude::*;

/// The systems that are factored once.
pub(super) enum Factor {
    /// `(I + X'X)^-1`, `X (I + X'X)^-1`, and the factor of the `n x n` system.
    Woodbury {
        inverse: Mat<f64>,
        times_inverse: Mat<f64>,
        small: Llt<f64>,
    },
    Cholesky(Llt<f64>),
    None,
}

/// Units that are worked on together, whatever the number of threads: their slacks fit a core's cache.
const PIECE: usize = 64;

fn factorize(matrix: &Mat<f64>, what: &'static str, rho: f64) -> Result<Llt<f64>> {
    matrix.llt(Side::Lower).map_err(|e| Error::Indefinite {
        what,
        kind: "definite",
        detail: format!("its Cholesky factorization failed ({e:?}) at rho = {rho}: raise it"),
    })
}

impl Factor {
    pub(super) fn new(
        config: &AdmmConfig,
        data: &Data,
        gates: &Gates,
        gram: MatRef<'_, f64>,
    ) -> Result<Self> {
        let (n, d) = (data.x.nrows(), data.x.ncols());
        let rho = config.rho;
        let entry = |k: usize, c: usize| {
            let (signs, own) = gates.of(c);
            gate(signs[k], own)
        };
        match config.primal {
            Primal::Woodbury => {
                let b = gram + Mat::<f64>::identity(d, d);
                let mut inverse = Mat::identity(d, d);
                factorize(&b, "I + X'X", rho)?.solve_in_place(inverse.as_mut());
                let times_inverse = &data.x * &inverse;
                let kernel = &times_inverse * data.x.transpose();
                let both = Mat::from_fn(n, gates.units(), entry);
                // Both signs of each pattern: twice `D D'`.
                let overlap = &both * both.transpose();
                let small = Mat::from_fn(n, n, |k, l| {
                    let ridge = if k == l { rho } else { 0.0 };
                    ridge + kernel[(k, l)] * overlap[(k, l)]
                });
                Ok(Self::Woodbury {
                    small: factorize(&small, "the n x n system", rho)?,
                    inverse,
                    times_inverse,
                })
            }
            Primal::Cholesky => {
                let size = gates.units() * d;
                let f = Mat::from_fn(n, size, |k, e| entry(k, e / d) * data.x[(k, e % d)]);
                let mut full = f.transpose() * &f;
                for e in 0..size {
                    for g in 0..size {
                        full[(e, g)] /= rho;
                        if e / d == g / d {
                            full[(e, g)] += gram[(e % d, g % d)];
                        }
                    }
                    full[(e, e)] += 1.0;
                }
                Ok(Self::Cholesky(factorize(&full, "the full system", rho)?))
            }
            _ => Ok(Self::None),
        }
    }
}

/// `out = lhs columns(rhs)`, on this thread.
fn multiply(out: &mut [f64], lhs: MatRef<'_, f64>, rhs: &[f64]) {
    let rhs = columns(rhs, lhs.ncols());
    let out = MatMut::from_column_major_slice_mut(out, lhs.nrows(), rhs.ncols());
    matmul(out, Accum::Replace, lhs, rhs, 1.0, Par::Seq);
}

/// `out = lhs columns(rhs)`, on all threads.
fn multiply_all(out: &mut [f64], lhs: MatRef<'_, f64>, rhs: &[f64]) {
    let rhs = columns(rhs, lhs.ncols());
    let out = MatMut::from_column_major_slice_mut(out, lhs.nrows(), rhs.ncols());
    product(out, lhs, rhs);
}

impl Gates {
    /// `G'(s - nu) + F'y / rho` before the product with `X'`, of the units from `first` on.
    fn pulls(&self, first: usize, s: &[f64], nu: &[f64], y: &[f64], rho: f64, out: &mut [f64]) {
        let parts = s.chunks_exact(self.n).zip(nu.chunks_exact(self.n));
        for (c, (out, (s, nu))) in out.chunks_exact_mut(self.n).zip(parts).enumerate() {
            let (signs, own) = self.of(first + c);
            for k in 0..self.n {
                out[k] = signs[k] * (s[k] - nu[k]) + gate(signs[k], own) * (y[k] / rho);
            }
        }
    }

    /// Adds `F u` from the scores of the units from `first` on.
    fn add_outputs(&self, first: usize, scores: &[f64], out: &mut [f64]) {
        for (c, scores) in scores.chunks_exact(self.n).enumerate() {
            let (signs, own) = self.of(first + c);
            for k in 0..self.n {
                out[k] += gate(signs[k], own) * scores[k];
            }
        }
    }

    /// `F't` before the product with `X'`, of the units from `first` on.
    fn spread(&self, first: usize, t: &[f64], out: &mut [f64]) {
        for (c, out) in out.chunks_exact_mut(self.n).enumerate() {
            let (signs, own) = self.of(first + c);
            for k in 0..self.n {
                out[k] = gate(signs[k], own) * t[k];
            }
        }
    }
}

/// What the proximal updates of a run of units work on.
struct Piece<'a> {
    first: usize,
    u: &'a mut [f64],
    v: &'a mut [f64],
    lambda: &'a mut [f64],
    s: &'a mut [f64],
    nu: &'a mut [f64],
    scores: &'a mut [f64],
}

impl Piece<'_> {
    /// The v-prox and the clamp of the slacks, each with its multipliers; gives the squares of
    /// `u - v`, `G u - s` and of the changes of `v` and `s`.
    fn update(&mut self, gates: &Gates, d: usize, config: &AdmmConfig) -> [f64; 4] {
        let (shrink, rate) = (config.beta / config.rho, config.gamma_a / config.rho);
        let n = gates.n;
        let mut sums = [0.0f64; 4];
        for c in 0..self.u.len() / d {
            let (u, range) = (&self.u[c * d..(c + 1) * d], c * d..(c + 1) * d);
            let (v, lambda) = (&mut self.v[range.clone()], &mut self.lambda[range]);
            let pairs = u.iter().zip(&*lambda);
            let size = pairs.map(|(u, l)| (u + l) * (u + l)).sum::<f64>().sqrt();
            let factor = if size > shrink {
                1.0 - shrink / size
            } else {
                0.0
            };
            for j in 0..d {
                let next = factor * (u[j] + lambda[j]);
                sums[0] += (u[j] - next) * (u[j] - next);
                sums[2] += (next - v[j]) * (next - v[j]);
                lambda[j] += rate * (u[j] - next);
                v[j] = next;
            }
            let (signs, _) = gates.of(self.first + c);
            let range = c * n..(c + 1) * n;
            let scores = &self.scores[range.clone()];
            let (s, nu) = (&mut self.s[range.clone()], &mut self.nu[range]);
            let (mut gap, mut change) = ([0.0; LANES], [0.0; LANES]);
            for k in 0..n {
                let g = signs[k] * scores[k];
                let next = (g + nu[k]).max(0.0);
                gap[k % LANES] += (g - next) * (g - next);
                change[k % LANES] += (next - s[k]) * (next - s[k]);
                nu[k] += rate * (g - next);
                s[k] = next;
            }
            sums[1] += gap.iter().sum::<f64>();
            sums[3] += change.iter().sum::<f64>();
        }
        sums
    }
}

/// Sums that need not wait for each other.
const LANES: usize = 4;

impl AdmmRun {
    /// Pieces that are worked on by one thread at least: all of a problem that is done before another
    /// thread wakes up.
    fn least(&self) -> usize {
        if self.scores.len() * self.data.x.ncols() < 1 << 18 {
            return usize::MAX;
        }
        1
    }

    /// Sets `u`; with the Woodbury identity but for a correction that [`update`](Self::update) makes.
    pub(super) fn primal(&mut self) -> Result<Option<Vec<f64>>> {
        match (&self.factor, self.config.primal) {
            (Factor::Woodbury { .. }, _) => return Ok(Some(self.woodbury())),
            (Factor::Cholesky(llt), _) => {
                let right = self.right_side();
                let mut x = Mat::from_fn(right.len(), 1, |e, _| right[e]);
                llt.solve_in_place(x.as_mut());
                (0..right.len()).for_each(|e| self.u[e] = x[(e, 0)]);
            }
            (Factor::None, Primal::Cg { tol, max_iter }) => self.conjugate(tol, max_iter),
            (Factor::None, _) => self.blocks()?,
        }
        Ok(None)
    }

    /// `u = B^-1 r`, and `S^-1 F B^-1 r`: what is missing is `B^-1 F'` of that.
    fn woodbury(&mut self) -> Vec<f64> {
        let least = self.least();
        let Self {
            data,
            gates,
            config,
            factor,
            u,
            v,
            lambda,
            s,
            nu,
            scores,
            ..
        } = self;
        let Factor::Woodbury { inverse, small, .. } = factor else {
            return vec![];
        };
        let (n, d) = (gates.n, data.x.ncols());
        let pieces = (
            u.par_chunks_mut(PIECE * d),
            scores.par_chunks_mut(PIECE * n),
            v.par_chunks(PIECE * d),
            lambda.par_chunks(PIECE * d),
            s.par_chunks(PIECE * n),
            nu.par_chunks(PIECE * n),
        );
        let outputs: Vec<Vec<f64>> = pieces
            .into_par_iter()
            .with_min_len(least)
            .enumerate()
            .map(|(piece, (u, scores, v, lambda, s, nu))| {
                let first = piece * PIECE;
                gates.pulls(first, s, nu, &data.y, config.rho, scores);
                let mut right = vec![0.0; u.len()];
                multiply(&mut right, data.x.transpose(), scores);
                for ((r, v), l) in right.iter_mut().zip(v).zip(lambda) {
                    *r += v - l;
                }
                multiply(u, inverse.as_ref(), &right);
                multiply(scores, data.x.as_ref(), u);
                let mut outputs = vec![0.0; n];
                gates.add_outputs(first, scores, &mut outputs);
                outputs
            })
            .collect();
        let mut t = Mat::zeros(n, 1);
        for outputs in &outputs {
            (0..n).for_each(|k| t[(k, 0)] += outputs[k]);
        }
        small.solve_in_place(t.as_mut());
        (0..n).map(|k| t[(k, 0)]).collect()
    }

    /// The correction of `u`, its scores, and all that follows from them, a piece at a time.
    pub(super) fn update(&mut self, correction: Option<&[f64]>) {
        let least = self.least();
        let Self {
            data,
            gates,
            config,
            factor,
            u,
            v,
            lambda,
            s,
            nu,
            scores,
            ..
        } = self;
        let (n, d) = (gates.n, data.x.ncols());
        let pieces = (
            u.par_chunks_mut(PIECE * d),
            v.par_chunks_mut(PIECE * d),
            lambda.par_chunks_mut(PIECE * d),
            s.par_chunks_mut(PIECE * n),
            nu.par_chunks_mut(PIECE * n),
            scores.par_chunks_mut(PIECE * n),
        );
        let sums: Vec<[f64; 4]> = pieces
            .into_par_iter()
            .with_min_len(least)
            .enumerate()
            .map(|(piece, (u, v, lambda, s, nu, scores))| {
                let first = piece * PIECE;
                if let (Some(t), Factor::Woodbury { times_inverse, .. }) = (correction, &*factor) {
                    gates.spread(first, t, scores);
                    let mut moved = vec![0.0; u.len()];
                    multiply(&mut moved, times_inverse.transpose(), scores);
                    axpy(-1.0, &moved, u);
                }
                multiply(scores, data.x.as_ref(), u);
                let mut piece = Piece {
                    first,
                    u,
                    v,
                    lambda,
                    s,
                    nu,
                    scores,
                };
                piece.update(gates, d, config)
            })
            .collect();
        let mut total = [0.0; 4];
        for sums in sums {
            (0..4).for_each(|i| total[i] += sums[i]);
        }
        self.residuals = total.map(f64::sqrt);
    }

    /// `F'y / rho + v - lambda + G'(s - nu)`
    fn right_side(&self) -> Vec<f64> {
        let mut inner = vec![0.0; self.s.len()];
        self.gates.pulls(
            0,
            &self.s,
            &self.nu,
            &self.data.y,
            self.config.rho,
            &mut inner,
        );
        let mut out = vec![0.0; self.u.len()];
        multiply_all(&mut out, self.data.x.transpose(), &inner);
        for (e, out) in out.iter_mut().enumerate() {
            *out += self.v[e] - self.lambda[e];
        }
        out
    }

    /// Conjugate gradients on `(I + F'F / rho + G'G) u = right`.
    fn conjugate(&mut self, tol: f64, max_iter: usize) {
        let right = self.right_side();
        let apply = |p: &[f64]| -> Vec<f64> {
            let mut scores = vec![0.0; self.scores.len()];
            multiply_all(&mut scores, self.data.x.as_ref(), p);
            let mut t = vec![0.0; self.gates.n];
            self.gates.add_outputs(0, &scores, &mut t);
            t.iter_mut().for_each(|t| *t /= self.config.rho);
            let mut inner = vec![0.0; scores.len()];
            self.gates.spread(0, &t, &mut inner);
            axpy(1.0, &scores, &mut inner);
            let mut out = vec![0.0; p.len()];
            multiply_all(&mut out, self.data.x.transpose(), &inner);
            axpy(1.0, p, &mut out);
            out
        };
        let u = conjugate_gradient(apply, &right, self.u.clone(), tol, max_iter);
        self.u = u;
    }

    /// Random block coordinate descent with backtracking on the problem of this step.
    fn blocks(&mut self) -> Result<()> {
        let Primal::Rbcd { seed, steps, tol } = self.config.primal else {
            return Ok(());
        };
        let units = self.gates.units();
        let mut stream = RandomStream::new(seed).split_index("step", self.iterations as u64);
        multiply_all(&mut self.scores, self.data.x.as_ref(), &self.u);
        let mut outputs = vec![0.0; self.gates.n];
        self.gates.add_outputs(0, &self.scores, &mut outputs);
        let mut inner = vec![0.0; self.s.len()];
        // Without the targets, which the loss has.
        let none = vec![0.0; self.gates.n];
        self.gates
            .pulls(0, &self.s, &self.nu, &none, 1.0, &mut inner);
        let mut pull = vec![0.0; self.u.len()];
        multiply_all(&mut pull, self.data.x.transpose(), &inner);
        let (mut start, mut decrease) = (1.0, 0.0);
        for t in 0..steps {
            let c = stream.below(units)?;
            decrease += self.block_step(c, &pull, &mut outputs, &mut start);
            if (t + 1) % units == 0 {
                if decrease / units as f64 <= tol {
                    break;
                }
                decrease = 0.0;
            }
        }
        Ok(())
    }

    /// One step on unit `c`; gives by how much the objective of the step decreased.
    fn block_step(&mut self, c: usize, pull: &[f64], outputs: &mut [f64], start: &mut f64) -> f64 {
        let (n, d, rho) = (self.gates.n, self.data.x.ncols(), self.config.rho);
        let x = &self.data.x;
        let (signs, own) = self.gates.of(c);
        let slopes = self.data.slopes(self.config.loss, outputs);
        // The smooth quadratic part's gradient, and the loss's.
        let quadratic: Vec<f64> = (0..d)
            .map(|j| {
                let own: f64 = (0..d).map(|i| self.gram[(j, i)] * self.u[c * d + i]).sum();
                let e = c * d + j;
                rho * (self.u[e] - self.v[e] + self.lambda[e] + own - pull[e])
            })
            .collect();
        let gradient: Vec<f64> = (0..d)
            .map(|j| {
                let loss: f64 = (0..n)
                    .map(|k| x[(k, j)] * gate(signs[k], own) * slopes[k])
                    .sum();
                loss + quadratic[j]
            })
            .collect();
        let before = self.data.loss(self.config.loss, outputs, None);
        let mut alpha = *start;
        for _ in 0..40 {
            let step: Vec<f64> = gradient.iter().map(|g| -alpha * g).collect();
            let scores: Vec<f64> = (0..n)
                .map(|k| (0..d).map(|j| x[(k, j)] * step[j]).sum())
                .collect();
            let moved: Vec<f64> = (0..n)
                .map(|k| outputs[k] + gate(signs[k], own) * scores[k])
                .collect();
            let change = self.data.loss(self.config.loss, &moved, None) - before
                + dot(&quadratic, &step)
                + 0.5 * rho * (dot(&step, &step) + dot(&scores, &scores));
            if change <= -1e-3 * norm(&step) * norm(&gradient) || change == 0.0 {
                axpy(1.0, &step, &mut self.u[c * d..(c + 1) * d]);
                outputs.copy_from_slice(&moved);
                *start = alpha * 1.05;
                return -change;
            }
            alpha /= 2.5;
        }
        *start /= 1.5;
        0.0
    }
}
