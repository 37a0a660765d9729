//! The regularization path: minimizers in balls of growing radius.

use super::descent::gradient;
use super::{to_tensor, AttentionData, HeadLoss, SvmNorm};
use crate::error::check;
use crate::transport::project_simplex;
use crate::{Error, Result};
use candle_core::Tensor;
use faer::Mat;

/// `W_R = argmin_{|W| <= R} L(W)` for each radius, by projected gradient steps from the solution of the
/// one before. `W_R / R` goes to the direction of the SVM of the optimal tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct RegularizationPath {
    /// Ascending radii.
    pub radii: Vec<f64>,
    /// The norm of the ball.
    pub norm: SvmNorm,
    /// Length of a gradient step.
    pub step: f64,
    /// Largest change of an entry at which a radius is done.
    pub tol: f64,
    /// Most steps for a radius.
    pub max_iter: usize,
}

impl Default for RegularizationPath {
    fn default() -> Self {
        Self {
            radii: vec![1.0, 10.0, 100.0],
            norm: SvmNorm::Frobenius,
            step: 2.0,
            tol: 1e-12,
            max_iter: 1_000_000,
        }
    }
}

impl RegularizationPath {
    /// `W_R` `[d, e]` and the loss there, for each radius.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for radii that do not ascend from above 0, [`Error::Shape`],
    /// [`Error::NotConverged`].
    pub fn solve(
        &self,
        data: &AttentionData,
        loss: HeadLoss,
        v: &[f64],
        y: &[f64],
    ) -> Result<Vec<(Tensor, f64)>> {
        check::positive("RegularizationPath::step", self.step)?;
        check::non_negative("RegularizationPath::tol", self.tol)?;
        check::length("v", v.len(), data.d)?;
        check::length("y", y.len(), data.n)?;
        let mut last = 0.0;
        for &radius in &self.radii {
            if !(radius.is_finite() && radius > last) {
                let expected = format!("ascending finite numbers (above {last})");
                return Err(Error::config("RegularizationPath::radii", radius, expected));
            }
            last = radius;
        }
        let (d, e) = data.shape();
        let mut w = Mat::zeros(d, e);
        let mut out = Vec::new();
        for &radius in &self.radii {
            w = self.within(radius, data, loss, (v, y), w)?;
            out.push((to_tensor(&w)?, gradient(data, loss, v, y, &w).0));
        }
        Ok(out)
    }

    fn within(
        &self,
        radius: f64,
        data: &AttentionData,
        loss: HeadLoss,
        (v, y): (&[f64], &[f64]),
        mut w: Mat<f64>,
    ) -> Result<Mat<f64>> {
        let mut change = f64::INFINITY;
        for _ in 0..self.max_iter {
            let (_, g) = gradient(data, loss, v, y, &w);
            let next = self.project(&w - faer::Scale(self.step) * g, radius)?;
            change = (&next - &w).norm_max();
            w = next;
            if change < self.tol {
                return Ok(w);
            }
        }
        Err(Error::NotConverged {
            solver: "the regularization path",
            iterations: self.max_iter,
            residual: change,
            tolerance: self.tol,
        })
    }

    fn project(&self, w: Mat<f64>, radius: f64) -> Result<Mat<f64>> {
        if self.norm == SvmNorm::Frobenius {
            let size = w.norm_l2();
            return Ok(if size > radius {
                faer::Scale(radius / size) * w
            } else {
                w
            });
        }
        let svd = w
            .thin_svd()
            .map_err(|e| Error::numerical("a singular value decomposition", e))?;
        let (u, s, v) = (svd.U(), svd.S().column_vector(), svd.V());
        let values: Vec<f64> = (0..s.nrows()).map(|k| s[k]).collect();
        if values.iter().sum::<f64>() <= radius {
            return Ok(w);
        }
        let values = project_simplex(&values, radius)?;
        Ok(Mat::from_fn(w.nrows(), w.ncols(), |r, c| {
            let terms = values.iter().enumerate();
            terms.map(|(k, s)| s * u[(r, k)] * v[(c, k)]).sum()
        }))
    }
}
