//! Gradient transforms: clip, project, accumulate, guard, in a chain before any optimizer.
//!
//! A [`GradientTransform`] changes the [`Gradients`] of one step. A transform that scales, clips or
//! projects composes its scalars into their maps and allocates nothing; one that a map cannot
//! express replaces a gradient's tensor. Any transform may [withhold](Flow::Withhold) the step.
//!
//! | transform | what it does | costs |
//! | --- | --- | --- |
//! | [`ClipByGlobalNorm`] | scales all gradients to a common norm at most | one pass of reading |
//! | [`clip_grad_norm`] | the same as a function, for a loop with another optimizer | one pass of reading, new tensors |
//! | [`ClipByNorm`] | the same for each tensor alone | one pass of reading |
//! | [`ClipByValue`] | bounds every entry | nothing |
//! | [`AddWeightDecay`] | adds a multiple of the parameter | nothing |
//! | [`OrthogonalProjection`](crate::perp_grad::OrthogonalProjection) | removes the part along the parameter | one pass of reading |
//! | [`SpikeClip`] | bounds entries by their own past | one pass, two buffers |
//! | [`Accumulate`] | averages over several calls of `step` | one pass, one buffer |
//! | [`NonFiniteGuard`] | skips, refuses or zeroes NaN and infinity | one pass of reading |
//!
//! The order matters: a guard comes first, clipping comes before projection.
//!
//! ```
//! use candle_core::{Device, Var};
//! use candle_nn::Optimizer;
//! use thalweg_optim::transform::{Accumulate, Chain, ClipByGlobalNorm};
//! use thalweg_optim::{AdamW, AdamWConfig, StepWith};
//!
//! let w = Var::new(&[3f32, -2.0], &Device::Cpu)?;
//! let mut optimizer = AdamW::new(vec![w.clone()], AdamWConfig { lr: 0.1, ..Default::default() })?;
//! // Every second call of `step` is an update, with the mean of two gradients of norm at most 1.
//! let chain = Chain::new()
//!     .then(Accumulate::new(optimizer.params(), 2)?)
//!     .then(ClipByGlobalNorm::new(1.0)?);
//! optimizer = optimizer.with_transforms(chain);
//! for _ in 0..10 {
//!     optimizer.backward_step(&w.sqr()?.sum_all()?)?;
//! }
//! assert_eq!(optimizer.counts().taken, 5);
//! # Ok::<(), thalweg_optim::Error>(())
//! ```

mod accumulate;
mod clip;
mod decay;
mod guard;
mod spike;

pub use accumulate::Accumulate;
pub use clip::{clip_grad_norm, ClipByGlobalNorm, ClipByNorm, ClipByValue};
pub use decay::AddWeightDecay;
pub use guard::{Guard, NonFiniteGuard};
pub use spike::{SpikeClip, SpikeClipConfig};

use crate::gradients::Gradients;
use crate::{Error, Result, State};
use candle_core::DType;
use tensor_core::checkpoint::expect_state;

/// What follows a transform.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flow {
    /// The next transform, or the update.
    Continue,
    /// No update in this step.
    Withhold(Withheld),
}

/// Why a step is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Withheld {
    /// Gradients are still being accumulated.
    Accumulating,
    /// A gradient was not finite, and the policy is to skip the step.
    NonFinite,
}

/// One stage of a chain; it may keep state.
pub trait GradientTransform: std::fmt::Debug + Send {
    /// Changes the gradients of one step.
    ///
    /// # Errors
    /// Whatever the transform refuses; the step is then not taken.
    fn apply(&mut self, gradients: &mut Gradients<'_>) -> Result<Flow>;

    /// State to be saved, by name; none by default.
    ///
    /// # Errors
    /// Those of candle.
    fn state(&self) -> Result<State> {
        Ok(State::new())
    }

    /// Restores what [`state`](Self::state) returned.
    ///
    /// # Errors
    /// A list of what is missing or unexpected.
    fn load_state(&mut self, state: &State) -> Result<()> {
        Ok(expect_state(
            state,
            Vec::<(String, Vec<usize>, DType)>::new(),
        )?)
    }
}

/// Transforms one after the other; the first that withholds the step is the last that runs.
#[derive(Debug, Default)]
pub struct Chain(Vec<Box<dyn GradientTransform>>);

impl Chain {
    /// An empty chain, which changes nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a stage at the end.
    #[must_use]
    pub fn then(mut self, transform: impl GradientTransform + 'static) -> Self {
        self.0.push(Box::new(transform));
        self
    }
}

impl GradientTransform for Chain {
    fn apply(&mut self, gradients: &mut Gradients<'_>) -> Result<Flow> {
        for transform in &mut self.0 {
            let flow = transform.apply(gradients)?;
            if flow != Flow::Continue {
                return Ok(flow);
            }
        }
        Ok(Flow::Continue)
    }

    /// The stages' states, with the stage's position before each name.
    fn state(&self) -> Result<State> {
        let mut all = State::new();
        for (i, transform) in self.0.iter().enumerate() {
            for (name, tensor) in transform.state()? {
                all.insert(format!("{i}.{name}"), tensor);
            }
        }
        Ok(all)
    }

    fn load_state(&mut self, state: &State) -> Result<()> {
        let mut parts = vec![State::new(); self.0.len()];
        let mut unknown = vec![];
        for (name, tensor) in state {
            let place = name.split_once('.').and_then(|(i, rest)| {
                let part = parts.get_mut(i.parse::<usize>().ok()?)?;
                part.insert(rest.to_string(), tensor.clone())
                    .is_none()
                    .then_some(())
            });
            if place.is_none() {
                unknown.push(format!("`{name}`: no such stage in the chain"));
            }
        }
        if !unknown.is_empty() {
            return Err(Error::StateMismatch(unknown));
        }
        let before: Result<Vec<State>> = self.0.iter().map(|t| t.state()).collect();
        let before = before?;
        for (i, part) in parts.iter().enumerate() {
            if let Err(error) = self.0[i].load_state(part) {
                // The stages before this one go back to what they were.
                for (transform, old) in self.0.iter_mut().zip(&before[..i]) {
                    transform.load_state(old)?;
                }
                return Err(error);
            }
        }
        Ok(())
    }
}

/// Refuses gradients of other parameters than a transform's buffers were made for.
fn expect_params(params: &[(String, candle_core::Var)], gradients: &Gradients<'_>) -> Result<()> {
    let same = |i: usize| gradients.var(i).id() == params[i].1.id();
    if gradients.len() == params.len() && (0..params.len()).all(same) {
        return Ok(());
    }
    let expected = format!("the {} that the transform was made for", params.len());
    Err(Error::argument("parameters", gradients.len(), expected))
}

/// Makes tensors of the gradients whose map subtracts a multiple of the parameter.
fn without_projection(gradients: &mut Gradients<'_>) -> Result<()> {
    for i in 0..gradients.len() {
        if gradients.get(i).is_some_and(|(_, map)| map.along != 0.0) {
            if let Some(tensor) = gradients.materialized(i)? {
                gradients.replace(i, tensor);
            }
        }
    }
    Ok(())
}
