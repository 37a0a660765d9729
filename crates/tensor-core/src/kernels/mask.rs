//! Which entries of a tensor carry state.

use crate::{Error, Result};

/// Entries that one prefix count covers; kernels cut tensors at multiples of it.
pub(super) const TILE: usize = 1024;

/// A set of entries of a flattened tensor: one bit an entry, and a prefix count per tile of 1024
/// so that a kernel finds the compact state of any tile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mask {
    len: usize,
    words: Vec<u64>,
    /// Set entries before each tile; the last one is the total.
    offsets: Vec<u32>,
}

impl Mask {
    /// From one flag per entry.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for more than `u32::MAX` entries.
    pub fn from_bools(flags: &[bool]) -> Result<Self> {
        let mut words = vec![0u64; flags.len().div_ceil(64)];
        for (i, _) in flags.iter().enumerate().filter(|(_, set)| **set) {
            words[i / 64] |= 1 << (i % 64);
        }
        Self::from_words(flags.len(), words)
    }

    /// From the indices of the set entries, in any order; repetitions count once.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an index that is not below `len`.
    pub fn from_indices(len: usize, indices: &[u32]) -> Result<Self> {
        let mut words = vec![0u64; len.div_ceil(64)];
        for &index in indices {
            let i = index as usize;
            if i >= len {
                return Err(Error::invalid("mask index", i, format!("below {len}")));
            }
            words[i / 64] |= 1 << (i % 64);
        }
        Self::from_words(len, words)
    }

    fn from_words(len: usize, words: Vec<u64>) -> Result<Self> {
        if u32::try_from(len).is_err() {
            return Err(Error::invalid("mask length", len, "at most 4294967295"));
        }
        let mut offsets = Vec::with_capacity(len.div_ceil(TILE) + 1);
        let mut total = 0u32;
        for tile in words.chunks(TILE / 64) {
            offsets.push(total);
            total += tile.iter().map(|w| w.count_ones()).sum::<u32>();
        }
        offsets.push(total);
        Ok(Self {
            len,
            words,
            offsets,
        })
    }

    /// Number of entries, set or not.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the tensor has no entries at all.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Number of set entries.
    pub fn count(&self) -> usize {
        self.offsets.last().map_or(0, |n| *n as usize)
    }

    /// Whether entry `i` is set; `false` beyond the end.
    pub fn get(&self, i: usize) -> bool {
        let word = self.words.get(i / 64).copied().unwrap_or(0);
        i < self.len && (word >> (i % 64)) & 1 == 1
    }

    /// One flag per entry.
    pub fn to_bools(&self) -> Vec<bool> {
        (0..self.len).map(|i| self.get(i)).collect()
    }

    /// Bytes that the mask occupies.
    pub fn bytes(&self) -> usize {
        self.words.len() * 8 + self.offsets.len() * 4
    }

    /// How many entries are set both here and in `other`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for masks of different length.
    pub fn overlap(&self, other: &Mask) -> Result<usize> {
        if self.len != other.len {
            return Err(Error::invalid("mask length", other.len, self.len));
        }
        let both = self.words.iter().zip(&other.words);
        Ok(both.map(|(a, b)| (a & b).count_ones() as usize).sum())
    }

    #[cfg(any(feature = "cuda", feature = "verify"))]
    pub(super) fn words(&self) -> &[u64] {
        &self.words
    }

    #[cfg(any(feature = "cuda", feature = "verify"))]
    pub(super) fn offsets(&self) -> &[u32] {
        &self.offsets
    }

    /// Position in the compact state of the first set entry at or after tile `tile`.
    pub(super) fn offset(&self, tile: usize) -> usize {
        self.offsets[tile] as usize
    }

    /// The bits of one tile.
    pub(super) fn tile(&self, tile: usize) -> &[u64] {
        let per_tile = TILE / 64;
        let end = ((tile + 1) * per_tile).min(self.words.len());
        &self.words[tile * per_tile..end]
    }
}
