//! The reference of rectified flow: solvers on a closed-form field, losses, time samplers.

use super::{bad, input, setting, setting_text, values};
use crate::condition::Condition;
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::level::{Level, Levels};
use crate::likelihood::{log_likelihood, Divergence};
use crate::metrics::{straightness, transport_cost, Cost};
use crate::mixture::AnalyticMixture;
use crate::ode::{sde_step, FixedStep, Method, OdeSolver, Rk45, Steps, Times};
use crate::time_sampler::TimeSampler;
use crate::train::{FlowLoss, Reduction};
use crate::velocity::{Reversed, Velocity};
use candle_core::{DType, Tensor, Var};
use tensor_core::random::RandomStream;
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Absolute(1e-10);

/// Checks field, solvers, likelihood, losses and time samplers.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn rectified_flow(reference: &mut Reference) -> Result<()> {
    let means = input(reference, "mix_centers")?;
    let weights = reference.input("mix_weights")?.values;
    let std: f64 = reference.number("mix_std")?;
    let field = AnalyticMixture::new(&means, &vec![std * std; weights.len()], &weights)?;
    velocities(reference, &field)?;
    fixed_steps(reference, &field)?;
    adaptive(reference, &field)?;
    densities(reference, &field)?;
    stochastic(reference, &field)?;
    losses(reference)?;
    times(reference)
}

fn velocity(field: &dyn Velocity, x: &Tensor, t: f64) -> Result<Tensor> {
    field.velocity(x, &Times::Same(t).tensor(x)?, &Condition::Null)
}

fn velocities(reference: &mut Reference, field: &AnalyticMixture) -> Result<()> {
    let x = input(reference, "x0")?;
    let (mut found, mut divergences) = (Vec::new(), Vec::new());
    for t in reference.input("v_t")?.values {
        found.extend(values(&velocity(field, &x, t)?)?);
        let var = Var::from_tensor(&x)?;
        let v = velocity(field, &var, t)?;
        let mut sum = vec![0.0; x.dims()[0]];
        for i in 0..x.dims()[1] {
            let grads = v.narrow(1, i, 1)?.sum_all()?.backward()?;
            if let Some(grad) = grads.get(&var) {
                let column = values(&grad.narrow(1, i, 1)?)?;
                sum.iter_mut().zip(column).for_each(|(s, g)| *s += g);
            }
        }
        divergences.extend(sum);
    }
    reference.compare("v_at_x0", &found, TOLERANCE)?;
    Ok(reference.compare("div_at_x0", &divergences, TOLERANCE)?)
}

fn fixed_steps(reference: &mut Reference, field: &AnalyticMixture) -> Result<()> {
    let x0 = input(reference, "x0")?;
    let n: usize = reference.number("euler_steps")?;
    let euler = FixedStep::euler(n).recorded().solve(field, &x0, 0.0, 1.0)?;
    let trajectory = euler.trajectory.unwrap_or_default();
    let stacked = Tensor::stack(&trajectory, 0)?;
    reference.compare_tensor("euler_traj", &stacked, TOLERANCE)?;
    let s = straightness(&trajectory, &euler.times)?;
    reference.compare("straightness", &[s], TOLERANCE)?;
    let costs = [
        ("transport_cost_sq", Cost::SquaredL2),
        ("transport_cost_l2", Cost::L2),
    ];
    for (name, cost) in costs {
        let found = transport_cost(&x0, &euler.x, cost)?;
        reference.compare(name, &[found], TOLERANCE)?;
    }
    let methods = [
        ("midpoint_final", Method::Midpoint),
        ("heun_final", Method::Heun),
        ("rk4_final", Method::Rk4),
    ];
    for (name, method) in methods {
        let end = FixedStep::new(method, n).solve(field, &x0, 0.0, 1.0)?.x;
        reference.compare_tensor(name, &end, TOLERANCE)?;
    }
    let late = FixedStep {
        steps: Steps::Late {
            steps: n,
            eps: reference.number("official_eps")?,
        },
        ..FixedStep::euler(n)
    };
    let end = late.solve(field, &x0, 0.0, 1.0)?.x;
    reference.compare_tensor("euler_official_grid_final", &end, TOLERANCE)?;
    // Backwards through the reversed field too: both must be the same.
    let back = FixedStep::euler(n).solve(field, &euler.x, 1.0, 0.0)?.x;
    reference.compare_tensor("euler_reverse_from_euler_final", &back, TOLERANCE)?;
    let turned = Reversed(|x: &Tensor, t: &Tensor| Ok(field.velocity(x, t, &Condition::Null)?));
    let back = FixedStep::euler(n).solve(&turned, &euler.x, 0.0, 1.0)?.x;
    Ok(reference.compare_tensor("euler_reverse_from_euler_final", &back, TOLERANCE)?)
}

fn adaptive(reference: &mut Reference, field: &AnalyticMixture) -> Result<()> {
    for case in reference.cases("_times") {
        let start = match setting_text(reference, &case, "start")?.as_str() {
            "euler_final" => {
                let n: usize = reference.number("euler_steps")?;
                reference
                    .expected("euler_traj")?
                    .row(n)?
                    .tensor(DType::F64)?
            }
            name => input(reference, name)?,
        };
        let solver = Rk45::with_tolerance(setting(reference, &case, "tol")?);
        let (t0, t1) = (
            setting(reference, &case, "t0")?,
            setting(reference, &case, "t1")?,
        );
        let solution = solver.solve(field, &start, t0, t1)?;
        let loose = Tolerance::Absolute(1e-7);
        reference.compare_tensor(&format!("{case}_final"), &solution.x, loose)?;
        reference.compare(&format!("{case}_times"), &solution.times, loose)?;
        let wanted = setting(reference, &case, "nfev")?;
        if solution.nfe as f64 != wanted {
            let reason = format!("{case}: {} evaluations, expected {wanted}", solution.nfe);
            return Err(bad(reference, reason));
        }
    }
    Ok(())
}

fn densities(reference: &mut Reference, field: &AnalyticMixture) -> Result<()> {
    let x0 = input(reference, "x0")?;
    let end = FixedStep::rk4(400).solve(field, &x0, 0.0, 1.0)?.x;
    reference.compare_tensor("flow_end", &end, TOLERANCE)?;
    let name = "loglik_exact_at_flow_end";
    let clean = Levels::Same(Level::new(1.0, 0.0, 1.0)?);
    let exact = field.log_density(&end, &clean, &Condition::Null)?;
    reference.compare_tensor(name, &exact, TOLERANCE)?;
    let (flow, _) = log_likelihood(
        field,
        &end,
        &Condition::Null,
        &FixedStep::rk4(400),
        Divergence::Exact,
        &mut RandomStream::new(0),
    )?;
    Ok(reference.compare_tensor(name, &flow, Tolerance::Absolute(1e-8))?)
}

fn stochastic(reference: &mut Reference, field: &AnalyticMixture) -> Result<()> {
    let x = input(reference, "x0")?;
    let t = setting(reference, "sde", "t")?;
    let v = velocity(field, &x, t)?;
    let at = Levels::Same(Level::new(t, 1.0 - t, t)?);
    let score = field.denoise(&x, &at, &Condition::Null)?.score()?;
    reference.compare_tensor("score_at_x0", &score, TOLERANCE)?;
    let (h, sigma) = (
        setting(reference, "sde", "h")?,
        setting(reference, "sde", "sigma_t")?,
    );
    let out = sde_step(&x, &v, &input(reference, "sde_noise")?, t, h, sigma, 1.0)?;
    Ok(reference.compare_tensor("sde_step_out", &out, TOLERANCE)?)
}

fn losses(reference: &mut Reference) -> Result<()> {
    let mut read =
        |name: &str| -> Result<Tensor> { Ok(reference.input(name)?.tensor(DType::F32)?) };
    let (x0, x1) = (read("loss_z0")?, read("loss_data")?);
    let (w, b) = (read("loss_model_w")?, read("loss_model_b")?);
    let u = read("loss_u")?;
    let model = |x: &Tensor, t: &Tensor| {
        let (rows, channels, h, width) = x.dims4()?;
        let moved = w.broadcast_matmul(&x.reshape((rows, channels, h * width))?)?;
        let shift = t.reshape((rows, 1))?.broadcast_mul(&b.unsqueeze(0)?)?;
        moved
            .broadcast_add(&shift.unsqueeze(2)?)?
            .reshape(x.shape())
    };
    let eps = reference.number("official_eps")?;
    let from_u = |sampler: TimeSampler| -> Result<Tensor> {
        let t = values(&u)?
            .iter()
            .map(|u| sampler.from_uniform(*u))
            .collect::<Result<Vec<_>>>()?;
        let count = t.len();
        Ok(Tensor::from_vec(t, count, x0.device())?.to_dtype(DType::F32)?)
    };
    let uniform = from_u(TimeSampler::Uniform { eps })?;
    for name in reference.names() {
        let Some(kind) = name.strip_prefix("loss_") else {
            continue;
        };
        let (t, reduction) = match kind {
            "uniform_mean" | "reflow_uniform" => (uniform.clone(), Reduction::Mean),
            "uniform_sum" => (uniform.clone(), Reduction::HalfSum),
            // The code's t0 is eps, its t1 exactly 1.
            "reflow_t0" => (from_u(TimeSampler::Fixed(eps))?, Reduction::Mean),
            "reflow_t1" => (from_u(TimeSampler::Fixed(1.0))?, Reduction::Mean),
            _ => {
                let Some(k) = kind.strip_prefix("reflow_").and_then(|k| k.parse().ok()) else {
                    continue;
                };
                let j = reference.input("loss_kstep_index")?.values;
                let sampler = TimeSampler::Discrete { k, eps };
                // The middle of the j-th of k equal parts gives j.
                let t = j.iter().map(|j| sampler.from_uniform((j + 0.5) / k as f64));
                let t = t.collect::<Result<Vec<_>>>()?;
                let count = t.len();
                let t = Tensor::from_vec(t, count, x0.device())?.to_dtype(DType::F32)?;
                (t, Reduction::Mean)
            }
        };
        let loss = FlowLoss {
            reduction,
            ..FlowLoss::default()
        };
        let found = loss.loss(&model, &x0, &x1, &t, &Condition::Null)?;
        reference.compare(&name, &values(&found)?, Tolerance::Mixed(1e-5))?;
    }
    Ok(())
}

fn times(reference: &mut Reference) -> Result<()> {
    let u = reference.input("ts_u")?.values;
    let z = reference.input("ts_normal")?.values;
    let a = reference.number("exp_a")?;
    let uniform = [
        (
            "ts_uniform_eps",
            TimeSampler::Uniform {
                eps: reference.number("official_eps")?,
            },
        ),
        (
            "ts_mode",
            TimeSampler::Mode {
                scale: reference.number("mode_scale")?,
            },
        ),
        ("ts_exp_u_at", TimeSampler::CoshTails { a, center: 0.0 }),
        (
            "ts_cosh_center_half",
            TimeSampler::CoshTails { a, center: 0.5 },
        ),
    ];
    for (name, sampler) in uniform {
        let found = u
            .iter()
            .map(|u| sampler.from_uniform(*u))
            .collect::<Result<Vec<_>>>()?;
        reference.compare(name, &found, TOLERANCE)?;
    }
    let sampler = TimeSampler::LogitNormal {
        mean: reference.number("logit_normal_mean")?,
        std: reference.number("logit_normal_std")?,
    };
    let found = z
        .iter()
        .map(|z| sampler.from_normal(*z))
        .collect::<Result<Vec<_>>>()?;
    let density = found
        .iter()
        .map(|t| sampler.density(*t))
        .collect::<Result<Vec<_>>>()?;
    reference.compare("ts_logit_normal", &found, TOLERANCE)?;
    Ok(reference.compare("ts_logit_normal_density", &density, TOLERANCE)?)
}
