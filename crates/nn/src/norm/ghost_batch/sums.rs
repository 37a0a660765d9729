//! Sums over one piece: the examples of a group, for some channels.

use super::kernel::{Before, Geometry, Pairs, Piece};
use crate::kernel::{moments as run_moments, positive, sum as run_sum, Scalar};

/// Accumulators of the sums along spatial positions.
const LANES: usize = 16;

/// Mean and biased variance per channel; without `remove_mean` 0 and the second moment.
///
/// One pass: the squares are taken from a value near the mean, that of the first example.
#[inline(always)]
pub(super) fn moments<T: Scalar>(
    x: &[T],
    geometry: Geometry,
    piece: &Piece,
    remove_mean: bool,
) -> Pairs {
    let shift = match remove_mean {
        true => near(x, geometry, piece),
        false => vec![0.0; piece.channels.len()],
    };
    let (sums, squares) = shifted(x, geometry, piece, &shift);
    let n = piece.count(geometry);
    let mut pairs = Pairs {
        first: shift,
        second: squares.into_iter().map(|s| s / n).collect(),
    };
    if remove_mean {
        let both = pairs.first.iter_mut().zip(&mut pairs.second);
        for ((mean, variance), s) in both.zip(sums) {
            let off = s / n;
            *mean += off;
            *variance = positive(*variance - off * off);
        }
    }
    pairs
}

/// The mean of each channel over the beginning of the first example.
#[inline(always)]
fn near<T: Scalar>(x: &[T], geometry: Geometry, piece: &Piece) -> Vec<f64> {
    let few = geometry.spatial.min(64);
    let start = piece.rows.start * geometry.example();
    let one = |c: usize| {
        let few = &x[start + c * geometry.spatial..][..few];
        run_sum(few, |x| x).to_f64() / few.len() as f64
    };
    piece.channels.clone().map(one).collect()
}

/// Sums of `x - shift` and of its square per channel.
#[inline(always)]
fn shifted<T: Scalar>(
    x: &[T],
    geometry: Geometry,
    piece: &Piece,
    shift: &[f64],
) -> (Vec<f64>, Vec<f64>) {
    let example = geometry.example();
    let n = shift.len();
    let (mut sums, mut squares) = (vec![0.0; n], vec![0.0; n]);
    for row in piece.rows.clone() {
        let at = row * example + piece.channels.start * geometry.spatial;
        let x = &x[at..at + n * geometry.spatial];
        let totals = sums.iter_mut().zip(&mut squares).zip(shift);
        if geometry.spatial == 1 {
            for (x, ((s, q), shift)) in x.iter().zip(totals) {
                let d = x.to_f64() - shift;
                *s += d;
                *q += d * d;
            }
            continue;
        }
        for (x, ((s, q), shift)) in x.chunks_exact(geometry.spatial).zip(totals) {
            let (sum, square) = run_moments(x, *shift);
            *s += sum;
            *q += square;
        }
    }
    (sums, squares)
}

/// Per channel of the piece the sums of `dy` and of `dy xhat`, where `xhat = (x - mean) inverse`
/// and both vectors run over all channels. `before` gives the gradient before the activation on a
/// run of memory that belongs to some channels of the piece.
#[inline(always)]
pub(super) fn gradient_sums<T: Scalar>(
    x: &[T],
    geometry: Geometry,
    piece: &Piece,
    (mean, inverse): (&[f64], &[f64]),
    before: &Before<'_, T>,
) -> Pairs {
    let (example, start) = (geometry.example(), piece.channels.start);
    let n = piece.channels.len();
    let mut sums = Pairs {
        first: vec![0.0; n],
        second: vec![0.0; n],
    };
    let mean = &mean[piece.channels.clone()];
    let mut buffer = vec![];
    for row in piece.rows.clone() {
        let at = row * example + start * geometry.spatial;
        if geometry.spatial == 1 {
            let dz = before.activation(at..at + n, 0..n, &mut buffer);
            let values = x[at..at + n].iter().zip(dz).zip(mean);
            let totals = sums.first.iter_mut().zip(&mut sums.second);
            for (((x, dz), mean), (s, sx)) in values.zip(totals) {
                let dz = dz.to_f64();
                *s += dz;
                *sx += dz * (x.to_f64() - mean);
            }
            continue;
        }
        for (c, mean) in mean.iter().enumerate() {
            let range = at + c * geometry.spatial..at + (c + 1) * geometry.spatial;
            let dz = before.activation(range.clone(), c..c + 1, &mut buffer);
            let (sum, along) = products(&x[range], dz, *mean);
            sums.first[c] += sum;
            sums.second[c] += along;
        }
    }
    let scales = &inverse[piece.channels.clone()];
    sums.second
        .iter_mut()
        .zip(scales)
        .for_each(|(s, i)| *s *= i);
    sums
}

/// Sums of `dz` and of `dz (x - mean)` in a fixed order.
#[inline(always)]
fn products<T: Scalar>(x: &[T], dz: &[T], mean: f64) -> (f64, f64) {
    let (mut lanes, mut lanes_x) = ([0.0; LANES], [0.0; LANES]);
    let (xs, dzs) = (x.chunks_exact(LANES), dz.chunks_exact(LANES));
    for (l, (x, dz)) in xs.remainder().iter().zip(dzs.remainder()).enumerate() {
        lanes[l] = dz.to_f64();
        lanes_x[l] = dz.to_f64() * (x.to_f64() - mean);
    }
    for (x, dz) in xs.zip(dzs) {
        for l in 0..LANES {
            lanes[l] += dz[l].to_f64();
            lanes_x[l] += dz[l].to_f64() * (x[l].to_f64() - mean);
        }
    }
    (lanes.into_iter().sum(), lanes_x.into_iter().sum())
}
