//! The reference of `sso`: runs of the authors' classes on linear models, and the surrogates.

use super::{bad, rows};
use crate::sso::{
    surrogate_kl, surrogate_squared, Adaptive, ArmijoGd, ArmijoGdConfig, ArmijoTarget,
    AutogradLoss, Normalization, Sso, SsoConfig,
};
use crate::Result;
use candle_core::{DType, Tensor, Var, D};
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-9);

/// Checks every run (a prefix with `.W0`) and the surrogates (a prefix with `.surrogate_sq`).
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn sso(reference: &mut Reference) -> Result<()> {
    for case in reference.cases(".W0") {
        run(reference, &case)?;
    }
    for case in reference.cases(".surrogate_sq") {
        paper(reference, &case)?;
    }
    Ok(())
}

/// Which variant a run is, from its name.
struct Variant {
    squared_loss: bool,
    search: bool,
    adaptive: Adaptive,
    eta: f64,
}

impl Variant {
    fn of(reference: &Reference, case: &str) -> Result<Self> {
        let kind = case.trim_end_matches(|c: char| c.is_ascii_digit() || c == '_');
        let search = kind.starts_with("sls");
        let adaptive = if kind.starts_with("ada") {
            Adaptive::Scalar
        } else {
            Adaptive::None
        };
        // A run's own step size, or that of the run whose loss it shares.
        let own = format!("eta_{case}");
        let of_kind = format!("eta_{kind}");
        let shared = if search { "eta_ce" } else { "" };
        let key = [own.as_str(), of_kind.as_str(), shared]
            .into_iter()
            .find(|key| reference.metadata().contains_key(*key))
            .ok_or_else(|| bad(reference, format!("metadata `{own}` is missing")))?;
        Ok(Self {
            squared_loss: reference.expected(&format!("{case}.y"))?.shape.len() == 2,
            search,
            adaptive,
            eta: reference.number(key)?,
        })
    }
}

/// `sum_i` of the squared error, or of the cross entropy.
fn loss(z: &Tensor, y: &Tensor, squared: bool) -> candle_core::Result<Tensor> {
    if squared {
        return (z - y)?.sqr()?.sum_all();
    }
    let shifted = z.broadcast_sub(&z.detach().max_keepdim(D::Minus1)?)?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    let log_p = shifted.broadcast_sub(&log_sum)?;
    log_p.gather(&y.unsqueeze(1)?, 1)?.sum_all()?.neg()
}

fn run(reference: &mut Reference, case: &str) -> Result<()> {
    let variant = Variant::of(reference, case)?;
    let name = |part: &str| format!("{case}.{part}");
    let x = reference.input(&name("X"))?.tensor(DType::F64)?;
    let label_dtype = if variant.squared_loss {
        DType::F64
    } else {
        DType::U32
    };
    let y = reference.input(&name("y"))?.tensor(label_dtype)?;
    let w = Var::from_tensor(&reference.input(&name("W0"))?.tensor(DType::F64)?)?;
    let b = Var::from_tensor(&reference.input(&name("b0"))?.tensor(DType::F64)?)?;
    let (c, shrink, expand): (f64, f64, f64) = (
        reference.number("c")?,
        reference.number("beta")?,
        reference.number("expand")?,
    );
    let inner = ArmijoGdConfig {
        init: reference.number("init_step")?,
        c,
        shrink,
        expand,
        batches_per_epoch: reference.number("n_batches_per_epoch")?,
        ..ArmijoGdConfig::default()
    };
    let config = SsoConfig {
        step_size: 1.0 / variant.eta,
        inner_steps: reference.number("m")?,
        normalization: Normalization::Official,
        adaptive: variant.adaptive,
        target_search: variant.search.then(|| ArmijoTarget {
            c,
            shrink,
            expand,
            ..ArmijoTarget::default()
        }),
        ..SsoConfig::default()
    };
    let vars = vec![w.clone(), b.clone()];
    let mut sso = Sso::new(vars.clone(), config, ArmijoGd::new(vars, inner)?)?;

    let batches = rows(&reference.input(&name("batch_idx"))?)?;
    let mut found: [Vec<f64>; 5] = Default::default();
    for batch in &batches {
        let chosen = batch.tensor(DType::U32)?;
        let (x, y) = (x.index_select(&chosen, 0)?, y.index_select(&chosen, 0)?);
        let model = || x.matmul(&w.t()?)?.broadcast_add(&b);
        let oracle = AutogradLoss::new(|z: &Tensor| loss(z, &y, variant.squared_loss));
        let report = sso.step(&model, &oracle)?;
        found[0].extend(w.flatten_all()?.to_vec1::<f64>()?);
        found[1].extend(b.flatten_all()?.to_vec1::<f64>()?);
        found[2].push(report.last_inner_step.unwrap_or(f64::NAN));
        found[3].push(report.surrogate.last().copied().unwrap_or(f64::NAN));
        found[4].push(1.0 / report.eta);
    }
    let parts = ["W", "b", "inner_step", "surrogate_last", "eta"];
    for (part, values) in parts.into_iter().zip(&found) {
        reference.compare(&name(part), values, TOLERANCE)?;
    }
    Ok(())
}

fn paper(reference: &mut Reference, case: &str) -> Result<()> {
    let eta: f64 = reference.number(&format!("{case}_eta"))?;
    let f = Var::from_tensor(&reference.input(&format!("{case}.f"))?.tensor(DType::F64)?)?;
    let f_t = reference
        .input(&format!("{case}.f_t"))?
        .tensor(DType::F64)?;
    let g = reference.input(&format!("{case}.g"))?.tensor(DType::F64)?;
    let squared = surrogate_squared(&f, &f_t, &g, eta)?;
    let value = squared.to_scalar::<f64>()?;
    reference.compare(&format!("{case}.surrogate_sq"), &[value], TOLERANCE)?;
    let grads = squared.backward()?;
    let grad = grads
        .get(&f)
        .ok_or_else(|| bad(reference, "the surrogate gives no gradient"))?;
    reference.compare_tensor(&format!("{case}.grad_sq"), grad, TOLERANCE)?;
    let kl = surrogate_kl(&f, &f_t, &g, eta)?.to_scalar::<f64>()?;
    reference.compare(&format!("{case}.surrogate_kl"), &[kl], TOLERANCE)?;
    Ok(())
}
