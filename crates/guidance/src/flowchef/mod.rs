//! FlowChef: inverse problems, classifier guidance and editing with a trained flow, without a
//! backward pass through its network.
//!
//! For anyone with a velocity network who wants `y = A x` to hold, a cost to fall, or a region to
//! stay: one forward pass a step and the gradient of the (cheap) cost. *Steering Rectified Flow Models
//! in the Vector Field for Controlled Image Generation*, Patel et al., ICCV 2025, arXiv 2412.00100.
//!
//! Time runs from 0 (noise) to 1 (data), on `t_i = i / N`. At every step but the last, with the
//! velocity held constant:
//!
//! ```text
//! v = v(x, t)     x1 = x + (1 - t) v     x <- x - s grad cost(x1)     x <- x + dt v
//! ```
//!
//! The exact gradient is `J^T grad cost(x1)` with `J = I + (1 - t) dv/dx`, which for the exact field of
//! independent pairs is `t / (1 - t)^2 Cov(x1 | x)`, positive semi-definite: what is skipped never
//! turns a descent into an ascent. Along straight (reflowed) paths `v` hardly changes and the update
//! is accurate.
//!
//! | symbol | here |
//! | --- | --- |
//! | `cost` | [`Cost`]: [`LinearMeasurement`], [`MaskedTarget`], [`ClassifierCost`], [`FeatureCost`], [`LatentCost`], [`SumCost`] |
//! | `A` | [`LinearOperator`](tensor_core::operator::LinearOperator): masks, pooling, blur, matrices |
//! | `s` | [`StepRule`]; [`StepRule::Normalized`] is in units of the cost's curvature |
//! | `N` | [`FlowChef::steps`] |
//!
//! The paper's cost is a mean over a batch of one. Costs here are means per sample by default
//! ([`Reduction`]), so that a sample does not depend on its batch.
//!
//! [`BackpropGuidance`] is the same loop with the exact gradient, as a baseline; [`FlowEdit`] edits an
//! image outside of what is to be kept.
//!
//! ```
//! # extern crate flows as thalweg_flows;
//! # extern crate tensor_core as thalweg_tensor_core;
//! use candle_core::{DType, Device, Tensor};
//! use thalweg_flows::{AnalyticMixture, Condition, RandomStream};
//! use thalweg_guidance::flowchef::{FlowChef, LinearMeasurement};
//! use thalweg_tensor_core::operator::{LinearOperator, Mask};
//!
//! // In the place of a network: the exact field of 16 pictures. The middle of one is lost.
//! let mut rng = RandomStream::new(1);
//! let pictures = rng.normal(0.0, 1.0, (16, 1, 6, 6), DType::F64, &Device::Cpu)?;
//! let flow = AnalyticMixture::kernel_density(&pictures, 0.1)?;
//! let hole = Mask::hide_box((6, 6), 3, None, DType::F64, &Device::Cpu)?;
//! let seen = hole.apply(&pictures.narrow(0, 5, 1)?)?;
//!
//! let cost = LinearMeasurement::new(&hole, &seen);
//! let noise = rng.normal(0.0, 1.0, (1, 1, 6, 6), DType::F64, &Device::Cpu)?;
//! let out = FlowChef::default().sample(&flow, &noise, &Condition::Null, &cost, None)?;
//! let off = (out.x - pictures.narrow(0, 5, 1)?)?.sqr()?.mean_all()?.to_scalar::<f64>()?;
//! assert!(off < 0.1);
//! assert_eq!(out.nfe.denoiser_backward, 0);
//! # Ok::<(), thalweg_guidance::Error>(())
//! ```

mod cost;
mod edit;
mod sample;

pub use cost::{
    ClassifierCost, Cost, FeatureCost, LatentCost, LinearMeasurement, MaskedTarget, Reduction,
    SumCost,
};
pub use edit::FlowEdit;
#[cfg(feature = "verify")]
pub(crate) use sample::{correct, Adam, Scale};
pub use sample::{
    exact_gradient, skipped_gradient, BackpropGuidance, FlowChef, GuidedOutput, GuidedStep, Solver,
    StepCallback, StepRule,
};
