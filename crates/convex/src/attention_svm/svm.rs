//! The maximum-margin weights: dual coordinate ascent, and splitting for the nuclear norm.

use super::{inner, rank, singular_values, to_tensor, AttentionData, Selection};
use crate::error::check;
use crate::linalg::{axpy, dot, product, solve_psd};
use crate::{Error, Result};
use candle_core::Tensor;
use clarabel::algebra::CscMatrix;
use clarabel::solver::{DefaultSettings, DefaultSolver, IPSolver, SupportedConeT};
use faer::Mat;
use std::cell::OnceCell;

/// What is minimised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SvmNorm {
    /// `|W|_F`: where gradient descent on `W` goes.
    Frobenius,
    /// `|W|_*`: where gradient descent on `K` and `Q` goes.
    Nuclear {
        /// Singular values that the low-rank copy may keep; `None` = all. With a cap the problem is
        /// not convex, and may not be solved.
        rank_cap: Option<usize>,
    },
}

/// The solver of the attention SVM.
#[derive(Debug, Clone, PartialEq)]
pub struct AttSvm {
    /// What is minimised.
    pub norm: SvmNorm,
    /// Largest violation of a margin at which coordinate ascent stops.
    pub tol: f64,
    /// Most sweeps over the constraints.
    pub max_sweeps: usize,
    /// Penalty of the splitting for the nuclear norm, in units of one over the weights.
    pub rho: f64,
    /// Most steps of the splitting.
    pub max_iter: usize,
    /// Upper end of the multipliers: a soft margin for heads that are not separable. Frobenius only.
    pub soft: Option<f64>,
}

impl Default for AttSvm {
    fn default() -> Self {
        Self {
            norm: SvmNorm::Frobenius,
            tol: 1e-12,
            max_sweeps: 100_000,
            rho: 1.0,
            max_iter: 5000,
            soft: None,
        }
    }
}

/// The weights with their certificate.
#[derive(Debug, Clone)]
pub struct SvmSolution {
    /// `W`, `[d, e]`: satisfies the constraints.
    pub w: Tensor,
    /// The copy of `w` whose singular values are exact zeros where they vanish (nuclear norm), else `w`.
    pub low_rank: Tensor,
    /// A multiplier for each constraint, by query, then token, the selected one left out.
    pub duals: Vec<f64>,
    /// `(x_alpha - x_t)' W z` of each constraint, in the same order.
    pub margins: Vec<f64>,
    /// Query and token of constraints whose margin is 1 (to 1e-3): the support tokens.
    pub support: Vec<(usize, usize)>,
    /// `|W|_F` or `|W|_*`.
    pub norm: f64,
    /// Rank of [`low_rank`](Self::low_rank), to a millionth of the largest singular value.
    pub rank: usize,
    /// The objective (`|W|_F^2` or `|W|_*`) minus a proven lower bound.
    pub gap: f64,
    /// Sweeps of coordinate ascent, or steps of the splitting.
    pub iterations: usize,
    /// The selection that was asked for.
    pub selection: Selection,
}

impl SvmSolution {
    /// Factors `K` `[r, d]` and `Q` `[r, e]` with `K' Q` the low-rank solution, both with the square
    /// roots of the singular values.
    ///
    /// # Errors
    /// Those of the decomposition.
    pub fn factors(&self) -> Result<(Tensor, Tensor)> {
        let (d, e) = self.low_rank.dims2()?;
        let values: Vec<f64> = self.low_rank.flatten_all()?.to_vec1()?;
        let w = crate::linalg::from_rows(d, e, &values);
        let svd = w
            .thin_svd()
            .map_err(|e| Error::numerical("a singular value decomposition", e))?;
        let (u, s, v) = (svd.U(), svd.S().column_vector(), svd.V());
        let r = self.rank;
        let k = Mat::from_fn(r, d, |i, j| s[i].sqrt() * u[(j, i)]);
        let q = Mat::from_fn(r, e, |i, j| s[i].sqrt() * v[(j, i)]);
        Ok((to_tensor(&k)?, to_tensor(&q)?))
    }
}

/// Constraint `(i, t)`: the rank-one matrix `A = (x_alpha - x_t) z_i'`.
pub(super) struct Constraint {
    pub query: usize,
    pub token: usize,
    pub difference: Vec<f64>,
    /// `|A|_F^2`
    pub size: f64,
}

pub(super) struct Constraints<'a> {
    pub data: &'a AttentionData,
    pub list: Vec<Constraint>,
    /// `<A_j, A_k>`, where it was asked for.
    gram: OnceCell<Mat<f64>>,
}

impl<'a> Constraints<'a> {
    pub(super) fn new(data: &'a AttentionData, selection: &Selection) -> Result<Self> {
        selection.fits(data)?;
        let mut list = Vec::new();
        for (query, &chosen) in selection.0.iter().enumerate() {
            let z = data.query(query);
            for token in (0..data.length(query)).filter(|t| *t != chosen) {
                let mut difference = data.token(query, chosen).to_vec();
                axpy(-1.0, data.token(query, token), &mut difference);
                let size = dot(&difference, &difference) * dot(z, z);
                list.push(Constraint {
                    query,
                    token,
                    difference,
                    size,
                });
            }
        }
        if list.is_empty() {
            return Err(Error::config("constraints", 0, "a query with two tokens"));
        }
        if let Some(j) = list.iter().position(|c| c.size == 0.0) {
            let mut multipliers = vec![0.0; list.len()];
            multipliers[j] = 1.0;
            return Err(Error::Infeasible {
                problem: "the attention SVM",
                certificate: format!(
                    "token {} of query {} equals the selected one, or the query is zero",
                    list[j].token, list[j].query
                ),
                multipliers,
            });
        }
        Ok(Self {
            data,
            list,
            gram: OnceCell::new(),
        })
    }

    /// `sum_j lambda_j A_j`
    fn combine(&self, lambda: &[f64]) -> Mat<f64> {
        let (d, e) = self.data.shape();
        let mut out = Mat::zeros(d, e);
        for (c, l) in self.list.iter().zip(lambda).filter(|(_, l)| **l != 0.0) {
            add(&mut out, *l, &c.difference, self.data.query(c.query));
        }
        out
    }

    pub(super) fn margins(&self, w: &Mat<f64>) -> Vec<f64> {
        let mut out = Vec::with_capacity(self.list.len());
        let mut keyed = (usize::MAX, vec![]);
        for c in &self.list {
            if keyed.0 != c.query {
                keyed = (c.query, self.data.keyed(w, c.query));
            }
            out.push(dot(&c.difference, &keyed.1));
        }
        out
    }

    /// `<A_j, A_k>` of all pairs.
    fn gram(&self) -> &Mat<f64> {
        self.gram.get_or_init(|| {
            let (n, (d, e)) = (self.list.len(), self.data.shape());
            let differences = Mat::from_fn(n, d, |j, r| self.list[j].difference[r]);
            let queries = Mat::from_fn(n, e, |j, c| self.data.query(self.list[j].query)[c]);
            let (mut x, mut z) = (Mat::zeros(n, n), Mat::zeros(n, n));
            product(x.as_mut(), differences.as_ref(), differences.transpose());
            product(z.as_mut(), queries.as_ref(), queries.transpose());
            Mat::from_fn(n, n, |j, k| x[(j, k)] * z[(j, k)])
        })
    }
}

/// `w += l x z'`
fn add(w: &mut Mat<f64>, l: f64, x: &[f64], z: &[f64]) {
    for (c, z) in z.iter().enumerate() {
        for (r, x) in x.iter().enumerate() {
            w[(r, c)] += l * z * x;
        }
    }
}

/// Sweeps before the first try to find the positive multipliers directly; then twice as many each time.
const POLISH: usize = 10;
/// Sweeps after which infeasibility is looked into.
const SUSPECT: usize = 2000;

impl AttSvm {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::positive("AttSvm::tol", self.tol)?;
        check::at_least("AttSvm::max_sweeps", self.max_sweeps, 1)?;
        check::at_least("AttSvm::max_iter", self.max_iter, 1)?;
        check::positive("AttSvm::rho", self.rho)?;
        if let Some(soft) = self.soft {
            check::positive("AttSvm::soft", soft)?;
            if self.norm != SvmNorm::Frobenius {
                return Err(Error::unsupported("a soft margin", "with the nuclear norm"));
            }
        }
        match self.norm {
            SvmNorm::Nuclear { rank_cap: Some(0) } => {
                Err(Error::config("SvmNorm::Nuclear::rank_cap", 0, "at least 1"))
            }
            _ => Ok(()),
        }
    }

    /// The maximum-margin weights for a selection.
    ///
    /// # Errors
    /// [`Error::Infeasible`] with the multipliers of constraints that contradict each other (equal
    /// tokens do: mask padding), [`Error::NotConverged`], [`Error::Shape`], [`Error::InvalidConfig`].
    pub fn solve(&self, data: &AttentionData, selection: &Selection) -> Result<SvmSolution> {
        self.validate()?;
        let constraints = Constraints::new(data, selection)?;
        let (d, e) = data.shape();
        let mut lambda = vec![0.0; constraints.list.len()];
        let zero = Mat::zeros(d, e);
        let (w, sweeps) = self.ascend(&constraints, &zero, &mut lambda)?;
        match self.norm {
            SvmNorm::Frobenius => {
                let margins = constraints.margins(&w);
                let square = inner(&w, &w);
                let sum: f64 = lambda.iter().sum();
                // The primal value of the weights scaled until they are feasible; soft margins pay
                // for what is missing.
                let missing: f64 = margins.iter().map(|m| (1.0 - m).max(0.0)).sum();
                let least = margins.iter().copied().fold(f64::INFINITY, f64::min);
                let primal = match self.soft {
                    Some(c) => square + 2.0 * c * missing,
                    None => square / (least * least),
                };
                finish(
                    &constraints,
                    selection,
                    (w.clone(), w, lambda),
                    (square.sqrt(), primal - (2.0 * sum - square), sweeps),
                )
            }
            SvmNorm::Nuclear { rank_cap } => {
                self.split(&constraints, selection, w, lambda, rank_cap)
            }
        }
    }

    /// `min 1/2 |W - W_0|^2` under the constraints, from the multipliers in `lambda`: W and sweeps.
    fn ascend(
        &self,
        constraints: &Constraints<'_>,
        offset: &Mat<f64>,
        lambda: &mut [f64],
    ) -> Result<(Mat<f64>, usize)> {
        let data = constraints.data;
        let mut w = offset + constraints.combine(lambda);
        let cap = self.soft.unwrap_or(f64::INFINITY);
        let mut worst = f64::INFINITY;
        if lambda.iter().any(|l| *l > 0.0) {
            if let Some(w) = self.exchange(constraints, offset, lambda)? {
                return Ok((w, 0));
            }
        }
        let mut next_try = POLISH;
        for sweep in 1..=self.max_sweeps {
            worst = 0.0;
            let mut j = 0;
            while j < constraints.list.len() {
                let query = constraints.list[j].query;
                let z = data.query(query);
                let size = dot(z, z);
                let mut keyed = data.keyed(&w, query);
                let mut change = vec![0.0; keyed.len()];
                while j < constraints.list.len() && constraints.list[j].query == query {
                    let c = &constraints.list[j];
                    let wanted = (1.0 - dot(&c.difference, &keyed)) / c.size;
                    let delta = wanted.clamp(-lambda[j], cap - lambda[j]);
                    if delta != 0.0 {
                        lambda[j] += delta;
                        axpy(delta * size, &c.difference, &mut keyed);
                        axpy(delta, &c.difference, &mut change);
                        worst = worst.max(delta.abs() * c.size);
                    }
                    j += 1;
                }
                add(&mut w, 1.0, &change, z);
            }
            if worst <= self.tol {
                // Sums of changes, replaced by the sum itself.
                return Ok((offset + constraints.combine(lambda), sweep));
            }
            if sweep == next_try {
                next_try *= 2;
                if let Some(w) = self.exchange(constraints, offset, lambda)? {
                    return Ok((w, sweep));
                }
            }
            if sweep == SUSPECT && self.soft.is_none() {
                contradiction(constraints)?;
            }
        }
        Err(Error::NotConverged {
            solver: "coordinate ascent",
            iterations: self.max_sweeps,
            residual: worst,
            tolerance: self.tol,
        })
    }

    /// Block principal pivoting: solves for the positive multipliers alone and exchanges those that
    /// come out negative for constraints that come out violated; the answer where none is left.
    fn exchange(
        &self,
        constraints: &Constraints<'_>,
        offset: &Mat<f64>,
        lambda: &mut [f64],
    ) -> Result<Option<Mat<f64>>> {
        const MOST: usize = 2000;
        const TRIES: usize = 40;
        let capped = self.soft.is_some_and(|c| lambda.iter().any(|l| *l >= c));
        if lambda.len() > MOST || capped {
            return Ok(None);
        }
        let gram = constraints.gram();
        let start = constraints.margins(offset);
        let mut active: Vec<bool> = lambda.iter().map(|l| *l > 0.0).collect();
        let (mut fewest, mut patience) = (usize::MAX, 3);
        for _ in 0..TRIES {
            let rows: Vec<usize> = (0..lambda.len()).filter(|&j| active[j]).collect();
            if rows.is_empty() {
                return Ok(None);
            }
            let size = rows.len();
            let part = Mat::from_fn(size, size, |r, s| gram[(rows[r], rows[s])]);
            let right: Vec<f64> = rows.iter().map(|&j| 1.0 - start[j]).collect();
            let solved = solve_psd(part.as_ref(), &right)?;
            let mut found = vec![0.0; lambda.len()];
            rows.iter().zip(&solved).for_each(|(&j, l)| found[j] = *l);
            let w = offset + constraints.combine(&found);
            let margins = constraints.margins(&w);
            let wrong: Vec<usize> = (0..lambda.len())
                .filter(|&j| match active[j] {
                    true => found[j] < 0.0,
                    false => margins[j] < 1.0 - 1e-11,
                })
                .collect();
            if wrong.is_empty() {
                let tight = rows.iter().all(|&j| (margins[j] - 1.0).abs() <= 1e-11);
                let soft = self.soft.is_none_or(|c| found.iter().all(|l| *l <= c));
                if !tight || !soft {
                    return Ok(None);
                }
                lambda.copy_from_slice(&found);
                return Ok(Some(w));
            }
            // All at once, and one at a time where that goes round in circles.
            if wrong.len() < fewest {
                (fewest, patience) = (wrong.len(), 3);
            } else if patience > 0 {
                patience -= 1;
            }
            let few = if patience > 0 {
                &wrong[..]
            } else {
                &wrong[wrong.len() - 1..]
            };
            few.iter().for_each(|&j| active[j] = !active[j]);
        }
        Ok(None)
    }

    /// ADMM on `W = Z`: the projection on the constraints, and soft thresholding of singular values.
    fn split(
        &self,
        constraints: &Constraints<'_>,
        selection: &Selection,
        start: Mat<f64>,
        mut lambda: Vec<f64>,
        rank_cap: Option<usize>,
    ) -> Result<SvmSolution> {
        const CLOSE: f64 = 1e-8;
        let (d, e) = constraints.data.shape();
        // In units of the weights, so that a scaling of the data changes nothing.
        let rho = self.rho / start.norm_max().max(f64::MIN_POSITIVE);
        let (mut w, mut z, mut u) = (start.clone(), start, Mat::<f64>::zeros(d, e));
        let scale = w.norm_max();
        lambda.fill(0.0);
        let mut distance = f64::INFINITY;
        for iteration in 1..=self.max_iter {
            let target = &z - &u;
            let inner_solver = Self {
                tol: (self.tol * 1e2).max(1e-12),
                ..self.clone()
            };
            w = inner_solver.ascend(constraints, &target, &mut lambda)?.0;
            let before = z.clone();
            z = threshold(&(&w + &u), 1.0 / rho, rank_cap)?;
            u += &w - &z;
            distance = (&w - &z).norm_max().max((&z - &before).norm_max());
            if distance <= CLOSE * scale {
                let duals: Vec<f64> = lambda.iter().map(|l| rho * l).collect();
                let spectral = singular_values(&constraints.combine(&duals))?;
                let spectral = spectral.first().copied().unwrap_or(0.0);
                let bound = duals.iter().sum::<f64>() / spectral.max(1.0);
                let norm: f64 = singular_values(&w)?.iter().sum();
                return finish(
                    constraints,
                    selection,
                    (w, z, duals),
                    (norm, norm - bound, iteration),
                );
            }
        }
        Err(Error::NotConverged {
            solver: "the nuclear-norm splitting",
            iterations: self.max_iter,
            residual: distance,
            tolerance: CLOSE * scale,
        })
    }
}

fn threshold(w: &Mat<f64>, by: f64, cap: Option<usize>) -> Result<Mat<f64>> {
    let svd = w
        .thin_svd()
        .map_err(|e| Error::numerical("a singular value decomposition", e))?;
    let (u, s, v) = (svd.U(), svd.S().column_vector(), svd.V());
    let mut out = Mat::zeros(w.nrows(), w.ncols());
    for k in 0..s.nrows().min(cap.unwrap_or(usize::MAX)) {
        let left = s[k] - by;
        if left > 0.0 {
            let (x, y): (Vec<f64>, Vec<f64>) = (
                (0..w.nrows()).map(|r| u[(r, k)]).collect(),
                (0..w.ncols()).map(|c| v[(c, k)]).collect(),
            );
            add(&mut out, left, &x, &y);
        }
    }
    Ok(out)
}

fn finish(
    constraints: &Constraints<'_>,
    selection: &Selection,
    (w, low_rank, duals): (Mat<f64>, Mat<f64>, Vec<f64>),
    (norm, gap, iterations): (f64, f64, usize),
) -> Result<SvmSolution> {
    let margins = constraints.margins(&w);
    let tight = constraints.list.iter().zip(&margins);
    let support = tight
        .filter(|(_, m)| (**m - 1.0).abs() <= 1e-3)
        .map(|(c, _)| (c.query, c.token))
        .collect();
    Ok(SvmSolution {
        w: to_tensor(&w)?,
        rank: rank(&low_rank)?,
        low_rank: to_tensor(&low_rank)?,
        duals,
        margins,
        support,
        norm,
        gap,
        iterations,
        selection: selection.clone(),
    })
}

/// Looks for the convex combination of the constraints' matrices with the least norm: where it is zero
/// no weights satisfy all.
fn contradiction(constraints: &Constraints<'_>) -> Result<()> {
    let n = constraints.list.len();
    let sizes: Vec<f64> = constraints.list.iter().map(|c| c.size.sqrt()).collect();
    let gram = constraints.gram();
    let (mut i, mut j, mut p) = (vec![], vec![], vec![]);
    for c in 0..n {
        for r in 0..=c {
            i.push(r);
            j.push(c);
            p.push(gram[(r, c)] / (sizes[r] * sizes[c]));
        }
    }
    let p = CscMatrix::new_from_triplets(n, n, i, j, p);
    // sum = 1, each at least 0
    let rows: Vec<usize> = vec![0; n].into_iter().chain(1..=n).collect();
    let columns: Vec<usize> = (0..n).chain(0..n).collect();
    let entries: Vec<f64> = [vec![1.0; n], vec![-1.0; n]].concat();
    let a = CscMatrix::new_from_triplets(n + 1, n, rows, columns, entries);
    let mut b = vec![0.0; n + 1];
    b[0] = 1.0;
    let cones = [
        SupportedConeT::ZeroConeT(1),
        SupportedConeT::NonnegativeConeT(n),
    ];
    let settings = DefaultSettings {
        verbose: false,
        tol_gap_abs: 1e-14,
        ..DefaultSettings::default()
    };
    let mut solver = DefaultSolver::new(&p, &vec![0.0; n], &a, &b, &cones, settings)
        .map_err(|e| Error::numerical("setting up the cone program", e))?;
    solver.solve();
    let pairs = solver.solution.x.iter().zip(&sizes);
    let multipliers: Vec<f64> = pairs.map(|(l, s)| l.max(0.0) / s).collect();
    let norm = constraints.combine(&multipliers).norm_l2();
    if norm > 1e-5 {
        return Ok(());
    }
    Err(Error::Infeasible {
        problem: "the attention SVM",
        certificate: format!("a convex combination of its constraints has the norm {norm:.1e}"),
        multipliers,
    })
}
