//! Rows of a table by index, with a gradient that adds each row where it came from.

use crate::kernel::{filled, has_kernel, pieces, tensor, Computed, Scalar, View};
use crate::{Error, Result};
use candle_core::{DType, Device, Module, Shape, Tensor};
use candle_nn::{Init, VarBuilder};
use tensor_core::autograd::keeps_graph;

/// A table `[n, C]` of vectors; gives `[.., C]` for integer ids `[..]`. The variable and the shape
/// of [`candle_nn::Embedding`].
///
/// The gradient of a row is the sum over the places that asked for it, in their order: the bits do
/// not depend on the number of threads. Candle operations on other devices, in other dtypes and
/// where gradients keep their graph.
///
/// ```
/// use candle_core::{Device, Module, Tensor, Var};
/// use thalweg_nn::embedding::Embedding;
/// let table = Var::new(&[[1f32, 2.0], [3.0, 4.0]], &Device::Cpu)?;
/// let layer = Embedding::new(table.as_tensor().clone())?;
/// let y = layer.forward(&Tensor::new(&[1u32, 1, 0], &Device::Cpu)?)?;
/// let grads = y.sum_all()?.backward()?;
/// let gradient = grads.get(&table).unwrap().to_vec2::<f32>()?;
/// assert_eq!(gradient, [[1.0, 1.0], [2.0, 2.0]]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Embedding {
    table: Tensor,
}

/// An [`Embedding`] of `rows` vectors of size `dim` from the variable `weight`, standard normal at
/// first.
///
/// # Errors
/// Candle's, when the variable does not fit.
pub fn embedding(rows: usize, dim: usize, vb: VarBuilder) -> Result<Embedding> {
    let init = Init::Randn {
        mean: 0.0,
        stdev: 1.0,
    };
    Embedding::new(vb.get_with_hints((rows, dim), "weight", init)?)
}

impl Embedding {
    /// From an existing table `[n, C]`.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn new(table: Tensor) -> Result<Self> {
        match table.dims() {
            [rows, dim] if rows * dim > 0 => Ok(Self { table }),
            other => Err(Error::shape("table", other, "a non-empty [n, C]")),
        }
    }

    /// The table `[n, C]`.
    pub fn embeddings(&self) -> &Tensor {
        &self.table
    }
}

impl Module for Embedding {
    fn forward(&self, ids: &Tensor) -> candle_core::Result<Tensor> {
        Ok(rows_of(&self.table, ids)?)
    }
}

/// The rows `ids` `[..]` of a table `[n, C]`, as `[.., C]`.
///
/// # Errors
/// [`Error::Shape`] for no ids, [`Error::DType`] for ids that are no integers, and on the CPU
/// [`Error::LabelOutOfRange`].
pub fn rows_of(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (n, dim) = table.dims2()?;
    if !matches!(ids.dtype(), DType::U8 | DType::U32 | DType::I64) {
        return Err(Error::dtype("ids", ids.dtype(), "U8, U32 or I64"));
    }
    if ids.elem_count() == 0 {
        return Err(Error::shape("ids", ids.dims(), "at least one"));
    }
    let mut dims = ids.dims().to_vec();
    dims.push(dim);
    let shape = Shape::from(dims);
    let flat = ids.flatten_all()?;
    if !ids.device().is_cpu() {
        return Ok(table.embedding(&flat)?.reshape(shape)?);
    }
    let values = flat.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    if let Some(position) = values.iter().position(|i| *i < 0 || *i >= n as i64) {
        return Err(Error::LabelOutOfRange {
            label: values[position],
            position,
            classes: n,
        });
    }
    let places: Vec<u32> = values.into_iter().map(|i| i as u32).collect();
    if !has_kernel(table) || keeps_graph()? {
        let places = Tensor::from_vec(places, shape.elem_count() / dim, &Device::Cpu)?;
        return Ok(table.embedding(&places)?.reshape(shape)?);
    }
    let table = table.contiguous()?;
    match table.dtype() {
        DType::F64 => fused::<f64>(&table, places, &shape),
        _ => fused::<f32>(&table, places, &shape),
    }
}

fn fused<T: Scalar>(table: &Tensor, places: Vec<u32>, shape: &Shape) -> Result<Tensor> {
    let (rows, dim) = table.dims2()?;
    let y = {
        let view = View::new(table)?;
        let table = view.slice::<T>()?;
        filled(shape.elem_count(), |y| {
            pieces(y, dim, |first, y| {
                for (y, place) in y.chunks_exact_mut(dim).zip(&places[first..]) {
                    let at = *place as usize * dim;
                    y.copy_from_slice(&table[at..at + dim]);
                }
            });
        })
    };
    let backward = move |_: &[&Tensor], _: &Tensor, dy: &Tensor| {
        // Positions by row, those of a row in their order.
        let mut order: Vec<u32> = (0..places.len() as u32).collect();
        order.sort_by_key(|i| places[*i as usize]);
        let row = |i: &u32| places[*i as usize] as usize;
        let view = View::new(dy)?;
        let dy = view.slice::<T>()?;
        let gradient = filled(rows * dim, |out| {
            pieces(out, dim, |first, out| {
                out.fill(T::ZERO);
                let end = first + out.len() / dim;
                let start = order.partition_point(|i| row(i) < first);
                for i in order[start..].iter().take_while(|i| row(i) < end) {
                    let at = (row(i) - first) * dim;
                    let from = &dy[*i as usize * dim..][..dim];
                    for (out, g) in out[at..at + dim].iter_mut().zip(from) {
                        *out = *out + *g;
                    }
                }
            });
        });
        Ok(vec![Some(tensor(gradient, &Shape::from((rows, dim)))?)])
    };
    let node = Computed::new("embedding", y, shape, backward);
    Ok(table.apply_op1(node)?)
}
