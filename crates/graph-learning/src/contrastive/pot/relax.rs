//! Lines around the activation.

use super::bounds::AdjacencyBounds;
use super::score::Intervals;
use crate::contrastive::GcnEncoder;
use crate::graph::Graph;
use crate::sparse::Features;
use crate::{Error, Result};
use candle_core::Tensor;

/// Lower and upper ends of a layer's pre-activations.
type Ends = (Tensor, Tensor);

/// Intervals of the pre-activations of both layers, over all views within the budget.
#[derive(Debug, Clone)]
pub struct ActivationIntervals {
    /// Of the first layer, `[N, 2 h]` both.
    pub first: Ends,
    /// Of the second layer, `[N, h]` both.
    pub second: Ends,
}

impl ActivationIntervals {
    /// Intervals between the nodes of `bounds`, which are `nodes` of the graph (all, in order, without).
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit; [`Error::InvalidArgument`] for a slope outside `[0, 1]`.
    pub fn new(
        encoder: &GcnEncoder,
        x: &Features,
        graph: &Graph,
        bounds: &AdjacencyBounds,
        nodes: Option<&Tensor>,
        kind: Intervals,
    ) -> Result<Self> {
        slope(encoder)?;
        let [one, two] = encoder.layers();
        let projected = x.linear(one.weight())?;
        let pick = |y: &Tensor| -> Result<Tensor> {
            match nodes {
                Some(nodes) => Ok(y.index_select(nodes, 0)?),
                None => Ok(y.clone()),
            }
        };
        let first = bounds.interval(&pick(&projected)?, &bias(one)?)?;
        let weight = two.weight().t()?;
        let second = match kind {
            Intervals::Published => {
                let hidden = one.propagate(graph, &projected, None)?;
                let hidden = hidden.broadcast_add(&bias(one)?)?;
                let hidden = encoder.activation().apply(&hidden)?;
                bounds.interval(&pick(&hidden.matmul(&weight)?)?, &bias(two)?)?
            }
            Intervals::Sound => {
                let act = |p: &Tensor| encoder.activation().apply_fixed(p);
                let (low, high) = (act(&first.0)?, act(&first.1)?);
                let center = ((&low + &high)? / 2.0)?.matmul(&weight)?;
                let radius = ((high - low)? / 2.0)?.matmul(&weight.abs()?)?;
                let (low, high) = ((&center - &radius)?, (center + radius)?);
                bounds.sound_interval(&low, &high, &bias(two)?)?
            }
        };
        Ok(Self { first, second })
    }
}

/// A layer's bias, which the encoder always has.
pub(super) fn bias(layer: &crate::conv::GcnConv) -> Result<Tensor> {
    let bias = layer.bias().cloned();
    bias.ok_or_else(|| Error::unsupported("a compactness score", "of a layer without bias"))
}

/// The activation's slope below 0.
pub(super) fn slope(encoder: &GcnEncoder) -> Result<f64> {
    let a = encoder.activation().slope()?;
    if (0.0..=1.0).contains(&a) {
        return Ok(a);
    }
    Err(Error::argument(
        "PReLU slope",
        a,
        "a number in [0, 1], where the activation is convex",
    ))
}

/// `k x <= s(x) <= k (x + beta)` for `x` in `[l, u]`, where `s` has slope 1 above 0 and `a` below.
#[derive(Debug, Clone)]
pub struct Relaxation {
    /// The slope `k` of both lines, between `a` and 1.
    pub slope: Tensor,
    /// The offset `beta >= 0` of the upper line; that of the lower one is 0.
    pub upper: Tensor,
}

impl Relaxation {
    /// Lines around `s` on intervals `[l, u]`, entry by entry.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless `0 <= a <= 1`; shapes that do not fit.
    pub fn new(low: &Tensor, high: &Tensor, a: f64) -> Result<Self> {
        if !(0.0..=1.0).contains(&a) {
            return Err(Error::argument("slope", a, "a number in [0, 1]"));
        }
        let ones = low.ones_like()?;
        let active = low.detach().ge(0.0)?;
        let inactive = high.detach().le(0.0)?;
        let settled = (active.clone() + &inactive)?.gt(0u8)?;
        // Where nothing is open, both ends are replaced before the divisions: no gradient is NaN.
        let l = settled.where_cond(&ones.neg()?, low)?;
        let u = settled.where_cond(&ones, high)?;
        let rise = (&u - (&l * a)?)?;
        let open = (&rise / (&u - &l)?)?;
        let offset = (((&u * &l)? * (a - 1.0))? / &rise)?;
        let flat = active.where_cond(&ones, &(&ones * a)?)?;
        Ok(Self {
            slope: settled.where_cond(&flat, &open)?,
            upper: settled.where_cond(&low.zeros_like()?, &offset)?,
        })
    }

    /// `(k w, beta chosen)`: the lower line where `w >= 0` and the upper one where `w < 0`, so that the
    /// sum of `k w (x + beta)` is at most that of `w s(x)`.
    pub(super) fn below(&self, w: &Tensor) -> Result<(Tensor, Tensor)> {
        let negative = w.detach().lt(0.0)?.to_dtype(w.dtype())?;
        Ok(((&self.slope * w)?, (&self.upper * negative)?))
    }
}
