//! The reference of plug-and-play guidance: adapters, the transfer loss with its gradients, the
//! guidance, the routes.

use crate::basic::log_prob_gradient;
use crate::ppap::{Ranges, TransferLoss};
use crate::Result;
use candle_core::{Module, Tensor, Var};
use candle_nn::Conv2dConfig;
use flows::verify::{input, values};
use flows::{Condition, Denoised, Level, Levels};
use nn::conv::Conv2d;
use nn::linear::Linear;
use nn::lora::{delta_weight, LoraConv2d};
use nn::softmax::log_softmax;
use tensor_core::random::RandomStream;
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-10);

/// Checks all parts of the file.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn ppap(reference: &mut Reference) -> Result<()> {
    network(reference)?;
    linear(reference)?;
    routes(reference)
}

/// The convolution of the file with its adapter and a bias that is trained too, and a head.
struct Net {
    conv: LoraConv2d,
    bias: Var,
    head: Linear,
}

impl Net {
    fn classify(&self, features: &Tensor) -> Result<Tensor> {
        let pooled = features.relu()?.mean((2, 3))?;
        Ok(self.head.forward(&pooled)?)
    }

    /// The adapted convolution, with the bias in the graph.
    fn features(&self, x: &Tensor) -> Result<Tensor> {
        let bias = self.bias.as_tensor().reshape((1, (), 1, 1))?;
        Ok(self.conv.forward(x)?.broadcast_add(&bias)?)
    }
}

fn network(reference: &mut Reference) -> Result<()> {
    let (x0, noise) = (input(reference, "x0")?, input(reference, "noise")?);
    let level = |abar: &f64| Level::new(abar.sqrt(), (1.0 - abar).sqrt(), 0.0);
    let abars = reference.input("alpha_bar")?.values;
    let levels = Levels::PerRow(abars.iter().map(level).collect::<flows::Result<_>>()?);
    let xt = flows::level::mix(&x0, &noise, &levels)?;
    reference.compare_tensor("xt", &xt, TOLERANCE)?;

    let config = Conv2dConfig {
        padding: reference.number("padding")?,
        stride: reference.number("stride")?,
        ..Conv2dConfig::default()
    };
    let (weight, bias) = (
        input(reference, "conv_weight")?,
        input(reference, "conv_bias")?,
    );
    let (rank, alpha) = (
        reference.number("conv_rank")?,
        reference.number("conv_alpha")?,
    );
    let base = Conv2d::new(weight.clone(), None, config);
    let net = Net {
        conv: LoraConv2d::new(base.clone(), rank, alpha, &mut RandomStream::new(0))?,
        bias: Var::from_tensor(&bias)?,
        head: Linear::new(
            input(reference, "head_weight")?,
            Some(input(reference, "head_bias")?),
        ),
    };
    let [a, b] = net.conv.factors();
    a.set(&input(reference, "conv_lora_a")?)?;
    b.set(&input(reference, "conv_lora_b")?)?;

    let features = net.features(&xt)?;
    reference.compare_tensor("conv_out", &features, TOLERANCE)?;
    let merged = net.conv.merge()?;
    reference.compare_tensor("conv_weight_merged", merged.weight(), TOLERANCE)?;
    let student = net.classify(&features)?;
    reference.compare_tensor("student_logits", &student, TOLERANCE)?;
    let plain = base
        .forward(&x0)?
        .broadcast_add(&bias.reshape((1, (), 1, 1))?)?;
    let teacher = net.classify(&plain)?;
    reference.compare_tensor("teacher_logits", &teacher, TOLERANCE)?;

    let loss = TransferLoss::KlLogits {
        tau: reference.number("tau")?,
        reduction: Default::default(),
    };
    let per_sample = loss.per_sample(&teacher, &student)?;
    reference.compare_tensor("kd_per_sample", &per_sample, TOLERANCE)?;
    let mean = per_sample.mean_all()?;
    reference.compare("kd_loss", &values(&mean)?, TOLERANCE)?;
    let grads = mean.backward()?;
    for (name, var) in [
        ("grad_lora_a", a),
        ("grad_lora_b", b),
        ("grad_conv_bias", &net.bias),
    ] {
        let found = grads.get(var).map_or(Ok(Vec::new()), values)?;
        reference.compare(name, &found, TOLERANCE)?;
    }
    guidance(reference, &net, &xt, &levels)
}

fn guidance(reference: &mut Reference, net: &Net, xt: &Tensor, levels: &Levels) -> Result<()> {
    let wanted = flows::verify::classes(reference, "label")?;
    let scale: f64 = reference.number("guidance_scale")?;
    let guide = |x: &Tensor, _: &Level, wanted: &Condition| -> flows::Result<Tensor> {
        let logits = net.classify(&net.features(x)?)?;
        let Condition::Class(classes) = wanted else {
            return Err(crate::Error::unsupported("this condition", "take classes").into());
        };
        let log_p = log_softmax(&logits, 1)?;
        Ok(log_p.gather(&classes.unsqueeze(1)?, 1)?.squeeze(1)?)
    };
    // The guide does not look at the level.
    let any = Level::new(1.0, 1.0, 0.0)?;
    let g = log_prob_gradient(&guide, xt, &any, &wanted)?;
    reference.compare_tensor("guidance_grad", &g.affine(scale, 0.0)?, TOLERANCE)?;
    // eps - sigma s g, through the clean sample as the rule does it, row by row at its level.
    let eps = input(reference, "eps")?;
    let d = Denoised::from_raw(&eps, flows::Prediction::Eps, xt, levels)?;
    let moved = levels.scale(&g, |l| scale * l.sigma.powi(2) / l.alpha)?;
    let guided = d.with_x0((&d.x0 + moved)?).eps()?;
    Ok(reference.compare_tensor("eps_guided", &guided, TOLERANCE)?)
}

fn linear(reference: &mut Reference) -> Result<()> {
    let x = input(reference, "lin_in")?;
    let (weight, bias) = (
        input(reference, "lin_weight")?,
        input(reference, "lin_bias")?,
    );
    let (a, b) = (
        input(reference, "lin_lora_a")?,
        input(reference, "lin_lora_b")?,
    );
    let (rank, alpha) = (
        reference.number::<usize>("linear_rank")?,
        reference.number::<f64>("linear_alpha")?,
    );
    // The authors' layer leaves the scale out: adapters of theirs have alpha = rank.
    for (name, alpha) in [
        ("lin_out", alpha),
        ("lin_out_official_unmerged", rank as f64),
    ] {
        let full = (&weight + delta_weight(weight.dims(), &a, &b, rank, alpha)?)?;
        let out = Linear::new(full, Some(bias.clone())).forward(&x)?;
        reference.compare_tensor(name, &out, TOLERANCE)?;
    }
    Ok(())
}

fn routes(reference: &mut Reference) -> Result<()> {
    let ranges = Ranges::new(
        reference.number("n_experts")?,
        reference.number("num_timesteps")?,
    )?;
    let steps = reference.input("expert_t")?.indices()?;
    let all = |route: &dyn Fn(usize) -> Result<usize>| -> Result<Vec<f64>> {
        steps
            .iter()
            .map(|t| Ok(route(*t as usize)? as f64))
            .collect()
    };
    let exact = Tolerance::Mismatches(0);
    let ours = all(&|t| ranges.route(t))?;
    reference.compare("expert_index", &ours, exact)?;
    let official = all(&|t| ranges.route_inclusive(t))?;
    Ok(reference.compare("expert_index_official", &official, exact)?)
}
