//! A program as an optimizer.

use super::check::Signature;
use super::interpret::{CompiledProgram, ProgramRun};
use super::ops::Number;
use super::program::Program;
use super::simplify::simplify;
use crate::fused::{gather, part, State};
use crate::gradients::Gradients;
use crate::host::contents;
use crate::param_group::numbered;
use crate::transform::{Chain, GradientTransform};
use crate::{Error, NonFinite, Result, Stateful, StepCounts, StepReport, StepWith};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Tensor, Var, WithDType};
use candle_nn::Optimizer;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use tensor_core::checkpoint::{expect_state, TensorSpec};

/// What a [`ProgramOptimizer`] runs.
#[derive(Debug, Clone, PartialEq)]
pub struct ProgramConfig {
    /// An update rule ([`Signature::optimizer`]).
    pub program: Program,
    /// The value of the schedule that the program gets as `lr`, in `[0, 1]`; the base rate is a
    /// constant inside the program.
    pub lr: f64,
    /// What happens to gradients that are not finite. Norms and dot products mix the entries, so that
    /// none can be held by itself: with them, [`NonFinite::Hold`] acts as [`NonFinite::Error`].
    pub nonfinite: NonFinite,
}

impl ProgramConfig {
    /// The program at a schedule of 1.
    pub fn new(program: Program) -> Self {
        Self {
            program,
            lr: 1.0,
            nonfinite: NonFinite::Hold,
        }
    }
}

/// A found program in one's own loop, in `f32` or `f64` on the CPU: parameters are updated in place,
/// in one pass over memory for a program without norms and dot products (and one more for each level
/// of them). Scalars of the program are computed over all parameters together. A carried tree that
/// the program hands through costs nothing.
///
/// Parameters without gradient are left alone.
///
/// ```
/// use candle_core::{Device, Var};
/// use candle_nn::Optimizer;
/// use thalweg_optim::discovery::{Program, ProgramConfig, ProgramOptimizer};
///
/// let w = Var::new(&[1f32, -2.0], &Device::Cpu)?;
/// let config = ProgramConfig::new(Program::lion()?);
/// let mut optimizer = ProgramOptimizer::new(vec![w.clone()], config)?;
/// optimizer.backward_step(&w.sqr()?.sum_all()?)?;
/// // Sign and decay, at the program's own rate of 1e-4.
/// assert!((w.to_vec1::<f32>()?[0] - (1.0 - 1e-4 * 1.1)).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Debug)]
pub struct ProgramOptimizer {
    params: Arc<[(String, Var)]>,
    program: CompiledProgram,
    lr: f64,
    nonfinite: NonFinite,
    transforms: Chain,
    counts: StepCounts,
    dtype: DType,
    /// The carried trees of each parameter.
    single: Vec<Vec<Vec<f32>>>,
    double: Vec<Vec<Vec<f64>>>,
}

impl ProgramOptimizer {
    /// Named parameters of one dtype.
    ///
    /// # Errors
    /// [`Error::ProgramType`] for a program that is no update rule; [`Error::DType`] unless all
    /// parameters are `f32` or all `f64`; [`Error::InvalidArgument`] for parameters on a device.
    pub fn named(params: Vec<(String, Var)>, config: ProgramConfig) -> Result<Self> {
        let signature = Signature::optimizer();
        let program = simplify(&config.program, &signature);
        let program = CompiledProgram::new(&program, &signature)?;
        let dtype = params.first().map_or(DType::F32, |(_, var)| var.dtype());
        for (name, var) in &params {
            if var.dtype() != dtype || !matches!(dtype, DType::F32 | DType::F64) {
                return Err(Error::DType {
                    tensor: name.clone(),
                    got: var.dtype(),
                    expected: "F32 or F64, the same for all".into(),
                });
            }
            if !var.device().is_cpu() {
                let value = var.device().location();
                return Err(Error::argument(
                    "device",
                    value,
                    "the CPU: programs run there",
                ));
            }
        }
        let carried = signature.carried.len();
        let sizes = params.iter().map(|(_, var)| var.elem_count());
        let (single, double) = match dtype {
            DType::F64 => (vec![], sizes.map(|n| vec![vec![0.0; n]; carried]).collect()),
            _ => (sizes.map(|n| vec![vec![0.0; n]; carried]).collect(), vec![]),
        };
        let mixes = program.passes() > 1 && config.nonfinite == NonFinite::Hold;
        Ok(Self {
            params: params.into(),
            nonfinite: if mixes {
                NonFinite::Error
            } else {
                config.nonfinite
            },
            program,
            lr: config.lr,
            transforms: Chain::new(),
            counts: StepCounts::default(),
            dtype,
            single,
            double,
        })
    }

    /// The program, simplified.
    pub fn program(&self) -> &Program {
        self.program.program()
    }

    /// Adds a chain of gradient transforms before the update.
    #[must_use]
    pub fn with_transforms(mut self, transforms: Chain) -> Self {
        self.transforms = transforms;
        self
    }

    /// Steps taken and left out, entries held, since the beginning.
    pub fn counts(&self) -> StepCounts {
        self.counts
    }

    fn advance(
        &mut self,
        grads: &GradStore,
        first: Option<&mut dyn GradientTransform>,
    ) -> Result<StepReport> {
        let params = self.params.clone();
        let gradients = Gradients::collect(&params, grads);
        let (chain, counts) = (&mut self.transforms, &mut self.counts);
        let set = match gather(gradients, first, chain, self.nonfinite, counts)? {
            Ok(set) => set,
            Err(why) => return Ok(StepReport::withheld(why)),
        };
        let mut chosen = Vec::with_capacity(params.len());
        for (i, (_, var)) in params.iter().enumerate() {
            if let Some(grad) = set.materialized(i)? {
                chosen.push((i, var, grad.contiguous()?));
            }
        }
        let hold = self.nonfinite == NonFinite::Hold;
        let (program, lr) = (&self.program, self.lr);
        let held = match self.dtype {
            DType::F64 => apply(&chosen, program, &mut self.double, lr, hold),
            _ => apply(&chosen, program, &mut self.single, lr, hold),
        }?;
        self.counts.taken += 1;
        self.counts.held += held;
        if held > 0 {
            tracing::warn!(held, "entries held: non-finite gradient");
        }
        Ok(StepReport {
            withheld: None,
            without_gradient: params.len() - chosen.len(),
            held,
        })
    }
}

impl StepWith for ProgramOptimizer {
    fn params(&self) -> &[(String, Var)] {
        &self.params
    }

    fn step_with(
        &mut self,
        grads: &GradStore,
        transform: &mut dyn GradientTransform,
    ) -> Result<StepReport> {
        self.advance(grads, Some(transform))
    }
}

impl Stateful for ProgramOptimizer {
    /// The carried trees by name (`m.weight`), the counts, the transforms' state.
    fn state(&self) -> Result<State> {
        let mut state = State::new();
        for (i, (name, var)) in self.params.iter().enumerate() {
            for (k, tree) in Signature::optimizer().carried.iter().enumerate() {
                let tensor = match self.dtype {
                    DType::F64 => {
                        Tensor::from_slice(&self.double[i][k], var.shape(), &Device::Cpu)?
                    }
                    _ => Tensor::from_slice(&self.single[i][k], var.shape(), &Device::Cpu)?,
                };
                state.insert(format!("{tree}.{name}"), tensor);
            }
        }
        state.insert("counts".into(), self.counts.tensor()?);
        for (name, tensor) in self.transforms.state()? {
            state.insert(format!("transform.{name}"), tensor);
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &State) -> Result<()> {
        let of_transforms = |name: &String| name.starts_with("transform.");
        let mut own = self.state()?;
        own.retain(|name, _| !of_transforms(name));
        let (inner, rest): (State, State) = state
            .clone()
            .into_iter()
            .partition(|(name, _)| of_transforms(name));
        let spec = |(name, tensor): (&String, &Tensor)| {
            TensorSpec::from((name.as_str(), tensor.dims(), tensor.dtype()))
        };
        expect_state(&rest, own.iter().map(spec))?;
        let counts = StepCounts::read(part(state, "counts")?)?;
        let short = |(name, tensor): (String, Tensor)| (name["transform.".len()..].into(), tensor);
        self.transforms
            .load_state(&inner.into_iter().map(short).collect())?;
        self.counts = counts;
        for (i, (name, _)) in self.params.iter().enumerate() {
            for (k, tree) in Signature::optimizer().carried.iter().enumerate() {
                let values = part(state, &format!("{tree}.{name}"))?.flatten_all()?;
                match self.dtype {
                    DType::F64 => self.double[i][k] = values.to_vec1()?,
                    _ => self.single[i][k] = values.to_vec1()?,
                }
            }
        }
        Ok(())
    }

    fn state_bytes(&self) -> usize {
        let entries: usize = self.params.iter().map(|(_, var)| var.elem_count()).sum();
        entries * self.dtype.size_in_bytes() * Signature::optimizer().carried.len()
    }
}

/// Numbers that programs run in and candle stores.
trait Stored: Number + WithDType {
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut Vec<Self>>;
}

impl Stored for f32 {
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut Vec<Self>> {
        match storage {
            CpuStorage::F32(data) => Some(data),
            _ => None,
        }
    }
}

impl Stored for f64 {
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut Vec<Self>> {
        match storage {
            CpuStorage::F64(data) => Some(data),
            _ => None,
        }
    }
}

/// One step over the parameters that have a gradient; gives the number of held entries.
fn apply<T: Stored>(
    chosen: &[Chosen<'_>],
    program: &CompiledProgram,
    state: &mut [Vec<Vec<T>>],
    lr: f64,
    hold: bool,
) -> Result<u64> {
    let sizes: Vec<usize> = chosen.iter().map(|(_, var, _)| var.elem_count()).collect();
    let mut run = program.run::<T>(&[]);
    let trees = chosen.iter().map(|(i, ..)| std::mem::take(&mut state[*i]));
    run.adopt(sizes, trees.collect());
    let result = step(chosen, &mut run, lr, hold);
    // Whatever happened, the carried trees go back.
    for ((i, ..), trees) in chosen.iter().zip(run.release()) {
        state[*i] = trees;
    }
    result
}

type Chosen<'v> = (usize, &'v Var, Tensor);

fn step<T: Stored>(
    chosen: &[Chosen<'_>],
    run: &mut ProgramRun<'_, T>,
    lr: f64,
    hold: bool,
) -> Result<u64> {
    let gradients: Vec<_> = chosen
        .iter()
        .map(|(.., g)| g.storage_and_layout())
        .collect();
    let mut gradient_slices = Vec::with_capacity(chosen.len());
    for (storage, layout) in &gradients {
        gradient_slices.push(contents::<T>(storage, layout)?);
    }
    {
        let weights: Vec<_> = chosen
            .iter()
            .map(|(_, var, _)| var.storage_and_layout())
            .collect();
        let mut tensors = Vec::with_capacity(chosen.len());
        for ((storage, layout), g) in weights.iter().zip(&gradient_slices) {
            tensors.push((contents::<T>(storage, layout)?, *g));
        }
        run.prepare(&tensors, lr)?;
    }
    let (shared, held) = (Mutex::new(run), AtomicU64::new(0));
    for (k, ((_, var, _), g)) in chosen.iter().zip(&gradient_slices).enumerate() {
        var.inplace_op1(&Finish {
            run: &shared,
            tensor: k,
            g,
            held: hold.then_some(&held),
        })?;
    }
    Ok(held.into_inner())
}

/// The last pass on one parameter.
struct Finish<'a, 'p, T> {
    run: &'a Mutex<&'a mut ProgramRun<'p, T>>,
    tensor: usize,
    g: &'a [T],
    /// Counts the entries that are held; `None` holds none.
    held: Option<&'a AtomicU64>,
}

impl<T: Stored> InplaceOp1 for Finish<'_, '_, T> {
    fn name(&self) -> &'static str {
        "program"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> candle_core::Result<()> {
        let range = layout.contiguous_offsets();
        let (Some(data), Some((from, to))) = (T::slice_mut(storage), range) else {
            candle_core::bail!("a program needs contiguous parameters of its own precision");
        };
        let mut run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        let count = run.finish(
            self.tensor,
            &mut data[from..to],
            self.g,
            self.held.is_some(),
        );
        if let Some(held) = self.held {
            held.fetch_add(count, Ordering::Relaxed);
        }
        Ok(())
    }
}

impl Optimizer for ProgramOptimizer {
    type Config = ProgramConfig;

    fn new(vars: Vec<Var>, config: ProgramConfig) -> candle_core::Result<Self> {
        Ok(Self::named(numbered(vars), config)?)
    }

    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        self.advance(grads, None)?;
        Ok(())
    }

    /// The schedule's value.
    fn learning_rate(&self) -> f64 {
        self.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.lr = lr;
    }
}
