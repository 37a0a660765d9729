//! Convex problems of machine learning, with certificates.
//!
//! | module | for |
//! | --- | --- |
//! | [`attention_svm`] | what an attention head separates, and its maximum-margin weights |
//! | [`block_cd`] | wide sparse models and graph quadratics, a few coordinates a step |
//! | [`relu`] | two-layer ReLU networks at their global optimum, and with certified margins |
//! | [`transport`] | optimal transport with sparse plans, Gromov-Wasserstein, differentiable losses, a mixture-of-experts router |
//!
//! Solvers are plain functions and structs; they say in their reports how far from optimal and
//! feasible the answer is. Data come as candle tensors of any floating-point dtype on any device and
//! are worked on in `f64` on the CPU.

#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod attention_svm;
pub mod block_cd;
mod error;
mod lbfgs;
mod linalg;
pub mod relu;
pub mod transport;
#[cfg(feature = "verify")]
pub mod verify;

pub use error::{Error, Result};
pub use tensor_core::random::RandomStream;
