//! Clipping each entry by its own past.

use super::{Flow, GradientTransform};
use crate::error::check;
use crate::fused::{counters, part, read_counters};
use crate::gradients::Gradients;
use crate::{Result, State};
use candle_core::{Tensor, Var};
use tensor_core::checkpoint::{expect_state, spec_of};
use tensor_core::kernels::{FusedUpdate, Real, Rule, StateDType, Updated, Work};

/// Configuration of [`SpikeClip`], with the values of SPAM (arXiv 2501.06842).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SpikeClipConfig {
    /// Entries with `g^2 > threshold * v` are clipped to that bound.
    pub threshold: f64,
    /// Decay of the second moment `v`, which sees the clipped gradients.
    pub beta2: f64,
    /// No clipping in the first so many steps, while `v` is not trustworthy.
    pub clip_after: u64,
    /// Floor for `v` in the bound: without one an entry that never had a gradient is clipped to
    /// zero for ever.
    pub min_v: f64,
}

impl Default for SpikeClipConfig {
    fn default() -> Self {
        Self {
            threshold: 5000.0,
            beta2: 0.999,
            clip_after: 20,
            min_v: 0.0,
        }
    }
}

impl SpikeClipConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::positive("SpikeClipConfig::threshold", self.threshold)?;
        check::rate("SpikeClipConfig::beta2", self.beta2)?;
        check::non_negative("SpikeClipConfig::min_v", self.min_v)
    }
}

/// The "parameter" is the clipped gradient; the state is `v`.
#[derive(Debug, Clone, Copy)]
struct SpikeRule {
    /// 0 for no clipping.
    threshold: f64,
    beta2: f64,
    min_v: f64,
}

impl Rule<1, 4> for SpikeRule {
    const NAME: &'static str = "spike clip";
    const DEVICE_BODY: Option<&'static str> = Some(
        "const T bound = k[0] * (s0 > k[1] ? s0 : k[1]);
            event = k[0] > 0 && g * g > bound;
            if (event) g = sign(g) * SQRT(bound);
            const T v = k[2] * s0 + k[3] * (g * g);
            s0 = v - v == 0 ? v : s0;
            p = g;",
    );

    fn scalars(&self) -> [f64; 4] {
        [self.threshold, self.min_v, self.beta2, 1.0 - self.beta2]
    }

    #[inline(always)]
    fn update<T: Real>(k: &[T; 4], _: T, grad: T, [v]: [T; 1]) -> Updated<T, 1> {
        let bound = k[0] * T::select(v > k[1], v, k[1]);
        let spike = (k[0] > T::ZERO) & (grad * grad > bound);
        let clipped = T::select(spike, grad.sign() * bound.sqrt(), grad);
        let new = k[2] * v + k[3] * (clipped * clipped);
        Updated {
            param: clipped,
            // What is not finite never enters the moment.
            state: [T::select(new.is_finite(), new, v)],
            event: spike,
        }
    }
}

/// The spike clipping of SPAM for any optimizer: where `g^2 > theta v`, the entry becomes
/// `sign(g) sqrt(theta v)`; then `v <- beta2 v + (1 - beta2) g^2`. An infinite entry is a spike
/// like any other; NaN passes through, for the optimizer's policy to treat, and leaves `v` alone.
///
/// Keeps `v` and one buffer for the clipped gradients.
#[derive(Debug)]
pub struct SpikeClip {
    config: SpikeClipConfig,
    params: Vec<(String, Var)>,
    /// Over buffers of ours that receive the clipped gradients.
    update: FusedUpdate<1>,
    /// The same buffers as tensors to hand out.
    views: Vec<Tensor>,
    step: u64,
    clipped: u64,
}

impl SpikeClip {
    /// Spike clipping for these parameters.
    ///
    /// # Errors
    /// Those of [`SpikeClipConfig::validate`]; an error for integer parameters.
    pub fn new(params: &[(String, Var)], config: SpikeClipConfig) -> Result<Self> {
        config.validate()?;
        let mut buffers = Vec::with_capacity(params.len());
        for (name, var) in params {
            let zeros = Var::zeros(var.shape(), var.dtype(), var.device())?;
            buffers.push((name.clone(), zeros));
        }
        Ok(Self {
            config,
            params: params.to_vec(),
            views: buffers.iter().map(|(_, var)| var.detach()).collect(),
            update: FusedUpdate::new(buffers, StateDType::Compute)?,
            step: 0,
            clipped: 0,
        })
    }

    /// Entries that were clipped in the last step.
    pub fn clipped(&self) -> u64 {
        self.clipped
    }

    /// Bytes of the second moments and of the clipped gradients.
    pub fn state_bytes(&self) -> usize {
        let buffer = |(_, var): &(String, Var)| var.elem_count() * var.dtype().size_in_bytes();
        self.update.state_bytes() + self.params.iter().map(buffer).sum::<usize>()
    }
}

impl GradientTransform for SpikeClip {
    fn apply(&mut self, gradients: &mut Gradients<'_>) -> Result<Flow> {
        super::expect_params(&self.params, gradients)?;
        let clips = self.step + 1 >= self.config.clip_after;
        let rule = SpikeRule {
            threshold: if clips { self.config.threshold } else { 0.0 },
            beta2: self.config.beta2,
            min_v: self.config.min_v,
        };
        // A map along the parameter means another parameter than the buffer: apply it first.
        super::without_projection(gradients)?;
        self.update.step(false, |i| {
            Ok(gradients.get(i).map(|(grad, map)| Work { grad, rule, map }))
        })?;
        self.clipped = 0;
        for i in 0..gradients.len() {
            if gradients.get(i).is_some() {
                self.clipped += self.update.events(i);
                gradients.replace(i, self.views[i].clone());
            }
        }
        self.step += 1;
        Ok(Flow::Continue)
    }

    fn state(&self) -> Result<State> {
        let mut state = State::new();
        state.insert("step".into(), counters(&[self.step])?);
        for (i, (name, _)) in self.params.iter().enumerate() {
            state.insert(format!("v.{name}"), self.update.state(i, 0)?);
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &State) -> Result<()> {
        expect_state(state, spec_of(&self.state()?))?;
        let [step] = read_counters(part(state, "step")?)?;
        for (i, (name, _)) in self.params.iter().enumerate() {
            self.update
                .load_state(i, 0, part(state, &format!("v.{name}"))?)?;
        }
        self.step = step;
        Ok(())
    }
}

#[cfg(all(test, feature = "verify"))]
mod tests {
    use super::*;

    #[test]
    fn the_device_text_computes_the_same_bits() -> tensor_core::Result<()> {
        for threshold in [0.0, 2.0] {
            tensor_core::kernels::check_on_host(SpikeRule {
                threshold,
                beta2: 0.999,
                min_v: 1e-3,
            })?;
        }
        Ok(())
    }
}
