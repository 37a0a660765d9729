//! Sizes of a convolution, checked.

use crate::{Error, Result};
use candle_core::{Shape, Tensor};
use tensor_core::kernels::conv::Window;

/// A convolution of one or two spatial dimensions; with one, the height is 1.
///
/// The three bilinear maps of a convolution share it: forward `(x, w) -> y`, the gradient of the
/// input `(dy, w) -> dx` (the forward map of a transposed convolution) and the gradient of the
/// weight `(x, dy) -> dw`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Geometry {
    pub batch: usize,
    pub groups: usize,
    /// Sizes of one group of one image.
    pub window: Window,
    /// Spatial dimensions of the tensors: 1 or 2.
    pub rank: usize,
}

/// What a layer's configuration says, for any number of spatial dimensions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Settings {
    pub rank: usize,
    pub stride: usize,
    pub padding: usize,
    pub dilation: usize,
    pub groups: usize,
    /// Of a transposed convolution.
    pub output_padding: usize,
}

impl Settings {
    fn pair(&self, along: usize, across: usize) -> [usize; 2] {
        match self.rank {
            1 => [across, along],
            _ => [along, along],
        }
    }

    fn check(&self) -> Result<()> {
        let positive = [
            ("stride", self.stride),
            ("dilation", self.dilation),
            ("groups", self.groups),
        ];
        match positive.into_iter().find(|(_, value)| *value == 0) {
            Some((field, _)) => Err(Error::config(field, 0, "at least 1")),
            None => Ok(()),
        }
    }
}

/// The last dimensions as height and width.
fn spatial(dims: &[usize]) -> [usize; 2] {
    match dims {
        [w] => [1, *w],
        [h, w, ..] => [*h, *w],
        [] => [1, 1],
    }
}

fn check_ranks(x: &Tensor, weight: &Tensor, rank: usize) -> Result<()> {
    let named = ["[B, C, L]", "[B, C, H, W]"][rank - 1];
    if x.rank() != rank + 2 || x.elem_count() == 0 {
        return Err(Error::shape(
            "input",
            x.dims(),
            format!("a non-empty {named}"),
        ));
    }
    if weight.rank() != rank + 2 || weight.elem_count() == 0 {
        let expected = format!("{} non-empty dimensions", rank + 2);
        return Err(Error::shape("weight", weight.dims(), expected));
    }
    Ok(())
}

impl Geometry {
    /// Of `x` `[B, groups inputs, ..]` and `weight` `[groups outputs, inputs, k..]`.
    pub fn forward(x: &Tensor, weight: &Tensor, settings: &Settings) -> Result<Self> {
        settings.check()?;
        check_ranks(x, weight, settings.rank)?;
        let groups = settings.groups;
        let (inputs, outputs) = (weight.dims()[1], weight.dims()[0]);
        if !outputs.is_multiple_of(groups) {
            let expected = format!("a multiple of {groups} groups in front");
            return Err(Error::shape("weight", weight.dims(), expected));
        }
        if x.dims()[1] != inputs * groups {
            let expected = format!("{} channels", inputs * groups);
            return Err(Error::shape("input", x.dims(), expected));
        }
        let window = Window {
            inputs,
            outputs: outputs / groups,
            size: spatial(&x.dims()[2..]),
            out: [0, 0],
            kernel: spatial(&weight.dims()[2..]),
            stride: settings.pair(settings.stride, 1),
            padding: settings.pair(settings.padding, 0),
            dilation: settings.pair(settings.dilation, 1),
        };
        let Some(fitted) = window.fitted() else {
            let reach = |i: usize| window.dilation[i] * (window.kernel[i] - 1) + 1;
            let expected = format!("at least {:?} with its padding", [reach(0), reach(1)]);
            return Err(Error::shape("input", x.dims(), expected));
        };
        Ok(Self {
            batch: x.dims()[0],
            groups,
            window: fitted,
            rank: settings.rank,
        })
    }

    /// Of the transposed convolution of `y` `[B, groups outputs, ..]` with `weight`
    /// `[groups outputs, inputs, k..]`: the geometry whose forward map goes from the result to `y`.
    pub fn transposed(y: &Tensor, weight: &Tensor, settings: &Settings) -> Result<Self> {
        settings.check()?;
        check_ranks(y, weight, settings.rank)?;
        let groups = settings.groups;
        let channels = weight.dims()[0];
        if y.dims()[1] != channels || !channels.is_multiple_of(groups) {
            let expected = format!("{channels} channels, in {groups} groups");
            return Err(Error::shape("input", y.dims(), expected));
        }
        if settings.output_padding >= settings.stride.max(settings.dilation) {
            let expected = "less than the stride or the dilation";
            return Err(Error::config(
                "output_padding",
                settings.output_padding,
                expected,
            ));
        }
        let out = spatial(&y.dims()[2..]);
        let (stride, padding) = (
            settings.pair(settings.stride, 1),
            settings.pair(settings.padding, 0),
        );
        let dilation = settings.pair(settings.dilation, 1);
        let extra = settings.pair(settings.output_padding, 0);
        let kernel = spatial(&weight.dims()[2..]);
        let full =
            |i: usize| (out[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + extra[i] + 1;
        if (0..2).any(|i| full(i) <= 2 * padding[i]) {
            let expected = format!("more than the padding of {padding:?} takes away");
            return Err(Error::shape("input", y.dims(), expected));
        }
        Ok(Self {
            batch: y.dims()[0],
            groups,
            window: Window {
                inputs: weight.dims()[1],
                outputs: channels / groups,
                size: [0, 1].map(|i| full(i) - 2 * padding[i]),
                out,
                kernel,
                stride,
                padding,
                dilation,
            },
            rank: settings.rank,
        })
    }

    fn tensor(&self, channels: usize, size: [usize; 2]) -> Shape {
        match self.rank {
            1 => Shape::from((self.batch, channels, size[1])),
            _ => Shape::from((self.batch, channels, size[0], size[1])),
        }
    }

    /// The shape of `x`.
    pub fn input_shape(&self) -> Shape {
        self.tensor(self.groups * self.window.inputs, self.window.size)
    }

    /// The shape of `y`.
    pub fn output_shape(&self) -> Shape {
        self.tensor(self.groups * self.window.outputs, self.window.out)
    }

    /// The shape of the weight.
    pub fn weight_shape(&self) -> Shape {
        let (o, i) = (self.groups * self.window.outputs, self.window.inputs);
        match self.rank {
            1 => Shape::from((o, i, self.window.kernel[1])),
            _ => Shape::from((o, i, self.window.kernel[0], self.window.kernel[1])),
        }
    }
}
