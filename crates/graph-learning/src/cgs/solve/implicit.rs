//! The fixed point as a node of the graph of operations, with the implicit gradient.

use super::system::{Contracts, System};
use super::{host, rows_of, solve, FixedPoint, SolveReport};
use crate::cgs::Orientation;
use crate::graph::Graph;
use crate::sparse::{sddmm, EdgeOp, Scalar};
use crate::Result;
use candle_core::{bail, CpuStorage, CustomOp2, DType, Layout, Shape, Tensor};
use std::sync::{Mutex, PoisonError};

/// A node whose value is known, with the implicit gradient.
pub(super) struct Implicit {
    pub graph: Graph,
    pub ptr: Vec<usize>,
    pub how: FixedPoint,
    pub value: Mutex<Option<(CpuStorage, Shape)>>,
}

impl Implicit {
    /// `D y` with `y = gamma A^T (D y) + g`.
    fn adjoint<T: Scalar>(&self, w: &Tensor, h: &Tensor, grad: &Tensor) -> Result<Vec<T>> {
        let (w, h, g) = (host::<T>(w)?, host::<T>(h)?, host::<T>(grad)?);
        let (_, transposed) = rows_of(&self.graph, self.how.orientation);
        let slopes: Vec<T> = h.iter().map(|y| self.how.activation.slope_at(*y)).collect();
        let mut system = System::new(transposed, &w, &g, grad.dims()[1], self.how.gamma);
        system.contracts = Contracts::InSums;
        let post = |at: usize, z: T| slopes[at] * z;
        let (u, report) = solve(&system, &self.ptr, self.how.backward, Some(&slopes), &post)?;
        if !report.converged {
            let SolveReport {
                iterations,
                residual,
                ..
            } = report;
            tracing::warn!(
                iterations,
                residual,
                "the implicit gradient has not converged"
            );
        }
        Ok(u)
    }
}

impl CustomOp2 for Implicit {
    fn name(&self) -> &'static str {
        "fixed point"
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        match value.take() {
            Some(value) => Ok(value),
            None => bail!("a fixed point is evaluated once"),
        }
    }

    fn bwd(
        &self,
        w: &Tensor,
        bias: &Tensor,
        h: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let (grad, fixed) = (grad.contiguous()?, h.detach());
        let u = match bias.dtype() {
            DType::F32 => Tensor::from_vec(
                self.adjoint::<f32>(w, &fixed, &grad)?,
                bias.dims(),
                bias.device(),
            )?,
            _ => Tensor::from_vec(
                self.adjoint::<f64>(w, &fixed, &grad)?,
                bias.dims(),
                bias.device(),
            )?,
        };
        if !w.track_op() {
            return Ok((None, Some(u)));
        }
        let (n, m) = u.dims2()?;
        let split = |x: &Tensor| x.reshape((n, m, 1));
        let (of_rows, of_cols) = (split(&u)?, split(&fixed)?);
        let (a, b) = match self.how.orientation {
            Orientation::RowIsSource => (&of_rows, &of_cols),
            Orientation::RowIsTarget => (&of_cols, &of_rows),
        };
        let of_w = (sddmm(&self.graph, a, b, EdgeOp::Dot)? * self.how.gamma)?;
        Ok((Some(of_w), Some(u)))
    }
}
