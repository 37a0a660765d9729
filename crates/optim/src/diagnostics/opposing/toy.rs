//! Data and a model in which opposing signals can be computed by hand.
//!
//! Inputs are `(x_s, x_o)` with `x_s ~ N(0, I)` and, in a part `p` of the examples,
//! `x_o = e sqrt(alpha / p) u` with the signs `e` equally often, else 0; the label is
//! `<beta, x_s> + kappa 1[x_o != 0]`, so that no linear use of `x_o` helps. (With signs of unequal
//! numbers some use of it does: the oscillation then starts from a large amplitude, and both groups
//! fall together when it breaks down.) The model is
//! `f(x) = c <b, x>` with half the squared error. With `q = <u, b_o>`, the population loss is
//! `|c b_s - beta|^2 / 2 + alpha c^2 q^2 / 2 + p kappa^2 / 2`: the curvature along `q` is
//! `alpha c^2`, which grows from `alpha c_0^2` to about `alpha |beta|` in training.

use crate::error::check;
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor};

/// The distribution.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ToyOpposing {
    /// Coordinates of the signal.
    pub d_s: usize,
    /// Coordinates of the outlying feature.
    pub d_o: usize,
    /// Fraction of examples with the feature.
    pub p: f64,
    /// Strength of the feature.
    pub alpha: f64,
    /// Shift of the labels of examples with the feature.
    pub kappa: f64,
    /// Norm of `beta`.
    pub beta_norm: f64,
    /// Initial `c`.
    pub c0: f64,
    /// Standard deviation of the initial `b`.
    pub b_std: f64,
}

impl Default for ToyOpposing {
    fn default() -> Self {
        Self {
            d_s: 10,
            d_o: 20,
            p: 0.1,
            alpha: 20.0,
            kappa: 1.0,
            beta_norm: 2.0,
            c0: 0.3,
            b_std: 0.01,
        }
    }
}

/// Examples of the distribution, in double precision.
#[derive(Debug, Clone)]
pub struct ToyData {
    /// Inputs `[n, d_s + d_o]`.
    pub x: Tensor,
    /// Labels `[n]`.
    pub y: Tensor,
    /// The sign of the feature: -1, 0 (none) or 1.
    pub group: Vec<i8>,
}

/// The model `f(x) = c <b, x>`.
#[derive(Debug, Clone)]
pub struct ToyModel {
    /// The scale `c`.
    pub c: f64,
    /// The direction `b`, `[d_s + d_o]`.
    pub b: Tensor,
}

impl ToyOpposing {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::at_least_one("ToyOpposing::d_s", self.d_s)?;
        check::at_least_one("ToyOpposing::d_o", self.d_o)?;
        let holds = self.p > 0.0 && self.p <= 1.0;
        check::require(holds, "ToyOpposing::p", self.p, "a number in (0, 1]")?;
        check::non_negative("ToyOpposing::alpha", self.alpha)?;
        check::finite("ToyOpposing::kappa", self.kappa)?;
        check::non_negative("ToyOpposing::beta_norm", self.beta_norm)?;
        check::finite("ToyOpposing::c0", self.c0)?;
        check::non_negative("ToyOpposing::b_std", self.b_std)
    }

    /// `n` examples; the directions `beta` and `u` are drawn first. The first `n p` (rounded) have the
    /// feature, the first half of them (rounded up) with a positive sign.
    ///
    /// # Errors
    /// Those of [`validate`](Self::validate); [`Error::InvalidArgument`] for no examples.
    pub fn sample(&self, n: usize, rng: &mut RandomStream) -> Result<ToyData> {
        self.validate()?;
        if n == 0 {
            return Err(Error::argument("n", n, "at least 1"));
        }
        let beta = direction(self.d_s, self.beta_norm, rng);
        let u = direction(self.d_o, 1.0, rng);
        let strength = (self.alpha / self.p).sqrt();
        let outliers = (self.p * n as f64).round() as usize;
        let (mut x, mut y, mut group) = (Vec::new(), Vec::new(), Vec::new());
        for i in 0..n {
            let signal: Vec<f64> = (0..self.d_s).map(|_| rng.next_normal()).collect();
            let e: i8 = match i {
                i if i >= outliers => 0,
                i if i < outliers.div_ceil(2) => 1,
                _ => -1,
            };
            let shift = if e == 0 { 0.0 } else { self.kappa };
            let dot: f64 = signal.iter().zip(&beta).map(|(a, b)| a * b).sum();
            y.push(dot + shift);
            x.extend(signal);
            x.extend(u.iter().map(|u| f64::from(e) * strength * u));
            group.push(e);
        }
        Ok(ToyData {
            x: Tensor::from_vec(x, (n, self.d_s + self.d_o), &Device::Cpu)?,
            y: Tensor::from_vec(y, n, &Device::Cpu)?,
            group,
        })
    }

    /// A model with small initial weights.
    ///
    /// # Errors
    /// Those of [`validate`](Self::validate).
    pub fn model(&self, rng: &mut RandomStream) -> Result<ToyModel> {
        self.validate()?;
        let d = self.d_s + self.d_o;
        Ok(ToyModel {
            c: self.c0,
            b: rng.normal(0.0, self.b_std, d, DType::F64, &Device::Cpu)?,
        })
    }

    /// The population loss at `c`, `b_s` `[d_s]` and `q`, for a given `beta` `[d_s]`.
    pub fn population_loss(&self, c: f64, b_s: &[f64], q: f64, beta: &[f64]) -> f64 {
        let signal: f64 = b_s.iter().zip(beta).map(|(b, t)| (c * b - t).powi(2)).sum();
        (signal + self.alpha * c * c * q * q + self.p * self.kappa * self.kappa) / 2.0
    }

    /// The population loss's curvature along `q`.
    pub fn population_curvature(&self, c: f64) -> f64 {
        self.alpha * c * c
    }
}

fn direction(d: usize, norm: f64, rng: &mut RandomStream) -> Vec<f64> {
    let mut v: Vec<f64> = (0..d).map(|_| rng.next_normal()).collect();
    let length = v.iter().map(|x| x * x).sum::<f64>().sqrt();
    v.iter_mut().for_each(|x| *x *= norm / length);
    v
}

impl ToyData {
    /// Residuals `c <b, x> - y` and products `<b, x>`.
    fn residuals(&self, model: &ToyModel) -> Result<(Tensor, Tensor)> {
        let product = self.x.matmul(&model.b.unsqueeze(1)?)?.squeeze(1)?;
        Ok((((&product * model.c)? - &self.y)?, product))
    }

    /// Half the squared error of each example, `[n]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn losses(&self, model: &ToyModel) -> Result<Tensor> {
        Ok((self.residuals(model)?.0.sqr()? * 0.5)?)
    }

    /// Gradient of the mean loss in `c` and in `b`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn gradient(&self, model: &ToyModel) -> Result<(f64, Tensor)> {
        let (r, product) = self.residuals(model)?;
        let n = self.group.len() as f64;
        let in_c = (&r * product)?.sum_all()?.to_scalar::<f64>()? / n;
        let in_b = r.unsqueeze(0)?.matmul(&self.x)?.squeeze(0)?;
        Ok((in_c, (in_b * (model.c / n))?))
    }

    /// The model after a step of gradient descent on the mean loss.
    ///
    /// # Errors
    /// Those of candle.
    pub fn descend(&self, model: &ToyModel, eta: f64) -> Result<ToyModel> {
        let (in_c, in_b) = self.gradient(model)?;
        Ok(ToyModel {
            c: model.c - eta * in_c,
            b: (&model.b - (in_b * eta)?)?,
        })
    }

    /// The exact Hessian of the mean loss in `(c, b)`, `[1 + d, 1 + d]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn hessian(&self, model: &ToyModel) -> Result<Tensor> {
        let (r, product) = self.residuals(model)?;
        let n = self.group.len() as f64;
        let cc = (product.sqr()?.sum_all()? / n)?.reshape((1, 1))?;
        let mixed = ((&product * model.c)? + r)?.unsqueeze(0)?;
        let cb = (mixed.matmul(&self.x)? / n)?;
        let bb = (self.x.t()?.matmul(&self.x)? * (model.c * model.c / n))?;
        let top = Tensor::cat(&[&cc, &cb], 1)?;
        let bottom = Tensor::cat(&[&cb.t()?, &bb], 1)?;
        Ok(Tensor::cat(&[top, bottom], 0)?)
    }

    /// The largest eigenvalue of the [`hessian`](Self::hessian), with its eigenvector.
    ///
    /// # Errors
    /// Those of candle and of the eigenvalue solver.
    pub fn sharpness(&self, model: &ToyModel) -> Result<(f64, Tensor)> {
        let hessian = self.hessian(model)?;
        let dim = hessian.dim(0)?;
        let config = super::LanczosConfig {
            k: 1,
            iters: dim,
            tol: 1e-14,
        };
        let apply = |v: &Tensor| Ok(hessian.matmul(&v.unsqueeze(1)?)?.squeeze(1)?);
        let mut top = super::sharpness(apply, dim, config, &mut RandomStream::new(0))?;
        match (top.values.first(), top.vectors.pop()) {
            (Some(value), Some(vector)) => Ok((*value, vector)),
            _ => Err(Error::argument("hessian", dim, "at least one eigenvalue")),
        }
    }
}
