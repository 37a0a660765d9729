//! Numbers inside a kernel, and what they are stored as.

use candle_core::{CpuStorage, DType};
use half::{bf16, f16};
use std::ops::{Add, Div, Mul, Neg, Sub};

/// The number type that a kernel computes in: `f32` or `f64`.
///
/// Only plain operations: none of them fuses a multiplication with an addition, so results do not
/// depend on the instruction set that the kernel was dispatched to.
pub trait Real:
    Copy
    + Send
    + Sync
    + PartialOrd
    + Add<Output = Self>
    + Sub<Output = Self>
    + Mul<Output = Self>
    + Div<Output = Self>
    + Neg<Output = Self>
    + 'static
{
    /// 0.
    const ZERO: Self;
    /// 1.
    const ONE: Self;
    /// Rounds to the nearest value of this type.
    fn from_f64(x: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Square root.
    fn sqrt(self) -> Self;
    /// Absolute value.
    fn abs(self) -> Self;
    /// Neither NaN nor infinite.
    fn is_finite(self) -> bool;

    /// `yes` where `condition` holds, else `no`; compiles to a blend.
    #[inline(always)]
    fn select(condition: bool, yes: Self, no: Self) -> Self {
        if condition {
            yes
        } else {
            no
        }
    }

    /// -1, 0 or 1; the sign of zero is 0 and NaN stays NaN.
    #[inline(always)]
    fn sign(self) -> Self {
        let magnitude = Self::select(self > Self::ZERO, Self::ONE, -Self::ONE);
        // `self == 0` and NaN keep themselves: 0 has no sign, NaN is not silenced.
        let moved = (self > Self::ZERO) | (self < Self::ZERO);
        Self::select(moved, magnitude, self.abs())
    }

    /// Bounds to `[-limit, limit]`; NaN stays NaN.
    #[inline(always)]
    fn clamp_abs(self, limit: Self) -> Self {
        let above = Self::select(self > limit, limit, self);
        Self::select(above < -limit, -limit, above)
    }
}

macro_rules! real {
    ($type:ty) => {
        impl Real for $type {
            const ZERO: Self = 0.0;
            const ONE: Self = 1.0;
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                x as $type
            }
            #[inline(always)]
            fn to_f64(self) -> f64 {
                f64::from(self)
            }
            #[inline(always)]
            fn sqrt(self) -> Self {
                <$type>::sqrt(self)
            }
            #[inline(always)]
            fn abs(self) -> Self {
                <$type>::abs(self)
            }
            #[inline(always)]
            fn is_finite(self) -> bool {
                <$type>::abs(self) < <$type>::INFINITY
            }
        }
    };
}
real!(f32);
real!(f64);

/// A type that parameters, gradients or state are stored as, and the [`Real`] it is computed in.
pub trait Element: Copy + Send + Sync + Default + 'static {
    /// The type that kernels compute in.
    type Compute: Real;
    /// candle's name of this type.
    const DTYPE: DType;
    /// Exact.
    fn load(self) -> Self::Compute;
    /// Rounds to nearest even.
    fn store(x: Self::Compute) -> Self;
    /// The slice inside candle's storage, if it holds this type.
    fn slice(storage: &CpuStorage) -> Option<&[Self]>;
    /// The mutable slice inside candle's storage, if it holds this type.
    fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]>;
}

macro_rules! element {
    ($type:ty, $compute:ty, $dtype:ident, $load:expr, $store:expr) => {
        impl Element for $type {
            type Compute = $compute;
            const DTYPE: DType = DType::$dtype;
            #[inline(always)]
            fn load(self) -> $compute {
                $load(self)
            }
            #[inline(always)]
            fn store(x: $compute) -> Self {
                $store(x)
            }
            fn slice(storage: &CpuStorage) -> Option<&[Self]> {
                match storage {
                    CpuStorage::$dtype(data) => Some(data),
                    _ => None,
                }
            }
            fn slice_mut(storage: &mut CpuStorage) -> Option<&mut [Self]> {
                match storage {
                    CpuStorage::$dtype(data) => Some(data),
                    _ => None,
                }
            }
        }
    };
}
element!(f32, f32, F32, |x| x, |x| x);
element!(f64, f64, F64, |x| x, |x| x);
element!(f16, f32, F16, f16::to_f32, f16::from_f32);
element!(bf16, f32, BF16, bf16_to_f32, bf16_from_f32);

#[inline(always)]
fn bf16_to_f32(x: bf16) -> f32 {
    f32::from_bits(u32::from(x.to_bits()) << 16)
}

/// Round to nearest even without a branch, so that the loop around it becomes vector code.
#[inline(always)]
fn bf16_from_f32(x: f32) -> bf16 {
    let bits = x.to_bits();
    let rounded = (bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16) as u16;
    // A NaN must not be rounded up into infinity.
    let quiet = (bits >> 16) as u16 | 0x0040;
    bf16::from_bits(if x.is_nan() { quiet } else { rounded })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_rounds_like_the_half_crate() {
        let mut bits = 0x1234_5678_u32;
        for _ in 0..200_000 {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let x = f32::from_bits(bits);
            let (ours, theirs) = (bf16_from_f32(x), bf16::from_f32(x));
            assert!(ours == theirs || (x.is_nan() && ours.is_nan()), "{x}");
        }
        for x in [0.0, -0.0, f32::INFINITY, f32::MIN_POSITIVE, f32::MAX] {
            assert_eq!(bf16_from_f32(x).to_bits(), bf16::from_f32(x).to_bits());
        }
        assert!(bf16_from_f32(f32::NAN).is_nan());
    }

    #[test]
    fn sign_and_clamp_keep_zero_and_nan() {
        assert_eq!(Real::sign(0.0_f32), 0.0);
        assert_eq!(Real::sign(-0.0_f64), 0.0);
        assert_eq!(Real::sign(-3.0_f64), -1.0);
        assert!(Real::sign(f32::NAN).is_nan());
        assert!(f32::NAN.clamp_abs(1.0).is_nan());
        assert_eq!(f32::NEG_INFINITY.clamp_abs(2.0), -2.0);
    }
}
