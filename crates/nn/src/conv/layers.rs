//! The layers.

use super::geometry::{Geometry, Settings};
use super::{maps, rows};
use crate::activation::Activation;
use crate::kernel::{has_kernel, pieces, sum, tensor, vectorized, Computed, Scalar, View};
use crate::linear::{check_bias, same_dtype, sum_rows};
use crate::{Error, Result};
use candle_core::{DType, Module, Tensor};
use candle_nn::{
    Conv1dConfig, Conv2dConfig, ConvTranspose1dConfig, ConvTranspose2dConfig, Init, VarBuilder,
};
use rayon::prelude::*;
use tensor_core::autograd::keeps_graph;
use tensor_core::kernels::conv::Map;

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

impl Conv1d {
    fn settings(&self) -> Settings {
        let config = self.config;
        Settings {
            rank: 1,
            stride: config.stride,
            padding: config.padding,
            dilation: config.dilation,
            groups: config.groups,
            output_padding: 0,
        }
    }

    /// The same convolution of sequences whose channels come last, as layers over rows have them: `x`
    /// `[B, L, C]`, contiguous, gives `[B, L', out]`. Without a stride and without groups it is the
    /// faster of the two; with them, the layouts are changed before and after.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::DType`] when tensors do not fit.
    pub fn forward_rows(&self, x: &Tensor) -> Result<Tensor> {
        if x.rank() != 3 {
            return Err(Error::shape("input", x.dims(), "[B, L, C]"));
        }
        let channels_first = x.transpose(1, 2)?;
        let geometry = Geometry::forward(&channels_first, self.weight(), &self.settings())?;
        let Conv1dConfig { stride, groups, .. } = self.config;
        if !has_kernel(x) || keeps_graph()? || stride * groups > 1 {
            let y = self.forward(&channels_first)?;
            return Ok(y.transpose(1, 2)?.contiguous()?);
        }
        let Parameters {
            weight,
            bias,
            activation,
        } = &self.parameters;
        check_bias(bias.as_ref(), geometry.window.outputs)?;
        same_dtype(x, [Some(weight), bias.as_ref()])?;
        let (fused, after) = split(*activation);
        let parameters = (weight, bias.as_ref());
        let y = match x.dtype() {
            DType::F64 => rows::node::<f64>(x, parameters, fused, geometry)?,
            _ => rows::node::<f32>(x, parameters, fused, geometry)?,
        };
        after.of(&y)
    }
}

/// What is applied in a node, and what after it: what the derivative needs must be the output.
fn split(activation: Activation) -> (Activation, Activation) {
    match activation.keeps_output() {
        true => (activation, Activation::Identity),
        false => (Activation::Identity, activation),
    }
}

impl Module for Conv1d {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let geometry = Geometry::forward(x, self.weight(), &self.settings())?;
        let config = self.config;
        let by_candle = |x: &Tensor| {
            x.conv1d_with_algo(
                self.weight(),
                config.padding,
                config.stride,
                config.dilation,
                config.groups,
                config.cudnn_fwd_algo,
            )
        };
        Ok(run(x, &self.parameters, geometry, Map::Forward, by_candle)?)
    }
}

impl Conv2d {
    /// The same convolution without its bias.
    pub(crate) fn without_bias(&self) -> Self {
        let mut plain = self.clone();
        plain.parameters.bias = None;
        plain
    }

    /// `f(x * w + bias + shift)` with a number for each channel of each image, `shift` `[B, out]`: how
    /// a denoiser is told its level. One pass, like [`forward`](Module::forward).
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::DType`] when tensors do not fit.
    pub fn forward_shifted(&self, x: &Tensor, shift: &Tensor) -> Result<Tensor> {
        let (geometry, _) = self.geometry(x)?;
        let expected = [geometry.batch, geometry.groups * geometry.window.outputs];
        if shift.dims() != expected {
            let expected = format!("{expected:?}, images and channels");
            return Err(Error::shape("shift", shift.dims(), expected));
        }
        let bias = self.parameters.bias.as_ref();
        check_bias(bias, expected[1])?;
        let added = match bias {
            Some(bias) => {
                same_dtype(x, [Some(bias), Some(shift)])?;
                shift.broadcast_add(bias)?
            }
            None => shift.clone(),
        };
        self.run(x, Some(&added))
    }

    /// `f(x * w + bias + onto)` with `onto` of the shape of the result: the end of a residual block. One
    /// pass in a layer without a bias.
    ///
    /// # Errors
    /// As [`forward_shifted`](Self::forward_shifted).
    pub fn forward_onto(&self, x: &Tensor, onto: &Tensor) -> Result<Tensor> {
        let (geometry, _) = self.geometry(x)?;
        let shape = geometry.output_shape();
        if onto.shape() != &shape {
            let expected = format!("{:?}, as the result", shape.dims());
            return Err(Error::shape("summand", onto.dims(), expected));
        }
        let Some(bias) = &self.parameters.bias else {
            return self.run(x, Some(onto));
        };
        check_bias(Some(bias), geometry.groups * geometry.window.outputs)?;
        same_dtype(x, [Some(bias), Some(onto)])?;
        let onto = onto.broadcast_add(&bias.reshape((1, (), 1, 1))?)?;
        self.run(x, Some(&onto))
    }

    fn geometry(&self, x: &Tensor) -> Result<(Geometry, Conv2dConfig)> {
        let config = self.config;
        let settings = Settings {
            rank: 2,
            stride: config.stride,
            padding: config.padding,
            dilation: config.dilation,
            groups: config.groups,
            output_padding: 0,
        };
        Ok((Geometry::forward(x, self.weight(), &settings)?, config))
    }

    fn run(&self, x: &Tensor, added: Option<&Tensor>) -> Result<Tensor> {
        let (geometry, config) = self.geometry(x)?;
        let by_candle = |x: &Tensor| {
            x.conv2d_with_algo(
                self.weight(),
                config.padding,
                config.stride,
                config.dilation,
                config.groups,
                config.cudnn_fwd_algo,
            )
        };
        let map = (geometry, Map::Forward);
        run_with(x, &self.parameters, added, map, by_candle)
    }
}

impl Module for Conv2d {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (geometry, _) = self.geometry(x)?;
        let bias = self.parameters.bias.as_ref();
        check_bias(bias, geometry.groups * geometry.window.outputs)?;
        Ok(self.run(x, bias)?)
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
            Map::Transposed,
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
            Map::Transposed,
            by_candle,
        )?)
    }
}

/// One of the two maps with bias and activation, by the path that the input allows.
fn run(
    x: &Tensor,
    parameters: &Parameters,
    geometry: Geometry,
    map: Map,
    by_candle: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
) -> Result<Tensor> {
    let bias = parameters.bias.as_ref();
    check_bias(bias, channels(&geometry, map))?;
    run_with(x, parameters, bias, (geometry, map), by_candle)
}

/// Channels of the result.
fn channels(g: &Geometry, map: Map) -> usize {
    g.groups * map.channels(&g.window)
}

/// `f(map(x) + added)`, where `added` has a number for each channel, one for each channel of each
/// image, or the shape of the result.
fn run_with(
    x: &Tensor,
    parameters: &Parameters,
    added: Option<&Tensor>,
    (geometry, map): (Geometry, Map),
    by_candle: impl Fn(&Tensor) -> candle_core::Result<Tensor>,
) -> Result<Tensor> {
    let Parameters {
        weight, activation, ..
    } = parameters;
    same_dtype(x, [Some(weight), added])?;
    if has_kernel(x) && !keeps_graph()? {
        let (fused, after) = split(*activation);
        let arguments = (x, weight, added);
        let y = match x.dtype() {
            DType::F64 => node::<f64>(arguments, fused, geometry, map)?,
            _ => node::<f32>(arguments, fused, geometry, map)?,
        };
        return after.of(&y);
    }
    let z = match (has_kernel(x), map) {
        (true, Map::Forward) => maps::convolve(x, weight, geometry)?,
        (true, Map::Transposed) => maps::input_gradient(x, weight, geometry)?,
        (false, _) => by_candle(&x.contiguous()?)?,
    };
    let z = match added {
        Some(added) => {
            let mut dims = added.dims().to_vec();
            if added.rank() == 1 {
                dims.insert(0, 1);
            }
            dims.resize(z.rank(), 1);
            z.broadcast_add(&added.reshape(dims)?)?
        }
        None => z,
    };
    activation.composed(&z)
}

type Arguments<'a> = (&'a Tensor, &'a Tensor, Option<&'a Tensor>);

/// The fused node.
fn node<T: Scalar>(
    (x, weight, added): Arguments<'_>,
    activation: Activation,
    g: Geometry,
    map: Map,
) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let added = added.map(Tensor::contiguous).transpose()?;
    let (y, shape) = match map {
        Map::Forward => (
            maps::forward::<T>(&x, &weight, added.as_ref(), activation, &g)?,
            g.output_shape(),
        ),
        Map::Transposed => (
            maps::transposed::<T>(&x, &weight, added.as_ref(), activation, &g)?,
            g.input_shape(),
        ),
    };
    let backward = move |arguments: &[&Tensor], y: &Tensor, dy: &Tensor| {
        gradients::<T>(arguments, y, dy, activation, &g, map)
    };
    let node = Computed::new("convolution", y, &shape, backward);
    Ok(match &added {
        Some(added) => x.apply_op3(&weight, added, node)?,
        None => x.apply_op2(&weight, node)?,
    })
}

fn gradients<T: Scalar>(
    arguments: &[&Tensor],
    y: &Tensor,
    dy: &Tensor,
    activation: Activation,
    g: &Geometry,
    map: Map,
) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (arguments[0], arguments[1]);
    let wanted = |i: usize| arguments.get(i).is_some_and(|t| t.track_op());
    let added = arguments.get(2).filter(|t| t.track_op());
    let (dz, planes) =
        output_gradient::<T>(y, dy, activation, added.is_some_and(|t| t.rank() <= 2))?;
    let da = match added {
        Some(added) => Some(added_gradient(added, &dz, planes)?),
        None => None,
    };
    let dx = match (wanted(0), map) {
        (false, _) => None,
        (true, Map::Forward) => {
            let identity = Activation::Identity;
            let dx = maps::transposed::<T>(&dz, weight, None, identity, g)?;
            Some(tensor(dx, x.shape())?)
        }
        (true, Map::Transposed) => {
            let dx = maps::forward::<T>(&dz, weight, None, Activation::Identity, g)?;
            Some(tensor(dx, x.shape())?)
        }
    };
    let dw = match wanted(1) {
        true => {
            let (xv, dzv) = (View::new(x)?, View::new(&dz)?);
            // The transposed layer's output is the `x` of the geometry.
            let dw = match map {
                Map::Forward => maps::weight_sums::<T>(xv.slice()?, dzv.slice()?, g),
                Map::Transposed => maps::weight_sums::<T>(dzv.slice()?, xv.slice()?, g),
            };
            Some(tensor(dw, weight.shape())?)
        }
        false => None,
    };
    Ok(vec![dx, dw, da])
}

/// The gradient of what was added, from the sums of the planes of `dz`.
fn added_gradient<T: Scalar>(added: &Tensor, dz: &Tensor, planes: Vec<T>) -> Result<Tensor> {
    match added.rank() {
        1 => {
            let channels = added.elem_count();
            tensor(sum_rows(&planes, channels), added.shape())
        }
        2 => tensor(planes, added.shape()),
        _ => Ok(dz.clone()),
    }
}

/// `dz = dy f'`, and the sum of each of its planes in the same pass, where they are wanted.
fn output_gradient<T: Scalar>(
    y: &Tensor,
    dy: &Tensor,
    activation: Activation,
    sums: bool,
) -> Result<(Tensor, Vec<T>)> {
    let plane: usize = y.dims()[2..].iter().product();
    let identity = activation == Activation::Identity;
    if identity && !sums {
        return Ok((dy.clone(), vec![]));
    }
    let (yv, dyv) = (View::new(y)?, View::new(dy)?);
    let (y, g) = (yv.slice::<T>()?, dyv.slice::<T>()?);
    if identity {
        let mut planes = vec![T::ZERO; g.len() / plane];
        let few = crate::kernel::piece_of(plane);
        let parts = planes.par_chunks_mut(few).zip(g.par_chunks(few * plane));
        parts.for_each(|(sums, g)| {
            vectorized(
                #[inline(always)]
                || plane_sums(g, plane, sums),
            );
        });
        return Ok((dy.clone(), planes));
    }
    let mut planes = vec![];
    let out = crate::kernel::filled(g.len(), |dz| {
        let parts = pieces(dz, plane, |first, dz| {
            let range = first * plane..first * plane + dz.len();
            vectorized(
                #[inline(always)]
                || {
                    activation.gradient(&y[range.clone()], &g[range], dz);
                    let mut part = vec![T::ZERO; if sums { dz.len() / plane } else { 0 }];
                    plane_sums(dz, plane, &mut part);
                    part
                },
            )
        });
        planes = parts.concat();
    });
    Ok((tensor(out, dy.shape())?, planes))
}

/// The sum of each plane.
#[inline(always)]
fn plane_sums<T: Scalar>(image: &[T], plane: usize, sums: &mut [T]) {
    for (s, plane) in sums.iter_mut().zip(image.chunks_exact(plane)) {
        *s = sum(plane, |g| g);
    }
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
