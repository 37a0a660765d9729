//! Masked (absorbing-state) discrete diffusion over sequences, and its fine-tuning towards a
//! differentiable reward.
//!
//! For whoever has sequences (DNA, proteins, tokens) and wants a generator: a sequence is masked
//! token by token, and a network learns to guess the masked ones (*Simple and Effective Masked
//! Diffusion Language Models*, Sahoo et al., NeurIPS 2024, arXiv 2406.07524). For whoever has such a
//! generator and a predictor of a property: [`DrakesTrainer`] moves the samples towards it, held
//! near the pre-trained model by a divergence (*Fine-Tuning Discrete Diffusion Models via Reward
//! Optimization with Applications to DNA and Protein Design*, Wang et al., ICLR 2025, arXiv
//! 2410.13643).
//!
//! Times run from 1 (all masked) to 0 (clean); `K` tokens, the mask is token `K`.
//!
//! ```text
//! masked with probability   m(t) = 1 - e^-sigma(t)
//! training loss             -log p(x0 | x_t) sigma'(t) / (e^sigma(t) - 1)      at masked positions
//! a step from a to s        token k with weight p_k (a - s), mask with weight s, at masked positions
//! relaxed step              y = softmax((log weight + Gumbel) / tau),   x <- c x + (1 - c) y,  c = 1 - x_mask
//! fine-tuning               max  mean R(x) - alpha mean sum_i KL_i(new || old)
//! KL_i                      (a - s) / a  sum_l x_mask,l sum_k p_k (log p_k - log p_old,k)
//! ```
//!
//! | symbol | field |
//! | --- | --- |
//! | `sigma`, `m` | [`NoiseSchedule`] |
//! | `p` | [`MaskedDiffusion::log_p_x0`] |
//! | `tau`, number of relaxed steps | [`DrakesConfig::gumbel_temp`], [`DrakesConfig::truncate_steps`] |
//! | `alpha` | [`DrakesConfig::alpha`], with [`DrakesConfig::kl`] for the form |
//!
//! The released code of the second paper has another divergence, [`KlForm::Released`], whose weights
//! do not carry over. A reward that cannot be differentiated is the business of
//! [`svdd`](crate::svdd).
//!
//! ```
//! # extern crate nn as thalweg_nn;
//! # extern crate optim as thalweg_optim;
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::Optimizer;
//! use thalweg_nn::init::SeededVars;
//! use thalweg_optim::{AdamW, AdamWConfig, ParamGroup};
//! use thalweg_sequence_design::masked_diffusion::{CnnConfig, CnnDenoiser, MaskedDiffusion, SampleConfig};
//! use thalweg_sequence_design::RandomStream;
//!
//! // Sequences of 6 letters in which the second half repeats the first.
//! let mut rng = RandomStream::new(1);
//! let vars = SeededVars::new(&rng.split("weights"));
//! let config = CnnConfig { hidden: 16, kernel: 7, dilations: vec![1], stacks: 1, time: false, ..CnnConfig::dna() };
//! let net = CnnDenoiser::new(&config, vars.builder(DType::F32, &Device::Cpu), &rng)?;
//! let model = MaskedDiffusion::new(net, 4, DType::F32, &Device::Cpu)?;
//! let mut adam = AdamW::with_groups(vec![ParamGroup::named(vars.trainable(), AdamWConfig::adam(1e-2))])?;
//! for _ in 0..150 {
//!     let mut batch = vec![];
//!     for _ in 0..32 {
//!         let half = [rng.below(4)? as u32, rng.below(4)? as u32, rng.below(4)? as u32];
//!         batch.extend([half, half].concat());
//!     }
//!     let batch = Tensor::from_vec(batch, (32, 6), &Device::Cpu)?;
//!     let loss = model.nll(&batch, None, &mut rng)?.loss;
//!     adam.backward_step(&loss)?;
//! }
//! let samples = model.sample(50, 6, None, &SampleConfig::default(), &rng)?;
//! let rows = samples.tokens.to_vec2::<u32>()?;
//! let good = rows.iter().filter(|r| r[..3] == r[3..]).count();
//! assert!(good > 25, "{good} of 50");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod drakes;
mod model;
mod networks;
mod sample;
mod schedule;
mod trajectory;

pub use drakes::{
    DifferentiableReward, DrakesConfig, DrakesReport, DrakesTrainer, Temperature, Trajectory,
};
pub use model::{one_hot, ClassifierFree, DiscreteDenoiser, MaskedDiffusion, Nll};
pub use networks::{CnnConfig, CnnDenoiser, TransformerConfig, TransformerDenoiser};

pub(crate) use sample::{exponential, filled, log_or_never, next_tokens, Candidate};
pub use sample::{SampleConfig, Sampled};
pub use schedule::{NoiseSchedule, Step};
pub use trajectory::{KlForm, Relaxation};
