//! The layers.

use super::geometry::{Geometry, Settings};
use super::maps;
use crate::activation::Activation;
use crate::kernel::{has_kernel, pieces, sum, tensor, total, vectorized, Computed, Scalar, View};
use crate::linear::{check_bias, same_dtype};
use crate::{Error, Result};
use candle_core::{DType, Module, Shape, Tensor};
use candle_nn::{
    Conv1dConfig, Conv2dConfig, ConvTranspose1dConfig, ConvTranspose2dConfig, Init, VarBuilder,
};
use tensor_core::autograd::keeps_graph;

/// Weight, bias and activation of every layer.
#[derive(Debug, Clone)]
struct Parameters {
    weight: Tensor,
    bias: Option<Tensor>,
    activation: Activation,
}

macro_rules! layer {
    ($(#[$doc:meta])* $name:ident, $config:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone)]
        pub struct $name {
            parameters: Parameters,
            config: $config,
        }

        impl $name {
            /// From existing tensors; they are checked by each call.
            pub fn new(weight: Tensor, bias: Option<Tensor>, config: $config) -> Self {
                let parameters = Parameters {
                    weight,
                    bias,
                    activation: Activation::Identity,
                };
                Self { parameters, config }
            }

            /// The same layer followed by an activation, fused.
            #[must_use]
            pub fn with_activation(mut self, activation: Activation) -> Self {
                self.parameters.activation = activation;
                self
            }

            /// The weight.
            pub fn weight(&self) -> &Tensor {
                &self.parameters.weight
            }

            /// The bias, where there is one.
            pub fn bias(&self) -> Option<&Tensor> {
                self.parameters.bias.as_ref()
            }

            /// The configuration.
            pub fn config(&self) -> &$config {
                &self.config
            }

            /// What follows.
            pub fn activation(&self) -> Activation {
                self.parameters.activation
            }
        }
    };
}

layer! {
    /// A convolution of `[B, C, L]` with `weight` `[out, C / groups, k]` and `bias` `[out]`; gives
    /// `[B, out, L']` with `L' = (L + 2 padding - dilation (k - 1) - 1) / stride + 1`.
    Conv1d, Conv1dConfig
}
layer! {
    /// A convolution of `[B, C, H, W]` with `weight` `[out, C / groups, k, k']` and `bias` `[out]`;
    /// gives `[B, out, H', W']` with sizes as in [`Conv1d`].
    Conv2d, Conv2dConfig
}
layer! {
    /// A transposed convolution of `[B, C, L]` with `weight` `[C, out / groups, k]` and `bias`
    /// `[out]`; gives `[B, out, L']` with
    /// `L' = (L - 1) stride - 2 padding + dilation (k - 1) + output_padding + 1`.
    ConvTranspose1d, ConvTranspose1dConfig
}
layer! {
    /// A transposed convolution of `[B, C, H, W]` with `weight` `[C, out, k, k']` and `bias`
    /// `[out]`; gives `[B, out, H', W']` with sizes as in [`ConvTranspose1d`].
    ConvTranspose2d, ConvTranspose2dConfig
}

impl Module for Conv1d {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let Conv1dConfig {
            padding,
            stride,
            dilation,
            groups,
            cudnn_fwd_algo,
        } = self.config;
        let settings = Settings {
            rank: 1,
            stride,
            padding,
            dilation,
            groups,
            output_padding: 0,
        };
        let geometry = Geometry::forward(x, self.weight(), &settings)?;
        let by_candle = |x: &Tensor| {
            x.conv1d_with_algo(
                self.weight(),
                padding,
                stride,
                dilation,
                groups,
                cudnn_fwd_algo,
            )
        };
        Ok(run(
            x,
            &self.parameters,
            geometry,
            maps::Map::Forward,
            by_candle,
        )?)
    }
}

impl Module for Conv2d {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let Conv2dConfig {
            padding,
            stride,
            dilation,
            groups,
            cudnn_fwd_algo,
        } = self.config;
        let settings = Settings {
            rank: 2,
            stride,
            padding,
            dilation,
            groups,
            output_padding: 0,
        };
        let geometry = Geometry::forward(x, self.weight(), &settings)?;
        let by_candle = |x: &Tensor| {
            x.conv2d_with_algo(
                self.weight(),
                padding,
                stride,
                dilation,
                groups,
                cudnn_fwd_algo,
            )
        };
        Ok(run(
            x,
            &self.parameters,
            geometry,
            maps::Map::Forward,
            by_candle,
        )?)
    }
}

impl Module for ConvTranspose1d {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let ConvTranspose1dConfig {
            padding,
            output_padding,
            stride,
            dilation,
            groups,
        } = self.config;
        let settings = Settings {
            rank: 1,
            stride,
            padding,
            dilation,
            groups,
            output_padding,
        };
        let geometry = Geometry::transposed(x, self.weight(), &settings)?;
        let by_candle = |x: &Tensor| {
            if x.track_op() || self.weight().track_op() {
                return Err(Error::Unsupported {
                    operation: "the gradient of conv_transpose1d".into(),
                    context: "outside the CPU in f32 and f64".into(),
                }
                .into());
            }
            x.conv_transpose1d(
                self.weight(),
                padding,
                output_padding,
                stride,
                dilation,
                groups,
            )
        };
        Ok(run(
            x,
            &self.parameters,
            geometry,
            maps::Map::Transposed,
            by_candle,
        )?)
    }
}

impl Module for ConvTranspose2d {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let ConvTranspose2dConfig {
            padding,
            output_padding,
            stride,
            dilation,
        } = self.config;
        let settings = Settings {
            rank: 2,
            stride,
            padding,
            dilation,
            groups: 1,
            output_padding,
        };
        let geometry = Geometry::transposed(x, self.weight(), &settings)?;
        let by_candle = |x: &Tensor| {
            x.conv_transpose2d(self.weight(), padding, output_padding, stride, dilation)
        };
        Ok(run(
            x,
            &self.parameters,
            geometry,
            maps::Map::Transposed,
            by_candle,
        )?)
    }
}

/// One of the two maps with bias and activation, by the path that the input allows.
fn run(
    x: &Tensor,
    parameters: &Parameters,
    geometry: Geometry,
    map: maps::Map,
    by_candle: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
) -> Result<Tensor> {
    let Parameters {
        weight,
        bias,
        activation,
    } = parameters;
    let bias = bias.as_ref();
    let channels = match map {
        maps::Map::Forward => geometry.groups * geometry.outputs,
        maps::Map::Transposed => geometry.groups * geometry.inputs,
    };
    check_bias(bias, channels)?;
    same_dtype(x, [Some(weight), bias])?;
    if has_kernel(x) && !keeps_graph()? {
        // What the activation's derivative needs must be the output.
        let (fused, after) = match activation.keeps_output() {
            true => (*activation, Activation::Identity),
            false => (Activation::Identity, *activation),
        };
        let arguments = (x, weight, bias);
        let y = match x.dtype() {
            DType::F64 => node::<f64>(arguments, fused, geometry, map)?,
            _ => node::<f32>(arguments, fused, geometry, map)?,
        };
        return after.of(&y);
    }
    let z = match (has_kernel(x), map) {
        (true, maps::Map::Forward) => maps::convolve(x, weight, geometry)?,
        (true, maps::Map::Transposed) => maps::input_gradient(x, weight, geometry)?,
        (false, _) => by_candle(&x.contiguous()?)?,
    };
    let z = match bias {
        Some(bias) => {
            let mut dims = vec![1; z.rank()];
            dims[1] = channels;
            z.broadcast_add(&bias.reshape(dims)?)?
        }
        None => z,
    };
    activation.composed(&z)
}

type Arguments<'a> = (&'a Tensor, &'a Tensor, Option<&'a Tensor>);

/// The fused node.
fn node<T: Scalar>(
    (x, weight, bias): Arguments<'_>,
    activation: Activation,
    g: Geometry,
    map: maps::Map,
) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let (y, shape) = match map {
        maps::Map::Forward => (
            maps::forward::<T>(&x, &weight, bias.as_ref(), activation, &g)?,
            g.output_shape(),
        ),
        maps::Map::Transposed => (
            maps::transposed::<T>(&x, &weight, bias.as_ref(), activation, &g)?,
            g.input_shape(),
        ),
    };
    let backward = move |arguments: &[&Tensor], y: &Tensor, dy: &Tensor| {
        gradients::<T>(arguments, y, dy, activation, &g, map)
    };
    let node = Computed::new("convolution", y, &shape, backward);
    Ok(match &bias {
        Some(bias) => x.apply_op3(&weight, bias, node)?,
        None => x.apply_op2(&weight, node)?,
    })
}

fn gradients<T: Scalar>(
    arguments: &[&Tensor],
    y: &Tensor,
    dy: &Tensor,
    activation: Activation,
    g: &Geometry,
    map: maps::Map,
) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (arguments[0], arguments[1]);
    let wanted = |i: usize| arguments.get(i).is_some_and(|t| t.track_op());
    let (dz, db) = output_gradient::<T>(y, dy, activation, wanted(2))?;
    let dx = match (wanted(0), map) {
        (false, _) => None,
        (true, maps::Map::Forward) => {
            let identity = Activation::Identity;
            let dx = maps::transposed::<T>(&dz, weight, None, identity, g)?;
            Some(tensor(dx, x.shape())?)
        }
        (true, maps::Map::Transposed) => {
            let dx = maps::forward::<T>(&dz, weight, None, Activation::Identity, g)?;
            Some(tensor(dx, x.shape())?)
        }
    };
    let dw = match wanted(1) {
        true => {
            let (xv, dzv) = (View::new(x)?, View::new(&dz)?);
            // The transposed layer's output is the `x` of the geometry.
            let dw = match map {
                maps::Map::Forward => maps::weight_sums::<T>(xv.slice()?, dzv.slice()?, g),
                maps::Map::Transposed => maps::weight_sums::<T>(dzv.slice()?, xv.slice()?, g),
            };
            Some(tensor(dw, weight.shape())?)
        }
        false => None,
    };
    let db = db
        .map(|db| tensor(db, &Shape::from(arguments[2].dims())))
        .transpose()?;
    Ok(vec![dx, dw, db])
}

/// `dz = dy f'`, and its sums over everything but the channels in the same pass.
fn output_gradient<T: Scalar>(
    y: &Tensor,
    dy: &Tensor,
    activation: Activation,
    sums: bool,
) -> Result<(Tensor, Option<Vec<T>>)> {
    let channels = y.dims()[1];
    let plane: usize = y.dims()[2..].iter().product();
    let identity = activation == Activation::Identity;
    if identity && !sums {
        return Ok((dy.clone(), None));
    }
    let (yv, dyv) = (View::new(y)?, View::new(dy)?);
    let (y, g) = (yv.slice::<T>()?, dyv.slice::<T>()?);
    let width = channels * plane;
    let mut db = vec![];
    let mut dz = dy.clone();
    if identity {
        use rayon::prelude::*;
        let parts: Vec<Vec<T>> = g
            .par_chunks(width)
            .map(|g| {
                vectorized(
                    #[inline(always)]
                    || plane_sums(g, plane),
                )
            })
            .collect();
        db = total(channels, parts);
    } else {
        let out = crate::kernel::filled(g.len(), |dz| {
            let parts = pieces(dz, width, |first, dz| {
                let range = first * width..first * width + dz.len();
                vectorized(
                    #[inline(always)]
                    || {
                        activation.gradient(&y[range.clone()], &g[range], dz);
                        match sums {
                            true => image_sums(dz, channels, plane),
                            false => vec![],
                        }
                    },
                )
            });
            db = total(channels, parts);
        });
        dz = tensor(out, dy.shape())?;
    }
    Ok((dz, sums.then_some(db)))
}

/// The sum of each plane.
#[inline(always)]
fn plane_sums<T: Scalar>(image: &[T], plane: usize) -> Vec<T> {
    let mut sums = Vec::with_capacity(image.len() / plane);
    for plane in image.chunks_exact(plane) {
        sums.push(sum(plane, |g| g));
    }
    sums
}

/// The sums of the planes of each channel over images.
#[inline(always)]
fn image_sums<T: Scalar>(images: &[T], channels: usize, plane: usize) -> Vec<T> {
    let mut sums = vec![T::ZERO; channels];
    for image in images.chunks_exact(channels * plane) {
        for (total, plane) in sums.iter_mut().zip(image.chunks_exact(plane)) {
            *total = *total + sum(plane, |g| g);
        }
    }
    sums
}

fn uniform(bound: f64) -> Init {
    Init::Uniform {
        lo: -bound,
        up: bound,
    }
}

/// Channels must split into groups before shapes are computed from them.
fn check_groups(field: &'static str, channels: usize, groups: usize) -> Result<()> {
    if groups > 0 && channels.is_multiple_of(groups) {
        return Ok(());
    }
    Err(Error::config(
        field,
        groups,
        format!("a divisor of {channels} channels"),
    ))
}

/// A [`Conv1d`] from the variables `weight` and `bias`, with candle_nn's initial values.
///
/// # Errors
/// [`Error::InvalidConfig`] for groups that do not divide the channels; candle's, when variables do
/// not fit.
pub fn conv1d(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: Conv1dConfig,
    vb: VarBuilder,
) -> Result<Conv1d> {
    let mut layer = conv1d_no_bias(in_channels, out_channels, kernel_size, config, vb.clone())?;
    let init = uniform(1.0 / (in_channels as f64).sqrt());
    layer.parameters.bias = Some(vb.get_with_hints(out_channels, "bias", init)?);
    Ok(layer)
}

/// [`conv1d`] without a bias.
///
/// # Errors
/// As [`conv1d`].
pub fn conv1d_no_bias(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: Conv1dConfig,
    vb: VarBuilder,
) -> Result<Conv1d> {
    check_groups("Conv1dConfig::groups", in_channels, config.groups)?;
    let shape = (out_channels, in_channels / config.groups, kernel_size);
    let weight = vb.get_with_hints(shape, "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
    Ok(Conv1d::new(weight, None, config))
}

/// A [`Conv2d`] with a square kernel from the variables `weight` and `bias`, with candle_nn's
/// initial values.
///
/// # Errors
/// As [`conv1d`].
pub fn conv2d(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: Conv2dConfig,
    vb: VarBuilder,
) -> Result<Conv2d> {
    let mut layer = conv2d_no_bias(in_channels, out_channels, kernel_size, config, vb.clone())?;
    let init = uniform(1.0 / (in_channels as f64).sqrt());
    layer.parameters.bias = Some(vb.get_with_hints(out_channels, "bias", init)?);
    Ok(layer)
}

/// [`conv2d`] without a bias.
///
/// # Errors
/// As [`conv1d`].
pub fn conv2d_no_bias(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: Conv2dConfig,
    vb: VarBuilder,
) -> Result<Conv2d> {
    check_groups("Conv2dConfig::groups", in_channels, config.groups)?;
    let shape = (
        out_channels,
        in_channels / config.groups,
        kernel_size,
        kernel_size,
    );
    let weight = vb.get_with_hints(shape, "weight", candle_nn::init::DEFAULT_KAIMING_NORMAL)?;
    Ok(Conv2d::new(weight, None, config))
}

/// A [`ConvTranspose1d`] from the variables `weight` and `bias`, with candle_nn's initial values.
///
/// # Errors
/// As [`conv1d`].
pub fn conv_transpose1d(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: ConvTranspose1dConfig,
    vb: VarBuilder,
) -> Result<ConvTranspose1d> {
    let mut layer =
        conv_transpose1d_no_bias(in_channels, out_channels, kernel_size, config, vb.clone())?;
    let init = uniform(1.0 / (out_channels as f64 * kernel_size as f64).sqrt());
    layer.parameters.bias = Some(vb.get_with_hints(out_channels, "bias", init)?);
    Ok(layer)
}

/// [`conv_transpose1d`] without a bias.
///
/// # Errors
/// As [`conv1d`].
pub fn conv_transpose1d_no_bias(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: ConvTranspose1dConfig,
    vb: VarBuilder,
) -> Result<ConvTranspose1d> {
    check_groups("ConvTranspose1dConfig::groups", out_channels, config.groups)?;
    let init = uniform(1.0 / (out_channels as f64 * kernel_size as f64).sqrt());
    let shape = (in_channels, out_channels / config.groups, kernel_size);
    let weight = vb.get_with_hints(shape, "weight", init)?;
    Ok(ConvTranspose1d::new(weight, None, config))
}

/// A [`ConvTranspose2d`] with a square kernel from the variables `weight` and `bias`, with
/// candle_nn's initial values.
///
/// # Errors
/// Candle's, when variables do not fit.
pub fn conv_transpose2d(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: ConvTranspose2dConfig,
    vb: VarBuilder,
) -> Result<ConvTranspose2d> {
    let mut layer =
        conv_transpose2d_no_bias(in_channels, out_channels, kernel_size, config, vb.clone())?;
    let init = uniform(1.0 / (out_channels as f64).sqrt() / kernel_size as f64);
    layer.parameters.bias = Some(vb.get_with_hints(out_channels, "bias", init)?);
    Ok(layer)
}

/// [`conv_transpose2d`] without a bias.
///
/// # Errors
/// Candle's, when the variable does not fit.
pub fn conv_transpose2d_no_bias(
    in_channels: usize,
    out_channels: usize,
    kernel_size: usize,
    config: ConvTranspose2dConfig,
    vb: VarBuilder,
) -> Result<ConvTranspose2d> {
    let init = uniform(1.0 / (out_channels as f64).sqrt() / kernel_size as f64);
    let shape = (in_channels, out_channels, kernel_size, kernel_size);
    let weight = vb.get_with_hints(shape, "weight", init)?;
    Ok(ConvTranspose2d::new(weight, None, config))
}
