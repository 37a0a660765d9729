//! BO-REP against SOBA: an upper loss that grows exponentially, and data cleaning on the digits.

use crate::scenario::{
    best, metric, Arm, Better, Claim, Curve, Data, Definition, Metric, Paper, Role, Scenario,
    Setting, TrialContext, TrialOutcome,
};
use crate::scenarios::training::{digits, scalar};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, D};
use datasets::corrupt::LabelNoise;
use nn::loss::accuracy;
use optim::bilevel::{
    BatchRequest, BilevelProblem, BoRep as Method, BoRepConfig, InitRefinement, Oracle,
    QuadraticProblem, Soba, SobaConfig, UpperGrads,
};
use tensor_core::random::RandomStream;

const EXP_STEPS: usize = 2000;
const CLEANING_STEPS: usize = 1500;
const BATCH: usize = 64;
/// Weight of the squared penalty of the classifier.
const MU: f64 = 1e-2;

pub(in crate::scenarios) struct BoRep;

impl Scenario for BoRep {
    fn definition(&self) -> Definition {
        Definition {
            slug: "bo-rep",
            title: "BO-REP",
            paper: Paper {
                title: "Bilevel Optimization under Unbounded Smoothness: A New Algorithm and Convergence Analysis",
                venue: "ICLR 2024",
                arxiv: "2401.09587",
            },
            krate: "optim",
            module: "bilevel",
            tags: &["bilevel", "hyper-parameters"],
            version: 1,
            summary: "A quadratic lower problem under an upper loss with exponentials, from +-10 in five coordinates, \
                      noise of 0.05 on every oracle, 2000 steps; SOBA with five step sizes. Cleaning the digits: 900 \
                      training labels of which 0.4 are replaced by the next class, a weight for each, 200 clean \
                      labels for validation, 697 for testing, 1500 steps of batch 64; SOBA with three step sizes.",
            notes: "On the digits the upper loss is smooth, so a tuned SOBA is as good: the claim there is only that \
                    BO-REP is not worse by more than 0.03.",
            data: Data { embedded: "digits", real: None },
            arms: vec![
                Arm::new("exp-soba", "SOBA, exponential loss", Role::Baseline)
                    .tuned("eta", &[1e-1, 1e-2, 1e-3, 1e-4, 3e-5, 1e-5], "gradient"),
                Arm::new("exp-bo-rep", "BO-REP, exponential loss", Role::Method).fixed(&[("eta", 0.02)]),
                Arm::new("cleaning-none", "no cleaning", Role::Baseline),
                Arm::new("cleaning-soba", "SOBA, cleaning", Role::Baseline)
                    .tuned("eta", &[0.5, 5.0, 50.0], "accuracy"),
                Arm::new("cleaning-bo-rep", "BO-REP, cleaning", Role::Method).fixed(&[("eta", 0.3)]),
            ],
            metrics: vec![
                Metric { name: "gradient", label: "final norm of the hyper-gradient", better: Better::Lower },
                Metric { name: "lowest", label: "lowest norm on the way", better: Better::Lower },
                Metric { name: "accuracy", label: "test accuracy", better: Better::Higher },
                Metric { name: "auc", label: "AUC of the weights against the wrong labels", better: Better::Higher },
            ],
            claims: vec![
                Claim::every_seed("reaches", "BO-REP reaches a hyper-gradient of 0.3",
                    metric("exp-bo-rep", "lowest").below(0.3)),
                Claim::every_seed("soba", "SOBA ends at 5 or more, or diverges, at every step size",
                    best("exp-soba", "gradient").at_least(5.0)),
                Claim::every_seed("cleans", "cleaning gains at least 0.15 of accuracy",
                    metric("cleaning-bo-rep", "accuracy").at_least(metric("cleaning-none", "accuracy") + 0.15)),
                Claim::every_seed("separates", "the weights tell wrong labels from right ones (AUC of 0.9)",
                    metric("cleaning-bo-rep", "auc").at_least(0.9)),
                Claim::mean("not-worse", "BO-REP is not worse than tuned SOBA by more than 0.03",
                    metric("cleaning-bo-rep", "accuracy").at_least(metric("cleaning-soba", "accuracy") - 0.03)),
            ],
            full: None,
        }
    }

    fn run(&self, arm: &Arm, setting: &Setting, trial: &TrialContext) -> Result<TrialOutcome> {
        match arm.name {
            "exp-soba" => exponential(trial, Which::Soba(setting.get("eta")?)),
            "exp-bo-rep" => exponential(trial, Which::BoRep(setting.get("eta")?)),
            "cleaning-soba" => cleaning(trial, Which::Soba(setting.get("eta")?)),
            "cleaning-bo-rep" => cleaning(trial, Which::BoRep(setting.get("eta")?)),
            _ => cleaning(trial, Which::Fixed),
        }
    }
}

#[derive(Clone, Copy)]
enum Which {
    /// The upper variable stays.
    Fixed,
    Soba(f64),
    BoRep(f64),
}

enum Running {
    Soba(Soba),
    BoRep(Method),
}

impl Running {
    fn x(&self) -> &Tensor {
        match self {
            Self::Soba(method) => method.x(),
            Self::BoRep(method) => method.x(),
        }
    }

    fn y(&self) -> &Tensor {
        match self {
            Self::Soba(method) => method.y(),
            Self::BoRep(method) => method.y(),
        }
    }

    /// One step; false for one that diverged.
    fn step<P: BilevelProblem>(&mut self, problem: &mut P) -> Result<bool> {
        let done = match self {
            Self::Soba(method) => method.step(problem),
            Self::BoRep(method) => method.step(problem),
        };
        match done {
            Ok(_) => Ok(true),
            Err(optim::Error::NonFiniteGradient(_)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// A symmetric matrix with eigenvalues evenly spread over [0.5, 2], by reflections.
fn matrix(n: usize, stream: &mut RandomStream) -> Result<Tensor> {
    let values: Vec<f64> = (0..n)
        .map(|i| 0.5 + 1.5 * i as f64 / (n - 1) as f64)
        .collect();
    let eye = Tensor::eye(n, DType::F64, &Device::Cpu)?;
    let mut a = eye.broadcast_mul(&Tensor::new(values, &Device::Cpu)?)?;
    for _ in 0..n {
        let v = stream.normal(0.0, 1.0, (n, 1), DType::F64, &Device::Cpu)?;
        let outer = v.matmul(&v.t()?)?;
        let length = scalar(&v.sqr()?.sum_all()?)?;
        let reflect = (&eye - (outer * (2.0 / length))?)?;
        a = reflect.matmul(&a)?.matmul(&reflect)?;
    }
    Ok(a)
}

/// `f = sum (e^x + e^-x) + |y - t|^2 / 2` over a quadratic.
fn exponential_problem(trial: &TrialContext) -> Result<QuadraticProblem> {
    let mut stream = trial.stream("quadratic");
    let a = matrix(8, &mut stream)?;
    let mut draw = |std, shape: &[usize]| stream.normal(0.0, std, shape, DType::F64, &Device::Cpu);
    let (b, c, t) = (
        draw(1.0 / 3.0, &[8, 5])?,
        draw(1.0, &[8])?,
        draw(1.0, &[8])?,
    );
    let problem = QuadraticProblem::new(&a, &b, &c, &t)?;
    Ok(problem.with_direct(|x| x.exp()? - x.neg()?.exp()?))
}

fn exponential(trial: &TrialContext, which: Which) -> Result<TrialOutcome> {
    let exact = exponential_problem(trial)?;
    let mut noise = trial.stream("noise");
    let mut problem = exponential_problem(trial)?.with_noise(move |request: BatchRequest| {
        let n = if request.oracle == Oracle::Cross {
            5
        } else {
            8
        };
        Ok(Some(noise.normal(
            0.0,
            0.05,
            n,
            DType::F64,
            &Device::Cpu,
        )?))
    });
    let mut signs = trial.stream("signs");
    let start: Vec<f64> = (0..5)
        .map(|_| {
            if signs.next_uniform() < 0.5 {
                -10.0
            } else {
                10.0
            }
        })
        .collect();
    let x0 = Tensor::new(start, &Device::Cpu)?;
    let y0 = exact.minimizer(&x0)?;
    let mut running = match which {
        Which::Soba(eta) => {
            let config = SobaConfig {
                eta,
                alpha: 0.3,
                nu: 0.3,
                beta: 0.0,
            };
            Running::Soba(Soba::new(&x0, &y0, config)?)
        }
        Which::BoRep(eta) => Running::BoRep(Method::new(&x0, &y0, config(eta, 0.3, 0.3))?),
        Which::Fixed => return Err(Error::Trial("nothing to do".into())),
    };
    let norm =
        |x: &Tensor| -> Result<f64> { Ok(scalar(&exact.exact(x)?.sqr()?.sum_all()?)?.sqrt()) };
    let mut curve = Curve::new("norm of the hyper-gradient", "step").log_y();
    let mut lowest = f64::INFINITY;
    for step in 0..EXP_STEPS {
        trial.step(step, EXP_STEPS)?;
        if !running.step(&mut problem)? {
            let diverged = TrialOutcome::default().metric("gradient", f64::INFINITY);
            return Ok(diverged.metric("lowest", lowest).curve(curve));
        }
        if step % 10 == 9 {
            let now = norm(running.x())?;
            lowest = lowest.min(now);
            if step % 40 == 39 {
                curve.push((step + 1) as f64, now);
            }
        }
    }
    let last = norm(running.x())?;
    let last = if last.is_nan() { f64::INFINITY } else { last };
    Ok(TrialOutcome::default()
        .metric("gradient", last)
        .metric("lowest", lowest)
        .curve(curve))
}

fn config(eta: f64, alpha: f64, nu: f64) -> BoRepConfig {
    BoRepConfig {
        eta,
        alpha,
        nu,
        ..BoRepConfig::default()
    }
}

/// Multinomial logistic regression `[65, 10]` on examples weighted by `sigmoid(x_i)`.
struct Cleaning {
    inputs: Tensor,
    labels: Tensor,
    clean: (Tensor, Tensor),
    stream: RandomStream,
}

/// Which examples of the noisy or of the clean data.
struct Chosen {
    index: Tensor,
    x: Tensor,
    y: Tensor,
}

/// `softmax(x w) - y`
fn errors(chosen: &Chosen, w: &Tensor) -> Result<Tensor> {
    let logits = chosen.x.matmul(w)?;
    let top = logits.max_keepdim(D::Minus1)?;
    let e = logits.broadcast_sub(&top)?.exp()?;
    let p = e.broadcast_div(&e.sum_keepdim(D::Minus1)?)?;
    Ok((p - &chosen.y)?)
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    Ok((x.neg()?.exp()? + 1.0)?.recip()?)
}

impl Cleaning {
    /// `X^T (weights rows) / B`
    fn pull(&self, chosen: &Chosen, rows: &Tensor) -> Result<Tensor> {
        let count = chosen.x.dim(0)? as f64;
        Ok((chosen.x.t()?.matmul(rows)? / count)?)
    }

    fn weights(&self, x: &Tensor, chosen: &Chosen) -> Result<Tensor> {
        Ok(sigmoid(&x.index_select(&chosen.index, 0)?)?.unsqueeze(1)?)
    }

    fn grad(&self, x: &Tensor, w: &Tensor, chosen: &Chosen) -> Result<Tensor> {
        let rows = errors(chosen, w)?.broadcast_mul(&self.weights(x, chosen)?)?;
        Ok((self.pull(chosen, &rows)? + (w * MU)?)?)
    }

    fn product(&self, x: &Tensor, w: &Tensor, v: &Tensor, chosen: &Chosen) -> Result<Tensor> {
        let p = (errors(chosen, w)? + &chosen.y)?;
        let u = chosen.x.matmul(v)?;
        let mean = (&p * &u)?.sum_keepdim(D::Minus1)?;
        let rows = (&p * u.broadcast_sub(&mean)?)?;
        let rows = rows.broadcast_mul(&self.weights(x, chosen)?)?;
        Ok((self.pull(chosen, &rows)? + (v * MU)?)?)
    }

    fn cross(&self, x: &Tensor, w: &Tensor, v: &Tensor, chosen: &Chosen) -> Result<Tensor> {
        let s = self.weights(x, chosen)?;
        let slope = (&s * (1.0 - &s)?)?.squeeze(1)?;
        let along = (errors(chosen, w)? * chosen.x.matmul(v)?)?.sum(1)?;
        let parts = ((slope * along)? / chosen.x.dim(0)? as f64)?;
        Ok(x.zeros_like()?.index_add(&chosen.index, &parts, 0)?)
    }
}

/// The scenario's errors inside the method's.
fn inside<T>(result: Result<T>) -> optim::Result<T> {
    Ok(result.map_err(candle_core::Error::wrap)?)
}

impl BilevelProblem for Cleaning {
    type Batch = Chosen;

    fn batch(&mut self, request: BatchRequest) -> optim::Result<Chosen> {
        let of_clean = request.oracle == Oracle::Upper;
        let (x, y) = match of_clean {
            true => (&self.clean.0, &self.clean.1),
            false => (&self.inputs, &self.labels),
        };
        let n = x.dim(0)?;
        let index: tensor_core::Result<Vec<u32>> = (0..BATCH)
            .map(|_| Ok(self.stream.below(n)? as u32))
            .collect();
        let index = Tensor::new(index?, x.device())?;
        Ok(Chosen {
            x: x.index_select(&index, 0)?,
            y: y.index_select(&index, 0)?,
            index,
        })
    }

    fn lower_grad(&mut self, x: &Tensor, y: &Tensor, batch: &Chosen) -> optim::Result<Tensor> {
        inside(self.grad(x, y, batch))
    }

    fn upper_grads(&mut self, _: &Tensor, y: &Tensor, batch: &Chosen) -> optim::Result<UpperGrads> {
        let grad = errors(batch, y).and_then(|rows| self.pull(batch, &rows));
        Ok(UpperGrads {
            value: None,
            x: None,
            y: inside(grad)?,
        })
    }

    fn lower_hvp(
        &mut self,
        x: &Tensor,
        y: &Tensor,
        v: &Tensor,
        batch: &Chosen,
    ) -> optim::Result<Tensor> {
        inside(self.product(x, y, v, batch))
    }

    fn cross_vjp(
        &mut self,
        x: &Tensor,
        y: &Tensor,
        v: &Tensor,
        batch: &Chosen,
    ) -> optim::Result<Tensor> {
        inside(self.cross(x, y, v, batch))
    }
}

/// Gray values over 16 and a column of ones, in double precision.
fn features(data: &datasets::Classification) -> Result<Tensor> {
    let x = data.inputs.to_dtype(DType::F64)?;
    let top = scalar(&x.max_all()?)?;
    // The digits come in [0, 1] or in [0, 16].
    let x = if top > 1.0 { (x / 16.0)? } else { x };
    let ones = Tensor::ones((x.dim(0)?, 1), DType::F64, x.device())?;
    Ok(Tensor::cat(&[x, ones], 1)?)
}

/// Probability that a right label has a larger weight than a wrong one.
fn auc(weights: &[f64], flipped: &[bool]) -> f64 {
    let (mut wins, mut pairs) = (0.0, 0.0);
    for (a, wrong) in weights.iter().zip(flipped) {
        for (b, right) in weights.iter().zip(flipped) {
            if *wrong && !*right {
                pairs += 1.0;
                wins += f64::from(u8::from(b > a)) + 0.5 * f64::from(u8::from(a == b));
            }
        }
    }
    wins / pairs
}

fn cleaning(trial: &TrialContext, which: Which) -> Result<TrialOutcome> {
    let parts = digits(trial, &[900, 200, 697])?;
    let [train, clean, test] = &parts[..] else {
        return Err(Error::Trial("the digits could not be split".into()));
    };
    let noise = LabelNoise::Pair { rate: 0.4 };
    let noisy = noise.apply(&train.label_vec()?, 10, &mut trial.stream("flips"))?;
    let one_hot = |labels: &[u32]| -> Result<Tensor> {
        let mut rows = vec![0.0; labels.len() * 10];
        for (i, label) in labels.iter().enumerate() {
            rows[i * 10 + *label as usize] = 1.0;
        }
        Ok(Tensor::from_vec(rows, (labels.len(), 10), &trial.device)?)
    };
    let mut problem = Cleaning {
        inputs: features(train)?,
        labels: one_hot(&noisy.labels)?,
        clean: (features(clean)?, one_hot(&clean.label_vec()?)?),
        stream: trial.stream("batches"),
    };
    let x0 = Tensor::zeros(900, DType::F64, &trial.device)?;
    // 200 full-batch steps at the start.
    let mut w = Tensor::zeros((65, 10), DType::F64, &trial.device)?;
    let all = Chosen {
        index: Tensor::arange(0u32, 900, &trial.device)?,
        x: problem.inputs.clone(),
        y: problem.labels.clone(),
    };
    for _ in 0..200 {
        w = (&w - problem.grad(&x0, &w, &all)?)?;
    }
    let mut running = match which {
        Which::Soba(eta) => {
            let config = SobaConfig {
                eta,
                alpha: 1.0,
                nu: 1.0,
                beta: 0.0,
            };
            Running::Soba(Soba::new(&x0, &w, config)?)
        }
        Which::BoRep(eta) => {
            let config = BoRepConfig {
                init: InitRefinement::None,
                ..config(eta, 1.0, 1.0)
            };
            Running::BoRep(Method::new(&x0, &w, config)?)
        }
        // A step of no length: the weights stay equal.
        Which::Fixed => Running::BoRep(Method::new(&x0, &w, config(0.0, 1.0, 1.0))?),
    };
    let inputs = features(test)?;
    let judge = |w: &Tensor| -> Result<f64> { Ok(accuracy(&inputs.matmul(w)?, &test.labels)?) };
    let mut curve = Curve::new("test accuracy", "step");
    for step in 0..CLEANING_STEPS {
        trial.step(step, CLEANING_STEPS)?;
        if !running.step(&mut problem)? {
            return Ok(TrialOutcome::default()
                .metric("accuracy", 0.0)
                .metric("auc", 0.5)
                .curve(curve));
        }
        if step % 50 == 49 {
            curve.push((step + 1) as f64, judge(running.y())?);
        }
    }
    let weights = running.x().to_vec1::<f64>()?;
    Ok(TrialOutcome::default()
        .metric("accuracy", judge(running.y())?)
        .metric("auc", auc(&weights, &noisy.flipped))
        .curve(curve))
}
