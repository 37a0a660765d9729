//! What a trained head separates, and how far it points to the maximum margin.

use super::svm::Constraints;
use super::{cosine, rank, AttSvm, AttentionData, Selection, SvmNorm};
use crate::error::check;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use faer::Mat;
use std::collections::HashMap;
use std::path::Path;

/// The projections of one head.
#[derive(Debug, Clone)]
pub struct HeadWeights {
    /// Keys, `[d_head, d]`.
    pub w_k: Tensor,
    /// Queries, `[d_head, e]`.
    pub w_q: Tensor,
    /// The keys' bias, `[d_head]`.
    pub b_k: Option<Tensor>,
    /// The queries' bias, `[d_head]`.
    pub b_q: Option<Tensor>,
}

impl HeadWeights {
    /// Head `head` of `heads` from a safetensors file in which the layers are called `key` and `query`
    /// (`KEY.weight`, `KEY.bias` if there is one). Rows are output features.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a name that the file lacks or rows that `heads` does not divide,
    /// and those of candle.
    pub fn load(
        path: impl AsRef<Path>,
        key: &str,
        query: &str,
        head: usize,
        heads: usize,
    ) -> Result<Self> {
        let tensors = candle_core::safetensors::load(path, &Device::Cpu)?;
        Self::from_tensors(&tensors, key, query, head, heads)
    }

    /// The same from named tensors.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn from_tensors(
        tensors: &HashMap<String, Tensor>,
        key: &str,
        query: &str,
        head: usize,
        heads: usize,
    ) -> Result<Self> {
        check::at_least("heads", heads, 1)?;
        if head >= heads {
            return Err(Error::config("head", head, format!("below {heads}")));
        }
        let part = |tensor: &Tensor| -> Result<Tensor> {
            let rows = tensor.dims().first().copied().unwrap_or(0);
            if rows == 0 || !rows.is_multiple_of(heads) {
                return Err(Error::config(
                    "heads",
                    heads,
                    format!("a divisor of {rows} rows"),
                ));
            }
            Ok(tensor.narrow(0, head * rows / heads, rows / heads)?)
        };
        let weight = |layer: &str| {
            let name = format!("{layer}.weight");
            let tensor = tensors.get(&name);
            part(tensor.ok_or_else(|| Error::config("tensor", &name, "a name in the file"))?)
        };
        let bias = |layer: &str| tensors.get(&format!("{layer}.bias")).map(part).transpose();
        Ok(Self {
            w_k: weight(key)?,
            w_q: weight(query)?,
            b_k: bias(key)?,
            b_q: bias(query)?,
        })
    }

    /// `W = W_k' W_q / sqrt(d_head)`, `[d, e]`. With biases both sides have one more row and column:
    /// append a one to every token and query.
    ///
    /// # Errors
    /// [`Error::Shape`] where the two have another number of rows, or one has a bias and the other
    /// not.
    pub fn combined(&self) -> Result<Tensor> {
        let with = |w: &Tensor, b: &Option<Tensor>| -> Result<Tensor> {
            let w = w.to_dtype(DType::F64)?;
            match b {
                Some(b) => Ok(Tensor::cat(&[w, b.to_dtype(DType::F64)?.unsqueeze(1)?], 1)?),
                None => Ok(w),
            }
        };
        if self.b_k.is_some() != self.b_q.is_some() {
            return Err(Error::shape("biases", &[], "both or none"));
        }
        let (k, q) = (with(&self.w_k, &self.b_k)?, with(&self.w_q, &self.b_q)?);
        if k.dim(0)? != q.dim(0)? {
            let expected = format!("[{}, e]", k.dim(0)?);
            return Err(Error::shape("w_q", q.dims(), expected));
        }
        let scale = 1.0 / (k.dim(0)? as f64).sqrt();
        Ok((k.t()?.matmul(&q)? * scale)?)
    }
}

/// What [`head_report`] found.
#[derive(Debug, Clone)]
pub struct HeadReport {
    /// The most probable token of each query.
    pub selection: Selection,
    /// Its probability.
    pub concentration: Vec<f64>,
    /// Queries with a concentration of at least 0.9, to which all that follows refers.
    pub used: Vec<usize>,
    /// Queries left out: for them take [`generalized_svm`](super::generalized_svm).
    pub dropped: usize,
    /// Whether some weights select these tokens.
    pub feasible: bool,
    /// Cosine with the Frobenius solution, where there is one.
    pub cosine_to_fro: Option<f64>,
    /// Cosine with the nuclear solution, where there is one.
    pub cosine_to_nuc: Option<f64>,
    /// `(x_alpha - x_t)' W z` of the head itself, by query and token.
    pub margins: Vec<f64>,
    /// The smallest margin over `|W|_F`, beside the largest that is possible, `1 / |W^mm|_F`: 1 for the
    /// maximum-margin direction.
    pub relative_margin: Option<f64>,
    /// `|W|_F / |W^mm|_F`: how far the head has grown along it.
    pub norm_growth: Option<f64>,
    /// Rank of the head, to a millionth of its largest singular value.
    pub rank: usize,
    /// Rank of the Frobenius and of the nuclear solution.
    pub svm_ranks: Option<(usize, usize)>,
}

/// Queries whose most probable token has less are left out.
const CONCENTRATED: f64 = 0.9;

/// Compares a head's `W` `[d, e]` with the SVM of the tokens that it selects. The probabilities `[n, T]`
/// are computed from `W` where they are not given.
///
/// # Errors
/// [`Error::Shape`], [`Error::NonFinite`], [`Error::NotConverged`]. A head that nothing separates is no
/// error: [`HeadReport::feasible`].
pub fn head_report(
    data: &AttentionData,
    w: &Tensor,
    attention_probs: Option<&[f64]>,
) -> Result<HeadReport> {
    let weights = data.weights(w)?;
    let probs = match attention_probs {
        Some(probs) => {
            check::length("attention_probs", probs.len(), data.n * data.tokens)?;
            check::finite("attention_probs", probs)?;
            probs.to_vec()
        }
        None => data.probabilities(w)?,
    };
    let selection = Selection::of(&probs, data.tokens);
    let chosen = probs.chunks(data.tokens).zip(&selection.0);
    let concentration: Vec<f64> = chosen.map(|(row, &t)| row[t]).collect();
    let sharp = |i: &usize| concentration[*i] >= CONCENTRATED && data.length(*i) > 1;
    let used: Vec<usize> = (0..data.n).filter(sharp).collect();
    let mut report = HeadReport {
        dropped: data.n - used.len(),
        feasible: false,
        cosine_to_fro: None,
        cosine_to_nuc: None,
        margins: vec![],
        relative_margin: None,
        norm_growth: None,
        rank: rank(&weights)?,
        svm_ranks: None,
        selection,
        concentration,
        used,
    };
    if report.used.is_empty() {
        return Ok(report);
    }
    compare(data, &weights, &mut report)?;
    Ok(report)
}

fn compare(data: &AttentionData, weights: &Mat<f64>, report: &mut HeadReport) -> Result<()> {
    let subset = data.subset(&report.used);
    let picked = Selection(report.used.iter().map(|&i| report.selection.0[i]).collect());
    report.margins = match Constraints::new(&subset, &picked) {
        Ok(constraints) => constraints.margins(weights),
        Err(Error::Infeasible { .. }) => return Ok(()),
        Err(other) => return Err(other),
    };
    let solve = |norm| {
        let solver = AttSvm {
            norm,
            ..AttSvm::default()
        };
        match solver.solve(&subset, &picked) {
            Ok(solution) => Ok(Some(solution)),
            Err(Error::Infeasible { .. }) => Ok(None),
            Err(other) => Err(other),
        }
    };
    let Some(fro) = solve(SvmNorm::Frobenius)? else {
        return Ok(());
    };
    report.feasible = true;
    let best = data.weights(&fro.w)?;
    let size = weights.norm_l2();
    let least = report.margins.iter().copied().fold(f64::INFINITY, f64::min);
    report.cosine_to_fro = Some(cosine(weights, &best));
    report.norm_growth = Some(size / fro.norm);
    report.relative_margin = Some(if size > 0.0 {
        least / size * fro.norm
    } else {
        0.0
    });
    if let Some(nuc) = solve(SvmNorm::Nuclear { rank_cap: None })? {
        report.cosine_to_nuc = Some(cosine(weights, &data.weights(&nuc.w)?));
        report.svm_ranks = Some((fro.rank, nuc.rank));
    }
    Ok(())
}
