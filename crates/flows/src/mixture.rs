//! Gaussian mixtures, whose denoiser is a closed form: for tests, for documentation, and as the
//! perfect model of a small data set.
//!
//! For data `sum_m w_m N(mu_m, v_m I)` and a sample `x` at a level `(alpha, sigma)`:
//!
//! ```text
//! s_m = alpha^2 v_m + sigma^2
//! r_m = softmax_m(ln w_m - d/2 ln s_m - |x - alpha mu_m|^2 / (2 s_m))
//! E[p x0 + q eps | x] = sum_m r_m (p mu_m + (p alpha v_m + q sigma) / s_m (x - alpha mu_m))
//! ```

use crate::combine::linear_combination;
use crate::condition::Condition;
use crate::denoiser::Denoiser;
use crate::error::{check, Error, Result};
use crate::level::{Level, Levels};
use crate::prediction::Prediction;
use crate::velocity::{read_times, Velocity};
use candle_core::{DType, Tensor, D};
use nn::activation::Activation;
use nn::linear::linear_activation;
use nn::softmax::{log_softmax, softmax};

/// A logarithm of a weight that is zero; infinity would make NaN of gradients.
const NEVER: f64 = -1e30;

/// A Gaussian mixture as data distribution; see the [module](self) page.
///
/// Samples of any shape are read as vectors. With classes, `Condition::Class(k)` asks for class `k`,
/// and the index after the last class, like [`Condition::Null`], for the whole mixture.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use thalweg_flows::{AnalyticMixture, Condition, Denoiser, Level};
///
/// let means = Tensor::new(&[[1.0_f64, 0.0], [-1.0, 0.0]], &Device::Cpu)?;
/// let mixture = AnalyticMixture::new(&means, &[0.1, 0.1], &[1.0, 1.0])?.with_classes(&[0, 1])?;
/// let x = Tensor::zeros((1, 2), candle_core::DType::F64, &Device::Cpu)?;
/// let level = Level::new(0.6, 0.8, 0.0)?;
/// let first = Condition::classes(&[0], &Device::Cpu)?;
/// let clean = mixture.denoise(&x, &level.into(), &first)?.x0.to_vec2::<f64>()?;
/// assert!(clean[0][0] > 0.9);
/// # Ok::<(), thalweg_flows::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct AnalyticMixture {
    /// `[components, d]`.
    means: Tensor,
    mean_norms: Vec<f64>,
    variances: Vec<f64>,
    weights: Vec<f64>,
    classes: Option<Vec<u32>>,
    class_count: usize,
    leak: f64,
}

impl AnalyticMixture {
    /// A mixture with means `[components, ...]`; weights need not sum to 1.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a negative variance or weights that are negative or all zero; [`Error::Shape`] when the counts differ.
    pub fn new(means: &Tensor, variances: &[f64], weights: &[f64]) -> Result<Self> {
        let count = check::rows("means", means)?;
        if count == 0 || variances.len() != count || weights.len() != count {
            let expected = format!(
                "as many components (at least 1) as {} variances and {} weights",
                variances.len(),
                weights.len()
            );
            return Err(Error::shape("means", means.dims(), expected));
        }
        if let Some(v) = variances.iter().find(|v| !(v.is_finite() && **v >= 0.0)) {
            return Err(Error::argument("variance", v, "a finite number >= 0"));
        }
        let total: f64 = weights.iter().sum();
        let bad = weights.iter().any(|w| !(w.is_finite() && *w >= 0.0));
        if bad || total <= 0.0 {
            return Err(Error::argument(
                "weights",
                weights,
                "finite, >= 0, not all 0",
            ));
        }
        let means = means.reshape((count, ()))?.contiguous()?.detach();
        let norms = means.to_dtype(DType::F64)?.sqr()?.sum(1)?;
        Ok(Self {
            mean_norms: norms.to_vec1()?,
            means,
            variances: variances.to_vec(),
            weights: weights.iter().map(|w| w / total).collect(),
            classes: None,
            class_count: 0,
            leak: 0.0,
        })
    }

    /// One component per example, all with the variance `bandwidth^2`: a kernel density estimate. With
    /// a bandwidth of 0 its velocity is the nonparametric flow of a small data set,
    /// `v = sum_i softmax_i(-|x - t x1_i|^2 / (2 (1 - t)^2)) (x1_i - x) / (1 - t)` for `t < 1`.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn kernel_density(examples: &Tensor, bandwidth: f64) -> Result<Self> {
        let count = check::rows("examples", examples)?;
        Self::new(
            examples,
            &vec![bandwidth * bandwidth; count],
            &vec![1.0; count],
        )
    }

    /// Gives each component a class.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless there is one class per component and every class below the
    /// highest has a component with a weight.
    pub fn with_classes(mut self, classes: &[u32]) -> Result<Self> {
        if classes.len() != self.weights.len() {
            let expected = format!("{}, one per component", self.weights.len());
            return Err(Error::argument(
                "number of classes",
                classes.len(),
                expected,
            ));
        }
        self.class_count = classes.iter().max().map_or(0, |c| *c as usize + 1);
        self.classes = Some(classes.to_vec());
        if let Some(k) = self.class_weights().iter().position(|w| *w <= 0.0) {
            return Err(Error::argument("class", k, "a component with a weight"));
        }
        Ok(self)
    }

    /// Makes the conditional model imperfect: `p_leak(x | c) = (1 - leak) p(x | c) + leak p(x)`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless `leak` is in `[0, 1]`.
    pub fn with_leak(mut self, leak: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&leak) {
            return Err(Error::argument("leak", leak, "in [0, 1]"));
        }
        self.leak = leak;
        Ok(self)
    }

    /// Number of classes; 0 without [`with_classes`](Self::with_classes).
    pub fn classes(&self) -> usize {
        self.class_count
    }

    fn class_weights(&self) -> Vec<f64> {
        let mut total = vec![0.0; self.class_count];
        for (class, weight) in self.classes.iter().flatten().zip(&self.weights) {
            total[*class as usize] += weight;
        }
        total
    }

    /// Logarithms of the components' weights: a row per class, then one for the whole mixture.
    fn log_weights(&self, like: &Tensor) -> Result<Tensor> {
        let ln = |w: f64| if w > 0.0 { w.ln() } else { NEVER };
        let mut table = Vec::new();
        for (k, total) in self.class_weights().iter().enumerate() {
            for (class, w) in self.classes.iter().flatten().zip(&self.weights) {
                let own = if *class as usize == k {
                    1.0 / total
                } else {
                    0.0
                };
                table.push(ln(w * ((1.0 - self.leak) * own + self.leak)));
            }
        }
        table.extend(self.weights.iter().map(|w| ln(*w)));
        let shape = (self.class_count + 1, self.weights.len());
        Ok(Tensor::from_vec(table, shape, like.device())?.to_dtype(like.dtype())?)
    }

    /// `[1 or rows, components]` from a function of level and component.
    fn per_component(
        &self,
        levels: &Levels,
        like: &Tensor,
        f: impl Fn(&Level, usize) -> f64,
    ) -> Result<Tensor> {
        let one = |l: &Level| (0..self.weights.len()).map(|m| f(l, m)).collect::<Vec<_>>();
        let rows = match levels {
            Levels::Same(level) => vec![one(level)],
            Levels::PerRow(levels) => levels.iter().map(one).collect(),
        };
        let shape = (rows.len(), self.weights.len());
        Ok(Tensor::from_vec(rows.concat(), shape, like.device())?.to_dtype(like.dtype())?)
    }

    /// `alpha^2 v_m + sigma^2`
    fn spread(&self, level: &Level, m: usize) -> f64 {
        level.alpha.powi(2) * self.variances[m] + level.sigma.powi(2)
    }

    fn flat(&self, x: &Tensor, levels: &Levels) -> Result<Tensor> {
        let rows = check::rows("x", x)?;
        levels.check(x)?;
        let points = self.variances.contains(&0.0);
        if points && !levels.all(|l| l.sigma > 0.0) {
            return Err(Error::unsupported(
                "a mixture of points without noise",
                "it has no density there; give it a variance, or stop before",
            ));
        }
        let width = self.means.dims()[1];
        match x.elem_count() == rows * width {
            true => Ok(x.reshape((rows, width))?),
            false => Err(Error::shape(
                "x",
                x.dims(),
                format!("{width} numbers per row"),
            )),
        }
    }

    /// Log-densities of the noisy sample under each weighted component, up to the term
    /// `-|x|^2 / (2 s_0)`, which is the same for all components; `[rows, components]`.
    fn logits(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Tensor> {
        let half = 0.5 * self.means.dims()[1] as f64;
        let constant = self.per_component(levels, x, |l, m| {
            let s = self.spread(l, m);
            -half * s.ln() - l.alpha.powi(2) * self.mean_norms[m] / (2.0 * s)
        })?;
        let table = self.log_weights(x)?;
        let weights = match condition {
            Condition::Null => table.narrow(0, self.class_count, 1)?,
            Condition::Class(classes) if self.class_count > 0 => table.index_select(classes, 0)?,
            _ => {
                return Err(Error::unsupported(
                    "this condition of a mixture",
                    "take Condition::Null, or Condition::Class where components have classes",
                ))
            }
        };
        let pull = self.per_component(levels, x, |l, m| l.alpha / self.spread(l, m))?;
        let means = self.means.to_dtype(x.dtype())?;
        let constant = constant.broadcast_add(&weights)?;
        let mut logits = match levels {
            // The level is the same for all rows: it goes into the means.
            Levels::Same(_) => {
                let weight = means.broadcast_mul(&pull.t()?)?;
                let bias = match constant.dims()[0] {
                    1 => Some(constant.squeeze(0)?),
                    _ => None,
                };
                let z = linear_activation(x, &weight, bias.as_ref(), Activation::Identity)?;
                match bias {
                    Some(_) => z,
                    None => z.broadcast_add(&constant)?,
                }
            }
            Levels::PerRow(_) => x
                .matmul(&means.t()?)?
                .broadcast_mul(&pull)?
                .broadcast_add(&constant)?,
        };
        if !self.equal_variances() {
            let rest = self.per_component(levels, x, |l, m| {
                0.5 / self.spread(l, 0) - 0.5 / self.spread(l, m)
            })?;
            let squares = x.sqr()?.sum_keepdim(1)?;
            logits = (logits + squares.broadcast_mul(&rest)?)?;
        }
        Ok(logits)
    }

    /// `E[p x0 + q eps | x]` in the shape of `x`, with `p` and `q` functions of the level.
    ///
    /// # Errors
    /// [`Error::Shape`] for samples of another size; [`Error::Unsupported`] for a condition that is
    /// no class.
    pub fn posterior_mean(
        &self,
        x: &Tensor,
        levels: &Levels,
        condition: &Condition,
        p: impl Fn(&Level) -> f64,
        q: impl Fn(&Level) -> f64,
    ) -> Result<Tensor> {
        let flat = self.flat(x, levels)?;
        let r = softmax(&self.logits(&flat, levels, condition)?, D::Minus1)?;
        let gain = |l: &Level, m: usize| {
            (p(l) * l.alpha * self.variances[m] + q(l) * l.sigma) / self.spread(l, m)
        };
        let on_mean = self.per_component(levels, &flat, |l, m| p(l) - l.alpha * gain(l, m))?;
        let means = self.means.to_dtype(x.dtype())?;
        if let (Levels::Same(level), true) = (levels, self.equal_variances()) {
            // The weights of the components sum to 1: what is left of them on `x` is one number.
            let means = means.broadcast_mul(&on_mean.t()?)?;
            let from_means = r.matmul(&means)?.reshape(x.shape())?;
            return linear_combination(&[(1.0, &from_means), (gain(level, 0), x)]);
        }
        let on_x = self.per_component(levels, &flat, gain)?;
        let from_means = r.broadcast_mul(&on_mean)?.matmul(&means)?;
        let factor = r.broadcast_mul(&on_x)?.sum_keepdim(1)?;
        Ok((from_means + flat.broadcast_mul(&factor)?)?.reshape(x.shape())?)
    }

    fn equal_variances(&self) -> bool {
        self.variances.iter().all(|v| *v == self.variances[0])
    }

    /// Log-density of the noisy sample, `[rows]`.
    ///
    /// # Errors
    /// As [`posterior_mean`](Self::posterior_mean).
    pub fn log_density(
        &self,
        x: &Tensor,
        levels: &Levels,
        condition: &Condition,
    ) -> Result<Tensor> {
        let flat = self.flat(x, levels)?;
        let logits = self.logits(&flat, levels, condition)?;
        let half = 0.5 * self.means.dims()[1] as f64 * (2.0 * std::f64::consts::PI).ln();
        let common = levels.scale(&flat.sqr()?.sum_keepdim(1)?, |l| 0.5 / self.spread(l, 0))?;
        Ok((logits.log_sum_exp(1)? - common.squeeze(1)?)?.affine(1.0, -half)?)
    }

    /// Log-probabilities of the classes given the noisy sample, `[rows, classes]`.
    ///
    /// # Errors
    /// As [`posterior_mean`](Self::posterior_mean); [`Error::Unsupported`] without classes.
    pub fn log_posterior(&self, x: &Tensor, levels: &Levels) -> Result<Tensor> {
        let Some(classes) = &self.classes else {
            return Err(Error::unsupported(
                "the classes' posterior of a mixture without classes",
                "give it classes first",
            ));
        };
        let flat = self.flat(x, levels)?;
        let logits = self.logits(&flat, levels, &Condition::Null)?;
        let mut columns = Vec::new();
        for k in 0..self.class_count {
            let members: Vec<u32> = (0..classes.len() as u32)
                .filter(|m| classes[*m as usize] as usize == k)
                .collect();
            let members = Tensor::from_slice(&members, members.len(), x.device())?;
            columns.push(logits.index_select(&members, 1)?.log_sum_exp(1)?);
        }
        Ok(log_softmax(&Tensor::stack(&columns, 1)?, D::Minus1)?)
    }
}

impl Denoiser for AnalyticMixture {
    fn prediction(&self) -> Prediction {
        Prediction::X0
    }

    fn raw(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Tensor> {
        self.posterior_mean(x, levels, condition, |_| 1.0, |_| 0.0)
    }
}

/// The velocity `E[x0 - eps | x]` of straight paths from standard normal noise, also at both ends.
impl Velocity for AnalyticMixture {
    fn velocity(&self, x: &Tensor, t: &Tensor, condition: &Condition) -> Result<Tensor> {
        // A solver's sum of steps may miss an end by a rounding error.
        let ends = -1e-9..=1.0 + 1e-9;
        let level = |t: f64| {
            let t = if ends.contains(&t) {
                t.clamp(0.0, 1.0)
            } else {
                t
            };
            Level {
                alpha: t,
                sigma: 1.0 - t,
                model_time: t,
            }
        };
        let levels = match read_times(t)? {
            times if times.windows(2).all(|w| w[0] == w[1]) && !times.is_empty() => {
                Levels::Same(level(times[0]))
            }
            times => Levels::PerRow(times.into_iter().map(level).collect()),
        };
        self.posterior_mean(x, &levels, condition, |_| 1.0, |_| -1.0)
    }
}
