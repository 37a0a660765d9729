//! Activations whose gradient arrives, alone or fused into the layer before.
//!
//! | activation | `f(x)` |
//! | --- | --- |
//! | `Identity` | `x` |
//! | `Relu` | `max(x, 0)`; slope 0 at 0 |
//! | `LeakyRelu(s)` | `x` for `x > 0`, else `s x` |
//! | `Gelu` | `x Phi(x)`, `Phi` the normal distribution function (Hendrycks, Gimpel 2016) |
//! | `GeluTanh` | `x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`, the same paper's approximation |
//! | `Silu` | `x sigmoid(x)` |
//! | `Mish` | `x tanh(softplus(x))` (Misra 2019) |
//! | `Tanh`, `Sigmoid` | |
//! | `Softplus` | `ln(1 + e^x)` |
//!
//! An [`Activation`] is a candle `Module`; [`Linear`](crate::linear::Linear) and the convolutions
//! take one and apply it in the pass that adds their bias.
//!
//! ```
//! use candle_core::{Device, Module, Tensor};
//! use thalweg_nn::activation::Activation;
//! let x = Tensor::new(&[-1f64, 0.0, 2.0], &Device::Cpu)?;
//! assert_eq!(Activation::LeakyRelu(0.1).forward(&x)?.to_vec1::<f64>()?, [-0.1, 0.0, 2.0]);
//! # Ok::<(), candle_core::Error>(())
//! ```

use crate::kernel::{
    filled, has_kernel, pieces, tensor, vectorized, wide, Computed, Math, Scalar, View,
};
use crate::linear::same_dtype;
use crate::Result;
use candle_core::{DType, Module, Tensor};
use tensor_core::autograd::keeps_graph;

/// A nonlinearity between layers; see the [module](self) page.
///
/// Fused on the CPU in f32 and f64; candle operations on other devices and where gradients keep
/// their graph, twice differentiable there. f16 and bf16 are computed in f32.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Activation {
    /// None.
    Identity,
    /// `max(x, 0)`.
    #[default]
    Relu,
    /// `x` above 0 and this slope times `x` below.
    LeakyRelu(f64),
    /// `x Phi(x)` with the exact normal distribution function.
    Gelu,
    /// The approximation of `Gelu` by a hyperbolic tangent.
    GeluTanh,
    /// `x sigmoid(x)`, also called swish.
    Silu,
    /// `x tanh(softplus(x))`.
    Mish,
    /// `tanh x`.
    Tanh,
    /// `1 / (1 + e^-x)`.
    Sigmoid,
    /// `ln(1 + e^x)`.
    Softplus,
}

/// `sqrt(2 / pi)` and the cubic coefficient of the approximate GELU.
const GELU: (f64, f64) = (0.797_884_560_802_865_4, 0.044_715);

impl Activation {
    /// Whether the derivative is a function of the output alone, so that the input need not be
    /// kept.
    pub(crate) fn keeps_output(self) -> bool {
        use Activation::{Identity, LeakyRelu, Relu, Sigmoid, Softplus, Tanh};
        match self {
            Identity | Relu | Tanh | Sigmoid | Softplus => true,
            // The sign of the output is that of the input.
            LeakyRelu(slope) => slope > 0.0,
            _ => false,
        }
    }

    /// `z <- f(z)` in place.
    #[inline(always)]
    pub(crate) fn apply<T: Scalar>(self, z: &mut [T]) {
        if self != Activation::Identity {
            self.each(z.iter_mut().map(|z| (*z, z)));
        }
    }

    /// `y = f(z)` for pairs of `z` and the place of `y`: one loop for each activation.
    #[inline(always)]
    pub(crate) fn each<'a, T: Scalar>(self, pairs: impl Iterator<Item = (T, &'a mut T)>) {
        let c = T::from_f64;
        let (half, one) = (c(0.5), T::ONE);
        match self {
            Activation::Identity => map(pairs, |x| x),
            Activation::Relu => map(pairs, |x| T::select(x < T::ZERO, T::ZERO, x)),
            Activation::LeakyRelu(slope) => {
                let s = c(slope);
                map(pairs, |x| T::select(x < T::ZERO, s * x, x));
            }
            Activation::Gelu => map(pairs, |x| x * x.normal().0),
            Activation::GeluTanh => {
                let (a, b) = (c(GELU.0), c(GELU.1));
                map(pairs, |x| {
                    half * x * (one + Math::tanh(a * (x + b * (x * x * x))))
                });
            }
            Activation::Silu => map(pairs, |x| x * x.sigmoid()),
            Activation::Mish => map(pairs, |x| x * Math::tanh(x.softplus())),
            Activation::Tanh => map(pairs, Math::tanh),
            Activation::Sigmoid => map(pairs, Math::sigmoid),
            Activation::Softplus => map(pairs, Math::softplus),
        }
    }

    /// `dz = dy f'(z)`, where `kept` is `f(z)` or `z` by [`keeps_output`](Self::keeps_output).
    #[inline(always)]
    pub(crate) fn gradient<T: Scalar>(self, kept: &[T], dy: &[T], dz: &mut [T]) {
        let sources = kept.iter().zip(dy).map(|(k, g)| (*k, *g));
        self.each_gradient(sources.zip(dz));
    }

    /// [`gradient`](Self::gradient) in the place of what was kept.
    #[inline(always)]
    pub(crate) fn gradient_in_place<T: Scalar>(self, kept: &mut [T], dy: &[T]) {
        self.each_gradient(kept.iter_mut().zip(dy).map(|(k, g)| ((*k, *g), k)));
    }

    #[inline(always)]
    fn each_gradient<'a, T: Scalar>(self, places: impl Iterator<Item = ((T, T), &'a mut T)>) {
        let c = T::from_f64;
        let (zero, half, one) = (T::ZERO, c(0.5), T::ONE);
        match self {
            Activation::Identity => map2(places, |_, g| g),
            Activation::Relu => map2(places, |y, g| T::select(y > zero, g, zero)),
            Activation::LeakyRelu(slope) => {
                let s = c(slope);
                map2(places, |k, g| T::select(k > zero, g, s * g));
            }
            Activation::Gelu => map2(places, |x, g| {
                let (cdf, density) = x.normal();
                g * (cdf + x * density)
            }),
            Activation::GeluTanh => {
                let (a, b) = (c(GELU.0), c(GELU.1));
                let b3 = c(3.0 * GELU.1);
                map2(places, |x, g| {
                    let t = Math::tanh(a * (x + b * (x * x * x)));
                    let slope = a * (one + b3 * (x * x));
                    g * (half * (one + t) + half * x * ((one - t * t) * slope))
                });
            }
            Activation::Silu => map2(places, |x, g| {
                let s = x.sigmoid();
                g * (s + x * s * (one - s))
            }),
            Activation::Mish => map2(places, |x, g| {
                let t = Math::tanh(x.softplus());
                g * (t + x * ((one - t * t) * x.sigmoid()))
            }),
            Activation::Tanh => map2(places, |y, g| g * (one - y * y)),
            Activation::Sigmoid => map2(places, |y, g| g * (y * (one - y))),
            // 1 - e^-y loses digits for y near 0, where it is y.
            Activation::Softplus => map2(places, |y, g| {
                let series = y * (one - half * y);
                g * T::select(y < c(1e-4), series, one - Math::exp_of_negative(-y))
            }),
        }
    }

    /// The same function by candle operations: any device, gradients of any order.
    pub(crate) fn composed(self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Activation::Identity => x.clone(),
            Activation::Relu => x.relu()?,
            Activation::LeakyRelu(slope) => (x.relu()? - (x.neg()?.relu()? * slope)?)?,
            Activation::Gelu => {
                let phi = ((x * std::f64::consts::FRAC_1_SQRT_2)?.erf()? + 1.0)?;
                ((x * phi)? * 0.5)?
            }
            Activation::GeluTanh => {
                let cubic = ((x.sqr()? * x)? * GELU.1)?;
                let t = ((x + cubic)? * GELU.0)?.tanh()?;
                ((x * (t + 1.0)?)? * 0.5)?
            }
            Activation::Silu => (x * sigmoid(x)?)?,
            Activation::Mish => (x * softplus(x)?.tanh()?)?,
            Activation::Tanh => x.tanh()?,
            Activation::Sigmoid => sigmoid(x)?,
            Activation::Softplus => softplus(x)?,
        })
    }

    /// The activation of a tensor.
    ///
    /// # Errors
    /// [`Error::DType`](crate::Error::DType) for an integer dtype.
    pub fn of(self, x: &Tensor) -> Result<Tensor> {
        let dtype = wide(x.dtype())?;
        if self == Activation::Identity {
            return Ok(x.clone());
        }
        if !has_kernel(x) || keeps_graph()? {
            return Ok(self.composed(&x.to_dtype(dtype)?)?.to_dtype(x.dtype())?);
        }
        match dtype {
            DType::F64 => self.fused::<f64>(&x.contiguous()?),
            _ => self.fused::<f32>(&x.contiguous()?),
        }
    }

    /// The activation of `a + b`, tensors of one shape and dtype: the end of a residual block, in
    /// one pass.
    ///
    /// # Errors
    /// [`Error::Shape`](crate::Error::Shape) and [`Error::DType`](crate::Error::DType) when the two
    /// do not fit.
    pub fn of_sum(self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        if a.dims() != b.dims() {
            let expected = format!("{:?}, as the first summand", a.dims());
            return Err(crate::Error::shape("second summand", b.dims(), expected));
        }
        same_dtype(a, [Some(b)])?;
        if !has_kernel(a) || !self.keeps_output() || keeps_graph()? {
            return self.of(&(a + b)?);
        }
        match a.dtype() {
            DType::F64 => self.fused_sum::<f64>(&a.contiguous()?, &b.contiguous()?),
            _ => self.fused_sum::<f32>(&a.contiguous()?, &b.contiguous()?),
        }
    }

    fn fused_sum<T: Scalar>(self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        let y = {
            let (av, bv) = (View::new(a)?, View::new(b)?);
            let (a, b) = (av.slice::<T>()?, bv.slice::<T>()?);
            filled(a.len(), |y| {
                pieces(y, 1, |start, y| {
                    let range = start..start + y.len();
                    vectorized(
                        #[inline(always)]
                        || {
                            let sums = a[range.clone()].iter().zip(&b[range]);
                            self.each(sums.map(|(a, b)| *a + *b).zip(y));
                        },
                    );
                });
            })
        };
        let backward = move |_: &[&Tensor], y: &Tensor, dy: &Tensor| {
            let dz = self.input_gradient::<T>(y, dy)?;
            Ok(vec![Some(dz.clone()), Some(dz)])
        };
        let node = Computed::new("activation of a sum", y, a.shape(), backward);
        Ok(a.apply_op2(b, node)?)
    }

    fn fused<T: Scalar>(self, x: &Tensor) -> Result<Tensor> {
        let y = {
            let view = View::new(x)?;
            let x = view.slice::<T>()?;
            filled(x.len(), |y| {
                pieces(y, 1, |start, y| {
                    vectorized(
                        #[inline(always)]
                        || self.each(x[start..].iter().copied().zip(y)),
                    );
                });
            })
        };
        let backward = move |arguments: &[&Tensor], y: &Tensor, dy: &Tensor| {
            let kept = if self.keeps_output() { y } else { arguments[0] };
            Ok(vec![Some(self.input_gradient::<T>(kept, dy)?)])
        };
        let node = Computed::new("activation", y, x.shape(), backward);
        Ok(x.apply_op1(node)?)
    }

    /// `dy f'`, of contiguous tensors.
    pub(crate) fn input_gradient<T: Scalar>(self, kept: &Tensor, dy: &Tensor) -> Result<Tensor> {
        if self == Activation::Identity {
            return Ok(dy.clone());
        }
        let dz = {
            let (kept, dy) = (View::new(kept)?, View::new(dy)?);
            let (kept, dy) = (kept.slice::<T>()?, dy.slice::<T>()?);
            filled(dy.len(), |dz| {
                pieces(dz, 1, |start, dz| {
                    let range = start..start + dz.len();
                    vectorized(
                        #[inline(always)]
                        || self.gradient(&kept[range.clone()], &dy[range], dz),
                    );
                });
            })
        };
        tensor(dz, dy.shape())
    }
}

impl Module for Activation {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(self.of(x)?)
    }
}

/// By the hyperbolic tangent, whose gradients are finite everywhere.
fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok((((x * 0.5)?.tanh()? + 1.0)? * 0.5)?)
}

/// `x/2 + |x|/2 + ln(1 + e^-|x|)`: the kinks of the last two terms cancel.
fn softplus(x: &Tensor) -> Result<Tensor> {
    let a = x.abs()?;
    let log = (a.neg()?.exp()? + 1.0)?.log()?;
    Ok(((((x + &a)?) * 0.5)? + log)?)
}

#[inline(always)]
fn map<'a, T: 'a>(pairs: impl Iterator<Item = (T, &'a mut T)>, f: impl Fn(T) -> T) {
    for (x, y) in pairs {
        *y = f(x);
    }
}

#[inline(always)]
fn map2<'a, T: 'a>(places: impl Iterator<Item = ((T, T), &'a mut T)>, f: impl Fn(T, T) -> T) {
    for ((a, b), out) in places {
        *out = f(a, b);
    }
}
