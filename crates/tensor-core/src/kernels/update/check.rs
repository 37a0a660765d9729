//! What does not fit is refused before anything is changed.

use super::state::Entry;
use super::FusedUpdate;
use crate::flat::FlatTensor;
use crate::{Error, Result};
use candle_core::{CpuStorage, Device, Tensor, Var};
use std::collections::HashMap;

pub(super) fn check_gradient<const S: usize>(entry: &Entry<S>, grad: &Tensor) -> Result<()> {
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
    check_device(name, grad.device(), Some(entry.var.device()))
}

/// Everything lies on one device, and there is a kernel for it. The name is made only for an error:
/// a step allocates nothing per parameter.
pub(super) fn check_device(
    name: impl FnOnce() -> String,
    device: &Device,
    expected: Option<&Device>,
) -> Result<()> {
    let supported = device.is_cpu() || (cfg!(feature = "cuda") && device.is_cuda());
    let place = crate::device::name;
    match expected {
        Some(other) if !other.same_device(device) => Err(Error::unsupported(
            format!("a fused update with the {}", name()),
            format!("on {} beside parameters on {}", place(device), place(other)),
        )),
        _ if !supported => Err(Error::unsupported(
            format!("a fused update of the {}", name()),
            format!("on {}", place(device)),
        )),
        _ => Ok(()),
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
pub(super) fn refuse_shared(params: &[(String, Var)]) -> Result<()> {
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

impl<const S: usize> FusedUpdate<S> {
    pub(super) fn check_layout(&self, flat: &FlatTensor, what: &str) -> Result<()> {
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

    /// A gradient that is a parameter's own memory would be read while it is write-locked.
    pub(super) fn refuse_aliased_gradients(&self, grads: &[Option<&Tensor>]) -> Result<()> {
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
}
