//! Gradient transforms: clip, project, accumulate, guard, in a chain before any optimizer.
//!
//! A [`GradientTransform`] changes the [`Gradients`] of one step. A transform that scales, clips or
//! projects composes its scalars into their maps and allocates nothing; one that a map cannot
//! express replaces a gradient's tensor. Any transform may [withhold](Flow::Withhold) the step.

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
        for (transform, part) in self.0.iter_mut().zip(&parts) {
            transform.load_state(part)?;
        }
        Ok(())
    }
}
