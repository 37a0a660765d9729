//! The examples of the README and the book, as doctests.

#[doc = include_str!("../../README.md")]
mod readme {}

#[doc = include_str!("../../docs/crates/tensor-core.md")]
mod tensor_core {}

#[doc = include_str!("../../docs/crates/datasets.md")]
mod datasets {}

#[doc = include_str!("../../docs/crates/nn.md")]
mod nn {}

#[doc = include_str!("../../docs/from-candle-nn.md")]
mod from_candle_nn {}

#[doc = include_str!("../../docs/crates/optim.md")]
mod optim {}

#[doc = include_str!("../../docs/crates/convex.md")]
mod convex {}

#[doc = include_str!("../../docs/crates/graph-learning.md")]
mod graph_learning {}

#[doc = include_str!("../../docs/crates/flows.md")]
mod flows {}

#[doc = include_str!("../../docs/crates/guidance.md")]
mod guidance {}

#[doc = include_str!("../../crates/guidance/README.md")]
mod guidance_readme {}

#[doc = include_str!("../../docs/crates/sequence-design.md")]
mod sequence_design {}

#[doc = include_str!("../../crates/sequence-design/README.md")]
mod sequence_design_readme {}
