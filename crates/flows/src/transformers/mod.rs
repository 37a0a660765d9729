//! The denoisers of [candle-transformers](candle_transformers)' image pipelines behind [`Denoiser`]: its
//! UNet of Stable Diffusion 1.5, 2.1 and XL, its MMDiT of Stable Diffusion 3, and FLUX. Needs the
//! feature `transformers`.
//!
//! | adaptor | model | condition | schedule |
//! | --- | --- | --- | --- |
//! | [`StableDiffusion`] | [`UNet2DConditionModel`] | [`Condition::Embedding`] of the text, `[rows, tokens, width]` | [`Ddpm`](crate::schedule::Ddpm) with [`Beta::STABLE_DIFFUSION`](crate::schedule::Beta::STABLE_DIFFUSION) |
//! | [`StableDiffusion3`] | [`MMDiT`] | [`text_condition`] | [`stable_diffusion_3_schedule`] |
//! | [`Flux`] | FLUX, plain or quantized | [`text_condition`] | [`flux_schedule`] |
//!
//! Samples are latents `[rows, channels, height, width]` in the dtype of the sampler (`f32`); the network
//! runs in the dtype of its weights. Text encoders and the decoder of latents stay what they are in your
//! pipeline. candle-transformers' own schedulers step the loop as [`CandleScheduler`].
//!
//! Its attention has no gradient (`softmax_last_dim`): what differentiates through a denoiser refuses
//! these networks.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_transformers::models::mmdit::model::{Config, MMDiT};
//! use thalweg_flows::transformers::{stable_diffusion_3_schedule, text_condition, StableDiffusion3};
//! use thalweg_flows::{Ddim, Grid, RandomStream, Sampler};
//! # extern crate nn as thalweg_nn;
//! use thalweg_nn::init::SeededVars;
//!
//! // A tiny network; in a pipeline `vb` holds the published weights.
//! let config = Config {
//!     patch_size: 2, in_channels: 4, out_channels: 4, depth: 2, head_size: 8, adm_in_channels: 6,
//!     pos_embed_max_size: 8, context_embed_size: 10, frequency_embedding_size: 16,
//! };
//! let rng = RandomStream::new(1);
//! let vars = SeededVars::new(&rng.split("weights"));
//! let vb = vars.builder(DType::F16, &Device::Cpu);
//! let mmdit = MMDiT::new(&config, false, vb)?;
//!
//! let model = StableDiffusion3::new(&mmdit);
//! let grid = Grid::uniform_time(&stable_diffusion_3_schedule(), 4)?;
//! let mut sampler = Sampler::new(&model, grid).stepper(Ddim::default());
//! let mut draw = |shape: &[usize]| rng.split("draw").normal(0.0, 1.0, shape, DType::F32, &Device::Cpu);
//! let prompt = text_condition(&draw(&[1, 5, 10])?, &draw(&[1, 6])?);
//! let image = sampler.sample(&draw(&[1, 4, 8, 8])?, &prompt, None, &rng)?;
//! assert_eq!(image.x.dims(), [1, 4, 8, 8]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod scheduler;

pub use scheduler::CandleScheduler;

/// The library itself, in the version that the adaptors fit.
pub use candle_transformers;

use crate::condition::Condition;
use crate::denoiser::Denoiser;
use crate::error::{check, Error, Result};
use crate::level::Levels;
use crate::prediction::{PathSpeed, Prediction};
use crate::schedule::{flux_mu, FlowTime, RectifiedFlow, Shift};
use candle_core::{DType, Device, Tensor};
use candle_transformers::models::flux::WithForward;
use candle_transformers::models::mmdit::model::MMDiT;
use candle_transformers::models::stable_diffusion::unet_2d::UNet2DConditionModel;
use std::collections::BTreeMap;

/// The key of the tokens' embeddings in [`text_condition`].
pub const CONTEXT: &str = "context";
/// The key of the pooled embedding in [`text_condition`].
pub const POOLED: &str = "pooled";

/// The condition of [`StableDiffusion3`] and [`Flux`]: embeddings of the tokens
/// `[rows, tokens, width]` and the pooled embedding `[rows, width]`; one row serves all.
pub fn text_condition(context: &Tensor, pooled: &Tensor) -> Condition {
    let parts = [(CONTEXT, context), (POOLED, pooled)];
    let named = parts.map(|(name, tensor)| (name.to_string(), tensor.clone()));
    Condition::Many(BTreeMap::from(named))
}

fn text_parts(condition: &Condition, dtype: DType) -> Result<(Tensor, Tensor)> {
    let part = |name: &str| match condition {
        Condition::Many(map) => map.get(name),
        _ => None,
    };
    match (part(CONTEXT), part(POOLED)) {
        (Some(context), Some(pooled)) => Ok((context.to_dtype(dtype)?, pooled.to_dtype(dtype)?)),
        _ => Err(Error::unsupported(
            "this condition",
            "make one from the text encoders' output with text_condition",
        )),
    }
}

/// The noise scales of Stable Diffusion 3: shifted by 3, in thousandths.
pub fn stable_diffusion_3_schedule() -> RectifiedFlow {
    RectifiedFlow {
        shift: Shift::Constant(3.0),
        model_time: FlowTime::NoiseTimes(1000.0),
    }
}

/// The noise scales of FLUX for latents of this height and width: shifted by the number of tokens for
/// `dev`, not at all for `schnell`.
pub fn flux_schedule(height: usize, width: usize, schnell: bool) -> RectifiedFlow {
    let tokens = (height / 2) * (width / 2);
    RectifiedFlow {
        shift: match schnell {
            true => Shift::None,
            false => Shift::Exponential(flux_mu(tokens)),
        },
        model_time: FlowTime::NoiseTimes(1.0),
    }
}

/// The UNet of Stable Diffusion.
#[derive(Clone, Copy)]
pub struct StableDiffusion<'a> {
    unet: &'a UNet2DConditionModel,
    prediction: Prediction,
    dtype: DType,
}

impl<'a> StableDiffusion<'a> {
    /// A UNet that predicts noise ([`Prediction::Eps`]; 2.1 at 768 pixels predicts [`Prediction::V`]), with
    /// weights of this dtype.
    pub fn new(unet: &'a UNet2DConditionModel, prediction: Prediction, dtype: DType) -> Self {
        Self {
            unet,
            prediction,
            dtype,
        }
    }
}

impl Denoiser for StableDiffusion<'_> {
    fn prediction(&self) -> Prediction {
        self.prediction
    }

    fn raw(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Tensor> {
        let Condition::Embedding(text) = condition else {
            return Err(Error::unsupported(
                "this condition",
                "take Condition::Embedding of the text encoder's output, of the empty prompt for none",
            ));
        };
        let (input, text) = (x.to_dtype(self.dtype)?, text.to_dtype(self.dtype)?);
        let out = match levels {
            Levels::Same(level) => self.unet.forward(&input, level.model_time, &text)?,
            // The UNet takes one time for all rows.
            Levels::PerRow(levels) => {
                levels_fit(levels.len(), x)?;
                let one = |(i, level): (usize, &crate::Level)| -> Result<Tensor> {
                    let (x, text) = (input.narrow(0, i, 1)?, text.narrow(0, i, 1)?);
                    Ok(self.unet.forward(&x, level.model_time, &text)?)
                };
                let rows = levels.iter().enumerate().map(one);
                Tensor::cat(&rows.collect::<Result<Vec<_>>>()?, 0)?
            }
        };
        Ok(out.to_dtype(x.dtype())?)
    }
}

fn levels_fit(count: usize, x: &Tensor) -> Result<()> {
    match check::rows("x", x)? == count && count > 0 {
        true => Ok(()),
        false => {
            let expected = format!("{count} rows (at least 1), one per level");
            Err(Error::shape("x", x.dims(), expected))
        }
    }
}

/// The time of every row in single precision, in which all these networks embed it.
fn row_times(levels: &Levels, x: &Tensor) -> Result<Tensor> {
    let rows = check::rows("x", x)?;
    levels.model_time(rows, DType::F32, x.device())
}

/// The multimodal transformer of Stable Diffusion 3 and 3.5. candle-transformers embeds its times in
/// half precision whatever the weights are, so they must be `F16`.
pub struct StableDiffusion3<'a> {
    mmdit: &'a MMDiT,
    skip_layers: Option<Vec<usize>>,
}

impl<'a> StableDiffusion3<'a> {
    /// A network with `F16` weights.
    pub fn new(mmdit: &'a MMDiT) -> Self {
        Self {
            mmdit,
            skip_layers: None,
        }
    }

    /// The same network without these blocks: the weak model of skip-layer guidance.
    #[must_use]
    pub fn without_layers(self, layers: &[usize]) -> Self {
        Self {
            skip_layers: Some(layers.to_vec()),
            ..self
        }
    }
}

impl Denoiser for StableDiffusion3<'_> {
    fn prediction(&self) -> Prediction {
        Prediction::Velocity(PathSpeed::NoiseMinusData)
    }

    fn raw(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Tensor> {
        let (context, pooled) = text_parts(condition, DType::F16)?;
        let (input, times) = (x.to_dtype(DType::F16)?, row_times(levels, x)?);
        let skip = self.skip_layers.as_deref();
        let out = self
            .mmdit
            .forward(&input, &times, &pooled, &context, skip)?;
        Ok(out.to_dtype(x.dtype())?)
    }
}

/// FLUX, plain or quantized.
pub struct Flux<'a, M> {
    model: &'a M,
    guidance: Option<f64>,
    dtype: DType,
}

impl<'a, M: WithForward> Flux<'a, M> {
    /// A network with weights of this dtype. `guidance` is the number that `dev` is told (3.5 is
    /// usual): an input of the distilled network, not a scale of classifier-free guidance, and
    /// both can be on. `schnell` is told none.
    pub fn new(model: &'a M, guidance: Option<f64>, dtype: DType) -> Self {
        Self {
            model,
            guidance,
            dtype,
        }
    }
}

impl<M: WithForward> Denoiser for Flux<'_, M> {
    fn prediction(&self) -> Prediction {
        Prediction::Velocity(PathSpeed::NoiseMinusData)
    }

    fn raw(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Tensor> {
        let (context, pooled) = text_parts(condition, self.dtype)?;
        let (rows, _, height, width) = x.dims4()?;
        let image = pack(&x.to_dtype(self.dtype)?)?;
        let image_ids = positions(rows, height / 2, width / 2, self.dtype, x.device())?;
        let text_ids = Tensor::zeros((rows, context.dim(1)?, 3), self.dtype, x.device())?;
        let times = row_times(levels, x)?;
        let told = self
            .guidance
            .map(|g| Tensor::full(g as f32, rows, x.device()));
        let out = self.model.forward(
            &image,
            &image_ids,
            &context,
            &text_ids,
            &times,
            &pooled,
            told.transpose()?.as_ref(),
        )?;
        Ok(unpack(&out, height, width)?.to_dtype(x.dtype())?)
    }
}

/// Latents `[rows, channels, height, width]` as tokens of 2 x 2 pixels,
/// `[rows, height / 2 * width / 2, 4 channels]`.
fn pack(x: &Tensor) -> Result<Tensor> {
    let (rows, c, h, w) = x.dims4()?;
    if h % 2 != 0 || w % 2 != 0 || h * w == 0 {
        return Err(Error::shape("x", x.dims(), "even height and width"));
    }
    let split = x.reshape((rows, c, h / 2, 2, w / 2, 2))?;
    let tokens = split.permute((0, 2, 4, 1, 3, 5))?;
    Ok(tokens.reshape((rows, h / 2 * (w / 2), 4 * c))?)
}

/// The inverse of [`pack`].
fn unpack(tokens: &Tensor, h: usize, w: usize) -> Result<Tensor> {
    let (rows, _, width) = tokens.dims3()?;
    let c = width / 4;
    let split = tokens.reshape((rows, h / 2, w / 2, c, 2, 2))?;
    let pixels = split.permute((0, 3, 1, 4, 2, 5))?;
    Ok(pixels.reshape((rows, c, h, w))?)
}

/// `(0, row, column)` of every token, `[rows, tokens, 3]`.
fn positions(rows: usize, h: usize, w: usize, dtype: DType, device: &Device) -> Result<Tensor> {
    let one = |i: usize| [0.0, (i / w) as f32, (i % w) as f32];
    let flat: Vec<f32> = (0..h * w).flat_map(one).collect();
    let ids = Tensor::from_vec(flat, (1, h * w, 3), device)?.to_dtype(dtype)?;
    Ok(ids.repeat((rows, 1, 1))?)
}
