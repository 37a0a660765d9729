//! The fused step on CUDA: one launch for all tensors of a batch, compiled at run time by NVRTC.
//!
//! The kernel text is checked against the CPU kernel on the host and compiles to PTX; this launch
//! code has been type-checked but has never run on a device.

use super::device::{device_source, CUDA_PRELUDE};
use super::plan::Plan;
use super::rule::{map_scalars, MAP_SCALARS};
use super::update::Prepared;
use super::{Mask, Rule};
use crate::{Error, Result};
use candle_core::backend::BackendStorage;
use candle_core::cuda::cudarc::driver::{CudaSlice, DevicePtr, LaunchConfig, PushKernelArg};
use candle_core::cuda::cudarc::nvrtc::{compile_ptx_with_opts, CompileOptions};
use candle_core::cuda::{CudaDevice, CudaStorage, CudaStorageSlice};
use candle_core::{DType, InplaceOp2, Layout, Storage, Tensor, Var};
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Threads of a block; a block handles one segment of the work list.
const THREADS: u32 = 256;

/// One tensor of a batch as the launch needs it.
pub(super) struct DeviceItem<'a, const S: usize> {
    pub var: &'a Var,
    pub state: [&'a Tensor; S],
    pub mask: Option<&'a DeviceMask>,
}

/// A mask in device memory.
#[derive(Debug)]
pub(super) struct DeviceMask {
    words: CudaSlice<u64>,
    offsets: CudaSlice<u32>,
}

impl DeviceMask {
    pub(super) fn new(mask: &Mask, device: &CudaDevice) -> Result<Self> {
        Ok(Self {
            words: device.clone_htod(mask.words())?,
            offsets: device.clone_htod(mask.offsets())?,
        })
    }
}

/// Events and held entries per tensor of the last step, in device memory.
#[derive(Debug)]
pub(super) struct DeviceCounts(CudaSlice<u32>);

impl DeviceCounts {
    pub(super) fn zeros(tensors: usize, device: &CudaDevice) -> Result<Self> {
        Ok(Self(device.alloc_zeros::<u32>(2 * tensors.max(1))?))
    }

    /// Waits for the device.
    pub(super) fn read(&self, device: &CudaDevice) -> Result<Vec<u32>> {
        Ok(device.clone_dtoh(&self.0)?)
    }
}

/// Runs a rule over one batch.
pub(super) fn launch<R: Rule<S, K>, const S: usize, const K: usize>(
    device: &CudaDevice,
    items: &[DeviceItem<'_, S>],
    grads: &[Option<&Tensor>],
    prepared: &[Option<Prepared<K>>],
    plan: &Plan,
    counts: &DeviceCounts,
    hold: bool,
) -> Result<()> {
    let Some(first) = (0..items.len()).find(|i| grads[*i].is_some()) else {
        return Ok(());
    };
    let dtypes = |i: usize| (items[i].var.dtype(), state_dtype(&items[i]));
    let (param, state) = dtypes(first);
    if let Some(other) =
        (0..items.len()).find(|i| grads[*i].is_some() && dtypes(*i) != (param, state))
    {
        return Err(Error::unsupported(
            "one fused step over parameters of different dtypes",
            format!(
                "on CUDA ({param:?} and {:?}); use one optimizer per dtype",
                dtypes(other).0
            ),
        ));
    }
    let module = format!("thalweg-{}-{S}-{K}-{param:?}-{state:?}", R::NAME);
    let source = device_source::<R, S, K>(CUDA_PRELUDE, param, state)?;
    let locking = Locking {
        items,
        grads,
        addresses: RefCell::new(Vec::with_capacity(items.len())),
        run: &|addresses: &[(u64, u64)]| {
            let table = table(device, items, addresses, prepared, plan)?;
            let launch = LaunchConfig {
                grid_dim: (table.segments, 1, 1),
                block_dim: (THREADS, 1, 1),
                shared_mem_bytes: 0,
            };
            let words = device.clone_htod(&table.words)?;
            let segments_at = table.segments_at;
            let hold = u32::from(hold);
            let ptx = compiled(&source)?;
            let func = device.get_or_load_custom_func("fused_update", &module, &ptx)?;
            let mut call = func.builder();
            call.arg(&words).arg(&segments_at).arg(&counts.0).arg(&hold);
            // SAFETY: the arguments are those of the kernel text; all locks are held, and later
            // work on these tensors is queued on the same stream.
            unsafe { call.launch(launch) }.map_err(|e| candle_core::Error::Cuda(Box::new(e)))?;
            Ok(())
        },
    };
    Ok(locking.enter(0)?)
}

/// PTX of a kernel text, compiled once in the life of the process.
fn compiled(source: &str) -> candle_core::Result<Arc<str>> {
    static CACHE: Mutex<BTreeMap<String, Arc<str>>> = Mutex::new(BTreeMap::new());
    let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(ptx) = cache.get(source) {
        return Ok(ptx.clone());
    }
    let options = CompileOptions {
        // The same bits as on the CPU: no fused multiplications and additions.
        fmad: Some(false),
        ..CompileOptions::default()
    };
    let ptx = compile_ptx_with_opts(source, options)
        .map_err(|e| candle_core::Error::Cuda(format!("NVRTC: {e:?}").into()))?;
    let ptx: Arc<str> = ptx.to_src().into();
    cache.insert(source.to_string(), ptx.clone());
    Ok(ptx)
}

fn state_dtype<const S: usize>(item: &DeviceItem<'_, S>) -> DType {
    item.state.first().map_or(DType::F32, |t| t.dtype())
}

struct Table {
    words: Vec<u64>,
    segments_at: u64,
    segments: u32,
}

/// The kernel's table: a row per tensor, then the segments of the tensors that take part.
fn table<const S: usize, const K: usize>(
    device: &CudaDevice,
    items: &[DeviceItem<'_, S>],
    addresses: &[(u64, u64)],
    prepared: &[Option<Prepared<K>>],
    plan: &Plan,
) -> candle_core::Result<Table> {
    let stream = device.cuda_stream();
    let mut words = vec![];
    for (i, item) in items.iter().enumerate() {
        let (param, grad) = addresses[i];
        let (mask, offsets) = item.mask.map_or((0, 0), |mask| {
            (
                mask.words.device_ptr(&stream).0,
                mask.offsets.device_ptr(&stream).0,
            )
        });
        words.extend([param, grad, mask, offsets]);
        for state in item.state {
            let (storage, layout) = state.storage_and_layout();
            let Storage::Cuda(storage) = &*storage else {
                candle_core::bail!("fused update: state is not on the device");
            };
            words.push(address(storage, layout)?);
        }
        let nothing = ([0.0; K], [0.0; MAP_SCALARS]);
        let numbers = prepared[i].as_ref().map_or(nothing, |work| {
            (work.scalars, map_scalars(&work.map, item.var.dtype()))
        });
        words.extend(numbers.0.iter().chain(&numbers.1).map(|x| x.to_bits()));
    }
    let segments_at = words.len() as u64;
    let active = plan
        .segments
        .iter()
        .filter(|s| prepared[s.tensor].is_some());
    let mut segments = 0;
    for segment in active {
        words.extend([segment.tensor, segment.start, segment.len].map(|x| x as u64));
        segments += 1;
    }
    Ok(Table {
        words,
        segments_at,
        segments,
    })
}

/// Where a tensor's first element lies in device memory.
fn address(storage: &CudaStorage, layout: &Layout) -> candle_core::Result<u64> {
    let stream = storage.device().cuda_stream();
    let start = layout.start_offset() as u64;
    Ok(match &storage.slice {
        CudaStorageSlice::F32(data) => data.device_ptr(&stream).0 + 4 * start,
        CudaStorageSlice::F64(data) => data.device_ptr(&stream).0 + 8 * start,
        CudaStorageSlice::BF16(data) => data.device_ptr(&stream).0 + 2 * start,
        CudaStorageSlice::F16(data) => data.device_ptr(&stream).0 + 2 * start,
        _ => candle_core::bail!("fused update: only floating point tensors"),
    })
}

/// As on the CPU: enters one tensor after the other, so that all write locks are held in `run`.
struct Locking<'a, const S: usize> {
    items: &'a [DeviceItem<'a, S>],
    grads: &'a [Option<&'a Tensor>],
    addresses: RefCell<Vec<(u64, u64)>>,
    run: &'a dyn Fn(&[(u64, u64)]) -> candle_core::Result<()>,
}

impl<const S: usize> Locking<'_, S> {
    fn enter(&self, from: usize) -> candle_core::Result<()> {
        for i in from..self.items.len() {
            if let Some(grad) = self.grads[i] {
                let op = Enter { locking: self, i };
                return self.items[i].var.inplace_op2(grad, &op);
            }
            self.addresses.borrow_mut().push((0, 0));
        }
        (self.run)(&self.addresses.borrow())
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
        _: &mut candle_core::CpuStorage,
        _: &Layout,
        _: &candle_core::CpuStorage,
        _: &Layout,
    ) -> candle_core::Result<()> {
        candle_core::bail!("fused update: a CPU tensor among CUDA tensors")
    }

    fn cuda_fwd(
        &self,
        param: &mut CudaStorage,
        param_layout: &Layout,
        grad: &CudaStorage,
        grad_layout: &Layout,
    ) -> candle_core::Result<()> {
        let pair = (address(param, param_layout)?, address(grad, grad_layout)?);
        self.locking.addresses.borrow_mut().push(pair);
        self.locking.enter(self.i + 1)
    }
}
