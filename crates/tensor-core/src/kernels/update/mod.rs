//! [`FusedUpdate`]: state buffers, and one pass of a rule over all parameters.

mod check;
#[cfg(feature = "cuda")]
mod on_cuda;
mod run;
mod state;

use super::plan::Plan;
use super::{GradMap, Rule};
use crate::flat::{FlatData, FlatTensor};
use crate::{Error, Result};
use candle_core::{DType, Tensor, Var};
use check::{check_device, check_gradient, refuse_shared};
use run::{Locking, Slot};
use state::{state_dtype, zeros, Entry};
use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::AtomicU64;

/// Tensors whose write locks are held together; bounds the depth of the nested calls.
const LOCKED_TOGETHER: usize = 256;

/// What state is stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StateDType {
    /// `f32` for `f32`, `bf16` and `f16` parameters, `f64` for `f64` parameters.
    Compute,
    /// A fixed type: `F32` or `BF16` for parameters of at most 32 bits, `F64` for `f64`.
    Fixed(DType),
}

/// What one tensor does in one step.
#[derive(Debug, Clone, Copy)]
pub struct Work<'a, R> {
    /// The gradient, of the parameter's shape and dtype. Read in place when contiguous.
    pub grad: &'a Tensor,
    /// The rule with this step's scalars.
    pub rule: R,
    /// Applied to the gradient in registers.
    pub map: GradMap,
}

/// The scalars of one tensor's work.
pub(in crate::kernels) struct Prepared<const K: usize> {
    pub(in crate::kernels) scalars: [f64; K],
    pub(in crate::kernels) map: GradMap,
}

/// `S` state buffers per parameter, and the pass that updates parameters and state together.
///
/// State lives in plain buffers of this type, not in candle tensors, so that one pass can write it
/// beside the parameter. Gradients that are not contiguous are copied first; nothing else is
/// allocated per parameter in a step.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use thalweg_tensor_core::kernels::{FusedUpdate, GradMap, Real, Rule, StateDType, Updated, Work};
///
/// /// `m <- b m + g; p <- p - lr m`
/// #[derive(Clone, Copy)]
/// struct HeavyBall { lr: f64, b: f64 }
/// impl Rule<1, 2> for HeavyBall {
///     const NAME: &'static str = "heavy-ball";
///     const DEVICE_BODY: Option<&'static str> = None;
///     fn scalars(&self) -> [f64; 2] { [self.lr, self.b] }
///     fn update<T: Real>(k: &[T; 2], p: T, g: T, [m]: [T; 1]) -> Updated<T, 1> {
///         let m = k[1] * m + g;
///         Updated { param: p - k[0] * m, state: [m], event: false }
///     }
/// }
///
/// let w = Var::ones(3, DType::F32, &Device::Cpu)?;
/// let mut update = FusedUpdate::<1>::new(vec![("w".into(), w.clone())], StateDType::Compute)?;
/// let grad = Tensor::new(&[1f32, 0., -1.], &Device::Cpu)?;
/// let rule = HeavyBall { lr: 0.5, b: 0.9 };
/// update.step(true, |_| Ok(Some(Work { grad: &grad, rule, map: GradMap::default() })))?;
/// assert_eq!(w.to_vec1::<f32>()?, [0.5, 1.0, 1.5]);
/// # Ok::<(), thalweg_tensor_core::Error>(())
/// ```
pub struct FusedUpdate<const S: usize> {
    entries: Vec<Entry<S>>,
    batches: Vec<(Range<usize>, Plan)>,
    #[cfg(feature = "cuda")]
    cuda: Option<on_cuda::OnCuda>,
}

impl<const S: usize> std::fmt::Debug for FusedUpdate<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FusedUpdate")
            .field("tensors", &self.entries.len())
            .field("state_bytes", &self.state_bytes())
            .finish()
    }
}

impl<const S: usize> FusedUpdate<S> {
    /// Zeroed state for named variables.
    ///
    /// # Errors
    /// [`Error::SharedStorage`] when two variables share memory, [`Error::DTypeMismatch`] for
    /// integer parameters or a state type that does not fit, [`Error::Unsupported`] for variables
    /// that are not contiguous or not on the CPU.
    pub fn new(params: Vec<(String, Var)>, state: StateDType) -> Result<Self> {
        refuse_shared(&params)?;
        let first = params.first().map(|(_, var)| var.device().clone());
        let mut entries = Vec::with_capacity(params.len());
        for (name, var) in params {
            check_device(
                || format!("parameter `{name}`"),
                var.device(),
                first.as_ref(),
            )?;
            if !var.is_contiguous() {
                return Err(Error::unsupported(
                    format!("a fused update of `{name}`"),
                    "for a variable that is not contiguous",
                ));
            }
            let dtype = state_dtype(&name, var.dtype(), state)?;
            let len = var.elem_count();
            entries.push(Entry {
                name,
                state_dtype: dtype,
                state: zeros(dtype, len, var.device())?,
                var,
                mask: None,
                events: AtomicU64::new(0),
                held: AtomicU64::new(0),
            });
        }
        let batches = (0..entries.len())
            .step_by(LOCKED_TOGETHER)
            .map(|start| {
                let range = start..(start + LOCKED_TOGETHER).min(entries.len());
                let sizes = entries[range.clone()].iter().map(|e| e.var.elem_count());
                (range.clone(), Plan::new(sizes))
            })
            .collect();
        Ok(Self {
            #[cfg(feature = "cuda")]
            cuda: on_cuda::OnCuda::new(first.as_ref(), entries.len())?,
            entries,
            batches,
        })
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Name of tensor `i`.
    pub fn name(&self, i: usize) -> &str {
        &self.entries[i].name
    }

    /// Variable `i`.
    pub fn var(&self, i: usize) -> &Var {
        &self.entries[i].var
    }

    /// One pass of a rule over all tensors for which `work` returns something.
    ///
    /// With `hold_nonfinite`, an entry whose (mapped) gradient is NaN or infinite keeps its
    /// parameter and state, and is counted in [`held`](Self::held).
    ///
    /// # Errors
    /// Nothing is changed when `work` fails or a gradient does not fit its parameter (shape,
    /// dtype, device, or memory shared with a parameter).
    pub fn step<'a, R: Rule<S, K>, const K: usize>(
        &mut self,
        hold_nonfinite: bool,
        mut work: impl FnMut(usize) -> Result<Option<Work<'a, R>>>,
    ) -> Result<()> {
        let mut prepared = Vec::with_capacity(self.entries.len());
        let mut grads: Vec<Option<&'a Tensor>> = Vec::with_capacity(self.entries.len());
        let mut strided = Vec::new();
        for (i, entry) in self.entries.iter().enumerate() {
            let item = work(i)?;
            if let Some(item) = &item {
                check_gradient(entry, item.grad)?;
                item.map.check()?;
                if !item.grad.is_contiguous() {
                    strided.push((i, item.grad.contiguous()?));
                }
            }
            grads.push(item.as_ref().map(|item| item.grad));
            prepared.push(item.map(|item| Prepared {
                scalars: item.rule.scalars(),
                map: item.map,
            }));
        }
        let mut grads: Vec<Option<&Tensor>> = grads;
        for (i, copy) in &strided {
            grads[*i] = Some(copy);
        }
        self.refuse_aliased_gradients(&grads)?;
        #[cfg(feature = "cuda")]
        if self.cuda.is_some() {
            return self.step_on_cuda::<R, K>(&grads, &prepared, hold_nonfinite);
        }
        let state = self.begin();
        for (batch, (range, _)) in self.batches.iter().enumerate() {
            let locking = Locking {
                vars: &self.entries[range.clone()],
                grads: &grads[range.clone()],
                state: &state[range.clone()],
                slots: RefCell::new(Vec::with_capacity(range.len())),
                run: &|slots: &[Slot<S>]| {
                    self.run_batch::<R, K>(batch, slots, &prepared[range.clone()], hold_nonfinite);
                },
            };
            locking.enter(0)?;
        }
        Ok(())
    }

    /// [`step`](Self::step) for parameters and gradients in flat buffers with this update's layout
    /// (same names, shapes and order); the variables are not touched.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] or [`Error::DTypeMismatch`] when a layout differs.
    pub fn step_flat<R: Rule<S, K>, const K: usize>(
        &mut self,
        params: &mut FlatTensor,
        grads: &FlatTensor,
        hold_nonfinite: bool,
        mut rule_for: impl FnMut(usize) -> Result<Option<(R, GradMap)>>,
    ) -> Result<()> {
        if self.entries.iter().any(|e| !e.var.device().is_cpu()) {
            return Err(Error::unsupported("a step on flat buffers", "on a device"));
        }
        for (flat, what) in [(&*params, "parameters"), (grads, "gradients")] {
            self.check_layout(flat, what)?;
        }
        let mut prepared = Vec::with_capacity(self.entries.len());
        for i in 0..self.entries.len() {
            let item = rule_for(i)?;
            if let Some((_, map)) = &item {
                map.check()?;
            }
            prepared.push(item.map(|(rule, map)| Prepared {
                scalars: rule.scalars(),
                map,
            }));
        }
        let state = self.begin();
        let offsets = grads.layout().offsets().to_vec();
        let (dtype, base, grad_base): (_, *mut u8, *const u8) =
            match (params.data_mut(), grads.data()) {
                (FlatData::F32(p), FlatData::F32(g)) => {
                    (DType::F32, p.as_mut_ptr().cast(), g.as_ptr().cast())
                }
                (FlatData::F64(p), FlatData::F64(g)) => {
                    (DType::F64, p.as_mut_ptr().cast(), g.as_ptr().cast())
                }
                _ => {
                    return Err(Error::invalid(
                        "flat gradients",
                        "another dtype",
                        "the parameters'",
                    ))
                }
            };
        for batch in 0..self.batches.len() {
            let range = self.batches[batch].0.clone();
            let slots: Vec<Slot<S>> = range
                .clone()
                .map(|i| {
                    let offset = offsets[i] * dtype.size_in_bytes();
                    Slot {
                        active: prepared[i].is_some(),
                        dtype,
                        // SAFETY: the layout was checked: the offset lies inside both buffers.
                        param: unsafe { base.add(offset) },
                        // SAFETY: as above.
                        grad: unsafe { grad_base.add(offset) },
                        state: state[i].0,
                    }
                })
                .collect();
            self.run_batch::<R, K>(batch, &slots, &prepared[range], hold_nonfinite);
        }
        Ok(())
    }
}
