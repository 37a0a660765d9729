//! What all optimizers on the fused engine share: gathering gradients, the policy for those that
//! are not finite, running the rule, saving and restoring.

use crate::gradients::Gradients;
use crate::transform::{Chain, Flow, GradientTransform, Withheld};
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use std::collections::BTreeMap;
use std::sync::Arc;
use tensor_core::checkpoint::{expect_state, spec_of, TensorSpec};
use tensor_core::kernels::{FusedUpdate, Rule, StateDType, Work};

/// What happens to gradients with NaN or infinite entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum NonFinite {
    /// An entry without a finite gradient keeps its parameter and state in this step, and is
    /// counted. Costs no memory pass.
    #[default]
    Hold,
    /// The numbers go their way (torch's behaviour): NaN reaches the parameter.
    Propagate,
    /// The whole step is left out and counted. Costs one more pass over the gradients.
    SkipStep,
    /// The step is an error that names the tensors, and nothing is changed. Costs one more pass
    /// over the gradients.
    Error,
}

/// What a step did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepReport {
    /// Why the step was not taken, if it was not.
    pub withheld: Option<Withheld>,
    /// Parameters without a gradient: neither updated nor decayed.
    pub without_gradient: usize,
    /// Entries that were held because their gradient was not finite.
    pub held: u64,
}

impl StepReport {
    pub(crate) fn withheld(why: Withheld) -> Self {
        Self {
            withheld: Some(why),
            ..Self::default()
        }
    }
}

/// How weight decay acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightDecay {
    /// `w <- w (1 - eta lambda)`, beside the gradient (AdamW).
    Decoupled,
    /// `g <- g + lambda w`: an L2 penalty, which passes through momentum and normalization.
    Coupled,
}

/// Counts over the life of an optimizer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StepCounts {
    /// Steps taken.
    pub taken: u64,
    /// Steps left out because of non-finite gradients.
    pub skipped: u64,
    /// Entries held because of non-finite gradients.
    pub held: u64,
}

impl StepCounts {
    pub(crate) fn tensor(&self) -> Result<Tensor> {
        counters(&[self.taken, self.skipped, self.held])
    }

    pub(crate) fn read(tensor: &Tensor) -> Result<Self> {
        let [taken, skipped, held] = read_counters(tensor)?;
        Ok(Self {
            taken,
            skipped,
            held,
        })
    }
}

/// Saved state: named tensors.
pub type State = BTreeMap<String, Tensor>;

/// An optimizer that takes a gradient transform along into its step: what wrappers need beyond
/// `candle_nn::Optimizer`. This crate's optimizers apply the transform's scalars inside their fused
/// pass; [`Foreign`](crate::Foreign) makes any other candle optimizer one.
pub trait StepWith: candle_nn::Optimizer {
    /// The parameters with their names, in order.
    fn params(&self) -> &[(String, Var)];

    /// One step after an additional transform, which comes before the optimizer's own chain.
    ///
    /// # Errors
    /// Those of the transform and of the step.
    fn step_with(
        &mut self,
        grads: &GradStore,
        transform: &mut dyn GradientTransform,
    ) -> Result<StepReport>;
}

/// An optimizer whose state is data.
pub trait Stateful: StepWith {
    /// Everything that a later run needs to continue with the same bits: moments, counters, masks,
    /// random streams, the state of the transforms; not the parameters and not the configuration.
    ///
    /// # Errors
    /// Those of candle.
    fn state(&self) -> Result<State>;

    /// Restores what [`state`](Self::state) returned.
    ///
    /// # Errors
    /// A list of everything that is missing, unexpected or of another shape or dtype; nothing is
    /// changed then.
    fn load_state(&mut self, state: &State) -> Result<()>;

    /// Bytes that the state occupies, from the real allocations.
    fn state_bytes(&self) -> usize;

    /// A copy of parameters and state, for steps that may be undone.
    ///
    /// # Errors
    /// Those of candle.
    fn snapshot(&self) -> Result<Snapshot> {
        let copy = |(_, var): &(String, Var)| var.as_tensor().detach().copy();
        let params: candle_core::Result<Vec<_>> = self.params().iter().map(copy).collect();
        Ok(Snapshot {
            params: params?,
            state: self.state()?,
        })
    }

    /// Goes back to a snapshot, bit for bit.
    ///
    /// # Errors
    /// [`Error::StateMismatch`] when it was taken of other parameters.
    fn restore(&mut self, snapshot: &Snapshot) -> Result<()> {
        if snapshot.params.len() != self.params().len() {
            let counts = (snapshot.params.len(), self.params().len());
            return Err(Error::StateMismatch(vec![format!(
                "snapshot of {} parameters, expected {}",
                counts.0, counts.1
            )]));
        }
        self.load_state(&snapshot.state)?;
        for ((_, var), copy) in self.params().iter().zip(&snapshot.params) {
            var.set(copy)?;
        }
        Ok(())
    }
}

/// Parameters and state at one moment.
#[derive(Debug, Clone)]
pub struct Snapshot {
    params: Vec<Tensor>,
    state: State,
}

/// Parameters, state buffers, transforms and counts of one optimizer.
#[derive(Debug)]
pub(crate) struct Core<const S: usize> {
    params: Arc<[(String, Var)]>,
    pub(crate) update: FusedUpdate<S>,
    slots: [&'static str; S],
    pub(crate) transforms: Chain,
    pub(crate) nonfinite: NonFinite,
    pub(crate) counts: StepCounts,
}

impl<const S: usize> Core<S> {
    /// `slots` names the state buffers in saved state.
    pub(crate) fn new(
        params: Vec<(String, Var)>,
        slots: [&'static str; S],
        dtype: StateDType,
        nonfinite: NonFinite,
    ) -> Result<Self> {
        Ok(Self {
            update: FusedUpdate::new(params.clone(), dtype)?,
            params: params.into(),
            slots,
            transforms: Chain::new(),
            nonfinite,
            counts: StepCounts::default(),
        })
    }

    pub(crate) fn params(&self) -> &[(String, Var)] {
        &self.params
    }

    /// The parameters, to be borrowed beside the core itself.
    pub(crate) fn shared_params(&self) -> Arc<[(String, Var)]> {
        self.params.clone()
    }

    /// The step's gradients after all transforms, or why the step is not taken.
    pub(crate) fn gather<'g>(
        &mut self,
        params: &'g [(String, Var)],
        grads: &'g GradStore,
        first: Option<&mut dyn GradientTransform>,
    ) -> Result<std::result::Result<Gradients<'g>, Withheld>> {
        let gradients = Gradients::collect(params, grads);
        let (chain, counts) = (&mut self.transforms, &mut self.counts);
        gather(gradients, first, chain, self.nonfinite, counts)
    }

    /// Runs the rule over all parameters that have a gradient.
    pub(crate) fn run<R: Rule<S, K>, const K: usize>(
        &mut self,
        set: &Gradients<'_>,
        mut rule: impl FnMut(usize) -> R,
    ) -> Result<StepReport> {
        let hold = self.nonfinite == NonFinite::Hold;
        let mut without_gradient = 0;
        self.update.step(hold, |i| {
            let work = set.get(i).map(|(grad, map)| Work {
                grad,
                rule: rule(i),
                map,
            });
            without_gradient += usize::from(work.is_none());
            Ok(work)
        })?;
        let held = (0..self.update.len()).map(|i| self.update.held(i)).sum();
        self.counts.taken += 1;
        self.counts.held += held;
        if held > 0 {
            tracing::warn!(held, "entries held: non-finite gradient");
        }
        Ok(StepReport {
            withheld: None,
            without_gradient,
            held,
        })
    }

    /// The state buffers by name (`m.weight`), the counts and the transforms' state.
    pub(crate) fn state(&self) -> Result<State> {
        let mut state = State::new();
        for (i, (name, _)) in self.params.iter().enumerate() {
            for (slot, label) in self.slots.iter().enumerate() {
                state.insert(format!("{label}.{name}"), self.update.state(i, slot)?);
            }
        }
        state.insert("counts".into(), self.counts.tensor()?);
        for (name, tensor) in self.transforms.state()? {
            state.insert(format!("transform.{name}"), tensor);
        }
        Ok(state)
    }

    /// Restores [`state`](Self::state); `own` are the names that the optimizer itself restores.
    /// Nothing is changed unless everything fits.
    pub(crate) fn load_state(&mut self, state: &State, own: &State) -> Result<()> {
        self.check_state(state, own, |i| self.params[i].1.dims().to_vec())?;
        self.install(state)
    }

    /// Compares a state with what is expected, for buffers of the given shapes.
    pub(crate) fn check_state(
        &self,
        state: &State,
        own: &State,
        shape: impl Fn(usize) -> Vec<usize>,
    ) -> Result<()> {
        let mut expected = spec_of(own);
        expected.push(TensorSpec::from((
            "counts",
            [3usize].as_slice(),
            DType::I64,
        )));
        for (i, (name, _)) in self.params.iter().enumerate() {
            for label in self.slots {
                let dtype = self.update.state_dtype(i);
                let name = format!("{label}.{name}");
                expected.push(TensorSpec::from((
                    name.as_str(),
                    shape(i).as_slice(),
                    dtype,
                )));
            }
        }
        let rest: State = state
            .iter()
            .filter(|(name, _)| !name.starts_with("transform."))
            .map(|(name, tensor)| (name.clone(), tensor.clone()))
            .collect();
        Ok(expect_state(&rest, expected)?)
    }

    /// Takes over a state that has been checked.
    pub(crate) fn install(&mut self, state: &State) -> Result<()> {
        let of_transforms = |(name, tensor): (&String, &Tensor)| {
            let name = name.strip_prefix("transform.")?;
            Some((name.to_string(), tensor.clone()))
        };
        self.transforms
            .load_state(&state.iter().filter_map(of_transforms).collect())?;
        for i in 0..self.params.len() {
            for (slot, label) in self.slots.iter().enumerate() {
                let name = format!("{label}.{}", self.params[i].0);
                self.update.load_state(i, slot, &state[&name])?;
            }
        }
        self.counts = StepCounts::read(&state["counts"])?;
        Ok(())
    }
}

/// Gradients after a transform and a chain, or why the step is not taken.
pub(crate) fn gather<'g>(
    mut gradients: Gradients<'g>,
    first: Option<&mut dyn GradientTransform>,
    chain: &mut Chain,
    nonfinite: NonFinite,
    counts: &mut StepCounts,
) -> Result<std::result::Result<Gradients<'g>, Withheld>> {
    let mut flow = match first {
        Some(first) => first.apply(&mut gradients)?,
        None => Flow::Continue,
    };
    if flow == Flow::Continue {
        flow = chain.apply(&mut gradients)?;
    }
    if flow == Flow::Continue {
        flow = guard(&gradients, nonfinite)?;
    }
    let Flow::Withhold(why) = flow else {
        return Ok(Ok(gradients));
    };
    if why == Withheld::NonFinite {
        counts.skipped += 1;
        tracing::warn!(
            skipped = counts.skipped,
            "step left out: non-finite gradient"
        );
    }
    Ok(Err(why))
}

fn guard(gradients: &Gradients<'_>, nonfinite: NonFinite) -> Result<Flow> {
    if !matches!(nonfinite, NonFinite::SkipStep | NonFinite::Error) {
        return Ok(Flow::Continue);
    }
    let bad = gradients.nonfinite()?;
    if bad.is_empty() {
        return Ok(Flow::Continue);
    }
    if nonfinite == NonFinite::Error {
        let name = |(name, count): &(&str, u64)| format!("`{name}` ({count} entries)");
        return Err(Error::NonFiniteGradient(bad.iter().map(name).collect()));
    }
    Ok(Flow::Withhold(Withheld::NonFinite))
}

/// One tensor of a state.
pub(crate) fn part<'a>(state: &'a State, name: &str) -> Result<&'a Tensor> {
    let missing = || Error::StateMismatch(vec![format!("missing tensor `{name}`")]);
    state.get(name).ok_or_else(missing)
}

/// Counters as an `i64` tensor.
pub(crate) fn counters(values: &[u64]) -> Result<Tensor> {
    let values: Vec<i64> = values.iter().map(|x| *x as i64).collect();
    Ok(Tensor::from_slice(&values, values.len(), &Device::Cpu)?)
}

/// Reads what [`counters`] wrote.
pub(crate) fn read_counters<const N: usize>(tensor: &Tensor) -> Result<[u64; N]> {
    let values = tensor.to_dtype(DType::I64)?.to_vec1::<i64>()?;
    let array: std::result::Result<[i64; N], _> = values.try_into();
    match array {
        Ok(values) if values.iter().all(|x| *x >= 0) => Ok(values.map(|x| x as u64)),
        other => Err(Error::StateMismatch(vec![format!(
            "counters {other:?}, expected {N} counts"
        )])),
    }
}

/// The groups' learning rates as multiples of the first group's, so that a schedule that sets one
/// rate moves all of them.
#[derive(Debug, Clone)]
pub(crate) struct Rates {
    base: f64,
    configured: Vec<f64>,
}

impl Rates {
    pub(crate) fn new(rates: impl IntoIterator<Item = f64>) -> Self {
        let configured: Vec<f64> = rates.into_iter().collect();
        Self {
            base: configured.first().copied().unwrap_or(0.0),
            configured,
        }
    }

    pub(crate) fn base(&self) -> f64 {
        self.base
    }

    pub(crate) fn set(&mut self, base: f64) {
        self.base = base;
    }

    /// Gives a group another rate.
    pub(crate) fn configure(&mut self, group: usize, rate: f64) {
        let current: Vec<f64> = (0..self.configured.len()).map(|g| self.of(g)).collect();
        self.configured = current;
        self.configured[group] = rate;
        self.base = self.configured[0];
    }

    pub(crate) fn of(&self, group: usize) -> f64 {
        let (first, own) = (self.configured[0], self.configured[group]);
        if self.base == first {
            own
        } else if first == 0.0 {
            self.base
        } else {
            self.base * (own / first)
        }
    }
}

/// The parts of `Stateful` and `candle_nn::Optimizer` that are the same for every optimizer with a
/// field `core` (a [`Core`]) and `rates` (a [`Rates`]).
macro_rules! delegate {
    ($optimizer:ty, $config:ty) => {
        impl $optimizer {
            /// Adds a chain of gradient transforms before the update.
            #[must_use]
            pub fn with_transforms(mut self, transforms: $crate::transform::Chain) -> Self {
                self.core.transforms = transforms;
                self
            }

            /// Steps taken and left out, entries held, since the beginning.
            pub fn counts(&self) -> $crate::StepCounts {
                self.core.counts
            }
        }

        impl candle_nn::Optimizer for $optimizer {
            type Config = $config;

            fn new(vars: Vec<candle_core::Var>, config: $config) -> candle_core::Result<Self> {
                Ok(Self::from_group($crate::ParamGroup::new(vars, config))?)
            }

            fn step(
                &mut self,
                grads: &candle_core::backprop::GradStore,
            ) -> candle_core::Result<()> {
                self.advance(grads, None)?;
                Ok(())
            }

            fn learning_rate(&self) -> f64 {
                self.rates.base()
            }

            /// Sets the first group's rate; the others keep their ratio to it.
            fn set_learning_rate(&mut self, lr: f64) {
                self.rates.set(lr);
            }
        }

        impl $crate::StepWith for $optimizer {
            fn params(&self) -> &[(String, candle_core::Var)] {
                self.core.params()
            }

            fn step_with(
                &mut self,
                grads: &candle_core::backprop::GradStore,
                transform: &mut dyn $crate::transform::GradientTransform,
            ) -> $crate::Result<$crate::StepReport> {
                self.advance(grads, Some(transform))
            }
        }

        impl $crate::Stateful for $optimizer {
            fn state(&self) -> $crate::Result<$crate::State> {
                let mut state = self.core.state()?;
                state.extend(self.own_state()?);
                Ok(state)
            }

            fn load_state(&mut self, state: &$crate::State) -> $crate::Result<()> {
                self.load(state)
            }

            fn state_bytes(&self) -> usize {
                self.core.update.state_bytes()
            }
        }
    };
}
pub(crate) use delegate;
