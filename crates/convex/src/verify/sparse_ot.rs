//! The reference of `sparse-ot`: projections, objectives at fixed points, optima, ADAM, the router.

use super::{number, prefixes};
use crate::transport::{
    dual, project_simplex, project_sparse_simplex, semi_dual, solve, Capacity, Formulation,
    OtProblem, OtReg, OtSolution, OtSolver, SparseOtRouter, SparseOtRouterConfig,
};
use crate::Result;
use candle_core::DType;
use tensor_core::verify::{Reference, Tolerance};

const EXACT: Tolerance = Tolerance::Mixed(1e-10);

/// Checks everything in the file, for each prefix before `proj_in`, `C` and `rt_logits`.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn sparse_ot(reference: &mut Reference) -> Result<()> {
    for case in prefixes(reference, "proj_in") {
        projections(reference, &case)?;
    }
    for case in prefixes(reference, "C") {
        problem(reference, &case)?;
    }
    for case in prefixes(reference, "rt_logits") {
        router(reference, &case)?;
    }
    Ok(())
}

fn projections(reference: &mut Reference, case: &str) -> Result<()> {
    let input = reference.input(&format!("{case}proj_in"))?;
    let width = input.shape.last().copied().unwrap_or(0);
    let start = format!("{case}proj_k");
    let names = reference.names();
    for name in names.iter().filter(|name| name.starts_with(&start)) {
        let k = &name[start.len()..];
        let mut found = Vec::new();
        for row in input.values.chunks(width) {
            found.extend(match k.parse::<usize>() {
                Ok(k) => project_sparse_simplex(row, k, 1.0)?,
                Err(_) => project_simplex(row, 1.0)?,
            });
        }
        reference.compare(name, &found, EXACT)?;
    }
    Ok(())
}

fn problem(reference: &mut Reference, case: &str) -> Result<()> {
    let mut input = |name: &str| reference.input(&format!("{case}{name}"));
    let (a, b, cost) = (input("a")?.values, input("b")?.values, input("C")?.values);
    let (alpha, beta) = (input("alpha")?.values, input("beta")?.values);
    let problem = OtProblem::from_slices(&a, &b, &cost)?;
    let gamma = number(reference, case, "gamma")?;
    let k = number(reference, case, "k")?;
    let regs = [
        ("none", OtReg::None),
        ("ent", OtReg::Entropic { gamma }),
        ("l2", OtReg::Quadratic { gamma }),
        ("k", OtReg::KSparse { gamma, k }),
    ];
    for (tag, reg) in regs {
        let name = |part: &str| format!("{case}{part}");
        if reference.has(&name(&format!("semi_{tag}_f"))) {
            let at = semi_dual(&problem, &reg, &alpha)?;
            let name = |part: &str| format!("{case}semi_{tag}_{part}");
            reference.compare(&name("f"), &[at.value], EXACT)?;
            reference.compare(&name("g"), &at.grad, EXACT)?;
            reference.compare(&name("T"), &at.plan.to_dense(), EXACT)?;
        }
        if reference.has(&name(&format!("dual_{tag}_f"))) {
            let at = dual(&problem, &reg, &alpha, &beta)?;
            let name = |part: &str| format!("{case}dual_{tag}_{part}");
            reference.compare(&name("f"), &[at.value], EXACT)?;
            reference.compare(&name("ga"), &at.grad_alpha, EXACT)?;
            reference.compare(&name("gb"), &at.grad_beta, EXACT)?;
            reference.compare(&name("T"), &at.plan.to_dense(), EXACT)?;
        }
        optima(reference, case, tag, &problem, reg)?;
        adam(reference, case, tag, &problem, reg)?;
    }
    exact(reference, case, &problem)
}

fn exact(reference: &mut Reference, case: &str, problem: &OtProblem) -> Result<()> {
    if !reference.has(&format!("{case}emd_cost")) {
        return Ok(());
    }
    let solver = OtSolver::NetworkSimplex;
    let found = solve(problem, &OtReg::None, Formulation::Dual, &solver)?;
    reference.compare(&format!("{case}emd_cost"), &[found.primal_cost], EXACT)?;
    let plan = found.plan.to_dense();
    reference.compare(&format!("{case}emd_plan"), &plan, EXACT)?;
    // A lower bound that meets the cost proves both.
    let name = format!("{case}emd_cost");
    Ok(reference.compare(&name, &[found.value], EXACT)?)
}

fn optima(
    reference: &mut Reference,
    case: &str,
    tag: &str,
    problem: &OtProblem,
    reg: OtReg,
) -> Result<()> {
    let solver = OtSolver::Lbfgs {
        memory: 10,
        tol: 1e-10,
        max_iter: 5000,
    };
    for (form, formulation) in [("semi", Formulation::SemiDual), ("dual", Formulation::Dual)] {
        let name = |part: &str| format!("{case}opt_{form}_{tag}_{part}");
        if !reference.has(&name("f")) {
            continue;
        }
        let found = solve(problem, &reg, formulation, &solver)?;
        if let OtReg::KSparse { k, .. } = reg {
            reference.compare(&name("f"), &[found.value], Tolerance::Mixed(1e-3))?;
            tied(reference, &name, &found, problem, k, formulation)?;
            continue;
        }
        reference.compare(&name("f"), &[found.value], Tolerance::Mixed(1e-8))?;
        let plan = found.plan.to_dense();
        reference.compare(&name("T"), &plan, Tolerance::Mixed(1e-5))?;
        if reference.has(&name("gradnorm")) {
            // Both ended at a maximum: what is left of the gradient is the stopping rule's.
            let at_rest = Tolerance::Absolute(1e-5);
            reference.compare(&name("gradnorm"), &[found.gradient], at_rest)?;
        }
    }
    Ok(())
}

/// At ties of the `k` largest entries the plan is one supergradient of many: only what every one of
/// them satisfies is compared.
fn tied(
    reference: &mut Reference,
    name: &dyn Fn(&str) -> String,
    found: &OtSolution,
    problem: &OtProblem,
    k: usize,
    formulation: Formulation,
) -> Result<()> {
    let n = problem.b().len();
    let stored = reference.expected(&name("T"))?.values.clone();
    let most = |plan: &[f64]| {
        let column = |j| {
            plan.iter()
                .skip(j)
                .step_by(n)
                .filter(|t| **t != 0.0)
                .count()
        };
        (0..n).map(column).max().unwrap_or(0)
    };
    let sums_fit = found
        .plan
        .column_sums()
        .iter()
        .zip(problem.b())
        .all(|(s, b)| (s - b).abs() <= 1e-10);
    let sound = most(&found.plan.to_dense()) <= k
        && most(&stored) <= k
        && (formulation == Formulation::Dual || sums_fit)
        && found.marginal_error.is_finite();
    let verdict = if sound { &stored[..] } else { &[] };
    reference.compare(&name("T"), verdict, Tolerance::Mismatches(0))?;
    if reference.has(&name("gradnorm")) {
        // What is left of a supergradient depends on the path; it belongs to the stored plan.
        let rows = stored.chunks(n).zip(problem.a());
        let left = rows.map(|(row, a)| (a - row.iter().sum::<f64>()).abs());
        let largest = left.fold(0.0, f64::max);
        reference.compare(&name("gradnorm"), &[largest], EXACT)?;
    }
    Ok(())
}

fn adam(
    reference: &mut Reference,
    case: &str,
    tag: &str,
    problem: &OtProblem,
    reg: OtReg,
) -> Result<()> {
    let name = |part: &str| format!("{case}adam_{tag}_{part}");
    if !reference.has(&name("f")) {
        return Ok(());
    }
    let solver = OtSolver::Adam {
        lr: number(reference, case, "adam_lr")?,
        steps: number(reference, case, "adam_steps")?,
        beta1: number(reference, case, "adam_b1")?,
        beta2: number(reference, case, "adam_b2")?,
        eps: number(reference, case, "adam_eps")?,
    };
    let found = solve(problem, &reg, Formulation::SemiDual, &solver)?;
    let expected = reference.expected(&name("f"))?.values.clone();
    let mut values = found.history[..found.history.len() - 1].to_vec();
    let mut stored = reference.expected(&name("alpha"))?.values.clone();
    let tolerance = if matches!(reg, OtReg::KSparse { .. }) {
        // A tie may fall either way after some steps, and sets what follows.
        let agree = values
            .iter()
            .zip(&expected)
            .take_while(|(a, b)| (*a - *b).abs() <= 1e-6 * b.abs().max(1.0))
            .count();
        if agree >= 20.min(expected.len()) && agree < expected.len() {
            values[agree..].copy_from_slice(&expected[agree..]);
            reference.compare(&name("f"), &values, Tolerance::Mixed(1e-6))?;
            return Ok(reference.uncovered(&name("alpha"), "a tie fell the other way")?);
        }
        Tolerance::Mixed(1e-6)
    } else {
        Tolerance::Mixed(1e-8)
    };
    reference.compare(&name("f"), &values, tolerance)?;
    // Ours is centered.
    let mean = stored.iter().sum::<f64>() / stored.len() as f64;
    stored.iter_mut().for_each(|x| *x -= mean);
    let shifted: Vec<f64> = found.alpha.iter().map(|x| x + mean).collect();
    Ok(reference.compare(&name("alpha"), &shifted, tolerance)?)
}

fn router(reference: &mut Reference, case: &str) -> Result<()> {
    let logits = reference.input(&format!("{case}rt_logits"))?;
    let config = SparseOtRouterConfig {
        experts: logits.shape.last().copied().unwrap_or(0),
        capacity: Capacity::Tokens(number(reference, case, "rt_k")?),
        gamma: number(reference, case, "rt_gamma")?,
        adam_steps: number(reference, case, "rt_steps")?,
        adam_lr: number(reference, case, "rt_lr")?,
        ..SparseOtRouterConfig::default()
    };
    let routing = SparseOtRouter::new(config)?.route(&logits.tensor(DType::F64)?)?;
    let tolerance = Tolerance::Mixed(1e-8);
    let name = |part: &str| format!("{case}rt_{part}");
    let stored = &reference.expected(&name("alpha"))?.values;
    let mean = stored.iter().sum::<f64>() / stored.len().max(1) as f64;
    let alpha: Vec<f64> = routing.alpha.iter().map(|x| x + mean).collect();
    reference.compare(&name("alpha"), &alpha, tolerance)?;
    reference.compare(&name("plan"), &routing.plan.to_dense(), tolerance)?;
    reference.compare_tensor(&name("gates"), &routing.gates, tolerance)?;
    Ok(reference.compare_tensor(&name("weights"), &routing.weights, tolerance)?)
}
