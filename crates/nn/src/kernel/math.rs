//! Elementary functions that loops over f32 can be vectorized over: no branch, no call.
//!
//! The f32 forms are accurate to a few units in the last place (the normal distribution function
//! to 2e-7); f64 calls the standard library. Polynomials are summed by fused multiplications, which
//! round the same way in vectors, in tails and on processors that have to emulate them.

use super::Real;

/// Functions beyond arithmetic.
pub(crate) trait Math: Real {
    /// `e^x`; 0 for `-inf`.
    fn exp(self) -> Self;
    /// `e^x` for `x <= 0`.
    fn exp_of_negative(self) -> Self;
    /// `ln(1 + x)` for `0 <= x <= 1`.
    fn ln_1p_unit(self) -> Self;
    /// `ln x` for finite `x >= 1`; NaN stays.
    fn ln_from_one(self) -> Self;
    fn tanh(self) -> Self;
    /// The normal distribution function and its density.
    fn normal(self) -> (Self, Self);

    #[inline(always)]
    fn sigmoid(self) -> Self {
        // e^-|x| cannot overflow.
        let e = (-self.abs()).exp_of_negative();
        let small = e / (Self::ONE + e);
        let large = Self::ONE / (Self::ONE + e);
        Self::select(self < Self::ZERO, small, large)
    }

    #[inline(always)]
    fn softplus(self) -> Self {
        let positive = Self::select(self < Self::ZERO, Self::ZERO, self);
        positive + (-self.abs()).exp_of_negative().ln_1p_unit()
    }
}

/// Horner's rule, highest power first.
macro_rules! horner {
    ($x:expr; $first:expr $(, $rest:expr)*) => {{
        let x: f32 = $x;
        let p: f32 = $first;
        $(let p = p.mul_add(x, $rest);)*
        p
    }};
}

/// Added to a float, leaves its nearest integer in the low bits.
const ROUND: f32 = 12_582_912.0;

/// `2^n` of `n + ROUND`.
#[inline(always)]
fn power_of_two(shifted: f32) -> f32 {
    f32::from_bits((shifted.to_bits() << 23).wrapping_add(127 << 23))
}

impl Math for f32 {
    #[inline(always)]
    fn exp(self) -> f32 {
        f32::select(self > 88.0, f32::INFINITY, self.exp_of_negative())
    }

    #[inline(always)]
    fn exp_of_negative(self) -> f32 {
        // x = n ln 2 + r with |r| <= ln 2 / 2, and n as the low bits of a float.
        const LN2_HIGH: f32 = 0.693_145_75;
        const LN2_LOW: f32 = 1.428_606_8e-6;
        let shifted = self.mul_add(std::f32::consts::LOG2_E, ROUND);
        let n = shifted - ROUND;
        let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, self));
        // The best polynomial of this degree on the interval: 2e-9.
        let p = horner!(r; 0.001_383_679_3, 0.008_374_857, 0.041_668_23, 0.166_664_2, 0.499_999_9, 1.0, 1.0);
        f32::select(self < -87.0, 0.0, p * power_of_two(shifted))
    }

    #[inline(always)]
    fn ln_1p_unit(self) -> f32 {
        // 2 artanh(s), s <= 1/3.
        let s = self / (2.0 + self);
        let z = s * s;
        let p = horner!(z; 1.0 / 15.0, 1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 0.2, 1.0 / 3.0, 1.0);
        2.0 * s * p
    }

    #[inline(always)]
    fn ln_from_one(self) -> f32 {
        // x = 2^n m with 1 <= m < 2.
        let bits = self.to_bits();
        let n = (bits >> 23) as f32 - 127.0;
        let m = f32::from_bits((bits & 0x007f_ffff) | 0x3f80_0000);
        let small = (m - 1.0).ln_1p_unit();
        let ln = n.mul_add(std::f32::consts::LN_2, small);
        // 0 below 1, and NaN for NaN.
        f32::select(self >= 1.0, ln, 0.0 * self)
    }

    #[inline(always)]
    fn tanh(self) -> f32 {
        let a = self.abs();
        let e = Math::exp(a + a);
        let large = 1.0 - 2.0 / (e + 1.0);
        let large = f32::select(self < 0.0, -large, large);
        // Below 0.3 the difference from 1 would lose digits: the Taylor series.
        let z = self * self;
        let p = horner!(z; 62.0 / 2835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0);
        f32::select(a < 0.3, self * p, large)
    }

    #[inline(always)]
    fn normal(self) -> (f32, f32) {
        let a = self.abs();
        // e^(-a^2/2) to 2e-7 where it matters, which takes less than `exp`.
        let h = -0.5 * (a * a);
        let shifted = h.mul_add(std::f32::consts::LOG2_E, ROUND);
        let r = (shifted - ROUND).mul_add(-std::f32::consts::LN_2, h);
        let p = horner!(r; 0.008_297_62, 0.041_915_626, 0.166_675_76, 0.499_988_9, 0.999_999_7, 1.000_000_1);
        let e = f32::select(h < -87.0, 0.0, p * power_of_two(shifted));
        // The tail is e times Mills' ratio, which bends little: the best polynomial for the product
        // up to 6, beyond which e is below 2e-8.
        let bounded = f32::select(a > 6.0, 6.0, a);
        let p = horner!(bounded;
            -3.155_426_5e-7, 7.708_771e-6, -8.477_092e-5, 5.636_524_3e-4, -2.590_089_6e-3,
            9.003_846e-3, -0.025_471_816, 0.061_923_932, -0.132_805_78, 0.249_972_57,
            -0.398_940_6, 0.499_999_97);
        let tail = p * e;
        let cdf = f32::select(self < 0.0, tail, 1.0 - tail);
        (cdf, 0.398_942_3 * e)
    }
}

impl Math for f64 {
    #[inline(always)]
    fn exp(self) -> f64 {
        f64::exp(self)
    }

    #[inline(always)]
    fn exp_of_negative(self) -> f64 {
        f64::exp(self)
    }

    #[inline(always)]
    fn ln_1p_unit(self) -> f64 {
        self.ln_1p()
    }

    #[inline(always)]
    fn ln_from_one(self) -> f64 {
        f64::ln(self)
    }

    #[inline(always)]
    fn tanh(self) -> f64 {
        f64::tanh(self)
    }

    #[inline(always)]
    fn normal(self) -> (f64, f64) {
        const ROOT: f64 = std::f64::consts::FRAC_1_SQRT_2;
        // 1 - erf would lose the digits of the lower tail.
        let tail = 0.5 * candle_core::cpu::erf::erfc_f64(-self * ROOT);
        (tail, f64::exp(-0.5 * self * self) * 0.398_942_280_401_432_7)
    }
}

#[cfg(test)]
mod tests {
    use super::Math;

    fn worst(range: (f64, f64), ours: impl Fn(f32) -> f32, exact: impl Fn(f64) -> f64) -> f64 {
        let n = 200_000;
        let at = |i: i32| range.0 + (range.1 - range.0) * f64::from(i) / f64::from(n);
        let error = |i: i32| {
            let x = at(i) as f32;
            let y = exact(f64::from(x));
            (f64::from(ours(x)) - y).abs() / y.abs().max(1e-30)
        };
        (0..=n).map(error).fold(0.0, f64::max)
    }

    #[test]
    fn f32_functions_are_accurate() {
        assert!(worst((-86.9, 87.9), Math::exp, f64::exp) < 3e-7);
        assert!(worst((0.0, 1.0), Math::ln_1p_unit, f64::ln_1p) < 3e-7);
        assert!(worst((1.01, 9000.0), Math::ln_from_one, f64::ln) < 3e-7);
        assert_eq!(
            (
                Math::ln_from_one(1f32),
                Math::ln_from_one(f32::NAN).is_nan()
            ),
            (0.0, true)
        );
        assert!(worst((-9.0, 9.0), Math::tanh, f64::tanh) < 5e-7);
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        assert!(worst((-80.0, 80.0), Math::sigmoid, sigmoid) < 5e-7);
        let n = 40_000;
        for i in -n..=n {
            let x = 8.0 * i as f32 / n as f32;
            let (cdf, density) = Math::normal(x);
            let (c, d) = Math::normal(f64::from(x));
            assert!((f64::from(cdf) - c).abs() < 2e-7 && (f64::from(density) - d).abs() < 1e-7);
        }
    }

    #[test]
    fn limits_and_nan_pass() {
        assert_eq!(Math::exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(Math::exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(Math::tanh(100f32), 1.0);
        assert_eq!(Math::tanh(f32::NEG_INFINITY), -1.0);
        assert_eq!(Math::softplus(1e30f32), 1e30);
        for f in [Math::exp, Math::tanh, Math::sigmoid, Math::softplus] {
            assert!(f(f32::NAN).is_nan());
        }
        assert!(Math::normal(f32::NAN).0.is_nan());
    }
}
