//! The cones on which gates and activations agree.

use super::Patterns;
use crate::linalg::{axpy, dot, norm};
use faer::linalg::solvers::SolveLstsq;
use faer::Mat;

/// Each unit to the nearest point of its pattern's cone `(2 D - I) X u >= 0`. `units` hold one of length
/// `d` for each pattern.
pub(super) fn onto_cones(x: &Mat<f64>, patterns: &Patterns, units: &mut [f64]) {
    let (n, d) = (x.nrows(), x.ncols());
    let mut rows = vec![0.0; n * d];
    for (unit, column) in units.chunks_mut(d).zip(&patterns.columns) {
        for (k, row) in rows.chunks_mut(d).enumerate() {
            let sign = if column[k] { 1.0 } else { -1.0 };
            (0..d).for_each(|j| row[j] = sign * x[(k, j)]);
        }
        onto_cone(&rows, unit);
    }
}

/// A violation, over the sizes of row and unit, that counts as none.
const ROUNDING: f64 = 1e-14;

/// `u` to the nearest point with `A u >= 0`, by the rows `A`: `u + A'q` with `q >= 0` of least
/// `|u + A'q|` (the active-set method of Lawson and Hanson; `q` has at most `d` entries above 0).
fn onto_cone(rows: &[f64], unit: &mut [f64]) {
    let d = unit.len();
    let row = |k: usize| &rows[k * d..(k + 1) * d];
    let start = unit.to_vec();
    let (mut active, mut q): (Vec<usize>, Vec<f64>) = (vec![], vec![]);
    // Each round lowers the distance, so that no set of rows comes back; more rounds are rounding.
    for _ in 0..3 * rows.len() / d + 3 {
        let size = norm(&start);
        let violated = (0..rows.len() / d)
            .filter(|k| !active.contains(k))
            .map(|k| (dot(row(k), unit) / (norm(row(k)) * size), k))
            .filter(|(v, _)| *v < -ROUNDING)
            .min_by(|a, b| a.0.total_cmp(&b.0));
        let Some((_, worst)) = violated.filter(|_| active.len() < d) else {
            break;
        };
        active.push(worst);
        q.push(0.0);
        loop {
            // Of the rows themselves, not of their products: some rows nearly agree.
            let basis = Mat::from_fn(d, active.len(), |j, i| row(active[i])[j]);
            let right = Mat::from_fn(d, 1, |j, _| -start[j]);
            let solved = basis.qr().solve_lstsq(&right);
            let next: Vec<f64> = (0..active.len()).map(|i| solved[(i, 0)]).collect();
            // How far each entry may go before it is negative.
            let far: Vec<f64> = q
                .iter()
                .zip(&next)
                .map(|(q, s)| if *s > 0.0 { f64::INFINITY } else { q / (q - s) })
                .collect();
            let step = far.iter().copied().fold(1.0, f64::min);
            for (q, s) in q.iter_mut().zip(&next) {
                *q += step * (s - *q);
            }
            let left: Vec<usize> = (0..q.len()).filter(|&i| far[i] > step).collect();
            if left.len() == q.len() {
                break;
            }
            active = left.iter().map(|&i| active[i]).collect();
            q = left.iter().map(|&i| q[i]).collect();
            if q.is_empty() {
                break;
            }
        }
        unit.copy_from_slice(&start);
        active
            .iter()
            .zip(&q)
            .for_each(|(&k, q)| axpy(*q, row(k), unit));
        // A violation that is rounding.
        if !active.contains(&worst) {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::onto_cone;
    use crate::linalg::dot;
    use crate::RandomStream;

    /// The nearest point `u` of a cone: inside it, `(z - u)'u = 0`, and `(z - u)'v <= 0` inside.
    #[test]
    fn it_is_the_nearest_point() {
        for (seed, n, d) in [(0, 1, 1), (1, 5, 2), (2, 40, 3), (3, 100, 10), (4, 3, 8)] {
            for round in 0..20 {
                let mut stream = RandomStream::new(seed).split_index("round", round);
                let mut draw = |count: usize| {
                    let mut out = vec![0.0; count];
                    stream.fill_normal(&mut out);
                    out
                };
                let (mut rows, inside, z) = (draw(n * d), draw(d), draw(d));
                for row in rows.chunks_mut(d) {
                    if dot(row, &inside) < 0.0 {
                        row.iter_mut().for_each(|x| *x = -*x);
                    }
                }
                let mut u = z.clone();
                onto_cone(&rows, &mut u);
                let away: Vec<f64> = z.iter().zip(&u).map(|(z, u)| z - u).collect();
                assert!(rows.chunks(d).all(|row| dot(row, &u) > -1e-12));
                assert!(dot(&away, &u).abs() < 1e-11, "{}", dot(&away, &u));
                assert!(dot(&away, &inside) < 1e-11);
                let mut again = u.clone();
                onto_cone(&rows, &mut again);
                assert!(again.iter().zip(&u).all(|(a, b)| (a - b).abs() < 1e-12));
            }
        }
    }
}
