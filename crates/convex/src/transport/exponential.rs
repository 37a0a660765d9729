//! Exponentials of whole columns. The library's are called one number at a time; these have no branch and
//! no call, so that loops over them become vector code.

use pulp::Arch;

/// Added to a number, leaves its nearest integer in the low bits.
const ROUND: f64 = 6_755_399_441_055_744.0;
/// `ln 2` in two parts, of which the first times an exponent is exact.
const LN2: (f64, f64) = (6.931_471_803_691_238e-1, 1.908_214_929_270_587_7e-10);
/// `1 / n!`, from the highest power on that counts for `|r| <= ln 2 / 2`.
const TAYLOR: [f64; 14] = [
    1.605_904_383_682_161_3e-10,
    2.087_675_698_786_81e-9,
    2.505_210_838_544_172e-8,
    2.755_731_922_398_589e-7,
    2.755_731_922_398_589_3e-6,
    2.480_158_730_158_73e-5,
    1.984_126_984_126_984e-4,
    1.388_888_888_888_889e-3,
    8.333_333_333_333_333e-3,
    4.166_666_666_666_666_4e-2,
    1.666_666_666_666_666_6e-1,
    0.5,
    1.0,
    1.0,
];

/// `e^x` to two units in the last place; 0 below -708, infinite above 709.
#[inline(always)]
fn exp(x: f64) -> f64 {
    // x = n ln 2 + r, and n as the low bits of a float.
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2.0) - n * LN2.1;
    let mut p = TAYLOR[0];
    for c in &TAYLOR[1..] {
        p = p * r + c;
    }
    let power = f64::from_bits((shifted.to_bits() << 52).wrapping_add(1023 << 52));
    let y = p * power;
    let y = if x < -708.0 { 0.0 } else { y };
    if x > 709.0 {
        f64::INFINITY
    } else {
        y
    }
}

/// `out = exp(-cost * rate - 1)`
pub(super) fn of_costs(cost: &[f64], rate: f64, out: &mut [f64]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (x, c) in out.iter_mut().zip(cost) {
                *x = exp(-c * rate - 1.0);
            }
        },
    );
}

/// `out = exp((alpha - cost - shift) * rate)`, and its sum, in a fixed order.
pub(super) fn of_differences(
    alpha: &[f64],
    cost: &[f64],
    (shift, rate): (f64, f64),
    out: &mut [f64],
) -> f64 {
    const LANES: usize = 16;
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (x, (a, c)) in out.iter_mut().zip(alpha.iter().zip(cost)) {
                *x = exp((a - c - shift) * rate);
            }
            let (blocks, rest) = out.as_chunks::<LANES>();
            let mut sums = [0.0; LANES];
            for block in blocks {
                (0..LANES).for_each(|l| sums[l] += block[l]);
            }
            sums.iter().sum::<f64>() + rest.iter().sum::<f64>()
        },
    )
}

/// `tops = max(tops, (beta - cost) * rate)`
pub(super) fn raise(cost: &[f64], beta: f64, rate: f64, tops: &mut [f64]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for (top, c) in tops.iter_mut().zip(cost) {
                let x = (beta - c) * rate;
                *top = if x > *top { x } else { *top };
            }
        },
    );
}

/// `sums += exp((beta - cost) * rate - tops)`
pub(super) fn add(cost: &[f64], beta: f64, rate: f64, tops: &[f64], sums: &mut [f64]) {
    Arch::new().dispatch(
        #[inline(always)]
        || {
            for ((sum, top), c) in sums.iter_mut().zip(tops).zip(cost) {
                *sum += exp((beta - c) * rate - top);
            }
        },
    );
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn it_is_the_exponential_function() {
        let n = 400_000;
        for i in 0..=n {
            let x = -708.0 + 1417.0 * f64::from(i) / f64::from(n);
            let (ours, exact) = (exp(x), x.exp());
            assert!((ours - exact).abs() <= 4e-16 * exact, "{x}: {ours} {exact}");
        }
    }

    #[test]
    fn limits_and_nan_pass() {
        assert_eq!(exp(0.0), 1.0);
        for x in [f64::NEG_INFINITY, -709.0, -1e300] {
            assert_eq!(exp(x), 0.0);
        }
        for x in [f64::INFINITY, 710.0, 1e300] {
            assert_eq!(exp(x), f64::INFINITY);
        }
        assert!(exp(f64::NAN).is_nan());
    }
}
