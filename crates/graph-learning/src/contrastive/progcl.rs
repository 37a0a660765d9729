//! ProGCL: which negatives are true ones, by a mixture of two beta distributions over similarities.

use super::objective::{check_pair, ContrastiveObjective, Grace};
use crate::conv::normalize_rows;
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor};

/// What is done with the hardness of negatives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hardness {
    /// Negatives are weighted by `B / row mean of B`, `B` = posterior of the true negatives times
    /// similarity.
    Weight,
    /// Additional negatives are mixed from pairs of the hardest ones, each pair in the proportion of its
    /// posteriors.
    Mix {
        /// How many of the most similar nodes of the other view are candidates.
        hardest: usize,
        /// How many are mixed for each node.
        mixed: usize,
    },
}

/// Settings of [`ProGcl`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProGclConfig {
    /// What is done with the hardness.
    pub hardness: Hardness,
    /// Random columns of the similarity matrix that the mixture is fitted to.
    pub columns: usize,
    /// Steps of expectation and maximization.
    pub iterations: usize,
}

impl Default for ProGclConfig {
    fn default() -> Self {
        Self {
            hardness: Hardness::Weight,
            columns: 100,
            iterations: 10,
        }
    }
}

/// A component of a mixture that holds fewer values than this holds none.
const VANISHED: f64 = 1e-9;

/// Two beta distributions on `(0, 1)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BetaMixture {
    /// `alpha` of both; the component with the smaller mean first.
    pub alpha: [f64; 2],
    /// `beta` of both.
    pub beta: [f64; 2],
    /// Share of both.
    pub share: [f64; 2],
}

impl BetaMixture {
    /// Fits by expectation-maximization with moments, from a split at the median; ends early where a
    /// component is left without values.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for fewer than 4 values or values outside `[0, 1]`.
    pub fn fit(values: &[f64], iterations: usize) -> Result<Self> {
        if values.len() < 4 || values.iter().any(|v| !(0.0..=1.0).contains(v)) {
            let value = format!("{} values", values.len());
            return Err(Error::argument(
                "similarities",
                value,
                "at least 4 numbers in [0, 1]",
            ));
        }
        let inside: Vec<f64> = values.iter().map(|v| v.clamp(1e-4, 1.0 - 1e-4)).collect();
        let mut sorted = inside.clone();
        sorted.sort_by(f64::total_cmp);
        let median = sorted[sorted.len() / 2];
        let start = |v: &f64| if *v < median { 0.8 } else { 0.2 };
        let mut weights: Vec<f64> = inside.iter().map(start).collect();
        let mut mixture = Self::moments(&inside, &weights);
        for _ in 0..iterations {
            for (w, v) in weights.iter_mut().zip(&inside) {
                *w = mixture.posterior_low(*v);
            }
            let low: f64 = weights.iter().sum();
            if low.min(inside.len() as f64 - low) < VANISHED {
                // A component without values has no moments.
                break;
            }
            mixture = Self::moments(&inside, &weights);
        }
        Ok(mixture)
    }

    /// Components with the weighted mean and variance of the values.
    fn moments(values: &[f64], low: &[f64]) -> Self {
        let component = |weight: &dyn Fn(f64) -> f64| {
            let total: f64 = low.iter().map(|w| weight(*w)).sum::<f64>().max(1e-12);
            let pairs = || values.iter().zip(low).map(|(v, w)| (*v, weight(*w)));
            let mean = pairs().map(|(v, w)| w * v).sum::<f64>() / total;
            let var = pairs()
                .map(|(v, w)| w * (v - mean) * (v - mean))
                .sum::<f64>()
                / total;
            // A beta distribution's variance is below mean (1 - mean).
            let var = var.clamp(1e-8, mean * (1.0 - mean) * 0.999);
            let size = mean * (1.0 - mean) / var - 1.0;
            (
                mean * size,
                (1.0 - mean) * size,
                total / values.len() as f64,
            )
        };
        let parts = [component(&|w| w), component(&|w| 1.0 - w)];
        let mut mixture = Self {
            alpha: parts.map(|p| p.0),
            beta: parts.map(|p| p.1),
            share: parts.map(|p| p.2),
        };
        if mixture.mean(0) > mixture.mean(1) {
            mixture.alpha.reverse();
            mixture.beta.reverse();
            mixture.share.reverse();
        }
        mixture
    }

    /// The mean of a component.
    pub fn mean(&self, component: usize) -> f64 {
        self.alpha[component] / (self.alpha[component] + self.beta[component])
    }

    fn log_density(&self, k: usize, v: f64) -> f64 {
        let (a, b) = (self.alpha[k], self.beta[k]);
        self.share[k].max(1e-300).ln()
            + (a - 1.0) * v.ln()
            + (b - 1.0) * (-v).ln_1p()
            + ln_gamma(a + b)
            - ln_gamma(a)
            - ln_gamma(b)
    }

    /// The probability that `v` is of the component with the smaller mean: a true negative.
    pub fn posterior_low(&self, v: f64) -> f64 {
        let v = v.clamp(1e-4, 1.0 - 1e-4);
        1.0 / (1.0 + (self.log_density(1, v) - self.log_density(0, v)).exp())
    }
}

/// `ln Gamma(x)` for `x > 0` (Lanczos, 1964, with g = 7).
fn ln_gamma(x: f64) -> f64 {
    const C: [f64; 8] = [
        676.5203681218851,
        -1259.1392167224028,
        771.3234287776531,
        -176.6150291621406,
        12.507343278686905,
        -0.13857109526572012,
        9.984369578019572e-6,
        1.5056327351493116e-7,
    ];
    if x < 0.5 {
        let pi = std::f64::consts::PI;
        return (pi / (pi * x).sin()).ln() - ln_gamma(1.0 - x);
    }
    let x = x - 1.0;
    let terms = C.iter().enumerate().map(|(i, c)| c / (x + i as f64 + 1.0));
    let sum = 0.9999999999998099 + terms.sum::<f64>();
    let t = x + 7.5;
    0.5 * (2.0 * std::f64::consts::PI).ln() + (x + 0.5) * t.ln() - t + sum.ln()
}

/// GRACE's loss with negatives weighted, or mixed, by how likely they are true ones. The published runs
/// begin with plain GRACE and change over after some epochs.
#[derive(Debug, Clone)]
pub struct ProGcl {
    grace: Grace,
    config: ProGclConfig,
}

impl ProGcl {
    /// Around GRACE's projection and temperature.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for counts of 0.
    pub fn new(grace: Grace, config: ProGclConfig) -> Result<Self> {
        let bad = |field, value: usize| Error::config(field, value, "at least 1 (2 hardest)");
        if config.columns == 0 {
            return Err(bad("ProGclConfig::columns", 0));
        }
        match config.hardness {
            Hardness::Mix { hardest, .. } if hardest < 2 => Err(bad("Hardness::hardest", hardest)),
            Hardness::Mix { mixed: 0, .. } => Err(bad("Hardness::mixed", 0)),
            _ => Ok(Self { grace, config }),
        }
    }

    /// The mixture of the similarities of one view's rows with random rows of the other.
    fn mixture(&self, a: &Tensor, b: &Tensor, rng: &mut RandomStream) -> Result<BetaMixture> {
        let n = a.dims()[0];
        let mut columns = rng.permutation(n)?;
        columns.truncate(self.config.columns);
        let columns = Tensor::from_vec(columns.clone(), columns.len(), a.device())?;
        let some = b.detach().index_select(&columns, 0)?;
        let cosines = a
            .detach()
            .matmul(&some.t()?)?
            .affine(0.5, 0.5)?
            .clamp(0.0, 1.0)?;
        let values = cosines
            .to_dtype(DType::F64)?
            .flatten_all()?
            .to_vec1::<f64>()?;
        BetaMixture::fit(&values, self.config.iterations)
    }

    /// One direction for the anchors `rows`.
    fn one_way(
        &self,
        a: &Tensor,
        b: &Tensor,
        rows: &[u32],
        mixture: &BetaMixture,
        rng: &mut RandomStream,
    ) -> Result<Tensor> {
        let tau = self.grace.config().tau;
        let index = Tensor::from_slice(rows, rows.len(), a.device())?;
        let (own, other) = (a.index_select(&index, 0)?, b.index_select(&index, 0)?);
        let exp = |s: &Tensor| -> Result<Tensor> { Ok(s.affine(1.0 / tau, -1.0 / tau)?.exp()?) };
        let (within, across) = (own.matmul(&a.t()?)?, own.matmul(&b.t()?)?);
        let positive = (&own * &other)?.sum(1)?;
        let negatives = match self.config.hardness {
            Hardness::Weight => {
                let weighted = |s: &Tensor| -> Result<Tensor> {
                    Ok((exp(s)? * weights(s, rows, mixture)?)?.sum(1)?)
                };
                (weighted(&within)? + weighted(&across)?)?
            }
            Hardness::Mix { hardest, mixed } => {
                let plain = |s: &Tensor| -> Result<Tensor> {
                    Ok((exp(s)? * off_diagonal(s, rows)?)?.sum(1)?)
                };
                let extra = mix(&across, rows, b, (hardest, mixed), mixture, rng)?;
                let similar = extra.matmul(&own.unsqueeze(2)?)?.squeeze(2)?;
                ((plain(&within)? + plain(&across)?)? + exp(&similar)?.sum(1)?)?
            }
        };
        let all = (negatives + exp(&positive)?)?;
        Ok((all.log()? - positive.affine(1.0 / tau, -1.0 / tau)?)?)
    }
}

/// 0 at each row's own column, 1 elsewhere.
fn off_diagonal(s: &Tensor, rows: &[u32]) -> Result<Tensor> {
    constant(s, rows, |_| 1.0)
}

/// A constant matrix from the similarities, 0 at each row's own column.
fn constant(s: &Tensor, rows: &[u32], f: impl Fn(f64) -> f64) -> Result<Tensor> {
    let values = s.detach().to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let mut out = Vec::with_capacity(s.elem_count());
    for (row, own) in values.iter().zip(rows) {
        let one = |(j, v): (usize, &f64)| if j == *own as usize { 0.0 } else { f(*v) };
        out.extend(row.iter().enumerate().map(one));
    }
    let out = Tensor::from_vec(out, s.dims(), &Device::Cpu)?;
    Ok(out.to_dtype(s.dtype())?.to_device(s.device())?)
}

/// `B / row mean of B`, `B` = posterior times similarity in `[0, 1]`.
fn weights(s: &Tensor, rows: &[u32], mixture: &BetaMixture) -> Result<Tensor> {
    let b = constant(s, rows, |cosine| {
        let similarity = (0.5 * cosine + 0.5).clamp(0.0, 1.0);
        mixture.posterior_low(similarity) * similarity
    })?;
    let others = (s.dims()[1] - 1).max(1) as f64;
    let mean = (b.sum_keepdim(1)? / others)?;
    Ok(b.broadcast_div(&(mean + 1e-12)?)?)
}

/// Unit vectors `[rows, mixed, h]` between pairs of the hardest negatives.
fn mix(
    across: &Tensor,
    rows: &[u32],
    b: &Tensor,
    (hardest, mixed): (usize, usize),
    mixture: &BetaMixture,
    rng: &mut RandomStream,
) -> Result<Tensor> {
    let n = b.dims()[0];
    if n < 3 {
        return Err(Error::argument(
            "nodes",
            n,
            "at least 3, to mix two negatives",
        ));
    }
    let hardest = hardest.min(n - 1);
    let similar = across.detach().to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let (mut firsts, mut seconds, mut shares) = (Vec::new(), Vec::new(), Vec::new());
    for (row, own) in similar.iter().zip(rows) {
        let mut order: Vec<u32> = (0..n as u32).filter(|j| j != own).collect();
        order.sort_by(|i, j| row[*j as usize].total_cmp(&row[*i as usize]));
        for _ in 0..mixed {
            let (j, k) = (order[rng.below(hardest)?], order[rng.below(hardest)?]);
            let p = |v: u32| mixture.posterior_low(0.5 * row[v as usize] + 0.5);
            let (pj, pk) = (p(j), p(k));
            firsts.push(j);
            seconds.push(k);
            shares.push(if pj + pk > 0.0 { pj / (pj + pk) } else { 0.5 });
        }
    }
    let count = firsts.len();
    let rows_of = |ids: Vec<u32>| -> Result<Tensor> {
        Ok(b.index_select(&Tensor::from_vec(ids, count, b.device())?, 0)?)
    };
    let share = Tensor::from_vec(shares, (count, 1), &Device::Cpu)?;
    let share = share.to_dtype(b.dtype())?.to_device(b.device())?;
    let first = rows_of(firsts)?.broadcast_mul(&share)?;
    let second = rows_of(seconds)?.broadcast_mul(&share.affine(-1.0, 1.0)?)?;
    let unit = normalize_rows(&(first + second)?)?;
    Ok(unit.reshape((rows.len(), mixed, b.dims()[1]))?)
}

impl ContrastiveObjective for ProGcl {
    fn loss(&self, z1: &Tensor, z2: &Tensor, rng: &mut RandomStream) -> Result<Tensor> {
        check_pair(z1, z2)?;
        let n = z1.dims()[0];
        let a = normalize_rows(&self.grace.project(z1)?)?;
        let b = normalize_rows(&self.grace.project(z2)?)?;
        let mixture = self.mixture(&a, &b, rng)?;
        let rows = match self.grace.anchors(n, rng)? {
            Some(rows) => rows,
            None => (0..n as u32).collect(),
        };
        let mut terms = Vec::new();
        for rows in rows.chunks(self.grace.config().batch.unwrap_or(n).max(1)) {
            terms.push(self.one_way(&a, &b, rows, &mixture, rng)?);
            terms.push(self.one_way(&b, &a, rows, &mixture, rng)?);
        }
        Ok(Tensor::cat(&terms, 0)?.mean_all()?)
    }
}
