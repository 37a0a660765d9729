//! Where normalized gradient descent on attention weights goes.

use super::heat_map;
use crate::scenario::{
    metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario, Setting,
    TrialContext, TrialOutcome,
};
use crate::scenarios::training::digits;
use crate::Result;
use candle_core::{DType, Tensor, Var};
use candle_nn::Optimizer;
use convex::attention_svm::{
    attention_gradient, head_report, local_optimality, token_scores, AttSvm, AttentionData,
    GdParameters, GdState, HeadLoss, NormalizedGd, Selection, SvmNorm,
};
use optim::{AdamW, AdamWConfig};
use tensor_core::random::RandomStream;

const STEPS: usize = 2000;
const KQ_STEPS: usize = 1000;
/// Steps between two points of a curve.
const EVERY: usize = 20;

pub(in crate::scenarios) struct AttentionSvm;

impl Scenario for AttentionSvm {
    fn definition(&self) -> Definition {
        let sizes = |n, t, d| [("n", n), ("T", t), ("d", d)];
        let trained = |name, label, [a, b, c]: [(&'static str, f64); 3]| {
            Arm::new(name, label, Role::Method).fixed(&[a, b, c])
        };
        let local =
            |name, label, arm| Claim::every_seed(name, label, metric(arm, "local").at_least(1.0));
        let higher = |name, label| Metric {
            name,
            label,
            better: Better::Higher,
        };
        let plain = |name, label| Metric {
            name,
            label,
            better: Better::Neither,
        };
        Definition {
            slug: "attention-svm",
            title: "Attention as an SVM",
            paper: Paper {
                title: "Transformers as Support Vector Machines",
                venue: "arXiv 2023",
                arxiv: "2308.16898",
            },
            krate: "convex",
            module: "attention_svm",
            tags: &["attention", "interpretability", "implicit bias"],
            version: 1,
            summary: "Random unit tokens and queries, a random head and random labels; one attention layer is trained \
                      from zero with steps of a fixed length (0.1), 2000 on W for three sizes (n, T, d) and 1000 on \
                      K and Q. Then the cosine with the maximum-margin weights of the tokens that it came to select. \
                      The baseline is gradient descent with a fixed rate. Beside it, the report on a head trained to \
                      classify digits by their eight rows.",
            notes: "Selections whose SVM is infeasible are left out of the cosine. On the digits no inequality is \
                    promised: one learned query for all images leaves one direction to separate with.",
            data: Data { embedded: "generated, digits", real: None },
            arms: vec![
                Arm::new("plain", "fixed rate 1, 6, 8, 10", Role::Baseline).fixed(&sizes(6.0, 8.0, 10.0)),
                trained("w-10", "W, 6, 8, 10", sizes(6.0, 8.0, 10.0)),
                trained("w-20", "W, 4, 6, 20", sizes(4.0, 6.0, 20.0)),
                trained("w-4", "W, 8, 4, 4", sizes(8.0, 4.0, 4.0)),
                trained("kq", "K and Q, 6, 8, 10", sizes(6.0, 8.0, 10.0)),
                Arm::new("digits", "a head on digits", Role::Diagnostic),
            ],
            metrics: vec![
                higher("cosine", "cosine with the Frobenius solution"),
                higher("cosine_nuclear", "cosine with the nuclear solution"),
                higher("local", "share of locally optimal selections"),
                plain("optimal", "share of globally optimal selections"),
                plain("rank_frobenius", "rank of the Frobenius solution"),
                plain("rank_nuclear", "rank of the nuclear solution"),
                plain("sharp", "share of sharp queries"),
                plain("feasible", "whether the selection can be separated"),
            ],
            claims: vec![
                Claim::mean("w-10", "W turns to the maximum margin (6, 8, 10)", metric("w-10", "cosine").at_least(0.99)),
                Claim::mean("w-20", "W turns to the maximum margin (4, 6, 20)", metric("w-20", "cosine").at_least(0.99)),
                Claim::mean("w-4", "W turns to the maximum margin (8, 4, 4)", metric("w-4", "cosine").at_least(0.99)),
                Claim::every_seed("each", "on every seed by 0.97 (6, 8, 10)", metric("w-10", "cosine").at_least(0.97)),
                Claim::every_seed("each-20", "on every seed by 0.97 (4, 6, 20)", metric("w-20", "cosine").at_least(0.97)),
                Claim::every_seed("each-4", "on every seed by 0.97 (8, 4, 4)", metric("w-4", "cosine").at_least(0.97)),
                Claim::every_seed(
                    "nuclear",
                    "K and Q turn to the nuclear solution, 0.03 above the Frobenius one",
                    metric("kq", "cosine_nuclear").above(metric("kq", "cosine") + 0.03),
                ),
                local("local", "every selection is locally optimal (6, 8, 10)", "w-10"),
                local("local-20", "every selection is locally optimal (4, 6, 20)", "w-20"),
                local("local-4", "every selection is locally optimal (8, 4, 4)", "w-4"),
                local("local-kq", "every selection of K and Q is locally optimal", "kq"),
                Claim::mean(
                    "speed",
                    "a fixed rate is behind after as many steps",
                    metric("plain", "cosine").below(metric("w-10", "cosine")),
                ),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, setting: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        if arm.name == "digits" {
            return digits_head(trial);
        }
        let size = |name| -> Result<usize> { Ok(setting.get(name)? as usize) };
        let problem = Problem::new(trial, size("n")?, size("T")?, size("d")?)?;
        let trained = match arm.name {
            "plain" => problem.fixed_rate()?,
            "kq" => problem.factored(trial)?,
            _ => problem.normalized(trial)?,
        };
        problem.outcome(&trained, arm.name == "kq")
    }
}

/// Unit tokens, queries and head, and signs.
struct Problem {
    data: AttentionData,
    tokens: usize,
    d: usize,
    v: Vec<f64>,
    y: Vec<f64>,
}

fn unit_rows(stream: &mut RandomStream, rows: usize, d: usize) -> Vec<f64> {
    let mut out = vec![0.0; rows * d];
    stream.fill_normal(&mut out);
    for row in out.chunks_mut(d) {
        let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
        row.iter_mut().for_each(|x| *x /= norm);
    }
    out
}

impl Problem {
    fn new(trial: &TrialContext, n: usize, tokens: usize, d: usize) -> Result<Self> {
        let mut stream = trial.stream("data");
        let device = candle_core::Device::Cpu;
        let x = Tensor::from_vec(
            unit_rows(&mut stream, n * tokens, d),
            (n, tokens, d),
            &device,
        )?;
        let z = Tensor::from_vec(unit_rows(&mut stream, n, d), (n, d), &device)?;
        let v = unit_rows(&mut stream, 1, d);
        let mut sign = || {
            if stream.next_uniform() < 0.5 {
                -1.0
            } else {
                1.0
            }
        };
        Ok(Self {
            data: AttentionData::new(&x, &z, None)?,
            y: (0..n).map(|_| sign()).collect(),
            tokens,
            d,
            v,
        })
    }

    fn zero(&self) -> Result<Tensor> {
        Ok(Tensor::zeros(
            (self.d, self.d),
            DType::F64,
            &candle_core::Device::Cpu,
        )?)
    }

    fn normalized(&self, trial: &TrialContext) -> Result<Vec<Tensor>> {
        let start = GdParameters::W(self.zero()?);
        self.descend(trial, &start, STEPS)
    }

    fn factored(&self, trial: &TrialContext) -> Result<Vec<Tensor>> {
        let mut k = vec![0.0; self.d * self.d];
        trial.stream("weights").fill_normal(&mut k);
        k.iter_mut().for_each(|k| *k *= 0.1);
        let k = Tensor::from_vec(k, (self.d, self.d), &candle_core::Device::Cpu)?;
        self.descend(trial, &GdParameters::Kq(k, self.zero()?), KQ_STEPS)
    }

    /// The weights after every [`EVERY`] steps.
    fn descend(
        &self,
        trial: &TrialContext,
        start: &GdParameters,
        steps: usize,
    ) -> Result<Vec<Tensor>> {
        let how = NormalizedGd::default();
        let mut state = GdState::new(&self.data, start)?;
        let mut seen = vec![];
        for t in 1..=steps {
            state.step(&how, &self.data, &self.v, &self.y)?;
            if t % EVERY == 0 {
                seen.push(state.w()?);
                trial.step(t, steps)?;
            }
        }
        Ok(seen)
    }

    fn fixed_rate(&self) -> Result<Vec<Tensor>> {
        let mut w = self.zero()?;
        let mut seen = vec![];
        for t in 1..=STEPS {
            let loss = HeadLoss::Logistic;
            let (_, g) = attention_gradient(&self.data, loss, &self.v, &self.y, &w)?;
            w = (w - g)?;
            if t % EVERY == 0 {
                seen.push(w.clone());
            }
        }
        Ok(seen)
    }

    fn outcome(&self, seen: &[Tensor], nuclear: bool) -> Result<TrialOutcome> {
        let outcome = TrialOutcome::default();
        let Some(last) = seen.last() else {
            return Ok(outcome);
        };
        let selection = Selection::of(&self.data.probabilities(last)?, self.tokens);
        let scores = token_scores(&self.data, &self.v, &self.y)?;
        let best = convex::attention_svm::optimal_tokens(&scores, self.tokens);
        let n = selection.0.len() as f64;
        let same = selection
            .0
            .iter()
            .zip(&best.0)
            .filter(|(a, b)| a == b)
            .count();
        let outcome = outcome.metric("optimal", same as f64 / n);
        let fro = match AttSvm::default().solve(&self.data, &selection) {
            Ok(solution) => solution,
            Err(convex::Error::Infeasible { .. }) => return Ok(outcome.metric("feasible", 0.0)),
            Err(other) => return Err(other.into()),
        };
        let local = local_optimality(&fro, &scores)?;
        let share = local.iter().filter(|l| **l).count() as f64 / n;
        let mut outcome = outcome
            .metric("feasible", 1.0)
            .metric("local", share)
            .metric("cosine", cosine(last, &fro.w)?)
            .metric("rank_frobenius", fro.rank as f64);
        let mut target = fro.w.clone();
        if nuclear {
            let norm = SvmNorm::Nuclear { rank_cap: None };
            let solver = AttSvm {
                norm,
                ..AttSvm::default()
            };
            let nuc = solver.solve(&self.data, &selection)?;
            outcome = outcome
                .metric("cosine_nuclear", cosine(last, &nuc.w)?)
                .metric("rank_nuclear", nuc.rank as f64);
            target = nuc.w;
        }
        let mut curve = Curve::new("1 - cosine with the maximum margin", "step").log_y();
        for (i, w) in seen.iter().enumerate() {
            let gap = 1.0 - cosine(w, &target)?;
            curve.push(((i + 1) * EVERY) as f64, gap.max(1e-12));
        }
        Ok(outcome.curve(curve))
    }
}

fn cosine(a: &Tensor, b: &Tensor) -> Result<f64> {
    let dot =
        |x: &Tensor, y: &Tensor| -> Result<f64> { Ok((x * y)?.sum_all()?.to_scalar::<f64>()?) };
    Ok(dot(a, b)? / (dot(a, a)? * dot(b, b)?).sqrt())
}

/// Rows of images with a one appended: `[n, 8, 9]`.
fn rows(x: &Tensor) -> Result<Tensor> {
    let x = x.to_dtype(DType::F64)?.reshape(((), 8, 8))?;
    let ones = Tensor::ones((x.dim(0)?, 8, 1), DType::F64, x.device())?;
    Ok(Tensor::cat(&[x, ones], 2)?)
}

/// One softmax attention head with a learned query over the rows of an image, then a linear layer.
fn digits_head(trial: &TrialContext) -> Result<TrialOutcome> {
    const TRAIN: usize = 600;
    const EPOCHS: usize = 300;
    let parts = digits(trial, &[TRAIN, 100])?;
    let x = rows(&parts[0].inputs)?;
    let mut stream = trial.stream("weights");
    let mut draw = |shape: (usize, usize)| -> Result<Var> {
        let values = stream.normal(0.0, 0.3, shape, DType::F64, &trial.device)?;
        Ok(Var::from_tensor(&values)?)
    };
    // Logits `x' W z` with one learned vector `W z`.
    let (query, head) = (draw((9, 1))?, draw((9, 10))?);
    let config = AdamWConfig {
        lr: 0.05,
        ..AdamWConfig::default()
    };
    let mut optimizer = AdamW::new(vec![query.clone(), head.clone()], config)?;
    for epoch in 0..EPOCHS {
        trial.step(epoch, EPOCHS)?;
        let attention = candle_nn::ops::softmax(&x.broadcast_matmul(&query)?, 1)?;
        let read = x.broadcast_mul(&attention)?.sum(1)?;
        let logits = read.matmul(&head)?;
        optimizer.backward_step(&candle_nn::loss::cross_entropy(&logits, &parts[0].labels)?)?;
    }
    let test = rows(&parts[1].inputs)?;
    let n = test.dim(0)?;
    let one = Tensor::ones((n, 1), DType::F64, &trial.device)?;
    let data = AttentionData::new(&test, &one, None)?;
    let report = head_report(&data, query.as_tensor(), None)?;
    let probabilities = data.probabilities(query.as_tensor())?;
    let outcome = TrialOutcome::default()
        .metric("sharp", report.used.len() as f64 / n as f64)
        .metric("feasible", f64::from(u8::from(report.feasible)))
        .picture(heat_map(
            "attention of 100 digits (rows) over their eight rows",
            n,
            8,
            &probabilities,
        )?);
    Ok(match report.cosine_to_fro {
        Some(cosine) => outcome.metric("cosine", cosine),
        None => outcome,
    })
}
