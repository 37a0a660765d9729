//! The leaky ReLU in one pass each way.

use crate::sparse::{elementwise, Scalar};
use crate::Result;
use candle_core::{bail, CpuStorage, CustomOp1, CustomOp2, DType, Layout, Shape, Tensor};
use tensor_core::kernels::Real;

/// `max(x, 0) + slope min(x, 0)`; the slope at 0 is that below.
pub(crate) fn leaky_relu(x: &Tensor, slope: f64) -> Result<Tensor> {
    if x.device().is_cpu() && matches!(x.dtype(), DType::F32 | DType::F64) {
        return Ok(x.contiguous()?.apply_op1(Leaky { slope })?);
    }
    Ok((x.relu()? - (x.neg()?.relu()? * slope)?)?)
}

/// The function of `x`, and with a second argument the product of its slope at `x` with that.
#[derive(Clone, Copy)]
struct Leaky {
    slope: f64,
}

fn slice<'a, T: Scalar>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [T]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a leaky ReLU takes contiguous tensors")
    };
    Ok(&T::cpu_storage_as_slice(storage)?[start..end])
}

impl Leaky {
    fn run<T: Scalar>(
        self,
        x: &CpuStorage,
        factor: &CpuStorage,
        layouts: (&Layout, &Layout),
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, factor) = (slice::<T>(x, layouts.0)?, slice::<T>(factor, layouts.1)?);
        let slope = <T as Real>::from_f64(self.slope);
        let y = elementwise(x, factor, |x, f| {
            <T as Real>::select(x > <T as Real>::ZERO, f, slope * f)
        });
        Ok((T::to_cpu_storage_owned(y), layouts.0.shape().clone()))
    }
}

impl CustomOp1 for Leaky {
    fn name(&self) -> &'static str {
        "leaky relu"
    }

    fn cpu_fwd(&self, x: &CpuStorage, l: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        match x {
            CpuStorage::F32(_) => self.run::<f32>(x, x, (l, l)),
            _ => self.run::<f64>(x, x, (l, l)),
        }
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(x.detach().apply_op2(&grad.contiguous()?, *self)?))
    }
}

impl CustomOp2 for Leaky {
    fn name(&self) -> &'static str {
        "slope of a leaky relu"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        lx: &Layout,
        grad: &CpuStorage,
        lg: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        match x {
            CpuStorage::F32(_) => self.run::<f32>(x, grad, (lx, lg)),
            _ => self.run::<f64>(x, grad, (lx, lg)),
        }
    }

    /// Linear in the second argument; the first has a slope of 0 almost everywhere.
    fn bwd(
        &self,
        x: &Tensor,
        _: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((None, Some(x.apply_op2(&grad.contiguous()?, *self)?)))
    }
}
