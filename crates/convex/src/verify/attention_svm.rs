//! The reference of `attention-svm`: both SVMs, descent, the path, the generalized SVM.

use super::{number, prefixes};
use crate::attention_svm::{
    cosine, generalized_svm, optimal_tokens, singular_values, token_scores, AttSvm, AttentionData,
    GdParameters, GdState, HeadLoss, NormalizedGd, RegularizationPath, Selection, SvmNorm,
    SvmSolution,
};
use crate::linalg::from_rows;
use crate::Result;
use candle_core::{DType, Tensor};
use tensor_core::verify::{Reference, Tolerance};

const SAME: Tolerance = Tolerance::Mismatches(0);
/// What the official solvers of the nuclear and the generalized problem reach.
const LOOSE: Tolerance = Tolerance::Mixed(5e-5);

/// Checks everything in the file, for each prefix before `X`.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn attention_svm(reference: &mut Reference) -> Result<()> {
    for case in prefixes(reference, "X") {
        let file = Case::new(reference, &case)?;
        file.margins(reference)?;
        file.descent(reference)?;
        file.factored(reference)?;
        file.path(reference)?;
        file.generalized(reference)?;
    }
    Ok(())
}

struct Case {
    case: String,
    data: AttentionData,
    tokens: usize,
    v: Vec<f64>,
    y: Vec<f64>,
    gd: NormalizedGd,
    iters: usize,
}

fn flat(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.flatten_all()?.to_vec1()?)
}

fn ids(selection: &Selection) -> Vec<f64> {
    selection.0.iter().map(|&t| t as f64).collect()
}

fn solve(data: &AttentionData, norm: SvmNorm, selection: &Selection) -> Result<SvmSolution> {
    let solver = AttSvm {
        norm,
        ..AttSvm::default()
    };
    solver.solve(data, selection)
}

const NUCLEAR: SvmNorm = SvmNorm::Nuclear { rank_cap: None };

impl Case {
    fn new(reference: &mut Reference, case: &str) -> Result<Self> {
        let mut input = |name: &str| reference.input(&format!("{case}{name}"));
        let (x, z) = (input("X")?, input("Z")?);
        let (v, y) = (input("v")?.values, input("Y")?.values);
        Ok(Self {
            data: AttentionData::new(&x.tensor(DType::F64)?, &z.tensor(DType::F64)?, None)?,
            tokens: x.shape[1],
            v,
            y,
            gd: NormalizedGd {
                lr: number(reference, case, "lr")?,
                eps: number(reference, case, "eps")?,
                ridge: number(reference, case, "eps")?,
                loss: HeadLoss::Logistic,
            },
            iters: number(reference, case, "iters")?,
            case: case.to_string(),
        })
    }

    fn name(&self, part: &str) -> String {
        format!("{}{part}", self.case)
    }

    /// Whether the file has one of these.
    fn any(&self, reference: &Reference, parts: &[&str]) -> bool {
        parts.iter().any(|part| reference.has(&self.name(part)))
    }

    fn compare(
        &self,
        reference: &mut Reference,
        part: &str,
        found: &[f64],
        tolerance: Tolerance,
    ) -> Result<()> {
        let name = self.name(part);
        if reference.has(&name) {
            reference.compare(&name, found, tolerance)?;
        }
        Ok(())
    }

    fn margins(&self, reference: &mut Reference) -> Result<()> {
        let scores = token_scores(&self.data, &self.v, &self.y)?;
        let selection = optimal_tokens(&scores, self.tokens);
        self.compare(reference, "opt_ids", &ids(&selection), SAME)?;
        if self.any(reference, &["W_fro", "fro_dual", "fro_norm", "fro_margins"]) {
            let fro = solve(&self.data, SvmNorm::Frobenius, &selection)?;
            let sharp = Tolerance::Mixed(1e-9);
            self.compare(reference, "W_fro", &flat(&fro.w)?, sharp)?;
            self.compare(reference, "fro_dual", &fro.duals, Tolerance::Mixed(1e-8))?;
            self.compare(reference, "fro_norm", &[fro.norm], sharp)?;
            self.compare(reference, "fro_margins", &fro.margins, sharp)?;
        }
        if !self.any(reference, &["W_nuc", "nuc_norm", "nuc_sv", "nuc_margin"]) {
            return Ok(());
        }
        let nuc = solve(&self.data, NUCLEAR, &selection)?;
        self.compare(reference, "W_nuc", &flat(&nuc.w)?, LOOSE)?;
        self.compare(reference, "nuc_norm", &[nuc.norm], Tolerance::Mixed(1e-5))?;
        let (d, e) = self.data.shape();
        let values = singular_values(&from_rows(d, e, &flat(&nuc.w)?))?;
        self.compare(reference, "nuc_sv", &values, LOOSE)?;
        let least = nuc.margins.iter().copied().fold(f64::INFINITY, f64::min);
        self.compare(reference, "nuc_margin", &[least], LOOSE)
    }

    fn descent(&self, reference: &mut Reference) -> Result<()> {
        if !reference.has(&self.name("gd_W")) {
            return Ok(());
        }
        let (d, e) = self.data.shape();
        let zero = Tensor::zeros((d, e), DType::F64, &candle_core::Device::Cpu)?;
        let mut state = GdState::new(&self.data, &GdParameters::W(zero))?;
        let marks = [1, 10, self.iters / 2, self.iters];
        // One row for each mark, whatever their order; empty for one that does not come.
        let mut rows: [(Vec<f64>, Vec<f64>); 4] = Default::default();
        let mut last = vec![];
        for t in 1..=self.iters {
            if t == self.iters {
                last = self.data.probabilities(&state.w()?)?;
            }
            let loss = state.step(&self.gd, &self.data, &self.v, &self.y)?;
            for (row, _) in rows.iter_mut().zip(marks).filter(|(_, mark)| *mark == t) {
                *row = (flat(&state.w()?)?, vec![loss]);
            }
        }
        let tolerances = [1e-10, 1e-10, 1e-5, 1e-5].map(Tolerance::Mixed);
        for (i, ((w, loss), tolerance)) in rows.iter().zip(tolerances).enumerate() {
            self.one_row(reference, "gd_W", (i, d * e), w, tolerance)?;
            if reference.has(&self.name("gd_loss")) {
                self.one_row(reference, "gd_loss", (i, 1), loss, tolerance)?;
            }
        }
        self.compare(reference, "gd_softmax", &last, Tolerance::Mixed(1e-5))?;
        let selection = Selection::of(&last, self.tokens);
        self.compare(reference, "gd_ids", &ids(&selection), SAME)?;
        if !self.any(reference, &["W_fro_local", "gd_corr_local"]) {
            return Ok(());
        }
        let local = solve(&self.data, SvmNorm::Frobenius, &selection)?;
        self.compare(
            reference,
            "W_fro_local",
            &flat(&local.w)?,
            Tolerance::Mixed(1e-6),
        )?;
        let end = from_rows(d, e, &flat(&state.w()?)?);
        let toward = cosine(&end, &from_rows(d, e, &flat(&local.w)?));
        self.compare(
            reference,
            "gd_corr_local",
            &[toward],
            Tolerance::Mixed(1e-5),
        )
    }

    /// One row of a tensor, with all others as they are in the file.
    fn one_row(
        &self,
        reference: &mut Reference,
        part: &str,
        (row, size): (usize, usize),
        found: &[f64],
        tolerance: Tolerance,
    ) -> Result<()> {
        let name = self.name(part);
        let mut values = reference.expected(&name)?.values.clone();
        match values.get_mut(row * size..(row + 1) * size) {
            Some(place) if place.len() == found.len() => place.copy_from_slice(found),
            _ => values.clear(),
        }
        Ok(reference.compare(&name, &values, tolerance)?)
    }

    fn factored(&self, reference: &mut Reference) -> Result<()> {
        if !reference.has(&self.name("kq_K0")) {
            return Ok(());
        }
        let k = reference.input(&self.name("kq_K0"))?.tensor(DType::F64)?;
        let q = Tensor::zeros((k.dim(0)?, self.data.shape().1), DType::F64, k.device())?;
        let mut state = GdState::new(&self.data, &GdParameters::Kq(k, q))?;
        for t in 1..=self.iters {
            state.step(&self.gd, &self.data, &self.v, &self.y)?;
            let name = self.name(&format!("kq_W_{t}"));
            if reference.has(&name) {
                reference.compare(&name, &flat(&state.w()?)?, Tolerance::Mixed(1e-8))?;
            }
        }
        let w = state.w()?;
        self.compare(reference, "kq_W_end", &flat(&w)?, Tolerance::Mixed(1e-4))?;
        let probabilities = self.data.probabilities(&w)?;
        let selection = Selection::of(&probabilities, self.tokens);
        self.compare(reference, "kq_ids", &ids(&selection), SAME)?;
        if !self.any(reference, &["W_nuc_local", "kq_corr"]) {
            return Ok(());
        }
        let local = solve(&self.data, NUCLEAR, &selection)?;
        self.compare(reference, "W_nuc_local", &flat(&local.w)?, LOOSE)?;
        let (d, e) = self.data.shape();
        let read = |t: &Tensor| -> Result<faer::Mat<f64>> { Ok(from_rows(d, e, &flat(t)?)) };
        let toward = cosine(&read(&w)?, &read(&local.w)?);
        self.compare(reference, "kq_corr", &[toward], Tolerance::Mixed(1e-4))
    }

    fn path(&self, reference: &mut Reference) -> Result<()> {
        if !reference.has(&self.name("rp_R")) {
            return Ok(());
        }
        let path = RegularizationPath {
            radii: reference.input(&self.name("rp_R"))?.values,
            step: number(reference, &self.case, "rp_step")?,
            ..RegularizationPath::default()
        };
        let found = path.solve(&self.data, HeadLoss::Logistic, &self.v, &self.y)?;
        let (mut weights, mut losses) = (vec![], vec![]);
        for (w, loss) in &found {
            weights.extend(flat(w)?);
            losses.push(*loss);
        }
        self.compare(reference, "rp_W", &weights, Tolerance::Mixed(1e-5))?;
        self.compare(reference, "rp_loss", &losses, Tolerance::Mixed(1e-8))
    }

    fn generalized(&self, reference: &mut Reference) -> Result<()> {
        if !reference.has(&self.name("gs_softmax")) {
            return Ok(());
        }
        let probs = reference.input(&self.name("gs_softmax"))?.values;
        let threshold = number(reference, &self.case, "gs_threshold")?;
        let found = generalized_svm(&self.data, &probs, threshold)?;
        self.compare(reference, "gs_Wdir", &flat(&found.w_dir)?, LOOSE)?;
        let sharp = Tolerance::Mixed(1e-9);
        self.compare(reference, "gs_Wfin", &flat(&found.w_fin)?, sharp)
    }
}
