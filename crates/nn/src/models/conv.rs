//! Convolutional networks for small images.

use super::layers::{conv, linear, BatchNormKind};
use crate::activation::Activation;
use crate::conv::Conv2d;
use crate::init::{Fan, Gain, Initializer};
use crate::linear::Linear;
use crate::norm::ghost_batch::GhostBatchNorm;
use crate::pool::{adaptive_avg_pool2d, max_pool2d};
use crate::{Error, Result};
use candle_core::{Module, ModuleT, Tensor};
use candle_nn::VarBuilder;

/// He's normal distribution over the fan-out: what residual networks start from.
fn he_fan_out() -> Initializer {
    Initializer::he_normal(Gain::Relu).with_fan(Fan::Out)
}

/// Configuration of [`ConvNet`].
#[derive(Debug, Clone, PartialEq)]
pub struct ConvNetConfig {
    /// Channels of the images.
    pub input_channels: usize,
    /// Channels after each 3x3 convolution; each but the last is followed by 2x2 max pooling.
    pub channels: Vec<usize>,
    /// Number of classes.
    pub classes: usize,
    /// After each convolution's norm.
    pub activation: Activation,
    /// After each convolution.
    pub norm: BatchNormKind,
    /// Initial weights of the convolutions.
    pub init: Initializer,
}

impl Default for ConvNetConfig {
    /// 1-32-64-64 channels, 10 classes, ReLU, batch norm.
    fn default() -> Self {
        Self {
            input_channels: 1,
            channels: vec![32, 64, 64],
            classes: 10,
            activation: Activation::Relu,
            norm: BatchNormKind::Batch,
            init: he_fan_out(),
        }
    }
}

impl ConvNetConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        positive("ConvNetConfig::input_channels", self.input_channels)?;
        positive("ConvNetConfig::classes", self.classes)?;
        if self.channels.is_empty() || self.channels.contains(&0) {
            return Err(Error::config(
                "ConvNetConfig::channels",
                format!("{:?}", self.channels),
                "at least one width, none of them 0",
            ));
        }
        Ok(())
    }
}

fn positive(field: &'static str, value: usize) -> Result<()> {
    match value {
        0 => Err(Error::config(field, 0, "at least 1")),
        _ => Ok(()),
    }
}

/// Convolution, norm, activation.
#[derive(Debug, Clone)]
struct Unit {
    conv: Conv2d,
    norm: Option<GhostBatchNorm>,
}

/// What a [`Unit`] is made from besides its widths.
struct Style {
    norm: BatchNormKind,
    init: Initializer,
}

impl Style {
    fn unit(
        &self,
        widths: (usize, usize),
        shape: (usize, usize),
        activation: Activation,
        vb: VarBuilder,
    ) -> Result<Unit> {
        let norm = self.norm.build(widths.1, activation, vb.pp("norm"))?;
        // A norm brings a bias of its own, and stands between the layer and its activation.
        let conv = conv(widths, shape, norm.is_none(), self.init, vb.pp("conv"))?;
        Ok(Unit {
            conv: match norm {
                Some(_) => conv,
                None => conv.with_activation(activation),
            },
            norm,
        })
    }
}

impl ModuleT for Unit {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        let y = self.conv.forward(x)?;
        match &self.norm {
            Some(norm) => norm.forward_t(&y, train),
            None => Ok(y),
        }
    }
}

/// 3x3 convolutions with pooling between them, global average pooling and a linear layer.
/// Variables `units.0.conv.weight`, `units.0.norm.weight`, ..., `head.weight`, `head.bias`.
#[derive(Debug, Clone)]
pub struct ConvNet {
    units: Vec<Unit>,
    head: Linear,
}

impl ConvNet {
    /// Takes its variables from `vb`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], and candle's when variables do not fit.
    pub fn new(config: &ConvNetConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let style = Style {
            norm: config.norm,
            init: config.init,
        };
        let mut inputs = config.input_channels;
        let mut units = vec![];
        for (i, &outputs) in config.channels.iter().enumerate() {
            let vb = vb.pp("units").pp(i);
            units.push(style.unit((inputs, outputs), (3, 1), config.activation, vb)?);
            inputs = outputs;
        }
        let init = Initializer::torch_linear();
        let head = linear(inputs, config.classes, true, init, vb.pp("head"))?;
        Ok(Self { units, head })
    }
}

impl ModuleT for ConvNet {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        let mut h = x.clone();
        for (i, unit) in self.units.iter().enumerate() {
            h = unit.forward_t(&h, train)?;
            let last = i + 1 == self.units.len();
            if !last {
                h = halve(&h)?;
            }
        }
        self.head.forward(&global_mean(&h)?)
    }
}

/// `[B, C]`.
fn global_mean(x: &Tensor) -> candle_core::Result<Tensor> {
    adaptive_avg_pool2d(x, (1, 1))?.flatten_from(1)
}

/// 2x2 max pooling; an odd side loses its last pixels, a side of one stays as it is.
fn halve(x: &Tensor) -> candle_core::Result<Tensor> {
    let (_, _, height, width) = x.dims4()?;
    match height < 2 || width < 2 {
        true => Ok(x.clone()),
        false => Ok(max_pool2d(x, 2.into())?),
    }
}

/// Configuration of [`ResNet`].
#[derive(Debug, Clone, PartialEq)]
pub struct ResNetConfig {
    /// Channels of the images.
    pub input_channels: usize,
    /// Residual blocks in each of the three stages: `n` gives `6 n + 2` layers.
    pub blocks: usize,
    /// Channels of the first stage; each later stage has twice as many.
    pub width: usize,
    /// Number of classes.
    pub classes: usize,
    /// After each convolution.
    pub norm: BatchNormKind,
    /// Initial weights of the convolutions.
    pub init: Initializer,
}

impl Default for ResNetConfig {
    /// ResNet-8 for 10 classes of color images: width 16, batch norm.
    fn default() -> Self {
        Self {
            input_channels: 3,
            blocks: 1,
            width: 16,
            classes: 10,
            norm: BatchNormKind::Batch,
            init: he_fan_out(),
        }
    }
}

impl ResNetConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        positive("ResNetConfig::input_channels", self.input_channels)?;
        positive("ResNetConfig::blocks", self.blocks)?;
        positive("ResNetConfig::width", self.width)?;
        positive("ResNetConfig::classes", self.classes)
    }
}

/// Two 3x3 convolutions beside a shortcut (a 1x1 convolution where the shape changes).
#[derive(Debug, Clone)]
struct Block {
    first: Unit,
    second: Unit,
    shortcut: Option<Unit>,
}

impl Block {
    fn new(style: &Style, widths: (usize, usize), stride: usize, vb: VarBuilder) -> Result<Self> {
        let shortcut = match stride == 1 && widths.0 == widths.1 {
            true => None,
            false => {
                let vb = vb.pp("shortcut");
                Some(style.unit(widths, (1, stride), Activation::Identity, vb)?)
            }
        };
        let inner = (widths.1, widths.1);
        Ok(Self {
            first: style.unit(widths, (3, stride), Activation::Relu, vb.pp("first"))?,
            second: style.unit(inner, (3, 1), Activation::Identity, vb.pp("second"))?,
            shortcut,
        })
    }
}

impl ModuleT for Block {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        let y = self
            .second
            .forward_t(&self.first.forward_t(x, train)?, train)?;
        let skip = match &self.shortcut {
            Some(shortcut) => shortcut.forward_t(x, train)?,
            None => x.clone(),
        };
        Ok(Activation::Relu.of_sum(&y, &skip)?)
    }
}

/// The residual network for small images (He, Zhang, Ren, Sun 2016, section 4.2): a 3x3
/// convolution, three stages of `n` blocks (the second and third begin with stride 2), global
/// average pooling, a linear layer. Variables `stem.conv.weight`,
/// `stages.0.0.first.conv.weight`, ..., `head.weight`, `head.bias`.
#[derive(Debug, Clone)]
pub struct ResNet {
    stem: Unit,
    blocks: Vec<Block>,
    head: Linear,
}

impl ResNet {
    /// Takes its variables from `vb`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], and candle's when variables do not fit.
    pub fn new(config: &ResNetConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let style = Style {
            norm: config.norm,
            init: config.init,
        };
        let widths = (config.input_channels, config.width);
        let stem = style.unit(widths, (3, 1), Activation::Relu, vb.pp("stem"))?;
        let mut inputs = config.width;
        let mut blocks = vec![];
        for stage in 0..3 {
            let outputs = config.width << stage;
            for i in 0..config.blocks {
                let stride = if stage > 0 && i == 0 { 2 } else { 1 };
                let vb = vb.pp("stages").pp(stage).pp(i);
                blocks.push(Block::new(&style, (inputs, outputs), stride, vb)?);
                inputs = outputs;
            }
        }
        let init = Initializer::torch_linear();
        let head = linear(inputs, config.classes, true, init, vb.pp("head"))?;
        Ok(Self { stem, blocks, head })
    }
}

impl ModuleT for ResNet {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        let mut h = self.stem.forward_t(x, train)?;
        for block in &self.blocks {
            h = block.forward_t(&h, train)?;
        }
        self.head.forward(&global_mean(&h)?)
    }
}
