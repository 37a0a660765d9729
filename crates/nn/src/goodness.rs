//! Losses of layers that are trained apart from each other: goodness, and the logistic loss.
//!
//! *The Forward-Forward Algorithm*, Hinton, arXiv 2212.13345. A layer is trained to give examples
//! that belong together (positive ones) a large goodness and others (negative ones) a small one:
//!
//! ```text
//! g_i  = sum_j z_ij^2
//! loss = mean_i softplus(theta - g_i^+) + mean_k mean_i softplus(g_i^(-k) - theta)
//! ```
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use thalweg_nn::goodness::{goodness, goodness_loss};
//!
//! let good = Tensor::new(&[[3f64, 0.0], [0.0, 2.0]], &Device::Cpu)?;
//! let bad = Tensor::new(&[[0.1f64, 0.0], [0.0, 0.2]], &Device::Cpu)?;
//! assert_eq!(goodness(&good)?.to_vec1::<f64>()?, [9.0, 4.0]);
//! let right = goodness_loss(&good, &[bad.clone()], 2.0)?.to_scalar::<f64>()?;
//! let wrong = goodness_loss(&bad, &[good], 2.0)?.to_scalar::<f64>()?;
//! assert!(right < wrong);
//! # Ok::<(), thalweg_nn::Error>(())
//! ```

use crate::activation::Activation;
use crate::{Error, Result};
use candle_core::Tensor;

/// The sum of squares of each row: `[n]` from `[n, d]`.
///
/// # Errors
/// [`Error::Shape`] unless `z` is a matrix.
pub fn goodness(z: &Tensor) -> Result<Tensor> {
    if z.rank() != 2 {
        return Err(Error::shape("z", z.dims(), "[n, d]"));
    }
    Ok(z.sqr()?.sum(1)?)
}

/// The mean loss of one positive batch `[n, d]` against several negative ones `[m, d]`, a scalar.
///
/// # Errors
/// [`Error::Shape`] unless all are matrices with at least one row, and for an empty list of
/// negative batches.
pub fn goodness_loss(positive: &Tensor, negatives: &[Tensor], theta: f64) -> Result<Tensor> {
    if negatives.is_empty() {
        return Err(Error::shape("negatives", &[0], "at least one batch"));
    }
    let one = |z: &Tensor, target: f64| -> Result<Tensor> {
        let logits = (goodness(z)? - theta)?;
        let targets = logits.ones_like()?.affine(target, 0.0)?;
        logistic_loss(&logits, &targets)
    };
    let mut sum = one(&negatives[0], 0.0)?;
    for z in &negatives[1..] {
        sum = (sum + one(z, 0.0)?)?;
    }
    Ok((one(positive, 1.0)? + (sum / negatives.len() as f64)?)?)
}

/// The mean binary cross entropy of logits `[n]` against targets in `[0, 1]`:
/// `mean(softplus(l) - t l)`, a scalar.
///
/// # Errors
/// [`Error::Shape`] for shapes that differ or no logit.
pub fn logistic_loss(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    if logits.elem_count() == 0 {
        return Err(Error::shape("logits", logits.dims(), "at least one logit"));
    }
    if logits.dims() != targets.dims() {
        let expected = format!("{:?}, as the logits", logits.dims());
        return Err(Error::shape("targets", targets.dims(), expected));
    }
    let terms = (Activation::Softplus.of(logits)? - (logits * targets)?)?;
    Ok(terms.mean_all()?)
}
