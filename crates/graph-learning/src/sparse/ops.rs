//! The kernels as nodes of candle's graph. Every backward pass is made of the same nodes, so that it
//! can be differentiated again.

use super::kernel::{self, Factors, Scalar, Weights};
use super::{Scale, Side};
use crate::graph::{Csr, Graph};
use candle_core::{
    bail, CpuStorage, CustomOp1, CustomOp2, DType, Layout, Result, Shape, Tensor, WithDType,
};
use std::sync::Arc;

/// Runs `$body` with `$t` the type of the storage, which is f32 or f64.
macro_rules! with_type {
    ($storage:expr, $t:ident => $body:expr) => {
        match dtype_of($storage) {
            DType::F32 => {
                type $t = f32;
                $body
            }
            DType::F64 => {
                type $t = f64;
                $body
            }
            other => bail!("a sparse kernel takes F32 or F64, not {other:?}"),
        }
    };
}

fn dtype_of(storage: &CpuStorage) -> DType {
    candle_core::backend::BackendStorage::dtype(storage)
}

/// The contiguous values of an argument.
fn slice<'a, T: WithDType>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a sparse kernel takes contiguous tensors")
    };
    Ok(&T::cpu_storage_as_slice(storage)?[start..end])
}

fn done<T: Scalar>(values: Vec<T>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((T::to_cpu_storage_owned(values), shape.into()))
}

fn cast<T: Scalar>(scale: &Option<Scale>) -> Option<Vec<T>> {
    let one = |s: &Scale| s.iter().map(|x| kernel::real(*x)).collect();
    scale.as_ref().map(one)
}

/// Sums along edges, in the direction of the edges or against it.
#[derive(Clone)]
pub(super) struct Spread {
    pub graph: Graph,
    /// Against the edges: rows are sources.
    pub against: bool,
    pub heads: usize,
    /// Factors of what is received and of what is sent; only without edge weights.
    pub rows: Option<Scale>,
    pub cols: Option<Scale>,
}

impl Spread {
    fn csr(&self) -> &Csr {
        if self.against {
            self.graph.outgoing()
        } else {
            self.graph.incoming()
        }
    }

    fn transposed(&self) -> Self {
        Self {
            graph: self.graph.clone(),
            against: !self.against,
            heads: self.heads,
            rows: self.cols.clone(),
            cols: self.rows.clone(),
        }
    }
}

/// Without weights: `x` is `[from, width]`.
impl CustomOp1 for Spread {
    fn name(&self) -> &'static str {
        "spmm"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = layout.dims()[1];
        let csr = self.csr();
        with_type!(storage, T => {
            let (rows, cols) = (cast::<T>(&self.rows), cast::<T>(&self.cols));
            let factors = Factors { weights: None, rows: rows.as_deref(), cols: cols.as_deref() };
            let y = kernel::product(csr, csr.indices(), factors, slice::<T>(storage, layout)?, width);
            done(y, (csr.rows(), width))
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        Ok(Some(grad.contiguous()?.apply_op1(self.transposed())?))
    }
}

/// With weights `[E, heads]` first and `x` `[from, width]` second.
impl CustomOp2 for Spread {
    fn name(&self) -> &'static str {
        "weighted spmm"
    }

    fn cpu_fwd(
        &self,
        w: &CpuStorage,
        w_layout: &Layout,
        x: &CpuStorage,
        x_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let width = x_layout.dims()[1];
        let csr = self.csr();
        with_type!(x, T => {
            let weights = Weights { values: slice::<T>(w, w_layout)?, heads: self.heads };
            let factors = Factors { weights: Some(weights), rows: None, cols: None };
            let y = kernel::product(csr, csr.indices(), factors, slice::<T>(x, x_layout)?, width);
            done(y, (csr.rows(), width))
        })
    }

    fn bwd(
        &self,
        w: &Tensor,
        x: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let of_w = if w.track_op() {
            let dots = Dots {
                graph: self.graph.clone(),
                heads: self.heads,
            };
            let (a, b) = if self.against { (&grad, x) } else { (x, &grad) };
            Some(a.apply_op2(b, dots)?)
        } else {
            None
        };
        let of_x = if x.track_op() {
            Some(w.apply_op2(&grad, self.transposed())?)
        } else {
            None
        };
        Ok((of_w, of_x))
    }
}

/// A dot product per edge and head: `a` over sources and `b` over targets give `[E, heads]`.
#[derive(Clone)]
pub(super) struct Dots {
    pub graph: Graph,
    pub heads: usize,
}

impl CustomOp2 for Dots {
    fn name(&self) -> &'static str {
        "sddmm"
    }

    fn cpu_fwd(
        &self,
        a: &CpuStorage,
        a_layout: &Layout,
        b: &CpuStorage,
        b_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (width, heads) = (a_layout.dims()[1], self.heads);
        let (src, dst) = (self.graph.src(), self.graph.dst());
        with_type!(a, T => {
            let (a, b) = (slice::<T>(a, a_layout)?, slice::<T>(b, b_layout)?);
            done(kernel::dots(src, dst, a, b, width, heads), (src.len(), heads))
        })
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let along = |against: bool, x: &Tensor| -> Result<Option<Tensor>> {
            let spread = Spread {
                graph: self.graph.clone(),
                against,
                heads: self.heads,
                rows: None,
                cols: None,
            };
            Ok(Some(grad.apply_op2(x, spread)?))
        };
        let of_a = if a.track_op() { along(true, b)? } else { None };
        let of_b = if b.track_op() { along(false, a)? } else { None };
        Ok((of_a, of_b))
    }
}

/// The rows of one end, one per edge.
#[derive(Clone)]
pub(super) struct Gather {
    pub graph: Graph,
    pub side: Side,
}

impl CustomOp1 for Gather {
    fn name(&self) -> &'static str {
        "gather along edges"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = layout.dims()[1];
        let ends = match self.side {
            Side::Source => self.graph.src(),
            Side::Target => self.graph.dst(),
        };
        with_type!(storage, T => {
            let values = kernel::gather(ends, slice::<T>(storage, layout)?, width);
            done(values, (ends.len(), width))
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let sum = EdgeSum {
            graph: self.graph.clone(),
            side: self.side,
        };
        Ok(Some(grad.contiguous()?.apply_op1(sum)?))
    }
}

/// The adjoint of [`Gather`]: rows of edges summed at one end.
#[derive(Clone)]
pub(super) struct EdgeSum {
    pub graph: Graph,
    pub side: Side,
}

impl CustomOp1 for EdgeSum {
    fn name(&self) -> &'static str {
        "sum of edges"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = layout.dims()[1];
        let csr = match self.side {
            Side::Source => self.graph.outgoing(),
            Side::Target => self.graph.incoming(),
        };
        with_type!(storage, T => {
            let none = Factors { weights: None, rows: None, cols: None };
            let y = kernel::product(csr, csr.perm(), none, slice::<T>(storage, layout)?, width);
            done(y, (csr.rows(), width))
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let gather = Gather {
            graph: self.graph.clone(),
            side: self.side,
        };
        Ok(Some(grad.contiguous()?.apply_op1(gather)?))
    }
}

/// Entries of `x` picked per row and channel; `put` is the adjoint.
#[derive(Clone)]
pub(super) struct Pick {
    pub picks: Arc<Vec<u32>>,
    /// Rows of `x`, and rows of the result.
    pub rows: (usize, usize),
    pub put: bool,
}

impl CustomOp1 for Pick {
    fn name(&self) -> &'static str {
        "maximum over neighbors"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let width = layout.dims()[1];
        with_type!(storage, T => {
            let x = slice::<T>(storage, layout)?;
            if self.put {
                done(kernel::put(&self.picks, x, width, self.rows.0), (self.rows.0, width))
            } else {
                done(kernel::take(&self.picks, x, width), (self.rows.1, width))
            }
        })
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let adjoint = Self {
            put: !self.put,
            ..self.clone()
        };
        Ok(Some(grad.contiguous()?.apply_op1(adjoint)?))
    }
}

/// Softmax of `[E, heads]` over the edges into each target.
#[derive(Clone)]
pub(super) struct SegmentSoftmax {
    pub graph: Graph,
}

impl CustomOp1 for SegmentSoftmax {
    fn name(&self) -> &'static str {
        "segment softmax"
    }

    fn cpu_fwd(&self, storage: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let heads = layout.dims()[1];
        with_type!(storage, T => {
            let p = kernel::softmax(self.graph.incoming(), slice::<T>(storage, layout)?, heads);
            done(p, layout.shape().clone())
        })
    }

    /// `p (g - sum_f p_f g_f)`
    fn bwd(&self, x: &Tensor, p: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        if !x.track_op() {
            return Ok(None);
        }
        let side = Side::Target;
        let weighted = p.mul(&grad.contiguous()?)?;
        let graph = self.graph.clone();
        let sums = weighted.apply_op1(EdgeSum { graph, side })?;
        let graph = self.graph.clone();
        let back = sums.apply_op1(Gather { graph, side })?;
        Ok(Some((weighted - p.mul(&back)?)?))
    }
}
