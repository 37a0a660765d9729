//! The wrapper.

use super::{OrthogonalProjection, PerpGradConfig};
use crate::fused::{State, Stateful, StepReport, StepWith};
use crate::gradients::Gradients;
use crate::transform::{Chain, Flow, GradientTransform};
use crate::Result;
use candle_core::backprop::GradStore;
use candle_core::Var;
use candle_nn::Optimizer;

/// Any optimizer on projected gradients; see the [module](super) page. Other crates' optimizers
/// come in as [`Foreign`](crate::Foreign).
#[derive(Debug)]
pub struct PerpGrad<O> {
    before: Chain,
    projection: OrthogonalProjection,
    inner: O,
}

impl<O: StepWith> PerpGrad<O> {
    /// Wraps an optimizer that exists already (with its groups, say).
    ///
    /// # Errors
    /// Those of [`PerpGradConfig::validate`].
    pub fn wrap(config: PerpGradConfig, inner: O) -> Result<Self> {
        Ok(Self {
            before: Chain::new(),
            projection: OrthogonalProjection::new(config)?,
            inner,
        })
    }

    /// Transforms that come before the projection: clipping, accumulation.
    #[must_use]
    pub fn with_transforms(mut self, transforms: Chain) -> Self {
        self.before = transforms;
        self
    }

    /// The optimizer underneath.
    pub fn inner(&self) -> &O {
        &self.inner
    }

    /// The optimizer underneath.
    pub fn inner_mut(&mut self) -> &mut O {
        &mut self.inner
    }

    fn advance(
        &mut self,
        grads: &GradStore,
        first: Option<&mut dyn GradientTransform>,
    ) -> Result<StepReport> {
        let mut all = Before {
            first,
            before: &mut self.before,
            projection: &mut self.projection,
        };
        self.inner.step_with(grads, &mut all)
    }
}

/// What happens to the gradients before the optimizer underneath sees them.
#[derive(Debug)]
struct Before<'a, 'b> {
    first: Option<&'a mut (dyn GradientTransform + 'b)>,
    before: &'a mut Chain,
    projection: &'a mut OrthogonalProjection,
}

impl GradientTransform for Before<'_, '_> {
    fn apply(&mut self, gradients: &mut Gradients<'_>) -> Result<Flow> {
        let mut flow = match &mut self.first {
            Some(first) => first.apply(gradients)?,
            None => Flow::Continue,
        };
        if flow == Flow::Continue {
            flow = self.before.apply(gradients)?;
        }
        if flow == Flow::Continue {
            flow = self.projection.apply(gradients)?;
        }
        Ok(flow)
    }
}

impl<O: StepWith> Optimizer for PerpGrad<O> {
    type Config = (PerpGradConfig, O::Config);

    fn new(vars: Vec<Var>, (config, inner): Self::Config) -> candle_core::Result<Self> {
        Ok(Self::wrap(config, O::new(vars, inner)?)?)
    }

    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        self.advance(grads, None)?;
        Ok(())
    }

    fn learning_rate(&self) -> f64 {
        self.inner.learning_rate()
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.inner.set_learning_rate(lr);
    }
}

impl<O: StepWith> StepWith for PerpGrad<O> {
    fn params(&self) -> &[(String, Var)] {
        self.inner.params()
    }

    fn step_with(
        &mut self,
        grads: &GradStore,
        transform: &mut dyn GradientTransform,
    ) -> Result<StepReport> {
        self.advance(grads, Some(transform))
    }
}

/// The state is that of the optimizer underneath and of the transforms.
impl<O: Stateful> Stateful for PerpGrad<O> {
    fn state(&self) -> Result<State> {
        let mut state = State::new();
        for (prefix, part) in [
            ("inner", self.inner.state()?),
            ("before", self.before.state()?),
        ] {
            for (name, tensor) in part {
                state.insert(format!("{prefix}.{name}"), tensor);
            }
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &State) -> Result<()> {
        let (mut inner, mut before, mut unknown) = (State::new(), State::new(), Vec::new());
        for (name, tensor) in state {
            if let Some(name) = name.strip_prefix("inner.") {
                inner.insert(name.to_string(), tensor.clone());
            } else if let Some(name) = name.strip_prefix("before.") {
                before.insert(name.to_string(), tensor.clone());
            } else {
                unknown.push(format!("unexpected tensor `{name}`"));
            }
        }
        if !unknown.is_empty() {
            return Err(crate::Error::StateMismatch(unknown));
        }
        let old = self.before.state()?;
        self.before.load_state(&before)?;
        let loaded = self.inner.load_state(&inner);
        if loaded.is_err() {
            self.before.load_state(&old)?;
        }
        loaded
    }

    fn state_bytes(&self) -> usize {
        self.inner.state_bytes()
    }
}
