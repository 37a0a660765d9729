//! How straight a flow's paths are, and how far it moves mass.

use crate::error::{check, Error, Result};
use candle_core::{DType, Tensor};
use tensor_core::kernels::sum_squares;

/// `S = int_0^1 E |(Z_1 - Z_0) - v(Z_t, t)|^2 dt` on a solver's own steps, with the mean velocity of
/// each step in the place of `v` (for Euler's method the left Riemann sum of the paper). Summed over
/// dimensions, averaged over rows; 0 for straight paths at constant speed.
///
/// # Errors
/// [`Error::InvalidArgument`] for fewer than two states or another number of times; [`Error::Shape`].
pub fn straightness(trajectory: &[Tensor], times: &[f64]) -> Result<f64> {
    let (Some(first), Some(last)) = (trajectory.first(), trajectory.last()) else {
        return Err(Error::argument("trajectory", 0, "at least two states"));
    };
    if trajectory.len() < 2 || trajectory.len() != times.len() {
        let expected = format!("as many (at least 2) as the {} states", trajectory.len());
        return Err(Error::argument("times", times.len(), expected));
    }
    let rows = check::rows("the states", first)?.max(1) as f64;
    let span = times[times.len() - 1] - times[0];
    let whole = (last - first)?.affine(1.0 / span, 0.0)?;
    let mut sum = 0.0;
    for (states, t) in trajectory.windows(2).zip(times.windows(2)) {
        let h = t[1] - t[0];
        let velocity = (&states[1] - &states[0])?.affine(1.0 / h, 0.0)?;
        sum += h.abs() * sum_squares(&(&whole - velocity)?)? / rows;
    }
    Ok(sum)
}

/// [`straightness`] relative to `E |Z_1 - Z_0|^2`: the number to print.
///
/// # Errors
/// As there; [`Error::InvalidArgument`] for a flow that moves nothing.
pub fn relative_straightness(trajectory: &[Tensor], times: &[f64]) -> Result<f64> {
    let s = straightness(trajectory, times)?;
    let cost = transport_cost(
        &trajectory[0],
        &trajectory[trajectory.len() - 1],
        Cost::SquaredL2,
    )?;
    match cost > 0.0 {
        true => Ok(s / cost),
        false => Err(Error::argument(
            "trajectory",
            "no movement",
            "a flow that moves",
        )),
    }
}

/// A cost of moving a sample.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cost {
    /// `|x1 - x0|^2`
    #[default]
    SquaredL2,
    /// `|x1 - x0|`
    L2,
    /// `sum |x1 - x0|`
    L1,
}

/// The mean cost of moving `x0` to `x1`, row by row. Reflow increases none of these (nor any other
/// convex cost).
///
/// # Errors
/// [`Error::Shape`] when the shapes differ; [`Error::InvalidArgument`] for no row.
pub fn transport_cost(x0: &Tensor, x1: &Tensor, cost: Cost) -> Result<f64> {
    transport_cost_by(x0, x1, |moved| {
        Ok(match cost {
            Cost::SquaredL2 => moved.sqr()?.sum(1)?,
            Cost::L2 => moved.sqr()?.sum(1)?.sqrt()?,
            Cost::L1 => moved.abs()?.sum(1)?,
        })
    })
}

/// [`transport_cost`] for any cost: `cost` maps the movements `[rows, numbers per row]` (`f64`) to one number
/// per row.
///
/// # Errors
/// As there; [`Error::Shape`] when `cost` gives something else.
pub fn transport_cost_by(
    x0: &Tensor,
    x1: &Tensor,
    cost: impl Fn(&Tensor) -> Result<Tensor>,
) -> Result<f64> {
    check::same_shape("x1", x1, x0)?;
    let rows = check::rows("x0", x0)?;
    if rows == 0 {
        return Err(Error::argument("rows", 0, "at least 1"));
    }
    let moved = (x1 - x0)?.reshape((rows, ()))?.to_dtype(DType::F64)?;
    let per_row = cost(&moved)?;
    if per_row.dims() != [rows] {
        return Err(Error::shape(
            "the costs",
            per_row.dims(),
            format!("[{rows}]"),
        ));
    }
    Ok(per_row.mean_all()?.to_scalar()?)
}
