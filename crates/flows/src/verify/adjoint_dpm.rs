//! The reference of the adjoint gradients: the authors' solver on a guided mixture.

use super::{bad, classes, input, mixture, values};
use crate::adjoint::{AdjointSolver, Anchor, GradientMode, RhoOde, States};
use crate::condition::Condition;
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::grid::Grid;
use crate::level::Levels;
use crate::mixture::AnalyticMixture;
use crate::ode::Method;
use crate::prediction::Prediction;
use crate::schedule::VpSde;
use candle_core::{DType, Tensor, Var};
use tensor_core::verify::{Reference, Tolerance};

/// Classifier-free guidance of the mixture, translated by `theta`: `eps(x; theta) = eps(x - alpha
/// theta)`.
struct Shifted<'a> {
    mixture: &'a AnalyticMixture,
    scale: f64,
    theta: Option<Var>,
}

impl Denoiser for Shifted<'_> {
    fn prediction(&self) -> Prediction {
        Prediction::Eps
    }

    fn raw(&self, x: &Tensor, levels: &Levels, condition: &Condition) -> Result<Tensor> {
        let x = match &self.theta {
            Some(theta) => x.broadcast_sub(&levels.scale(theta.as_tensor(), |l| l.alpha)?)?,
            None => x.clone(),
        };
        let wanted = self.mixture.denoise(&x, levels, condition)?.eps()?;
        let null = self.mixture.denoise(&x, levels, &Condition::Null)?.eps()?;
        Ok((&null + (wanted - &null)?.affine(self.scale, 0.0)?)?)
    }
}

/// Checks samples and gradients of every method of the file.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn adjoint_dpm(reference: &mut Reference) -> Result<()> {
    let mixture = mixture(reference, "mix_var")?;
    let schedule = vp(reference)?;
    let grid = grid(reference, &schedule)?;
    let condition = classes(reference, "c")?;
    let model = Shifted {
        mixture: &mixture,
        scale: reference.number("guidance_w")?,
        theta: None,
    };
    let start = grid.levels()[0];
    let ode = RhoOde::new(&model, &schedule, &condition).anchor(Anchor::Start(start));
    let times: Vec<f64> = grid.levels().iter().map(|l| l.model_time).collect();
    let rhos = grid
        .levels()
        .iter()
        .map(|l| ode.time(l))
        .collect::<Result<Vec<_>>>()?;
    reference.compare("t_grid", &times, Tolerance::Mixed(1e-10))?;
    reference.compare("rho_grid", &rhos, Tolerance::Mixed(1e-10))?;
    let x = input(reference, "x_T")?;
    let target = input(reference, "target")?;
    let methods = reference.text("methods")?.to_string();
    for name in methods.split(',') {
        let solver = AdjointSolver::new(grid.clone()).method(method(reference, name.trim())?);
        gradients(reference, name.trim(), &solver, &ode, (&x, &target))?;
    }
    if !reference.has("theta") {
        return Ok(());
    }
    let theta = reference.input("theta")?.tensor(DType::F64)?;
    let moved = Shifted {
        theta: Some(Var::from_tensor(&theta)?),
        ..model
    };
    let names = reference.names();
    let theta_methods = names
        .iter()
        .filter_map(|n| n.strip_prefix("theta_grad_discrete_"));
    for name in theta_methods {
        translation(reference, name, &moved, &schedule, &grid, &condition)?;
    }
    Ok(())
}

fn method(reference: &Reference, name: &str) -> Result<Method> {
    match name {
        "euler" => Ok(Method::Euler),
        "midpoint" => Ok(Method::Midpoint),
        "heun2" => Ok(Method::Heun),
        "rk4" => Ok(Method::Rk38),
        _ => Err(bad(reference, format!("unknown method `{name}`"))),
    }
}

/// "VP linear beta_0=0.1 beta_1=20"
fn vp(reference: &Reference) -> Result<VpSde> {
    Ok(VpSde {
        beta_min: super::setting(reference, "schedule", "beta_0")?,
        beta_max: super::setting(reference, "schedule", "beta_1")?,
    })
}

fn grid(reference: &Reference, schedule: &VpSde) -> Result<Grid> {
    let (from, to) = (reference.number("t_start")?, reference.number("t_end")?);
    let steps = reference.number("steps")?;
    match reference.text("skip_type")? {
        "logSNR" => Grid::uniform_lambda_between(schedule, from, to, steps),
        "time_uniform" => Grid::uniform_time_between(schedule, from, to, steps),
        "time_quadratic" => Grid::quadratic_time_between(schedule, from, to, steps),
        other => Err(bad(reference, format!("unknown skip_type `{other}`"))),
    }
}

/// Gradients are compared relative to the largest entry.
fn scaled(reference: &Reference, name: &str, tol: f64) -> Result<Tolerance> {
    let largest = |m: f64, x: &f64| m.max(x.abs());
    let scale = reference.expected(name)?.values.iter().fold(0.0, largest);
    Ok(Tolerance::Scaled { tol, scale })
}

fn gradients(
    reference: &mut Reference,
    name: &str,
    solver: &AdjointSolver,
    ode: &RhoOde,
    (x, target): (&Tensor, &Tensor),
) -> Result<()> {
    let forward = solver.solve(ode, x)?;
    let samples = format!("{name}_x0");
    reference.compare_tensor(&samples, &forward.x_end, Tolerance::Absolute(1e-9))?;
    let end = (&forward.x_end - target)?.affine(2.0, 0.0)?;
    let stored = GradientMode::Continuous(States::Stored);
    let back = GradientMode::Continuous(States::Reconstructed);
    let modes = [
        ("grad_adjoint", stored, 1e-8),
        ("grad_adjoint_reconstructed", back, 1e-6),
        ("grad_discrete", GradientMode::Discrete, 1e-8),
        ("grad_discrete", GradientMode::Symplectic, 1e-8),
        (
            "grad_discrete",
            GradientMode::Backprop { checkpoint: false },
            1e-8,
        ),
        ("grad_scaled_adjoint", GradientMode::Scaled, 1e-8),
    ];
    for (kind, mode, tol) in modes {
        let tensor = format!("{name}_{kind}");
        if mode == GradientMode::Scaled && !reference.has(&tensor) {
            continue;
        }
        let found = solver
            .clone()
            .mode(mode)
            .pullback(ode, &forward.tape, &end, &[])?;
        let tolerance = scaled(reference, &tensor, tol)?;
        reference.compare_tensor(&tensor, &found.start, tolerance)?;
    }
    let start = solver.reconstruct_start(ode, &forward.tape)?;
    let tensor = format!("{name}_xT_reconstructed");
    let tolerance = scaled(reference, &tensor, 1e-6)?;
    Ok(reference.compare_tensor(&tensor, &start, tolerance)?)
}

/// The gradient with respect to a parameter of the model.
fn translation(
    reference: &mut Reference,
    name: &str,
    model: &Shifted,
    schedule: &VpSde,
    grid: &Grid,
    condition: &Condition,
) -> Result<()> {
    let x = input(reference, "x_T")?;
    let target = input(reference, "target")?;
    let ode = RhoOde::new(model, schedule, condition);
    let solver = AdjointSolver::new(grid.clone()).method(method(reference, name)?);
    let forward = solver.solve(&ode, &x)?;
    let samples = format!("theta_x0_{name}");
    reference.compare_tensor(&samples, &forward.x_end, Tolerance::Absolute(1e-9))?;
    let end = (&forward.x_end - &target)?.affine(2.0, 0.0)?;
    let vars: Vec<Var> = model.theta.iter().cloned().collect();
    let modes = [
        (
            format!("theta_grad_{name}"),
            GradientMode::Continuous(States::Stored),
        ),
        (
            format!("theta_grad_discrete_{name}"),
            GradientMode::Discrete,
        ),
        (
            format!("theta_grad_discrete_{name}"),
            GradientMode::Symplectic,
        ),
    ];
    for (tensor, mode) in modes {
        let found = solver
            .clone()
            .mode(mode)
            .pullback(&ode, &forward.tape, &end, &vars)?;
        let tolerance = scaled(reference, &tensor, 1e-8)?;
        for grad in &found.vars {
            reference.compare(&tensor, &values(grad)?, tolerance)?;
        }
    }
    Ok(())
}
