//! Seeded splits into training, validation and test parts, and stratified samples.
//!
//! The functions return indices, so that one split serves several tensors; the methods of
//! [`Classification`] return the parts.
//!
//! ```
//! use thalweg_datasets::split::{split, Sizes};
//! use thalweg_datasets::RandomStream;
//!
//! let digits = thalweg_datasets::digits()?;
//! let mut rng = RandomStream::new(0);
//! let parts = digits.split_stratified(Sizes::Counts(&[1000, 400]), &mut rng)?;
//! assert_eq!((parts[0].len(), parts[1].len()), (1000, 400));
//!
//! let indices = split(10, Sizes::Fractions(&[0.8, 0.2]), &mut rng)?;
//! assert_eq!((indices[0].len(), indices[1].len()), (8, 2));
//! # Ok::<(), thalweg_datasets::Error>(())
//! ```

use crate::{Classification, Error, Regression, Result};
use tensor_core::random::RandomStream;

/// How big the parts are. What the parts do not take is left out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Sizes<'a> {
    /// Numbers of examples.
    Counts(&'a [usize]),
    /// Shares of all examples; they sum to at most 1. The counts differ from the exact shares by
    /// less than one, and sum to `n` where the shares sum to 1.
    Fractions(&'a [f64]),
}

impl Sizes<'_> {
    /// The number of examples of each part for `n` examples.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] without parts, for counts beyond `n`, and for fractions that are
    /// negative, not finite or sum to more than 1.
    pub fn counts(&self, n: usize) -> Result<Vec<usize>> {
        match self {
            Self::Counts([]) | Self::Fractions([]) => {
                Err(Error::invalid("sizes", "[]", "at least one part"))
            }
            Self::Counts(counts) => {
                let total = counts.iter().try_fold(0usize, |sum, c| sum.checked_add(*c));
                match total {
                    Some(total) if total <= n => Ok(counts.to_vec()),
                    _ => {
                        let expected = format!("a sum of at most {n}");
                        Err(Error::invalid("counts", format!("{counts:?}"), expected))
                    }
                }
            }
            Self::Fractions(fractions) => {
                let total: f64 = fractions.iter().sum();
                let fits = fractions.iter().all(|f| *f >= 0.0) && total <= 1.0 + 1e-9;
                if !fits {
                    let expected = "numbers >= 0 with a sum of at most 1";
                    return Err(Error::invalid(
                        "fractions",
                        format!("{fractions:?}"),
                        expected,
                    ));
                }
                let whole = ((total * n as f64).round() as usize).min(n);
                let quota = |f: &f64| {
                    let exact = f * n as f64;
                    // A quota that is whole but for rounding keeps its value.
                    let floor = (exact + 1e-9).floor();
                    (floor as usize, exact - floor)
                };
                let quotas: Vec<(usize, f64)> = fractions.iter().map(quota).collect();
                Ok(apportion(&quotas, whole))
            }
        }
    }
}

/// Whole numbers with the given total from (floor, remainder in `[0, 1)`) of each quota: the
/// largest remainders are rounded up; ties go to the first.
fn apportion(quotas: &[(usize, f64)], total: usize) -> Vec<usize> {
    let mut counts: Vec<usize> = quotas.iter().map(|(floor, _)| *floor).collect();
    let missing = total.saturating_sub(counts.iter().sum());
    let mut order: Vec<usize> = (0..quotas.len()).collect();
    order.sort_by(|a, b| quotas[*b].1.total_cmp(&quotas[*a].1));
    for i in order.into_iter().take(missing) {
        counts[i] += 1;
    }
    counts
}

/// Disjoint random parts of `0..n`, each in random order.
///
/// # Errors
/// Those of [`Sizes::counts`]; [`Error::InvalidArgument`] for `n` beyond `u32`.
pub fn split(n: usize, sizes: Sizes<'_>, rng: &mut RandomStream) -> Result<Vec<Vec<u32>>> {
    check_count(n)?;
    let counts = sizes.counts(n)?;
    let order = rng.permutation(n)?;
    let mut rest = order.as_slice();
    let mut parts = Vec::with_capacity(counts.len());
    for count in counts {
        let (part, tail) = rest.split_at(count);
        parts.push(part.to_vec());
        rest = tail;
    }
    Ok(parts)
}

/// [`split`] that keeps the share of each class: in every part the count of a class is within one
/// of its proportional share of the examples that the earlier parts left.
///
/// A class with fewer examples than there are parts is missing in some of them.
///
/// # Errors
/// Those of [`Sizes::counts`].
pub fn split_stratified(
    labels: &[u32],
    sizes: Sizes<'_>,
    rng: &mut RandomStream,
) -> Result<Vec<Vec<u32>>> {
    check_count(labels.len())?;
    let counts = sizes.counts(labels.len())?;
    let mut pools = shuffled_classes(labels, rng)?;
    let mut left = labels.len();
    let mut parts = Vec::with_capacity(counts.len());
    for count in counts {
        let whole = left.max(1) as u128;
        let quota = |pool: &Vec<u32>| {
            let product = pool.len() as u128 * count as u128;
            let remainder = (product % whole) as f64 / whole as f64;
            ((product / whole) as usize, remainder)
        };
        let quotas: Vec<(usize, f64)> = pools.iter().map(quota).collect();
        let mut part = Vec::with_capacity(count);
        for (pool, take) in pools.iter_mut().zip(apportion(&quotas, count)) {
            part.extend(pool.split_off(pool.len().saturating_sub(take)));
        }
        rng.shuffle(&mut part)?;
        left -= part.len();
        parts.push(part);
    }
    Ok(parts)
}

/// `per_class` examples of every class that occurs, drawn without replacement and in random order:
/// the labelled set of few-shot and semi-supervised work.
///
/// # Errors
/// [`Error::InvalidArgument`] when a class has fewer examples.
pub fn stratified_sample(
    labels: &[u32],
    per_class: usize,
    rng: &mut RandomStream,
) -> Result<Vec<u32>> {
    check_count(labels.len())?;
    let mut sample = Vec::new();
    for mut pool in shuffled_classes(labels, rng)? {
        if pool.len() < per_class {
            let class = labels[pool[0] as usize];
            let expected = format!("at most {}, the size of class {class}", pool.len());
            return Err(Error::invalid("per_class", per_class, expected));
        }
        pool.truncate(per_class);
        sample.extend(pool);
    }
    rng.shuffle(&mut sample)?;
    Ok(sample)
}

impl Classification {
    /// Disjoint random parts; see [`split`].
    ///
    /// # Errors
    /// Those of [`split`].
    pub fn split(&self, sizes: Sizes<'_>, rng: &mut RandomStream) -> Result<Vec<Self>> {
        let parts = split(self.len(), sizes, rng)?;
        parts.iter().map(|part| self.select(part)).collect()
    }

    /// Disjoint random parts that keep the share of each class; see [`split_stratified`].
    ///
    /// # Errors
    /// Those of [`split_stratified`].
    pub fn split_stratified(&self, sizes: Sizes<'_>, rng: &mut RandomStream) -> Result<Vec<Self>> {
        let parts = split_stratified(&self.label_vec()?, sizes, rng)?;
        parts.iter().map(|part| self.select(part)).collect()
    }
}

impl Regression {
    /// Disjoint random parts; see [`split`].
    ///
    /// # Errors
    /// Those of [`split`].
    pub fn split(&self, sizes: Sizes<'_>, rng: &mut RandomStream) -> Result<Vec<Self>> {
        let parts = split(self.len(), sizes, rng)?;
        parts.iter().map(|part| self.select(part)).collect()
    }
}

/// The indices of each class that occurs, shuffled, classes in ascending order.
fn shuffled_classes(labels: &[u32], rng: &mut RandomStream) -> Result<Vec<Vec<u32>>> {
    let mut pools = std::collections::BTreeMap::<u32, Vec<u32>>::new();
    for (i, y) in labels.iter().enumerate() {
        pools.entry(*y).or_default().push(i as u32);
    }
    let mut pools: Vec<Vec<u32>> = pools.into_values().collect();
    for pool in &mut pools {
        rng.shuffle(pool)?;
    }
    Ok(pools)
}

pub(crate) fn check_count(n: usize) -> Result<()> {
    if u32::try_from(n).is_err() {
        let expected = format!("at most {} examples", u32::MAX);
        return Err(Error::invalid("n", n, expected));
    }
    Ok(())
}
