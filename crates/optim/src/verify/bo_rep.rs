//! The reference of `bo-rep`: estimators and trajectories on a quadratic, one step with a network,
//! Epoch-SGD.

use super::{rows, values};
use crate::bilevel::{
    epoch_sgd, hypergradient, BatchRequest, BoRep, BoRepConfig, EpochSgdConfig, LinearSolve,
    LossProblem, LowerOutput, Oracle, QuadraticProblem, ZOrder,
};
use crate::Result;
use candle_core::{DType, Tensor, Var, D};
use tensor_core::autograd::keeps_graph;
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-9);

/// Checks the quadratic (`q_*`), the network (`net_*`) and Epoch-SGD (`e_*`).
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn bo_rep(reference: &mut Reference) -> Result<()> {
    if reference.has("q_A") {
        estimators(reference)?;
        trajectories(reference)?;
    }
    if reference.has("net_x") {
        network(reference)?;
    }
    if reference.has("e_diag") {
        epochs(reference)?;
    }
    Ok(())
}

fn tensor(reference: &mut Reference, name: &str) -> Result<Tensor> {
    Ok(reference.input(name)?.tensor(DType::F64)?)
}

/// `f = |y - t|^2 / 2 + sum x^4 / 4`.
fn quadratic(reference: &mut Reference) -> Result<QuadraticProblem> {
    let (a, b) = (tensor(reference, "q_A")?, tensor(reference, "q_B")?);
    let (c, t) = (tensor(reference, "q_c")?, tensor(reference, "q_t")?);
    Ok(QuadraticProblem::new(&a, &b, &c, &t)?.with_direct(|x| x.powf(3.0)))
}

fn estimators(reference: &mut Reference) -> Result<()> {
    let mut problem = quadratic(reference)?;
    let (x0, y0) = (tensor(reference, "q_x0")?, tensor(reference, "q_y0")?);
    let best = problem.minimizer(&x0)?;
    reference.compare_tensor("q_ystar0", &best, TOLERANCE)?;
    let exact = hypergradient(&mut problem, &x0, &best, &LinearSolve::Exact, None)?;
    reference.compare_tensor("q_hypergrad_exact", &exact.grad_x, TOLERANCE)?;
    let right = (&y0 - tensor(reference, "q_t")?)?;
    reference.compare_tensor("q_rhs", &right, TOLERANCE)?;
    let lr: f64 = reference.number("quad_nu")?;
    type Make = fn(usize, f64) -> LinearSolve;
    let methods: [(&str, Make); 3] = [
        ("q_neumann", |k, lr| LinearSolve::Neumann { terms: k, lr }),
        ("q_cg", |k, _| LinearSolve::ConjugateGradient {
            iters: k,
            tol: 0.0,
            damping: 0.0,
        }),
        ("q_fixedpoint", |k, lr| LinearSolve::FixedPoint {
            iters: k,
            lr,
        }),
    ];
    let mut last = Vec::new();
    for (name, make) in methods {
        if !reference.has(name) {
            continue;
        }
        let (mut all, mut grad) = (Vec::new(), Vec::new());
        for k in 1..=reference.expected(name)?.shape[0] {
            let found = hypergradient(&mut problem, &x0, &y0, &make(k, lr), None)?;
            all.extend(values(&found.z)?);
            grad = values(&found.grad_x)?;
        }
        reference.compare(name, &all, TOLERANCE)?;
        last.extend(grad);
    }
    if reference.has("q_hypergrad_est") {
        reference.compare("q_hypergrad_est", &last, TOLERANCE)?;
    }
    Ok(())
}

/// Three runs on the same noise: as in the paper, with averages below, with the new `z` above.
fn trajectories(reference: &mut Reference) -> Result<()> {
    let lower = rows(&reference.input("q_noise_y")?)?;
    let hessian = rows(&reference.input("q_noise_z")?)?;
    let upper = rows(&reference.input("q_noise_x")?)?;
    let steps = hessian.len();
    let x0 = tensor(reference, "q_x0")?;
    let config = BoRepConfig {
        eta: reference.number("quad_eta")?,
        beta: reference.number("quad_beta")?,
        nu: reference.number("quad_nu")?,
        alpha: reference.number("quad_alpha")?,
        interval: reference.number("quad_I")?,
        lower_steps: reference.number("quad_N")?,
        radius: Some(reference.number("quad_R")?),
        ..BoRepConfig::default()
    };
    let variants = [
        ("", LowerOutput::Last, ZOrder::Old),
        ("_avg", LowerOutput::Average, ZOrder::Old),
        ("_znew", LowerOutput::Last, ZOrder::New),
    ];
    for (suffix, lower_output, z_order) in variants {
        if !reference.has(&format!("q_traj_x{suffix}")) {
            continue;
        }
        let (lower, hessian, upper) = (lower.clone(), hessian.clone(), upper.clone());
        let noise = move |request: BatchRequest| {
            let t = request.iteration;
            let array = match request.oracle {
                Oracle::Lower => lower[t].row(request.index)?,
                Oracle::Hessian => hessian[t].clone(),
                Oracle::Cross => upper[t].clone(),
                Oracle::Upper => return Ok(None),
            };
            Ok(Some(array.tensor(DType::F64)?))
        };
        let mut problem = quadratic(reference)?.with_noise(noise);
        let y0 = problem.minimizer(&x0)?;
        let config = BoRepConfig {
            lower_output,
            z_order,
            ..config
        };
        let mut method = BoRep::new(&x0, &y0, config)?;
        let mut found: [Vec<f64>; 4] = Default::default();
        for _ in 0..steps {
            method.step(&mut problem)?;
            let parts = [method.x(), method.y(), method.z(), method.momentum()];
            for (found, part) in found.iter_mut().zip(parts) {
                found.extend(values(part)?);
            }
        }
        for (part, found) in ["x", "y", "z", "m"].iter().zip(&found) {
            let name = format!("q_traj_{part}{suffix}");
            if reference.has(&name) {
                reference.compare(&name, found, TOLERANCE)?;
            }
        }
    }
    Ok(())
}

/// Embeddings with labels.
type Batch = (Tensor, Tensor);

fn cross_entropy(logits: &Tensor, labels: &Tensor) -> candle_core::Result<Tensor> {
    let shifted = logits.broadcast_sub(&logits.detach().max_keepdim(D::Minus1)?)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let log_p = shifted.broadcast_sub(&log_sum)?;
    log_p.gather(&labels.unsqueeze(1)?, 1)?.mean_all()?.neg()
}

/// One step of the meta-learning form: features `tanh(e x^T)` above, a two-layer classifier below.
fn network(reference: &mut Reference) -> Result<()> {
    let batch = |reference: &mut Reference, part: &str| -> Result<Batch> {
        let embeddings = tensor(reference, &format!("net_emb_{part}"))?;
        let labels = reference.input(&format!("net_lab_{part}"))?;
        Ok((embeddings, labels.tensor(DType::U32)?))
    };
    let (support, query) = (batch(reference, "support")?, batch(reference, "query")?);
    let x = Var::from_tensor(&tensor(reference, "net_x")?)?;
    let y = Var::from_tensor(&tensor(reference, "net_y")?)?;
    let (h, fc): (usize, usize) = (reference.number("net_h")?, reference.number("net_fc")?);
    let classes: usize = reference.number("net_classes")?;
    let penalty: f64 = reference.number("net_reg")?;
    let logits = |(embeddings, _): &Batch| {
        let features = embeddings.matmul(&x.t()?)?.tanh()?;
        let (b1, w2) = (fc * h, fc * h + fc);
        let b2 = w2 + classes * fc;
        let hidden = features.matmul(&y.narrow(0, 0, b1)?.reshape((fc, h))?.t()?)?;
        let hidden = hidden.broadcast_add(&y.narrow(0, b1, fc)?)?.tanh()?;
        let out = hidden.matmul(&y.narrow(0, w2, classes * fc)?.reshape((classes, fc))?.t()?)?;
        out.broadcast_add(&y.narrow(0, b2, classes)?)
    };
    let lower = |batch: &Batch| {
        let norm = y.sqr()?.sum_all()?.sqrt()?;
        cross_entropy(&logits(batch)?, &batch.1)? + (norm * penalty)?
    };
    let upper = |batch: &Batch| cross_entropy(&logits(batch)?, &batch.1);
    let batches = |request: BatchRequest| match request.oracle {
        Oracle::Lower | Oracle::Hessian => Ok(support.clone()),
        Oracle::Upper | Oracle::Cross => Ok(query.clone()),
    };
    let named = |name: &str, var: &Var| vec![(name.to_string(), var.clone())];
    let mut problem = LossProblem::new(named("x", &x), named("y", &y), lower, upper, batches)?;
    // Differences of gradients have an error of their own.
    let tolerance = match keeps_graph()? {
        true => Tolerance::Mixed(1e-8),
        false => Tolerance::Mixed(1e-5),
    };
    let (z0, m0) = (tensor(reference, "net_z0")?, tensor(reference, "net_m0")?);
    let (flat_x, flat_y) = (problem.upper()?, problem.lower()?);
    let shape = x.shape().clone();
    use crate::bilevel::BilevelProblem;
    let hvp = problem.lower_hvp(&flat_x, &flat_y, &z0, &support)?;
    reference.compare_tensor("net_hvp", &hvp, tolerance)?;
    let config = BoRepConfig {
        eta: reference.number("net_eta")?,
        beta: reference.number("net_beta")?,
        nu: reference.number("net_nu")?,
        eps: reference.number("net_norm_eps")?,
        z_order: ZOrder::New,
        ..BoRepConfig::default()
    };
    let m0 = m0.flatten_all()?;
    let mut method = BoRep::new(&flat_x, &flat_y, config)?.with_start(&z0, &m0)?;
    method.step(&mut problem)?;
    reference.compare_tensor("net_z1", method.z(), tolerance)?;
    let m1 = method.momentum().reshape(&shape)?;
    reference.compare_tensor("net_m1", &m1, tolerance)?;
    Ok(reference.compare_tensor("net_xnew", &method.x().reshape(&shape)?, tolerance)?)
}

fn epochs(reference: &mut Reference) -> Result<()> {
    let (diagonal, b) = (tensor(reference, "e_diag")?, tensor(reference, "e_b")?);
    let noise = rows(&reference.input("e_noise")?)?;
    let start = tensor(reference, "e_y0")?;
    let config = EpochSgdConfig {
        epochs: reference.number("epoch_epochs")?,
        t1: reference.number("epoch_T1")?,
        lr1: reference.number("epoch_eta1")?,
        radius1: reference.number("epoch_D1")?,
    };
    let mut used = 0;
    let grad = |w: &Tensor| {
        let missing = || crate::Error::TooFew {
            what: "Epoch-SGD",
            of: "rows of noise",
            needed: used + 1,
            got: noise.len(),
        };
        let row = noise.get(used).ok_or_else(missing)?.tensor(DType::F64)?;
        used += 1;
        Ok((((&diagonal * w)? - &b)? + row)?)
    };
    let mut found = Vec::new();
    for center in epoch_sgd(grad, &start, &config)? {
        found.extend(values(&center)?);
    }
    Ok(reference.compare("e_epoch_out", &found, TOLERANCE)?)
}
