//! The reference of adaptive guidance: cosines, early ends, fitted combinations, the search's loss.

use crate::adaptive::policy::{options, Choice, PolicySearch, SoftPolicy};
use crate::adaptive::{AdaptiveGuidance, LinearAgFitter, StepKind};
use crate::{Result, Space};
use candle_core::{DType, Tensor, Var};
use flows::verify::{bad, classes, grid, input, mixture, values};
use flows::{AnalyticMixture, Condition, Denoiser, Grid, Noise, RandomStream, Sampled, Sampler};
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-10);

struct Setup {
    mixture: AnalyticMixture,
    grid: Grid,
    start: Tensor,
    condition: Condition,
    w: f64,
}

impl Setup {
    fn sampler(&self) -> Sampler<'_> {
        Sampler::new(&self.mixture, self.grid.clone()).record(true)
    }

    fn run(&self, rule: &mut AdaptiveGuidance) -> Result<Sampled> {
        let noise = Noise::given(vec![]);
        let mut sampler = self.sampler().guidance(rule);
        Ok(sampler.sample_from(&self.start, &self.condition, None, noise)?)
    }
}

/// Checks runs, fits and the search's loss.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn adaptive_guidance(reference: &mut Reference) -> Result<()> {
    let setup = Setup {
        mixture: mixture(reference, "mix_var")?,
        grid: grid(reference)?,
        start: input(reference, "z")?,
        condition: classes(reference, "c")?,
        w: reference.number("w")?,
    };
    guided(reference, &setup)?;
    for (name, space) in [("x0", Space::X0), ("eps", Space::Eps)] {
        early_end(reference, &setup, name, space)?;
    }
    linear(reference, &setup)?;
    match reference.has("nas_logits") {
        true => search(reference, &setup),
        false => Ok(()),
    }
}

fn guided(reference: &mut Reference, setup: &Setup) -> Result<()> {
    for (name, space) in [("x0", Space::X0), ("eps", Space::Eps)] {
        let mut rule = AdaptiveGuidance::new(setup.w).threshold(2.0).space(space);
        let out = setup.run(&mut rule)?;
        let cosines = rule.trace().iter().flat_map(|s| s.cosine.iter().flatten());
        let cosines: Vec<f64> = cosines.copied().collect();
        reference.compare(&format!("cfg_cos_{name}"), &cosines, TOLERANCE)?;
        let states = out.trace.unwrap_or_default().x;
        reference.compare_tensor("cfg_x", &Tensor::stack(&states, 0)?, TOLERANCE)?;
        let conditions = [
            ("cfg_eps_cond", &setup.condition),
            ("cfg_eps_uncond", &Condition::Null),
        ];
        for (tensor, condition) in conditions {
            let mut found = Vec::new();
            for (x, level) in states
                .iter()
                .zip(setup.grid.levels())
                .take(setup.grid.steps())
            {
                let d = setup.mixture.denoise(x, &(*level).into(), condition)?;
                found.push(d.eps()?);
            }
            reference.compare_tensor(tensor, &Tensor::stack(&found, 0)?, TOLERANCE)?;
        }
    }
    Ok(())
}

fn early_end(reference: &mut Reference, setup: &Setup, name: &str, space: Space) -> Result<()> {
    let threshold = reference.number(&format!("gamma_bar_{name}"))?;
    let mut rule = AdaptiveGuidance::new(setup.w)
        .threshold(threshold)
        .space(space);
    let out = setup.run(&mut rule)?;
    let rows = setup.start.dims()[0];
    let (mut active, mut nfe) = (Vec::new(), vec![0.0; rows]);
    for step in rule.trace() {
        for (count, on) in nfe.iter_mut().zip(&step.active) {
            active.push(f64::from(u8::from(*on)));
            *count += 1.0 + f64::from(u8::from(*on));
        }
    }
    let exact = Tolerance::Mismatches(0);
    reference.compare(&format!("ag_{name}_active"), &active, exact)?;
    reference.compare(&format!("ag_{name}_nfe"), &nfe, exact)?;
    reference.compare_tensor(&format!("ag_{name}_final"), &out.x, TOLERANCE)?;
    if out.nfe.main as f64 != nfe.iter().sum::<f64>() {
        let reason = format!("the sampler counted {} evaluations", out.nfe.main);
        return Err(bad(reference, reason).into());
    }
    Ok(())
}

fn linear(reference: &mut Reference, setup: &Setup) -> Result<()> {
    let kinds: Option<Vec<StepKind>> = reference
        .text("kinds")?
        .split(',')
        .map(|k| StepKind::parse(k.trim()))
        .collect();
    let kinds = kinds.ok_or_else(|| bad(reference, "metadata `kinds` has an unknown kind"))?;
    let fitter = LinearAgFitter {
        ridge: reference.number("ridge")?,
        ..LinearAgFitter::new(setup.w, kinds)
    };
    // The sampler scales noise to the first level; the file gives the state itself.
    let sigma = setup.grid.levels()[0].sigma;
    let noise = input(reference, "fit_z")?.affine(1.0 / sigma, 0.0)?;
    let condition = classes(reference, "fit_c")?;
    let rng = RandomStream::new(0);
    let mut rule = fitter.fit(setup.sampler(), &noise, &condition, None, &rng)?;
    for (i, coef) in rule.coef().to_vec().iter().enumerate() {
        if let Some(coef) = coef {
            let name = format!("lag_coef_{i}");
            reference.compare(&name, &coef.weights, Tolerance::Mixed(1e-5))?;
        }
    }
    let out = setup.sampler().guidance(&mut rule).sample_from(
        &setup.start,
        &setup.condition,
        None,
        Noise::given(vec![]),
    )?;
    reference.compare_tensor("lag_final", &out.x, Tolerance::Mixed(1e-7))?;
    let wanted = match reference.metadata().contains_key("lag_nfe") {
        true => reference.number("lag_nfe")?,
        false => rule.nfe(),
    };
    if out.nfe.main != wanted * setup.start.dims()[0] || rule.nfe() != wanted {
        let reason = format!(
            "{} evaluations per sample, `lag_nfe` says {wanted}",
            rule.nfe()
        );
        return Err(bad(reference, reason).into());
    }
    Ok(())
}

/// "uncond,cond,cfg(w/2),cfg(w),cfg(2w)" with "1,1,2,2,2".
fn choices(reference: &Reference, w: f64) -> Result<Vec<Choice>> {
    if !reference.metadata().contains_key("nas_options") {
        return Ok(options(w));
    }
    let names = reference.text("nas_options")?.split(',');
    let costs = reference.text("nas_cost")?.split(',');
    let one = |(name, cost): (&str, &str)| {
        let inner = |s: &str| -> Option<f64> {
            let s = s.strip_prefix("cfg(")?.strip_suffix(')')?;
            match s.split_once('/') {
                Some(("w", divisor)) => Some(w / divisor.parse::<f64>().ok()?),
                Some(_) => None,
                None if s == "w" => Some(w),
                None => Some(s.strip_suffix('w')?.parse::<f64>().ok()? * w),
            }
        };
        let scale = match name.trim() {
            "uncond" => Some(0.0),
            "cond" => Some(1.0),
            other => inner(other),
        };
        Some(Choice {
            scale: scale?,
            cost: cost.trim().parse().ok()?,
        })
    };
    let found: Option<Vec<Choice>> = names.zip(costs).map(one).collect();
    found.ok_or_else(|| bad(reference, "`nas_options` or `nas_cost` has another form").into())
}

fn search(reference: &mut Reference, setup: &Setup) -> Result<()> {
    let options = choices(reference, setup.w)?;
    let logits = Var::from_tensor(&reference.input("nas_logits")?.tensor(DType::F64)?)?;
    let mut soft = SoftPolicy {
        logits: logits.as_tensor().clone(),
        tau: reference.number("nas_tau")?,
        options: options.clone(),
    };
    let settings = PolicySearch {
        options,
        lambda: reference.number("nas_lambda")?,
        ..PolicySearch::new(setup.w)
    };
    let target = setup
        .run(&mut AdaptiveGuidance::new(setup.w).threshold(2.0))?
        .x;
    let noise = setup
        .start
        .affine(1.0 / setup.grid.levels()[0].sigma, 0.0)?;
    let sampler = Sampler::new(&setup.mixture, setup.grid.clone());
    let conditions = (&setup.condition, None);
    let (loss, x) = settings.loss(&mut soft, sampler, &noise, conditions, &target)?;
    let near = Tolerance::Mixed(1e-9);
    reference.compare_tensor("nas_x0", &x, near)?;
    reference.compare("nas_loss", &values(&loss)?, near)?;
    let grads = loss.backward()?;
    let grad = grads.get(&logits).map_or(Ok(Vec::new()), values)?;
    Ok(reference.compare("nas_grad", &grad, near)?)
}
