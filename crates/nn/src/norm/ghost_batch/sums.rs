//! Sums over one piece: the examples of a group, for some channels.

use super::kernel::{Geometry, Pairs, Piece};
use crate::kernel::Scalar;

/// Accumulators of the sums along spatial positions.
const LANES: usize = 8;

/// Mean and biased variance per channel; without `remove_mean` 0 and the second moment.
#[inline(always)]
pub(super) fn moments<T: Scalar>(
    x: &[T],
    geometry: Geometry,
    piece: &Piece,
    remove_mean: bool,
) -> Pairs {
    let n = piece.count(geometry);
    let zero = vec![0.0; piece.channels.len()];
    let mean: Vec<f64> = match remove_mean {
        true => {
            let sums = sum(x, geometry, piece, &zero, |d| d);
            sums.into_iter().map(|s| s / n).collect()
        }
        false => zero,
    };
    let squares = sum(x, geometry, piece, &mean, |d| d * d);
    Pairs {
        second: squares.into_iter().map(|s| s / n).collect(),
        first: mean,
    }
}

/// Sums `f(x - center)` per channel.
#[inline(always)]
fn sum<T: Scalar>(
    x: &[T],
    geometry: Geometry,
    piece: &Piece,
    center: &[f64],
    f: impl Fn(f64) -> f64,
) -> Vec<f64> {
    let example = geometry.example();
    let mut total = vec![0.0; center.len()];
    if geometry.spatial == 1 {
        for row in piece.rows.clone() {
            let at = row * example + piece.channels.start;
            let x = &x[at..at + total.len()];
            for ((t, x), center) in total.iter_mut().zip(x).zip(center) {
                *t += f(x.to_f64() - center);
            }
        }
        return total;
    }
    for ((c, t), center) in total.iter_mut().enumerate().zip(center) {
        let mut lanes = [0.0; LANES];
        for row in piece.rows.clone() {
            let at = row * example + (piece.channels.start + c) * geometry.spatial;
            let full = x[at..at + geometry.spatial].chunks_exact(LANES);
            for (lane, x) in lanes.iter_mut().zip(full.remainder()) {
                *lane += f(x.to_f64() - center);
            }
            for x in full {
                for l in 0..LANES {
                    lanes[l] += f(x[l].to_f64() - center);
                }
            }
        }
        *t = lanes.into_iter().sum();
    }
    total
}

/// Per channel of the piece the sums of `dy` and of `dy xhat`, where `xhat = (x - mean) inverse`
/// and both vectors run over all channels.
#[inline(always)]
pub(super) fn gradient_sums<T: Scalar>(
    x: &[T],
    dy: &[T],
    geometry: Geometry,
    piece: &Piece,
    mean: &[f64],
    inverse: &[f64],
) -> Pairs {
    let (example, start) = (geometry.example(), piece.channels.start);
    let n = piece.channels.len();
    let mut sums = Pairs {
        first: vec![0.0; n],
        second: vec![0.0; n],
    };
    let mean = &mean[piece.channels.clone()];
    if geometry.spatial == 1 {
        for row in piece.rows.clone() {
            let at = row * example + start;
            let values = x[at..at + n].iter().zip(&dy[at..at + n]).zip(mean);
            let totals = sums.first.iter_mut().zip(&mut sums.second);
            for (((x, dy), mean), (s, sx)) in values.zip(totals) {
                let dy = dy.to_f64();
                *s += dy;
                *sx += dy * (x.to_f64() - mean);
            }
        }
    } else {
        for (c, mean) in mean.iter().enumerate() {
            let (mut lanes, mut lanes_x) = ([0.0; LANES], [0.0; LANES]);
            for row in piece.rows.clone() {
                let at = row * example + (start + c) * geometry.spatial;
                let range = at..at + geometry.spatial;
                let (xs, dys) = (&x[range.clone()], &dy[range]);
                let (xs, dys) = (xs.chunks_exact(LANES), dys.chunks_exact(LANES));
                for (l, (x, dy)) in xs.remainder().iter().zip(dys.remainder()).enumerate() {
                    lanes[l] += dy.to_f64();
                    lanes_x[l] += dy.to_f64() * (x.to_f64() - mean);
                }
                for (x, dy) in xs.zip(dys) {
                    for l in 0..LANES {
                        lanes[l] += dy[l].to_f64();
                        lanes_x[l] += dy[l].to_f64() * (x[l].to_f64() - mean);
                    }
                }
            }
            sums.first[c] = lanes.into_iter().sum();
            sums.second[c] = lanes_x.into_iter().sum();
        }
    }
    let scales = &inverse[piece.channels.clone()];
    sums.second
        .iter_mut()
        .zip(scales)
        .for_each(|(s, i)| *s *= i);
    sums
}
