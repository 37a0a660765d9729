//! Losses between the embeddings of two views.

use crate::conv::{normalize_rows, Mlp};
use crate::{Error, RandomStream, Result};
use candle_core::{Device, Tensor};
use candle_nn::{Activation, Module, VarBuilder};

/// A loss between two views of the same nodes.
pub trait ContrastiveObjective {
    /// The mean loss of embeddings `[n, h]` of both views.
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit.
    fn loss(&self, z1: &Tensor, z2: &Tensor, rng: &mut RandomStream) -> Result<Tensor>;
}

/// Settings of [`Grace`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GraceConfig {
    /// The temperature `tau`.
    pub tau: f64,
    /// Rows of the similarity matrix at a time; the loss is the same, in less memory. `None` takes all
    /// at once.
    pub batch: Option<usize>,
    /// Random nodes a step whose loss is taken, against all nodes; `None` takes all nodes.
    pub anchors: Option<usize>,
}

impl Default for GraceConfig {
    fn default() -> Self {
        Self {
            tau: 0.4,
            batch: None,
            anchors: None,
        }
    }
}

impl GraceConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        if !(self.tau.is_finite() && self.tau > 0.0) {
            return Err(Error::config(
                "GraceConfig::tau",
                self.tau,
                "a positive number",
            ));
        }
        for (field, count) in [
            ("GraceConfig::batch", self.batch),
            ("GraceConfig::anchors", self.anchors),
        ] {
            if count == Some(0) {
                return Err(Error::config(field, 0, "at least 1, or None"));
            }
        }
        Ok(())
    }
}

/// GRACE's loss: with cosines `S12 = cos(g(z1_i), g(z2_j))`, `S11` within a view, and a projection
/// `g(z) = W_b elu(W_a z + b_a) + b_b`,
///
/// ```text
/// l_i = -log( e^{S12_ii/tau} / (sum_j e^{S11_ij/tau} + sum_j e^{S12_ij/tau} - e^{S11_ii/tau}) )
/// ```
///
/// and the loss is the mean over nodes and over both directions. Parameters `0.*` and `2.*` of an
/// [`Mlp`].
#[derive(Debug, Clone)]
pub struct Grace {
    projector: Mlp,
    config: GraceConfig,
}

impl Grace {
    /// A projection of `hidden` features over `proj_hidden`.
    ///
    /// # Errors
    /// Those of [`GraceConfig::validate`], [`Error::InvalidArgument`] for a width of 0.
    pub fn new(
        hidden: usize,
        proj_hidden: usize,
        config: GraceConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        config.validate()?;
        let widths = [hidden, proj_hidden, hidden];
        Ok(Self {
            projector: Mlp::new(&widths, Activation::Elu(1.0), vb)?,
            config,
        })
    }

    /// The projections `g(z)`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn project(&self, z: &Tensor) -> Result<Tensor> {
        Ok(self.projector.forward(z)?)
    }

    /// The loss of each node from the first view to the second, `[n]`, or of the nodes `rows`.
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit.
    pub fn one_way(&self, z1: &Tensor, z2: &Tensor, rows: Option<&Tensor>) -> Result<Tensor> {
        check_pair(z1, z2)?;
        let (a, b) = (self.unit(z1)?, self.unit(z2)?);
        info_nce(&a, &b, rows, self.config.tau)
    }

    fn unit(&self, z: &Tensor) -> Result<Tensor> {
        normalize_rows(&self.project(z)?)
    }

    /// The settings.
    pub fn config(&self) -> GraceConfig {
        self.config
    }

    /// The nodes of a step: `None` for all of them.
    pub(super) fn anchors(&self, n: usize, rng: &mut RandomStream) -> Result<Option<Vec<u32>>> {
        match self.config.anchors {
            Some(count) if count < n => {
                let mut order = rng.permutation(n)?;
                order.truncate(count);
                Ok(Some(order))
            }
            _ => Ok(None),
        }
    }

    /// Runs of anchor rows as index tensors; one `None` where all rows are taken at once.
    pub(super) fn runs(
        &self,
        n: usize,
        device: &Device,
        rng: &mut RandomStream,
    ) -> Result<Vec<Option<Tensor>>> {
        let anchors = self.anchors(n, rng)?;
        let rows: Vec<u32> = match (&anchors, self.config.batch) {
            (None, None) => return Ok(vec![None]),
            (Some(rows), _) => rows.clone(),
            (None, Some(_)) => (0..n as u32).collect(),
        };
        let size = self.config.batch.unwrap_or(rows.len()).max(1);
        let run = |rows: &[u32]| Ok(Some(Tensor::from_slice(rows, rows.len(), device)?));
        rows.chunks(size).map(run).collect()
    }
}

pub(super) fn check_pair(z1: &Tensor, z2: &Tensor) -> Result<()> {
    if z1.rank() != 2 || z1.dims()[0] == 0 {
        return Err(Error::shape(
            "embeddings",
            z1.dims(),
            "[n, h] with at least one node",
        ));
    }
    if z1.dims() != z2.dims() {
        return Err(Error::shape(
            "second view",
            z2.dims(),
            format!("{:?}", z1.dims()),
        ));
    }
    Ok(())
}

/// The terms of one direction from rows of unit vectors.
fn info_nce(a: &Tensor, b: &Tensor, rows: Option<&Tensor>, tau: f64) -> Result<Tensor> {
    let pick = |x: &Tensor| -> Result<Tensor> {
        match rows {
            Some(rows) => Ok(x.index_select(rows, 0)?),
            None => Ok(x.clone()),
        }
    };
    let (own, other) = (pick(a)?, pick(b)?);
    // A cosine is at most 1: shifted by it, no exponential overflows.
    let exp = |s: Tensor| -> Result<Tensor> { Ok(s.affine(1.0 / tau, -1.0 / tau)?.exp()?) };
    let within = exp(own.matmul(&a.t()?)?)?.sum(1)?;
    let across = exp(own.matmul(&b.t()?)?)?.sum(1)?;
    let itself = exp((&own * &own)?.sum(1)?)?;
    let positive = (own * other)?.sum(1)?.affine(1.0 / tau, -1.0 / tau)?;
    let all = ((within + across)? - itself)?;
    Ok((all.log()? - positive)?)
}

impl ContrastiveObjective for Grace {
    fn loss(&self, z1: &Tensor, z2: &Tensor, rng: &mut RandomStream) -> Result<Tensor> {
        check_pair(z1, z2)?;
        let (a, b) = (self.unit(z1)?, self.unit(z2)?);
        let mut terms = Vec::new();
        for rows in self.runs(z1.dims()[0], z1.device(), rng)? {
            terms.push(info_nce(&a, &b, rows.as_ref(), self.config.tau)?);
            terms.push(info_nce(&b, &a, rows.as_ref(), self.config.tau)?);
        }
        Ok(Tensor::cat(&terms, 0)?.mean_all()?)
    }
}

/// COSTA's loss: InfoNCE between the same Gaussian sketch of both views, `P g(z)` with `P` of
/// `ratio n` rows and `E[P^T P] = I`, so that covariances are kept in the mean.
#[derive(Debug, Clone)]
pub struct Costa {
    grace: Grace,
    ratio: f64,
}

impl Costa {
    /// Sketches of `ratio n` rows, `0 < ratio <= 1`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for another ratio.
    pub fn new(grace: Grace, ratio: f64) -> Result<Self> {
        if !(ratio > 0.0 && ratio <= 1.0) {
            return Err(Error::config("Costa::ratio", ratio, "a number in (0, 1]"));
        }
        Ok(Self { grace, ratio })
    }
}

impl ContrastiveObjective for Costa {
    fn loss(&self, z1: &Tensor, z2: &Tensor, rng: &mut RandomStream) -> Result<Tensor> {
        check_pair(z1, z2)?;
        let n = z1.dims()[0];
        let rows = ((self.ratio * n as f64) as usize).max(1);
        let std = 1.0 / (rows as f64).sqrt();
        let sketch = rng.normal(0.0, std, (rows, n), z1.dtype(), z1.device())?;
        let unit = |z: &Tensor| normalize_rows(&sketch.matmul(&self.grace.project(z)?)?);
        let (a, b) = (unit(z1)?, unit(z2)?);
        let tau = self.grace.config.tau;
        let mut terms = Vec::new();
        for run in self.grace.runs(rows, z1.device(), rng)? {
            terms.push(info_nce(&a, &b, run.as_ref(), tau)?);
            terms.push(info_nce(&b, &a, run.as_ref(), tau)?);
        }
        Ok(Tensor::cat(&terms, 0)?.mean_all()?)
    }
}
