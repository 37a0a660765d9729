//! [`FusedUpdate`]: state buffers, and one pass of a rule over all parameters.

use super::mask::TILE;
use super::plan::{Plan, Segment};
use super::rule::Map;
use super::segment::{Counts, Run};
use super::{Element, GradMap, Mask, Rule};
use crate::flat::{FlatData, FlatTensor};
use crate::{Error, Result};
use candle_core::{CpuStorage, DType, Device, InplaceOp2, Layout, Tensor, Var};
use half::{bf16, f16};
use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

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

#[derive(Debug, Clone)]
enum Buffer {
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bf16(Vec<bf16>),
    /// On a device: a flat tensor that nobody else holds.
    Device(Tensor),
}

impl Buffer {
    fn zeros(dtype: DType, len: usize, device: &Device) -> Result<Self> {
        if !device.is_cpu() {
            return Ok(Self::Device(Tensor::zeros(len, dtype, device)?));
        }
        Ok(match dtype {
            DType::F64 => Self::F64(vec![0.0; len]),
            DType::BF16 => Self::Bf16(vec![bf16::ZERO; len]),
            _ => Self::F32(vec![0.0; len]),
        })
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(data) => data.capacity() * 4,
            Self::F64(data) => data.capacity() * 8,
            Self::Bf16(data) => data.capacity() * 2,
            Self::Device(data) => data.elem_count() * data.dtype().size_in_bytes(),
        }
    }

    fn pointer(&mut self) -> *mut u8 {
        match self {
            Self::F32(data) => data.as_mut_ptr().cast(),
            Self::F64(data) => data.as_mut_ptr().cast(),
            Self::Bf16(data) => data.as_mut_ptr().cast(),
            // Device memory is reached through its tensor.
            Self::Device(_) => std::ptr::null_mut(),
        }
    }

    fn tensor(&self, shape: &[usize]) -> Result<Tensor> {
        Ok(match self {
            Self::F32(data) => Tensor::from_slice(data, shape, &Device::Cpu)?,
            Self::F64(data) => Tensor::from_slice(data, shape, &Device::Cpu)?,
            Self::Bf16(data) => Tensor::from_slice(data, shape, &Device::Cpu)?,
            Self::Device(data) => data.copy()?.reshape(shape)?,
        })
    }

    fn load(&mut self, tensor: &Tensor) -> Result<()> {
        let flat = tensor.flatten_all()?;
        match self {
            Self::F32(data) => data.copy_from_slice(&flat.to_vec1()?),
            Self::F64(data) => data.copy_from_slice(&flat.to_vec1()?),
            Self::Bf16(data) => data.copy_from_slice(&flat.to_vec1()?),
            Self::Device(data) => *data = flat.to_device(data.device())?.copy()?,
        }
        Ok(())
    }
}

struct Entry<const S: usize> {
    name: String,
    var: Var,
    state_dtype: DType,
    state: [Buffer; S],
    mask: Option<Mask>,
    events: AtomicU64,
    held: AtomicU64,
}

impl<const S: usize> Entry<S> {
    fn state_len(&self) -> usize {
        self.mask
            .as_ref()
            .map_or(self.var.elem_count(), Mask::count)
    }

    fn state_shape(&self) -> Vec<usize> {
        match &self.mask {
            None => self.var.dims().to_vec(),
            Some(mask) => vec![mask.count()],
        }
    }
}

/// Where the memory of one tensor lies while its locks are held.
#[derive(Clone, Copy)]
struct Slot<const S: usize> {
    active: bool,
    dtype: DType,
    param: *mut u8,
    grad: *const u8,
    state: [*mut u8; S],
}

// SAFETY: a slot is only dereferenced inside `run_batch`, while the locks of its tensor are held,
// and each element by one task only.
unsafe impl<const S: usize> Send for Slot<S> {}
// SAFETY: as above.
unsafe impl<const S: usize> Sync for Slot<S> {}

/// The state buffers of one tensor; only [`Slot`] uses them.
#[derive(Clone, Copy)]
struct StatePointers<const S: usize>([*mut u8; S]);

/// The scalars of one tensor's work.
pub(super) struct Prepared<const K: usize> {
    pub(super) scalars: [f64; K],
    pub(super) map: GradMap,
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
    cuda: Option<OnCuda>,
}

/// What a CUDA step keeps between calls.
#[cfg(feature = "cuda")]
struct OnCuda {
    device: candle_core::CudaDevice,
    masks: Vec<Option<super::cuda::DeviceMask>>,
    /// One buffer a batch; read when the next step begins.
    counts: Vec<super::cuda::DeviceCounts>,
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
            check_device(&name, var.device(), first.as_ref())?;
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
            cuda: OnCuda::new(first.as_ref(), entries.len())?,
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

    /// What the state of tensor `i` is stored as.
    pub fn state_dtype(&self, i: usize) -> DType {
        self.entries[i].state_dtype
    }

    /// The mask of tensor `i`, if its state is sparse.
    pub fn mask(&self, i: usize) -> Option<&Mask> {
        self.entries[i].mask.as_ref()
    }

    /// Gives tensor `i` compact state for the set entries of `mask` (or dense state for `None`),
    /// zeroed. Entries outside the mask are left untouched by [`step`](Self::step).
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the mask has another length than the tensor.
    pub fn set_mask(&mut self, i: usize, mask: Option<Mask>) -> Result<()> {
        let entry = &mut self.entries[i];
        let len = entry.var.elem_count();
        if let Some(mask) = mask.as_ref().filter(|m| m.len() != len) {
            return Err(Error::ShapeMismatch {
                name: format!("mask of `{}`", entry.name),
                got: vec![mask.len()],
                expected: vec![len],
            });
        }
        #[cfg(feature = "cuda")]
        if let Some(cuda) = &mut self.cuda {
            let upload = |mask| super::cuda::DeviceMask::new(mask, &cuda.device);
            cuda.masks[i] = mask.as_ref().map(upload).transpose()?;
        }
        entry.mask = mask;
        let (dtype, len) = (entry.state_dtype, entry.state_len());
        entry.state = zeros(dtype, len, entry.var.device())?;
        Ok(())
    }

    /// Events that the rule counted in tensor `i` in the last step; on a device, in the step
    /// before it, so that no step waits for the device.
    pub fn events(&self, i: usize) -> u64 {
        self.entries[i].events.load(Ordering::Relaxed)
    }

    /// Entries of tensor `i` that were left alone in the last step because their gradient was not
    /// finite.
    pub fn held(&self, i: usize) -> u64 {
        self.entries[i].held.load(Ordering::Relaxed)
    }

    /// A copy of state `slot` of tensor `i`: the parameter's shape, or `[count]` under a mask.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a slot that does not exist.
    pub fn state(&self, i: usize, slot: usize) -> Result<Tensor> {
        let entry = &self.entries[i];
        let buffer = entry
            .state
            .get(slot)
            .ok_or_else(|| Error::invalid("slot", slot, format!("below {S}")))?;
        buffer.tensor(&entry.state_shape())
    }

    /// Overwrites state `slot` of tensor `i`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] or [`Error::DTypeMismatch`] unless the tensor is what
    /// [`state`](Self::state) returns.
    pub fn load_state(&mut self, i: usize, slot: usize, tensor: &Tensor) -> Result<()> {
        let entry = &mut self.entries[i];
        let name = || format!("state {slot} of `{}`", entry.name);
        if tensor.dims() != entry.state_shape().as_slice() {
            return Err(Error::ShapeMismatch {
                name: name(),
                got: tensor.dims().to_vec(),
                expected: entry.state_shape(),
            });
        }
        if tensor.dtype() != entry.state_dtype {
            return Err(Error::DTypeMismatch {
                name: name(),
                got: tensor.dtype(),
                expected: format!("{:?}", entry.state_dtype),
            });
        }
        let buffer = entry
            .state
            .get_mut(slot)
            .ok_or_else(|| Error::invalid("slot", slot, format!("below {S}")))?;
        buffer.load(tensor)
    }

    /// Sets all state to zero.
    ///
    /// # Errors
    /// Those of candle, on a device.
    pub fn zero_state(&mut self) -> Result<()> {
        for buffer in self.entries.iter_mut().flat_map(|e| e.state.iter_mut()) {
            match buffer {
                Buffer::F32(data) => data.fill(0.0),
                Buffer::F64(data) => data.fill(0.0),
                Buffer::Bf16(data) => data.fill(bf16::ZERO),
                Buffer::Device(data) => *data = data.zeros_like()?,
            }
        }
        Ok(())
    }

    /// Bytes that state and masks occupy.
    pub fn state_bytes(&self) -> usize {
        let of = |e: &Entry<S>| {
            let state: usize = e.state.iter().map(Buffer::bytes).sum();
            state + e.mask.as_ref().map_or(0, Mask::bytes)
        };
        self.entries.iter().map(of).sum()
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

    #[cfg(feature = "cuda")]
    fn step_on_cuda<R: Rule<S, K>, const K: usize>(
        &mut self,
        grads: &[Option<&Tensor>],
        prepared: &[Option<Prepared<K>>],
        hold: bool,
    ) -> Result<()> {
        use super::cuda::{launch, DeviceCounts, DeviceItem};
        let Some(cuda) = &mut self.cuda else {
            return Ok(());
        };
        for (counts, (range, _)) in std::mem::take(&mut cuda.counts).iter().zip(&self.batches) {
            let read = counts.read(&cuda.device)?;
            for (entry, pair) in self.entries[range.clone()].iter_mut().zip(read.chunks(2)) {
                *entry.events.get_mut() = u64::from(pair[0]);
                *entry.held.get_mut() = pair.get(1).map_or(0, |n| u64::from(*n));
            }
        }
        for (range, plan) in &self.batches {
            let mut items = Vec::with_capacity(range.len());
            for i in range.clone() {
                let entry = &self.entries[i];
                let mut state = [entry.var.as_tensor(); S];
                for (slot, buffer) in state.iter_mut().zip(&entry.state) {
                    if let Buffer::Device(tensor) = buffer {
                        *slot = tensor;
                    }
                }
                items.push(DeviceItem {
                    var: &entry.var,
                    state,
                    mask: cuda.masks[i].as_ref(),
                });
            }
            let counts = DeviceCounts::zeros(range.len(), &cuda.device)?;
            let (grads, prepared) = (&grads[range.clone()], &prepared[range.clone()]);
            launch::<R, S, K>(&cuda.device, &items, grads, prepared, plan, &counts, hold)?;
            cuda.counts.push(counts);
        }
        Ok(())
    }

    fn check_layout(&self, flat: &FlatTensor, what: &str) -> Result<()> {
        let layout = flat.layout();
        if layout.len() != self.entries.len() {
            return Err(Error::ShapeMismatch {
                name: format!("flat {what}"),
                got: vec![layout.len()],
                expected: vec![self.entries.len()],
            });
        }
        for (i, entry) in self.entries.iter().enumerate() {
            if layout.shape(i) != entry.var.dims() {
                return Err(Error::ShapeMismatch {
                    name: format!("flat {what}, `{}`", entry.name),
                    got: layout.shape(i).to_vec(),
                    expected: entry.var.dims().to_vec(),
                });
            }
            if flat.dtype() != entry.var.dtype() {
                return Err(Error::DTypeMismatch {
                    name: format!("flat {what}, `{}`", entry.name),
                    got: flat.dtype(),
                    expected: format!("{:?}", entry.var.dtype()),
                });
            }
        }
        Ok(())
    }

    /// Resets the counts and gives out where the state lies.
    fn begin(&mut self) -> Vec<StatePointers<S>> {
        let one = |entry: &mut Entry<S>| {
            *entry.events.get_mut() = 0;
            *entry.held.get_mut() = 0;
            let mut pointers = [std::ptr::null_mut(); S];
            for (pointer, buffer) in pointers.iter_mut().zip(&mut entry.state) {
                *pointer = buffer.pointer();
            }
            StatePointers(pointers)
        };
        self.entries.iter_mut().map(one).collect()
    }

    /// A gradient that is a parameter's own memory would be read while it is write-locked.
    fn refuse_aliased_gradients(&self, grads: &[Option<&Tensor>]) -> Result<()> {
        let at = |tensor: &Tensor| data_address(tensor).filter(|_| tensor.elem_count() > 0);
        let mut params: Vec<_> = self.entries.iter().map(|e| at(&e.var)).collect();
        params.sort_unstable();
        for (entry, grad) in self.entries.iter().zip(grads) {
            let address = grad.and_then(at);
            if address.is_some() && params.binary_search(&address).is_ok() {
                return Err(Error::SharedStorage {
                    first: format!("gradient of {}", entry.name),
                    second: "a parameter".into(),
                });
            }
        }
        Ok(())
    }

    fn run_batch<R: Rule<S, K>, const K: usize>(
        &self,
        batch: usize,
        slots: &[Slot<S>],
        prepared: &[Option<Prepared<K>>],
        hold: bool,
    ) {
        let (range, plan) = &self.batches[batch];
        let entries = &self.entries[range.clone()];
        plan.run(|segment| {
            let (slot, entry) = (&slots[segment.tensor], &entries[segment.tensor]);
            let Some(work) = prepared[segment.tensor].as_ref().filter(|_| slot.active) else {
                return;
            };
            let counts = match (slot.dtype, entry.state_dtype) {
                (DType::F32, DType::F32) => {
                    go::<R, f32, f32, S, K>(slot, entry, segment, work, hold)
                }
                (DType::F32, DType::BF16) => {
                    go::<R, f32, bf16, S, K>(slot, entry, segment, work, hold)
                }
                (DType::F64, _) => go::<R, f64, f64, S, K>(slot, entry, segment, work, hold),
                (DType::BF16, DType::F32) => {
                    go::<R, bf16, f32, S, K>(slot, entry, segment, work, hold)
                }
                (DType::BF16, _) => go::<R, bf16, bf16, S, K>(slot, entry, segment, work, hold),
                (DType::F16, DType::F32) => {
                    go::<R, f16, f32, S, K>(slot, entry, segment, work, hold)
                }
                // `new` admits no other dtypes.
                _ => go::<R, f16, bf16, S, K>(slot, entry, segment, work, hold),
            };
            if counts.events != 0 {
                entry
                    .events
                    .fetch_add(counts.events.into(), Ordering::Relaxed);
            }
            if counts.held != 0 {
                entry.held.fetch_add(counts.held.into(), Ordering::Relaxed);
            }
        });
    }
}

/// One segment of one tensor with its types known.
fn go<R, P, Q, const S: usize, const K: usize>(
    slot: &Slot<S>,
    entry: &Entry<S>,
    segment: &Segment,
    work: &Prepared<K>,
    hold: bool,
) -> Counts
where
    R: Rule<S, K>,
    P: Element,
    Q: Element<Compute = P::Compute>,
{
    // Compact state is addressed from its beginning, dense state from the segment's.
    let state_start = if entry.mask.is_some() {
        0
    } else {
        segment.start
    };
    // SAFETY: the segment lies inside the tensor, the dtypes are those of the buffers, the locks
    // are held, and no other segment covers these elements.
    unsafe {
        let run = Run {
            len: segment.len,
            param: slot.param.cast::<P>().add(segment.start),
            grad: slot.grad.cast::<P>().add(segment.start),
            state: std::array::from_fn(|j| slot.state[j].cast::<Q>().add(state_start)),
            scalars: work.scalars.map(super::Real::from_f64),
            map: Map::new(&work.map),
            hold,
        };
        match &entry.mask {
            None => run.dense::<R>(),
            Some(mask) => run.masked::<R>(mask, segment.start / TILE),
        }
    }
}

/// Enters one tensor after the other through candle's in-place operation, so that all write locks
/// of the batch are held when the innermost call runs the kernel.
struct Locking<'a, const S: usize> {
    vars: &'a [Entry<S>],
    grads: &'a [Option<&'a Tensor>],
    state: &'a [StatePointers<S>],
    slots: RefCell<Vec<Slot<S>>>,
    run: &'a dyn Fn(&[Slot<S>]),
}

impl<const S: usize> Locking<'_, S> {
    fn enter(&self, from: usize) -> candle_core::Result<()> {
        for i in from..self.vars.len() {
            if let Some(grad) = self.grads[i] {
                let op = Enter { locking: self, i };
                return self.vars[i].var.inplace_op2(grad, &op);
            }
            self.slots.borrow_mut().push(Slot {
                active: false,
                dtype: DType::F32,
                param: std::ptr::null_mut(),
                grad: std::ptr::null(),
                state: [std::ptr::null_mut(); S],
            });
        }
        (self.run)(&self.slots.borrow());
        Ok(())
    }
}

struct Enter<'a, const S: usize> {
    locking: &'a Locking<'a, S>,
    i: usize,
}

impl<const S: usize> InplaceOp2 for Enter<'_, S> {
    fn name(&self) -> &'static str {
        "fused update"
    }

    fn cpu_fwd(
        &self,
        param: &mut CpuStorage,
        param_layout: &Layout,
        grad: &CpuStorage,
        grad_layout: &Layout,
    ) -> candle_core::Result<()> {
        let dtype = self.locking.vars[self.i].var.dtype();
        let (param, grad) = match dtype {
            DType::F32 => pointers::<f32>(param, param_layout, grad, grad_layout),
            DType::F64 => pointers::<f64>(param, param_layout, grad, grad_layout),
            DType::BF16 => pointers::<bf16>(param, param_layout, grad, grad_layout),
            _ => pointers::<f16>(param, param_layout, grad, grad_layout),
        }
        .ok_or_else(|| candle_core::Error::Msg("fused update: dtype or layout changed".into()))?;
        self.locking.slots.borrow_mut().push(Slot {
            active: true,
            dtype,
            param,
            grad,
            state: self.locking.state[self.i].0,
        });
        self.locking.enter(self.i + 1)
    }
}

fn pointers<P: Element>(
    param: &mut CpuStorage,
    param_layout: &Layout,
    grad: &CpuStorage,
    grad_layout: &Layout,
) -> Option<(*mut u8, *const u8)> {
    let (start, end) = param_layout.contiguous_offsets()?;
    let param = P::slice_mut(param)?.get_mut(start..end)?;
    let (start, end) = grad_layout.contiguous_offsets()?;
    let grad = P::slice(grad)?.get(start..end)?;
    Some((param.as_mut_ptr().cast(), grad.as_ptr().cast()))
}

fn check_gradient<const S: usize>(entry: &Entry<S>, grad: &Tensor) -> Result<()> {
    let name = || format!("gradient of `{}`", entry.name);
    if grad.dims() != entry.var.dims() {
        return Err(Error::ShapeMismatch {
            name: name(),
            got: grad.dims().to_vec(),
            expected: entry.var.dims().to_vec(),
        });
    }
    if grad.dtype() != entry.var.dtype() {
        return Err(Error::DTypeMismatch {
            name: name(),
            got: grad.dtype(),
            expected: format!("{:?}", entry.var.dtype()),
        });
    }
    check_device(&name(), grad.device(), Some(entry.var.device()))
}

/// Everything lies on one device, and there is a kernel for it.
fn check_device(name: &str, device: &Device, expected: Option<&Device>) -> Result<()> {
    let supported = device.is_cpu() || (cfg!(feature = "cuda") && device.is_cuda());
    let here = crate::device::name(device);
    match expected.map(crate::device::name) {
        Some(other) if other != here => Err(Error::unsupported(
            format!("a fused update with `{name}`"),
            format!("on {here} beside parameters on {other}"),
        )),
        _ if !supported => Err(Error::unsupported(
            format!("a fused update of `{name}`"),
            format!("on {here}"),
        )),
        _ => Ok(()),
    }
}

fn zeros<const S: usize>(dtype: DType, len: usize, device: &Device) -> Result<[Buffer; S]> {
    let buffers: Result<Vec<_>> = (0..S).map(|_| Buffer::zeros(dtype, len, device)).collect();
    let wrong = |_| Error::invalid("states", S, "a small number");
    buffers?.try_into().map_err(wrong)
}

#[cfg(feature = "cuda")]
impl OnCuda {
    fn new(device: Option<&Device>, tensors: usize) -> Result<Option<Self>> {
        let Some(Device::Cuda(device)) = device else {
            return Ok(None);
        };
        Ok(Some(Self {
            device: device.clone(),
            masks: (0..tensors).map(|_| None).collect(),
            counts: vec![],
        }))
    }
}

fn state_dtype(name: &str, param: DType, wanted: StateDType) -> Result<DType> {
    let narrow = matches!(param, DType::F32 | DType::BF16 | DType::F16);
    if !narrow && param != DType::F64 {
        return Err(Error::DTypeMismatch {
            name: format!("parameter `{name}`"),
            got: param,
            expected: "F32, F64, BF16 or F16".into(),
        });
    }
    match wanted {
        StateDType::Compute => Ok(if narrow { DType::F32 } else { DType::F64 }),
        StateDType::Fixed(dtype @ (DType::F32 | DType::BF16)) if narrow => Ok(dtype),
        StateDType::Fixed(DType::F64) if !narrow => Ok(DType::F64),
        StateDType::Fixed(dtype) => Err(Error::DTypeMismatch {
            name: format!("state of `{name}` ({param:?})"),
            got: dtype,
            expected: if narrow { "F32 or BF16" } else { "F64" }.into(),
        }),
    }
}

/// Where the memory that a CPU tensor lives in begins.
fn data_address(tensor: &Tensor) -> Option<usize> {
    let (storage, _) = tensor.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else {
        return None;
    };
    Some(match storage {
        CpuStorage::F32(data) => data.as_ptr() as usize,
        CpuStorage::F64(data) => data.as_ptr() as usize,
        CpuStorage::BF16(data) => data.as_ptr() as usize,
        CpuStorage::F16(data) => data.as_ptr() as usize,
        _ => return None,
    })
}

/// Two variables on the same memory would deadlock in the nested locks, and be updated twice.
fn refuse_shared(params: &[(String, Var)]) -> Result<()> {
    let mut seen = HashMap::new();
    let mut ids = HashMap::new();
    for (name, var) in params {
        let address = data_address(var).filter(|_| var.elem_count() > 0);
        let at = address.and_then(|address| seen.insert(address, name));
        // On a device, clones of one variable are still recognized by their identity.
        if let Some(first) = at.or(ids.insert(var.id(), name)) {
            return Err(Error::SharedStorage {
                first: first.clone(),
                second: name.clone(),
            });
        }
    }
    Ok(())
}
