//! Shifted variants of images.

use crate::{Classification, Error, Result};
use candle_core::{DType, Device, Tensor};
use tensor_core::random::RandomStream;

/// A change of the world in which images are taken. Values are not clipped afterwards.
///
/// ```
/// use thalweg_datasets::{corrupt::Shift, digits, RandomStream};
///
/// let (digits, mut rng) = (digits()?, RandomStream::new(0));
/// for shift in Shift::UNSEEN {
///     let shifted = shift.apply_to(&digits, 8, 8, &mut rng)?;
///     assert_eq!(shifted.inputs.dims(), digits.inputs.dims());
/// }
/// # Ok::<(), thalweg_datasets::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Shift {
    /// `x + std N(0, 1)`, independent for each pixel.
    Noise {
        /// Standard deviation.
        std: f64,
    },
    /// `scale x + offset`.
    Contrast {
        /// Factor.
        scale: f64,
        /// Added afterwards.
        offset: f64,
    },
    /// `|x - pivot|`: dark and bright change places, most for `pivot = 1`.
    Inversion {
        /// The value that becomes zero.
        pivot: f64,
    },
    /// Counter-clockwise around the center of the image, bilinear, zero outside.
    Rotation {
        /// Angle in degrees.
        degrees: f64,
    },
    /// Gaussian blur with mirrored borders, cut off at four standard deviations.
    Blur {
        /// Standard deviation in pixels.
        sigma: f64,
    },
    /// Each pixel becomes zero with this probability.
    PixelDropout {
        /// Probability.
        p: f64,
    },
}

impl Shift {
    /// Six unseen domains for images in `[0, 1]`: noise 0.35, contrast `0.35 x + 0.3`, inversion
    /// `|x - 0.35|`, rotation by 20 degrees, blur of 0.9 pixels, 35 % missing pixels.
    pub const UNSEEN: [Self; 6] = [
        Self::Noise { std: 0.35 },
        Self::Contrast {
            scale: 0.35,
            offset: 0.3,
        },
        Self::Inversion { pivot: 0.35 },
        Self::Rotation { degrees: 20.0 },
        Self::Blur { sigma: 0.9 },
        Self::PixelDropout { p: 0.35 },
    ];

    /// A short name for tables: `noise`, `contrast`, ...
    pub fn name(&self) -> &'static str {
        match self {
            Self::Noise { .. } => "noise",
            Self::Contrast { .. } => "contrast",
            Self::Inversion { .. } => "inversion",
            Self::Rotation { .. } => "rotation",
            Self::Blur { .. } => "blur",
            Self::PixelDropout { .. } => "pixel-dropout",
        }
    }

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a value that is not finite, a negative `std` or `sigma`, a
    /// `sigma` above 100 pixels, or a `p` outside `[0, 1]`.
    pub fn validate(&self) -> Result<()> {
        let check = |name, value: f64, valid: bool, expected| {
            if valid && value.is_finite() {
                Ok(())
            } else {
                Err(Error::invalid(name, value, expected))
            }
        };
        match *self {
            Self::Noise { std } => check("std", std, std >= 0.0, "a finite number >= 0"),
            Self::Contrast { scale, offset } => {
                check("scale", scale, true, "a finite number")?;
                check("offset", offset, true, "a finite number")
            }
            Self::Inversion { pivot } => check("pivot", pivot, true, "a finite number"),
            Self::Rotation { degrees } => check("degrees", degrees, true, "a finite number"),
            Self::Blur { sigma } => {
                let valid = (0.0..=100.0).contains(&sigma);
                check("sigma", sigma, valid, "0 to 100 pixels")
            }
            Self::PixelDropout { p } => {
                let valid = (0.0..=1.0).contains(&p);
                check("p", p, valid, "a probability in [0, 1]")
            }
        }
    }

    /// The shifted images; `images` is `[.., h, w]` of a float dtype, on any device.
    ///
    /// # Errors
    /// Those of [`validate`](Self::validate); [`Error::BadTensor`] for an integer dtype, fewer than
    /// two dimensions, or images without pixels.
    pub fn apply(&self, images: &Tensor, rng: &mut RandomStream) -> Result<Tensor> {
        self.validate()?;
        let sizes = images.dims().iter().rev().take(2).product::<usize>();
        if !images.dtype().is_float() || images.rank() < 2 || sizes == 0 {
            let expected = "a float dtype and shape [.., h, w]";
            return Err(Error::tensor("images", images, expected));
        }
        let (dtype, device, shape) = (images.dtype(), images.device(), images.shape());
        Ok(match *self {
            Self::Noise { std } => (images + rng.normal(0.0, std, shape, dtype, device)?)?,
            Self::Contrast { scale, offset } => images.affine(scale, offset)?,
            Self::Inversion { pivot } => images.affine(1.0, -pivot)?.abs()?,
            Self::Rotation { degrees } => rotate(images, degrees)?,
            Self::Blur { sigma } => blur(images, sigma)?,
            Self::PixelDropout { p } => (images * rng.bernoulli(1.0 - p, shape, dtype, device)?)?,
        })
    }

    /// [`apply`](Self::apply) to the inputs of a data set whose examples hold `height * width`
    /// pixels a channel, in whatever shape.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the examples do not divide into such images; those of
    /// [`apply`](Self::apply).
    pub fn apply_to(
        &self,
        data: &Classification,
        height: usize,
        width: usize,
        rng: &mut RandomStream,
    ) -> Result<Classification> {
        let pixels = height * width;
        let example: usize = data.inputs.dims().iter().skip(1).product();
        if pixels == 0 || !example.is_multiple_of(pixels) {
            let expected = format!("a divisor of {example}, the values of an example");
            let value = format!("{height} x {width}");
            return Err(Error::invalid("height x width", value, expected));
        }
        data.map_inputs(|inputs| {
            let planes = inputs.elem_count() / pixels;
            let images = inputs.reshape((planes, height, width))?;
            Ok(self.apply(&images, rng)?.reshape(inputs.shape())?)
        })
    }
}

/// Height and width of `[.., h, w]`, and the images as `[planes, h, w]`.
fn planes(images: &Tensor) -> Result<(Tensor, usize, usize)> {
    let rank = images.rank();
    let (h, w) = (images.dim(rank - 2)?, images.dim(rank - 1)?);
    let planes = images.elem_count() / (h * w);
    Ok((images.reshape((planes, h, w))?, h, w))
}

/// Every target pixel is a weighted sum of four source pixels, gathered by four `index_select`s.
fn rotate(images: &Tensor, degrees: f64) -> Result<Tensor> {
    let (flat, h, w) = planes(images)?;
    let flat = flat.reshape(((), h * w))?;
    let (sin, cos) = degrees.to_radians().sin_cos();
    let (cy, cx) = ((h - 1) as f64 / 2.0, (w - 1) as f64 / 2.0);
    let mut corners = vec![(Vec::with_capacity(h * w), Vec::with_capacity(h * w)); 4];
    for y in 0..h {
        for x in 0..w {
            let (dy, dx) = (y as f64 - cy, x as f64 - cx);
            // Rows count downward, so the inverse of a counter-clockwise turn is this one.
            let (sy, sx) = (cy + cos * dy + sin * dx, cx + cos * dx - sin * dy);
            let (y0, x0) = (sy.floor(), sx.floor());
            let (fy, fx) = (sy - y0, sx - x0);
            let four = [(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)];
            for ((indices, weights), (oy, ox)) in corners.iter_mut().zip(four) {
                let (py, px) = (y0 + oy, x0 + ox);
                let inside = py >= 0.0 && px >= 0.0 && py < h as f64 && px < w as f64;
                let weight = (1.0 - (oy - fy).abs()) * (1.0 - (ox - fx).abs());
                indices.push(if inside {
                    py as u32 * w as u32 + px as u32
                } else {
                    0
                });
                weights.push(if inside { weight } else { 0.0 });
            }
        }
    }
    let mut sum = flat.zeros_like()?;
    for (indices, weights) in corners {
        let indices = Tensor::from_vec(indices, h * w, images.device())?;
        let weights = Tensor::from_vec(weights, (1, h * w), images.device())?;
        let weights = weights.to_dtype(images.dtype())?;
        sum = (sum + flat.index_select(&indices, 1)?.broadcast_mul(&weights)?)?;
    }
    Ok(sum.reshape(images.shape())?)
}

/// Separable: one matrix product along the rows, one along the columns.
fn blur(images: &Tensor, sigma: f64) -> Result<Tensor> {
    if sigma == 0.0 {
        return Ok(images.clone());
    }
    let (x, h, w) = planes(images)?;
    let n = x.dim(0)?;
    let (dtype, device) = (images.dtype(), images.device());
    let across = blur_matrix(w, sigma, dtype, device)?;
    let down = blur_matrix(h, sigma, dtype, device)?;
    let x = x.reshape((n * h, w))?.matmul(&across)?.reshape((n, h, w))?;
    let x = x.transpose(1, 2)?.contiguous()?.reshape((n * w, h))?;
    let x = x.matmul(&down)?.reshape((n, w, h))?.transpose(1, 2)?;
    Ok(x.contiguous()?.reshape(images.shape())?)
}

/// `[n, n]`, column `i` = the weights of the sources of pixel `i`; indices beyond a border are
/// mirrored with the border pixel repeated.
fn blur_matrix(n: usize, sigma: f64, dtype: DType, device: &Device) -> Result<Tensor> {
    let radius = (4.0 * sigma).ceil() as i64;
    let weight = |k: i64| (-0.5 * (k as f64 / sigma).powi(2)).exp();
    let total: f64 = (-radius..=radius).map(weight).sum();
    let period = 2 * n as i64;
    let mut matrix = vec![0.0; n * n];
    for target in 0..n {
        for k in -radius..=radius {
            let index = (target as i64 + k).rem_euclid(period);
            let source = index.min(period - 1 - index) as usize;
            matrix[source * n + target] += weight(k) / total;
        }
    }
    Ok(Tensor::from_vec(matrix, (n, n), device)?.to_dtype(dtype)?)
}
