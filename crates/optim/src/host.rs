//! Host memory: tensors as slices, loops as vector code.

use crate::{Error, Result};
use candle_core::{Layout, Storage, WithDType};

/// The numbers of a contiguous tensor on the CPU.
pub(crate) fn contents<'s, T: WithDType>(storage: &'s Storage, layout: &Layout) -> Result<&'s [T]> {
    match (storage, layout.contiguous_offsets()) {
        (Storage::Cpu(cpu), Some((from, to))) => Ok(&T::cpu_storage_as_slice(cpu)?[from..to]),
        _ => {
            let expected = "contiguous, on the CPU";
            Err(Error::argument("tensor", layout.dims(), expected))
        }
    }
}

/// Runs `body` compiled for the widest vector unit of this processor; nothing fuses a multiplication
/// with an addition, so the bits do not depend on the choice.
#[inline(always)]
pub(crate) fn vectorized<R>(body: impl FnOnce() -> R) -> R {
    pulp::Arch::new().dispatch(body)
}
