//! What networks predict, and the exact conversions between predictions.
//!
//! At a level `x = alpha x0 + sigma eps` each of the following determines the others:
//!
//! ```text
//! score    = -eps / sigma
//! v        = alpha eps - sigma x0          (needs alpha^2 + sigma^2 = 1)
//! velocity = alpha' x0 + sigma' eps        (alpha', sigma': derivatives along the path)
//! ```
//!
//! The canonical form here is the clean sample `x0`: guidance, clipping and steps work on it.

use crate::error::{check, Error, Result};
use crate::level::{Level, Levels, MIN_ALPHA};
use candle_core::Tensor;

/// How fast `alpha` and `sigma` change along the path of a velocity prediction.
#[derive(Debug, Clone, Copy)]
pub enum PathSpeed {
    /// `x0 - eps`: rectified flow with time from 0 (noise) to 1 (data), as everywhere here.
    DataMinusNoise,
    /// `eps - x0`: what networks in the manner of FLUX and Stable Diffusion 3 return.
    NoiseMinusData,
    /// `(alpha', sigma')` at a level.
    Custom(fn(&Level) -> (f64, f64)),
}

impl PathSpeed {
    /// `(alpha', sigma')` at a level.
    pub fn at(&self, level: &Level) -> (f64, f64) {
        match self {
            Self::DataMinusNoise => (1.0, -1.0),
            Self::NoiseMinusData => (-1.0, 1.0),
            Self::Custom(speed) => speed(level),
        }
    }
}

/// What a network returns.
#[derive(Debug, Clone, Copy)]
pub enum Prediction {
    /// The noise.
    Eps,
    /// The clean sample.
    X0,
    /// `alpha eps - sigma x0`.
    V,
    /// The gradient of the log-density of the noisy sample.
    Score,
    /// The velocity of a path.
    Velocity(PathSpeed),
}

/// A noisy sample with the clean one that a network sees in it.
#[derive(Debug, Clone)]
pub struct Denoised {
    /// The noisy sample, `[rows, ...]`.
    pub x: Tensor,
    /// The clean sample, same shape.
    pub x0: Tensor,
    /// Where on the path `x` is.
    pub levels: Levels,
}

impl Denoised {
    /// From a network's raw output.
    ///
    /// # Errors
    /// [`Error::Shape`] when output and input differ in shape; [`Error::Undetermined`] where the
    /// prediction says nothing about `x0`: noise or score at `alpha < 1e-12`, `v` where
    /// `alpha^2 + sigma^2` is not 1, a velocity along a path that stands still.
    pub fn from_raw(
        raw: &Tensor,
        prediction: Prediction,
        x: &Tensor,
        levels: &Levels,
    ) -> Result<Self> {
        check::same_shape("the network's output", raw, x)?;
        levels.check(x)?;
        let x0 = match prediction {
            Prediction::X0 => raw.clone(),
            Prediction::Eps => {
                with_signal(levels, "x0 from a noise prediction")?;
                levels.combine(|l| 1.0 / l.alpha, x, |l| -l.sigma / l.alpha, raw)?
            }
            Prediction::Score => {
                with_signal(levels, "x0 from a score")?;
                levels.combine(|l| 1.0 / l.alpha, x, |l| l.sigma.powi(2) / l.alpha, raw)?
            }
            Prediction::V => {
                let preserving = |l: &Level| (l.alpha.hypot(l.sigma) - 1.0).abs() < 1e-6;
                let advice = "v needs alpha^2 + sigma^2 = 1; use the velocity of the path";
                determined(levels, "x0 from v", preserving, advice)?;
                levels.combine(|l| l.alpha, x, |l| -l.sigma, raw)?
            }
            Prediction::Velocity(speed) => {
                let advice = "alpha sigma' - alpha' sigma is 0 there";
                let what = "x0 from a velocity";
                determined(
                    levels,
                    what,
                    |l| determinant(l, speed).abs() > 1e-12,
                    advice,
                )?;
                let (to_x, to_u) = (
                    |l: &Level| speed.at(l).1 / determinant(l, speed),
                    |l: &Level| -l.sigma / determinant(l, speed),
                );
                levels.combine(to_x, x, to_u, raw)?
            }
        };
        Ok(Self {
            x: x.clone(),
            x0,
            levels: levels.clone(),
        })
    }

    /// The same noisy sample with another clean one.
    #[must_use]
    pub fn with_x0(&self, x0: Tensor) -> Self {
        Self {
            x: self.x.clone(),
            x0,
            levels: self.levels.clone(),
        }
    }

    /// The noise `(x - alpha x0) / sigma`.
    ///
    /// # Errors
    /// [`Error::Undetermined`] at `sigma = 0`.
    pub fn eps(&self) -> Result<Tensor> {
        with_noise(&self.levels, "the noise")?;
        self.levels
            .combine(|l| 1.0 / l.sigma, &self.x, |l| -l.alpha / l.sigma, &self.x0)
    }

    /// The score `-eps / sigma`.
    ///
    /// # Errors
    /// [`Error::Undetermined`] at `sigma = 0`.
    pub fn score(&self) -> Result<Tensor> {
        with_noise(&self.levels, "the score")?;
        self.levels.combine(
            |l| -1.0 / l.sigma.powi(2),
            &self.x,
            |l| l.alpha / l.sigma.powi(2),
            &self.x0,
        )
    }

    /// `v = alpha eps - sigma x0`.
    ///
    /// # Errors
    /// [`Error::Undetermined`] at `sigma = 0`.
    pub fn v(&self) -> Result<Tensor> {
        with_noise(&self.levels, "v")?;
        self.levels.combine(
            |l| l.alpha / l.sigma,
            &self.x,
            |l| -(l.alpha.powi(2) + l.sigma.powi(2)) / l.sigma,
            &self.x0,
        )
    }

    /// The velocity `alpha' x0 + sigma' eps` of a path.
    ///
    /// # Errors
    /// [`Error::Undetermined`] at `sigma = 0`.
    pub fn velocity(&self, speed: PathSpeed) -> Result<Tensor> {
        with_noise(&self.levels, "the velocity")?;
        self.levels.combine(
            |l| speed.at(l).1 / l.sigma,
            &self.x,
            |l| speed.at(l).0 - speed.at(l).1 * l.alpha / l.sigma,
            &self.x0,
        )
    }

    /// The sample in the form of a prediction: the inverse of [`from_raw`](Self::from_raw).
    ///
    /// # Errors
    /// [`Error::Undetermined`] at `sigma = 0`, except for `X0`.
    pub fn to_raw(&self, prediction: Prediction) -> Result<Tensor> {
        match prediction {
            Prediction::X0 => Ok(self.x0.clone()),
            Prediction::Eps => self.eps(),
            Prediction::Score => self.score(),
            Prediction::V => self.v(),
            Prediction::Velocity(speed) => self.velocity(speed),
        }
    }

    /// These rows only.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when there is no such row.
    pub fn select(&self, rows: &[u32]) -> Result<Self> {
        Ok(Self {
            x: select_rows(&self.x, rows)?,
            x0: select_rows(&self.x0, rows)?,
            levels: self.levels.select(rows)?,
        })
    }
}

fn determinant(level: &Level, speed: PathSpeed) -> f64 {
    let (alpha, sigma) = speed.at(level);
    level.alpha * sigma - alpha * level.sigma
}

fn determined(
    levels: &Levels,
    what: &'static str,
    holds: impl Fn(&Level) -> bool,
    advice: &'static str,
) -> Result<()> {
    let fails = |l: &&Level| !holds(l);
    let bad = match levels {
        Levels::Same(level) => Some(level).filter(fails),
        Levels::PerRow(levels) => levels.iter().find(fails),
    };
    match bad {
        None => Ok(()),
        Some(level) => Err(Error::Undetermined {
            what,
            alpha: level.alpha,
            sigma: level.sigma,
            advice,
        }),
    }
}

fn with_signal(levels: &Levels, what: &'static str) -> Result<()> {
    let advice = "start at a level with signal, or use a model that predicts v or a velocity";
    determined(levels, what, |l| l.alpha >= MIN_ALPHA, advice)
}

pub(crate) fn with_noise(levels: &Levels, what: &'static str) -> Result<()> {
    let advice = "there is no noise left; x0 is the sample itself";
    determined(levels, what, |l| l.sigma > 0.0, advice)
}

/// Rows of a tensor, in the given order.
///
/// # Errors
/// [`Error::InvalidArgument`] when there is no such row.
pub fn select_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor> {
    let count = check::rows("x", x)?;
    if let Some(row) = rows.iter().find(|r| **r as usize >= count) {
        return Err(Error::argument("row", row, format!("below {count}")));
    }
    let index = Tensor::from_slice(rows, rows.len(), x.device())?;
    Ok(x.index_select(&index, 0)?)
}

/// `x` with the rows `rows` replaced by those of `part`, in order.
///
/// # Errors
/// [`Error::InvalidArgument`] when there is no such row, [`Error::Shape`] when the number of rows
/// or their shape differs.
pub fn replace_rows(x: &Tensor, rows: &[u32], part: &Tensor) -> Result<Tensor> {
    let count = check::rows("x", x)?;
    let fits = part.rank() == x.rank()
        && part.dims()[1..] == x.dims()[1..]
        && part.dims()[0] == rows.len();
    if !fits {
        let expected = format!("{} rows of the shape {:?}", rows.len(), &x.dims()[1..]);
        return Err(Error::shape("the new rows", part.dims(), expected));
    }
    let mut from: Vec<u32> = (0..count as u32).collect();
    for (k, row) in rows.iter().enumerate() {
        match from.get_mut(*row as usize) {
            Some(slot) => *slot = (count + k) as u32,
            None => return Err(Error::argument("row", row, format!("below {count}"))),
        }
    }
    let index = Tensor::from_vec(from, count, x.device())?;
    Ok(Tensor::cat(&[x, part], 0)?.index_select(&index, 0)?)
}
