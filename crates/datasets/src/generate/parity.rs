//! Sparse parity: the label is the parity of a few bits among many that mean nothing.

use crate::{Classification, Error, Result};
use candle_core::{DType, Device, Tensor};
use tensor_core::random::RandomStream;

/// How a bit is written as a number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BitEncoding {
    /// 0 and 1.
    ZeroOne,
    /// 0 as +1 and 1 as -1, so that the parity is the sign of the product.
    Signed,
}

/// Uniform bits of which only `subset` decides: label = number of ones in the subset, modulo 2.
///
/// ```
/// use candle_core::{DType, Device};
/// use thalweg_datasets::generate::{BitEncoding, SparseParity};
/// use thalweg_datasets::RandomStream;
///
/// let mut rng = RandomStream::new(0);
/// let parity = SparseParity::random(43, 3, &mut rng)?;
/// let data = parity.sample(2000, BitEncoding::Signed, &mut rng, DType::F32, &Device::Cpu)?;
/// assert_eq!((data.inputs.dims(), data.classes), (&[2000, 43][..], 2));
/// # Ok::<(), thalweg_datasets::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SparseParity {
    bits: usize,
    subset: Vec<usize>,
}

impl SparseParity {
    /// The parity of the bits at `subset`, among `bits` bits.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a subset that is empty, repeats an index or leaves the bits.
    pub fn new(bits: usize, subset: Vec<usize>) -> Result<Self> {
        let mut sorted = subset.clone();
        sorted.sort_unstable();
        sorted.dedup();
        let inside = sorted.last().is_some_and(|last| *last < bits);
        if !inside || sorted.len() != subset.len() {
            let expected = format!("at least one index, all different and less than {bits}");
            return Err(Error::invalid("subset", format!("{subset:?}"), expected));
        }
        Ok(Self { bits, subset })
    }

    /// The parity of `relevant` random bits.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless `1 <= relevant <= bits`.
    pub fn random(bits: usize, relevant: usize, rng: &mut RandomStream) -> Result<Self> {
        if relevant == 0 || relevant > bits {
            let expected = format!("1 to {bits}, the number of bits");
            return Err(Error::invalid("relevant", relevant, expected));
        }
        let order = rng.permutation(bits)?;
        let chosen = order.iter().take(relevant).map(|i| *i as usize);
        Self::new(bits, chosen.collect())
    }

    /// Number of bits of an input.
    pub fn bits(&self) -> usize {
        self.bits
    }

    /// The bits that decide.
    pub fn subset(&self) -> &[usize] {
        &self.subset
    }

    /// `n` examples `[n, bits]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn sample(
        &self,
        n: usize,
        encoding: BitEncoding,
        rng: &mut RandomStream,
        dtype: DType,
        device: &Device,
    ) -> Result<Classification> {
        let bits: Vec<u8> = (0..n * self.bits)
            .map(|_| (rng.bits() >> 63) as u8)
            .collect();
        let parity = |row: &[u8]| self.subset.iter().fold(0, |sum, i| sum ^ row[*i]);
        let labels: Vec<u32> = bits
            .chunks(self.bits)
            .map(|row| u32::from(parity(row)))
            .collect();
        let inputs = Tensor::from_vec(bits, (n, self.bits), device)?.to_dtype(dtype)?;
        let inputs = match encoding {
            BitEncoding::ZeroOne => inputs,
            BitEncoding::Signed => inputs.affine(-2.0, 1.0)?,
        };
        Classification::new(inputs, Tensor::from_vec(labels, n, device)?, 2)
    }
}
