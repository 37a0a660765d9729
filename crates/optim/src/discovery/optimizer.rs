//! A program as an optimizer.

use super::check::Signature;
use super::interpret::{CompiledProgram, ProgramRun};
use super::ops::Number;
use super::program::Program;
use super::simplify::simplify;
use crate::fused::{part, State};
use crate::param_group::numbered;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Storage, Tensor, Var, WithDType};
use candle_nn::Optimizer;
use std::sync::{Mutex, PoisonError};
use tensor_core::checkpoint::{expect_state, TensorSpec};
use tensor_core::kernels::sum_squares;

/// What a [`ProgramOptimizer`] runs.
#[derive(Debug, Clone, PartialEq)]
pub struct ProgramConfig {
    /// An update rule ([`Signature::optimizer`]).
    pub program: Program,
    /// The value of the schedule that the program gets as `lr`, in `[0, 1]`; the base rate is a
    /// constant inside the program.
    pub lr: f64,
}

impl ProgramConfig {
    /// The program at a schedule of 1.
    pub fn new(program: Program) -> Self {
        Self { program, lr: 1.0 }
    }
}

/// A found program in one's own loop, in `f32` or `f64` on the CPU: parameters are updated in place,
/// in one pass over memory for a program without norms and dot products (and one more for each level
/// of them). Scalars of the program are computed over all parameters together.
///
/// Parameters without gradient are left alone. Gradients that are not finite are an error, and
/// nothing is changed.
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
    params: Vec<(String, Var)>,
    program: CompiledProgram,
    lr: f64,
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
        Ok(Self {
            params,
            program,
            lr: config.lr,
            dtype,
            single,
            double,
        })
    }

    /// The program, simplified.
    pub fn program(&self) -> &Program {
        self.program.program()
    }

    fn advance(&mut self, grads: &GradStore) -> Result<()> {
        let mut bad = Vec::new();
        for (name, var) in &self.params {
            if let Some(grad) = grads.get(var) {
                if !sum_squares(grad)?.is_finite() {
                    bad.push(name.clone());
                }
            }
        }
        if !bad.is_empty() {
            return Err(Error::NonFiniteGradient(bad));
        }
        let (params, program, lr) = (&self.params, &self.program, self.lr);
        match self.dtype {
            DType::F64 => apply(params, program, &mut self.double, grads, lr),
            _ => apply(params, program, &mut self.single, grads, lr),
        }
    }

    /// The carried trees by name (`m.weight`).
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<State> {
        let mut state = State::new();
        for (i, (name, var)) in self.params.iter().enumerate() {
            for (k, tree) in self.program_trees().iter().enumerate() {
                let tensor = match self.dtype {
                    DType::F64 => {
                        Tensor::from_slice(&self.double[i][k], var.shape(), &Device::Cpu)?
                    }
                    _ => Tensor::from_slice(&self.single[i][k], var.shape(), &Device::Cpu)?,
                };
                state.insert(format!("{tree}.{name}"), tensor);
            }
        }
        Ok(state)
    }

    fn program_trees(&self) -> Vec<String> {
        Signature::optimizer().carried
    }

    /// Restores what [`state`](Self::state) returned.
    ///
    /// # Errors
    /// A list of everything that does not fit; nothing is changed then.
    pub fn load_state(&mut self, state: &State) -> Result<()> {
        let own = self.state()?;
        let spec = |(name, tensor): (&String, &Tensor)| {
            TensorSpec::from((name.as_str(), tensor.dims(), tensor.dtype()))
        };
        expect_state(state, own.iter().map(spec))?;
        for (i, (name, _)) in self.params.iter().enumerate() {
            for (k, tree) in self.program_trees().iter().enumerate() {
                let values = part(state, &format!("{tree}.{name}"))?.flatten_all()?;
                match self.dtype {
                    DType::F64 => self.double[i][k] = values.to_vec1()?,
                    _ => self.single[i][k] = values.to_vec1()?,
                }
            }
        }
        Ok(())
    }
}

/// Numbers that programs run in and candle stores.
trait Stored: Number + WithDType {
    fn slice(storage: &CpuStorage) -> candle_core::Result<&[Self]>;
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut Vec<Self>>;
}

impl Stored for f32 {
    fn slice(storage: &CpuStorage) -> candle_core::Result<&[Self]> {
        storage.as_slice()
    }
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut Vec<Self>> {
        match storage {
            CpuStorage::F32(data) => Some(data),
            _ => None,
        }
    }
}

impl Stored for f64 {
    fn slice(storage: &CpuStorage) -> candle_core::Result<&[Self]> {
        storage.as_slice()
    }
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut Vec<Self>> {
        match storage {
            CpuStorage::F64(data) => Some(data),
            _ => None,
        }
    }
}

/// One step over the parameters that have a gradient.
fn apply<T: Stored>(
    params: &[(String, Var)],
    program: &CompiledProgram,
    state: &mut [Vec<Vec<T>>],
    grads: &GradStore,
    lr: f64,
) -> Result<()> {
    let mut chosen = Vec::new();
    for (i, (_, var)) in params.iter().enumerate() {
        if let Some(grad) = grads.get(var) {
            chosen.push((i, var, grad.detach().contiguous()?));
        }
    }
    let sizes: Vec<usize> = chosen.iter().map(|(_, var, _)| var.elem_count()).collect();
    let mut run = program.run::<T>(&[]);
    let trees = chosen.iter().map(|(i, ..)| std::mem::take(&mut state[*i]));
    run.adopt(sizes, trees.collect());
    let result = step(&chosen, &mut run, lr);
    // Whatever happened, the carried trees go back.
    for ((i, ..), trees) in chosen.iter().zip(run.release()) {
        state[*i] = trees;
    }
    result
}

type Chosen<'v> = (usize, &'v Var, Tensor);

fn step<T: Stored>(chosen: &[Chosen<'_>], run: &mut ProgramRun<'_, T>, lr: f64) -> Result<()> {
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
    let shared = Mutex::new(run);
    for (k, ((_, var, _), g)) in chosen.iter().zip(&gradient_slices).enumerate() {
        var.inplace_op1(&Finish {
            run: &shared,
            tensor: k,
            g,
        })?;
    }
    Ok(())
}

fn contents<'s, T: Stored>(storage: &'s Storage, layout: &Layout) -> Result<&'s [T]> {
    match (storage, layout.contiguous_offsets()) {
        (Storage::Cpu(cpu), Some((from, to))) => Ok(&T::slice(cpu)?[from..to]),
        _ => {
            let expected = "contiguous, on the CPU";
            Err(Error::argument("tensor", layout.dims(), expected))
        }
    }
}

/// The last pass on one parameter.
struct Finish<'a, 'p, T> {
    run: &'a Mutex<&'a mut ProgramRun<'p, T>>,
    tensor: usize,
    g: &'a [T],
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
        run.finish(self.tensor, &mut data[from..to], self.g);
        Ok(())
    }
}

impl Optimizer for ProgramOptimizer {
    type Config = ProgramConfig;

    fn new(vars: Vec<Var>, config: ProgramConfig) -> candle_core::Result<Self> {
        Ok(Self::named(numbered(vars), config)?)
    }

    fn step(&mut self, grads: &GradStore) -> candle_core::Result<()> {
        Ok(self.advance(grads)?)
    }

    /// The schedule's value.
    fn learning_rate(&self) -> f64 {
        self.lr
    }

    fn set_learning_rate(&mut self, lr: f64) {
        self.lr = lr;
    }
}
