//! The update of one element.

use tensor_core::kernels::{Real, Rule, Updated};

/// SPAM's update with this step's scalars.
#[derive(Debug, Clone, Copy)]
pub(super) struct SpamRule {
    /// `alpha * s`: bias-corrected rate times warm-up factor.
    pub step: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub eps: f64,
    /// Bound on `g^2 / v`; infinite when this step does not clip.
    pub threshold: f64,
    pub min_v: f64,
    /// `eta lambda`, applied to the new parameter.
    pub decay: f64,
    /// Whether the moments are taken as zero.
    pub reset: bool,
}

impl Rule<2, 10> for SpamRule {
    const NAME: &'static str = "spam";
    const DEVICE_BODY: Option<&'static str> = Some(
        "if (k[9] > 0) { s0 = 0; s1 = 0; }
            const T bound = k[6] * (s1 > k[7] ? s1 : k[7]);
            event = k[6] > 0 && g * g > bound;
            if (event) g = sign(g) * SQRT(bound);
            s0 = k[1] * s0 + k[2] * g; s1 = k[3] * s1 + k[4] * (g * g);
            p = p - k[0] * s0 / (SQRT(s1) + k[5]);
            p = p - k[8] * p;",
    );

    fn scalars(&self) -> [f64; 10] {
        [
            self.step,
            self.beta1,
            1.0 - self.beta1,
            self.beta2,
            1.0 - self.beta2,
            self.eps,
            // 0 says that nothing is clipped: infinity times a zero moment would be NaN.
            if self.threshold.is_finite() {
                self.threshold
            } else {
                0.0
            },
            self.min_v,
            self.decay,
            f64::from(u8::from(self.reset)),
        ]
    }

    #[inline(always)]
    fn update<T: Real>(k: &[T; 10], param: T, grad: T, [m, v]: [T; 2]) -> Updated<T, 2> {
        let reset = k[9] > T::ZERO;
        let (m, v) = (T::select(reset, T::ZERO, m), T::select(reset, T::ZERO, v));
        let bound = k[6] * T::select(v > k[7], v, k[7]);
        let spike = (k[6] > T::ZERO) & (grad * grad > bound);
        let grad = T::select(spike, grad.sign() * bound.sqrt(), grad);
        let m = k[1] * m + k[2] * grad;
        let v = k[3] * v + k[4] * (grad * grad);
        let param = param - k[0] * m / (v.sqrt() + k[5]);
        Updated {
            param: param - k[8] * param,
            state: [m, v],
            event: spike,
        }
    }
}

/// `p <- p - decay p` for all entries of a sparse parameter.
#[derive(Debug, Clone, Copy)]
pub(super) struct DecayRule(pub f64);

impl Rule<0, 1> for DecayRule {
    const NAME: &'static str = "decay";
    const DEVICE_BODY: Option<&'static str> = Some("p = p - k[0] * p;");

    fn scalars(&self) -> [f64; 1] {
        [self.0]
    }

    #[inline(always)]
    fn update<T: Real>(k: &[T; 1], param: T, _: T, _: [T; 0]) -> Updated<T, 0> {
        Updated {
            param: param - k[0] * param,
            state: [],
            event: false,
        }
    }
}

#[cfg(all(test, feature = "verify"))]
mod tests {
    use super::*;
    use tensor_core::kernels::check_on_host;

    #[test]
    fn the_device_texts_compute_the_same_bits() -> tensor_core::Result<()> {
        for (threshold, reset) in [(2.0, false), (f64::INFINITY, false), (2.0, true)] {
            check_on_host(SpamRule {
                step: 1e-2,
                beta1: 0.9,
                beta2: 0.999,
                eps: 1e-6,
                threshold,
                min_v: 1e-3,
                decay: 1e-3,
                reset,
            })?;
        }
        check_on_host(DecayRule(0.01))
    }
}
