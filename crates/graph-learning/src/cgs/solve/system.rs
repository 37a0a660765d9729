//! One application of the map, and how far it went.

use crate::graph::Csr;
use crate::sparse::{real, Scalar};
use std::ops::Range;
use tensor_core::kernels::Real;

/// The norm in which a system contracts by `gamma`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Contracts {
    /// `max |h|`: rows of `A` add up to at most 1. Changes are measured against the largest bias, but not
    /// against less than 1.
    InMaximum,
    /// `sum |h|` over the nodes of a head, the largest of the heads: columns of the transpose add up to
    /// at most 1, its rows to as much as a node has neighbors. Changes are measured against the biases
    /// alone: a loss that is a mean has gradients far below 1, and they need their digits too.
    InSums,
}

/// How far one application of the map went.
pub(super) struct Change {
    /// Of a single number.
    pub largest: f64,
    pub squares: f64,
    /// Of all numbers of each head; empty for a system that contracts in the maximum.
    sums: Vec<f64>,
}

impl Change {
    pub fn add(&mut self, other: &Self) {
        self.largest = larger(self.largest, other.largest);
        self.squares += other.squares;
        let pairs = self.sums.iter_mut().zip(&other.sums);
        pairs.for_each(|(sum, other)| *sum += other);
    }

    pub fn in_norm(&self, contracts: Contracts) -> f64 {
        match contracts {
            Contracts::InMaximum => self.largest,
            Contracts::InSums => self.sums.iter().copied().fold(0.0, larger),
        }
    }
}

/// The rows and columns of one solve: `A` or its transpose, with its weights in row order.
pub(super) struct System<'a, T> {
    pub csr: &'a Csr,
    /// `gamma w`, `[E, m]`, in the order of the rows.
    pub weights: Vec<T>,
    /// Biases, `[n, m]`.
    pub bias: &'a [T],
    pub heads: usize,
    pub gamma: f64,
    pub contracts: Contracts,
}

impl<'a, T: Scalar> System<'a, T> {
    pub fn new(csr: &'a Csr, weights: &[T], bias: &'a [T], heads: usize, gamma: f64) -> Self {
        let factor: T = real(gamma);
        let mut ordered = Vec::with_capacity(weights.len());
        for e in csr.perm() {
            let row = &weights[*e as usize * heads..][..heads];
            ordered.extend(row.iter().map(|w| factor * *w));
        }
        Self {
            csr,
            weights: ordered,
            bias,
            heads,
            gamma,
            contracts: Contracts::InMaximum,
        }
    }

    pub fn no_change(&self) -> Change {
        let heads = match self.contracts {
            Contracts::InMaximum => 0,
            Contracts::InSums => self.heads,
        };
        Change {
            largest: 0.0,
            squares: 0.0,
            sums: vec![0.0; heads],
        }
    }

    /// How many times the norm in which the system contracts the Frobenius norm can be.
    pub fn frobenius_by_norm(&self, rows: usize) -> f64 {
        match self.contracts {
            Contracts::InMaximum => ((rows * self.heads) as f64).sqrt(),
            Contracts::InSums => (self.heads as f64).sqrt(),
        }
    }

    /// What changes of the rows are measured against.
    pub fn scale(&self, rows: &Range<usize>) -> f64 {
        let bias = &self.bias[rows.start * self.heads..rows.end * self.heads];
        match self.contracts {
            Contracts::InMaximum => {
                let sizes = bias.iter().map(|b| Real::to_f64(Real::abs(*b)));
                sizes.fold(1.0, f64::max)
            }
            Contracts::InSums => {
                let mut sums = vec![0.0; self.heads];
                for row in bias.chunks_exact(self.heads) {
                    let pairs = sums.iter_mut().zip(row);
                    pairs.for_each(|(s, b)| *s += Real::to_f64(Real::abs(*b)));
                }
                sums.into_iter().fold(0.0, f64::max)
            }
        }
    }

    /// [`row`](Self::row) for some rows, whose new values are `out`.
    #[inline(always)]
    pub fn apply(
        &self,
        rows: Range<usize>,
        h: &[T],
        first: usize,
        post: &impl Fn(usize, T) -> T,
        out: &mut [T],
    ) -> Change {
        let mut change = self.no_change();
        let mut largest = <T as Real>::ZERO;
        for (r, out) in rows.zip(out.chunks_exact_mut(self.heads)) {
            let (l, squares) = self.row(r, h, first, post, out);
            largest = larger(largest, l);
            change.squares += squares;
            let old = &h[(r - first) * self.heads..][..self.heads];
            for ((sum, new), old) in change.sums.iter_mut().zip(out.iter()).zip(old) {
                *sum += Real::to_f64(Real::abs(*new - *old));
            }
        }
        change.largest = Real::to_f64(largest);
        change
    }

    /// `post(gamma A h + b)` for one row: the new row in `out`, and `max |new - old|` and the sum of
    /// squares of the differences.
    #[inline(always)]
    fn row(
        &self,
        r: usize,
        h: &[T],
        first: usize,
        post: &impl Fn(usize, T) -> T,
        out: &mut [T],
    ) -> (T, f64) {
        let m = self.heads;
        out.copy_from_slice(&self.bias[r * m..(r + 1) * m]);
        for p in self.csr.row(r) {
            let col = self.csr.indices()[p] as usize - first;
            let xs = &h[col * m..][..m];
            let ws = &self.weights[p * m..][..m];
            for ((y, x), w) in out.iter_mut().zip(xs).zip(ws) {
                *y += *w * *x;
            }
        }
        let old = &h[(r - first) * m..][..m];
        let (mut largest, mut squares) = (<T as Real>::ZERO, 0.0);
        for (k, (y, old)) in out.iter_mut().zip(old).enumerate() {
            *y = post(r * m + k, *y);
            let change = Real::abs(*y - *old);
            largest = larger(largest, change);
            squares += Real::to_f64(change) * Real::to_f64(change);
        }
        (largest, squares)
    }
}

/// The larger of two changes; NaN, which must not pass for no change, is larger than everything.
#[inline(always)]
fn larger<T: PartialOrd + Copy>(a: T, b: T) -> T {
    // Only NaN cannot be compared with itself.
    if b > a || b.partial_cmp(&b).is_none() {
        b
    } else {
        a
    }
}
