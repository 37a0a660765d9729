//! Learning-rate scaling and regime adaptation.

use crate::error::check;
use crate::schedule::Schedule;
use crate::{Error, Result};
use std::collections::BTreeMap;

/// How the learning rate grows with the batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LrScaling {
    /// With the root of the ratio: the covariance of one SGD step stays the same.
    #[default]
    Sqrt,
    /// With the ratio.
    Linear,
    /// Not at all.
    None,
}

/// The learning rate for batches of `large` examples, from the one that was right for `small`.
///
/// # Errors
/// [`Error::InvalidArgument`] for a batch of 0 or a negative or non-finite rate.
pub fn scale_lr(lr: f64, large: usize, small: usize, scaling: LrScaling) -> Result<f64> {
    check_batches(large, small)?;
    if !(lr.is_finite() && lr >= 0.0) {
        return Err(Error::argument("lr", lr, "a finite number >= 0"));
    }
    let ratio = large as f64 / small as f64;
    Ok(match scaling {
        LrScaling::Sqrt => lr * ratio.sqrt(),
        LrScaling::Linear => lr * ratio,
        LrScaling::None => lr,
    })
}

fn check_batches(large: usize, small: usize) -> Result<()> {
    for (name, batch) in [("large", large), ("small", small)] {
        if batch == 0 {
            return Err(Error::argument(name, batch, "a batch of at least 1"));
        }
    }
    Ok(())
}

/// What a milestone of a [`Regime`] sets; `None` leaves what was set before.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Setting {
    /// Learning rate.
    pub lr: Option<f64>,
    /// Momentum.
    pub momentum: Option<f64>,
    /// Weight decay.
    pub weight_decay: Option<f64>,
    /// Name of the optimizer, for whoever builds it.
    pub optimizer: Option<String>,
}

impl Setting {
    /// A setting of the learning rate alone.
    pub fn lr(lr: f64) -> Self {
        Self {
            lr: Some(lr),
            ..Self::default()
        }
    }

    fn validate(&self) -> Result<()> {
        let fields = [
            ("Setting::lr", self.lr),
            ("Setting::momentum", self.momentum),
            ("Setting::weight_decay", self.weight_decay),
        ];
        for (field, value) in fields {
            if let Some(value) = value {
                check::non_negative(field, value)?;
            }
        }
        Ok(())
    }
}

/// A training regime: settings that begin at given epochs, and a number of epochs.
#[derive(Debug, Clone, PartialEq)]
pub struct Regime {
    milestones: BTreeMap<usize, Setting>,
    total_epochs: usize,
}

impl Regime {
    /// Settings by the epoch at which they begin.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] without a setting for epoch 0, for a setting at or behind
    /// `total_epochs`, or for a negative value.
    pub fn new(milestones: BTreeMap<usize, Setting>, total_epochs: usize) -> Result<Self> {
        check::at_least_one("Regime::total_epochs", total_epochs)?;
        if !milestones.contains_key(&0) {
            let epochs: Vec<_> = milestones.keys().collect();
            return Err(Error::config(
                "Regime::milestones",
                epochs,
                "a setting for epoch 0",
            ));
        }
        if let Some((&last, _)) = milestones.range(total_epochs..).next() {
            return Err(Error::config(
                "Regime::milestones",
                last,
                format!("epochs below {total_epochs}"),
            ));
        }
        milestones.values().try_for_each(Setting::validate)?;
        Ok(Self {
            milestones,
            total_epochs,
        })
    }

    /// The settings by epoch.
    pub fn milestones(&self) -> &BTreeMap<usize, Setting> {
        &self.milestones
    }

    /// Number of epochs.
    pub fn total_epochs(&self) -> usize {
        self.total_epochs
    }

    /// The regime for batches of `large` examples, made from one for batches of `small`: learning
    /// rates times `sqrt(large / small)` with `scale_lr`, epochs times `ceil(large / small)` with
    /// `stretch`, so that the number of updates at each rate stays the same.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a batch of 0.
    pub fn adapt(&self, large: usize, small: usize, scale: bool, stretch: bool) -> Result<Self> {
        check_batches(large, small)?;
        let factor = if stretch { large.div_ceil(small) } else { 1 };
        let scaling = if scale {
            LrScaling::Sqrt
        } else {
            LrScaling::None
        };
        let mut milestones = BTreeMap::new();
        for (epoch, setting) in &self.milestones {
            let lr = setting.lr.map(|lr| scale_lr(lr, large, small, scaling));
            let setting = Setting {
                lr: lr.transpose()?,
                ..setting.clone()
            };
            milestones.insert(epoch * factor, setting);
        }
        Self::new(milestones, self.total_epochs * factor)
    }

    /// The settings in force in `epoch`: the latest of each kind.
    pub fn at(&self, epoch: usize) -> Setting {
        let mut now = Setting::default();
        for setting in self.milestones.range(..=epoch).map(|(_, s)| s) {
            now.lr = setting.lr.or(now.lr);
            now.momentum = setting.momentum.or(now.momentum);
            now.weight_decay = setting.weight_decay.or(now.weight_decay);
            now.optimizer = setting.optimizer.clone().or(now.optimizer);
        }
        now
    }

    /// The learning rate as a schedule over steps.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for `steps_per_epoch = 0` or a regime that sets no learning rate
    /// for epoch 0.
    pub fn schedule(&self, steps_per_epoch: usize) -> Result<RegimeSchedule> {
        check::at_least_one("RegimeSchedule::steps_per_epoch", steps_per_epoch)?;
        let mut stages = Vec::new();
        for (epoch, setting) in &self.milestones {
            if let Some(lr) = setting.lr {
                stages.push((epoch * steps_per_epoch, lr));
            }
        }
        if stages.first().is_none_or(|(step, _)| *step != 0) {
            return Err(Error::config(
                "Regime::milestones",
                "no learning rate for epoch 0",
                "one",
            ));
        }
        Ok(RegimeSchedule { stages })
    }
}

/// The learning rate of a [`Regime`], step by step.
#[derive(Debug, Clone, PartialEq)]
pub struct RegimeSchedule {
    /// First step and rate of each stage; the first begins at step 0.
    stages: Vec<(usize, f64)>,
}

impl Schedule for RegimeSchedule {
    fn at(&self, step: usize) -> f64 {
        let index = self.stages.partition_point(|(start, _)| *start <= step);
        self.stages[index.saturating_sub(1)].1
    }
}
