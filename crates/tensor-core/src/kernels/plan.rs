//! Work lists: many tensors cut into pieces of even size.

use super::mask::TILE;
use std::ops::Range;

/// Elements that one task handles: large enough to hide the cost of a task, small enough to
/// balance, and a multiple of the mask tile.
pub(super) const UNIT: usize = 32 * TILE;

/// A run of elements of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Segment {
    pub tensor: usize,
    pub start: usize,
    pub len: usize,
}

/// The work list: tasks of about [`UNIT`] elements, each a range of segments. It depends on the
/// tensors' sizes only, never on the number of threads.
#[derive(Debug, Clone, Default)]
pub(super) struct Plan {
    pub segments: Vec<Segment>,
    pub tasks: Vec<Range<usize>>,
    pub elements: usize,
}

impl Plan {
    pub(super) fn new(sizes: impl IntoIterator<Item = usize>) -> Self {
        let mut plan = Self::default();
        let (mut first, mut filled) = (0, 0);
        for (tensor, size) in sizes.into_iter().enumerate() {
            plan.elements += size;
            let mut start = 0;
            while start < size {
                // Cut at multiples of the tile, so that masks and reductions see whole tiles.
                let room = (UNIT - filled).next_multiple_of(TILE);
                let len = room.min(size - start);
                plan.segments.push(Segment { tensor, start, len });
                start += len;
                filled += len;
                if filled >= UNIT {
                    plan.tasks.push(first..plan.segments.len());
                    (first, filled) = (plan.segments.len(), 0);
                }
            }
        }
        if first < plan.segments.len() {
            plan.tasks.push(first..plan.segments.len());
        }
        plan
    }

    /// Runs `task` over all tasks, in parallel when there is more than one.
    pub(super) fn run(&self, task: impl Fn(&Segment) + Sync) {
        use rayon::prelude::*;
        let one = |range: &Range<usize>| self.segments[range.clone()].iter().for_each(&task);
        if self.tasks.len() <= 1 || rayon::current_num_threads() == 1 {
            self.tasks.iter().for_each(one);
        } else {
            self.tasks.par_iter().for_each(one);
        }
    }

    /// Computes a value per segment, in parallel; the result is in the order of the segments.
    pub(super) fn map<T: Default + Clone + Send>(
        &self,
        value: impl Fn(&Segment) -> T + Sync,
    ) -> Vec<T> {
        use rayon::prelude::*;
        let mut values = vec![T::default(); self.segments.len()];
        let mut rest = values.as_mut_slice();
        let mut parts = Vec::with_capacity(self.tasks.len());
        for range in &self.tasks {
            let (part, tail) = rest.split_at_mut(range.len());
            parts.push((&self.segments[range.clone()], part));
            rest = tail;
        }
        let one = |(segments, part): (&[Segment], &mut [T])| {
            for (segment, slot) in segments.iter().zip(part) {
                *slot = value(segment);
            }
        };
        if parts.len() <= 1 {
            parts.into_iter().for_each(one);
        } else {
            parts.into_par_iter().for_each(one);
        }
        values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_in_exactly_one_segment() {
        let sizes = [0, 1, TILE - 1, TILE, 5 * UNIT + 17, 3, 0, UNIT, 2];
        let plan = Plan::new(sizes);
        let mut next = vec![0; sizes.len()];
        for range in &plan.tasks {
            let total: usize = plan.segments[range.clone()].iter().map(|s| s.len).sum();
            assert!(total <= UNIT + TILE, "{total}");
            for segment in &plan.segments[range.clone()] {
                assert_eq!(segment.start, next[segment.tensor]);
                assert_eq!(segment.start % TILE, 0);
                next[segment.tensor] += segment.len;
            }
        }
        assert_eq!(next, sizes);
        assert_eq!(plan.tasks.last().map(|r| r.end), Some(plan.segments.len()));
    }
}
