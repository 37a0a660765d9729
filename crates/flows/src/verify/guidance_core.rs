//! The reference of the sampling floor: levels, conversions, and finals of every sampler. The
//! `g_*` and `interval_*` tensors belong to the guidance rules.

use super::{bad, classes, grid, input, level, mixture, rows};
use crate::condition::Condition;
use crate::error::Result;
use crate::grid::{karras_sigmas, Grid};
use crate::level::{Level, Levels};
use crate::mixture::AnalyticMixture;
use crate::noise::Noise;
use crate::prediction::{Denoised, PathSpeed, Prediction};
use crate::sampler::{Sampled, Sampler};
use crate::schedule::{Beta, Ddpm, Shift, VpSde};
use crate::stepper::{Correction, Ddim, DpmSolverPP2M, DpmSolverPP2S, Euler, Heun, Stepper};
use candle_core::Tensor;
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Absolute(1e-10);

/// Checks levels, conversions and samplers.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn guidance_core(reference: &mut Reference) -> Result<()> {
    discrete_levels(reference)?;
    grids(reference)?;
    conversions(reference)?;
    samplers(reference)
}

fn discrete_levels(reference: &mut Reference) -> Result<()> {
    let names: Vec<String> = reference.names();
    let tables = names
        .iter()
        .filter(|n| n.starts_with("abar_") && *n != "abar_index");
    for name in tables {
        let beta = match name.as_str() {
            "abar_linear" => Beta::LINEAR,
            "abar_scaled_linear" => Beta::STABLE_DIFFUSION,
            "abar_cosine" => Beta::SquaredCosine,
            _ => return Err(bad(reference, format!("`{name}`: unknown schedule"))),
        };
        let schedule = Ddpm::new(beta, 1000)?;
        let index = reference.input("abar_index")?.indices()?;
        let found: Option<Vec<f64>> = index
            .iter()
            .map(|i| schedule.alpha_bar(*i as usize))
            .collect();
        let found = found.ok_or_else(|| bad(reference, "`abar_index` is beyond 999"))?;
        reference.compare(name, &found, TOLERANCE)?;
    }
    Ok(())
}

fn grids(reference: &mut Reference) -> Result<()> {
    // "sigma_min 0.002 sigma_max 80 rho 7"
    let text = reference.text("karras")?.to_string();
    let words: Vec<&str> = text.split_whitespace().collect();
    let word = |key: &str| {
        let at = words.iter().position(|w| *w == key);
        at.and_then(|i| words.get(i + 1)?.parse::<f64>().ok())
    };
    let (Some(min), Some(max), Some(rho)) = (word("sigma_min"), word("sigma_max"), word("rho"))
    else {
        return Err(bad(reference, "metadata `karras` has another form"));
    };
    let count = reference.expected("karras_sigmas")?.values.len();
    let mut sigmas: Vec<f64> = karras_sigmas(min, max, rho, count - 1).collect();
    sigmas.push(0.0);
    reference.compare("karras_sigmas", &sigmas, TOLERANCE)?;
    for name in reference.names() {
        let Some(rest) = name.strip_prefix("flow_shift") else {
            continue;
        };
        // The number is in the name: `flow_shift3`, `flow_shift_exp_1p15`.
        let number = |text: &str| -> Result<f64> {
            let number = text.replace('p', ".").parse();
            number.map_err(|_| bad(reference, format!("`{name}`: no number in the name")))
        };
        let shift = match rest.strip_prefix("_exp_") {
            Some(mu) => Shift::Exponential(number(mu)?),
            None => Shift::Constant(number(rest)?),
        };
        let n = reference.expected(&name)?.values.len();
        // s runs from 1 to 1/n.
        let found = (0..n).map(|i| shift.apply((n - i) as f64 / n as f64));
        let found = found.collect::<Result<Vec<f64>>>()?;
        reference.compare(&name, &found, TOLERANCE)?;
    }
    Ok(())
}

fn conversions(reference: &mut Reference) -> Result<()> {
    let x = input(reference, "z")?;
    let at = Levels::Same(level(reference, "conv_level")?);
    let start = input(reference, "conv_x0")?;
    let d = Denoised::from_raw(&start, Prediction::X0, &x, &at)?;
    let forms = [
        ("conv_eps", Prediction::Eps),
        ("conv_v", Prediction::V),
        ("conv_score", Prediction::Score),
    ];
    for (name, prediction) in forms {
        reference.compare_tensor(name, &d.to_raw(prediction)?, TOLERANCE)?;
        let given = reference.expected(name)?.tensor(candle_core::DType::F64)?;
        let back = Denoised::from_raw(&given, prediction, &x, &at)?;
        reference.compare_tensor("conv_x0", &back.x0, TOLERANCE)?;
    }
    let at = Levels::Same(level(reference, "flow_level")?);
    let x = input(reference, "flow_x")?;
    let velocity = input(reference, "flow_velocity_noise_minus_data")?;
    let speed = PathSpeed::NoiseMinusData;
    let d = Denoised::from_raw(&velocity, Prediction::Velocity(speed), &x, &at)?;
    reference.compare_tensor("flow_x0", &d.x0, TOLERANCE)?;
    reference.compare_tensor("flow_eps", &d.eps()?, TOLERANCE)?;
    let back = d.velocity(speed)?;
    Ok(reference.compare_tensor("flow_velocity_noise_minus_data", &back, TOLERANCE)?)
}

struct Run<'a> {
    mixture: &'a AnalyticMixture,
    grid: &'a Grid,
    start: &'a Tensor,
    condition: &'a Condition,
}

impl Run<'_> {
    fn sample(&self, stepper: impl Stepper, noise: Vec<Tensor>) -> Result<Tensor> {
        Ok(self.counted(stepper, noise)?.x)
    }

    fn counted(&self, stepper: impl Stepper, noise: Vec<Tensor>) -> Result<Sampled> {
        let mut sampler = Sampler::new(self.mixture, self.grid.clone()).stepper(stepper);
        sampler.sample_from(self.start, self.condition, None, Noise::given(noise))
    }
}

fn samplers(reference: &mut Reference) -> Result<()> {
    let mixture = mixture(reference, "mix_var")?;
    let grid = grid(reference)?;
    let start = input(reference, "z")?;
    let condition = classes(reference, "c")?;
    let run = Run {
        mixture: &mixture,
        grid: &grid,
        start: &start,
        condition: &condition,
    };
    for name in reference.names() {
        let Some(rule) = name.strip_suffix("_final").filter(|r| *r != "interval_cfg") else {
            continue;
        };
        let found = match rule {
            "euler_sigma" => run.sample(Euler, vec![])?,
            "heun" => {
                let out = run.counted(Heun, vec![])?;
                if reference.metadata().contains_key("heun_nfe") {
                    let (wanted, rows) = (reference.number::<usize>("heun_nfe")?, start.dims()[0]);
                    if out.nfe.main != wanted * rows {
                        let found = out.nfe.per_sample(rows);
                        let reason =
                            format!("Heun took {found} evaluations, `heun_nfe` says {wanted}");
                        return Err(bad(reference, reason));
                    }
                }
                out.x
            }
            "dpmpp2m" => run.sample(DpmSolverPP2M::new(Correction::Midpoint, 0), vec![])?,
            "dpmpp2s" => {
                let r1 = reference.number("dpmpp2s_r1")?;
                let schedule = preserving(&grid).ok_or_else(|| {
                    bad(
                        reference,
                        "alpha^2 + sigma^2 is not 1: no level between the grid's",
                    )
                })?;
                run.sample(DpmSolverPP2S { schedule, r1 }, vec![])?
            }
            _ => {
                let Some(eta) = eta(rule) else {
                    return Err(bad(reference, format!("`{name}`: unknown sampler")));
                };
                let noise = match eta > 0.0 {
                    true => rows(&reference.input("ddim_noise")?)?,
                    false => Vec::new(),
                };
                run.sample(Ddim { eta }, noise)?
            }
        };
        reference.compare_tensor(&name, &found, TOLERANCE)?;
    }
    Ok(())
}

/// `ddim`, `ddim_eta1`, `ddim_eta0p5`
fn eta(rule: &str) -> Option<f64> {
    let rest = rule.strip_prefix("ddim")?;
    match rest.strip_prefix("_eta") {
        Some(number) => number.replace('p', ".").parse().ok(),
        None => rest.is_empty().then_some(0.0),
    }
}

/// Levels between those of a variance-preserving grid do not depend on the rates.
fn preserving(grid: &Grid) -> Option<VpSde> {
    let holds = |l: &Level| (l.alpha.hypot(l.sigma) - 1.0).abs() < 1e-9;
    // Steep enough to reach any of them.
    let steepest = VpSde {
        beta_min: 0.1,
        beta_max: 400.0,
    };
    grid.levels().iter().all(holds).then_some(steepest)
}
