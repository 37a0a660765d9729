//! The exact volume that points dominate, by sweeps.
//!
//! A sweep goes down the last objective. A point `p` that arrives at height `z` adds to every slice
//! below it what it alone covers there, so that with `c(p)` for that part in the objectives before the
//! last
//!
//! ```text
//! V(points) = sum_p z(p) c(p),        c(p) = |box of p| - V(earlier points, cut to the box of p)
//! ```
//!
//! In three objectives `c` is an area beside a staircase that a balanced tree holds: `O(n log n)`
//! altogether. In four, `c` is itself such a sweep over points that stay sorted by the third objective,
//! and ends where a point covers the rest of the box, as in Guerreiro and Fonseca's *Computing and
//! Updating Hypervolume Contributions in Up to Four Dimensions* (IEEE Transactions on Evolutionary
//! Computation, 2018): `O(n^2)` steps on short staircases. Beyond, the formula is applied until four
//! objectives are left.

use super::pareto::{dims, pareto_front};
use crate::{Error, Result};
use std::collections::BTreeMap;

/// The volume between the reference point and the points, exact for any number of objectives:
/// `O(n log n)` steps for up to three, `O(n^2)` for four, a power of `n` more for each further one.
///
/// # Errors
/// [`Error::Shape`] when numbers of objectives differ, [`Error::NonFinite`] for NaN,
/// [`Error::InvalidArgument`] without a point.
pub fn hypervolume(points: &[Vec<f64>], reference: &[f64]) -> Result<f64> {
    let d = dims(points)?;
    if reference.len() != d {
        let expected = format!("{d} objectives");
        return Err(Error::shape("reference", &[reference.len()], expected));
    }
    if reference.iter().any(|r| r.is_nan()) {
        return Err(Error::non_finite("an objective of the reference"));
    }
    let above = points
        .iter()
        .filter(|p| p.iter().zip(reference).all(|(x, r)| x > r));
    let shifted = above.map(|p| p.iter().zip(reference).map(|(x, r)| x - r).collect());
    let shifted: Vec<Vec<f64>> = shifted.collect();
    match shifted.iter().flatten().any(|x| x.is_infinite()) {
        true => Ok(f64::INFINITY),
        false => Ok(volume(shifted, d)),
    }
}

/// Volume of the union of boxes from the origin to each point; every coordinate is above 0.
fn volume(points: Vec<Vec<f64>>, d: usize) -> f64 {
    match d {
        1 => points.iter().map(|p| p[0]).fold(0.0, f64::max),
        2 => in_two(fixed(&points)),
        3 => in_three(fixed(&points)),
        4 => in_four(fixed(&points)),
        _ => beyond_four(points, d),
    }
}

fn fixed<const D: usize>(points: &[Vec<f64>]) -> Vec<[f64; D]> {
    let one = |p: &Vec<f64>| std::array::from_fn(|k| p[k]);
    points.iter().map(one).collect()
}

/// Sorts by a falling last coordinate.
fn downwards<P: AsRef<[f64]>>(points: &mut [P]) {
    let last = |p: &P| p.as_ref().last().copied().unwrap_or(0.0);
    points.sort_unstable_by(|a, b| last(b).total_cmp(&last(a)));
}

fn in_two(mut points: Vec<[f64; 2]>) -> f64 {
    downwards(&mut points);
    let (mut total, mut reach) = (0.0, 0.0);
    for [x, y] in points {
        if x > reach {
            total += (x - reach) * y;
            reach = x;
        }
    }
    total
}

fn in_three(mut points: Vec<[f64; 3]>) -> f64 {
    downwards(&mut points);
    let mut stairs = TallStairs::default();
    let gains = points.iter().map(|[x, y, z]| z * stairs.add(*x, *y));
    gains.sum()
}

/// What a point adds to the area under a staircase, walking to the left from the first stair at or
/// beyond it. `height` is that stair's; `next` gives the stair to the left and takes it away when it
/// is no higher than the point.
#[inline(always)]
fn area_gained(
    (x, y): (f64, f64),
    mut height: f64,
    mut next: impl FnMut() -> Option<(f64, f64)>,
) -> f64 {
    let (mut gain, mut right) = (0.0, x);
    loop {
        let stair = next();
        let left = stair.map_or(0.0, |s| s.0);
        gain += (right - left) * (y - height);
        match stair {
            Some((_, h)) if h < y => (right, height) = (left, h),
            _ => return gain,
        }
    }
}

/// The union of boxes from the origin to points of the plane, none of which covers another: heights
/// by where they end. The bits of positive numbers are ordered as the numbers are.
#[derive(Default)]
struct TallStairs(BTreeMap<u64, f64>);

impl TallStairs {
    /// Adds a box and gives the area that is new.
    fn add(&mut self, x: f64, y: f64) -> f64 {
        let beyond = self.0.range(x.to_bits()..).next();
        let height = beyond.map_or(0.0, |(_, h)| *h);
        if height >= y {
            return 0.0;
        }
        let gain = area_gained((x, y), height, || {
            let (key, h) = self.0.range(..=x.to_bits()).next_back()?;
            let (key, h) = (*key, *h);
            if h <= y {
                self.0.remove(&key);
            }
            Some((f64::from_bits(key), h))
        });
        self.0.insert(x.to_bits(), y);
        gain
    }
}

/// The same for few boxes, whose stairs are moved when one is put among them.
#[derive(Default)]
struct Stairs(Vec<(f64, f64)>);

impl Stairs {
    #[inline]
    fn add(&mut self, x: f64, y: f64) -> f64 {
        let at = self.0.partition_point(|s| s.0 < x);
        let height = self.0.get(at).map_or(0.0, |s| s.1);
        if height >= y {
            return 0.0;
        }
        // A stair that ends exactly at x is lower than y, and goes.
        let to = at + usize::from(self.0.get(at).is_some_and(|s| s.0 == x));
        let mut from = at;
        let stairs = &self.0;
        let gain = area_gained((x, y), height, || {
            let stair = *stairs[..from].last()?;
            from -= usize::from(stair.1 <= y);
            Some(stair)
        });
        match to - from {
            1 => self.0[from] = (x, y),
            _ => drop(self.0.splice(from..to, [(x, y)])),
        }
        gain
    }
}

fn in_four(mut points: Vec<[f64; 4]>) -> f64 {
    downwards(&mut points);
    // By a falling third coordinate; none lies below another in the first three.
    let mut front: Vec<[f64; 3]> = Vec::with_capacity(points.len());
    let mut stairs = Stairs::default();
    let mut total = 0.0;
    for [x, y, z, height] in points {
        let p = [x, y, z];
        let gain = alone(&p, &front, &mut stairs);
        if gain > 0.0 {
            front.retain(|q| !covers(&p, q));
            let at = front.partition_point(|q| q[2] >= z);
            front.insert(at, p);
            total += gain * height;
        }
    }
    total
}

fn covers(q: &[f64], p: &[f64]) -> bool {
    q.iter().zip(p).all(|(q, p)| q >= p)
}

/// The volume of the box of `p` that no box of the front covers.
fn alone(p: &[f64; 3], front: &[[f64; 3]], stairs: &mut Stairs) -> f64 {
    let [x, y, z] = *p;
    stairs.0.clear();
    let mut left = x * y * z;
    for q in front {
        let (qx, qy) = (q[0].min(x), q[1].min(y));
        left -= stairs.add(qx, qy) * q[2].min(z);
        if qx == x && qy == y {
            return if q[2] >= z { 0.0 } else { left.max(0.0) };
        }
    }
    left.max(0.0)
}

fn beyond_four(mut points: Vec<Vec<f64>>, d: usize) -> f64 {
    downwards(&mut points);
    let mut front: Vec<Vec<f64>> = vec![];
    let mut total = 0.0;
    for mut p in points {
        let height = p.pop().unwrap_or(0.0);
        if front.iter().any(|q| covers(q, &p)) {
            continue;
        }
        let cut = |q: &Vec<f64>| -> Vec<f64> { q.iter().zip(&p).map(|(q, p)| q.min(*p)).collect() };
        let shared = pareto_front(&front.iter().map(cut).collect::<Vec<_>>());
        let whole: f64 = p.iter().product();
        total += height * (whole - volume(shared, d - 1)).max(0.0);
        front.retain(|q| !covers(&p, q));
        front.push(p);
    }
    total
}
