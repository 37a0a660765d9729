//! The reference of `convex-relu`: patterns, ADMM states, optima, the sampled and the adversarial
//! program.

use super::{number, prefixes};
use crate::relu::{
    adversarial_patterns, AdmmConfig, AdmmRelu, AdversarialConfig, AdversarialRelu, ConvexLoss,
    ConvexReluModel, Patterns, ScpConfig, ScpRelu, ScpSolver,
};
use crate::Result;
use candle_core::{DType, Module, Tensor};
use tensor_core::verify::{Reference, Tolerance};

/// Checks everything in the file, for each prefix before `X`.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn convex_relu(reference: &mut Reference) -> Result<()> {
    for case in prefixes(reference, "X") {
        let file = Case::new(reference, &case)?;
        file.patterns(reference)?;
        file.admm(reference)?;
        file.optimum(reference)?;
        file.sampled(reference)?;
        file.adversarial(reference)?;
    }
    Ok(())
}

/// The inputs that all parts share.
struct Case {
    case: String,
    x: Tensor,
    y: Tensor,
    directions: Tensor,
    patterns: Patterns,
    beta: f64,
}

impl Case {
    fn new(reference: &mut Reference, case: &str) -> Result<Self> {
        let mut input = |name: &str| -> Result<Tensor> {
            Ok(reference
                .input(&format!("{case}{name}"))?
                .tensor(DType::F64)?)
        };
        let (x, y, directions) = (input("X")?, input("y")?, input("a")?);
        Ok(Self {
            patterns: Patterns::from_directions(&x, &directions)?,
            beta: number(reference, case, "beta")?,
            case: case.to_string(),
            x,
            y,
            directions,
        })
    }

    fn name(&self, part: &str) -> String {
        format!("{}{part}", self.case)
    }

    fn patterns(&self, reference: &mut Reference) -> Result<()> {
        let kept: Vec<f64> = self.patterns.kept().iter().map(|&i| i as f64).collect();
        reference.compare(&self.name("keep"), &kept, Tolerance::Mismatches(0))?;
        let bits = self.patterns.bits();
        Ok(reference.compare(&self.name("D"), &bits, Tolerance::Mismatches(0))?)
    }

    /// The last iteration whose state the file has.
    fn last_state(&self, reference: &Reference) -> usize {
        let before = self.name("admm_");
        let names = reference.names();
        let numbers = names.iter().filter_map(|name| {
            let (_, t) = name.strip_prefix(&before)?.rsplit_once('_')?;
            t.parse().ok()
        });
        numbers.max().unwrap_or(0)
    }

    fn admm(&self, reference: &mut Reference) -> Result<()> {
        let config = AdmmConfig {
            beta: self.beta,
            rho: number(reference, &self.case, "rho")?,
            gamma_a: number(reference, &self.case, "gamma_a")?,
            ..AdmmConfig::default()
        };
        let solver = AdmmRelu::new(config)?;
        let mut run = solver.start(&self.x, &self.y, &self.patterns)?;
        let hist = self.name("admm_hist");
        let stored = match reference.has(&hist) {
            true => Some(reference.expected(&hist)?.values.clone()),
            false => None,
        };
        let steps = match &stored {
            Some(stored) => stored.len() / 4,
            None => self.last_state(reference),
        };
        let mut found = Vec::new();
        for t in 1..=steps {
            run.step()?;
            found.extend(run.progress());
            let state = run.state();
            let parts = [
                ("u", &state.u),
                ("v", &state.v),
                ("s", &state.s),
                ("lam", &state.lambda),
                ("nu", &state.nu),
            ];
            for (part, values) in parts {
                let name = self.name(&format!("admm_{part}_{t}"));
                if reference.has(&name) {
                    reference.compare(&name, values, Tolerance::Mixed(1e-9))?;
                }
            }
        }
        // The first rows more sharply, then all.
        if let Some(stored) = stored {
            let mut sharp = found.clone();
            let first = 50.min(steps) * 4;
            sharp[first..].copy_from_slice(&stored[first..steps * 4]);
            reference.compare(&hist, &sharp, Tolerance::Mixed(1e-8))?;
            reference.compare(&hist, &found, Tolerance::Mixed(1e-6))?;
        }
        // In the end the method is at the optimum.
        while run.state().iterations < 50_000 {
            run.step()?;
            let [_, primal, slack, _] = run.progress();
            if primal.max(slack) < 1e-9 {
                break;
            }
        }
        if !reference.has(&self.name("cvx_opt")) {
            return Ok(());
        }
        let model = run.model();
        let optimum = Tolerance::Mixed(1e-6);
        reference.compare(&self.name("cvx_opt"), &[model.objective], optimum)?;
        // The bound from the multipliers proves it without the file.
        let bound = model.objective - model.gap;
        Ok(reference.compare(&self.name("cvx_opt"), &[bound], Tolerance::Mixed(1e-5))?)
    }

    /// Units are not unique: their outputs, by the program's gates.
    fn compare_units(
        &self,
        reference: &mut Reference,
        model: &ConvexReluModel,
        (v, w): (&str, &str),
    ) -> Result<()> {
        let (v, w) = (self.name(v), self.name(w));
        if !reference.has(&v) || !reference.has(&w) {
            return Ok(());
        }
        let d = self.x.dims()[1];
        let stored = (
            reference.expected(&v)?.values.clone(),
            reference.expected(&w)?.values.clone(),
        );
        let x: Vec<f64> = self.x.flatten_all()?.to_vec1()?;
        let bits = model.patterns().bits();
        let p = model.patterns().len();
        let outputs = |v: &[f64], w: &[f64]| -> Vec<f64> {
            x.chunks(d)
                .zip(bits.chunks(p))
                .map(|(row, bits)| {
                    let score = |u: &[f64]| crate::linalg::dot(row, u);
                    let units = v.chunks(d).zip(w.chunks(d)).zip(bits);
                    units.map(|((v, w), b)| b * (score(v) - score(w))).sum()
                })
                .collect()
        };
        let found = outputs(&model.v, &model.w);
        let wanted = outputs(&stored.0, &stored.1);
        let same = found.len() == wanted.len()
            && found
                .iter()
                .zip(&wanted)
                .all(|(a, b)| (a - b).abs() <= 1e-4 * b.abs().max(1.0));
        for (name, stored) in [(v, stored.0), (w, stored.1)] {
            let verdict = if same { stored } else { vec![] };
            reference.compare(&name, &verdict, Tolerance::Mismatches(0))?;
        }
        Ok(())
    }

    fn optimum(&self, reference: &mut Reference) -> Result<()> {
        let solver = self.solver(ConvexLoss::Squared, 0.0, self.beta)?;
        let model = solver.fit(&self.x, &self.y, &self.patterns)?;
        if reference.has(&self.name("cvx_opt")) {
            let optimum = Tolerance::Mixed(1e-6);
            reference.compare(&self.name("cvx_opt"), &[model.objective], optimum)?;
        }
        self.compare_units(reference, &model, ("cvx_v", "cvx_w"))
    }

    fn solver(&self, loss: ConvexLoss, eps: f64, beta: f64) -> Result<AdversarialRelu> {
        AdversarialRelu::new(AdversarialConfig {
            eps,
            beta,
            loss,
            ..AdversarialConfig::default()
        })
    }

    fn sampled(&self, reference: &mut Reference) -> Result<()> {
        if !reference.has(&self.name("scp_u")) {
            return Ok(());
        }
        let units = reference.input(&self.name("scp_u"))?.tensor(DType::F64)?;
        let phi = self.x.matmul(&units.t()?)?.relu()?;
        let stored = reference
            .expected(&self.name("scp_alpha"))?
            .tensor(DType::F64)?;
        for solver in [ScpSolver::Fista, ScpSolver::CoordinateDescent] {
            let config = ScpConfig {
                beta: self.beta,
                solver,
                max_iter: 200_000,
                ..ScpConfig::default()
            };
            let model = ScpRelu::new(config)?.fit_units(&self.x, &self.y, &units)?;
            let name = self.name("scp_opt");
            reference.compare(&name, &[model.objective], Tolerance::Mixed(1e-8))?;
            // Weights are not unique; outputs are.
            let found = model.network.forward(&self.x)?;
            let wanted = phi.matmul(&stored.unsqueeze(1)?)?.squeeze(1)?;
            let gap = (found - wanted)?.abs()?.max(0)?.to_scalar::<f64>()?;
            let alpha: Vec<f64> = stored.to_vec1()?;
            let verdict = if gap <= 1e-5 { alpha } else { vec![] };
            let name = self.name("scp_alpha");
            reference.compare(&name, &verdict, Tolerance::Mismatches(0))?;
        }
        Ok(())
    }

    fn adversarial(&self, reference: &mut Reference) -> Result<()> {
        let labels = self.name("y_sign");
        if !reference.has(&self.name("adv_R")) {
            // The labels are an input of this part alone.
            if reference.has(&labels) {
                reference.input(&labels)?;
            }
            return Ok(());
        }
        let signs = reference.input(&self.name("adv_R"))?.tensor(DType::F64)?;
        let labels = reference.input(&labels)?.tensor(DType::F64)?;
        let eps = number(reference, &self.case, "eps")?;
        let with_labels = number(reference, &self.case, "beta_hinge_bce")?;
        let patterns = adversarial_patterns(&self.x, &self.directions, &signs, eps)?;
        let bits = patterns.bits();
        reference.compare(&self.name("adv_D"), &bits, Tolerance::Mismatches(0))?;
        let losses = [
            ("hinge", ConvexLoss::Hinge, with_labels, &labels),
            ("bce", ConvexLoss::Logistic, with_labels, &labels),
            ("sq", ConvexLoss::Squared, self.beta, &self.y),
        ];
        for (tag, loss, beta, y) in losses {
            let name = self.name(&format!("adv_{tag}_opt"));
            if !reference.has(&name) {
                continue;
            }
            let solver = self.solver(loss, eps, beta)?;
            let model = solver.fit(&self.x, y, &patterns)?;
            let tolerance = Tolerance::Mixed(1e-5);
            reference.compare(&name, &[model.objective], tolerance)?;
            // The solver's dual bound.
            let bound = model.objective - model.gap;
            reference.compare(&name, &[bound], tolerance)?;
            self.as_good(reference, &solver, tag, y, &patterns)?;
        }
        Ok(())
    }

    /// Stored units where others are as good: ours may differ, but theirs must have the stored optimum
    /// by our objective and keep our constraints.
    fn as_good(
        &self,
        reference: &mut Reference,
        solver: &AdversarialRelu,
        tag: &str,
        y: &Tensor,
        patterns: &Patterns,
    ) -> Result<()> {
        let name = |part: &str| self.name(&format!("adv_{tag}_{part}"));
        let stored = |part: &str| -> Result<Vec<f64>> {
            Ok(reference.expected(&name(part))?.values.clone())
        };
        let (v, w, optimum) = (stored("v")?, stored("w")?, stored("opt")?);
        let count = patterns.len() * self.x.dims()[1];
        let fits = v.len() == count && w.len() == count && optimum.len() == 1;
        let good = fits && {
            let (value, violation) = solver.evaluate(&self.x, y, patterns, &v, &w)?;
            (value - optimum[0]).abs() <= 1e-5 * optimum[0].abs().max(1.0) && violation <= 1e-5
        };
        for (part, values) in [("v", v), ("w", w)] {
            let verdict = if good { values } else { vec![] };
            reference.compare(&name(part), &verdict, Tolerance::Mismatches(0))?;
        }
        Ok(())
    }
}
