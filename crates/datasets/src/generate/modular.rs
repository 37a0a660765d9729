//! Modular arithmetic tables: the data of grokking (Power et al. 2022, arXiv 2201.02177).
//!
//! All pairs `(a, b)` modulo `p` with the result of one operation. A network sees a share of the
//! table and must complete it, which it does long after it has memorised its share, or never.
//!
//! ```
//! use candle_core::{DType, Device};
//! use thalweg_datasets::generate::{ModularOp, ModularTable};
//!
//! let table = ModularTable::new(ModularOp::Add, 7)?;
//! let data = table.one_hot(DType::F32, &Device::Cpu)?;
//! assert_eq!((data.inputs.dims(), data.classes), (&[49, 14][..], 7));
//! # Ok::<(), thalweg_datasets::Error>(())
//! ```

use crate::{Classification, Error, Result};
use candle_core::{DType, Device, Tensor};

/// The operation of a [`ModularTable`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModularOp {
    /// `a + b mod p`
    Add,
    /// `a - b mod p`
    Subtract,
    /// `a * b mod p`
    Multiply,
    /// `a * b^-1 mod p` for `b != 0`; `p` must be prime.
    Divide,
}

impl ModularOp {
    /// The result for a pair; `None` where it does not exist (division by zero).
    ///
    /// `modulus` is at least 1, and prime for [`ModularOp::Divide`].
    fn result(self, a: u64, b: u64, modulus: u64) -> Option<u64> {
        match self {
            Self::Add => Some((a + b) % modulus),
            Self::Subtract => Some((a + modulus - b) % modulus),
            Self::Multiply => Some(a * b % modulus),
            Self::Divide if b == 0 => None,
            // Fermat: b^(p-2) is the inverse of b.
            Self::Divide => Some(a * power(b, modulus - 2, modulus) % modulus),
        }
    }
}

fn power(mut base: u64, mut exponent: u64, modulus: u64) -> u64 {
    let mut result = 1 % modulus;
    while exponent > 0 {
        if exponent & 1 == 1 {
            result = result * base % modulus;
        }
        base = base * base % modulus;
        exponent >>= 1;
    }
    result
}

fn is_prime(n: u64) -> bool {
    n >= 2
        && (2..)
            .take_while(|d| d * d <= n)
            .all(|d| !n.is_multiple_of(d))
}

/// All pairs modulo `p` and their results, rows in the order `a * p + b`.
///
/// Addition, subtraction and multiplication have `p^2` rows, division `p (p - 1)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModularTable {
    op: ModularOp,
    modulus: u32,
    rows: Vec<[u32; 3]>,
}

impl ModularTable {
    /// The table of `op` modulo `modulus`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a modulus below 2 or above 4096 (16 million rows), or one
    /// that is not prime where the operation is division.
    pub fn new(op: ModularOp, modulus: usize) -> Result<Self> {
        if !(2..=4096).contains(&modulus) {
            return Err(Error::invalid("modulus", modulus, "2 to 4096"));
        }
        let p = modulus as u64;
        if op == ModularOp::Divide && !is_prime(p) {
            return Err(Error::invalid("modulus", modulus, "a prime, for division"));
        }
        let pairs = (0..p).flat_map(|a| (0..p).map(move |b| (a, b)));
        let row = |(a, b)| Some([a as u32, b as u32, op.result(a, b, p)? as u32]);
        Ok(Self {
            op,
            modulus: modulus as u32,
            rows: pairs.filter_map(row).collect(),
        })
    }

    /// The operation.
    pub fn op(&self) -> ModularOp {
        self.op
    }

    /// The modulus `p`, which is also the number of classes.
    pub fn modulus(&self) -> usize {
        self.modulus as usize
    }

    /// `[a, b, result]` of every row.
    pub fn rows(&self) -> &[[u32; 3]] {
        &self.rows
    }

    /// Both operands one-hot, side by side: inputs `[rows, 2p]`, label = result.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a modulus above 812: the table would have more than 2^30
    /// entries.
    pub fn one_hot(&self, dtype: DType, device: &Device) -> Result<Classification> {
        let p = self.modulus();
        if p > 812 {
            let expected = "at most 812 for one-hot pairs; take `pairs` or `tokens`";
            return Err(Error::invalid("modulus", p, expected));
        }
        let mut inputs = vec![0u8; self.rows.len() * 2 * p];
        for (x, [a, b, _]) in inputs.chunks_mut(2 * p).zip(&self.rows) {
            x[*a as usize] = 1;
            x[p + *b as usize] = 1;
        }
        let inputs = Tensor::from_vec(inputs, (self.rows.len(), 2 * p), device)?;
        Classification::new(inputs.to_dtype(dtype)?, self.labels(device)?, p)
    }

    /// Operands as numbers: inputs `u32 [rows, 2]`, label = result; for a network with an
    /// embedding of its own.
    ///
    /// # Errors
    /// Those of candle.
    pub fn pairs(&self, device: &Device) -> Result<Classification> {
        let pairs: Vec<u32> = self.rows.iter().flat_map(|[a, b, _]| [*a, *b]).collect();
        let inputs = Tensor::from_vec(pairs, (self.rows.len(), 2), device)?;
        Classification::new(inputs, self.labels(device)?, self.modulus())
    }

    /// The equation as tokens `a op b =`: inputs `u32 [rows, 4]`, label = result, to be read at the
    /// last position. Numbers are their own tokens, `op` is token `p`, `=` is token `p + 1`:
    /// [`vocabulary`](Self::vocabulary) tokens in all.
    ///
    /// # Errors
    /// Those of candle.
    pub fn tokens(&self, device: &Device) -> Result<Classification> {
        let p = self.modulus;
        let equation = |[a, b, _]: &[u32; 3]| [*a, p, *b, p + 1];
        let tokens: Vec<u32> = self.rows.iter().flat_map(equation).collect();
        let inputs = Tensor::from_vec(tokens, (self.rows.len(), 4), device)?;
        Classification::new(inputs, self.labels(device)?, self.modulus())
    }

    /// Number of different tokens in [`tokens`](Self::tokens): `p + 2`.
    pub fn vocabulary(&self) -> usize {
        self.modulus() + 2
    }

    fn labels(&self, device: &Device) -> Result<Tensor> {
        let labels: Vec<u32> = self.rows.iter().map(|row| row[2]).collect();
        Ok(Tensor::from_vec(labels, self.rows.len(), device)?)
    }
}
