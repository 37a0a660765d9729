//! Convolutions of one and two dimensions and their transposes, with exact gradients.
//!
//! ```text
//! y[b, o, p]  = f(bias[o] + sum over c, t of w[o, c, t] x[b, c, s p + d t - padding])
//! dx          = the transposed map of dz,   dw = sum over b, p of dz x,   dz = dy f'
//! ```
//!
//! On the CPU, in f32 and f64, none of the three maps forms a matrix of patches: each image is
//! copied once into a padded buffer in which the inputs of neighboring outputs are neighbors
//! (a stride splits it into phases), and register tiles of outputs read it in place, for any
//! kernel, stride, padding, dilation and number of groups. Bias and activation are applied while an
//! image is in the cache. The bits do not depend on the number of threads. Sequences whose channels come
//! last ([`Conv1d::forward_rows`]) are products over shifted rows: the norms and linear layers around
//! them need no change of layout.
//!
//! The layers have the constructors, the configurations and the variables of candle_nn's; there
//! `conv_transpose1d` has no gradient. Where gradients keep their graph
//! (`CANDLE_GRAD_DO_NOT_DETACH=1`) each of the three maps is differentiated through the other two,
//! any number of times. On other devices and in other dtypes, candle's own convolutions run, with
//! candle's gradients.
//!
//! ```
//! use candle_core::{DType, Device, Module};
//! use candle_nn::{Conv2dConfig, Optimizer};
//! use thalweg_nn::activation::Activation;
//! use thalweg_nn::conv::conv2d;
//! use thalweg_nn::init::SeededVars;
//! use thalweg_nn::RandomStream;
//!
//! let vars = SeededVars::new(&RandomStream::new(7));
//! let vb = vars.builder(DType::F32, &Device::Cpu);
//! let config = Conv2dConfig { padding: 1, stride: 2, ..Default::default() };
//! let conv = conv2d(3, 8, 3, config, vb.pp("conv"))?.with_activation(Activation::Relu);
//! let x = RandomStream::new(1).normal(0.0, 1.0, (4, 3, 9, 9), DType::F32, &Device::Cpu)?;
//! let y = conv.forward(&x)?;
//! assert_eq!(y.dims(), &[4, 8, 5, 5]);
//! let mut sgd = candle_nn::SGD::new(vars.trainable().into_iter().map(|(_, v)| v).collect(), 0.1)?;
//! sgd.backward_step(&(y - 1.0)?.sqr()?.mean_all()?)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod geometry;
mod layers;
mod maps;
mod rows;

pub use layers::{
    conv1d, conv1d_no_bias, conv2d, conv2d_no_bias, conv_transpose1d, conv_transpose1d_no_bias,
    conv_transpose2d, conv_transpose2d_no_bias, Conv1d, Conv2d, ConvTranspose1d, ConvTranspose2d,
};
