//! Editing: a new condition for a region, the old picture elsewhere.

use super::cost::{MaskedTarget, Reduction};
use super::sample::{ask, correct, StepRule};
use crate::error::{check, Error};
use crate::Result;
use candle_core::Tensor;
use flows::{Condition, Velocity};

/// Editing without inversion. From noise, with the velocities `v_new` and `v_old` under the wanted
/// condition and the picture's own (or the negative) one, at each of `N` steps:
///
/// ```text
/// v   = v_new + (1 - keep) cfg (v_new - v_old)                 x1 = x + (1 - t) v_old
/// x  <- x - Adam(grad weight mean k (x1 - source)^2)           several times, v_old held constant
/// x  <- x + dt v                                               k = 1 early, keep later
/// ```
///
/// The defaults are the paper's for InstaFlow; [`flux`](Self::flux) has those for FLUX.
pub struct FlowEdit {
    /// Steps `N`.
    pub steps: usize,
    /// Corrections per step.
    pub inner: usize,
    /// How far they go.
    pub rule: StepRule,
    /// The factor of the cost; with Adam it matters through `eps` alone.
    pub weight: f64,
    /// In so many first steps the whole source is met, not only what is to be kept.
    pub full_source_steps: usize,
    /// The last step that is corrected (inclusive, counted from 0).
    pub max_steps: usize,
    /// Guidance outside of what is kept.
    pub cfg: f64,
    /// Whether that guidance goes on after the last corrected step; with FLUX it does not, and later steps
    /// cost one evaluation.
    pub cfg_throughout: bool,
}

impl Default for FlowEdit {
    fn default() -> Self {
        Self {
            steps: 50,
            inner: 5,
            rule: StepRule::Adam { lr: 0.5 },
            weight: 1e-5,
            full_source_steps: 20,
            max_steps: 50,
            cfg: 2.0,
            cfg_throughout: true,
        }
    }
}

impl FlowEdit {
    /// 28 steps, the first 5 of them corrected by 3 plain gradient steps of 0.8.
    pub fn flux() -> Self {
        Self {
            steps: 28,
            inner: 3,
            rule: StepRule::Gd { scale: 0.8 },
            weight: 1000.0,
            full_source_steps: 1,
            max_steps: 4,
            cfg: 2.0,
            cfg_throughout: false,
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check::require(self.steps > 0, "FlowEdit::steps", self.steps, "at least 1")?;
        check::require(self.inner > 0, "FlowEdit::inner", self.inner, "at least 1")?;
        check::positive("FlowEdit::weight", self.weight)?;
        check::finite("FlowEdit::cfg", self.cfg)?;
        self.rule.validate()
    }

    /// Edits `source` `[rows, ...]`, from `noise` of its shape. `keep` is 1 where the source is to
    /// stay and 0 where it is edited, broadcast over the source; several regions are the product of
    /// their masks.
    ///
    /// # Errors
    /// As [`validate`](Self::validate); [`Error::Shape`]; [`Error::NonFinite`]; those of the network.
    pub fn edit(
        &self,
        velocity: &dyn Velocity,
        noise: &Tensor,
        source: &Tensor,
        keep: &Tensor,
        (of_source, wanted): (&Condition, &Condition),
    ) -> Result<Tensor> {
        self.validate()?;
        if source.dims() != noise.dims() || noise.rank() == 0 {
            let expected = format!("{:?}, that of the noise", noise.dims());
            return Err(Error::shape("the source", source.dims(), expected));
        }
        let rows = noise.dims()[0];
        let (of_source, wanted) = (of_source.for_rows(rows)?, wanted.for_rows(rows)?);
        let keep = keep.to_dtype(noise.dtype())?;
        let edited = keep.affine(-1.0, 1.0)?;
        let mut x = noise.detach();
        for step in 0..self.steps {
            let (t, dt) = (step as f64 / self.steps as f64, 1.0 / self.steps as f64);
            let new = ask(velocity, &x, t, &wanted)?.detach();
            let corrected = step <= self.max_steps;
            if !corrected && !self.cfg_throughout {
                x = finite((x + new.affine(dt, 0.0)?)?, step)?;
                continue;
            }
            let old = ask(velocity, &x, t, &of_source)?.detach();
            let lead = (&new - &old)?.affine(self.cfg, 0.0)?;
            let v = (new + lead.broadcast_mul(&edited)?)?;
            if corrected {
                let keep = match step < self.full_source_steps {
                    true => keep.ones_like()?,
                    false => keep.clone(),
                };
                let cost = MaskedTarget {
                    target: source.detach(),
                    keep,
                    weight: self.weight,
                    reduction: Reduction::MeanPerSample,
                };
                let curvature = self.rule.curvature(&cost, &x)?;
                let scale = self.rule.scale((step, t, self.steps), curvature);
                x = correct(&x, &old, 1.0 - t, &cost, &scale, self.inner)?;
            }
            x = finite((x + v.affine(dt, 0.0)?)?, step)?;
        }
        Ok(x)
    }
}

/// The sample, where it is one.
fn finite(x: Tensor, step: usize) -> Result<Tensor> {
    match tensor_core::kernels::sum_squares(&x)?.is_finite() {
        true => Ok(x),
        false => Err(Error::NonFinite {
            rule: "FlowEdit",
            what: "the sample".into(),
            step,
        }),
    }
}
