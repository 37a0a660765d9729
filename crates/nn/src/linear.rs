//! A linear layer with its bias and activation in one node of the graph.
//!
//! ```text
//! z = x W^T + b,   y = f(z)
//! dz = dy f'(z),   dx = dz W,   dW = dz^T x,   db = sum over rows of dz
//! ```
//!
//! The products read their operands as they lie in memory; bias and activation are one pass over
//! the output, their gradients one pass over `dy`.
//!
//! ```
//! use candle_core::{DType, Device, Module};
//! use candle_nn::Optimizer;
//! use thalweg_nn::activation::Activation;
//! use thalweg_nn::init::SeededVars;
//! use thalweg_nn::linear::linear;
//! use thalweg_nn::loss::{cross_entropy, Reduction};
//! use thalweg_nn::RandomStream;
//!
//! let vars = SeededVars::new(&RandomStream::new(7));
//! let vb = vars.builder(DType::F32, &Device::Cpu);
//! let hidden = linear(8, 16, vb.pp("hidden"))?.with_activation(Activation::Gelu);
//! let head = linear(16, 3, vb.pp("head"))?;
//! let mut sgd = candle_nn::SGD::new(vars.trainable().into_iter().map(|(_, v)| v).collect(), 0.3)?;
//! let x = RandomStream::new(1).normal(0.0, 1.0, (32, 8), DType::F32, &Device::Cpu)?;
//! let labels = x.narrow(1, 0, 3)?.argmax(1)?;
//! let mut losses = vec![];
//! for _ in 0..30 {
//!     let logits = head.forward(&hidden.forward(&x)?)?;
//!     let loss = cross_entropy(&logits, &labels, Reduction::Mean)?;
//!     sgd.backward_step(&loss)?;
//!     losses.push(loss.to_scalar::<f32>()?);
//! }
//! assert!(losses[29] < 0.8 * losses[0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use crate::activation::Activation;
use crate::kernel::{
    filled, has_kernel, pieces, product, tensor, total, vectorized, Computed, Matrix, Onto, Scalar,
    View,
};
use crate::{Error, Result};
use candle_core::{DType, Module, Shape, Tensor};
use candle_nn::{Init, VarBuilder};
use rayon::prelude::*;
use tensor_core::autograd::keeps_graph;

/// `y = f(x W^T + b)` over the last dimension of `x` `[.., in]`: the parameters and the
/// constructors of [`candle_nn::Linear`].
///
/// Fused on the CPU in f32 and f64, with the same bits for any number of threads. On other devices,
/// in other dtypes and where gradients keep their graph: candle operations, differentiable any
/// number of times.
#[derive(Debug, Clone)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
    activation: Activation,
}

/// A [`Linear`] from the variables `weight` `[out, in]` and `bias` `[out]`, with candle_nn's
/// initial values.
///
/// # Errors
/// Candle's, when variables do not fit.
pub fn linear(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    let bound = 1.0 / (in_dim as f64).sqrt();
    let uniform = Init::Uniform {
        lo: -bound,
        up: bound,
    };
    let layer = linear_no_bias(in_dim, out_dim, vb.clone())?;
    let bias = vb.get_with_hints(out_dim, "bias", uniform)?;
    Ok(Linear {
        bias: Some(bias),
        ..layer
    })
}

/// A [`Linear`] from the variable `weight` `[out, in]` alone.
///
/// # Errors
/// Candle's, when the variable does not fit.
pub fn linear_no_bias(in_dim: usize, out_dim: usize, vb: VarBuilder) -> Result<Linear> {
    let init = candle_nn::init::DEFAULT_KAIMING_NORMAL;
    let weight = vb.get_with_hints((out_dim, in_dim), "weight", init)?;
    Ok(Linear::new(weight, None))
}

/// [`linear`] or [`linear_no_bias`].
///
/// # Errors
/// Candle's, when variables do not fit.
pub fn linear_b(in_dim: usize, out_dim: usize, bias: bool, vb: VarBuilder) -> Result<Linear> {
    match bias {
        true => linear(in_dim, out_dim, vb),
        false => linear_no_bias(in_dim, out_dim, vb),
    }
}

impl Linear {
    /// From existing tensors `[out, in]` and `[out]`; they are checked by each call.
    pub fn new(weight: Tensor, bias: Option<Tensor>) -> Self {
        Self {
            weight,
            bias,
            activation: Activation::Identity,
        }
    }

    /// The same layer followed by an activation, fused.
    #[must_use]
    pub fn with_activation(self, activation: Activation) -> Self {
        Self { activation, ..self }
    }

    /// The weight `[out, in]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// The bias `[out]`, where there is one.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }

    /// What follows.
    pub fn activation(&self) -> Activation {
        self.activation
    }
}

impl Module for Linear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        Ok(linear_activation(
            x,
            &self.weight,
            self.bias.as_ref(),
            self.activation,
        )?)
    }
}

/// `f(x weight^T + bias)` for `x` `[.., in]`, `weight` `[out, in]` and `bias` `[out]`; gives
/// `[.., out]`. See [`Linear`].
///
/// # Errors
/// [`Error::Shape`] when shapes do not fit or `x` is empty, [`Error::DType`] when dtypes differ.
pub fn linear_activation(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let (outputs, inputs) = match weight.dims() {
        [outputs, inputs] => (*outputs, *inputs),
        other => return Err(Error::shape("weight", other, "[out, in]")),
    };
    if x.rank() == 0 || x.elem_count() == 0 || x.dims().last() != Some(&inputs) {
        let expected = format!("a non-empty [.., {inputs}]");
        return Err(Error::shape("input", x.dims(), expected));
    }
    check_bias(bias, outputs)?;
    same_dtype(x, [Some(weight), bias])?;
    if !has_kernel(x) || keeps_graph()? {
        let flat = x.reshape(((), inputs))?;
        let z = flat.matmul(&weight.t()?)?;
        let z = match bias {
            Some(bias) => z.broadcast_add(bias)?,
            None => z,
        };
        let mut dims = x.dims().to_vec();
        dims[x.rank() - 1] = outputs;
        return Ok(activation.composed(&z)?.reshape(dims)?);
    }
    match x.dtype() {
        DType::F64 => fused::<f64>(x, weight, bias, activation),
        _ => fused::<f32>(x, weight, bias, activation),
    }
}

pub(crate) fn check_bias(bias: Option<&Tensor>, outputs: usize) -> Result<()> {
    match bias {
        Some(bias) if bias.dims() != [outputs] => {
            Err(Error::shape("bias", bias.dims(), format!("[{outputs}]")))
        }
        _ => Ok(()),
    }
}

/// The parameters must have the input's dtype.
pub(crate) fn same_dtype<const N: usize>(x: &Tensor, others: [Option<&Tensor>; N]) -> Result<()> {
    let other = others
        .into_iter()
        .flatten()
        .find(|t| t.dtype() != x.dtype());
    match other {
        Some(other) => {
            let expected = format!("{:?}, as the parameters", other.dtype());
            Err(Error::dtype("input", x.dtype(), expected))
        }
        None => Ok(()),
    }
}

/// `z <- f(z + bias)`, row by row.
#[inline(always)]
pub(crate) fn finish<T: Scalar>(rows: &mut [T], bias: Option<&[T]>, activation: Activation) {
    let Some(bias) = bias else {
        return activation.apply(rows);
    };
    for row in rows.chunks_exact_mut(bias.len()) {
        activation.each(row.iter_mut().zip(bias).map(|(y, b)| (*y + *b, y)));
    }
}

/// Adds the bias to `z` and gives `f(z)`.
fn finish_beside<T: Scalar>(
    z: &mut [T],
    bias: Option<&[T]>,
    width: usize,
    activation: Activation,
) -> Vec<T> {
    let size = crate::kernel::piece_of(width) * width;
    filled(z.len(), |y| {
        let pairs = y.par_chunks_mut(size).zip(z.par_chunks_mut(size));
        pairs.for_each(|(y, z)| {
            vectorized(
                #[inline(always)]
                || {
                    finish(z, bias, Activation::Identity);
                    activation.each(z.iter().copied().zip(y));
                },
            );
        });
    })
}

fn fused<T: Scalar>(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    activation: Activation,
) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let (outputs, inputs) = weight.dims2()?;
    let rows = x.elem_count() / inputs;
    let (y, z) = {
        let (xv, wv) = (View::new(&x)?, View::new(&weight)?);
        let a = Matrix::new(xv.slice::<T>()?, rows, inputs);
        let w = Matrix::new(wv.slice::<T>()?, outputs, inputs);
        let bv = bias.as_ref().map(View::new).transpose()?;
        let b = bv.as_ref().map(View::slice::<T>).transpose()?;
        let mut z = filled(rows * outputs, |z| {
            product((z, outputs), a, w.t(), (Onto::Nothing, T::ONE), true);
        });
        if activation.keeps_output() {
            pieces(&mut z, outputs, |_, z| {
                vectorized(
                    #[inline(always)]
                    || finish(z, b, activation),
                );
            });
            (z, None)
        } else {
            let y = finish_beside(&mut z, b, outputs, activation);
            (y, Some(z))
        }
    };
    let mut dims = x.dims().to_vec();
    dims[x.rank() - 1] = outputs;
    let shape = Shape::from(dims);
    let z = z.map(|z| tensor(z, &shape)).transpose()?;
    let backward = move |arguments: &[&Tensor], y: &Tensor, dy: &Tensor| {
        let kept = z.as_ref().unwrap_or(y);
        gradients::<T>(arguments, kept, dy, activation)
    };
    let node = Computed::new("linear", y, &shape, backward);
    Ok(match &bias {
        Some(bias) => x.apply_op3(&weight, bias, node)?,
        None => x.apply_op2(&weight, node)?,
    })
}

/// Gradients of input, weight and bias.
fn gradients<T: Scalar>(
    arguments: &[&Tensor],
    kept: &Tensor,
    dy: &Tensor,
    activation: Activation,
) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (arguments[0], arguments[1]);
    let wanted = |i: usize| arguments.get(i).is_some_and(|t| t.track_op());
    let (outputs, inputs) = weight.dims2()?;
    let rows = x.elem_count() / inputs;
    let (kept, dyv) = (View::new(kept)?, View::new(dy)?);
    let (kept, dy) = (kept.slice::<T>()?, dyv.slice::<T>()?);
    let (dz, db) = output_gradient(kept, dy, outputs, activation, wanted(2));
    let dz = dz.as_deref().unwrap_or(dy);
    let dz = Matrix::new(dz, rows, outputs);
    let dx = match wanted(0) {
        true => {
            let view = View::new(weight)?;
            let w = Matrix::new(view.slice::<T>()?, outputs, inputs);
            let dx = filled(rows * inputs, |dx| {
                product((dx, inputs), dz, w, (Onto::Nothing, T::ONE), true);
            });
            Some(tensor(dx, x.shape())?)
        }
        false => None,
    };
    let dw = match wanted(1) {
        true => {
            let view = View::new(x)?;
            let x = Matrix::new(view.slice::<T>()?, rows, inputs);
            let dw = filled(outputs * inputs, |dw| {
                product((dw, inputs), dz.t(), x, (Onto::Nothing, T::ONE), true);
            });
            Some(tensor(dw, weight.shape())?)
        }
        false => None,
    };
    let db = match wanted(2) {
        true => Some(tensor(db, &Shape::from(outputs))?),
        false => None,
    };
    Ok(vec![dx, dw, db])
}

/// `dz = dy f'` for rows of `width` numbers (none where it is `dy`), and its sums over the rows, where
/// they are wanted.
pub(crate) fn output_gradient<T: Scalar>(
    kept: &[T],
    dy: &[T],
    width: usize,
    activation: Activation,
    sums: bool,
) -> (Option<Vec<T>>, Vec<T>) {
    if activation == Activation::Identity {
        return match sums {
            true => (None, column_sums(dy, width)),
            false => (None, vec![]),
        };
    }
    let mut db = vec![];
    let dz = filled(dy.len(), |dz| {
        let parts = pieces(dz, width, |start, dz| {
            let range = start * width..start * width + dz.len();
            vectorized(
                #[inline(always)]
                || {
                    activation.gradient(&kept[range.clone()], &dy[range], dz);
                    match sums {
                        true => sum_rows(dz, width),
                        false => vec![],
                    }
                },
            )
        });
        db = total(width, parts);
    });
    (Some(dz), db)
}

/// Sums over the rows of `[.., width]`.
#[inline(always)]
pub(crate) fn sum_rows<T: Scalar>(rows: &[T], width: usize) -> Vec<T> {
    let mut sums = vec![T::ZERO; width];
    for row in rows.chunks_exact(width) {
        for (s, x) in sums.iter_mut().zip(row) {
            *s = *s + *x;
        }
    }
    sums
}

/// [`sum_rows`] in parallel, in a fixed order.
pub(crate) fn column_sums<T: Scalar>(rows: &[T], width: usize) -> Vec<T> {
    let size = crate::kernel::piece_of(width) * width;
    let one = |part: &[T]| {
        vectorized(
            #[inline(always)]
            || sum_rows(part, width),
        )
    };
    match rows.len() <= size {
        true => one(rows),
        false => {
            let parts: Vec<Vec<T>> = rows.par_chunks(size).map(one).collect();
            total(width, parts)
        }
    }
}
