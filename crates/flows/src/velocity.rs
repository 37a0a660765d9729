//! Velocity fields `dx/dt = v(x, t)` from a source at time 0 to a target at time 1.

use crate::condition::Condition;
use crate::denoiser::Denoiser;
use crate::error::{check, Error, Result};
use crate::level::{Level, Levels};
use crate::ode::{OdeField, Times};
use crate::prediction::{PathSpeed, Prediction};
use candle_core::{DType, Tensor};

/// A velocity field. Time is a tensor `[rows]` in `[0, 1]`: 0 is the source (noise), 1 the target
/// (data), everywhere in this workspace.
///
/// Closures `Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>` are unconditional fields.
pub trait Velocity {
    /// The velocity at `x` `[rows, ...]` and `t` `[rows]`, in the shape of `x`.
    ///
    /// # Errors
    /// Whatever the network's own are.
    fn velocity(&self, x: &Tensor, t: &Tensor, condition: &Condition) -> Result<Tensor>;
}

impl<F> Velocity for F
where
    F: Fn(&Tensor, &Tensor) -> candle_core::Result<Tensor>,
{
    fn velocity(&self, x: &Tensor, t: &Tensor, condition: &Condition) -> Result<Tensor> {
        match condition {
            Condition::Null => Ok(self(x, t)?),
            _ => Err(Error::unsupported(
                "a condition for a closure of x and t",
                "implement Velocity, or close over the condition",
            )),
        }
    }
}

/// A field under one condition, as an unconditional field.
pub struct Conditioned<'a, V: ?Sized> {
    /// The conditional field.
    pub velocity: &'a V,
    /// The condition, for every call.
    pub condition: Condition,
}

impl<V: Velocity + ?Sized> Velocity for Conditioned<'_, V> {
    fn velocity(&self, x: &Tensor, t: &Tensor, condition: &Condition) -> Result<Tensor> {
        match condition {
            Condition::Null => self.velocity.velocity(x, t, &self.condition),
            _ => Err(Error::unsupported(
                "a condition for a field that has one already",
                "call the inner field",
            )),
        }
    }
}

/// A field whose network wants `scale * t` (999 for networks from `score_sde`).
pub struct WithTimeScale<V> {
    /// The field.
    pub inner: V,
    /// What time is multiplied by.
    pub scale: f64,
}

impl<V: Velocity> Velocity for WithTimeScale<V> {
    fn velocity(&self, x: &Tensor, t: &Tensor, condition: &Condition) -> Result<Tensor> {
        let scaled = t.affine(self.scale, 0.0)?;
        self.inner.velocity(x, &scaled, condition)
    }
}

/// A field that was trained with time running the other way: `v(x, t) = -inner(x, 1 - t)`.
pub struct Reversed<V>(pub V);

impl<V: Velocity> Velocity for Reversed<V> {
    fn velocity(&self, x: &Tensor, t: &Tensor, condition: &Condition) -> Result<Tensor> {
        let reversed = t.affine(-1.0, 1.0)?;
        Ok(self.0.velocity(x, &reversed, condition)?.neg()?)
    }
}

/// Any denoiser under a condition as the field of straight paths, for the solvers of
/// [`ode`](crate::ode): a guided teacher ([`Guided`](crate::guidance::Guided)) of
/// [`reflow`](crate::coupling::reflow), say. The denoiser is told the time from 0 (noise) to 1 (data), and
/// must say something at pure noise (predict a velocity, `v` or the clean sample).
///
/// A clean sample says nothing about the velocity at time 1, where solvers of higher order and backward ones
/// ask: the field is evaluated a little before (`1e-6`, in single precision `1e-4`) unless the denoiser
/// predicts the velocity of the path itself.
pub struct FlowField<'a> {
    /// The denoiser.
    pub denoiser: &'a dyn Denoiser,
    /// The condition, for every call.
    pub condition: Condition,
}

impl OdeField for FlowField<'_> {
    fn eval(&self, y: &Tensor, t: &Times) -> Result<Tensor> {
        // What the network says itself, where that is the velocity of the path.
        let sign = match self.denoiser.prediction() {
            Prediction::Velocity(PathSpeed::DataMinusNoise) => Some(1.0),
            Prediction::Velocity(PathSpeed::NoiseMinusData) => Some(-1.0),
            _ => None,
        };
        let last = match (sign, y.dtype()) {
            (Some(_), _) => 1.0,
            (None, DType::F64) => 1.0 - 1e-6,
            (None, _) => 1.0 - 1e-4,
        };
        // A solver's sum of steps may miss an end by a rounding error.
        let level = |t: &f64| match (-1e-9..=1.0 + 1e-9).contains(t) {
            true => {
                let t = t.clamp(0.0, last);
                Level::new(t, 1.0 - t, t)
            }
            false => Err(Error::argument("t", t, "a time in [0, 1]")),
        };
        let levels = match t {
            Times::Same(t) => Levels::Same(level(t)?),
            Times::PerRow(times) => Levels::PerRow(times.iter().map(level).collect::<Result<_>>()?),
        };
        let rows = check::rows("y", y)?;
        let condition = self.condition.for_rows(rows)?;
        match sign {
            Some(sign) => {
                let raw = self.denoiser.raw(y, &levels, &condition)?;
                check::same_shape("the network's output", &raw, y)?;
                Ok(raw.affine(sign, 0.0)?)
            }
            None => {
                let d = self.denoiser.denoise(y, &levels, &condition)?;
                d.velocity(PathSpeed::DataMinusNoise)
            }
        }
    }
}

/// The times `[rows]` as numbers.
pub(crate) fn read_times(t: &Tensor) -> Result<Vec<f64>> {
    match t.rank() {
        1 => Ok(t.to_dtype(DType::F64)?.to_vec1()?),
        _ => Err(Error::shape("t", t.dims(), "[rows]")),
    }
}

/// `t` `[rows]` as `[rows, 1, ..., 1]`, to be broadcast over `like` `[rows, ...]`.
pub(crate) fn column(t: &Tensor, like: &Tensor) -> Result<Tensor> {
    let rows = check::rows("x", like)?;
    if t.dims() != [rows] {
        return Err(Error::shape("t", t.dims(), format!("[{rows}]")));
    }
    let mut shape = vec![1; like.rank()];
    shape[0] = rows;
    Ok(t.to_dtype(like.dtype())?.reshape(shape)?)
}
