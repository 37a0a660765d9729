//! The passes that the convex solvers spend their time in: over the columns of a cost or a data
//! matrix, and matrix products.

use super::{Ceiling, Kernel, Session};
use anyhow::Result;
use candle_core::{Device, Tensor};
use convex::block_cd::{Columns, LeastSquares, SmoothObjective};
use convex::relu::{AdmmConfig, AdmmRelu, Patterns};
use convex::transport::{semi_dual, OtProblem, OtReg};
use tensor_core::random::RandomStream;

const GROUP: &str = "convex";

pub(super) fn kernels(session: &mut Session<'_>) -> Result<()> {
    if !session.wants(GROUP) {
        return Ok(());
    }
    projections(session)?;
    gradient(session)?;
    admm_step(session)
}

fn normals(label: &str, count: usize) -> Vec<f64> {
    let mut out = vec![0.0; count];
    RandomStream::new(0).split(label).fill_normal(&mut out);
    out
}

/// The semi-dual: of each column of the cost the largest entries, their projection, value and
/// gradient. The cost is read once.
fn projections(session: &mut Session<'_>) -> Result<()> {
    let (m, n) = (4096, 4096);
    let cost = normals("cost", m * n);
    let problem =
        OtProblem::from_slices(&vec![1.0 / m as f64; m], &vec![1.0 / n as f64; n], &cost)?;
    drop(cost);
    let alpha: Vec<f64> = normals("alpha", m).iter().map(|x| 0.1 * x).collect();
    // About a hundred entries of a column lie within reach of its largest.
    let gamma = 2.0 * m as f64;
    for (name, reg) in [
        ("transport, k = 16", OtReg::KSparse { gamma, k: 16 }),
        ("transport, quadratic", OtReg::Quadratic { gamma }),
    ] {
        let kernel = Kernel {
            name: name.to_string(),
            ceiling: Ceiling::Copy,
            per_element: 8.0,
            elements: m * n,
            call: Box::new(|| {
                std::hint::black_box(semi_dual(&problem, &reg, &alpha)?.value);
                Ok(())
            }),
        };
        session.measure(GROUP, kernel)?;
    }
    Ok(())
}

/// `A' r`, which greedy rules need at each step.
fn gradient(session: &mut Session<'_>) -> Result<()> {
    let (n, p) = (1000, 10_000);
    let a = Columns::from_slice(n, p, &normals("matrix", n * p))?;
    let objective = LeastSquares::new(a, &normals("target", n))?;
    let kernel = Kernel {
        name: "block descent, whole gradient".to_string(),
        ceiling: Ceiling::Copy,
        per_element: 8.0,
        elements: n * p,
        call: Box::new(|| {
            std::hint::black_box(objective.grad());
            Ok(())
        }),
    };
    session.measure(GROUP, kernel)
}

/// One step of ADMM by the Woodbury identity: five products and an `n x n` solve.
fn admm_step(session: &mut Session<'_>) -> Result<()> {
    let (n, d, directions) = (400, 128, 500);
    let x = Tensor::from_vec(normals("x", n * d), (n, d), &Device::Cpu)?;
    let y = Tensor::from_vec(normals("y", n), n, &Device::Cpu)?;
    let patterns = Patterns::sample(&x, directions, &mut RandomStream::new(1))?;
    let mut run = AdmmRelu::new(AdmmConfig::default())?.start(&x, &y, &patterns)?;
    let columns = 2 * patterns.len();
    let products = 2 * columns * (4 * n * d + d * d) + 2 * n * n;
    let kernel = Kernel {
        name: "convex network, ADMM step".to_string(),
        ceiling: Ceiling::GemmF64,
        per_element: products as f64 / (n * columns) as f64,
        elements: n * columns,
        call: Box::new(|| Ok(run.step()?)),
    };
    session.measure(GROUP, kernel)
}
