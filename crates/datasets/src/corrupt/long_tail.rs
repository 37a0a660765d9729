//! Classes with very different numbers of examples.

use crate::data::class_counts;
use crate::{Classification, Error, Result};
use tensor_core::random::RandomStream;

/// How the class sizes fall from class 0 to the last class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TailShape {
    /// Geometrically: class `c` of `C` has the share `ratio^(-c / (C - 1))` of class 0 (Cui et al.
    /// 2019, arXiv 1901.05555).
    Exponential,
    /// The first half of the classes is full, the other half has the share `1 / ratio` (Buda et
    /// al. 2018, arXiv 1710.05381).
    Step,
}

/// Takes a part of each class, so that the largest has `ratio` times as many examples as the
/// smallest.
///
/// ```
/// use thalweg_datasets::{corrupt::{LongTail, TailShape}, digits, RandomStream};
///
/// let tail = LongTail { shape: TailShape::Exponential, ratio: 20.0 };
/// let rare = tail.apply_to(&digits()?, &mut RandomStream::new(0))?;
/// let counts = rare.class_counts()?;
/// assert_eq!((counts[0], counts[9]), (178, 9));
/// # Ok::<(), thalweg_datasets::Error>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LongTail {
    /// How the sizes fall.
    pub shape: TailShape,
    /// Size of the largest class over that of the smallest.
    pub ratio: f64,
}

impl LongTail {
    /// The sizes after thinning classes of the given sizes: the largest with the right shares,
    /// rounded, but at least one example of each class.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a ratio below 1 or not finite, without classes, or for a
    /// class without examples.
    pub fn sizes(&self, counts: &[usize]) -> Result<Vec<usize>> {
        if !(self.ratio.is_finite() && self.ratio >= 1.0) {
            return Err(Error::invalid("ratio", self.ratio, "a finite number >= 1"));
        }
        if counts.is_empty() || counts.contains(&0) {
            let expected = "at least one example of every class";
            return Err(Error::invalid("counts", format!("{counts:?}"), expected));
        }
        let classes = counts.len();
        let share = |c: usize| match self.shape {
            TailShape::Exponential => {
                let place = c as f64 / (classes - 1).max(1) as f64;
                self.ratio.powf(-place)
            }
            TailShape::Step if c < classes.div_ceil(2) => 1.0,
            TailShape::Step => 1.0 / self.ratio,
        };
        // The largest head for which every class has enough examples.
        let room = counts.iter().enumerate().map(|(c, n)| *n as f64 / share(c));
        let head = room.fold(f64::INFINITY, f64::min);
        let size = |(c, n): (usize, &usize)| ((head * share(c)).round() as usize).clamp(1, *n);
        Ok(counts.iter().enumerate().map(size).collect())
    }

    /// Indices of a random part of each class, in ascending order.
    ///
    /// # Errors
    /// Those of [`sizes`](Self::sizes); [`Error::LabelOutOfRange`].
    pub fn indices(
        &self,
        labels: &[u32],
        classes: usize,
        rng: &mut RandomStream,
    ) -> Result<Vec<u32>> {
        let mut left = self.sizes(&class_counts(labels, classes)?)?;
        let mut chosen = Vec::with_capacity(left.iter().sum());
        for i in rng.permutation(labels.len())? {
            let room = &mut left[labels[i as usize] as usize];
            if *room > 0 {
                *room -= 1;
                chosen.push(i);
            }
        }
        chosen.sort_unstable();
        Ok(chosen)
    }

    /// The thinned data set.
    ///
    /// # Errors
    /// Those of [`indices`](Self::indices).
    pub fn apply_to(
        &self,
        data: &Classification,
        rng: &mut RandomStream,
    ) -> Result<Classification> {
        data.select(&self.indices(&data.label_vec()?, data.classes, rng)?)
    }
}
