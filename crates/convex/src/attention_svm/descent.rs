//! Normalized gradient descent on one attention layer.

use super::{inner, to_tensor, AttentionData};
use crate::error::check;
use crate::linalg::dot;
use crate::Result;
use candle_core::Tensor;
use faer::Mat;

/// The loss of `Y_i f_i`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadLoss {
    /// `log(1 + exp(-u))`
    Logistic,
    /// `exp(-u)`
    Exponential,
}

impl HeadLoss {
    /// Value and derivative.
    fn at(self, u: f64) -> (f64, f64) {
        match self {
            Self::Logistic => {
                let value = (-u).max(0.0) + (-u.abs()).exp().ln_1p();
                (value, -1.0 / (1.0 + u.exp()))
            }
            Self::Exponential => ((-u).exp(), -(-u).exp()),
        }
    }
}

/// `L(W)` and `dL/dW` `[d, e]` for a linear head `v` and labels `y`.
///
/// # Errors
/// [`Error::Shape`](crate::Error::Shape) where the sizes do not fit.
pub fn attention_gradient(
    data: &AttentionData,
    loss: HeadLoss,
    v: &[f64],
    y: &[f64],
    w: &Tensor,
) -> Result<(f64, Tensor)> {
    check::length("v", v.len(), data.d)?;
    check::length("y", y.len(), data.n)?;
    let (value, gradient) = gradient(data, loss, v, y, &data.weights(w)?);
    Ok((value, to_tensor(&gradient)?))
}

/// `1/n sum_i l'(Y_i o_i) Y_i X_i' (s (g - o)) z_i'` with `g = X_i v`, `o = s' g`.
pub(super) fn gradient(
    data: &AttentionData,
    loss: HeadLoss,
    v: &[f64],
    y: &[f64],
    w: &Mat<f64>,
) -> (f64, Mat<f64>) {
    let (d, e) = data.shape();
    let (mut value, mut out) = (0.0, Mat::zeros(d, e));
    for (i, &label) in y.iter().enumerate() {
        let s = data.attention(w, i);
        let g: Vec<f64> = (0..data.length(i))
            .map(|t| dot(data.token(i, t), v))
            .collect();
        let o: f64 = s.iter().zip(&g).map(|(s, g)| s * g).sum();
        let (l, slope) = loss.at(label * o);
        value += l;
        // The slope first, then the softmax' derivative: the order of automatic differentiation,
        // whose rounding is all that is left of saturated gradients.
        let factor = slope * label / data.n as f64;
        let g: Vec<f64> = g.iter().map(|g| factor * g).collect();
        let o: f64 = s.iter().zip(&g).map(|(s, g)| s * g).sum();
        let mut pull = vec![0.0; d];
        for (t, g) in g.iter().enumerate() {
            crate::linalg::axpy(s[t] * (g - o), data.token(i, t), &mut pull);
        }
        for (c, z) in data.query(i).iter().enumerate() {
            for (r, x) in pull.iter().enumerate() {
                out[(r, c)] += x * z;
            }
        }
    }
    (value / data.n as f64, out)
}

/// Gradient descent with steps of a fixed length, `W <- W - lr G / (|G| + eps)`: it converges in
/// direction where a fixed rate takes exponentially many steps. Work in `f64`: after some hundred steps
/// gradients reach `1e-16`.
#[derive(Debug, Clone, PartialEq)]
pub struct NormalizedGd {
    /// Length of a step, for each parameter matrix.
    pub lr: f64,
    /// Added to the norm of the gradient.
    pub eps: f64,
    /// The loss.
    pub loss: HeadLoss,
    /// Weight of `|K|^2 + |Q|^2`, where the parameters are `K` and `Q`.
    pub ridge: f64,
}

impl Default for NormalizedGd {
    fn default() -> Self {
        Self {
            lr: 0.1,
            eps: f64::EPSILON,
            loss: HeadLoss::Logistic,
            ridge: f64::EPSILON,
        }
    }
}

/// What is trained.
#[derive(Debug, Clone)]
pub enum GdParameters {
    /// `W` itself, `[d, e]`.
    W(Tensor),
    /// `W = K' Q` with `K` `[m, d]` and `Q` `[m, e]`.
    Kq(Tensor, Tensor),
}

/// A run, stepped by hand.
#[derive(Debug, Clone)]
pub struct GdState {
    parameters: Parameters,
}

#[derive(Debug, Clone)]
enum Parameters {
    W(Mat<f64>),
    Kq(Mat<f64>, Mat<f64>),
}

impl GdState {
    /// Starts at the given weights.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) where they do not fit the data.
    pub fn new(data: &AttentionData, start: &GdParameters) -> Result<Self> {
        let read = |what, t: &Tensor, columns: usize| -> Result<Mat<f64>> {
            let (rows, found, values) = crate::linalg::matrix(what, t)?;
            check::length(what, found, columns)?;
            Ok(crate::linalg::from_rows(rows, found, &values))
        };
        let parameters = match start {
            GdParameters::W(w) => Parameters::W(data.weights(w)?),
            GdParameters::Kq(k, q) => {
                let (k, q) = (read("K", k, data.d)?, read("Q", q, data.e)?);
                check::length("rows of Q", q.nrows(), k.nrows())?;
                Parameters::Kq(k, q)
            }
        };
        Ok(Self { parameters })
    }

    fn product(&self) -> Mat<f64> {
        match &self.parameters {
            Parameters::W(w) => w.clone(),
            Parameters::Kq(k, q) => k.transpose() * q,
        }
    }

    /// `W`, `[d, e]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn w(&self) -> Result<Tensor> {
        to_tensor(&self.product())
    }

    /// One step; gives the loss before it.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) where `v` or `y` do not fit.
    pub fn step(
        &mut self,
        how: &NormalizedGd,
        data: &AttentionData,
        v: &[f64],
        y: &[f64],
    ) -> Result<f64> {
        check::length("v", v.len(), data.d)?;
        check::length("y", y.len(), data.n)?;
        let (mut value, g) = gradient(data, how.loss, v, y, &self.product());
        let shift = |x: &mut Mat<f64>, g: &Mat<f64>| {
            *x -= faer::Scale(how.lr / (g.norm_l2() + how.eps)) * g;
        };
        match &mut self.parameters {
            Parameters::W(w) => shift(w, &g),
            Parameters::Kq(k, q) => {
                value += how.ridge * (inner(k, k) + inner(q, q));
                let dk = &*q * g.transpose() + faer::Scale(2.0 * how.ridge) * &*k;
                let dq = &*k * &g + faer::Scale(2.0 * how.ridge) * &*q;
                shift(k, &dk);
                shift(q, &dq);
            }
        }
        Ok(value)
    }
}

impl NormalizedGd {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::positive("NormalizedGd::lr", self.lr)?;
        check::positive("NormalizedGd::eps", self.eps)?;
        check::non_negative("NormalizedGd::ridge", self.ridge)
    }

    /// Takes `steps` steps from `start`; gives the state and the loss before each step.
    ///
    /// # Errors
    /// As [`validate`](Self::validate) and [`GdState::step`].
    pub fn run(
        &self,
        data: &AttentionData,
        v: &[f64],
        y: &[f64],
        start: &GdParameters,
        steps: usize,
    ) -> Result<(GdState, Vec<f64>)> {
        self.validate()?;
        let mut state = GdState::new(data, start)?;
        let mut step = |_| state.step(self, data, v, y);
        let losses: Vec<f64> = (0..steps).map(&mut step).collect::<Result<_>>()?;
        Ok((state, losses))
    }
}
