//! A tree-structured Parzen estimator: settings are drawn where good ones were dense and bad ones
//! were not.
//!
//! *Algorithms for Hyper-Parameter Optimization*, Bergstra et al., NeurIPS 2011. With the points seen so
//! far split into the best `n_l = min(ceil(n / 10), 25)` and the others, each dimension has two densities
//! `l` and `g`; of a number of draws from `l` the one with the largest `l(x) / g(x)` is tried, which is
//! the one with the largest expected improvement (section 4). Dimensions are treated as independent.
//!
//! - On an interval, a density is the even mixture of a Gaussian around each point, as wide as the
//!   farther of its two neighbors, and one around the middle as wide as the interval, all truncated to it.
//! - Over choices, it is their frequency, with one point on each of them beforehand: fewer, and the search
//!   stays for good with the first choice that did well.

use crate::{Error, Result};
use candle_core::cpu::erf::erf_f64;
use std::f64::consts::{SQRT_2, TAU};
use tensor_core::random::RandomStream;

/// The values of one setting.
#[derive(Debug, Clone, PartialEq)]
pub enum Dimension {
    /// An interval of positive numbers, on a logarithmic scale.
    Logarithmic {
        /// The smallest.
        low: f64,
        /// The largest.
        high: f64,
    },
    /// Some numbers, without an order.
    Choice(Vec<f64>),
}

impl Dimension {
    fn validate(&self) -> Result<()> {
        let good = match self {
            Self::Logarithmic { low, high } => *low > 0.0 && low < high && high.is_finite(),
            Self::Choice(values) => !values.is_empty() && values.iter().all(|v| v.is_finite()),
        };
        if good {
            return Ok(());
        }
        let expected = "0 < low < high, or at least one finite choice";
        Err(Error::Trial(format!("{self:?}: expected {expected}")))
    }

    /// A value without regard to what was seen.
    pub fn draw(&self, rng: &mut RandomStream) -> Result<f64> {
        Ok(match self {
            Self::Logarithmic { low, high } => {
                let (low, high) = (low.ln(), high.ln());
                (low + rng.next_uniform() * (high - low)).exp()
            }
            Self::Choice(values) => values[rng.below(values.len())?],
        })
    }

    fn density(&self, seen: &[f64]) -> Density<'_> {
        match self {
            Self::Logarithmic { low, high } => {
                let points = seen.iter().map(|x| x.ln()).collect();
                Density::Mixture(Mixture::new((low.ln(), high.ln()), points))
            }
            Self::Choice(values) => {
                let count = |v: &f64| seen.iter().filter(|x| *x == v).count() as f64;
                let all = (values.len() + seen.len()) as f64;
                let chances = values.iter().map(|v| (count(v) + 1.0) / all).collect();
                Density::Frequencies(values, chances)
            }
        }
    }
}

/// A density over the values of a dimension.
enum Density<'a> {
    Mixture(Mixture),
    Frequencies(&'a [f64], Vec<f64>),
}

impl Density<'_> {
    fn draw(&self, rng: &mut RandomStream) -> Result<f64> {
        match self {
            Self::Mixture(mixture) => Ok(mixture.draw(rng)?.exp()),
            Self::Frequencies(values, chances) => {
                let mut goal = rng.next_uniform();
                let chosen = chances.iter().position(|p| {
                    goal -= p;
                    goal < 0.0
                });
                // Rounding may leave the goal beyond the last chance.
                Ok(values[chosen.unwrap_or(values.len() - 1)])
            }
        }
    }

    /// The logarithm of the density, up to a term that is the same for all densities of the dimension.
    fn ln(&self, x: f64) -> f64 {
        match self {
            Self::Mixture(mixture) => mixture.at(x.ln()).ln(),
            Self::Frequencies(values, chances) => {
                let found = values.iter().zip(chances).find(|(v, _)| **v == x);
                found.map_or(f64::NEG_INFINITY, |(_, p)| p.ln())
            }
        }
    }
}

/// Gaussians of equal weight, truncated to an interval.
struct Mixture {
    interval: (f64, f64),
    /// Centers and deviations.
    parts: Vec<(f64, f64)>,
}

impl Mixture {
    fn new(interval: (f64, f64), mut points: Vec<f64>) -> Self {
        let (low, high) = interval;
        let (middle, range) = (0.5 * (low + high), high - low);
        points.push(middle);
        points.sort_by(f64::total_cmp);
        // Many points on one spot must not leave the rest of the interval empty.
        let least = range / (1.0 + points.len() as f64).min(100.0);
        let width = |i: usize| {
            let left = i.checked_sub(1).map(|j| points[i] - points[j]);
            let right = points.get(i + 1).map(|next| next - points[i]);
            let far = left.unwrap_or(0.0).max(right.unwrap_or(0.0));
            far.clamp(least, range)
        };
        let mut parts: Vec<_> = (0..points.len()).map(|i| (points[i], width(i))).collect();
        if let Some(prior) = parts.iter_mut().find(|part| part.0 == middle) {
            prior.1 = range;
        }
        Self { interval, parts }
    }

    fn draw(&self, rng: &mut RandomStream) -> Result<f64> {
        let (center, deviation) = self.parts[rng.below(self.parts.len())?];
        loop {
            // At least a third of a Gaussian that is as wide as the interval, with its center in it,
            // lies inside.
            let x = center + deviation * rng.next_normal();
            if (self.interval.0..=self.interval.1).contains(&x) {
                return Ok(x);
            }
        }
    }

    fn at(&self, x: f64) -> f64 {
        let below = |x: f64| 0.5 * (1.0 + erf_f64(x / SQRT_2));
        let one = |(center, deviation): &(f64, f64)| {
            let standard = |x: f64| (x - center) / deviation;
            let (low, high) = (standard(self.interval.0), standard(self.interval.1));
            let height = (-0.5 * standard(x).powi(2)).exp() / (deviation * TAU.sqrt());
            height / (below(high) - below(low))
        };
        self.parts.iter().map(one).sum::<f64>() / self.parts.len() as f64
    }
}

/// Points that are drawn evenly before the densities are trusted.
const STARTUP: usize = 10;
/// Draws from the density of the good points for each setting that is tried.
const CANDIDATES: usize = 24;

/// A search by tree-structured Parzen estimators (Bergstra et al., NeurIPS 2011): it is told what came of
/// points and suggests the next.
#[derive(Debug, Clone)]
pub struct Tpe {
    dimensions: Vec<Dimension>,
    /// Points and their scores, the best first.
    seen: Vec<(Vec<f64>, f64)>,
}

impl Tpe {
    /// A search that has seen nothing.
    ///
    /// # Errors
    /// [`Error::Trial`] for an empty interval or no choice.
    pub fn new(dimensions: Vec<Dimension>) -> Result<Self> {
        dimensions.iter().try_for_each(Dimension::validate)?;
        Ok(Self {
            dimensions,
            seen: Vec::new(),
        })
    }

    /// The next point to try: a value for each dimension.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn suggest(&self, rng: &mut RandomStream) -> Result<Vec<f64>> {
        if self.seen.len() < STARTUP {
            return self.dimensions.iter().map(|d| d.draw(rng)).collect();
        }
        let (good, bad) = self.seen.split_at(self.seen.len().div_ceil(10).min(25));
        let one = |(k, dimension): (usize, &Dimension)| -> Result<f64> {
            let along = |points: &[(Vec<f64>, f64)]| -> Vec<f64> {
                points.iter().map(|(point, _)| point[k]).collect()
            };
            let (l, g) = (
                dimension.density(&along(good)),
                dimension.density(&along(bad)),
            );
            let mut best = (f64::NEG_INFINITY, dimension.draw(rng)?);
            for _ in 0..CANDIDATES {
                let x = l.draw(rng)?;
                let gain = l.ln(x) - g.ln(x);
                if gain > best.0 {
                    best = (gain, x);
                }
            }
            Ok(best.1)
        };
        self.dimensions.iter().enumerate().map(one).collect()
    }

    /// What came of a point; larger scores are better, and NaN is the worst.
    ///
    /// # Errors
    /// [`Error::Trial`] unless the point has a value for each dimension.
    pub fn tell(&mut self, point: Vec<f64>, score: f64) -> Result<()> {
        if point.len() != self.dimensions.len() {
            let (found, wanted) = (point.len(), self.dimensions.len());
            return Err(Error::Trial(format!(
                "a point of {found} values: expected {wanted}"
            )));
        }
        let score = if score.is_nan() {
            f64::NEG_INFINITY
        } else {
            score
        };
        let at = self.seen.partition_point(|(_, s)| *s >= score);
        self.seen.insert(at, (point, score));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> Vec<Dimension> {
        vec![
            Dimension::Logarithmic {
                low: 1e-6,
                high: 1e-2,
            },
            Dimension::Logarithmic {
                low: 1e-6,
                high: 1e-2,
            },
            Dimension::Choice(vec![128.0, 256.0, 512.0, 1024.0]),
        ]
    }

    /// Largest, with 0, at 3e-4, 1e-5 and 512.
    fn score(point: &[f64]) -> f64 {
        let far = |x: f64, best: f64| (x / best).log10().powi(2);
        let choice = if point[2] == 512.0 { 0.0 } else { 0.5 };
        -far(point[0], 3e-4) - 0.3 * far(point[1], 1e-5) - choice
    }

    const TRIALS: usize = 60;

    fn searched(seed: u64) -> f64 {
        let rng = &mut RandomStream::new(seed);
        let mut tpe = Tpe::new(space()).unwrap();
        let mut best = f64::NEG_INFINITY;
        for _ in 0..TRIALS {
            let point = tpe.suggest(rng).unwrap();
            assert!((1e-6..=1e-2).contains(&point[0]) && (1e-6..=1e-2).contains(&point[1]));
            let found = score(&point);
            best = f64::max(best, found);
            tpe.tell(point, found).unwrap();
        }
        best
    }

    fn random(seed: u64) -> f64 {
        let rng = &mut RandomStream::new(seed);
        let space = space();
        let one = |_| {
            let point = space
                .iter()
                .map(|d| d.draw(rng))
                .collect::<Result<Vec<_>>>();
            score(&point.unwrap())
        };
        (0..TRIALS).map(one).fold(f64::NEG_INFINITY, f64::max)
    }

    #[test]
    fn beats_random_points_at_the_same_budget() {
        let seeds = 40;
        let wins = (0..seeds).filter(|s| searched(*s) > random(*s)).count();
        assert!(wins >= 32, "{wins} of {seeds}");
        let mean = |of: fn(u64) -> f64| (0..seeds).map(of).sum::<f64>() / seeds as f64;
        let (ours, theirs) = (mean(searched), mean(random));
        assert!(-ours < -0.5 * theirs, "{ours} against {theirs}");
    }

    /// The densities that are compared are densities.
    #[test]
    fn densities_have_mass_one() {
        let mixture = Mixture::new((-3.0, 2.0), vec![-2.9, -1.0, -1.0, 1.5]);
        let n = 20_000;
        let sum: f64 = (0..n)
            .map(|i| mixture.at(-3.0 + 5.0 * (i as f64 + 0.5) / n as f64))
            .sum();
        assert!((sum * 5.0 / n as f64 - 1.0).abs() < 1e-6);
        let choice = Dimension::Choice(vec![1.0, 2.0, 3.0]);
        let Density::Frequencies(_, chances) = choice.density(&[1.0, 1.0, 3.0]) else {
            unreachable!("a choice has frequencies")
        };
        assert!((chances.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        assert!(chances[0] > chances[2] && chances[2] > chances[1] && chances[1] > 0.0);
    }

    #[test]
    fn bad_spaces_and_points_are_named() {
        for bad in [
            Dimension::Logarithmic {
                low: 0.0,
                high: 1.0,
            },
            Dimension::Choice(vec![]),
        ] {
            assert!(Tpe::new(vec![bad]).is_err());
        }
        let mut tpe = Tpe::new(space()).unwrap();
        let error = tpe.tell(vec![1.0], 0.0).unwrap_err().to_string();
        assert!(error.contains("1 values: expected 3"), "{error}");
    }

    /// A trial that failed is behind all others, and spoils no density.
    #[test]
    fn nan_is_the_worst() {
        let rng = &mut RandomStream::new(0);
        let mut tpe = Tpe::new(space()).unwrap();
        for i in 0..30 {
            let point = tpe.suggest(rng).unwrap();
            let score = if i % 2 == 0 { f64::NAN } else { f64::from(i) };
            tpe.tell(point, score).unwrap();
        }
        assert_eq!(tpe.seen[0].1, 29.0);
        assert_eq!(tpe.seen[29].1, f64::NEG_INFINITY);
    }
}
