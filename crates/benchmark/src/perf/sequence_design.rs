//! The log-probabilities of a policy's actions, of which every GFlowNet loss is a sum: a row of logits
//! and its mask are read, a number is written.

use super::{Ceiling, Kernel, Session};
use anyhow::Result;
use candle_core::{DType, Device, Var};
use sequence_design::gflownet::{masked_log_prob, Wanted};
use tensor_core::random::RandomStream;

const GROUP: &str = "sequence-design";

pub(super) fn kernels(session: &mut Session<'_>) -> Result<()> {
    if !session.wants(GROUP) {
        return Ok(());
    }
    let (rows, width) = (500_000, 9);
    let mut stream = RandomStream::new(0).split("perf");
    let shape = (rows, width);
    let logits = stream.normal(0.0, 1.0, shape, DType::F32, &Device::Cpu)?;
    let logits = Var::from_tensor(&logits)?;
    let mask: Vec<bool> = (0..rows * width).map(|k| k % 3 != 1).collect();
    let actions = (0..rows as u32).map(|i| i % 3 * 3).collect();
    let wanted = Wanted::Action(actions);
    let read = 5.0 * width as f64 + 8.0;
    let forward = masked_log_prob(&logits, &mask, &wanted)?;
    session.measure(
        GROUP,
        Kernel {
            name: format!("masked log-softmax of {rows} rows of {width}"),
            ceiling: Ceiling::Copy,
            per_element: read,
            elements: rows,
            call: Box::new(|| {
                std::hint::black_box(masked_log_prob(&logits, &mask, &wanted)?);
                Ok(())
            }),
        },
    )?;
    session.measure(
        GROUP,
        Kernel {
            name: "the same, backward".into(),
            ceiling: Ceiling::Copy,
            per_element: read + 4.0 * width as f64,
            elements: rows,
            call: Box::new(|| {
                std::hint::black_box(forward.backward()?);
                Ok(())
            }),
        },
    )
}
