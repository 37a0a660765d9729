//! What a fused step computes: elementwise rules and per-tensor maps of the gradient.

use super::Real;
use crate::{Error, Result};
use candle_core::Tensor;

/// The outcome of a [`Rule`] for one element.
#[derive(Debug, Clone, Copy)]
pub struct Updated<T, const S: usize> {
    /// The new parameter.
    pub param: T,
    /// The new state.
    pub state: [T; S],
    /// Something worth counting happened (an entry was clipped, say); summed per tensor.
    pub event: bool,
}

/// An elementwise update with `S` state values per element and `K` scalars per tensor and step.
///
/// The same few lines serve every dtype, instruction set, dense and sparse state. Rules use plain
/// operations only, without branches on data where a [`Real::select`] will do, so that the loop
/// around them becomes vector code.
pub trait Rule<const S: usize, const K: usize>: Copy + Send + Sync {
    /// Shown in errors and traces.
    const NAME: &'static str;

    /// The body of the same update for a device kernel, in the common subset of C++ that CUDA and
    /// Metal share: reads `p`, `g`, `s0..`, `k[0..K]` of type `T`, writes `p`, `s0..` and `event`.
    /// `None` makes a step on a device an error.
    const DEVICE_BODY: Option<&'static str>;

    /// This step's scalars, in the order in which [`update`](Self::update) reads them.
    fn scalars(&self) -> [f64; K];

    /// One element.
    fn update<T: Real>(k: &[T; K], param: T, grad: T, state: [T; S]) -> Updated<T, S>;
}

/// A per-tensor map of the gradient that costs no memory pass:
/// `g' = outer * clamp(scale * g, -clip, clip) - along * p`.
///
/// Gradient transforms that scale, clip or project leave their scalars here instead of making new
/// tensors; the fused step applies them in registers.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GradMap {
    /// Factor before the clip.
    pub scale: f64,
    /// Bound on the absolute value after `scale`; infinite for none.
    pub clip: f64,
    /// Factor after the clip.
    pub outer: f64,
    /// Multiple of the parameter that is subtracted.
    pub along: f64,
}

impl Default for GradMap {
    fn default() -> Self {
        Self {
            scale: 1.0,
            clip: f64::INFINITY,
            outer: 1.0,
            along: 0.0,
        }
    }
}

impl GradMap {
    /// Whether the map leaves every gradient as it is.
    pub fn is_identity(&self) -> bool {
        *self == Self::default()
    }

    /// This map followed by `c * g`.
    #[must_use]
    pub fn then_scale(self, c: f64) -> Self {
        self.then_affine(c, 0.0)
    }

    /// This map followed by `a * g - b * p`.
    #[must_use]
    pub fn then_affine(mut self, a: f64, b: f64) -> Self {
        if self.clip.is_infinite() && self.along == 0.0 {
            // Nothing lies between the two factors: keep one of them at 1.
            self.scale *= self.outer * a;
            self.outer = 1.0;
        } else {
            self.outer *= a;
        }
        self.along = a * self.along + b;
        self
    }

    /// This map followed by a clip to `[-limit, limit]`; `None` where the result is not a map of
    /// this form (a clip after a projection): the caller then materializes the gradient.
    #[must_use]
    pub fn then_clip(self, limit: f64) -> Option<Self> {
        if self.along != 0.0 {
            return None;
        }
        // clamp(o * clamp(s g, c), d) = clamp(o s g, min(|o| c, d)), since o only scales or flips.
        Some(Self {
            scale: self.scale * self.outer,
            clip: limit.min(self.clip * self.outer.abs()),
            outer: 1.0,
            along: 0.0,
        })
    }

    /// The mapped gradient as a new tensor.
    ///
    /// # Errors
    /// Those of candle.
    pub fn apply(&self, grad: &Tensor, param: &Tensor) -> Result<Tensor> {
        // The same scalars as in registers, for the same sharpness.
        let [scale, clip, outer, along, rest] = map_scalars(self, grad.dtype());
        let mut out = grad.affine(scale, 0.0)?;
        if clip.is_finite() {
            out = out.clamp(-clip, clip)?;
        }
        out = out.affine(outer, 0.0)?;
        if along != 0.0 {
            let param = param.detach();
            out = ((out - param.affine(along, 0.0)?)? - param.affine(rest, 0.0)?)?;
        }
        Ok(out)
    }

    pub(super) fn check(&self) -> Result<()> {
        let finite = self.scale.is_finite() && self.outer.is_finite() && self.along.is_finite();
        if !finite || self.clip.is_nan() || self.clip < 0.0 {
            return Err(Error::invalid(
                "gradient map",
                format!("{self:?}"),
                "finite factors and a clip >= 0",
            ));
        }
        Ok(())
    }
}

/// Scalars of a map as kernels take them.
pub(super) const MAP_SCALARS: usize = 5;

/// [`GradMap`] in the kernel's number type.
#[derive(Clone, Copy)]
pub(super) struct Map<T> {
    scale: T,
    clip: T,
    outer: T,
    along: T,
    /// What rounding took from `along`.
    along_rest: T,
}

impl<T: Real> Map<T> {
    /// A projection subtracts two nearly equal vectors when the gradient is nearly parallel to the
    /// parameter, and the rounding of a scalar would come back along the parameter. So `along`
    /// follows the rounding of the factors beside it, and keeps its own rest.
    pub(super) fn new(map: &GradMap) -> Self {
        let (scale, outer) = (T::from_f64(map.scale), T::from_f64(map.outer));
        let exact = map.scale * map.outer;
        let follow = if map.clip.is_infinite() && exact != 0.0 {
            scale.to_f64() * outer.to_f64() / exact
        } else {
            1.0
        };
        let target = map.along * follow;
        let along = T::from_f64(target);
        Self {
            scale,
            clip: T::from_f64(map.clip),
            outer,
            along,
            along_rest: T::from_f64(target - along.to_f64()),
        }
    }

    #[inline(always)]
    pub(super) fn apply(&self, grad: T, param: T) -> T {
        (grad * self.scale).clamp_abs(self.clip) * self.outer
            - self.along * param
            - self.along_rest * param
    }

    /// The scalars for whoever computes in the same type by other means.
    pub(super) fn scalars(&self) -> [f64; MAP_SCALARS] {
        [
            self.scale,
            self.clip,
            self.outer,
            self.along,
            self.along_rest,
        ]
        .map(Real::to_f64)
    }
}

/// The scalars of a map for parameters of a dtype.
pub(super) fn map_scalars(map: &GradMap, param: candle_core::DType) -> [f64; MAP_SCALARS] {
    match param {
        candle_core::DType::F64 => Map::<f64>::new(map).scalars(),
        _ => Map::<f32>::new(map).scalars(),
    }
}
