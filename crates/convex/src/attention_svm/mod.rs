//! Attention weights as the solution of a support vector machine.
//!
//! For whoever asks what a trained attention head separates: given the inputs and the token that each
//! query should select, the maximum-margin weights, and a report of how far a real head points in
//! their direction. *Transformers as Support Vector Machines*, Tarzanagh, Li, Thrampoulidis, Oymak,
//! 2023, arXiv 2308.16898. With keys' side tokens `x_it`, queries' side `z_i`, logits `x_it' W z_i`:
//!
//! ```text
//! f_i = v' X_i' softmax(X_i W z_i)          L(W) = 1/n sum_i l(Y_i f_i)
//! W^mm = argmin |W|_F or |W|_*   s.t.  (x_{i,alpha_i} - x_it)' W z_i >= 1 for all t != alpha_i
//! ```
//!
//! Gradient descent on `W` goes in the direction of the Frobenius solution, on `K, Q` with
//! `W = K' Q` in that of the nuclear one, for the tokens that it comes to select.
//!
//! | symbol | here |
//! | --- | --- |
//! | `x`, `z` | [`AttentionData`] |
//! | `alpha` | [`Selection`] |
//! | `W^mm` | [`AttSvm`], [`SvmSolution`] |
//! | `O_i`, `W_fin`, `W_dir` | [`generalized_svm`] |
//!
//! `W` is `[d, e]` for tokens of `d` and queries of `e` numbers. From a layer's weights (rows = output
//! features) it is `W_k' W_q`, over `sqrt(d_head)`: [`HeadWeights::combined`]. Biases are one more
//! column of ones in `x` and `z`. Rotary and other relative positions have no single `W`.
//!
//! ```
//! use candle_core::{DType, Device};
//! use thalweg_convex::attention_svm::{AttSvm, AttentionData, Selection};
//! use thalweg_convex::RandomStream;
//!
//! let mut stream = RandomStream::new(1);
//! let x = stream.normal(0.0, 1.0, (3, 4, 8), DType::F64, &Device::Cpu)?;
//! let data = AttentionData::self_attention(&x, 0, None)?;
//! let solution = AttSvm::default().solve(&data, &Selection(vec![1, 0, 3]))?;
//! assert!(solution.margins.iter().all(|m| *m >= 1.0 - 1e-9));
//! assert!(solution.gap < 1e-6);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod descent;
mod generalized;
mod path;
mod report;
mod svm;

pub use descent::{attention_gradient, GdParameters, GdState, HeadLoss, NormalizedGd};
pub use generalized::{generalized_svm, GeneralizedSolution, MultiSelection};
pub use path::RegularizationPath;
pub use report::{head_report, HeadReport, HeadWeights};
pub use svm::{AttSvm, SvmNorm, SvmSolution};

use crate::error::check;
use crate::linalg::{dot, values};
use crate::{Error, Result};
use candle_core::Tensor;
use faer::Mat;

/// Tokens and queries, checked and in `f64` on the CPU.
#[derive(Debug, Clone)]
pub struct AttentionData {
    n: usize,
    tokens: usize,
    d: usize,
    e: usize,
    x: Vec<f64>,
    z: Vec<f64>,
    lengths: Vec<usize>,
}

impl AttentionData {
    /// Tokens `[n, T, d]`, queries `[n, e]`, and how many of the `T` tokens each query sees (all where
    /// `None`): padding at the end and causal masks are shorter lengths.
    ///
    /// # Errors
    /// [`Error::Shape`], [`Error::NonFinite`], [`Error::InvalidConfig`] for a length of 0 or above `T`.
    pub fn new(x: &Tensor, z: &Tensor, lengths: Option<&[usize]>) -> Result<Self> {
        let &[n, tokens, d] = x.dims() else {
            return Err(Error::shape("x", x.dims(), "[n, T, d]"));
        };
        let &[rows, e] = z.dims() else {
            return Err(Error::shape("z", z.dims(), format!("[{n}, e]")));
        };
        check::length("rows of z", rows, n)?;
        for (what, size) in [("n", n), ("T", tokens), ("d", d), ("e", e)] {
            check::at_least(what, size, 1)?;
        }
        let lengths = lengths.map_or_else(|| vec![tokens; n], <[usize]>::to_vec);
        check::length("lengths", lengths.len(), n)?;
        if let Some(bad) = lengths.iter().find(|l| **l == 0 || **l > tokens) {
            return Err(Error::config("lengths", bad, format!("1 to {tokens}")));
        }
        Ok(Self {
            n,
            tokens,
            d,
            e,
            x: values("x", x)?,
            z: values("z", z)?,
            lengths,
        })
    }

    /// Self-attention: the query of each sequence is its token `index`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn self_attention(x: &Tensor, index: usize, lengths: Option<&[usize]>) -> Result<Self> {
        let tokens = x.dims().get(1).copied().unwrap_or(0);
        if index >= tokens {
            return Err(Error::config("index", index, format!("below {tokens}")));
        }
        let z = x.narrow(1, index, 1)?.squeeze(1)?;
        Self::new(x, &z, lengths)
    }

    /// Number of queries.
    pub fn queries(&self) -> usize {
        self.n
    }

    /// Rows and columns of `W`.
    pub fn shape(&self) -> (usize, usize) {
        (self.d, self.e)
    }

    /// Tokens that query `i` sees.
    pub fn length(&self, i: usize) -> usize {
        self.lengths[i]
    }

    pub(crate) fn token(&self, i: usize, t: usize) -> &[f64] {
        let start = (i * self.tokens + t) * self.d;
        &self.x[start..start + self.d]
    }

    pub(crate) fn query(&self, i: usize) -> &[f64] {
        &self.z[i * self.e..(i + 1) * self.e]
    }

    /// `W z_i`
    pub(crate) fn keyed(&self, w: &Mat<f64>, i: usize) -> Vec<f64> {
        let mut out = vec![0.0; self.d];
        for (c, z) in self.query(i).iter().enumerate() {
            for (r, o) in out.iter_mut().enumerate() {
                *o += w[(r, c)] * z;
            }
        }
        out
    }

    /// The attention probabilities of query `i`, zero for what it does not see.
    pub(crate) fn attention(&self, w: &Mat<f64>, i: usize) -> Vec<f64> {
        let u = self.keyed(w, i);
        let logits: Vec<f64> = (0..self.lengths[i])
            .map(|t| dot(self.token(i, t), &u))
            .collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut out: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
        let sum: f64 = out.iter().sum();
        out.iter_mut().for_each(|p| *p /= sum);
        out.resize(self.tokens, 0.0);
        out
    }

    /// Attention probabilities `[n, T]`, row-major, for `W` `[d, e]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a `W` of another size.
    pub fn probabilities(&self, w: &Tensor) -> Result<Vec<f64>> {
        let w = self.weights(w)?;
        Ok((0..self.n).flat_map(|i| self.attention(&w, i)).collect())
    }

    pub(crate) fn weights(&self, w: &Tensor) -> Result<Mat<f64>> {
        if w.dims() != [self.d, self.e] {
            let expected = format!("[{}, {}]", self.d, self.e);
            return Err(Error::shape("w", w.dims(), expected));
        }
        Ok(crate::linalg::from_rows(self.d, self.e, &values("w", w)?))
    }

    /// The queries of these numbers.
    pub(crate) fn subset(&self, keep: &[usize]) -> Self {
        let x = keep.iter().flat_map(|&i| {
            let size = self.tokens * self.d;
            self.x[i * size..(i + 1) * size].iter().copied()
        });
        let z = keep.iter().flat_map(|&i| self.query(i).iter().copied());
        Self {
            n: keep.len(),
            x: x.collect(),
            z: z.collect(),
            lengths: keep.iter().map(|&i| self.lengths[i]).collect(),
            ..*self
        }
    }
}

/// The token that each query selects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Selection(pub Vec<usize>);

impl Selection {
    /// The most probable token of each row of `probabilities` `[n, T]`; ties: the first.
    pub fn of(probabilities: &[f64], tokens: usize) -> Self {
        Self(probabilities.chunks(tokens.max(1)).map(largest).collect())
    }

    pub(crate) fn fits(&self, data: &AttentionData) -> Result<()> {
        check::length("selection", self.0.len(), data.n)?;
        for (i, &t) in self.0.iter().enumerate() {
            if t >= data.lengths[i] {
                let expected = format!("below {} for query {i}", data.lengths[i]);
                return Err(Error::config("selection", t, expected));
            }
        }
        Ok(())
    }
}

fn largest(row: &[f64]) -> usize {
    let mut best = 0;
    for (t, x) in row.iter().enumerate() {
        if *x > row[best] {
            best = t;
        }
    }
    best
}

/// The scores `gamma_it = y_i <v, x_it>`, `[n, T]` row-major; `-inf` for tokens that are not seen.
///
/// # Errors
/// [`Error::Shape`] where `v` is not `[d]` or `y` not `[n]`.
pub fn token_scores(data: &AttentionData, v: &[f64], y: &[f64]) -> Result<Vec<f64>> {
    check::length("v", v.len(), data.d)?;
    check::length("y", y.len(), data.n)?;
    let score = |i: usize, t: usize| {
        if t < data.lengths[i] {
            y[i] * dot(v, data.token(i, t))
        } else {
            f64::NEG_INFINITY
        }
    };
    Ok((0..data.n)
        .flat_map(|i| (0..data.tokens).map(move |t| (i, t)))
        .map(|(i, t)| score(i, t))
        .collect())
}

/// The token with the largest score of each query.
pub fn optimal_tokens(scores: &[f64], tokens: usize) -> Selection {
    Selection::of(scores, tokens)
}

/// Whether each query's selected token beats the scores of all of its support tokens: only such
/// selections attract gradient descent.
///
/// # Errors
/// [`Error::Shape`] where the scores are not the solution's `[n, T]`.
pub fn local_optimality(solution: &SvmSolution, scores: &[f64]) -> Result<Vec<bool>> {
    let n = solution.selection.0.len();
    if n == 0 || !scores.len().is_multiple_of(n) {
        return Err(Error::shape("scores", &[scores.len()], format!("[{n}, T]")));
    }
    let tokens = scores.len() / n;
    let mut out = vec![true; n];
    for &(i, t) in &solution.support {
        let chosen = solution.selection.0[i];
        if t >= tokens || chosen >= tokens {
            return Err(Error::shape(
                "scores",
                &[n, tokens],
                "the solution's tokens",
            ));
        }
        out[i] &= scores[i * tokens + chosen] > scores[i * tokens + t];
    }
    Ok(out)
}

/// `<A, B> / (|A|_F |B|_F)`; 0 where one of them is zero.
pub(crate) fn cosine(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    let sizes = a.norm_l2() * b.norm_l2();
    if sizes == 0.0 {
        return 0.0;
    }
    inner(a, b) / sizes
}

pub(crate) fn inner(a: &Mat<f64>, b: &Mat<f64>) -> f64 {
    let columns =
        (0..a.ncols()).map(|c| (0..a.nrows()).map(|r| a[(r, c)] * b[(r, c)]).sum::<f64>());
    columns.sum()
}

pub(crate) fn to_tensor(w: &Mat<f64>) -> Result<Tensor> {
    let (d, e) = (w.nrows(), w.ncols());
    let values: Vec<f64> = (0..d * e).map(|p| w[(p / e, p % e)]).collect();
    Ok(Tensor::from_vec(values, (d, e), &candle_core::Device::Cpu)?)
}

pub(crate) fn singular_values(w: &Mat<f64>) -> Result<Vec<f64>> {
    w.singular_values()
        .map_err(|e| Error::numerical("a singular value decomposition", e))
}

/// Singular values above a millionth of the largest.
pub(crate) fn rank(w: &Mat<f64>) -> Result<usize> {
    let s = singular_values(w)?;
    let largest = s.first().copied().unwrap_or(0.0);
    Ok(s.iter().filter(|s| **s > 1e-6 * largest).count())
}
