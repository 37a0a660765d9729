//! Denoising by total variation.

use faer::Mat;

const ITERATIONS: usize = 200;
/// Relative change of the energy at which the iteration stops.
const STILL: f64 = 2e-4;

/// `argmin_u |u - f|^2 / 2 + weight TV(u)` with the isotropic total variation, by Chambolle's dual
/// projection (2004) with step 1/4: at most 200 iterations, or until the energy changes by less than
/// `2e-4` of its first value.
pub(super) fn denoise(f: &Mat<f64>, weight: f64) -> Mat<f64> {
    let (n, m) = (f.nrows(), f.ncols());
    // The dual field, zero on the far border.
    let (mut down, mut right) = (Mat::<f64>::zeros(n, m), Mat::<f64>::zeros(n, m));
    let mut out = f.clone();
    let (mut first, mut before) = (0.0, 0.0);
    for iteration in 0..ITERATIONS {
        let shift = Mat::from_fn(n, m, |i, j| {
            let above = if i > 0 { down[(i - 1, j)] } else { 0.0 };
            let left = if j > 0 { right[(i, j - 1)] } else { 0.0 };
            above + left - down[(i, j)] - right[(i, j)]
        });
        out = f + &shift;
        let mut energy = shift.squared_norm_l2();
        let tau = 0.25;
        for j in 0..m {
            for i in 0..n {
                let d = if i + 1 < n {
                    out[(i + 1, j)] - out[(i, j)]
                } else {
                    0.0
                };
                let r = if j + 1 < m {
                    out[(i, j + 1)] - out[(i, j)]
                } else {
                    0.0
                };
                let norm = d.hypot(r);
                energy += weight * norm;
                let scale = 1.0 + norm * tau / weight;
                down[(i, j)] = (down[(i, j)] - tau * d) / scale;
                right[(i, j)] = (right[(i, j)] - tau * r) / scale;
            }
        }
        energy /= (n * m) as f64;
        if iteration == 0 {
            first = energy;
        } else if (before - energy).abs() < STILL * first {
            break;
        }
        before = energy;
    }
    out
}
