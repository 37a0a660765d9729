//! Many named tensors in one flat buffer.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::sync::Arc;

/// Names, shapes and offsets of the tensors in a [`FlatTensor`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlatLayout {
    names: Vec<String>,
    shapes: Vec<Vec<usize>>,
    /// Start of each tensor, and the total length at the end.
    offsets: Vec<usize>,
}

impl FlatLayout {
    /// Tensors one after the other, in the given order.
    pub fn new(parts: impl IntoIterator<Item = (String, Vec<usize>)>) -> Self {
        let (mut names, mut shapes, mut offsets, mut end) = (vec![], vec![], vec![], 0);
        for (name, shape) in parts {
            offsets.push(end);
            end += shape.iter().product::<usize>();
            names.push(name);
            shapes.push(shape);
        }
        offsets.push(end);
        Self {
            names,
            shapes,
            offsets,
        }
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Number of elements of all tensors.
    pub fn numel(&self) -> usize {
        self.offsets.last().copied().unwrap_or(0)
    }

    /// Name of tensor `i`.
    pub fn name(&self, i: usize) -> &str {
        &self.names[i]
    }

    /// Shape of tensor `i`.
    pub fn shape(&self, i: usize) -> &[usize] {
        &self.shapes[i]
    }

    /// Where tensor `i` lies in the buffer.
    pub fn range(&self, i: usize) -> std::ops::Range<usize> {
        self.offsets[i]..self.offsets[i + 1]
    }

    pub(crate) fn offsets(&self) -> &[usize] {
        &self.offsets
    }
}

/// The numbers of a [`FlatTensor`].
#[derive(Debug, Clone, PartialEq)]
pub enum FlatData {
    /// Single precision.
    F32(Vec<f32>),
    /// Double precision.
    F64(Vec<f64>),
}

/// Named tensors of one dtype, one after the other in one buffer on the CPU.
///
/// Line searches, look-ahead steps and second-order methods treat all parameters as one vector;
/// this is that vector. [`Params::flatten`](crate::params::Params::flatten) makes one, and
/// [`Params::unflatten`](crate::params::Params::unflatten) writes it back.
#[derive(Debug, Clone, PartialEq)]
pub struct FlatTensor {
    layout: Arc<FlatLayout>,
    data: FlatData,
}

impl FlatTensor {
    /// Zeros.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] unless the dtype is `F32` or `F64`.
    pub fn zeros(layout: Arc<FlatLayout>, dtype: DType) -> Result<Self> {
        let n = layout.numel();
        let data = match dtype {
            DType::F32 => FlatData::F32(vec![0.0; n]),
            DType::F64 => FlatData::F64(vec![0.0; n]),
            got => {
                return Err(Error::DTypeMismatch {
                    name: "flat buffer".into(),
                    got,
                    expected: "F32 or F64".into(),
                })
            }
        };
        Ok(Self { layout, data })
    }

    /// Copies tensors, in the order of the layout.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when number or shapes differ from the layout,
    /// [`Error::DTypeMismatch`] when the tensors are not all `F32` or all `F64`.
    pub fn from_tensors(layout: Arc<FlatLayout>, tensors: &[Tensor]) -> Result<Self> {
        if tensors.len() != layout.len() {
            return Err(Error::ShapeMismatch {
                name: "tensors for a flat buffer".into(),
                got: vec![tensors.len()],
                expected: vec![layout.len()],
            });
        }
        let dtype = tensors.first().map_or(DType::F32, Tensor::dtype);
        let mut flat = Self::zeros(layout, dtype)?;
        for (i, tensor) in tensors.iter().enumerate() {
            flat.set(i, tensor)?;
        }
        Ok(flat)
    }

    /// Copies a tensor into place `i`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] or [`Error::DTypeMismatch`] when it does not fit.
    pub fn set(&mut self, i: usize, tensor: &Tensor) -> Result<()> {
        let name = self.layout.name(i).to_string();
        if tensor.dims() != self.layout.shape(i) {
            return Err(Error::ShapeMismatch {
                name,
                got: tensor.dims().to_vec(),
                expected: self.layout.shape(i).to_vec(),
            });
        }
        if tensor.dtype() != self.dtype() {
            return Err(Error::DTypeMismatch {
                name,
                got: tensor.dtype(),
                expected: format!("{:?}", self.dtype()),
            });
        }
        let range = self.layout.range(i);
        let flat = tensor.flatten_all()?;
        match &mut self.data {
            FlatData::F32(data) => data[range].copy_from_slice(&flat.to_vec1()?),
            FlatData::F64(data) => data[range].copy_from_slice(&flat.to_vec1()?),
        }
        Ok(())
    }

    /// A copy of tensor `i`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn get(&self, i: usize, device: &Device) -> Result<Tensor> {
        let (range, shape) = (self.layout.range(i), self.layout.shape(i));
        Ok(match &self.data {
            FlatData::F32(data) => Tensor::from_slice(&data[range], shape, device)?,
            FlatData::F64(data) => Tensor::from_slice(&data[range], shape, device)?,
        })
    }

    /// All elements as one tensor `[n]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_tensor(&self, device: &Device) -> Result<Tensor> {
        let n = self.layout.numel();
        Ok(match &self.data {
            FlatData::F32(data) => Tensor::from_slice(data, n, device)?,
            FlatData::F64(data) => Tensor::from_slice(data, n, device)?,
        })
    }

    /// Names, shapes and offsets.
    pub fn layout(&self) -> &Arc<FlatLayout> {
        &self.layout
    }

    /// `F32` or `F64`.
    pub fn dtype(&self) -> DType {
        match self.data {
            FlatData::F32(_) => DType::F32,
            FlatData::F64(_) => DType::F64,
        }
    }

    /// The numbers.
    pub fn data(&self) -> &FlatData {
        &self.data
    }

    /// The numbers to be written, if they are `f32`.
    pub fn as_f32_mut(&mut self) -> Option<&mut [f32]> {
        match &mut self.data {
            FlatData::F32(data) => Some(data),
            FlatData::F64(_) => None,
        }
    }

    /// The numbers to be written, if they are `f64`.
    pub fn as_f64_mut(&mut self) -> Option<&mut [f64]> {
        match &mut self.data {
            FlatData::F64(data) => Some(data),
            FlatData::F32(_) => None,
        }
    }

    /// For kernels of this crate, which keep the length.
    pub(crate) fn data_mut(&mut self) -> &mut FlatData {
        &mut self.data
    }
}
