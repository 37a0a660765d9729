//! Hyper-parameters of SPAM.

use crate::error::check;
use crate::{NonFinite, Result};

/// Which entries of a sparse parameter are decayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DecayMode {
    /// Every entry, whether its mask bit is set or not.
    #[default]
    All,
    /// Entries whose mask bit is set.
    Masked,
    /// None: dense parameters are decayed, sparse ones are not (what the official code does).
    Nothing,
}

/// Hyper-parameters of [`Spam`](super::Spam).
#[derive(Debug, Clone, PartialEq)]
pub struct SpamConfig {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment, which is not bias-corrected there.
    pub eps: f64,
    /// Decoupled weight decay; multiplied by `lr`, not by the warm-up factor.
    pub weight_decay: f64,
    /// Steps between two momentum resets; 0 for never.
    pub delta_t: u64,
    /// Steps of the cosine warm-up after each reset.
    pub warmup: u64,
    /// Entries with `g^2 > threshold * v` are clipped to that bound; 0 for no clipping.
    pub threshold: f64,
    /// No clipping in the first so many steps, nor in the first so many after a reset.
    pub clip_after: u64,
    /// Whether the step size carries Adam's bias correction.
    pub correct_bias: bool,
    /// Whether the bias correction counts from the last reset instead of from the beginning.
    pub reset_bias_correction: bool,
    /// Which entries of sparse parameters are decayed.
    pub decay_mode: DecayMode,
    /// Floor for `v` in the clipping bound: an entry that never had a gradient (an unused row of an
    /// embedding) is otherwise clipped to zero until the next reset. 0 is the paper's rule.
    pub min_v: f64,
    /// `None` for dense moments; `Some(d)` to keep moments for a random fraction `d` of the entries
    /// between two resets and to update only those.
    pub density: Option<f64>,
    /// Entries that are drawn together for the mask: 1 is the paper's; 8 or 16 consecutive ones
    /// touch less memory.
    pub mask_block: usize,
    /// What happens to gradients that are not finite. An infinite entry is a spike like any other
    /// under [`NonFinite::Propagate`].
    pub nonfinite: NonFinite,
}

impl Default for SpamConfig {
    fn default() -> Self {
        Self {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-6,
            weight_decay: 0.0,
            delta_t: 500,
            warmup: 150,
            threshold: 5000.0,
            clip_after: 20,
            correct_bias: true,
            reset_bias_correction: false,
            decay_mode: DecayMode::All,
            min_v: 0.0,
            density: None,
            mask_block: 1,
            nonfinite: NonFinite::Hold,
        }
    }
}

impl SpamConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("SpamConfig::lr", self.lr)?;
        check::rate("SpamConfig::beta1", self.beta1)?;
        check::rate("SpamConfig::beta2", self.beta2)?;
        check::non_negative("SpamConfig::eps", self.eps)?;
        check::non_negative("SpamConfig::weight_decay", self.weight_decay)?;
        check::non_negative("SpamConfig::threshold", self.threshold)?;
        check::non_negative("SpamConfig::min_v", self.min_v)?;
        check::at_least_one("SpamConfig::mask_block", self.mask_block)?;
        check::require(
            self.density.is_none_or(|d| d > 0.0 && d <= 1.0),
            "SpamConfig::density",
            self.density,
            "None or a fraction in (0, 1]",
        )
    }

    /// The factor on the step `steps_since_reset` steps after a reset (the reset step itself is 0):
    /// 0.01 there, rising along half a cosine to 1.
    pub fn warmup_factor(&self, steps_since_reset: u64) -> f64 {
        if steps_since_reset >= self.warmup {
            return 1.0;
        }
        let fraction = steps_since_reset as f64 / (self.warmup + 1) as f64;
        1.0 - 0.99 * (0.5 * (1.0 + (std::f64::consts::PI * fraction).cos()))
    }

    /// Whether step `t` (from 1) begins with a reset.
    pub fn resets_at(&self, t: u64) -> bool {
        self.delta_t != 0 && t.is_multiple_of(self.delta_t)
    }

    /// Whether spikes are clipped in step `t` (from 1).
    pub fn clips_at(&self, t: u64) -> bool {
        let since = if self.delta_t == 0 {
            t
        } else {
            t % self.delta_t
        };
        self.threshold != 0.0 && t >= self.clip_after && since >= self.clip_after
    }
}
