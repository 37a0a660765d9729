//! Gaussian mixtures.

use crate::{Classification, Error, Result};
use candle_core::{DType, Device, Tensor};
use tensor_core::random::RandomStream;

/// A mixture of isotropic Gaussians: component `k` has the probability `weights[k]`, and its points
/// are `centers[k] + stds[k] N(0, I)`.
///
/// ```
/// use candle_core::{DType, Device};
/// use thalweg_datasets::{generate::GaussianMixture, RandomStream};
///
/// let mixture = GaussianMixture::ring(8, 2.0, 0.1)?;
/// let data = mixture.sample(500, &mut RandomStream::new(0), DType::F32, &Device::Cpu)?;
/// assert_eq!((data.inputs.dims(), data.classes), (&[500, 2][..], 8));
/// # Ok::<(), thalweg_datasets::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct GaussianMixture {
    centers: Vec<Vec<f64>>,
    cumulative: Vec<f64>,
    stds: Vec<f64>,
}

impl GaussianMixture {
    /// A mixture from its parts; the weights are divided by their sum.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] without components, for centers of different or zero length, for
    /// other numbers of weights or standard deviations than of centers, and for values that are not
    /// finite or (weights, stds) negative.
    pub fn new(centers: Vec<Vec<f64>>, weights: Vec<f64>, stds: Vec<f64>) -> Result<Self> {
        let k = centers.len();
        let dims = centers.first().map_or(0, Vec::len);
        if dims == 0 || centers.iter().any(|c| c.len() != dims) {
            let lengths: Vec<usize> = centers.iter().map(Vec::len).collect();
            let expected = "at least one, all of the same length >= 1";
            return Err(Error::invalid(
                "centers",
                format!("{lengths:?} numbers"),
                expected,
            ));
        }
        if let Some(bad) = centers.iter().flatten().find(|x| !x.is_finite()) {
            return Err(Error::invalid("centers", bad, "finite numbers"));
        }
        for (name, values) in [("weights", &weights), ("stds", &stds)] {
            let valid = values.len() == k && values.iter().all(|v| v.is_finite() && *v >= 0.0);
            if !valid {
                let expected = format!("{k} finite numbers >= 0");
                return Err(Error::invalid(name, format!("{values:?}"), expected));
            }
        }
        let total: f64 = weights.iter().sum();
        if !(total > 0.0 && total.is_finite()) {
            return Err(Error::invalid(
                "weights",
                format!("{weights:?}"),
                "a positive sum",
            ));
        }
        let mut sum = 0.0;
        let step = |w: &f64| {
            sum += w / total;
            sum
        };
        Ok(Self {
            centers,
            cumulative: weights.iter().map(step).collect(),
            stds,
        })
    }

    /// `components` equal Gaussians on a circle in the plane, the first at angle 0.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn ring(components: usize, radius: f64, std: f64) -> Result<Self> {
        let center = |k| {
            let angle = std::f64::consts::TAU * k as f64 / components as f64;
            vec![radius * angle.cos(), radius * angle.sin()]
        };
        let centers = (0..components).map(center).collect();
        Self::new(centers, vec![1.0; components], vec![std; components])
    }

    /// `components` equal Gaussians with centers drawn from `N(0, spread^2 I)` in `dims`
    /// dimensions.
    ///
    /// # Errors
    /// Those of [`new`](Self::new).
    pub fn random(
        components: usize,
        dims: usize,
        spread: f64,
        std: f64,
        rng: &mut RandomStream,
    ) -> Result<Self> {
        let mut center = || {
            let mut center = vec![0.0; dims];
            rng.fill_normal(&mut center);
            center.iter_mut().for_each(|x| *x *= spread);
            center
        };
        let centers = (0..components).map(|_| center()).collect();
        Self::new(centers, vec![1.0; components], vec![std; components])
    }

    /// Number of components.
    pub fn components(&self) -> usize {
        self.centers.len()
    }

    /// Number of dimensions.
    pub fn dims(&self) -> usize {
        self.centers[0].len()
    }

    /// `n` points `[n, dims]`; the label is the component.
    ///
    /// # Errors
    /// Those of candle.
    pub fn sample(
        &self,
        n: usize,
        rng: &mut RandomStream,
        dtype: DType,
        device: &Device,
    ) -> Result<Classification> {
        let last = self.components() - 1;
        let dims = self.dims();
        let mut choice = vec![0.0; n];
        rng.fill_uniform(&mut choice);
        let mut points = vec![0.0; n * dims];
        rng.fill_normal(&mut points);
        let mut labels = Vec::with_capacity(n);
        for (u, point) in choice.iter().zip(points.chunks_mut(dims)) {
            // A component of weight zero has the same cumulative weight as its predecessor.
            let k = self.cumulative.partition_point(|c| c <= u).min(last);
            for (x, center) in point.iter_mut().zip(&self.centers[k]) {
                *x = center + self.stds[k] * *x;
            }
            labels.push(k as u32);
        }
        let inputs = Tensor::from_vec(points, (n, dims), device)?.to_dtype(dtype)?;
        let labels = Tensor::from_vec(labels, n, device)?;
        Classification::new(inputs, labels, self.components())
    }
}
