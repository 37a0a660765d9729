//! The passes between two evaluations of a network: a rule's combination, a sampler's step. Each tensor is
//! counted once.

use super::{Ceiling, Kernel, Session};
use anyhow::Result;
use candle_core::{DType, Device, Tensor};
use flows::linear_combination;
use guidance::{Apg, Cfg};
use tensor_core::random::RandomStream;

const GROUP: &str = "guidance";
const SHAPE: [usize; 4] = [8, 16, 128, 128];

pub(super) fn kernels(session: &mut Session<'_>) -> Result<()> {
    if !session.wants(GROUP) {
        return Ok(());
    }
    let [x, wanted, unwanted] = ["x", "wanted", "unwanted"].map(normal);
    let (x, wanted, unwanted) = (x?, wanted?, unwanted?);
    let mut measure = |name: &str, tensors: f64, call: &(dyn Fn() -> Result<Tensor> + Sync)| {
        let kernel = Kernel {
            name: format!("{name} {SHAPE:?}"),
            ceiling: Ceiling::Copy,
            per_element: 4.0 * tensors,
            elements: x.elem_count(),
            call: Box::new(|| {
                std::hint::black_box(call()?);
                Ok(())
            }),
        };
        session.measure(GROUP, kernel)
    };
    let cfg = Cfg::new(7.5);
    measure("classifier-free guidance", 3.0, &|| {
        Ok(cfg.combine(&wanted, &unwanted)?)
    })?;
    measure("step of DPM-Solver++ 2M", 4.0, &|| {
        let terms = [(0.9, &x), (0.15, &wanted), (-0.05, &unwanted)];
        Ok(linear_combination(&terms)?)
    })?;
    // Two predictions and the running sum in, the sum and the guided prediction out.
    let apg = Apg::new(7.5).norm_threshold(15.0).momentum(-0.5);
    measure("adaptive projected guidance", 5.0, &|| {
        Ok(apg.combine(&wanted, &unwanted, Some(&x))?.0)
    })
}

fn normal(label: &str) -> Result<Tensor> {
    let mut stream = RandomStream::new(0).split("perf").split(label);
    Ok(stream.normal(0.0, 1.0, &SHAPE, DType::F32, &Device::Cpu)?)
}
