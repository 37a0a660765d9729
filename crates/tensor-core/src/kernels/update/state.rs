//! State buffers and the entries that own them.

use super::{FusedUpdate, StateDType};
use crate::kernels::Mask;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, Var};
use half::bf16;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug, Clone)]
pub(super) enum Buffer {
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bf16(Vec<bf16>),
    /// On a device: a flat tensor that nobody else holds.
    Device(Tensor),
}

impl Buffer {
    fn zeros(dtype: DType, len: usize, device: &Device) -> Result<Self> {
        if !device.is_cpu() {
            return Ok(Self::Device(Tensor::zeros(len, dtype, device)?));
        }
        Ok(match dtype {
            DType::F64 => Self::F64(vec![0.0; len]),
            DType::BF16 => Self::Bf16(vec![bf16::ZERO; len]),
            _ => Self::F32(vec![0.0; len]),
        })
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(data) => data.capacity() * 4,
            Self::F64(data) => data.capacity() * 8,
            Self::Bf16(data) => data.capacity() * 2,
            Self::Device(data) => data.elem_count() * data.dtype().size_in_bytes(),
        }
    }

    pub(super) fn pointer(&mut self) -> *mut u8 {
        match self {
            Self::F32(data) => data.as_mut_ptr().cast(),
            Self::F64(data) => data.as_mut_ptr().cast(),
            Self::Bf16(data) => data.as_mut_ptr().cast(),
            // Device memory is reached through its tensor.
            Self::Device(_) => std::ptr::null_mut(),
        }
    }

    fn tensor(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(match self {
            Self::F32(data) => Tensor::from_slice(data, shape, &Device::Cpu)?,
            Self::F64(data) => Tensor::from_slice(data, shape, &Device::Cpu)?,
            Self::Bf16(data) => Tensor::from_slice(data, shape, &Device::Cpu)?,
            Self::Device(data) => data.copy()?.reshape(shape)?,
        })
    }

    fn sample(&self, stride: usize) -> Result<Vec<f64>> {
        Ok(match self {
            Self::F32(data) => data.iter().step_by(stride).map(|x| (*x).into()).collect(),
            Self::F64(data) => data.iter().step_by(stride).copied().collect(),
            Self::Bf16(data) => data.iter().step_by(stride).map(|x| x.to_f64()).collect(),
            Self::Device(data) => {
                let places: Vec<u32> = (0..data.elem_count() as u32).step_by(stride).collect();
                let places = Tensor::new(places, data.device())?;
                let picked = data.index_select(&places, 0)?.to_device(&Device::Cpu)?;
                picked.to_dtype(DType::F64)?.to_vec1()?
            }
        })
    }

    fn load(&mut self, tensor: &Tensor) -> Result<()> {
        let flat = tensor.flatten_all()?;
        match self {
            Self::F32(data) => data.copy_from_slice(&flat.to_vec1()?),
            Self::F64(data) => data.copy_from_slice(&flat.to_vec1()?),
            Self::Bf16(data) => data.copy_from_slice(&flat.to_vec1()?),
            Self::Device(data) => *data = flat.to_device(data.device())?.copy()?,
        }
        Ok(())
    }
}

pub(super) struct Entry<const S: usize> {
    pub(super) name: String,
    pub(super) var: Var,
    pub(super) state_dtype: DType,
    pub(super) state: [Buffer; S],
    pub(super) mask: Option<Mask>,
    pub(super) events: AtomicU64,
    pub(super) held: AtomicU64,
}

impl<const S: usize> Entry<S> {
    fn state_len(&self) -> usize {
        self.mask
            .as_ref()
            .map_or(self.var.elem_count(), Mask::count)
    }

    fn state_shape(&self) -> Vec<usize> {
        match &self.mask {
            None => self.var.dims().to_vec(),
            Some(mask) => vec![mask.count()],
        }
    }
}

pub(super) fn zeros<const S: usize>(
    dtype: DType,
    len: usize,
    device: &Device,
) -> Result<[Buffer; S]> {
    let buffers: Result<Vec<_>> = (0..S).map(|_| Buffer::zeros(dtype, len, device)).collect();
    let wrong = |_| Error::invalid("states", S, "a small number");
    buffers?.try_into().map_err(wrong)
}

pub(super) fn state_dtype(name: &str, param: DType, wanted: StateDType) -> Result<DType> {
    let narrow = matches!(param, DType::F32 | DType::BF16 | DType::F16);
    if !narrow && param != DType::F64 {
        return Err(Error::DTypeMismatch {
            name: format!("parameter `{name}`"),
            got: param,
            expected: "F32, F64, BF16 or F16".into(),
        });
    }
    match wanted {
        StateDType::Compute => Ok(if narrow { DType::F32 } else { DType::F64 }),
        StateDType::Fixed(dtype @ (DType::F32 | DType::BF16)) if narrow => Ok(dtype),
        StateDType::Fixed(DType::F64) if !narrow => Ok(DType::F64),
        StateDType::Fixed(dtype) => Err(Error::DTypeMismatch {
            name: format!("state of `{name}` ({param:?})"),
            got: dtype,
            expected: if narrow { "F32 or BF16" } else { "F64" }.into(),
        }),
    }
}

impl<const S: usize> FusedUpdate<S> {
    /// What the state of tensor `i` is stored as.
    pub fn state_dtype(&self, i: usize) -> DType {
        self.entries[i].state_dtype
    }

    /// The mask of tensor `i`, if its state is sparse.
    pub fn mask(&self, i: usize) -> Option<&Mask> {
        self.entries[i].mask.as_ref()
    }

    /// Gives tensor `i` compact state for the set entries of `mask` (or dense state for `None`),
    /// zeroed. Entries outside the mask are left untouched by [`step`](Self::step).
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the mask has another length than the tensor.
    pub fn set_mask(&mut self, i: usize, mask: Option<Mask>) -> Result<()> {
        let entry = &mut self.entries[i];
        let len = entry.var.elem_count();
        if let Some(mask) = mask.as_ref().filter(|m| m.len() != len) {
            return Err(Error::ShapeMismatch {
                name: format!("mask of `{}`", entry.name),
                got: vec![mask.len()],
                expected: vec![len],
            });
        }
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &mut self.cuda {
            let upload = |mask| crate::kernels::cuda::DeviceMask::new(mask, &cuda.device);
            cuda.masks[i] = mask.as_ref().map(upload).transpose()?;
        }
        entry.mask = mask;
        let (dtype, len) = (entry.state_dtype, entry.state_len());
        entry.state = zeros(dtype, len, entry.var.device())?;
        Ok(())
    }

    /// Events that the rule counted in tensor `i` in the last step; on a device, in the step
    /// before it, so that no step waits for the device.
    pub fn events(&self, i: usize) -> u64 {
        self.entries[i].events.load(Ordering::Relaxed)
    }

    /// Entries of tensor `i` that were left alone in the last step because their gradient was not
    /// finite.
    pub fn held(&self, i: usize) -> u64 {
        self.entries[i].held.load(Ordering::Relaxed)
    }

    /// A copy of state `slot` of tensor `i`: the parameter's shape, or `[count]` under a mask.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a slot that does not exist.
    pub fn state(&self, i: usize, slot: usize) -> Result<Tensor> {
        let entry = &self.entries[i];
        let buffer = entry
            .state
            .get(slot)
            .ok_or_else(|| Error::invalid("slot", slot, format!("below {S}")))?;
        buffer.tensor(&entry.state_shape())
    }

    /// Every `stride`-th entry of state `slot` of tensor `i`, from the first on: for statistics that
    /// need no copy of all.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a slot that does not exist or a stride of 0.
    pub fn sample_state(&self, i: usize, slot: usize, stride: usize) -> Result<Vec<f64>> {
        if stride == 0 {
            return Err(Error::invalid("stride", 0, "at least 1"));
        }
        let buffer = self.entries[i]
            .state
            .get(slot)
            .ok_or_else(|| Error::invalid("slot", slot, format!("below {S}")))?;
        buffer.sample(stride)
    }

    /// Overwrites state `slot` of tensor `i`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] or [`Error::DTypeMismatch`] unless the tensor is what
    /// [`state`](Self::state) returns.
    pub fn load_state(&mut self, i: usize, slot: usize, tensor: &Tensor) -> Result<()> {
        let entry = &mut self.entries[i];
        let name = || format!("state {slot} of `{}`", entry.name);
        if tensor.dims() != entry.state_shape().as_slice() {
            return Err(Error::ShapeMismatch {
                name: name(),
                got: tensor.dims().to_vec(),
                expected: entry.state_shape(),
            });
        }
        if tensor.dtype() != entry.state_dtype {
            return Err(Error::DTypeMismatch {
                name: name(),
                got: tensor.dtype(),
                expected: format!("{:?}", entry.state_dtype),
            });
        }
        let buffer = entry
            .state
            .get_mut(slot)
            .ok_or_else(|| Error::invalid("slot", slot, format!("below {S}")))?;
        buffer.load(tensor)
    }

    /// Sets all state to zero.
    ///
    /// # Errors
    /// Those of candle, on a device.
    pub fn zero_state(&mut self) -> Result<()> {
        for buffer in self.entries.iter_mut().flat_map(|e| e.state.iter_mut()) {
            match buffer {
                Buffer::F32(data) => data.fill(0.0),
                Buffer::F64(data) => data.fill(0.0),
                Buffer::Bf16(data) => data.fill(bf16::ZERO),
                Buffer::Device(data) => *data = data.zeros_like()?,
            }
        }
        Ok(())
    }

    /// Bytes that state and masks occupy.
    pub fn state_bytes(&self) -> usize {
        let of = |e: &Entry<S>| {
            let state: usize = e.state.iter().map(Buffer::bytes).sum();
            state + e.mask.as_ref().map_or(0, Mask::bytes)
        };
        self.entries.iter().map(of).sum()
    }
}
