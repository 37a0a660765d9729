//! The transfer of a frozen network to its experts.

use super::ExpertBank;
use crate::error::{check, Error};
use crate::Result;
use candle_core::{DType, ModuleT, Tensor, Var, D};
use candle_nn::Optimizer;
use flows::schedule::Ddpm;
use flows::{Level, Levels};
use nn::softmax::log_softmax;
use tensor_core::random::RandomStream;

/// What an expert learns from the frozen network.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum TransferLoss {
    /// The divergence of classes' probabilities, the teacher's over a temperature.
    KlLogits {
        /// The teacher's temperature; below 1 it is sharper. 0.25 in the paper.
        tau: f64,
        /// Whether classes are averaged (the paper's code) or summed.
        reduction: KlReduction,
    },
    /// The mean square of the difference: depth maps, features.
    Mse,
    /// Cross entropy with the teacher's likeliest class at each place of `[rows, classes, ...]`:
    /// segmentation.
    CrossEntropyPixels,
}

/// How the classes' terms of a divergence are collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum KlReduction {
    /// Their mean: `1 / K` of the divergence.
    #[default]
    PaperMean,
    /// Their sum: the divergence.
    Sum,
}

impl Default for TransferLoss {
    fn default() -> Self {
        Self::KlLogits {
            tau: 0.25,
            reduction: KlReduction::PaperMean,
        }
    }
}

impl TransferLoss {
    fn validate(&self) -> Result<()> {
        match self {
            Self::KlLogits { tau, .. } => check::positive("TransferLoss::KlLogits::tau", *tau),
            _ => Ok(()),
        }
    }

    /// The loss of each sample, `[rows]`.
    ///
    /// # Errors
    /// [`Error::Shape`] when the two outputs differ in shape.
    pub fn per_sample(&self, teacher: &Tensor, student: &Tensor) -> Result<Tensor> {
        if teacher.dims() != student.dims() || teacher.rank() < 2 {
            let expected = format!("{:?}, the expert's", student.dims());
            return Err(Error::shape(
                "the teacher's output",
                teacher.dims(),
                expected,
            ));
        }
        let teacher = teacher.detach();
        match self {
            Self::KlLogits { tau, reduction } => {
                let log_q = log_softmax(&teacher.affine(1.0 / tau, 0.0)?, D::Minus1)?;
                let log_p = log_softmax(student, D::Minus1)?;
                let terms = (log_q.exp()? * (log_q - log_p)?)?;
                let classes = *terms.dims().last().unwrap_or(&1) as f64;
                let sum = terms.sum(D::Minus1)?;
                let sum = match sum.rank() {
                    1 => sum,
                    _ => sum.flatten_from(1)?.mean(D::Minus1)?,
                };
                match reduction {
                    KlReduction::PaperMean => Ok(sum.affine(1.0 / classes, 0.0)?),
                    KlReduction::Sum => Ok(sum),
                }
            }
            Self::Mse => {
                let off = (student - teacher)?.sqr()?.flatten_from(1)?;
                Ok(off.mean(D::Minus1)?)
            }
            Self::CrossEntropyPixels => {
                // Classes last, for the softmax.
                let last = |x: &Tensor| -> Result<Tensor> {
                    let (rows, classes) = (x.dims()[0], x.dims()[1]);
                    Ok(x.reshape((rows, classes, ()))?
                        .transpose(1, 2)?
                        .contiguous()?)
                };
                let class = last(&teacher)?.argmax_keepdim(D::Minus1)?;
                let log_p = log_softmax(&last(student)?, D::Minus1)?;
                let own = log_p.gather(&class, D::Minus1)?;
                Ok(own.flatten_from(1)?.mean(D::Minus1)?.neg()?)
            }
        }
    }
}

/// Where an expert starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Init {
    /// At the frozen network, as the paper describes.
    #[default]
    FromBase,
    /// At the expert before, as the authors' program does.
    Chained,
}

/// The transfer of the frozen network to its experts, without data.
#[derive(Debug, Clone, PartialEq)]
pub struct Transfer {
    /// Updates per expert; the paper's 300 000 over the number of experts.
    pub iterations: usize,
    /// Samples of an update.
    pub batch: usize,
    /// The first learning rate of an expert, which falls to 0 in a line.
    pub lr: f64,
    /// Weight decay, for whoever makes the optimizer; the paper's is AdamW.
    pub weight_decay: f64,
    /// What is learned.
    pub loss: TransferLoss,
    /// Where experts start.
    pub init: Init,
}

impl Default for Transfer {
    fn default() -> Self {
        Self {
            iterations: 60_000,
            batch: 256,
            lr: 1e-4,
            weight_decay: 0.05,
            loss: TransferLoss::default(),
            init: Init::FromBase,
        }
    }
}

impl Transfer {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        let one = "at least 1";
        check::require(
            self.iterations > 0,
            "Transfer::iterations",
            self.iterations,
            one,
        )?;
        check::require(self.batch > 0, "Transfer::batch", self.batch, one)?;
        check::positive("Transfer::lr", self.lr)?;
        let decay = self.weight_decay.is_finite() && self.weight_decay >= 0.0;
        let words = "a finite number >= 0";
        check::require(decay, "Transfer::weight_decay", self.weight_decay, words)?;
        self.loss.validate()
    }

    /// Trains all experts; `data` gives so many generated clean samples (see
    /// [`generate`](super::generate())), `optimizer` is made anew for each expert from its variables and
    /// these settings. Returns the losses of every update, by expert.
    ///
    /// # Errors
    /// As [`validate`](Self::validate); [`Error::Mismatch`] for a schedule of other steps;
    /// [`Error::NonFinite`] for a loss that is not finite, before it reaches the adapters.
    pub fn run<M: ModuleT, O: Optimizer>(
        &self,
        bank: &mut ExpertBank<M>,
        schedule: &Ddpm,
        data: &mut dyn FnMut(usize) -> Result<Tensor>,
        optimizer: impl Fn(Vec<Var>, &Transfer) -> Result<O>,
        rng: &mut RandomStream,
    ) -> Result<Vec<Vec<f64>>> {
        self.validate()?;
        if schedule.train_steps() != bank.ranges.steps() {
            return Err(Error::Mismatch {
                what: "the schedule",
                reason: format!(
                    "{} steps where the experts have {}",
                    schedule.train_steps(),
                    bank.ranges.steps()
                ),
            });
        }
        let mut all = Vec::new();
        for n in 0..bank.adapters.len() {
            if n > 0 && self.init == Init::Chained {
                let before = bank.adapters[n - 1].state()?;
                bank.adapters[n].load_state(&before)?;
            }
            let mut optimizer = optimizer(bank.adapters[n].vars(), self)?;
            let mut losses = Vec::with_capacity(self.iterations);
            for k in 0..self.iterations {
                let done = k as f64 / self.iterations as f64;
                optimizer.set_learning_rate(self.lr * (1.0 - done));
                let x0 = data(self.batch)?.detach();
                let loss = self.loss(bank, n, &x0, schedule, rng)?;
                let number = loss.to_dtype(DType::F64)?.to_scalar::<f64>()?;
                if !number.is_finite() {
                    return Err(Error::NonFinite {
                        rule: "PPAP",
                        what: format!("the transfer loss of expert {n}"),
                        step: k,
                    });
                }
                optimizer.backward_step(&loss)?;
                losses.push(number);
            }
            all.push(losses);
        }
        bank.merge()?;
        Ok(all)
    }

    /// The loss of expert `n` on clean samples that are noised by steps of its range.
    fn loss<M: ModuleT>(
        &self,
        bank: &ExpertBank<M>,
        n: usize,
        x0: &Tensor,
        schedule: &Ddpm,
        rng: &mut RandomStream,
    ) -> Result<Tensor> {
        let (lo, hi) = bank.ranges.all()[n];
        let rows = x0.dims().first().copied().unwrap_or(0);
        let level = |_| -> Result<Level> {
            let t = lo + rng.below(hi - lo)?;
            Ok(flows::Schedule::level(schedule, t as f64)?)
        };
        let levels = Levels::PerRow((0..rows).map(level).collect::<Result<_>>()?);
        let noise = rng.normal(0.0, 1.0, x0.shape(), x0.dtype(), x0.device())?;
        let noisy = flows::level::mix(x0, &noise, &levels)?;
        let expert = (bank.build)(bank.adapters[n].builder()?)?;
        let student = expert.forward_t(&bank.preprocess.student.apply(&noisy)?, true)?;
        let losses = self.loss.per_sample(&bank.teach(x0)?, &student)?;
        Ok(losses.mean_all()?)
    }
}
