//! The fused step where the parameters live on a CUDA device.

use super::state::Buffer;
use super::{FusedUpdate, Prepared};
use crate::kernels::cuda::{launch, DeviceCounts, DeviceItem, DeviceMask};
use crate::kernels::Rule;
use crate::Result;
use candle_core::{CudaDevice, Device, Tensor};

/// What a CUDA step keeps between calls.
pub(super) struct OnCuda {
    pub(super) device: CudaDevice,
    pub(super) masks: Vec<Option<DeviceMask>>,
    /// One buffer a batch; read when the next step begins.
    counts: Vec<DeviceCounts>,
}

impl OnCuda {
    pub(super) fn new(device: Option<&Device>, tensors: usize) -> Result<Option<Self>> {
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

impl<const S: usize> FusedUpdate<S> {
    pub(super) fn step_on_cuda<R: Rule<S, K>, const K: usize>(
        &mut self,
        grads: &[Option<&Tensor>],
        prepared: &[Option<Prepared<K>>],
        hold: bool,
    ) -> Result<()> {
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
}
