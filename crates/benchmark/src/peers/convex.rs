//! Whole solves on the same data, to comparable accuracy.

use super::{Case, Peer, Session};
use anyhow::Result;
use candle_core::{Device, Tensor};
use convex::attention_svm::{AttSvm, AttentionData, Selection, SvmNorm};
use convex::block_cd::{BlockCd, BlockCdConfig, Columns, LeastSquares, Penalty, Select, Update};
use convex::relu::{AdmmConfig, AdmmRelu, ConeConfig, ConeRelu, Patterns};
use convex::transport::{
    gromov_wasserstein, solve, Formulation, GroundLoss, GwConfig, GwProblem, OtProblem, OtReg,
    OtSolver,
};
use serde_json::json;
use tensor_core::random::RandomStream;

const GROUP: &str = "convex";

pub(super) fn cases(session: &mut Session<'_>) -> Result<()> {
    if session.wants(GROUP, "sparse-ot") {
        transport(session)?;
        structures(session)?;
    }
    if session.wants(GROUP, "bcd") {
        lasso(session)?;
    }
    if session.wants(GROUP, "convex-relu") {
        network(session)?;
    }
    if session.wants(GROUP, "attention-svm") {
        margins(session)?;
    }
    Ok(())
}

fn normals(label: &str, count: usize) -> Vec<f64> {
    let mut out = vec![0.0; count];
    RandomStream::new(0).split(label).fill_normal(&mut out);
    out
}

/// Two clouds of 1000 points in the plane, squared distances over their largest.
fn transport(session: &mut Session<'_>) -> Result<()> {
    const POINTS: usize = 1000;
    let points = normals("clouds", 4 * POINTS);
    let (from, to) = points.split_at(2 * POINTS);
    let cost = |p: usize| {
        let (i, j) = (2 * (p / POINTS), 2 * (p % POINTS));
        (from[i] - to[j] - 0.5).powi(2) + (from[i + 1] - to[j + 1] - 0.5).powi(2)
    };
    let mut costs: Vec<f64> = (0..POINTS * POINTS).map(cost).collect();
    let largest = costs.iter().copied().fold(0.0, f64::max);
    costs.iter_mut().for_each(|c| *c /= largest);
    let weights = vec![1.0 / POINTS as f64; POINTS];
    let problem = OtProblem::from_slices(&weights, &weights, &costs)?;
    let (gamma, k) = (50.0, 8);
    let scaling = OtSolver::Sinkhorn {
        log_domain: false,
        tol: 1e-9,
        max_iter: 1000,
    };
    let sparse = OtSolver::Lbfgs {
        memory: 10,
        tol: 1e-5 / POINTS as f64,
        max_iter: 50,
    };
    let entropic = OtReg::Entropic { gamma: 0.05 };
    let (dual, semi) = (Formulation::Dual, Formulation::SemiDual);
    let runs = [
        (
            "exact",
            "NetworkSimplex",
            "ot.emd",
            OtReg::None,
            dual,
            OtSolver::NetworkSimplex,
        ),
        (
            "exact",
            "AuctionExact",
            "ot.emd",
            OtReg::None,
            dual,
            OtSolver::AuctionExact,
        ),
        (
            "entropic 0.05",
            "Sinkhorn",
            "ot.sinkhorn",
            entropic,
            dual,
            scaling,
        ),
        (
            "k = 8, 50 iterations",
            "L-BFGS, semi-dual",
            "ot.smooth",
            OtReg::KSparse { gamma, k },
            semi,
            sparse,
        ),
    ];
    for (what, ours, peer, reg, formulation, solver) in runs {
        let spec = json!({ "from": from, "to": to, "gamma": gamma, "k": k });
        session.measure(Case {
            slug: "sparse-ot",
            operation: format!("transport {POINTS} x {POINTS}, {what}"),
            ours,
            call: Box::new(|| {
                std::hint::black_box(solve(&problem, &reg, formulation, &solver)?.value);
                Ok(())
            }),
            peer: Peer::Python(peer, spec),
        })?;
    }
    Ok(())
}

/// Gromov-Wasserstein between the distances of two clouds, from the product of the weights.
fn structures(session: &mut Session<'_>) -> Result<()> {
    for nodes in [50, 200, 500] {
        let distances = |label: &str| -> Vec<f64> {
            let points = normals(label, 2 * nodes);
            let distance = |e: usize| {
                let (i, j) = (2 * (e / nodes), 2 * (e % nodes));
                (points[i] - points[j]).hypot(points[i + 1] - points[j + 1])
            };
            (0..nodes * nodes).map(distance).collect()
        };
        let (c1, c2) = (distances("first"), distances("second"));
        let spec = json!({ "c1": c1, "c2": c2, "nodes": nodes });
        let tensor = |c: Vec<f64>| Tensor::from_vec(c, (nodes, nodes), &Device::Cpu);
        let problem = GwProblem::uniform(&tensor(c1)?, &tensor(c2)?, GroundLoss::Square)?;
        session.measure(Case {
            slug: "sparse-ot",
            operation: format!("Gromov-Wasserstein, {nodes} nodes"),
            ours: "gromov_wasserstein",
            call: Box::new(move || {
                let found = gromov_wasserstein(&problem, &GwConfig::default(), None)?;
                std::hint::black_box(found.value);
                Ok(())
            }),
            peer: Peer::Python("ot.gromov", spec),
        })?;
    }
    Ok(())
}

/// A non-negative lasso to the duality gap at which scikit-learn stops.
fn lasso(session: &mut Session<'_>) -> Result<()> {
    let (n, p) = (1000, 10_000);
    let x = normals("matrix", n * p);
    let weight = |j: usize| if j.is_multiple_of(200) { 1.0 } else { 0.0 };
    let noise = normals("noise", n);
    let target = |i: usize| -> f64 {
        let row = &x[i * p..(i + 1) * p];
        row.iter()
            .enumerate()
            .map(|(j, x)| x * weight(j))
            .sum::<f64>()
            + noise[i]
    };
    let b: Vec<f64> = (0..n).map(target).collect();
    let l1 = 0.1 * n as f64;
    let gap = 1e-4 * b.iter().map(|b| b * b).sum::<f64>();
    let mut objective = LeastSquares::new(Columns::from_slice(n, p, &x)?, &b)?;
    drop(x);
    let solver = BlockCd::new(BlockCdConfig {
        penalty: Penalty::NonNegative { l1 },
        select: Select::ProxGsq,
        update: Update::TwoMetric,
        block_size: 100,
        tol: 0.0,
        gap_tol: Some(gap),
        ..BlockCdConfig::default()
    })?;
    let start = vec![0.0; p];
    session.measure(Case {
        slug: "bcd",
        operation: format!("non-negative lasso {n} x {p} of one distribution, gap 1e-4 |b|^2"),
        ours: "BlockCd, two-metric",
        call: Box::new(move || {
            let report = solver.solve(&mut objective, &start, &mut RandomStream::new(0))?;
            anyhow::ensure!(report.converged, "no convergence");
            Ok(())
        }),
        peer: Peer::Python(
            "Lasso",
            json!({ "n": n, "p": p, "every": 200, "alpha": 0.1 }),
        ),
    })
}

/// The convex program over 50 patterns, to a thousandth of the optimum.
fn network(session: &mut Session<'_>) -> Result<()> {
    let (n, d) = (100, 10);
    let mut x = normals("x", n * d);
    x.chunks_mut(d).for_each(|row| row[d - 1] = 1.0);
    let y: Vec<f64> = x.chunks(d).map(|row| row[0].sin() + row[1].abs()).collect();
    let (rows, targets) = (x.clone(), y.clone());
    let x = Tensor::from_vec(x, (n, d), &Device::Cpu)?;
    let y = Tensor::from_vec(y, n, &Device::Cpu)?;
    let patterns = Patterns::sample(&x, 50, &mut RandomStream::new(1))?;
    let beta = 0.01;
    let cone = |tol| {
        ConeRelu::new(ConeConfig {
            beta,
            tol,
            ..ConeConfig::default()
        })
    };
    let enough = 1.001 * cone(1e-9)?.fit(&x, &y, &patterns)?.objective;
    let config = AdmmConfig {
        beta,
        balance: true,
        ..AdmmConfig::default()
    };
    let solver = AdmmRelu::new(config)?;
    let bits = patterns.bits();
    let spec = json!({
        "x": rows, "y": targets, "d": d, "bits": bits, "beta": beta,
    });
    let operation = format!("n = {n}, d = {d}, P = {}, to 1e-3", patterns.len());
    let coarse = cone(1e-4)?;
    session.measure(Case {
        slug: "convex-relu",
        operation: operation.clone(),
        ours: "ConeRelu",
        call: Box::new(|| {
            let model = coarse.fit(&x, &y, &patterns)?;
            anyhow::ensure!(model.objective <= enough, "not within a thousandth");
            Ok(())
        }),
        peer: Peer::Python("cvxpy network", spec.clone()),
    })?;
    session.measure(Case {
        slug: "convex-relu",
        operation,
        ours: "AdmmRelu",
        call: Box::new(move || {
            let mut run = solver.start(&x, &y, &patterns)?;
            for step in 1..=20_000 {
                run.step()?;
                // The units must be feasible: only then is the objective that of a network.
                if step % 100 == 0 && run.model().objective <= enough {
                    return Ok(());
                }
            }
            anyhow::bail!("not within a thousandth of the optimum")
        }),
        peer: Peer::Python("cvxpy network", spec),
    })
}

/// Maximum-margin attention weights.
fn margins(session: &mut Session<'_>) -> Result<()> {
    let nuclear = SvmNorm::Nuclear { rank_cap: None };
    let cases = [
        ("Frobenius", SvmNorm::Frobenius, (50, 20, 32)),
        ("nuclear", nuclear, (10, 10, 16)),
    ];
    for (name, norm, (n, t, d)) in cases {
        let (x, z) = (normals("tokens", n * t * d), normals("queries", n * d));
        let spec = json!({ "x": x, "z": z, "n": n, "T": t, "d": d, "norm": name });
        let data = AttentionData::new(
            &Tensor::from_vec(x, (n, t, d), &Device::Cpu)?,
            &Tensor::from_vec(z, (n, d), &Device::Cpu)?,
            None,
        )?;
        let solver = AttSvm {
            norm,
            ..AttSvm::default()
        };
        let selection = Selection(vec![0; n]);
        session.measure(Case {
            slug: "attention-svm",
            operation: format!("{name} n = {n}, T = {t}, d = {d}"),
            ours: "AttSvm",
            call: Box::new(move || {
                std::hint::black_box(solver.solve(&data, &selection)?.norm);
                Ok(())
            }),
            peer: Peer::Python("cvxpy attention", spec),
        })?;
    }
    Ok(())
}
