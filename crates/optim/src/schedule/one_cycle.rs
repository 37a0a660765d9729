//! One cycle: up, down, and down further.

use super::{cosine_between, linear_between, Schedule};
use crate::error::check;
use crate::{Error, Result};

/// The curve between two values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Anneal {
    /// Half a cosine.
    #[default]
    Cosine,
    /// A line.
    Linear,
}

/// Configuration of [`OneCycle`] (Smith and Topin 2019), with torch's names and values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OneCycleConfig {
    /// The peak.
    pub max_lr: f64,
    /// Length of the whole cycle in steps.
    pub total: usize,
    /// Fraction of the cycle that rises.
    pub pct_start: f64,
    /// The first value is `max_lr / div_factor`.
    pub div_factor: f64,
    /// The last value is the first one divided by this.
    pub final_div_factor: f64,
    /// The curve.
    pub anneal: Anneal,
    /// Fall to the first value as fast as it rose, then to the last one.
    pub three_phase: bool,
}

impl Default for OneCycleConfig {
    fn default() -> Self {
        Self {
            max_lr: 1e-3,
            total: 1000,
            pct_start: 0.3,
            div_factor: 25.0,
            final_div_factor: 1e4,
            anneal: Anneal::Cosine,
            three_phase: false,
        }
    }
}

impl OneCycleConfig {
    /// # Errors
    /// [`Error::InvalidConfig`] naming the first value that makes no sense.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("OneCycleConfig::max_lr", self.max_lr)?;
        check::at_least_one("OneCycleConfig::total", self.total)?;
        check::positive("OneCycleConfig::div_factor", self.div_factor)?;
        check::positive("OneCycleConfig::final_div_factor", self.final_div_factor)?;
        let most = if self.three_phase { 0.5 } else { 1.0 };
        if !(0.0..=most).contains(&self.pct_start) {
            return Err(Error::config(
                "OneCycleConfig::pct_start",
                self.pct_start,
                format!("a fraction in [0, {most}]"),
            ));
        }
        Ok(())
    }
}

/// One cycle of the learning rate; the phases end at the same steps as torch's `OneCycleLR`.
#[derive(Debug, Clone, PartialEq)]
pub struct OneCycle {
    anneal: Anneal,
    /// Last step of each phase, its value at the beginning, its value at the end.
    phases: Vec<(f64, f64, f64)>,
}

impl OneCycle {
    /// # Errors
    /// Those of [`OneCycleConfig::validate`].
    pub fn new(config: OneCycleConfig) -> Result<Self> {
        config.validate()?;
        let total = config.total as f64;
        let first = config.max_lr / config.div_factor;
        let last = first / config.final_div_factor;
        let peak_at = (config.pct_start * total - 1.0).max(0.0);
        let phases = if config.three_phase {
            let down_at = (2.0 * config.pct_start * total - 2.0).max(peak_at);
            vec![
                (peak_at, first, config.max_lr),
                (down_at, config.max_lr, first),
                (total - 1.0, first, last),
            ]
        } else {
            vec![
                (peak_at, first, config.max_lr),
                (total - 1.0, config.max_lr, last),
            ]
        };
        Ok(Self {
            anneal: config.anneal,
            phases,
        })
    }
}

impl Schedule for OneCycle {
    fn at(&self, step: usize) -> f64 {
        let t = step as f64;
        let mut begin = 0.0;
        let mut value = 0.0;
        for &(end, from, to) in &self.phases {
            value = to;
            if t <= end && end > begin {
                let fraction = (t - begin) / (end - begin);
                return match self.anneal {
                    Anneal::Cosine => cosine_between(from, to, fraction),
                    Anneal::Linear => linear_between(from, to, fraction),
                };
            }
            begin = end;
        }
        value
    }
}
