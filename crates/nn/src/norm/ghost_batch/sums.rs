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
    let mut mean = vec![0.0; piece.channels.len()];
    if remove_mean {
        sum(x, geometry, piece, &mut mean, |x, _| x);
        mean.iter_mut().for_each(|m| *m /= n);
    }
    let mut var = vec![0.0; piece.channels.len()];
    let center = mean.clone();
    sum(x, geometry, piece, &mut var, |x, c| {
        let d = x - center[c];
        d * d
    });
    var.iter_mut().for_each(|v| *v /= n);
    Pairs {
        first: mean,
        second: var,
    }
}

/// Sums `f(x, channel in the piece)` per channel.
#[inline(always)]
fn sum<T: Scalar>(
    x: &[T],
    geometry: Geometry,
    piece: &Piece,
    total: &mut [f64],
    f: impl Fn(f64, usize) -> f64,
) {
    let example = geometry.example();
    if geometry.spatial == 1 {
        for row in piece.rows.clone() {
            let at = row * example + piece.channels.start;
            let x = &x[at..at + total.len()];
            for (c, (t, x)) in total.iter_mut().zip(x).enumerate() {
                *t += f(x.to_f64(), c);
            }
        }
        return;
    }
    for (c, t) in total.iter_mut().enumerate() {
        let mut lanes = [0.0; LANES];
        for row in piece.rows.clone() {
            let at = row * example + (piece.channels.start + c) * geometry.spatial;
            for x in x[at..at + geometry.spatial].chunks(LANES) {
                for (lane, x) in lanes.iter_mut().zip(x) {
                    *lane += f(x.to_f64(), c);
                }
            }
        }
        *t = lanes.into_iter().sum();
    }
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
                for (x, dy) in x[range.clone()].chunks(LANES).zip(dy[range].chunks(LANES)) {
                    for ((x, dy), (s, sx)) in
                        x.iter().zip(dy).zip(lanes.iter_mut().zip(&mut lanes_x))
                    {
                        let dy = dy.to_f64();
                        *s += dy;
                        *sx += dy * (x.to_f64() - mean);
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
