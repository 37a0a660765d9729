//! Experts as the classifier of classifier guidance.

use super::ExpertBank;
use crate::basic::NoisyModel;
use crate::error::Error;
use crate::Result;
use candle_core::{ModuleT, Tensor, D};
use flows::{Condition, Level};
use nn::softmax::log_softmax;

/// A log-likelihood `[rows]` of a guide's output under the wanted condition.
pub type Likelihood<'a> = Box<dyn Fn(&Tensor, &Condition) -> Result<Tensor> + 'a>;

/// What a guide is to say.
pub enum Objective<'a> {
    /// The class of the run's condition: `log p`.
    LogProb,
    /// A map: minus half the sum of squares to it, `[rows or 1, ...]`.
    Map(Tensor),
    /// Any log-likelihood `[rows]` of the guide's output.
    Custom(Likelihood<'a>),
}

/// A bank of experts as the model of [`ClassifierGuidance`](crate::ClassifierGuidance).
pub struct ExpertGuide<'b, 'a, M> {
    /// The experts.
    pub bank: &'b ExpertBank<'a, M>,
    /// What they are to say.
    pub objective: Objective<'b>,
    /// From a level to the step of the training schedule, a whole number: its model time, for levels of a
    /// discrete schedule.
    pub step: fn(&Level) -> f64,
}

impl<'b, 'a, M: ModuleT> ExpertGuide<'b, 'a, M> {
    /// A guide to classes, on levels of a discrete schedule.
    pub fn new(bank: &'b ExpertBank<'a, M>) -> Self {
        Self {
            bank,
            objective: Objective::LogProb,
            step: |level| level.model_time,
        }
    }

    fn log_likelihood(&self, x: &Tensor, level: &Level, wanted: &Condition) -> Result<Tensor> {
        let t = (self.step)(level);
        let whole = t.is_finite() && t >= 0.0 && (t - t.round()).abs() < 1e-6;
        if !whole {
            let expected =
                "a whole number >= 0: levels of a discrete schedule, or an ExpertGuide::step";
            return Err(Error::argument("step of the level", t, expected));
        }
        let out = self
            .bank
            .forward(x, &vec![t.round() as usize; x.dims()[0]])?;
        match &self.objective {
            Objective::LogProb => {
                let Condition::Class(classes) = wanted else {
                    let reason = "sample under Condition::Class, or take another objective";
                    return Err(Error::unsupported("a guide to no class", reason));
                };
                let log_p = log_softmax(&out, D::Minus1)?;
                Ok(log_p.gather(&classes.unsqueeze(1)?, 1)?.squeeze(1)?)
            }
            Objective::Map(target) => {
                let off = out.broadcast_sub(target)?.sqr()?.flatten_from(1)?;
                Ok(off.sum(D::Minus1)?.affine(-0.5, 0.0)?)
            }
            Objective::Custom(f) => f(&out, wanted),
        }
    }
}

impl<M: ModuleT> NoisyModel for ExpertGuide<'_, '_, M> {
    fn log_prob(&self, x: &Tensor, level: &Level, wanted: &Condition) -> flows::Result<Tensor> {
        Ok(self.log_likelihood(x, level, wanted)?)
    }
}
