//! A graph in one safetensors file.

use super::{read, NodeData};
use crate::graph::Graph;
use crate::sparse::{Features, SparseFeatures};
use crate::split::NodeSplit;
use crate::{Error, Result};
use ::safetensors::{Dtype, SafeTensors};
use candle_core::{DType, Device, Tensor};
use std::path::Path;

/// Reads `edge_index` `[2, E]`, `x` `[n, d]` or the rows `x_indptr`, `x_indices` (and `x_values`;
/// ones without) of sparse features, `y` `[n]`, and `train_idx`, `val_idx`, `test_idx` where they are
/// there. Metadata `num_nodes`, `num_features` and `num_classes` are used where they exist.
///
/// # Errors
/// [`Error::Io`], [`Error::BadFile`] for damaged files, missing tensors, and tensors that do not fit
/// together.
pub fn safetensors(path: impl AsRef<Path>) -> Result<NodeData> {
    let path = path.as_ref();
    let bytes = read(path)?;
    let bad = |reason: &dyn std::fmt::Display| Error::bad_file(path, reason);
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| bad(&e))?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let number = |key: &str| metadata.get(key).and_then(|v| v.parse::<usize>().ok());
    let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(&e))?;
    let has = |name: &str| file.tensor(name).is_ok();
    let numbers = |name: &str| -> Result<(Vec<usize>, Vec<f64>)> {
        let view = file
            .tensor(name)
            .map_err(|e| bad(&format!("{name}: {e}")))?;
        let values = decode(view.dtype(), view.data());
        let values = values.ok_or_else(|| bad(&format!("{name}: dtype {:?}", view.dtype())))?;
        Ok((view.shape().to_vec(), values))
    };
    let indices = |name: &str| -> Result<Vec<u32>> {
        let one = |v: &f64| match *v {
            v if v >= 0.0 && v <= f64::from(u32::MAX) && v.fract() == 0.0 => Ok(v as u32),
            v => Err(bad(&format!("{name}: {v} is no index"))),
        };
        numbers(name)?.1.iter().map(one).collect()
    };
    let y = indices("y")?;
    let n = number("num_nodes").unwrap_or(y.len());
    let ends = indices("edge_index")?;
    let (src, dst) = ends.split_at(ends.len() / 2);
    let graph = Graph::from_edges(n, src.to_vec(), dst.to_vec()).map_err(|e| bad(&e))?;
    let x: Features = if has("x") {
        let (shape, values) = numbers("x")?;
        Tensor::from_vec(values, shape, &Device::Cpu)?
            .to_dtype(DType::F32)?
            .into()
    } else {
        let (indptr, columns) = (indices("x_indptr")?, indices("x_indices")?);
        let values = match has("x_values") {
            true => numbers("x_values")?.1,
            false => vec![1.0; columns.len()],
        };
        let largest = columns.iter().max().map_or(0, |c| *c as usize + 1);
        let cols = number("num_features").unwrap_or(largest);
        let x = SparseFeatures::from_csr(cols, &indptr, &columns, values, DType::F32);
        x.map_err(|e| bad(&e))?.into()
    };
    let split = match has("train_idx") {
        true => Some(NodeSplit {
            train: indices("train_idx")?,
            val: indices("val_idx")?,
            test: indices("test_idx")?,
        }),
        false => None,
    };
    let largest = y.iter().max().map_or(0, |c| *c as usize + 1);
    let data = NodeData {
        graph,
        x,
        classes: number("num_classes").unwrap_or(largest),
        y,
        split,
    };
    data.validate().map_err(|e| bad(&e))?;
    Ok(data)
}

fn decode(dtype: Dtype, data: &[u8]) -> Option<Vec<f64>> {
    macro_rules! numbers {
        ($t:ty) => {{
            let one = |b: &[u8]| {
                let mut word = [0u8; std::mem::size_of::<$t>()];
                word.copy_from_slice(b);
                <$t>::from_le_bytes(word) as f64
            };
            data.chunks_exact(std::mem::size_of::<$t>())
                .map(one)
                .collect()
        }};
    }
    Some(match dtype {
        Dtype::F32 => numbers!(f32),
        Dtype::F64 => numbers!(f64),
        Dtype::I32 => numbers!(i32),
        Dtype::I64 => numbers!(i64),
        Dtype::U32 => numbers!(u32),
        Dtype::U8 | Dtype::BOOL => numbers!(u8),
        _ => return None,
    })
}
