//! Collections that grow in any order.

use super::super::Environment;
use crate::error::check;
use crate::Result;

/// Multisets of `items` kinds: an action adds one of a kind. With `multiplicity` 1 it builds sets.
///
/// Features: one-hot counts.
#[derive(Debug, Clone, PartialEq)]
pub struct BagOfItems {
    items: usize,
    capacity: usize,
    multiplicity: usize,
    smaller: bool,
}

impl BagOfItems {
    /// Bags of exactly `capacity` items of `items` kinds.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) without a kind or an item.
    pub fn new(items: usize, capacity: usize) -> Result<Self> {
        check::at_least("BagOfItems::items", items, 1)?;
        check::at_least("BagOfItems::capacity", capacity, 1)?;
        check::require(
            capacity <= 255,
            "BagOfItems::capacity",
            capacity,
            "at most 255",
        )?;
        Ok(Self {
            items,
            capacity,
            multiplicity: capacity,
            smaller: false,
        })
    }

    /// Sets of exactly `size` of `items` elements.
    ///
    /// # Errors
    /// As [`new`](Self::new), and for more elements than there are.
    pub fn set(items: usize, size: usize) -> Result<Self> {
        check::require(
            size <= items,
            "BagOfItems::capacity",
            size,
            "at most the items",
        )?;
        Ok(Self {
            multiplicity: 1,
            ..Self::new(items, size)?
        })
    }

    /// May also stop earlier, the empty collection included.
    #[must_use]
    pub fn or_smaller(self) -> Self {
        Self {
            smaller: true,
            ..self
        }
    }
}

impl Environment for BagOfItems {
    type State = Vec<u8>;

    fn actions(&self) -> usize {
        self.items + 1
    }

    fn initial(&self) -> Vec<u8> {
        vec![0; self.items]
    }

    fn max_steps(&self) -> usize {
        self.capacity
    }

    fn forward_mask(&self, state: &Vec<u8>, mask: &mut [bool]) {
        let count: usize = state.iter().map(|c| usize::from(*c)).sum();
        if count < self.capacity {
            for (m, c) in mask.iter_mut().zip(state) {
                *m = usize::from(*c) < self.multiplicity;
            }
        }
        mask[self.items] = self.smaller || count == self.capacity;
    }

    fn backward_mask(&self, state: &Vec<u8>, mask: &mut [bool]) {
        for (m, c) in mask.iter_mut().zip(state) {
            *m = *c > 0;
        }
    }

    fn step(&self, state: &mut Vec<u8>, action: usize) {
        state[action] += 1;
    }

    fn undo(&self, state: &mut Vec<u8>, action: usize) {
        state[action] -= 1;
    }

    fn feature_width(&self) -> usize {
        self.items * (self.multiplicity + 1)
    }

    fn write_features(&self, state: &Vec<u8>, out: &mut [f32]) {
        for (i, c) in state.iter().enumerate() {
            out[i * (self.multiplicity + 1) + usize::from(*c)] = 1.0;
        }
    }
}

/// Cells of a neural network: `edges` edges, each with one of `operations` (6 and 5 in
/// NATS-Bench), chosen in any order; action `edge * operations + operation`. An edge without an
/// operation has the number [`NasCell::OPEN`].
///
/// Features: one-hot operations with one more for "none yet".
#[derive(Debug, Clone, PartialEq)]
pub struct NasCell {
    edges: usize,
    operations: usize,
}

impl NasCell {
    /// The state of an edge that has no operation yet.
    pub const OPEN: u8 = u8::MAX;

    /// Cells of so many edges and operations.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) without an edge, or unless there are
    /// 2 to 255 operations.
    pub fn new(edges: usize, operations: usize) -> Result<Self> {
        check::at_least("NasCell::edges", edges, 1)?;
        let holds = (2..=255).contains(&operations);
        check::require(holds, "NasCell::operations", operations, "2 to 255")?;
        Ok(Self { edges, operations })
    }

    /// The cells of NATS-Bench's topology space: 6 edges, 5 operations.
    pub fn nats_bench() -> Self {
        Self {
            edges: 6,
            operations: 5,
        }
    }
}

impl Environment for NasCell {
    type State = Vec<u8>;

    fn actions(&self) -> usize {
        self.edges * self.operations + 1
    }

    fn initial(&self) -> Vec<u8> {
        vec![Self::OPEN; self.edges]
    }

    fn max_steps(&self) -> usize {
        self.edges
    }

    fn forward_mask(&self, state: &Vec<u8>, mask: &mut [bool]) {
        let (choices, stop) = mask.split_at_mut(self.edges * self.operations);
        for (open, o) in choices.chunks_mut(self.operations).zip(state) {
            open.fill(*o == Self::OPEN);
        }
        stop[0] = !state.contains(&Self::OPEN);
    }

    fn backward_mask(&self, state: &Vec<u8>, mask: &mut [bool]) {
        for (edge, o) in state.iter().enumerate().filter(|(_, o)| **o != Self::OPEN) {
            mask[edge * self.operations + usize::from(*o)] = true;
        }
    }

    fn step(&self, state: &mut Vec<u8>, action: usize) {
        state[action / self.operations] = (action % self.operations) as u8;
    }

    fn undo(&self, state: &mut Vec<u8>, action: usize) {
        state[action / self.operations] = Self::OPEN;
    }

    fn feature_width(&self) -> usize {
        self.edges * (self.operations + 1)
    }

    fn write_features(&self, state: &Vec<u8>, out: &mut [f32]) {
        for (edge, o) in state.iter().enumerate() {
            let choice = usize::from(*o).min(self.operations);
            out[edge * (self.operations + 1) + choice] = 1.0;
        }
    }
}
