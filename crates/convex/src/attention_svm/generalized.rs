//! Several tokens per query: a finite part that sets the ratios of their probabilities, and a direction
//! that separates them from the rest.

use super::{inner, to_tensor, AttentionData};
use crate::error::check;
use crate::linalg::{axpy, dot, solve_psd};
use crate::{Error, Result};
use candle_core::Tensor;
use clarabel::algebra::CscMatrix;
use clarabel::solver::{DefaultSettings, DefaultSolver, IPSolver, SolverStatus, SupportedConeT};
use faer::Mat;

/// The tokens that each query keeps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MultiSelection(pub Vec<Vec<usize>>);

/// `W ~ W_fin + R W_dir`
#[derive(Debug, Clone)]
pub struct GeneralizedSolution {
    /// The tokens with a probability of at least the threshold.
    pub selection: MultiSelection,
    /// The least weights with the right ratios of probabilities among the kept tokens, `[d, e]`.
    pub w_fin: Tensor,
    /// The least weights under which kept tokens tie and beat the others by 1, `[d, e]`.
    pub w_dir: Tensor,
}

impl GeneralizedSolution {
    /// The `R` that brings `W_fin + R W_dir` nearest to trained weights, and their cosine with it.
    ///
    /// # Errors
    /// [`Error::Shape`] for weights of another size.
    pub fn fit(&self, w: &Tensor) -> Result<(f64, f64)> {
        let (d, e) = self.w_fin.dims2()?;
        if w.dims() != [d, e] {
            return Err(Error::shape("w", w.dims(), format!("[{d}, {e}]")));
        }
        let read = |t: &Tensor| -> Result<Mat<f64>> {
            Ok(crate::linalg::from_rows(
                d,
                e,
                &crate::linalg::values("w", t)?,
            ))
        };
        let (w, fin, dir) = (read(w)?, read(&self.w_fin)?, read(&self.w_dir)?);
        let square = inner(&dir, &dir);
        let ratio = if square > 0.0 {
            inner(&(&w - &fin), &dir) / square
        } else {
            0.0
        };
        let predicted = fin + faer::Scale(ratio) * dir;
        Ok((ratio, super::cosine(&w, &predicted)))
    }
}

/// A rank-one functional of `W` with what it must be, or be at least.
struct Row<'a> {
    difference: Vec<f64>,
    query: &'a [f64],
    value: f64,
}

/// The generalized SVM of attention probabilities `[n, T]` (row-major): tokens with at least `thr` are
/// kept, the rest is to be suppressed.
///
/// # Errors
/// [`Error::Shape`], [`Error::InvalidConfig`] for a row that does not sum to one or a threshold outside
/// (0, 1), [`Error::Infeasible`] where no weights separate the kept tokens.
pub fn generalized_svm(
    data: &AttentionData,
    probs: &[f64],
    thr: f64,
) -> Result<GeneralizedSolution> {
    check::length("probs", probs.len(), data.n * data.tokens)?;
    check::finite("probs", probs)?;
    if !(thr > 0.0 && thr < 1.0) {
        return Err(Error::config("thr", thr, "a number in (0, 1)"));
    }
    let (mut kept, mut ratios, mut ties, mut beats) = (vec![], vec![], vec![], vec![]);
    for (i, row) in probs.chunks(data.tokens).enumerate() {
        let sum: f64 = row.iter().sum();
        if (sum - 1.0).abs() > 1e-6 {
            return Err(Error::config("sum of a row of probs", sum, "1"));
        }
        let seen = 0..data.length(i);
        let (inside, outside): (Vec<usize>, Vec<usize>) = seen.partition(|&t| row[t] >= thr);
        let Some(&first) = inside.first() else {
            let found = format!("{thr} for query {i}");
            return Err(Error::config("thr", found, "below the largest probability"));
        };
        let line = |from: usize, to: usize, value: f64| {
            let mut difference = data.token(i, from).to_vec();
            axpy(-1.0, data.token(i, to), &mut difference);
            Row {
                difference,
                query: data.query(i),
                value,
            }
        };
        for &b in &inside[1..] {
            ratios.push(line(b, first, (row[b] / row[first]).ln()));
            ties.push(line(first, b, 0.0));
        }
        beats.extend(outside.iter().map(|&b| line(first, b, 1.0)));
        kept.push(inside);
    }
    let (d, e) = data.shape();
    Ok(GeneralizedSolution {
        selection: MultiSelection(kept),
        w_fin: to_tensor(&least_norm(&ratios, d, e)?)?,
        w_dir: to_tensor(&direction(&ties, &beats, d, e)?)?,
    })
}

/// The least `W` with all values exactly, in the sense of least squares where they contradict.
fn least_norm(rows: &[Row<'_>], d: usize, e: usize) -> Result<Mat<f64>> {
    let mut w = Mat::zeros(d, e);
    if rows.is_empty() {
        return Ok(w);
    }
    let gram = Mat::from_fn(rows.len(), rows.len(), |r, s| {
        dot(&rows[r].difference, &rows[s].difference) * dot(rows[r].query, rows[s].query)
    });
    let right: Vec<f64> = rows.iter().map(|r| r.value).collect();
    for (row, l) in rows.iter().zip(solve_psd(gram.as_ref(), &right)?) {
        for c in 0..e {
            for r in 0..d {
                w[(r, c)] += l * row.difference[r] * row.query[c];
            }
        }
    }
    Ok(w)
}

fn direction(ties: &[Row<'_>], beats: &[Row<'_>], d: usize, e: usize) -> Result<Mat<f64>> {
    if beats.is_empty() {
        return Ok(Mat::zeros(d, e));
    }
    let (mut i, mut j, mut a, mut b) = (vec![], vec![], vec![], vec![]);
    for row in ties.iter().chain(beats) {
        for c in 0..e {
            for r in 0..d {
                i.push(b.len());
                j.push(r * e + c);
                a.push(-row.difference[r] * row.query[c]);
            }
        }
        b.push(-row.value);
    }
    let size = d * e;
    let p = CscMatrix::identity(size);
    let a = CscMatrix::new_from_triplets(b.len(), size, i, j, a);
    let mut cones = vec![];
    if !ties.is_empty() {
        cones.push(SupportedConeT::ZeroConeT(ties.len()));
    }
    cones.push(SupportedConeT::NonnegativeConeT(beats.len()));
    let settings = DefaultSettings {
        verbose: false,
        tol_gap_abs: 1e-11,
        tol_gap_rel: 1e-11,
        tol_feas: 1e-11,
        ..DefaultSettings::default()
    };
    let mut solver = DefaultSolver::new(&p, &vec![0.0; size], &a, &b, &cones, settings)
        .map_err(|e| Error::numerical("setting up the cone program", e))?;
    solver.solve();
    let solution = &solver.solution;
    match solution.status {
        SolverStatus::Solved | SolverStatus::AlmostSolved => {
            Ok(crate::linalg::from_rows(d, e, &solution.x))
        }
        SolverStatus::PrimalInfeasible | SolverStatus::AlmostPrimalInfeasible => {
            Err(Error::Infeasible {
                problem: "the generalized SVM",
                certificate: "multipliers of ties, then of margins, that contradict".into(),
                multipliers: solution.z.clone(),
            })
        }
        other => Err(Error::numerical("the interior-point method", other)),
    }
}
