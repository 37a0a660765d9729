//! Letters and their codes.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// What happens to a letter that stands for several.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ambiguous {
    /// It is an error.
    #[default]
    Refuse,
    /// It becomes the mask, as unknown as any other.
    Mask,
}

/// An alphabet: letters in the order of their codes, letters that stand for several of them, and, for
/// nucleotides, what pairs with what.
///
/// ```
/// use thalweg_sequence_design::sequences::{Alphabet, Ambiguous};
///
/// // The order of DNABERT's vocabulary.
/// let dna = Alphabet::custom("ATCG")?.with_ambiguity('N', "ATCG")?.with_complement("TAGC")?;
/// assert_eq!(dna.encode("CAT", "motif", Ambiguous::Refuse)?, [2, 0, 1]);
/// # Ok::<(), thalweg_sequence_design::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Alphabet {
    letters: Vec<u8>,
    /// For each byte the letters that it stands for, a bit each; none for a byte that is no letter.
    sets: Vec<u64>,
    complement: Option<Vec<u8>>,
}

/// Letters of the largest alphabet: the bits of a set.
const LARGEST: usize = 64;

/// IUPAC's codes for several nucleotides.
const NUCLEOTIDES: [(char, &str); 11] = [
    ('R', "AG"),
    ('Y', "CT"),
    ('S', "CG"),
    ('W', "AT"),
    ('K', "GT"),
    ('M', "AC"),
    ('B', "CGT"),
    ('D', "AGT"),
    ('H', "ACT"),
    ('V', "ACG"),
    ('N', "ACGT"),
];

const PROTEIN: &str = "ACDEFGHIKLMNPQRSTVWY";

/// IUPAC's codes for several amino acids.
const AMINO_ACIDS: [(char, &str); 4] = [('B', "DN"), ('Z', "EQ"), ('J', "IL"), ('X', PROTEIN)];

impl Alphabet {
    /// `A`, `C`, `G`, `T` with IUPAC's ambiguity codes, in either case.
    pub fn dna() -> Self {
        let mut all = Self::known("ACGT", &NUCLEOTIDES);
        all.complement = Some(vec![3, 2, 1, 0]);
        all
    }

    /// `A`, `C`, `G`, `U` with IUPAC's ambiguity codes, in either case.
    pub fn rna() -> Self {
        let mut all = Self::known("ACGT", &NUCLEOTIDES);
        for (t, u) in [(b'T', b'U'), (b't', b'u')] {
            all.sets.swap(usize::from(t), usize::from(u));
        }
        all.letters[3] = b'U';
        all.complement = Some(vec![3, 2, 1, 0]);
        all
    }

    /// The 20 amino acids in the order of their letters, with the codes `B`, `Z`, `J` and `X`, in
    /// either case. Selenocysteine, pyrrolysine, stops and gaps are no letters.
    pub fn protein() -> Self {
        Self::known(PROTEIN, &AMINO_ACIDS)
    }

    /// An alphabet whose letters and codes are known to be right, in either case.
    fn known(letters: &str, ambiguity: &[(char, &str)]) -> Self {
        let mut all = Self {
            letters: letters.bytes().collect(),
            sets: vec![0; 256],
            complement: None,
        };
        for (code, letter) in letters.bytes().enumerate() {
            all.sets[usize::from(letter)] = 1 << code;
        }
        for (code, several) in ambiguity {
            let set = several.bytes().map(|b| all.sets[usize::from(b)]);
            all.sets[*code as usize] = set.fold(0, |a, b| a | b);
        }
        for upper in b'A'..=b'Z' {
            all.sets[usize::from(upper.to_ascii_lowercase())] = all.sets[usize::from(upper)];
        }
        all
    }

    /// An alphabet of one's own, of 2 to 64 ASCII letters; upper and lower case are different letters.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another number of letters, a letter twice, or one that cannot
    /// stand in a file (a space, a control character, one that is not ASCII, `>` or `@`).
    pub fn custom(letters: &str) -> Result<Self> {
        if !(2..=LARGEST).contains(&letters.chars().count()) {
            let expected = format!("2 to {LARGEST} letters");
            return Err(Error::argument("letters", letters, expected));
        }
        let mut all = Self {
            letters: vec![],
            sets: vec![0; 256],
            complement: None,
        };
        for letter in letters.chars() {
            let byte = free(letter, &all.sets)?;
            all.sets[usize::from(byte)] = 1 << all.letters.len();
            all.letters.push(byte);
        }
        Ok(all)
    }

    /// Adds a letter that stands for several.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a letter that has a meaning already or cannot stand in a file,
    /// and for none or others than letters behind it.
    pub fn with_ambiguity(mut self, letter: char, several: &str) -> Result<Self> {
        let byte = free(letter, &self.sets)?;
        let mut set = 0;
        for one in several.bytes() {
            let code = self.code(one).ok_or_else(|| {
                let expected = format!("letters of {}", self.text());
                Error::argument("several", several, expected)
            })?;
            set |= 1 << code;
        }
        if set == 0 {
            return Err(Error::argument("several", several, "at least one letter"));
        }
        self.sets[usize::from(byte)] = set;
        Ok(self)
    }

    /// Says which letter pairs with each, in the order of the letters.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless pairing twice leads back to each letter.
    pub fn with_complement(mut self, pairs: &str) -> Result<Self> {
        let wrong = || {
            let expected = format!("a partner for each of {}, both ways", self.text());
            Error::argument("pairs", pairs, expected)
        };
        let codes: Option<Vec<u8>> = pairs.bytes().map(|b| self.code(b)).collect();
        let codes = codes.ok_or_else(wrong)?;
        let back =
            |(k, c): (usize, &u8)| codes.get(usize::from(*c)).map(|b| usize::from(*b)) == Some(k);
        if codes.len() != self.len() || !codes.iter().enumerate().all(back) {
            return Err(wrong());
        }
        self.complement = Some(codes);
        Ok(self)
    }

    /// The number of letters `K`.
    #[allow(clippy::len_without_is_empty)] // no alphabet is empty
    pub fn len(&self) -> usize {
        self.letters.len()
    }

    /// The code of the mask: `K`.
    pub fn mask(&self) -> u8 {
        self.letters.len() as u8
    }

    /// The letters in the order of their codes.
    pub fn letters(&self) -> &[u8] {
        &self.letters
    }

    fn text(&self) -> String {
        self.letters.iter().map(|b| char::from(*b)).collect()
    }

    /// The letters that a byte stands for, a bit each by code; 0 for a byte that is no letter.
    fn set(&self, byte: u8) -> u64 {
        self.sets[usize::from(byte)]
    }

    /// The code of a byte that stands for one letter.
    pub fn code(&self, byte: u8) -> Option<u8> {
        let set = self.set(byte);
        (set.count_ones() == 1).then(|| set.trailing_zeros() as u8)
    }

    /// Codes of a text; `name` is what errors call it.
    ///
    /// # Errors
    /// [`Error::Sequence`] with the place of a byte that is no letter, or that stands for several
    /// where those are refused.
    pub fn encode(
        &self,
        text: impl AsRef<[u8]>,
        name: &str,
        ambiguous: Ambiguous,
    ) -> Result<Vec<u8>> {
        let one = |(i, byte): (usize, &u8)| match (self.code(*byte), self.set(*byte), ambiguous) {
            (Some(code), ..) => Ok(code),
            (None, 0, _) => Err(self.not_a_letter(name, i, *byte)),
            (None, _, Ambiguous::Mask) => Ok(self.mask()),
            (None, _, Ambiguous::Refuse) => {
                let reason = format!(
                    "`{}` stands for several letters of {}",
                    shown(*byte),
                    self.text()
                );
                Err(Error::sequence(name, i, reason))
            }
        };
        text.as_ref().iter().enumerate().map(one).collect()
    }

    fn not_a_letter(&self, name: &str, index: usize, byte: u8) -> Error {
        let reason = format!("`{}` is no letter of {}", shown(byte), self.text());
        Error::sequence(name, index, reason)
    }

    /// The text of codes; a mask is the letter that stands for all of them.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a code beyond the mask, or a mask where no letter stands for all.
    pub fn decode(&self, codes: &[u8]) -> Result<String> {
        let whole = u64::MAX >> (LARGEST - self.len());
        let any = || (0..=u8::MAX).find(|b| self.set(*b) == whole);
        let one = |code: &u8| match self.letters.get(usize::from(*code)) {
            Some(letter) => Ok(char::from(*letter)),
            None if *code == self.mask() => any().map(char::from).ok_or_else(|| {
                let expected = format!("a letter that stands for all of {}", self.text());
                Error::argument("the mask's letter", "none", expected)
            }),
            None => {
                let expected = format!("at most {}, the mask", self.mask());
                Err(Error::argument("code", code, expected))
            }
        };
        codes.iter().map(one).collect()
    }

    /// The other strand, read in its own direction. Masks stay masks.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for letters that do not pair; [`Error::InvalidArgument`] for a code
    /// beyond the mask.
    pub fn reverse_complement(&self, codes: &[u8]) -> Result<Vec<u8>> {
        let pairs = self.complement.as_ref().ok_or_else(|| {
            let reason = "its letters do not pair; with_complement says which do";
            Error::unsupported(format!("the other strand of {}", self.text()), reason)
        })?;
        self.check(codes)?;
        let partner = |c: &u8| pairs.get(usize::from(*c)).copied().unwrap_or(self.mask());
        Ok(codes.iter().rev().map(partner).collect())
    }

    fn check(&self, codes: &[u8]) -> Result<()> {
        match codes.iter().find(|c| **c > self.mask()) {
            None => Ok(()),
            Some(code) => {
                let expected = format!("at most {}, the mask", self.mask());
                Err(Error::argument("code", code, expected))
            }
        }
    }

    /// The common length of sequences, none of which is empty.
    fn length<S: AsRef<[u8]>>(sequences: &[S]) -> Result<usize> {
        let length = sequences.first().map_or(0, |s| s.as_ref().len());
        if length == 0 {
            let expected = "at least one sequence of at least one letter";
            return Err(Error::shape(
                "sequences",
                &[sequences.len(), length],
                expected,
            ));
        }
        match sequences.iter().position(|s| s.as_ref().len() != length) {
            None => Ok(length),
            Some(k) => {
                let got = sequences[k].as_ref().len();
                let expected = format!("{length} letters, as the first");
                Err(Error::shape(format!("sequence {k}"), &[got], expected))
            }
        }
    }

    /// Tokens `[B, L]` (u32) of sequences of one length.
    ///
    /// # Errors
    /// [`Error::Shape`] for unequal lengths or none; [`Error::InvalidArgument`] for a code beyond the
    /// mask.
    pub fn tokens(&self, sequences: &[Vec<u8>], device: &Device) -> Result<Tensor> {
        let length = Self::length(sequences)?;
        sequences.iter().try_for_each(|s| self.check(s))?;
        let tokens: Vec<u32> = sequences.iter().flatten().map(|c| u32::from(*c)).collect();
        Ok(Tensor::from_vec(tokens, (sequences.len(), length), device)?)
    }

    /// The sequences of tokens `[B, L]`, of samples say: the way back from [`tokens`](Self::tokens).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a token beyond the mask; those of candle.
    pub fn codes(&self, tokens: &Tensor) -> Result<Vec<Vec<u8>>> {
        let code = |token: u32| {
            let code = u8::try_from(token).ok().filter(|c| *c <= self.mask());
            code.ok_or_else(|| {
                let expected = format!("at most {}, the mask", self.mask());
                Error::argument("token", token, expected)
            })
        };
        let rows = tokens.to_dtype(DType::U32)?.to_vec2::<u32>()?;
        rows.into_iter()
            .map(|row| row.into_iter().map(code).collect())
            .collect()
    }

    /// Tokens `[B, L]` of sequences of any lengths, cut or filled up with the first letter to
    /// `length`, and what counts of them, `[B, L]` of 0 and 1 in f32: the attention of
    /// [`MaskedDiffusion::nll`](crate::masked_diffusion::MaskedDiffusion::nll).
    ///
    /// # Errors
    /// [`Error::Shape`] for no sequence or no length; [`Error::InvalidArgument`] for a code beyond the
    /// mask.
    pub fn padded_tokens(
        &self,
        sequences: &[Vec<u8>],
        length: usize,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        if sequences.is_empty() || length == 0 {
            let expected = "at least one sequence, and a length";
            return Err(Error::shape(
                "sequences",
                &[sequences.len(), length],
                expected,
            ));
        }
        let (mut tokens, mut counts) = (vec![], vec![]);
        for sequence in sequences {
            self.check(sequence)?;
            let known = sequence.len().min(length);
            tokens.extend(sequence[..known].iter().map(|c| u32::from(*c)));
            tokens.resize(tokens.len() + length - known, 0);
            counts.resize(counts.len() + known, 1f32);
            counts.resize(counts.len() + length - known, 0.0);
        }
        let shape = (sequences.len(), length);
        Ok((
            Tensor::from_vec(tokens, shape, device)?,
            Tensor::from_vec(counts, shape, device)?,
        ))
    }

    /// One-hot numbers `[B, L, K]` of sequences of one length; masks are rows of zeros.
    ///
    /// # Errors
    /// As [`tokens`](Self::tokens).
    pub fn one_hot(&self, sequences: &[Vec<u8>], dtype: DType, device: &Device) -> Result<Tensor> {
        let tokens = self.tokens(sequences, device)?;
        let all = crate::masked_diffusion::one_hot(&tokens, self.len() + 1, dtype)?;
        Ok(all.narrow(2, 0, self.len())?.contiguous()?)
    }

    /// One-hot numbers `[B, L, K]` of texts of one length, in which a letter that stands for several
    /// is spread evenly over them.
    ///
    /// # Errors
    /// [`Error::Shape`] for unequal lengths or none; [`Error::Sequence`] for a byte that is no letter.
    pub fn soft_one_hot<S: AsRef<[u8]>>(
        &self,
        texts: &[S],
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let (length, k) = (Self::length(texts)?, self.len());
        let mut out = vec![0f32; texts.len() * length * k];
        for (row, text) in texts.iter().enumerate() {
            for (i, byte) in text.as_ref().iter().enumerate() {
                let set = self.set(*byte);
                if set == 0 {
                    return Err(self.not_a_letter(&format!("sequence {row}"), i, *byte));
                }
                let share = 1.0 / set.count_ones() as f32;
                let place = &mut out[(row * length + i) * k..][..k];
                let shares = place.iter_mut().enumerate();
                shares.for_each(|(code, p)| *p = share * (set >> code & 1) as f32);
            }
        }
        Ok(Tensor::from_vec(out, (texts.len(), length, k), device)?.to_dtype(dtype)?)
    }
}

/// The byte of a letter that has no meaning yet and can stand in a file.
fn free(letter: char, sets: &[u64]) -> Result<u8> {
    let byte = u8::try_from(letter).ok().filter(|b| b.is_ascii_graphic());
    match byte.filter(|b| !b">@".contains(b) && sets[usize::from(*b)] == 0) {
        Some(byte) => Ok(byte),
        None => {
            let expected = "a printable ASCII letter that has no meaning yet";
            Err(Error::argument("letter", letter, expected))
        }
    }
}

/// A byte as an error shows it.
fn shown(byte: u8) -> String {
    byte.escape_ascii().to_string()
}
