//! Linear maps along rows and columns of images: average pooling and upsampling.
//!
//! Each is `y = R x C^T` for every channel, with sparse matrices `R` `[H', H]` and `C` `[W', W]`
//! whose rows hold a few neighbors, and its gradient is `dx = R^T dy C`: the same kind of map. On the
//! CPU (f32, f64) a kernel applies it channel by channel and is differentiable any number of
//! times; other devices and dtypes take two matrix products with `R` and `C` in dense form.
//!
//! ```
//! use candle_core::{Device, Tensor};
//! use thalweg_nn::resample::{avg_pool2d, upsample_bilinear2d, upsample_nearest2d};
//! let x = Tensor::new(&[[[[1f32, 2.0], [3.0, 6.0]]]], &Device::Cpu)?;
//! assert_eq!(avg_pool2d(&x, 2.into())?.flatten_all()?.to_vec1::<f32>()?, [3.0]);
//! let nearest = upsample_nearest2d(&x, (2, 4))?.flatten_all()?.to_vec1::<f32>()?;
//! assert_eq!(nearest, [1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 6.0, 6.0]);
//! let bilinear = upsample_bilinear2d(&x, (1, 4), false)?.flatten_all()?.to_vec1::<f32>()?;
//! assert_eq!(bilinear, [2.0, 2.5, 3.5, 4.0]);
//! # Ok::<(), thalweg_nn::Error>(())
//! ```

use crate::kernel::{filled, has_kernel, pieces, vectorized, Computed, Scalar, View};
use crate::pool::{windows, PoolConfig};
use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use std::sync::Arc;

/// A sparse matrix: for each output the inputs that it takes, with their weights.
#[derive(Debug, Clone, PartialEq)]
struct Taps {
    inputs: usize,
    rows: Vec<Vec<(usize, f64)>>,
}

impl Taps {
    fn transposed(&self) -> Self {
        let mut rows = vec![vec![]; self.inputs];
        for (i, row) in self.rows.iter().enumerate() {
            for (j, w) in row {
                rows[*j].push((i, *w));
            }
        }
        Self {
            inputs: self.rows.len(),
            rows,
        }
    }

    fn dense(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut all = vec![0.0; self.rows.len() * self.inputs];
        for (i, row) in self.rows.iter().enumerate() {
            for (j, w) in row {
                all[i * self.inputs + j] += w;
            }
        }
        let matrix = Tensor::from_vec(all, (self.rows.len(), self.inputs), &Device::Cpu)?;
        Ok(matrix.to_dtype(dtype)?.to_device(device)?)
    }

    /// Means over windows; `full` is the divisor where padding counts.
    fn means(windows: &[(usize, usize)], inputs: usize, full: Option<usize>) -> Self {
        let row = |(start, end): &(usize, usize)| {
            let weight = 1.0 / full.unwrap_or(end - start) as f64;
            (*start..*end).map(|i| (i, weight)).collect()
        };
        Self {
            inputs,
            rows: windows.iter().map(row).collect(),
        }
    }

    /// Output `i` takes input `floor(i n / m)`.
    fn nearest(inputs: usize, outputs: usize) -> Self {
        let row = |i: usize| vec![(i * inputs / outputs, 1.0)];
        Self {
            inputs,
            rows: (0..outputs).map(row).collect(),
        }
    }

    /// Between the two inputs around a position: `(i + 1/2) n / m - 1/2`, or `i (n - 1) / (m - 1)`
    /// with aligned corners.
    fn bilinear(inputs: usize, outputs: usize, align_corners: bool) -> Self {
        let at = |i: usize| match (align_corners, outputs) {
            (true, 1) => 0.0,
            (true, _) => i as f64 * (inputs - 1) as f64 / (outputs - 1) as f64,
            (false, _) => ((i as f64 + 0.5) * inputs as f64 / outputs as f64 - 0.5).max(0.0),
        };
        let row = |i: usize| {
            let low = (at(i) as usize).min(inputs - 1);
            let part = at(i) - low as f64;
            match low + 1 < inputs && part > 0.0 {
                true => vec![(low, 1.0 - part), (low + 1, part)],
                false => vec![(low, 1.0)],
            }
        };
        Self {
            inputs,
            rows: (0..outputs).map(row).collect(),
        }
    }
}

/// The two maps of an image.
#[derive(Debug, Clone)]
struct Resample {
    rows: Taps,
    cols: Taps,
}

impl Resample {
    fn transposed(&self) -> Self {
        Self {
            rows: self.rows.transposed(),
            cols: self.cols.transposed(),
        }
    }

    /// Over the last two dimensions.
    fn of(self, x: &Tensor) -> Result<Tensor> {
        if !has_kernel(x) {
            let (rows, cols) = (&self.rows, &self.cols);
            let rows = rows.dense(x.dtype(), x.device())?;
            let cols = cols.dense(x.dtype(), x.device())?;
            return Ok(rows.broadcast_matmul(&x.broadcast_matmul(&cols.t()?)?)?);
        }
        let back = Arc::new(self.transposed());
        self.node(back, &x.contiguous()?)
    }

    fn node(&self, back: Arc<Self>, x: &Tensor) -> Result<Tensor> {
        match x.dtype() {
            DType::F64 => self.typed::<f64>(back, x),
            _ => self.typed::<f32>(back, x),
        }
    }

    fn typed<T: Scalar>(&self, back: Arc<Self>, x: &Tensor) -> Result<Tensor> {
        let (h, w) = (self.rows.rows.len(), self.cols.rows.len());
        let mut dims = x.dims().to_vec();
        let n = dims.len();
        dims[n - 2..].copy_from_slice(&[h, w]);
        let shape = Shape::from(dims);
        let y = {
            let view = View::new(x)?;
            let x = view.slice::<T>()?;
            let size = self.rows.inputs * self.cols.inputs;
            let map = self.compiled::<T>();
            filled(shape.elem_count(), |y| {
                pieces(y, h * w, |first, y| {
                    let x = x[first * size..].chunks_exact(size);
                    let mut line = vec![T::ZERO; self.cols.inputs];
                    vectorized(
                        #[inline(always)]
                        || {
                            for (x, y) in x.zip(y.chunks_exact_mut(h * w)) {
                                map.plane(x, y, &mut line);
                            }
                        },
                    );
                });
            })
        };
        let forward = Arc::new(self.clone());
        let backward = move |_: &[&Tensor], _: &Tensor, dy: &Tensor| {
            Ok(vec![Some(back.node(forward.clone(), dy)?)])
        };
        let node = Computed::new("resampling", y, &shape, backward);
        Ok(x.apply_op1(node)?)
    }

    fn compiled<T: Scalar>(&self) -> Compiled<'_, T> {
        let mut compiled = Compiled {
            rows: &self.rows,
            inputs: self.cols.inputs,
            ends: vec![],
            index: vec![],
            weight: vec![],
        };
        for taps in &self.cols.rows {
            for (j, weight) in taps {
                compiled.index.push(*j as u32);
                compiled.weight.push(T::from_f64(*weight));
            }
            compiled.ends.push(compiled.index.len());
        }
        compiled
    }
}

/// The map of the columns in flat arrays.
struct Compiled<'a, T> {
    rows: &'a Taps,
    /// Columns of the input.
    inputs: usize,
    /// Where the taps of each output end.
    ends: Vec<usize>,
    index: Vec<u32>,
    weight: Vec<T>,
}

impl<T: Scalar> Compiled<'_, T> {
    #[inline(always)]
    fn plane(&self, x: &[T], y: &mut [T], line: &mut [T]) {
        let (n, width) = (self.inputs, self.ends.len());
        for (i, taps) in self.rows.rows.iter().enumerate() {
            // Rows that take the same inputs are the same.
            if i > 0 && self.rows.rows[i - 1] == *taps {
                y.copy_within((i - 1) * width..i * width, i * width);
                continue;
            }
            line.fill(T::ZERO);
            for (i, weight) in taps {
                let weight = T::from_f64(*weight);
                for (l, x) in line.iter_mut().zip(&x[i * n..(i + 1) * n]) {
                    *l = *l + weight * *x;
                }
            }
            let mut start = 0;
            for (y, end) in y[i * width..(i + 1) * width].iter_mut().zip(&self.ends) {
                let taps = self.index[start..*end]
                    .iter()
                    .zip(&self.weight[start..*end]);
                let mut sum = T::ZERO;
                for (j, weight) in taps {
                    sum = sum + *weight * line[*j as usize];
                }
                *y = sum;
                start = *end;
            }
        }
    }
}

fn check_size(field: &'static str, size: (usize, usize)) -> Result<()> {
    match size.0 > 0 && size.1 > 0 {
        true => Ok(()),
        false => Err(Error::config(field, format!("{size:?}"), "at least (1, 1)")),
    }
}

/// Means over windows of `x` `[B, C, H, W]`; gives `[B, C, H', W']` with
/// `H' = (H + 2 padding - kernel) / stride + 1`. Padding counts as zeros in the mean if
/// `count_include_pad`.
///
/// # Errors
/// [`Error::Shape`] and [`Error::InvalidConfig`] for sizes that do not fit.
pub fn avg_pool2d(x: &Tensor, config: PoolConfig) -> Result<Tensor> {
    let (rows, cols) = config.windows(x)?;
    let full = |k: usize| config.count_include_pad.then_some(k);
    let (h, w) = (x.dims()[2], x.dims()[3]);
    Resample {
        rows: Taps::means(&rows, h, full(config.kernel.0)),
        cols: Taps::means(&cols, w, full(config.kernel.1)),
    }
    .of(x)
}

/// Means over `size` windows of `x` `[B, C, H, W]` that cover it as evenly as they can: window `i`
/// of `m` reaches from `floor(i n / m)` to `ceil((i + 1) n / m)`. Size `(1, 1)` is the global mean.
///
/// # Errors
/// [`Error::Shape`] and [`Error::InvalidConfig`] for sizes that do not fit.
pub fn adaptive_avg_pool2d(x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
    let (h, w) = crate::pool::image(x)?;
    check_size("size", size)?;
    Resample {
        rows: Taps::means(&windows(h, size.0), h, None),
        cols: Taps::means(&windows(w, size.1), w, None),
    }
    .of(x)
}

/// `x` `[B, C, H, W]` at another size (larger or smaller), each output the input at
/// `floor(i H / H')`.
///
/// # Errors
/// [`Error::Shape`] and [`Error::InvalidConfig`] for sizes that do not fit.
pub fn upsample_nearest2d(x: &Tensor, size: (usize, usize)) -> Result<Tensor> {
    let (h, w) = crate::pool::image(x)?;
    check_size("size", size)?;
    Resample {
        rows: Taps::nearest(h, size.0),
        cols: Taps::nearest(w, size.1),
    }
    .of(x)
}

/// `x` `[B, C, H, W]` at another size by linear interpolation along both dimensions. Pixels are
/// squares whose outer edges stay in place, or, with `align_corners`, points of which the corner
/// ones stay.
///
/// # Errors
/// [`Error::Shape`] and [`Error::InvalidConfig`] for sizes that do not fit.
pub fn upsample_bilinear2d(
    x: &Tensor,
    size: (usize, usize),
    align_corners: bool,
) -> Result<Tensor> {
    let (h, w) = crate::pool::image(x)?;
    check_size("size", size)?;
    Resample {
        rows: Taps::bilinear(h, size.0, align_corners),
        cols: Taps::bilinear(w, size.1, align_corners),
    }
    .of(x)
}
