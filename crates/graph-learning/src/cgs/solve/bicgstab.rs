//! Stabilized bi-conjugate gradients (van der Vorst, 1992) for one right-hand side.

use super::SolveReport;

/// Solves `apply(x) = b` from zero until `|b - apply(x)| <= tol |b|`, all in f64. The residual that is
/// reported is computed from the solution, not the recurrence.
pub(super) fn bicgstab(
    apply: impl Fn(&[f64]) -> Vec<f64>,
    b: &[f64],
    tol: f64,
    max_iter: usize,
) -> (Vec<f64>, SolveReport) {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let scale = dot(b, b).sqrt();
    let mut x = vec![0.0; b.len()];
    let mut iterations = 0;
    if scale > 0.0 {
        let (mut r, shadow) = (b.to_vec(), b.to_vec());
        let mut p = r.clone();
        let mut rho = dot(&shadow, &r);
        while iterations < max_iter && dot(&r, &r).sqrt() > tol * scale {
            let v = apply(&p);
            let alpha = rho / dot(&shadow, &v);
            let s: Vec<f64> = r.iter().zip(&v).map(|(r, v)| r - alpha * v).collect();
            let t = apply(&s);
            let tt = dot(&t, &t);
            let omega = if tt > 0.0 { dot(&t, &s) / tt } else { 0.0 };
            for i in 0..x.len() {
                x[i] += alpha * p[i] + omega * s[i];
                r[i] = s[i] - omega * t[i];
            }
            let next = dot(&shadow, &r);
            let beta = next / rho * (alpha / omega);
            rho = next;
            iterations += 1;
            if !(beta.is_finite() && alpha.is_finite()) {
                // A breakdown: the residual below says what was reached.
                break;
            }
            for i in 0..p.len() {
                p[i] = r[i] + beta * (p[i] - omega * v[i]);
            }
        }
    }
    let applied = apply(&x);
    let error: f64 = b.iter().zip(&applied).map(|(b, a)| (b - a) * (b - a)).sum();
    let residual = error.sqrt() / scale.max(f64::MIN_POSITIVE);
    let report = SolveReport {
        iterations,
        residual,
        // The true residual may lag behind the recurrence by rounding.
        converged: residual <= 10.0 * tol,
    };
    (x, report)
}
