//! Vectors of whichever width the processor has.

use crate::kernels::Real;
use pulp::Simd;

/// A number with its vector type in each instruction set.
pub trait Lanes: Real {
    /// The vector.
    type V<S: Simd>: Copy;

    /// `x` in every place.
    fn splat<S: Simd>(simd: S, x: Self) -> Self::V<S>;
    /// `a b + c`, rounded once where the processor can.
    fn mul_add<S: Simd>(simd: S, a: Self::V<S>, b: Self::V<S>, c: Self::V<S>) -> Self::V<S>;

    /// Numbers in a vector.
    #[inline(always)]
    fn lanes<S: Simd>() -> usize {
        size_of::<Self::V<S>>() / size_of::<Self>()
    }

    /// The vector at `p`.
    ///
    /// # Safety
    /// A whole vector can be read at `p`.
    #[inline(always)]
    unsafe fn load<S: Simd>(p: *const Self) -> Self::V<S> {
        // SAFETY: the caller's promise; vectors are plain numbers.
        unsafe { p.cast::<Self::V<S>>().read_unaligned() }
    }

    /// Writes a vector to `p`.
    ///
    /// # Safety
    /// A whole vector can be written at `p`.
    #[inline(always)]
    unsafe fn store<S: Simd>(p: *mut Self, v: Self::V<S>) {
        // SAFETY: the caller's promise.
        unsafe { p.cast::<Self::V<S>>().write_unaligned(v) }
    }
}

impl Lanes for f32 {
    type V<S: Simd> = S::f32s;

    #[inline(always)]
    fn splat<S: Simd>(simd: S, x: f32) -> S::f32s {
        simd.splat_f32s(x)
    }

    #[inline(always)]
    fn mul_add<S: Simd>(simd: S, a: S::f32s, b: S::f32s, c: S::f32s) -> S::f32s {
        simd.mul_add_e_f32s(a, b, c)
    }
}

impl Lanes for f64 {
    type V<S: Simd> = S::f64s;

    #[inline(always)]
    fn splat<S: Simd>(simd: S, x: f64) -> S::f64s {
        simd.splat_f64s(x)
    }

    #[inline(always)]
    fn mul_add<S: Simd>(simd: S, a: S::f64s, b: S::f64s, c: S::f64s) -> S::f64s {
        simd.mul_add_e_f64s(a, b, c)
    }
}
