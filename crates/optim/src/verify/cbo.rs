//! The reference of `cbo`: the dynamics on given noise, and the test functions.

use super::bad;
use crate::consensus::test_functions::{ackley, grand_canyon, rastrigin, w_shaped};
use crate::consensus::{
    consensus_point, Acceptance, BatchUpdate, Batching, Cbo, CboConfig, ConsensusHopping,
    Diffusion, GradientDrift, Memory, Objective, PerParticle, Purpose, Tape,
};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-10);

/// Checks the test functions (`E_*`, `G_*`, `canyon_*`), consensus points (`consensus*`), the
/// dynamics (`cons_*`, `V_*`, `final_*`), those with memory (`X_mem*`, `Y_mem*`), consensus hopping
/// (`ch_*`) and the machine-learning mode (`ml_*`).
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn cbo(reference: &mut Reference) -> Result<()> {
    let v0 = tensor(reference, "V0")?;
    for name in reference.names() {
        if let Some(kind) = name.strip_prefix("E_") {
            energies(reference, kind, &v0)?;
        } else if let Some(kind) = name.strip_prefix("canyon_").filter(|k| *k != "pts") {
            let points = tensor(reference, "canyon_pts")?;
            let energies = grand_canyon(kind == "noisy").values(&points)?;
            reference.compare_tensor(&name, &energies, TOLERANCE)?;
        } else if let Some(rest) = name.strip_prefix("consensus") {
            let alpha: f64 = match rest.strip_prefix("_alpha") {
                Some(text) => text
                    .parse()
                    .map_err(|_| bad(reference, format!("`{name}` does not end in a number")))?,
                None => reference.number("alpha")?,
            };
            let energies = rastrigin().values(&v0)?;
            let point = consensus_point(&v0, &energies, alpha)?;
            reference.compare_tensor(&name, &point, TOLERANCE)?;
        } else if let Some(kind) = name.strip_prefix("cons_") {
            dynamics(reference, kind, &v0)?;
        } else if let Some(kind) = name.strip_prefix("X_mem") {
            with_memory(reference, kind, &v0)?;
        } else if let Some(update) = name.strip_prefix("ml_V_") {
            machine_learning(reference, update, &v0)?;
        } else if name == "ch_traj" {
            hopping(reference)?;
        }
    }
    Ok(())
}

fn tensor(reference: &mut Reference, name: &str) -> Result<Tensor> {
    Ok(reference.input(name)?.tensor(DType::F64)?)
}

fn energies(reference: &mut Reference, kind: &str, v0: &Tensor) -> Result<()> {
    let function = match kind {
        "rastrigin" => rastrigin(),
        "ackley" => ackley(),
        "wshaped" | "w_shaped" => w_shaped(),
        _ => return Ok(()),
    };
    reference.compare_tensor(&format!("E_{kind}"), &function.values(v0)?, TOLERANCE)?;
    let name = format!("G_{kind}");
    if let (true, Some(gradients)) = (reference.has(&name), function.gradients(v0)?) {
        reference.compare_tensor(&name, &gradients, TOLERANCE)?;
    }
    Ok(())
}

/// What all runs of a file share.
fn config(reference: &Reference) -> Result<CboConfig> {
    Ok(CboConfig {
        lambda: reference.number("lam")?,
        sigma: reference.number("sigma")?,
        alpha: reference.number("alpha")?,
        dt: reference.number("dt")?,
        ..CboConfig::default()
    })
}

/// Runs as long as there is noise; gives the consensus points of the steps.
fn run(cbo: &mut Cbo<Tape>, objective: &PerParticle, noise: &Tensor) -> Result<Vec<f64>> {
    let mut points = Vec::new();
    for _ in 0..noise.dim(0)? {
        points.extend(super::values(&cbo.step(objective)?.consensus)?);
    }
    Ok(points)
}

/// A kind's name says its variant: `iso`, `aniso`, `trunc` (isotropic), `atrunc`, `grad`.
fn dynamics(reference: &mut Reference, kind: &str, v0: &Tensor) -> Result<()> {
    let noise = tensor(reference, "dB")?;
    let isotropic = kind.starts_with("iso") || kind.starts_with("trunc");
    let truncated = kind.contains("trunc");
    let config = CboConfig {
        diffusion: match isotropic {
            true => Diffusion::Isotropic,
            false => Diffusion::Anisotropic,
        },
        truncation: match truncated {
            true => Some(reference.number("M")?),
            false => None,
        },
        gradient_drift: match kind.contains("grad") {
            true => Some(GradientDrift {
                gamma: reference.number("gamma")?,
                learning_rate: reference.number("learning_rate")?,
                ..GradientDrift::default()
            }),
            false => None,
        },
        ..config(reference)?
    };
    let tape = Tape::new().with_normals(Purpose::Diffusion, &noise)?;
    let (mut cbo, objective) = (Cbo::new(v0, config, tape)?, rastrigin());
    let points = run(&mut cbo, &objective, &noise)?;
    reference.compare(&format!("cons_{kind}"), &points, TOLERANCE)?;
    reference.compare_tensor(&format!("V_{kind}"), &cbo.particles()?, TOLERANCE)?;
    let last = cbo.consensus(&objective)?;
    Ok(reference.compare_tensor(&format!("final_{kind}"), &last, TOLERANCE)?)
}

/// `H` for the Heaviside rule, anything else for the smooth one.
fn with_memory(reference: &mut Reference, kind: &str, v0: &Tensor) -> Result<()> {
    let (noise, second) = (tensor(reference, "dB")?, tensor(reference, "dB2")?);
    let memory = Memory {
        lambda2: reference.number("lambda2")?,
        sigma2: reference.number("sigma2")?,
        diffusion2: Diffusion::Anisotropic,
        kappa: reference.number("kappa")?,
        acceptance: match kind.starts_with('H') {
            true => Acceptance::Heaviside,
            false => Acceptance::Tanh(reference.number("beta")?),
        },
    };
    let config = CboConfig {
        diffusion: Diffusion::Anisotropic,
        memory: Some(memory),
        ..config(reference)?
    };
    let tape = Tape::new()
        .with_normals(Purpose::Diffusion, &noise)?
        .with_normals(Purpose::MemoryDiffusion, &second)?;
    let mut cbo = Cbo::new(v0, config, tape)?;
    run(&mut cbo, &rastrigin(), &noise)?;
    reference.compare_tensor(&format!("X_mem{kind}"), &cbo.particles()?, TOLERANCE)?;
    if let Some(memories) = cbo.memories()? {
        reference.compare_tensor(&format!("Y_mem{kind}"), &memories, TOLERANCE)?;
    }
    Ok(())
}

/// Where the clouds of such a file start.
const HOPPING_START: [f64; 2] = [8.0, 8.0];

fn hopping(reference: &mut Reference) -> Result<()> {
    let noise = tensor(reference, "ch_noise")?;
    let (moves, n, d) = noise.dims3()?;
    let hopping = ConsensusHopping {
        alpha: reference.number("alpha")?,
        sigma: reference.number("ch_sigma")?,
        n,
        sigma_decay: None,
    };
    let start: Vec<f64> = (0..d).map(|j| HOPPING_START[j % 2]).collect();
    let x0 = Tensor::from_vec(start, d, &Device::Cpu)?;
    let mut tape = Tape::new().with_normals(Purpose::Cloud, &noise)?;
    let found = hopping.run(&grand_canyon(true), &x0, moves - 1, &mut tape)?;
    Ok(reference.compare_tensor("ch_traj", &found.trajectory, TOLERANCE)?)
}

/// `E(v) = mean_j |v - data_j|^2 + 0.5 sum |v|` over one batch of data.
fn distance_to(data: &Tensor) -> Result<PerParticle> {
    let data = data.to_vec2::<f64>()?;
    Ok(PerParticle::new(move |v| {
        let square =
            |row: &Vec<f64>| -> f64 { row.iter().zip(v).map(|(a, b)| (b - a) * (b - a)).sum() };
        let mean = data.iter().map(square).sum::<f64>() / data.len() as f64;
        mean + 0.5 * v.iter().map(|x| x.abs()).sum::<f64>()
    }))
}

/// `full` or `partial` updates, two batches of particles, a kick for a consensus that stalls.
fn machine_learning(reference: &mut Reference, update: &str, v0: &Tensor) -> Result<()> {
    let data = tensor(reference, "ml_data")?;
    let noise = tensor(reference, "ml_dB")?;
    let kick = tensor(reference, "ml_kick")?;
    let mut permutations = Vec::new();
    for row in super::rows(&reference.input("ml_perm")?)? {
        permutations.push(row.indices()?);
    }
    let config = CboConfig {
        diffusion: Diffusion::Anisotropic,
        batching: Some(Batching {
            particles: v0.dim(0)?.div_ceil(noise.dim(1)?),
            update: match update {
                "full" => BatchUpdate::Full,
                _ => BatchUpdate::Partial,
            },
        }),
        stall_kick: Some(1e-5),
        ..config(reference)?
    };
    let tape = Tape::new()
        .with_normals(Purpose::Diffusion, &noise)?
        .with_normals(Purpose::Kick, &kick)?
        .with_permutations(permutations);
    let mut cbo = Cbo::new(v0, config, tape)?;
    for batch in 0..data.dim(0)? {
        cbo.step(&distance_to(&data.get(batch)?)?)?;
    }
    Ok(reference.compare_tensor(&format!("ml_V_{update}"), &cbo.particles()?, TOLERANCE)?)
}
