//! Linear operators with exact transposes: masks, pooling, blur, matrices.
//!
//! They act on batches `[rows, ...]` and can stand in a graph. Masks and pooling are one pass over
//! memory on the CPU in f32 and f64; everything else, and every other device, is operations of candle. `<A x, y> = <x, A^T y>` holds up to rounding for every operator here; the norm of `A`
//! is found by power iteration on `A^T A`.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use thalweg_tensor_core::operator::{AveragePool, LinearOperator};
//!
//! let x = Tensor::arange(0.0, 16.0, &Device::Cpu)?.reshape((1, 1, 4, 4))?;
//! let half = AveragePool { factor: 2 };
//! assert_eq!(half.apply(&x)?.flatten_all()?.to_vec1::<f64>()?, [2.5, 4.5, 10.5, 12.5]);
//! let back = half.adjoint(&half.apply(&x)?)?;
//! assert_eq!(back.dims(), [1, 1, 4, 4]);
//! # Ok::<(), thalweg_tensor_core::Error>(())
//! ```

mod host;

use crate::random::RandomStream;
use crate::solve::{power_iteration, PowerConfig};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use host::{has_pass, Pass};

/// A linear map of each row of a batch.
pub trait LinearOperator {
    /// `A x`, for `x` `[rows, ...]`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a shape that the operator does not take.
    fn apply(&self, x: &Tensor) -> Result<Tensor>;

    /// `A^T y`.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    fn adjoint(&self, y: &Tensor) -> Result<Tensor>;

    /// `pinv(A) y`, the sample of least norm among the nearest to `y`, where it is cheap.
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    fn pseudo_inverse(&self, _y: &Tensor) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// The largest eigenvalue of `A^T A`, by at most `iterations` of power iteration on one row of
    /// the form of `like`.
    ///
    /// # Errors
    /// As [`power_iteration`].
    fn norm_squared(
        &self,
        like: &Tensor,
        iterations: usize,
        stream: &mut RandomStream,
    ) -> Result<f64> {
        let one = match like.dims().first() {
            Some(n) if *n > 0 => like.narrow(0, 0, 1)?.contiguous()?,
            _ => return Err(shape("like", like, "[rows, ...] with a row")),
        };
        let config = PowerConfig {
            max_iterations: iterations,
            ..PowerConfig::default()
        };
        let square = |x: &Tensor| self.adjoint(&self.apply(x)?);
        Ok(power_iteration(square, &one, &config, stream)?.pair.value)
    }
}

fn shape(name: &'static str, x: &Tensor, expected: impl ToString) -> Error {
    Error::invalid(name, format!("{:?}", x.dims()), expected)
}

/// Multiplication with weights, usually 0 (hidden) and 1 (seen).
#[derive(Debug, Clone)]
pub struct Mask(Tensor);

impl Mask {
    /// A mask of the form of one row, or of one that is broadcast to it (`[height, width]`, say).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an empty one.
    pub fn new(mask: &Tensor) -> Result<Self> {
        match mask.elem_count() {
            0 => Err(shape("mask", mask, "something to multiply with")),
            _ => Ok(Self(mask.detach())),
        }
    }

    /// Hides a square box of images `height x width`: `size` pixels from
    /// `center - floor(size / 2)` on, cut at the border. Without a center, that of the image.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an image without pixels.
    pub fn hide_box(
        (height, width): (usize, usize),
        size: usize,
        center: Option<(usize, usize)>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let (row, column) = center.unwrap_or((height / 2, width / 2));
        let range = |at: usize, limit: usize| {
            let start = at.saturating_sub(size / 2);
            // A box that begins outside loses what is outside.
            let end = (at + size - size / 2).min(limit);
            start.min(limit)..end
        };
        let (rows, columns) = (range(row, height), range(column, width));
        let pixel = |k: usize| {
            let hidden = rows.contains(&(k / width)) && columns.contains(&(k % width));
            if hidden {
                0.0
            } else {
                1.0
            }
        };
        let values: Vec<f64> = (0..height * width).map(pixel).collect();
        let mask = Tensor::from_vec(values, (height, width), device)?;
        Self::new(&mask.to_dtype(dtype)?)
    }

    /// The weights.
    pub fn weights(&self) -> &Tensor {
        &self.0
    }
}

impl LinearOperator for Mask {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let mask = self.0.to_dtype(x.dtype())?;
        let fits = mask.rank() < x.rank()
            && x.shape() == &mask.shape().broadcast_shape_binary_op(x.shape(), "mask")?;
        match fits {
            true if has_pass(x) => {
                let whole = mask.dims() == &x.dims()[x.rank() - mask.rank()..];
                let weights = match whole {
                    true => mask,
                    false => mask.broadcast_as(&x.dims()[1..])?.contiguous()?,
                };
                Ok(Pass::Mask(weights).of(x)?)
            }
            true => Ok(x.broadcast_mul(&mask)?),
            false => Err(shape(
                "x",
                x,
                format!("[rows, ...] over a mask {:?}", mask.dims()),
            )),
        }
    }

    fn adjoint(&self, y: &Tensor) -> Result<Tensor> {
        self.apply(y)
    }

    /// Of weights 0 and 1 it is the mask itself.
    fn pseudo_inverse(&self, y: &Tensor) -> Result<Option<Tensor>> {
        let weights = self
            .0
            .to_dtype(DType::F64)?
            .flatten_all()?
            .to_vec1::<f64>()?;
        let inverse = |w: f64| if w == 0.0 { 0.0 } else { 1.0 / w };
        let inverse = weights.into_iter().map(inverse).collect();
        let inverse = Tensor::from_vec(inverse, self.0.shape(), self.0.device())?;
        Self(inverse.to_dtype(y.dtype())?).apply(y).map(Some)
    }
}

/// Means over squares of `factor x factor` pixels of images `[rows, channels, height, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AveragePool {
    /// The side of a square; it must divide height and width.
    pub factor: usize,
}

impl AveragePool {
    fn share(&self) -> f64 {
        1.0 / (self.factor * self.factor) as f64
    }

    fn image(&self, x: &Tensor) -> Result<(usize, usize, usize, usize)> {
        match x.dims() {
            [n, c, h, w] if self.factor > 0 => Ok((*n, *c, *h, *w)),
            _ => Err(shape(
                "x",
                x,
                "[rows, channels, height, width] and a factor of at least 1",
            )),
        }
    }

    /// Every pixel as a square of its value, times a share.
    fn spread(&self, y: &Tensor, share: f64) -> Result<Tensor> {
        let (n, c, h, w) = self.image(y)?;
        let factor @ f = self.factor;
        if has_pass(y) {
            return Ok(Pass::Spread { factor, share }.of(y)?);
        }
        let wide = y
            .reshape((n, c, h, 1, w, 1))?
            .broadcast_as((n, c, h, f, w, f))?;
        Ok(wide.reshape((n, c, h * f, w * f))?.affine(share, 0.0)?)
    }
}

impl LinearOperator for AveragePool {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let (n, c, h, w) = self.image(x)?;
        let factor @ f = self.factor;
        if h % f != 0 || w % f != 0 {
            return Err(shape("x", x, format!("height and width that {f} divides")));
        }
        let share = self.share();
        if has_pass(x) {
            return Ok(Pass::Sum { factor, share }.of(x)?);
        }
        let squares = x.reshape((n, c, h / f, f, w / f, f))?;
        Ok(squares.sum(5)?.sum(3)?.affine(share, 0.0)?)
    }

    fn adjoint(&self, y: &Tensor) -> Result<Tensor> {
        self.spread(y, self.share())
    }

    fn pseudo_inverse(&self, y: &Tensor) -> Result<Option<Tensor>> {
        self.spread(y, 1.0).map(Some)
    }
}

/// Correlation of each channel of images `[rows, channels, height, width]` with one kernel, zeros
/// beyond the border. The transpose is the correlation with the kernel turned by half a circle.
#[derive(Debug, Clone)]
pub struct Blur {
    /// `[1, 1, k, k]`, and the same turned.
    kernel: Tensor,
    turned: Tensor,
}

impl Blur {
    /// A blur with a kernel `[k, k]`, `k` odd.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another shape.
    pub fn new(kernel: &Tensor) -> Result<Self> {
        let k = match kernel.dims() {
            [a, b] if a == b && a % 2 == 1 => *a,
            _ => return Err(shape("kernel", kernel, "[k, k] with an odd k")),
        };
        let kernel = kernel.detach().contiguous()?;
        let back: Vec<u32> = (0..(k * k) as u32).rev().collect();
        let back = Tensor::from_vec(back, k * k, kernel.device())?;
        let turned = kernel.flatten_all()?.index_select(&back, 0)?;
        Ok(Self {
            kernel: kernel.reshape((1, 1, k, k))?,
            turned: turned.reshape((1, 1, k, k))?,
        })
    }

    /// The Gaussian kernel of this size (odd) and standard deviation in pixels, with sum 1. Where it
    /// is not `centered` its middle is half a pixel before the middle of the kernel, at both axes: a
    /// blur that also shifts, which published experiments use.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an even size or a deviation that is not positive.
    pub fn gaussian(
        size: usize,
        sigma: f64,
        centered: bool,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        if !(sigma.is_finite() && sigma > 0.0) {
            return Err(Error::invalid("sigma", sigma, "a finite number > 0"));
        }
        let middle = (size as f64 - if centered { 1.0 } else { 0.0 }) / 2.0;
        let bell = |i: usize| (-(i as f64 - middle).powi(2) / (2.0 * sigma * sigma)).exp();
        let sum: f64 = (0..size).map(bell).sum();
        let values: Vec<f64> = (0..size * size)
            .map(|k| bell(k / size) * bell(k % size) / (sum * sum))
            .collect();
        let kernel = Tensor::from_vec(values, (size, size), device)?;
        Self::new(&kernel.to_dtype(dtype)?)
    }

    fn correlate(x: &Tensor, kernel: &Tensor) -> Result<Tensor> {
        let [n, c, h, w] = *x.dims() else {
            return Err(shape("x", x, "[rows, channels, height, width]"));
        };
        let planes = x.contiguous()?.reshape((n * c, 1, h, w))?;
        let kernel = kernel.to_dtype(x.dtype())?;
        let blurred = planes.conv2d(&kernel, kernel.dims()[2] / 2, 1, 1, 1)?;
        Ok(blurred.reshape((n, c, h, w))?)
    }
}

impl LinearOperator for Blur {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        Self::correlate(x, &self.kernel)
    }

    fn adjoint(&self, y: &Tensor) -> Result<Tensor> {
        Self::correlate(y, &self.turned)
    }
}

/// A matrix `[outputs, inputs]` that multiplies each row, read as a vector.
#[derive(Debug, Clone)]
pub struct Dense {
    matrix: Tensor,
    shape: Vec<usize>,
}

impl Dense {
    /// A matrix over rows of this shape (without the batch).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the matrix has not as many columns as a row has numbers.
    pub fn new(matrix: &Tensor, row: &[usize]) -> Result<Self> {
        let inputs: usize = row.iter().product();
        match matrix.dims() {
            [_, columns] if *columns == inputs => Ok(Self {
                matrix: matrix.detach(),
                shape: row.to_vec(),
            }),
            _ => Err(shape("matrix", matrix, format!("[outputs, {inputs}]"))),
        }
    }
}

impl LinearOperator for Dense {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        if x.rank() == 0 || x.dims()[1..] != self.shape {
            return Err(shape("x", x, format!("[rows] and {:?}", self.shape)));
        }
        let flat = x.reshape((x.dims()[0], ()))?;
        Ok(flat.matmul(&self.matrix.to_dtype(x.dtype())?.t()?)?)
    }

    fn adjoint(&self, y: &Tensor) -> Result<Tensor> {
        let rows = match y.dims() {
            [rows, outputs] if *outputs == self.matrix.dims()[0] => *rows,
            _ => {
                let expected = format!("[rows, {}]", self.matrix.dims()[0]);
                return Err(shape("y", y, expected));
            }
        };
        let mut full = vec![rows];
        full.extend(&self.shape);
        Ok(y.matmul(&self.matrix.to_dtype(y.dtype())?)?.reshape(full)?)
    }
}

/// One operator after another, the first one first.
pub struct Compose<'a>(pub Vec<&'a dyn LinearOperator>);

impl LinearOperator for Compose<'_> {
    fn apply(&self, x: &Tensor) -> Result<Tensor> {
        self.0.iter().try_fold(x.clone(), |x, op| op.apply(&x))
    }

    fn adjoint(&self, y: &Tensor) -> Result<Tensor> {
        self.0
            .iter()
            .rev()
            .try_fold(y.clone(), |y, op| op.adjoint(&y))
    }
}
