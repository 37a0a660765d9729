//! What the machine can do at best: copy bytes, multiply matrices.

use super::seconds;
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use serde::Serialize;

/// What limits a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Ceiling {
    /// Bytes per second of a plain copy that does not fit into any cache.
    Copy,
    /// Operations per second of a large matrix product in `f32`.
    Gemm,
    /// Operations per second of a large matrix product in `f64`.
    GemmF64,
}

impl Ceiling {
    /// Its name in a table.
    pub fn name(self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Gemm => "gemm",
            Self::GemmF64 => "gemm f64",
        }
    }

    /// What is counted.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Copy => "B",
            Self::Gemm | Self::GemmF64 => "FLOP",
        }
    }
}

/// Numbers of the copy: 100 MB, beyond the caches.
const COPIED: usize = 25_000_000;
/// Side of the square matrices.
const SIDE: usize = 1024;

/// The ceilings' operands, made when they are first asked for.
#[derive(Default)]
pub(super) struct Ceilings {
    copy: Option<(Vec<f32>, Vec<f32>)>,
    gemm: Option<Tensor>,
    gemm_f64: Option<Tensor>,
}

impl Ceilings {
    /// Runs the ceiling once and gives its bytes or operations per second.
    pub fn rate(&mut self, ceiling: Ceiling) -> Result<f64> {
        match ceiling {
            Ceiling::Copy => {
                let (from, to) = self
                    .copy
                    .get_or_insert_with(|| (vec![1.0; COPIED], vec![0.0; COPIED]));
                let time = seconds(|| {
                    copy(from, to);
                    Ok(())
                })?;
                Ok(8.0 * COPIED as f64 / time)
            }
            Ceiling::Gemm => product(&mut self.gemm, DType::F32),
            Ceiling::GemmF64 => product(&mut self.gemm_f64, DType::F64),
        }
    }
}

/// The machine's own copy, cut over the threads.
fn copy(from: &[f32], to: &mut [f32]) {
    let pieces = 8 * rayon::current_num_threads();
    let piece = from.len().div_ceil(pieces).max(1);
    to.par_chunks_mut(piece)
        .zip(from.par_chunks(piece))
        .for_each(|(to, from)| to.copy_from_slice(from));
}

fn product(matrix: &mut Option<Tensor>, dtype: DType) -> Result<f64> {
    let matrix = match matrix {
        Some(matrix) => &*matrix,
        None => matrix.insert(Tensor::ones((SIDE, SIDE), dtype, &Device::Cpu)?),
    };
    let time = seconds(|| {
        std::hint::black_box(matrix.matmul(matrix)?);
        Ok(())
    })?;
    Ok(2.0 * (SIDE as f64).powi(3) / time)
}
