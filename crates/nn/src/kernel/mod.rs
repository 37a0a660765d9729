//! What the fused kernels share: slices of CPU tensors, vector code chosen at run time, matrix
//! products, and operations whose forward pass has been computed already.

mod math;
mod product;
mod rows;

pub(crate) use math::Math;
pub(crate) use product::{product, transpose, Matrix, Onto};
pub(crate) use rows::{filled, max, moments, piece_of, pieces, positive, sum, sum2, total};

use crate::{Error, Result};
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, CustomOp3, DType, Device, Layout, Shape, Storage, StorageRef,
    Tensor,
};
use std::sync::{Mutex, PoisonError};
use tensor_core::kernels::conv::Lanes;
use tensor_core::kernels::Real;

/// Below this number of elements a kernel runs on the calling thread.
pub(crate) const PARALLEL_FROM: usize = 1 << 14;

/// f32 or f64 with its place in candle's storage.
pub(crate) trait Scalar: Lanes + Math {
    fn slice(storage: &CpuStorage) -> Option<&[Self]>;
    fn storage(data: Vec<Self>) -> CpuStorage;
}

impl Scalar for f32 {
    fn slice(storage: &CpuStorage) -> Option<&[Self]> {
        match storage {
            CpuStorage::F32(data) => Some(data),
            _ => None,
        }
    }

    fn storage(data: Vec<Self>) -> CpuStorage {
        CpuStorage::F32(data)
    }
}

impl Scalar for f64 {
    fn slice(storage: &CpuStorage) -> Option<&[Self]> {
        match storage {
            CpuStorage::F64(data) => Some(data),
            _ => None,
        }
    }

    fn storage(data: Vec<Self>) -> CpuStorage {
        CpuStorage::F64(data)
    }
}

/// Whether the fused kernels can take this tensor: on the CPU, f32 or f64.
pub(crate) fn has_kernel(x: &Tensor) -> bool {
    x.device().is_cpu() && matches!(x.dtype(), DType::F32 | DType::F64)
}

/// The dtype that statistics are computed in: f32 for half precision.
pub(crate) fn wide(dtype: DType) -> Result<DType> {
    match dtype {
        DType::F16 | DType::BF16 | DType::F32 => Ok(DType::F32),
        DType::F64 => Ok(DType::F64),
        other => Err(Error::dtype("input", other, "F16, BF16, F32 or F64")),
    }
}

/// The memory of a contiguous CPU tensor, locked for reading.
pub(crate) struct View<'a> {
    storage: StorageRef<'a>,
    start: usize,
    end: usize,
}

impl<'a> View<'a> {
    pub(crate) fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else {
            return Err(Error::Unsupported {
                operation: "a fused kernel".into(),
                context: "on a tensor that is not contiguous".into(),
            });
        };
        Ok(Self {
            storage,
            start,
            end,
        })
    }

    pub(crate) fn slice<T: Scalar>(&self) -> Result<&[T]> {
        let cpu = match &*self.storage {
            Storage::Cpu(cpu) => T::slice(cpu),
            _ => None,
        };
        let slice = cpu.ok_or_else(|| Error::Unsupported {
            operation: "a fused kernel".into(),
            context: "on a tensor of another device or dtype".into(),
        })?;
        Ok(&slice[self.start..self.end])
    }
}

/// A CPU tensor from a kernel's output, without a copy.
pub(crate) fn tensor<T: Scalar>(data: Vec<T>, shape: &Shape) -> Result<Tensor> {
    let storage = Storage::Cpu(T::storage(data));
    Ok(Tensor::from_storage(
        storage,
        shape.clone(),
        candle_core::op::BackpropOp::none(),
        false,
    ))
}

/// A CPU vector in the given dtype, moved to a device.
pub(crate) fn vector(values: Vec<f64>, dtype: DType, device: &Device) -> Result<Tensor> {
    let n = values.len();
    Ok(Tensor::from_vec(values, n, &Device::Cpu)?
        .to_dtype(dtype)?
        .to_device(device)?)
}

/// The values of a tensor as f64 on the host.
pub(crate) fn host(tensor: &Tensor) -> Result<Vec<f64>> {
    let local = tensor.flatten_all()?.to_device(&Device::Cpu)?;
    Ok(local.to_dtype(DType::F64)?.to_vec1()?)
}

/// Runs `body` compiled for the widest vector unit of this processor. Multiplications are fused with
/// additions only where the code says so, and then everywhere: a vector and the scalars after it
/// round alike.
#[inline(always)]
pub(crate) fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}

/// What a node's backward pass gives: a gradient for each argument that wants one.
pub(crate) type Gradients = Result<Vec<Option<Tensor>>>;

/// A node of candle's graph whose value a kernel has computed already, and whose gradients are a
/// function of (arguments, value, gradient of the value), all of them contiguous.
pub(crate) struct Computed<F> {
    name: &'static str,
    value: Mutex<Option<(CpuStorage, Shape)>>,
    backward: F,
}

impl<F> Computed<F>
where
    F: Fn(&[&Tensor], &Tensor, &Tensor) -> Gradients,
{
    pub(crate) fn new<T: Scalar>(
        name: &'static str,
        value: Vec<T>,
        shape: &Shape,
        backward: F,
    ) -> Self {
        Self {
            name,
            value: Mutex::new(Some((T::storage(value), shape.clone()))),
            backward,
        }
    }

    fn take(&self) -> candle_core::Result<(CpuStorage, Shape)> {
        let mut value = self.value.lock().unwrap_or_else(PoisonError::into_inner);
        let used = || {
            candle_core::Error::from(Error::Unsupported {
                operation: self.name.into(),
                context: "a second time on the same node".into(),
            })
        };
        value.take().ok_or_else(used)
    }

    /// The gradients of the first `N` arguments.
    fn gradients<const N: usize>(
        &self,
        arguments: [&Tensor; N],
        value: &Tensor,
        gradient: &Tensor,
    ) -> candle_core::Result<[Option<Tensor>; N]> {
        let mut all = (self.backward)(&arguments, value, &gradient.contiguous()?)?.into_iter();
        Ok(std::array::from_fn(|_| all.next().flatten()))
    }
}

impl<F> CustomOp1 for Computed<F>
where
    F: Fn(&[&Tensor], &Tensor, &Tensor) -> Gradients,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        self.take()
    }

    fn bwd(&self, x: &Tensor, y: &Tensor, dy: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let [dx] = self.gradients([x], y, dy)?;
        Ok(dx)
    }
}

impl<F> CustomOp2 for Computed<F>
where
    F: Fn(&[&Tensor], &Tensor, &Tensor) -> Gradients,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.take()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let [da, db] = self.gradients([a, b], y, dy)?;
        Ok((da, db))
    }
}

impl<F> CustomOp3 for Computed<F>
where
    F: Fn(&[&Tensor], &Tensor, &Tensor) -> Gradients,
{
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        self.take()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        y: &Tensor,
        dy: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [da, db, dc] = self.gradients([a, b, c], y, dy)?;
        Ok((da, db, dc))
    }
}
