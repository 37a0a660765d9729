//! Sequences as soft tokens of a language model.

use super::SequenceFeatures;
use crate::error::check;
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// What a token of the language model is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    /// One letter.
    Residues {
        /// Letters there are.
        alphabet: usize,
    },
    /// `k` letters side by side; tokens overlap, and token `(i, j, k)` of 3-mers has the number
    /// `A^2 i + A j + k`.
    Kmers {
        /// Letters of a token.
        k: usize,
        /// Letters there are.
        alphabet: usize,
    },
}

impl Encoding {
    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(self) -> Result<()> {
        let holds = (2..=256).contains(&self.alphabet());
        check::require(
            holds,
            "Encoding::alphabet",
            self.alphabet(),
            "2 to 256 letters",
        )?;
        let vocabulary = self.alphabet().checked_pow(self.order() as u32);
        let holds = self.order() > 0 && vocabulary.is_some_and(|v| v <= 1 << 20);
        check::require(
            holds,
            "Encoding::k",
            self.order(),
            "at least 1, and at most a million tokens",
        )
    }

    /// Letters there are.
    pub fn alphabet(self) -> usize {
        match self {
            Self::Residues { alphabet } | Self::Kmers { alphabet, .. } => alphabet,
        }
    }

    /// Letters of a token.
    pub fn order(self) -> usize {
        match self {
            Self::Residues { .. } => 1,
            Self::Kmers { k, .. } => k,
        }
    }

    /// Tokens there are.
    pub fn vocabulary(self) -> usize {
        self.alphabet().pow(self.order() as u32)
    }

    /// Probabilities of tokens `[B, L - k + 1, A^k]` from those of letters `[B, L, A]`: products.
    ///
    /// # Errors
    /// [`Error::Shape`] for another alphabet or sequences shorter than a token.
    pub fn products(self, p: &Tensor) -> Result<Tensor> {
        let (b, l, a) = p.dims3()?;
        let k = self.order();
        if a != self.alphabet() || l < k {
            let expected = format!("[B, at least {k}, {}]", self.alphabet());
            return Err(Error::shape("letters", p.dims(), expected));
        }
        let tokens = l + 1 - k;
        let mut product = p.narrow(1, 0, tokens)?.contiguous()?;
        let mut width = a;
        for shift in 1..k {
            let next = p.narrow(1, shift, tokens)?.contiguous()?;
            let left = product.reshape((b, tokens, width, 1))?;
            product = left.broadcast_mul(&next.reshape((b, tokens, 1, a))?)?;
            width *= a;
            product = product.reshape((b, tokens, width))?;
        }
        Ok(product)
    }

    /// Straight-through tokens of logits `[B, L, A]`: the most likely token of each place, with the
    /// gradient of its probabilities.
    ///
    /// # Errors
    /// As [`products`](Self::products).
    pub fn straight_through(self, logits: &Tensor) -> Result<Tensor> {
        let p = self.products(&nn::softmax::softmax(&logits.contiguous()?, 2)?)?;
        let best = p.detach().argmax(2)?;
        let hard = crate::masked_diffusion::one_hot(&best, self.vocabulary(), p.dtype())?;
        Ok((&p + (hard - &p)?.detach())?)
    }

    /// Hard tokens `[B, L - k + 1, A^k]` of sequences of one length.
    ///
    /// # Errors
    /// [`Error::Shape`] for unequal lengths or none, [`Error::InvalidArgument`] for a letter that is
    /// not in the alphabet.
    pub fn one_hot(self, sequences: &[Vec<u8>], dtype: DType, device: &Device) -> Result<Tensor> {
        let length = self.check(sequences)?;
        let letters: Vec<u32> = sequences.iter().flatten().map(|c| u32::from(*c)).collect();
        let letters = Tensor::from_vec(letters, (sequences.len(), length), device)?;
        self.products(&crate::masked_diffusion::one_hot(
            &letters,
            self.alphabet(),
            dtype,
        )?)
    }

    /// The common length of sequences.
    pub(super) fn check(self, sequences: &[Vec<u8>]) -> Result<usize> {
        let length = sequences.first().map_or(0, Vec::len);
        if length < self.order() {
            let expected = format!("sequences of at least {} letters", self.order());
            return Err(Error::shape(
                "sequences",
                &[sequences.len(), length],
                expected,
            ));
        }
        if let Some(other) = sequences.iter().find(|s| s.len() != length) {
            let expected = format!("{length} letters, as the first");
            return Err(Error::shape("a sequence", &[other.len()], expected));
        }
        match sequences
            .iter()
            .flatten()
            .find(|c| usize::from(**c) >= self.alphabet())
        {
            None => Ok(length),
            Some(letter) => {
                let expected = format!("below {}", self.alphabet());
                Err(Error::argument("letter", letter, expected))
            }
        }
    }

    /// Features `[N, d]` of sequences, without a graph, in pieces.
    ///
    /// # Errors
    /// As [`one_hot`](Self::one_hot); those of the model.
    pub fn features_of(
        self,
        model: &impl SequenceFeatures,
        sequences: &[Vec<u8>],
    ) -> Result<Tensor> {
        let (dtype, device) = model.place();
        self.check(sequences)?;
        let mut parts = vec![];
        for chunk in sequences.chunks(256) {
            parts.push(
                model
                    .features(&self.one_hot(chunk, dtype, &device)?)?
                    .detach(),
            );
        }
        Ok(Tensor::cat(&parts, 0)?)
    }
}
