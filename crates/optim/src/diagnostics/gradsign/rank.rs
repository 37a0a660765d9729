//! Rankings of candidates by a score, and how well a ranking agrees with the truth.

use super::score::{grad_angle, grad_norm, gradsign, synflow, GradSignConfig};
use super::tape::SignTape;
use crate::{Error, Result};
use candle_core::{Tensor, Var};

type Forward<'a> = Box<dyn Fn(&Tensor) -> candle_core::Result<Tensor> + 'a>;

/// One architecture with its initial weights.
pub struct Candidate<'a> {
    /// All variables by name.
    pub params: Vec<(String, Var)>,
    /// Inputs to outputs.
    pub forward: Forward<'a>,
    /// The tape of its layers, for the factored form.
    pub tape: Option<SignTape>,
}

impl std::fmt::Debug for Candidate<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Candidate")
            .field("params", &self.params.len())
            .field("tape", &self.tape.is_some())
            .finish_non_exhaustive()
    }
}

/// Builds a candidate with the initial weights of a seed.
pub type Factory<'a> = Box<dyn Fn(u64) -> Result<Candidate<'a>> + 'a>;

/// By what candidates are ranked; higher is better for all.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyScore {
    /// The agreement of gradient signs.
    GradSign,
    /// The norm of the batch gradient.
    GradNorm,
    /// The mean cosine of examples' gradients with their mean.
    GradAngle,
    /// SynFlow, without data.
    SynFlow,
    /// The number of parameters: the baseline that every score should be seen beside.
    Parameters,
}

/// Candidates with their scores.
#[derive(Debug, Clone, PartialEq)]
pub struct Ranking {
    /// The mean score of each candidate over the seeds.
    pub scores: Vec<f64>,
    /// The number of parameters of each.
    pub parameters: Vec<usize>,
    /// Candidates from the best to the worst; those without a score (NaN) last.
    pub order: Vec<usize>,
}

impl ProxyScore {
    /// The score of one candidate on a batch; `loss` as for [`gradsign`].
    ///
    /// # Errors
    /// Those of candidate and loss.
    pub fn of(
        self,
        candidate: &Candidate<'_>,
        x: &Tensor,
        y: &Tensor,
        loss: &dyn Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<f64> {
        let (params, forward) = (&candidate.params, &candidate.forward);
        Ok(match self {
            Self::GradSign => {
                let config = GradSignConfig {
                    tape: candidate.tape.clone(),
                    ..GradSignConfig::default()
                };
                gradsign(forward, params, x, y, loss, &config)?.score
            }
            Self::GradNorm => grad_norm(&loss(&forward(x)?, y)?, params)?,
            Self::GradAngle => {
                let alone = |i| loss(&forward(&x.narrow(0, i, 1)?)?, &y.narrow(0, i, 1)?);
                grad_angle(alone, x.dim(0)?, params)?
            }
            Self::SynFlow => {
                let mut shape = x.dims().to_vec();
                shape[0] = 1;
                synflow(forward, params, &shape)?
            }
            Self::Parameters => numel(params) as f64,
        })
    }
}

fn numel(params: &[(String, Var)]) -> usize {
    params.iter().map(|(_, var)| var.elem_count()).sum()
}

/// Scores every architecture with the initial weights of each seed and ranks by the mean.
///
/// # Errors
/// [`Error::TooFew`] for no architecture or no seed; those of the factories and of the score.
pub fn rank_architectures(
    factories: &[Factory<'_>],
    (x, y): (&Tensor, &Tensor),
    loss: &dyn Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
    score: ProxyScore,
    seeds: &[u64],
) -> Result<Ranking> {
    for (of, got) in [("architectures", factories.len()), ("seeds", seeds.len())] {
        if got == 0 {
            let what = "a ranking";
            return Err(Error::TooFew {
                what,
                of,
                needed: 1,
                got,
            });
        }
    }
    let (mut scores, mut parameters) = (Vec::new(), Vec::new());
    for factory in factories {
        let (mut total, mut size) = (0.0, 0);
        for seed in seeds {
            let candidate = factory(*seed)?;
            size = numel(&candidate.params);
            total += score.of(&candidate, x, y, loss)?;
        }
        scores.push(total / seeds.len() as f64);
        parameters.push(size);
    }
    let mut order: Vec<usize> = (0..scores.len()).collect();
    let key = |i: &usize| match scores[*i].is_nan() {
        true => f64::NEG_INFINITY,
        false => scores[*i],
    };
    order.sort_by(|a, b| key(b).total_cmp(&key(a)));
    Ok(Ranking {
        scores,
        parameters,
        order,
    })
}

fn paired(a: &[f64], b: &[f64]) -> Result<()> {
    if a.len() != b.len() {
        let expected = format!("[{}]", a.len());
        return Err(Error::shape("second ranking", &[b.len()], expected));
    }
    if a.len() < 2 {
        return Err(Error::TooFew {
            what: "a rank correlation",
            of: "pairs",
            needed: 2,
            got: a.len(),
        });
    }
    for values in [a, b] {
        if let Some(bad) = values.iter().find(|x| x.is_nan()) {
            return Err(Error::argument("rank correlation", bad, "numbers"));
        }
        if values.iter().all(|x| *x == values[0]) {
            let expected = "at least two distinct values on both sides";
            return Err(Error::argument("rank correlation", values[0], expected));
        }
    }
    Ok(())
}

/// Ranks, ties sharing their mean rank.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut ranks = vec![0.0; values.len()];
    let mut from = 0;
    while from < order.len() {
        let same = |i: &&usize| values[**i] == values[order[from]];
        let count = order[from..].iter().take_while(same).count();
        for i in &order[from..from + count] {
            ranks[*i] = from as f64 + (count - 1) as f64 / 2.0;
        }
        from += count;
    }
    ranks
}

/// Spearman's rank correlation, with mean ranks for ties.
///
/// # Errors
/// [`Error::Shape`] for different lengths, [`Error::TooFew`] below two pairs,
/// [`Error::InvalidArgument`] for NaN or a constant side.
pub fn spearman(a: &[f64], b: &[f64]) -> Result<f64> {
    paired(a, b)?;
    Ok(crate::diagnostics::opposing::pearson(&ranks(a), &ranks(b)))
}

/// Kendall's tau-b, which corrects for ties.
///
/// # Errors
/// As [`spearman`].
pub fn kendall_tau_b(a: &[f64], b: &[f64]) -> Result<f64> {
    paired(a, b)?;
    let (mut concordance, mut in_a, mut in_b) = (0.0, 0.0, 0.0);
    let order = |x: f64, y: f64| match x.partial_cmp(&y) {
        Some(std::cmp::Ordering::Less) => -1.0,
        Some(std::cmp::Ordering::Greater) => 1.0,
        _ => 0.0,
    };
    for i in 0..a.len() {
        for j in 0..i {
            let (x, y): (f64, f64) = (order(a[i], a[j]), order(b[i], b[j]));
            concordance += x * y;
            in_a += x * x;
            in_b += y * y;
        }
    }
    Ok(concordance / (in_a * in_b).sqrt())
}
