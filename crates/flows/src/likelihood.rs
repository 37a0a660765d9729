//! Exact log-densities of a flow by the change of variables along its path.
//!
//! ```text
//! log p_1(x) = log p_0(z) - int_0^1 div v(x_t, t) dt,   z = the point from which the flow comes to x
//! ```

use crate::condition::Condition;
use crate::error::{check, Error, Result};
use crate::ode::{OdeField, OdeSolver, Times};
use crate::velocity::Velocity;
use candle_core::{Tensor, Var};
use tensor_core::random::RandomStream;

/// How the divergence is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Divergence {
    /// By one backward pass per dimension; for up to some 64 of them.
    #[default]
    Exact,
    /// Hutchinson's estimate with so many random signs per row, drawn once per solve.
    Hutchinson {
        /// How many.
        probes: usize,
    },
}

/// The state with its log-density change in one more column.
struct Augmented<'a> {
    velocity: &'a dyn Velocity,
    condition: &'a Condition,
    shape: Vec<usize>,
    /// `[rows, d]` each; none for the exact divergence.
    probes: Vec<Tensor>,
}

impl OdeField for Augmented<'_> {
    fn eval(&self, y: &Tensor, t: &Times) -> Result<Tensor> {
        let width = y.dims()[1] - 1;
        let x = Var::from_tensor(&y.narrow(1, 0, width)?.contiguous()?)?;
        let shaped = x.as_tensor().reshape(self.shape.as_slice())?;
        let v = self
            .velocity
            .velocity(&shaped, &t.tensor(y)?, self.condition)?;
        check::same_shape("the velocity", &v, &shaped)?;
        let v = v.reshape((y.dims()[0], width))?;
        let pulled = |scalar: Tensor| -> Result<Tensor> {
            match scalar.backward()?.get(&x) {
                Some(gradient) => Ok(gradient.detach()),
                None => Err(tensor_core::Error::LostGradient(vec![
                    "the sample, through the velocity".into(),
                ])
                .into()),
            }
        };
        let mut divergence = y.narrow(1, 0, 1)?.zeros_like()?;
        if self.probes.is_empty() {
            for i in 0..width {
                let gradient = pulled(v.narrow(1, i, 1)?.sum_all()?)?;
                divergence = (divergence + gradient.narrow(1, i, 1)?)?;
            }
        } else {
            let share = 1.0 / self.probes.len() as f64;
            for probe in &self.probes {
                let gradient = pulled((&v * probe)?.sum_all()?)?;
                let one = (gradient * probe)?.sum_keepdim(1)?;
                divergence = (divergence + one.affine(share, 0.0)?)?;
            }
        }
        Ok(Tensor::cat(&[v.detach(), divergence], 1)?)
    }
}

/// Log-densities `[rows]` of target samples `x1` `[rows, ...]` under a flow from a standard normal
/// source, and the source samples that they come from.
///
/// # Errors
/// Those of the solver and of the field; a velocity without gradient is named.
pub fn log_likelihood(
    velocity: &dyn Velocity,
    x1: &Tensor,
    condition: &Condition,
    solver: &dyn OdeSolver,
    divergence: Divergence,
    rng: &mut RandomStream,
) -> Result<(Tensor, Tensor)> {
    let rows = check::rows("x1", x1)?;
    if x1.elem_count() == 0 {
        return Err(Error::argument("x1", "empty", "at least one number"));
    }
    let flat = x1.reshape((rows, ()))?;
    let width = flat.dims()[1];
    let mut probes = Vec::new();
    if let Divergence::Hutchinson { probes: count } = divergence {
        check::at_least_one("Divergence::Hutchinson probes", count)?;
        for _ in 0..count {
            let bits = rng.bernoulli(0.5, (rows, width), x1.dtype(), x1.device())?;
            probes.push(bits.affine(2.0, -1.0)?);
        }
    }
    let field = Augmented {
        velocity,
        condition,
        shape: x1.dims().to_vec(),
        probes,
    };
    let zeros = flat.narrow(1, 0, 1)?.zeros_like()?;
    let start = Tensor::cat(&[flat, zeros], 1)?;
    let end = solver.solve(&field, &start, 1.0, 0.0)?.x;
    let z = end.narrow(1, 0, width)?;
    // Integrated from 1 to 0, the divergence has its sign turned already.
    let change = end.narrow(1, width, 1)?.squeeze(1)?;
    let half = 0.5 * width as f64 * std::f64::consts::TAU.ln();
    let base = z.sqr()?.sum(1)?.affine(-0.5, -half)?;
    Ok(((base + change)?, z.reshape(x1.shape())?))
}

/// Bits per dimension of 8-bit data that was scaled to `[-1, 1]`, from a log-density of `d`
/// dimensions.
pub fn bits_per_dim(log_density: f64, d: usize) -> f64 {
    -log_density / (d as f64 * std::f64::consts::LN_2) + 7.0
}
