//! Fronts, what they cover, and how varied a set of objects is. Every objective is maximized; a
//! point is a slice of objectives.

pub use super::hypervolume::hypervolume;

use crate::{Error, Result};

pub(super) fn dims(points: &[Vec<f64>]) -> Result<usize> {
    let d = points.first().map_or(0, Vec::len);
    if d == 0 {
        return Err(Error::argument(
            "points",
            points.len(),
            "at least one point with objectives",
        ));
    }
    if let Some(other) = points.iter().find(|p| p.len() != d) {
        let expected = format!("{d} objectives, as the first");
        return Err(Error::shape("point", &[other.len()], expected));
    }
    if points.iter().flatten().any(|x| x.is_nan()) {
        return Err(Error::non_finite("an objective"));
    }
    Ok(d)
}

/// Whether `a` is at least as good as `b` everywhere and better somewhere.
pub fn dominates(a: &[f64], b: &[f64]) -> bool {
    let mut better = false;
    for (x, y) in a.iter().zip(b) {
        if x < y {
            return false;
        }
        better |= x > y;
    }
    better
}

/// Which points no other one dominates; equal points all count. A point with NaN is dominated by
/// every other.
pub fn pareto_mask(points: &[Vec<f64>]) -> Vec<bool> {
    let spoiled = |p: &Vec<f64>| p.iter().any(|x| x.is_nan());
    let whole = points.iter().any(|p| !spoiled(p));
    // In the order of falling sums nobody is dominated by a later one.
    let sum = |p: &Vec<f64>| p.iter().sum::<f64>();
    let mut order: Vec<usize> = (0..points.len()).collect();
    order.sort_by(|a, b| sum(&points[*b]).total_cmp(&sum(&points[*a])));
    let (mut mask, mut front) = (vec![false; points.len()], Vec::<usize>::new());
    for i in order {
        let candidate = &points[i];
        if whole && spoiled(candidate) {
            continue;
        }
        if !front.iter().any(|k| dominates(&points[*k], candidate)) {
            // Rounded sums may tie where one still dominates.
            front.retain(|k| {
                let keep = !dominates(candidate, &points[*k]);
                mask[*k] = keep;
                keep
            });
            mask[i] = true;
            front.push(i);
        }
    }
    mask
}

/// The points that no other one dominates, each value once.
pub fn pareto_front(points: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let mut front: Vec<Vec<f64>> = vec![];
    for (point, _) in points.iter().zip(pareto_mask(points)).filter(|(_, m)| *m) {
        if !front.contains(point) {
            front.push(point.clone());
        }
    }
    front
}

/// Mean over the true front of the smallest distance that a found point falls short by
/// (`IGD+`, Ishibuchi et al., 2015): 0 when every true point is reached or dominated.
///
/// # Errors
/// As [`hypervolume`].
pub fn igd_plus(found: &[Vec<f64>], front: &[Vec<f64>]) -> Result<f64> {
    same_dims(found, front)?;
    let short = |z: &Vec<f64>, p: &Vec<f64>| {
        let parts = z.iter().zip(p).map(|(z, p)| (z - p).max(0.0).powi(2));
        parts.sum::<f64>().sqrt()
    };
    let nearest = |z| {
        found
            .iter()
            .map(|p| short(z, p))
            .fold(f64::INFINITY, f64::min)
    };
    Ok(front.iter().map(nearest).sum::<f64>() / front.len() as f64)
}

/// The R2 indicator: mean over `weights` of the smallest weighted Chebyshev distance to `utopia`,
/// `min_p max_k w_k |utopia_k - p_k|`. Smaller is better.
///
/// # Errors
/// As [`hypervolume`].
pub fn r2(found: &[Vec<f64>], utopia: &[f64], weights: &[Vec<f64>]) -> Result<f64> {
    same_dims(found, weights)?;
    same_dims(found, &[utopia.to_vec()])?;
    let distance = |w: &[f64], p: &[f64]| {
        let parts = w
            .iter()
            .zip(utopia)
            .zip(p)
            .map(|((w, u), p)| w * (u - p).abs());
        parts.fold(0.0, f64::max)
    };
    let nearest = |w: &Vec<f64>| {
        found
            .iter()
            .map(|p| distance(w, p))
            .fold(f64::INFINITY, f64::min)
    };
    Ok(weights.iter().map(nearest).sum::<f64>() / weights.len() as f64)
}

fn same_dims(a: &[Vec<f64>], b: &[Vec<f64>]) -> Result<()> {
    let (d, e) = (dims(a)?, dims(b)?);
    match d == e {
        true => Ok(()),
        false => Err(Error::shape("points", &[e], format!("{d} objectives"))),
    }
}

/// The share of the true front's points that were found, within `tolerance` in every objective.
///
/// # Errors
/// As [`hypervolume`].
pub fn pareto_coverage(found: &[Vec<f64>], front: &[Vec<f64>], tolerance: f64) -> Result<f64> {
    same_dims(found, front)?;
    let near =
        |z: &Vec<f64>, p: &Vec<f64>| z.iter().zip(p).all(|(z, p)| (z - p).abs() <= tolerance);
    let hit = front
        .iter()
        .filter(|z| found.iter().any(|p| near(z, p)))
        .count();
    Ok(hit as f64 / front.len() as f64)
}

/// Mean distance of all pairs of different objects; 0 for fewer than two.
pub fn diversity<S>(objects: &[S], distance: impl Fn(&S, &S) -> f64) -> f64 {
    let n = objects.len();
    if n < 2 {
        return 0.0;
    }
    let mut sum = 0.0;
    for (i, a) in objects.iter().enumerate() {
        sum += objects[i + 1..].iter().map(|b| distance(a, b)).sum::<f64>();
    }
    sum / (n * (n - 1) / 2) as f64
}

/// The modes among objects: those with a score of at least `threshold`, best first, that are further
/// than `separation` from every mode before them. Gives their places.
pub fn modes<S>(
    objects: &[S],
    scores: &[f64],
    threshold: f64,
    separation: f64,
    distance: impl Fn(&S, &S) -> f64,
) -> Vec<usize> {
    let count = objects.len().min(scores.len());
    let mut order: Vec<usize> = (0..count).filter(|i| scores[*i] >= threshold).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let mut found: Vec<usize> = vec![];
    for i in order {
        let apart = |k: &usize| distance(&objects[i], &objects[*k]) > separation;
        if found.iter().all(apart) {
            found.push(i);
        }
    }
    found
}

/// Smallest number of insertions, deletions and substitutions between two strings.
pub fn edit_distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
