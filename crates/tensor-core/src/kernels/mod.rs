//! The fused elementwise update engine, reductions in a fixed order, and the tiles of convolutions
//! ([`conv`]).
//!
//! An optimizer step is pure memory traffic: its cost is the bytes that it moves. Written with
//! tensor operations it makes ten passes with fresh allocations; here it makes one. A [`Rule`] is
//! the update of one element, written once; [`FusedUpdate`] owns the state buffers and runs a rule
//! over all parameters together: each parameter, gradient and state value is read once and
//! written once, in place, by vector code chosen at run time for the processor, over a work list
//! of even pieces that all threads share. Many small tensors cost no more than one large one.
//!
//! Gradient transforms that only scale, clip or project leave their scalars in a [`GradMap`],
//! which the kernel applies in registers. A [`Mask`] keeps state for some entries only, compact.
//! [`moments`] and friends reduce over many tensors in one pass, with the same bits for any number
//! of threads.
//!
//! On the CPU all of this works for `f32`, `f64`, and for `bf16`/`f16` parameters with `f32` or
//! `bf16` state. With the feature `cuda`, parameters on a CUDA device take the same step in one
//! launch of a kernel that is compiled at run time from the rule's [`device`] text; there is no
//! Metal form (a table of addresses cannot be passed there), and a step there is an error.

pub mod conv;
#[cfg(feature = "cuda")]
mod cuda;
pub mod device;
#[cfg(feature = "verify")]
mod host_check;
mod mask;
mod pack;
mod plan;
mod real;
mod reduce;
mod rule;
mod segment;
mod update;

#[cfg(feature = "verify")]
pub use host_check::check_on_host;
pub use mask::Mask;
pub use real::{Element, Real};
pub use reduce::{dot, moments, sum_squares, Moments};
pub use rule::{GradMap, Rule, Updated};
pub use update::{FusedUpdate, StateDType, Work};
