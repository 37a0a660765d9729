//! The guidance rules of the shared reference: the `g_*` and `interval_*` tensors.

use crate::basic::{log_prob_gradient, Unit};
use crate::{Autoguidance, Cfg, ClassifierGuidance, Interval, Rescaled, Result, Space};
use candle_core::{DType, Tensor};
use flows::guidance::{Conditions, Models, Nfe};
use flows::verify::{bad, classes, grid, input, level, mixture};
use flows::{
    AnalyticMixture, Condition, Denoised, Evaluator, Guidance, Level, Noise, Sampler, StepCx,
};
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Absolute(1e-10);

/// Checks the rules at one level, and a whole run with an interval.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn guidance_core(reference: &mut Reference) -> Result<()> {
    let main = mixture(reference, "mix_var")?;
    let weak = mixture(reference, "mix_var_weak")?;
    let condition = classes(reference, "c")?;
    let w: f64 = reference.number("w")?;
    let at = level(reference, "g_level")?;
    let x = input(reference, "g_x")?;
    let ask = One {
        main: &main,
        weak: &weak,
        condition: &condition,
        x: &x,
        level: at,
    };
    let compare = |reference: &mut Reference, name: &str, found: &Tensor| {
        reference.compare_tensor(name, found, TOLERANCE)
    };
    compare(reference, "g_cond", &ask.guide(Cfg::new(1.0))?.x0)?;
    compare(reference, "g_uncond", &ask.guide(Cfg::new(0.0))?.x0)?;
    compare(reference, "g_weak", &ask.guide(Autoguidance { w: 0.0 })?.x0)?;
    compare(reference, "g_cfg", &ask.guide(Cfg::new(w))?.x0)?;
    compare(
        reference,
        "g_autoguidance",
        &ask.guide(Autoguidance { w })?.x0,
    )?;
    let rescaled = Rescaled {
        inner: Cfg::new(w),
        phi: reference.number("rescale")?,
        space: Space::X0,
    };
    compare(reference, "g_cfg_rescaled", &ask.guide(rescaled)?.x0)?;
    let posterior =
        |x: &Tensor, level: &Level, wanted: &Condition| own_class(&main, x, level, wanted);
    let gradient = log_prob_gradient(&posterior, &x, &at, &condition)?;
    compare(reference, "g_classifier_grad", &gradient)?;
    let guided = ask.guide(ClassifierGuidance::new(posterior, w))?;
    compare(reference, "g_classifier_eps", &guided.eps()?)?;
    interval(reference, &main, &condition, w)
}

/// Log-probability of the wanted class given the noisy sample.
fn own_class(
    mixture: &AnalyticMixture,
    x: &Tensor,
    level: &Level,
    wanted: &Condition,
) -> flows::Result<Tensor> {
    let Condition::Class(classes) = wanted else {
        return Err(crate::Error::unsupported("this condition", "take classes").into());
    };
    let all = mixture.log_posterior(x, &(*level).into())?;
    Ok(all.gather(&classes.unsqueeze(1)?, 1)?.squeeze(1)?)
}

struct One<'a> {
    main: &'a AnalyticMixture,
    weak: &'a AnalyticMixture,
    condition: &'a Condition,
    x: &'a Tensor,
    level: Level,
}

impl One<'_> {
    fn guide(&self, mut rule: impl Guidance) -> Result<Denoised> {
        let models = Models {
            weak: Some(self.weak),
            ..Models::new(self.main)
        };
        let conditions = Conditions {
            positive: self.condition.clone(),
            negative: None,
            null: Condition::Null,
        };
        let cx = StepCx {
            step: 0,
            steps: 1,
            level: self.level,
            next: self.level,
            eval_index: 0,
        };
        let mut nfe = Nfe::default();
        let mut net = Evaluator::new(
            &models,
            &conditions,
            &mut nfe,
            self.x,
            self.level,
            None,
            true,
        );
        Ok(rule.guide(&cx, &mut net)?)
    }
}

/// "0.3<sigma/alpha<=2.0"
fn interval(
    reference: &mut Reference,
    main: &AnalyticMixture,
    condition: &Condition,
    w: f64,
) -> Result<()> {
    let text = reference.text("interval")?.to_string();
    let ends = text.split_once("<sigma/alpha<=").and_then(|(lo, hi)| {
        Some((
            lo.trim().parse::<f64>().ok()?,
            hi.trim().parse::<f64>().ok()?,
        ))
    });
    let Some((lo, hi)) = ends else {
        return Err(bad(reference, "metadata `interval` has another form").into());
    };
    let rule = Interval {
        inner: Cfg::new(w),
        lo,
        hi,
        unit: Unit::Rho,
    };
    let start = input(reference, "z")?;
    let out = Sampler::new(main, grid(reference)?)
        .guidance(rule)
        .sample_from(&start, condition, None, Noise::given(vec![]))?;
    reference.compare_tensor("interval_cfg_final", &out.x, TOLERANCE)?;
    let wanted: usize = reference.number("interval_nfe")?;
    let found = out.nfe.main / start.to_dtype(DType::F64)?.dims()[0];
    if found != wanted {
        let reason = format!("{found} evaluations per sample, `interval_nfe` says {wanted}");
        return Err(bad(reference, reason).into());
    }
    Ok(())
}
