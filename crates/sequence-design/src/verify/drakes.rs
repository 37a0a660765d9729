//! The reference of `drakes`: masked diffusion with a small convolution, and one fine-tuning step.

use crate::masked_diffusion::{
    DiscreteDenoiser, DrakesConfig, DrakesTrainer, KlForm, MaskedDiffusion, NoiseSchedule,
    Relaxation, SampleConfig, Temperature,
};
use crate::Result;
use candle_core::{DType, Device, Module, Tensor, Var};
use candle_nn::{Conv1dConfig, Optimizer};
use nn::conv::Conv1d;
use tensor_core::verify::{Reference, Tolerance};

/// One convolution with one-hot tokens.
pub(super) struct Convolution {
    pub weight: Var,
    pub bias: Var,
}

impl Convolution {
    pub fn read(reference: &mut Reference, weight: &str, bias: &str) -> Result<Self> {
        let var = |reference: &mut Reference, name: &str| -> Result<Var> {
            Ok(Var::from_tensor(
                &reference.input(name)?.tensor(DType::F64)?,
            )?)
        };
        Ok(Self {
            weight: var(reference, weight)?,
            bias: var(reference, bias)?,
        })
    }
}

impl DiscreteDenoiser for Convolution {
    fn logits(&self, x: &Tensor, _: &Tensor, _: bool) -> Result<Tensor> {
        let padding = self.weight.dims()[2] / 2;
        let config = Conv1dConfig {
            padding,
            ..Conv1dConfig::default()
        };
        let bias = Some(self.bias.as_tensor().clone());
        let layer = Conv1d::new(self.weight.as_tensor().clone(), bias, config);
        let y = layer.forward(&x.transpose(1, 2)?.contiguous()?)?;
        Ok(y.transpose(1, 2)?.contiguous()?)
    }
}

/// The linear and the neighbor part of a reward of sequences `[B, L, K]`, `[B]` each.
pub(super) fn reward_parts(x: &Tensor, lin: &Tensor, pair: &Tensor) -> Result<(Tensor, Tensor)> {
    let (b, l, k) = x.dims3()?;
    let linear = x.broadcast_mul(lin)?.sum(2)?.sum(1)?;
    if l < 2 {
        return Ok((linear, Tensor::zeros(b, x.dtype(), x.device())?));
    }
    let left = x
        .narrow(1, 0, l - 1)?
        .contiguous()?
        .reshape((b, l - 1, 1, k))?;
    let right = x.narrow(1, 1, l - 1)?.contiguous()?;
    let mixed = left
        .broadcast_matmul(&pair.unsqueeze(0)?)?
        .reshape((b, l - 1, k))?;
    Ok((linear, (mixed * right)?.sum(2)?.sum(1)?))
}

/// The model of a file, with its schedule and times.
pub(super) fn model<D: DiscreteDenoiser>(
    reference: &Reference,
    net: D,
) -> Result<MaskedDiffusion<D>> {
    let mut model = MaskedDiffusion::new(
        net,
        reference.number("mask_index")?,
        DType::F64,
        &Device::Cpu,
    )?;
    model.schedule = NoiseSchedule::LogLinear {
        eps: reference.number("eps_noise")?,
    };
    model.clean_time = reference.number("eps_time")?;
    Ok(model)
}

/// Checks every case of the file (a prefix before `u_traj`).
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn drakes(reference: &mut Reference) -> Result<()> {
    for prefix in reference.cases("u_traj") {
        case(reference, &prefix)?;
    }
    Ok(())
}

fn case(reference: &mut Reference, prefix: &str) -> Result<()> {
    let name = |part: &str| format!("{prefix}{part}");
    let new = Convolution::read(reference, &name("conv_weight"), &name("conv_bias"))?;
    let old = Convolution::read(reference, &name("conv_old_weight"), &name("conv_old_bias"))?;
    let vars = vec![
        ("w".to_string(), new.weight.clone()),
        ("b".to_string(), new.bias.clone()),
    ];
    let mut model = model(reference, new)?;
    model.earliest_time = reference.number("sampling_eps")?;
    let mut frozen = self::model(reference, old)?;
    frozen.earliest_time = model.earliest_time;
    bound(reference, prefix, &model)?;
    likelihood(reference, prefix, &frozen)?;
    plain(reference, prefix, &model)?;

    let uniforms = reference.input(&name("u_traj"))?;
    let [_, b, l, _] = uniforms.shape[..] else {
        return Err(reference.bad("`u_traj` is not [S, B, L, K + 1]").into());
    };
    let lin = reference.input(&name("reward_lin"))?.tensor(DType::F64)?;
    let pair = reference.input(&name("reward_pair"))?.tensor(DType::F64)?;
    let reward = |x: &Tensor| -> Result<Tensor> {
        let (linear, neighbors) = reward_parts(x, &lin, &pair)?;
        Ok((linear.tanh()? + neighbors.affine(0.25, 0.0)?)?)
    };
    let temp = reference.metadata().get("copy_flag_temp");
    let copy_flag_temp = match temp.map(|t| t.trim()) {
        None | Some("None" | "none" | "null") => None,
        _ => Some(reference.number("copy_flag_temp")?),
    };
    // The authors round that sigmoid to f32.
    let wide = |tol: f64| Tolerance::Absolute(if copy_flag_temp.is_some() { 1e-7 } else { tol });
    let config = DrakesConfig {
        steps_per_traj: reference.number("num_steps")?,
        truncate_steps: reference.number("truncate_steps")?,
        gumbel_temp: Temperature::Constant(reference.number("gumbel_temp")?),
        alpha: reference.number("alpha")?,
        batch: b,
        copy_flag_temp,
        ..DrakesConfig::default()
    };
    let relaxation = Relaxation {
        steps: config.steps_per_traj,
        truncate_steps: config.truncate_steps,
        temperature: reference.number("gumbel_temp")?,
        copy_flag_temp,
    };
    states(
        reference,
        prefix,
        &model,
        (b, l),
        &relaxation,
        &uniforms.values,
        wide(1e-9),
    )?;
    let chance: Vec<f64> = model
        .schedule
        .steps(config.steps_per_traj, model.clean_time)?
        .iter()
        .map(|s| s.masked)
        .collect();
    reference.compare(&name("move_chance"), &chance, Tolerance::Absolute(1e-9))?;

    let forms = [
        ("reward_only", KlForm::None),
        ("released", KlForm::Released),
        ("path", KlForm::Path),
    ];
    for (form, kl) in forms {
        let config = DrakesConfig {
            kl,
            ..config.clone()
        };
        let sgd = candle_nn::SGD::new(vec![], 1.0)?;
        let pair = (share(&model), share(&frozen));
        let trainer = DrakesTrainer::new(pair.0, pair.1, vars.clone(), &reward, sgd, config, l)?;
        let run = trainer.trajectory_with(&uniforms.values, 0)?;
        for (part, (_, var)) in ["w", "b"].iter().zip(&vars) {
            let grad = match run.grads.get(var) {
                Some(grad) => grad.clone(),
                None => var.zeros_like()?,
            };
            reference.compare_tensor(&name(&format!("grad_{part}_{form}")), &grad, wide(1e-8))?;
        }
        if kl == KlForm::None {
            reference.compare_tensor(&name("sample_st"), &run.sequences, wide(1e-9))?;
            reference.compare(&name("reward"), &run.rewards, wide(1e-9))?;
            continue;
        }
        // The file has a row a sequence.
        let kl: Vec<f64> = (0..b)
            .flat_map(|i| run.kl.iter().map(move |step| step[i]))
            .collect();
        reference.compare(&name(&format!("kl_{form}")), &kl, wide(1e-9))?;
        reference.compare(&name(&format!("loss_{form}")), &[run.loss], wide(1e-8))?;
    }
    Ok(())
}

/// The same model over a borrowed network.
fn share<D: DiscreteDenoiser>(model: &MaskedDiffusion<D>) -> MaskedDiffusion<&D> {
    MaskedDiffusion {
        denoiser: &model.denoiser,
        vocab: model.vocab,
        schedule: model.schedule,
        time_conditioning: model.time_conditioning,
        clean_time: model.clean_time,
        earliest_time: model.earliest_time,
        dtype: model.dtype,
        device: model.device.clone(),
    }
}

fn states(
    reference: &mut Reference,
    prefix: &str,
    model: &MaskedDiffusion<Convolution>,
    (b, l): (usize, usize),
    relaxation: &Relaxation,
    uniforms: &[f64],
    tolerance: Tolerance,
) -> Result<()> {
    let mut states = model.relaxed_trajectory_with(b, l, relaxation, uniforms)?;
    states.pop();
    let hard = relaxation.steps - relaxation.truncate_steps;
    let mut copies = vec![];
    for (i, x) in states.iter().enumerate() {
        let soft = (i >= hard).then_some(relaxation);
        copies.push(model.copy_weights(x, soft)?);
    }
    reference.compare_tensor(
        &format!("{prefix}last_x"),
        &Tensor::stack(&states, 0)?,
        tolerance,
    )?;
    let copies = Tensor::stack(&copies, 0)?;
    Ok(reference.compare_tensor(&format!("{prefix}copy_flag"), &copies, tolerance)?)
}

fn bound(
    reference: &mut Reference,
    prefix: &str,
    model: &MaskedDiffusion<Convolution>,
) -> Result<()> {
    let name = |part: &str| format!("{prefix}{part}");
    let x0 = reference.input(&name("x0"))?.tensor(DType::U32)?;
    let times = reference.input(&name("u_time"))?.values;
    let masks = reference.input(&name("u_mask"))?.values;
    let nll = model.nll_with(&x0, None, &times, &masks)?;
    let near = Tolerance::Absolute(1e-9);
    reference.compare(&name("t"), &nll.times, near)?;
    reference.compare_tensor(&name("mdlm_nll"), &nll.tokens, near)?;
    Ok(reference.compare_tensor(&name("mdlm_loss"), &nll.loss, Tolerance::Absolute(1e-8))?)
}

fn likelihood(
    reference: &mut Reference,
    prefix: &str,
    frozen: &MaskedDiffusion<Convolution>,
) -> Result<()> {
    let x0 = reference
        .input(&format!("{prefix}x0"))?
        .tensor(DType::U32)?;
    let u = reference.input(&format!("{prefix}u_lik"))?;
    let found = frozen.log_likelihood_with(&x0, u.shape[0], &u.values)?;
    Ok(reference.compare(
        &format!("{prefix}loglik_old"),
        &found,
        Tolerance::Absolute(1e-9),
    )?)
}

fn plain(
    reference: &mut Reference,
    prefix: &str,
    model: &MaskedDiffusion<Convolution>,
) -> Result<()> {
    let u = reference.input(&format!("{prefix}u_plain"))?;
    let [steps, b, l, _] = u.shape[..] else {
        return Err(reference.bad("`u_plain` is not [S, B, L, K + 1]").into());
    };
    let config = SampleConfig {
        steps,
        ..SampleConfig::default()
    };
    let found = model.sample_with(b, l, &config, &u.values)?;
    let name = format!("{prefix}sample_plain");
    Ok(reference.compare_tensor(&name, &found.tokens, Tolerance::Mismatches(0))?)
}
