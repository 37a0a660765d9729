//! A small UNet that is told a level (time, noise) and maybe a class per image.

use super::layers::{conv, linear};
use crate::activation::Activation;
use crate::condition::{concat_channels, sinusoidal};
use crate::conv::Conv2d;
use crate::embedding::rows_of;
use crate::init::{Gain, Initializer};
use crate::linear::Linear;
use crate::norm::{group_norm, GroupNorm};
use crate::resample::upsample_nearest2d;
use crate::{Error, Result};
use candle_core::{DType, Module, Tensor};
use candle_nn::VarBuilder;

/// Configuration of [`UNet`].
#[derive(Debug, Clone, PartialEq)]
pub struct UNetConfig {
    /// Channels of the images.
    pub input_channels: usize,
    /// Channels of the result.
    pub output_channels: usize,
    /// Channels at each resolution, from the full one; each later one has half the side.
    pub channels: Vec<usize>,
    /// Groups of every norm; they divide all channels.
    pub groups: usize,
    /// Width of the embedding of level and class; even.
    pub embedding: usize,
    /// Levels are multiplied by this before their sines are taken: 1000 for levels in `[0, 1]`.
    pub level_scale: f64,
    /// Number of classes, for images with labels.
    pub classes: Option<usize>,
    /// After each norm.
    pub activation: Activation,
}

impl Default for UNetConfig {
    /// 32-64-128 channels for gray images.
    fn default() -> Self {
        Self {
            input_channels: 1,
            output_channels: 1,
            channels: vec![32, 64, 128],
            groups: 8,
            embedding: 128,
            level_scale: 1000.0,
            classes: None,
            activation: Activation::Silu,
        }
    }
}

impl UNetConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        let sizes = [
            ("UNetConfig::input_channels", self.input_channels),
            ("UNetConfig::output_channels", self.output_channels),
            ("UNetConfig::groups", self.groups),
            ("UNetConfig::classes", self.classes.unwrap_or(1)),
        ];
        if let Some((field, _)) = sizes.into_iter().find(|(_, size)| *size == 0) {
            return Err(Error::config(field, 0, "at least 1"));
        }
        let fits = |c: &usize| *c > 0 && c.is_multiple_of(self.groups);
        if self.channels.is_empty() || !self.channels.iter().all(fits) {
            let field = "UNetConfig::channels";
            let expected = format!("at least one width, all multiples of {}", self.groups);
            return Err(Error::config(
                field,
                format!("{:?}", self.channels),
                expected,
            ));
        }
        if self.embedding == 0 || self.embedding % 2 == 1 {
            let field = "UNetConfig::embedding";
            return Err(Error::config(
                field,
                self.embedding,
                "an even number above 0",
            ));
        }
        match self.level_scale.is_finite() && self.level_scale > 0.0 {
            true => Ok(()),
            false => {
                let field = "UNetConfig::level_scale";
                Err(Error::config(field, self.level_scale, "a number above 0"))
            }
        }
    }
}

fn he() -> Initializer {
    Initializer::he_normal(Gain::Relu)
}

/// Norm, activation, convolution, twice, with the embedding added in between, beside a shortcut.
#[derive(Debug, Clone)]
struct Block {
    first_norm: GroupNorm,
    first: Conv2d,
    embedding: Linear,
    second_norm: GroupNorm,
    second: Conv2d,
    shortcut: Option<Conv2d>,
}

impl Block {
    fn new(config: &UNetConfig, (inputs, outputs): (usize, usize), vb: VarBuilder) -> Result<Self> {
        let norm = |channels: usize, name: &str| -> Result<GroupNorm> {
            let norm = group_norm(config.groups, channels, 1e-5, vb.pp(name))?;
            Ok(norm.with_activation(config.activation))
        };
        let init = Initializer::torch_linear();
        let shortcut = match inputs == outputs {
            true => None,
            false => {
                let vb = vb.pp("shortcut");
                Some(conv((inputs, outputs), (1, 1), true, he(), vb)?)
            }
        };
        let wide = (inputs, outputs);
        Ok(Self {
            first_norm: norm(inputs, "first_norm")?,
            first: conv(wide, (3, 1), true, he(), vb.pp("first"))?,
            embedding: linear(config.embedding, outputs, true, init, vb.pp("embedding"))?,
            second_norm: norm(outputs, "second_norm")?,
            second: conv((outputs, outputs), (3, 1), true, he(), vb.pp("second"))?,
            shortcut,
        })
    }

    fn forward(&self, x: &Tensor, embedding: &Tensor) -> Result<Tensor> {
        let shift = self.embedding.forward(embedding)?;
        let h = self
            .first
            .forward_shifted(&self.first_norm.forward(x)?, &shift)?;
        let h = self.second_norm.forward(&h)?;
        match (&self.shortcut, self.second.bias()) {
            (Some(shortcut), Some(bias)) => {
                // The shortcut takes the second bias along, so that the sum is part of the second
                // convolution.
                let bias = bias.broadcast_as(shift.shape())?;
                let beside = shortcut.forward_shifted(x, &bias)?;
                self.second.without_bias().forward_onto(&h, &beside)
            }
            _ => Ok((self.second.forward(&h)? + x)?),
        }
    }
}

/// The convolutional network of denoisers (Ronneberger, Fischer, Brox 2015; Ho, Jain, Abbeel 2020,
/// without attention): residual blocks at falling and rising resolutions, each rising one sees the
/// falling one beside it, and every block is told the level and the class.
///
/// Variables `level.0.weight`, `classes`, `stem.weight`, `down.0.first.weight`, `shrink.0.weight`,
/// `middle.first.weight`, `grow.0.weight`, `up.0.first.weight`, `norm.weight`, `head.weight`, ...
#[derive(Debug, Clone)]
pub struct UNet {
    level: [Linear; 2],
    classes: Option<Tensor>,
    stem: Conv2d,
    down: Vec<Block>,
    shrink: Vec<Conv2d>,
    middle: Block,
    grow: Vec<Conv2d>,
    up: Vec<Block>,
    norm: GroupNorm,
    head: Conv2d,
    config: UNetConfig,
}

impl UNet {
    /// Takes its variables from `vb`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], and candle's when variables do not fit.
    pub fn new(config: &UNetConfig, vb: VarBuilder) -> Result<Self> {
        config.validate()?;
        let c = &config.channels;
        let (full, deepest) = (c[0], c[c.len() - 1]);
        let width = config.embedding;
        let init = Initializer::torch_linear();
        let level = |i: usize| linear(width, width, true, init, vb.pp("level").pp(i));
        let classes = match config.classes {
            Some(classes) => {
                // One row more: an image without a label.
                let shape = [classes + 1, width];
                let init = Initializer::Normal {
                    mean: 0.0,
                    std: 1.0,
                };
                Some(vb.get_with_hints(&shape, "classes", init.hint(&shape)?)?)
            }
            None => None,
        };
        let (mut down, mut shrink, mut grow, mut up) = (vec![], vec![], vec![], vec![]);
        for (i, outputs) in c.iter().enumerate() {
            let inputs = if i == 0 { full } else { c[i - 1] };
            down.push(Block::new(config, (inputs, *outputs), vb.pp("down").pp(i))?);
            let Some(deeper) = c.get(i + 1) else { break };
            let same = (*outputs, *outputs);
            shrink.push(conv(same, (3, 2), true, he(), vb.pp("shrink").pp(i))?);
            let back = (*deeper, *outputs);
            grow.push(conv(back, (3, 1), true, he(), vb.pp("grow").pp(i))?);
            up.push(Block::new(
                config,
                (2 * outputs, *outputs),
                vb.pp("up").pp(i),
            )?);
        }
        let stem = (config.input_channels, full);
        let head = (full, config.output_channels);
        let linear_init = Initializer::torch_linear();
        let norm = group_norm(config.groups, full, 1e-5, vb.pp("norm"))?;
        Ok(Self {
            level: [level(0)?.with_activation(config.activation), level(1)?],
            classes,
            stem: conv(stem, (3, 1), true, he(), vb.pp("stem"))?,
            down,
            shrink,
            middle: Block::new(config, (deepest, deepest), vb.pp("middle"))?,
            grow,
            up,
            norm: norm.with_activation(config.activation),
            head: conv(head, (3, 1), true, linear_init, vb.pp("head"))?,
            config: config.clone(),
        })
    }

    /// The configuration.
    pub fn config(&self) -> &UNetConfig {
        &self.config
    }

    /// `[B, output_channels, H, W]` for images `x` `[B, input_channels, H, W]`, a level per image `[B]`
    /// of the images' dtype, and, in a network with classes, an integer label per image `[B]`; the
    /// label `classes` stands for none, and so does leaving them out.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::DType`] for what does not fit, [`Error::LabelOutOfRange`] on the
    /// CPU, [`Error::Unsupported`] for labels in a network without classes.
    pub fn forward(&self, x: &Tensor, level: &Tensor, labels: Option<&Tensor>) -> Result<Tensor> {
        let embedding = self.embed(x, level, labels)?;
        let mut h = self.stem.forward(x)?;
        let mut beside = vec![];
        for (i, block) in self.down.iter().enumerate() {
            h = block.forward(&h, &embedding)?;
            if let Some(shrink) = self.shrink.get(i) {
                let small = shrink.forward(&h)?;
                beside.push(h);
                h = small;
            }
        }
        h = self.middle.forward(&h, &embedding)?;
        for ((grow, block), skip) in self.grow.iter().zip(&self.up).zip(&beside).rev() {
            let (_, _, height, width) = skip.dims4()?;
            let large = grow.forward(&upsample_nearest2d(&h, (height, width))?)?;
            h = block.forward(&concat_channels(&large, skip)?, &embedding)?;
        }
        Ok(self.head.forward(&self.norm.forward(&h)?)?)
    }

    /// Level and class as `[B, embedding]`, activated.
    fn embed(&self, x: &Tensor, level: &Tensor, labels: Option<&Tensor>) -> Result<Tensor> {
        let batch = match x.dims() {
            [batch, _, _, _] => *batch,
            other => return Err(Error::shape("input", other, "[B, C, H, W]")),
        };
        if level.dims() != [batch] {
            return Err(Error::shape("level", level.dims(), format!("[{batch}]")));
        }
        let features = sinusoidal(
            &(level * self.config.level_scale)?,
            self.config.embedding,
            10_000.0,
        )?;
        let h = self.level[1].forward(&self.level[0].forward(&features)?)?;
        let h = match (&self.classes, labels) {
            (None, None) => h,
            (None, Some(_)) => {
                return Err(Error::Unsupported {
                    operation: "a label".into(),
                    context: "in a network without classes".into(),
                })
            }
            (Some(table), labels) => {
                let none = table.dim(0)? as u32 - 1;
                let labels = match labels {
                    Some(labels) if labels.dims() == [batch] => labels.clone(),
                    Some(labels) => {
                        let expected = format!("[{batch}]");
                        return Err(Error::shape("labels", labels.dims(), expected));
                    }
                    None => Tensor::full(none, batch, x.device())?.to_dtype(DType::U32)?,
                };
                (h + rows_of(table, &labels)?)?
            }
        };
        self.config.activation.of(&h)
    }
}
