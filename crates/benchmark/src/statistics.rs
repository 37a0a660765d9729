//! Means, quantiles and the paired bootstrap.

use serde::{Deserialize, Serialize};
use tensor_core::random::RandomStream;

/// Resamples of a bootstrap: enough for the ends of a 95 % interval to be stable to two digits.
pub const RESAMPLES: usize = 4000;

/// A mean with a 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The estimate from all seeds.
    #[serde(with = "crate::scenario::number")]
    pub mean: f64,
    /// The 2.5 % quantile of the resampled estimates.
    #[serde(with = "crate::scenario::number")]
    pub low: f64,
    /// The 97.5 % quantile.
    #[serde(with = "crate::scenario::number")]
    pub high: f64,
}

/// Arithmetic mean; NaN for an empty slice.
pub fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Sample standard deviation (n - 1); 0 below two values.
pub fn deviation(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let center = mean(values);
    let squares: f64 = values.iter().map(|x| (x - center).powi(2)).sum();
    (squares / (values.len() - 1) as f64).sqrt()
}

/// The quantile `q` in `[0, 1]` by linear interpolation between order statistics; NaN for an
/// empty slice.
pub fn quantile(values: &[f64], q: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    if sorted.is_empty() {
        return f64::NAN;
    }
    let position = q.clamp(0.0, 1.0) * (sorted.len() - 1) as f64;
    let (below, above) = (position.floor() as usize, position.ceil() as usize);
    let (a, b) = (sorted[below], sorted[above]);
    // Equal ends first: the difference of two infinities is not a number.
    if a == b {
        a
    } else {
        a + (b - a) * (position - below as f64)
    }
}

/// Percentile bootstrap of any statistic of a set of seeds.
///
/// Seeds are drawn with replacement, whole: the statistic sees the same seeds for all arms, which
/// keeps the pairing. `label` fixes the draws, so that the interval of the same trials is the
/// same number every time. With one seed the interval is the estimate.
pub fn bootstrap(seeds: usize, label: &str, statistic: impl Fn(&[usize]) -> f64) -> Interval {
    let all: Vec<usize> = (0..seeds).collect();
    let estimate = statistic(&all);
    if seeds < 2 {
        return Interval {
            mean: estimate,
            low: estimate,
            high: estimate,
        };
    }
    let mut stream = RandomStream::new(0).split("bootstrap").split(label);
    let mut uniform = vec![0.0; seeds];
    let mut sample = vec![0; seeds];
    let values: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            stream.fill_uniform(&mut uniform);
            for (index, u) in sample.iter_mut().zip(&uniform) {
                *index = ((u * seeds as f64) as usize).min(seeds - 1);
            }
            statistic(&sample)
        })
        .collect();
    Interval {
        mean: estimate,
        low: quantile(&values, 0.025),
        high: quantile(&values, 0.975),
    }
}
