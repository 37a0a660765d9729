//! Where the normal numbers and permutations of a run come from.

use crate::{Error, RandomStream, Result};
use candle_core::{DType, Tensor};
use std::collections::BTreeMap;

/// What normal numbers are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// The diffusion around the consensus (and of Langevin dynamics).
    Diffusion,
    /// The diffusion around a particle's memory.
    MemoryDiffusion,
    /// The noise of particles that have stalled.
    Kick,
    /// The cloud of consensus hopping.
    Cloud,
}

/// Which normal numbers are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NoiseRequest {
    /// What for.
    pub purpose: Purpose,
    /// How many moves of this purpose could have been before it (whether or not they were made).
    pub index: usize,
    /// The first particle.
    pub first_row: usize,
    /// Numbers of a particle.
    pub columns: usize,
}

/// A source of normal numbers and permutations: a [`RandomStream`], or a [`Tape`] of given ones.
pub trait NoiseSource {
    /// Fills `out` (whole particles, row by row) with standard normal numbers.
    ///
    /// # Errors
    /// The implementor's.
    fn normals(&mut self, request: NoiseRequest, out: &mut [f64]) -> Result<()>;

    /// Permutation number `index` of `0..n`.
    ///
    /// # Errors
    /// The implementor's.
    fn permutation(&mut self, index: usize, n: usize) -> Result<Vec<u32>>;
}

impl NoiseSource for RandomStream {
    fn normals(&mut self, _: NoiseRequest, out: &mut [f64]) -> Result<()> {
        self.fill_normal(out);
        Ok(())
    }

    fn permutation(&mut self, _: usize, n: usize) -> Result<Vec<u32>> {
        Ok(RandomStream::permutation(self, n)?)
    }
}

/// Numbers that were drawn before: for tests, and to repeat a run of another program.
#[derive(Debug, Clone, Default)]
pub struct Tape {
    normals: BTreeMap<Purpose, Vec<Vec<f64>>>,
    permutations: Vec<Vec<u32>>,
}

impl Tape {
    /// A tape with nothing on it.
    pub fn new() -> Self {
        Self::default()
    }

    /// With normal numbers `[.., N, d]` for one purpose, one move after the other.
    ///
    /// # Errors
    /// [`Error::Shape`] for fewer than three dimensions.
    pub fn with_normals(mut self, purpose: Purpose, numbers: &Tensor) -> Result<Self> {
        if numbers.rank() < 3 {
            return Err(Error::shape("noise", numbers.dims(), "[moves, N, d]"));
        }
        let moves = numbers.flatten_to(numbers.rank() - 3)?.flatten_from(1)?;
        let moves = moves.to_dtype(DType::F64)?.to_vec2()?;
        self.normals.insert(purpose, moves);
        Ok(self)
    }

    /// With permutations, one after the other.
    #[must_use]
    pub fn with_permutations(mut self, permutations: Vec<Vec<u32>>) -> Self {
        self.permutations = permutations;
        self
    }
}

impl NoiseSource for Tape {
    fn normals(&mut self, request: NoiseRequest, out: &mut [f64]) -> Result<()> {
        let moves = self.normals.get(&request.purpose);
        let got = moves.map_or(0, Vec::len);
        let all = moves.and_then(|moves| moves.get(request.index));
        let all = all.ok_or(Error::TooFew {
            what: "this move",
            of: "moves on the tape of noise",
            needed: request.index + 1,
            got,
        })?;
        let start = request.first_row * request.columns;
        match all.get(start..start + out.len()) {
            Some(numbers) => out.copy_from_slice(numbers),
            None => {
                return Err(Error::TooFew {
                    what: "this move",
                    of: "numbers on the tape of noise",
                    needed: start + out.len(),
                    got: all.len(),
                })
            }
        }
        Ok(())
    }

    fn permutation(&mut self, index: usize, n: usize) -> Result<Vec<u32>> {
        let got = self.permutations.len();
        let permutation = self.permutations.get(index).ok_or(Error::TooFew {
            what: "this step",
            of: "permutations on the tape",
            needed: index + 1,
            got,
        })?;
        let mut sorted = permutation.clone();
        sorted.sort_unstable();
        if sorted.len() != n || sorted.iter().enumerate().any(|(i, p)| i != *p as usize) {
            let expected = format!("a permutation of 0..{n}");
            return Err(Error::argument("permutation", permutation, expected));
        }
        Ok(permutation.clone())
    }
}
