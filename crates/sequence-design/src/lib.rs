//! Designing sequences and other discrete objects on [candle](candle_core): DNA, RNA, proteins,
//! token strings, sets, small graphs.
//!
//! | module | what it gives |
//! | --- | --- |
//! | [`gflownet`] | samplers of objects that are built step by step, trained on rewards or on an order alone |
//! | [`masked_diffusion`] | generators of sequences by unmasking: training, sampling, infilling, likelihood, and fine-tuning towards a differentiable reward (DRAKES) |
//! | [`bidirectional`] | designs from a table of scores and a frozen language model, without new measurements (BIB) |
//! | [`svdd`] | samples of a masked diffusion model steered by a black box, without training it (SVDD), or by the gradient of a reward |
//! | [`sequences`] | alphabets, FASTA, FASTQ and CSV files, tokens and one-hot numbers |
//!
//! Every random choice comes from a [`RandomStream`]; networks are the caller's, behind one small
//! trait each.

pub mod bidirectional;
mod error;
pub mod gflownet;
pub mod masked_diffusion;
pub mod sequences;
pub mod svdd;
#[cfg(feature = "verify")]
pub mod verify;

pub use error::{Error, Result};
pub use tensor_core::random::RandomStream;
