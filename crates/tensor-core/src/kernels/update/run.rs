//! Entering all tensors of a batch, and running the rule over them.

use super::state::Entry;
use super::{FusedUpdate, Prepared};
use crate::kernels::mask::TILE;
use crate::kernels::plan::Segment;
use crate::kernels::rule::Map;
use crate::kernels::segment::{Counts, Run};
use crate::kernels::{Element, Real, Rule};
use candle_core::{CpuStorage, DType, InplaceOp2, Layout, Tensor};
use half::{bf16, f16};
use std::cell::RefCell;
use std::sync::atomic::Ordering;

/// Where the memory of one tensor lies while its locks are held.
#[derive(Clone, Copy)]
pub(super) struct Slot<const S: usize> {
    pub(super) active: bool,
    pub(super) dtype: DType,
    pub(super) param: *mut u8,
    pub(super) grad: *const u8,
    pub(super) state: [*mut u8; S],
}

// SAFETY: a slot is only dereferenced inside `run_batch`, while the locks of its tensor are held,
// and each element by one task only.
unsafe impl<const S: usize> Send for Slot<S> {}
// SAFETY: as above.
unsafe impl<const S: usize> Sync for Slot<S> {}

/// The state buffers of one tensor; only [`Slot`] uses them.
#[derive(Clone, Copy)]
pub(super) struct StatePointers<const S: usize>(pub(super) [*mut u8; S]);

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
            scalars: work.scalars.map(Real::from_f64),
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
pub(super) struct Locking<'a, const S: usize> {
    pub(super) vars: &'a [Entry<S>],
    pub(super) grads: &'a [Option<&'a Tensor>],
    pub(super) state: &'a [StatePointers<S>],
    pub(super) slots: RefCell<Vec<Slot<S>>>,
    pub(super) run: &'a dyn Fn(&[Slot<S>]),
}

impl<const S: usize> Locking<'_, S> {
    pub(super) fn enter(&self, from: usize) -> candle_core::Result<()> {
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

impl<const S: usize> FusedUpdate<S> {
    /// Resets the counts and gives out where the state lies.
    pub(super) fn begin(&mut self) -> Vec<StatePointers<S>> {
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

    pub(super) fn run_batch<R: Rule<S, K>, const K: usize>(
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
