//! Levels of noise: where on its path from noise to data a sample is.

use crate::combine::{linear_combination, row_combination};
use crate::error::{check, Error, Result};
use candle_core::{DType, Device, Tensor};

/// Below this signal scale nothing is divided by `alpha`.
pub(crate) const MIN_ALPHA: f64 = 1e-12;

/// One point of the path: `x = alpha * data + sigma * noise`.
///
/// Nothing here knows in which direction a schedule's time runs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Level {
    /// Scale of the data, `>= 0`.
    pub alpha: f64,
    /// Scale of the noise (standard deviation), `>= 0`.
    pub sigma: f64,
    /// What the network is told: a step index, `ln(sigma) / 4`, a time in `[0, 1]`, ...
    pub model_time: f64,
}

impl Level {
    /// A level.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless both scales are finite, not negative and not both zero, and
    /// the time is finite.
    pub fn new(alpha: f64, sigma: f64, model_time: f64) -> Result<Self> {
        let level = Self {
            alpha,
            sigma,
            model_time,
        };
        level.validate()?;
        Ok(level)
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn validate(&self) -> Result<()> {
        let scale = |x: f64| x.is_finite() && x >= 0.0;
        let holds = scale(self.alpha)
            && scale(self.sigma)
            && self.alpha + self.sigma > 0.0
            && self.model_time.is_finite();
        if holds {
            return Ok(());
        }
        Err(Error::argument(
            "level",
            self,
            "finite alpha >= 0 and sigma >= 0, not both 0, and a finite model_time",
        ))
    }

    /// Noise to signal `sigma / alpha`: the sigma of a variance-exploding process; infinite at pure
    /// noise.
    pub fn rho(&self) -> f64 {
        self.sigma / self.alpha
    }

    /// Half the logarithm of the signal-to-noise ratio, `ln(alpha / sigma)`.
    pub fn lambda(&self) -> f64 {
        (self.alpha / self.sigma).ln()
    }

    /// Signal to noise `alpha^2 / sigma^2`.
    pub fn snr(&self) -> f64 {
        (self.alpha / self.sigma).powi(2)
    }
}

/// The levels of the rows of a batch: one for all (sampling) or one each (training).
#[derive(Debug, Clone, PartialEq)]
pub enum Levels {
    /// All rows are at the same level.
    Same(Level),
    /// One level per row.
    PerRow(Vec<Level>),
}

impl From<Level> for Levels {
    fn from(level: Level) -> Self {
        Self::Same(level)
    }
}

impl Levels {
    /// Checks the levels, and that there are as many as rows.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a bad level, [`Error::Shape`] for another number of rows.
    pub fn check(&self, x: &Tensor) -> Result<()> {
        let rows = check::rows("x", x)?;
        match self {
            Self::Same(level) => level.validate(),
            Self::PerRow(levels) if levels.len() != rows => Err(Error::shape(
                "x",
                x.dims(),
                format!("{} rows, one per level", levels.len()),
            )),
            Self::PerRow(levels) => levels.iter().try_for_each(Level::validate),
        }
    }

    /// The first level; `None` for a batch without rows.
    pub fn first(&self) -> Option<&Level> {
        match self {
            Self::Same(level) => Some(level),
            Self::PerRow(levels) => levels.first(),
        }
    }

    /// Whether `f` holds for every level.
    pub fn all(&self, f: impl Fn(&Level) -> bool) -> bool {
        match self {
            Self::Same(level) => f(level),
            Self::PerRow(levels) => levels.iter().all(f),
        }
    }

    /// `f(level)` for each of `rows` rows.
    pub fn values(&self, rows: usize, f: impl Fn(&Level) -> f64) -> Vec<f64> {
        match self {
            Self::Same(level) => vec![f(level); rows],
            Self::PerRow(levels) => levels.iter().map(f).collect(),
        }
    }

    /// What the network is told, `[rows]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn model_time(&self, rows: usize, dtype: DType, device: &Device) -> Result<Tensor> {
        let times = self.values(rows, |l| l.model_time);
        let count = times.len();
        Ok(Tensor::from_vec(times, count, device)?.to_dtype(dtype)?)
    }

    /// `f(level) * x`, row by row.
    ///
    /// # Errors
    /// Those of candle.
    pub fn scale(&self, x: &Tensor, f: impl Fn(&Level) -> f64) -> Result<Tensor> {
        match self {
            Self::Same(level) => {
                let factor = f(level);
                Ok(if factor == 1.0 {
                    x.clone()
                } else {
                    x.affine(factor, 0.0)?
                })
            }
            Self::PerRow(_) => Ok(x.broadcast_mul(&self.column(x, f)?)?),
        }
    }

    /// `a(level) * x + b(level) * y`, row by row.
    ///
    /// # Errors
    /// Those of candle.
    pub fn combine(
        &self,
        a: impl Fn(&Level) -> f64,
        x: &Tensor,
        b: impl Fn(&Level) -> f64,
        y: &Tensor,
    ) -> Result<Tensor> {
        match self {
            Self::Same(level) => linear_combination(&[(a(level), x), (b(level), y)]),
            Self::PerRow(levels) => {
                let of = |f: &dyn Fn(&Level) -> f64| levels.iter().map(f).collect::<Vec<f64>>();
                row_combination(&[(&of(&a), x), (&of(&b), y)])
            }
        }
    }

    /// `f(level)` as `[rows, 1, ..., 1]` with the rank, dtype and device of `like`.
    fn column(&self, like: &Tensor, f: impl Fn(&Level) -> f64) -> Result<Tensor> {
        let values = self.values(like.dims().first().copied().unwrap_or(0), f);
        let mut shape = vec![1; like.rank()];
        shape[0] = values.len();
        Ok(Tensor::from_vec(values, shape, like.device())?.to_dtype(like.dtype())?)
    }

    /// The levels of these rows.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when there is no such row.
    pub fn select(&self, rows: &[u32]) -> Result<Self> {
        let levels = match self {
            Self::Same(_) => return Ok(self.clone()),
            Self::PerRow(levels) => levels,
        };
        let pick = |row: &u32| {
            let level = levels.get(*row as usize).copied();
            level.ok_or_else(|| Error::argument("row", row, format!("below {}", levels.len())))
        };
        Ok(Self::PerRow(rows.iter().map(pick).collect::<Result<_>>()?))
    }
}

/// A clean sample and noise mixed at the given levels, `alpha * data + sigma * noise`.
///
/// # Errors
/// [`Error::Shape`] when shapes or the number of levels differ.
pub fn mix(data: &Tensor, noise: &Tensor, levels: &Levels) -> Result<Tensor> {
    check::same_shape("noise", noise, data)?;
    levels.check(data)?;
    levels.combine(|l| l.alpha, data, |l| l.sigma, noise)
}
