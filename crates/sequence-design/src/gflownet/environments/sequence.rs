//! Strings: built from the left, from both sides, or by edits; and tables of their scores.

use super::super::Environment;
use crate::error::check;
use crate::{Error, Result};
use std::collections::HashMap;

fn check_string(field: &'static str, len: usize, alphabet: usize) -> Result<()> {
    check::at_least(field, len, 1)?;
    let expected = "2 to 256 symbols";
    check::require((2..=256).contains(&alphabet), field, alphabet, expected)
}

/// One-hot positions with one more symbol for "nothing yet".
fn write_string(alphabet: usize, len: usize, state: &[u8], out: &mut [f32]) {
    for position in 0..len {
        let symbol = state.get(position).map_or(alphabet, |s| usize::from(*s));
        out[position * (alphabet + 1) + symbol] = 1.0;
    }
}

/// Strings of exactly `len` symbols, from left to right: one parent each, so that `P_B = 1`.
///
/// Features: `len` positions of `alphabet + 1` one-hot numbers, the last for "nothing yet".
#[derive(Debug, Clone, PartialEq)]
pub struct AppendSequence {
    len: usize,
    alphabet: usize,
}

impl AppendSequence {
    /// Strings of `len` of `alphabet` symbols.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for an empty string or fewer than 2 or more than 256 symbols.
    pub fn new(len: usize, alphabet: usize) -> Result<Self> {
        check_string("AppendSequence", len, alphabet)?;
        Ok(Self { len, alphabet })
    }

    /// Strings of `bits` bits in words of `word` bits: a symbol is a word.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless words of 1 to 8 bits divide the string.
    pub fn bits(bits: usize, word: usize) -> Result<Self> {
        let holds = (1..=8).contains(&word) && bits > 0 && bits.is_multiple_of(word);
        let expected = "1 to 8 bits that divide the string";
        check::require(holds, "AppendSequence::word", (bits, word), expected)?;
        Self::new(bits / word, 1 << word)
    }

    /// The bits of a string of [`bits`](Self::bits), the highest of each word first.
    pub fn to_bits(&self, state: &[u8]) -> Vec<bool> {
        let word = self.alphabet.trailing_zeros();
        let bits = |s: &u8| {
            let s = *s;
            (0..word).rev().map(move |k| s >> k & 1 == 1)
        };
        state.iter().flat_map(bits).collect()
    }

    /// Symbols of a string.
    pub fn sequence_len(&self) -> usize {
        self.len
    }

    /// Symbols to choose from.
    pub fn alphabet(&self) -> usize {
        self.alphabet
    }
}

impl Environment for AppendSequence {
    type State = Vec<u8>;

    fn actions(&self) -> usize {
        self.alphabet + 1
    }

    fn initial(&self) -> Vec<u8> {
        vec![]
    }

    fn max_steps(&self) -> usize {
        self.len
    }

    fn forward_mask(&self, state: &Vec<u8>, mask: &mut [bool]) {
        let whole = state.len() == self.len;
        mask[..self.alphabet].fill(!whole);
        mask[self.alphabet] = whole;
    }

    fn backward_mask(&self, state: &Vec<u8>, mask: &mut [bool]) {
        if let Some(last) = state.last() {
            mask[usize::from(*last)] = true;
        }
    }

    fn step(&self, state: &mut Vec<u8>, action: usize) {
        state.push(action as u8);
    }

    fn undo(&self, state: &mut Vec<u8>, _: usize) {
        state.pop();
    }

    fn feature_width(&self) -> usize {
        self.len * (self.alphabet + 1)
    }

    fn write_features(&self, state: &Vec<u8>, out: &mut [f32]) {
        write_string(self.alphabet, self.len, state, out);
    }
}

/// Strings of exactly `len` symbols that grow at both ends: actions `0..A` append, `A..2A` prepend.
/// A string has up to two parents. Where both ends lead to the same string (a repeated symbol, and
/// the first one) only appending is possible, so that two states are never joined twice.
#[derive(Debug, Clone, PartialEq)]
pub struct PrependAppend {
    len: usize,
    alphabet: usize,
}

impl PrependAppend {
    /// Strings of `len` of `alphabet` symbols.
    ///
    /// # Errors
    /// As [`AppendSequence::new`].
    pub fn new(len: usize, alphabet: usize) -> Result<Self> {
        check_string("PrependAppend", len, alphabet)?;
        Ok(Self { len, alphabet })
    }
}

fn repeats(state: &[u8], symbol: u8) -> bool {
    state.iter().all(|s| *s == symbol)
}

impl Environment for PrependAppend {
    type State = Vec<u8>;

    fn actions(&self) -> usize {
        2 * self.alphabet + 1
    }

    fn initial(&self) -> Vec<u8> {
        vec![]
    }

    fn max_steps(&self) -> usize {
        self.len
    }

    fn forward_mask(&self, state: &Vec<u8>, mask: &mut [bool]) {
        if state.len() == self.len {
            mask[2 * self.alphabet] = true;
            return;
        }
        for symbol in 0..self.alphabet {
            mask[symbol] = true;
            mask[self.alphabet + symbol] = !repeats(state, symbol as u8);
        }
    }

    fn backward_mask(&self, state: &Vec<u8>, mask: &mut [bool]) {
        let (Some(first), Some(last)) = (state.first(), state.last()) else {
            return;
        };
        mask[usize::from(*last)] = true;
        mask[self.alphabet + usize::from(*first)] = !repeats(state, *first);
    }

    fn step(&self, state: &mut Vec<u8>, action: usize) {
        match action.checked_sub(self.alphabet) {
            None => state.push(action as u8),
            Some(symbol) => state.insert(0, symbol as u8),
        }
    }

    fn undo(&self, state: &mut Vec<u8>, action: usize) {
        if action < self.alphabet {
            state.pop();
        } else {
            state.remove(0);
        }
    }

    fn feature_width(&self) -> usize {
        self.len * (self.alphabet + 1)
    }

    fn write_features(&self, state: &Vec<u8>, out: &mut [f32]) {
        write_string(self.alphabet, self.len, state, out);
    }
}

/// Substitutions in a given string, at most `budget` of them: action `position * A + symbol`
/// replaces a symbol that still is the original one.
///
/// Features: one-hot symbols, and the share of the budget that is spent.
#[derive(Debug, Clone, PartialEq)]
pub struct SequenceEdit {
    original: Vec<u8>,
    alphabet: usize,
    budget: usize,
}

impl SequenceEdit {
    /// Edits of `original`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for an empty string, a symbol outside the alphabet, or a budget of
    /// none or of more edits than positions.
    pub fn new(original: &[u8], alphabet: usize, budget: usize) -> Result<Self> {
        check_string("SequenceEdit", original.len(), alphabet)?;
        if let Some(symbol) = original.iter().find(|s| usize::from(**s) >= alphabet) {
            let expected = format!("symbols below {alphabet}");
            return Err(Error::config("SequenceEdit::original", symbol, expected));
        }
        let holds = (1..=original.len()).contains(&budget);
        let expected = "at least 1 and at most the positions";
        check::require(holds, "SequenceEdit::budget", budget, expected)?;
        Ok(Self {
            original: original.to_vec(),
            alphabet,
            budget,
        })
    }

    fn edits(&self, state: &[u8]) -> usize {
        let pairs = state.iter().zip(&self.original);
        pairs.filter(|(a, b)| a != b).count()
    }
}

impl Environment for SequenceEdit {
    type State = Vec<u8>;

    fn actions(&self) -> usize {
        self.original.len() * self.alphabet + 1
    }

    fn initial(&self) -> Vec<u8> {
        self.original.clone()
    }

    fn max_steps(&self) -> usize {
        self.budget
    }

    fn forward_mask(&self, state: &Vec<u8>, mask: &mut [bool]) {
        if let Some(stop) = mask.last_mut() {
            *stop = true;
        }
        if self.edits(state) == self.budget {
            return;
        }
        for (i, (s, o)) in state.iter().zip(&self.original).enumerate() {
            if s == o {
                let symbols = &mut mask[i * self.alphabet..(i + 1) * self.alphabet];
                symbols.fill(true);
                symbols[usize::from(*o)] = false;
            }
        }
    }

    fn backward_mask(&self, state: &Vec<u8>, mask: &mut [bool]) {
        for (i, (s, o)) in state.iter().zip(&self.original).enumerate() {
            if s != o {
                mask[i * self.alphabet + usize::from(*s)] = true;
            }
        }
    }

    fn step(&self, state: &mut Vec<u8>, action: usize) {
        state[action / self.alphabet] = (action % self.alphabet) as u8;
    }

    fn undo(&self, state: &mut Vec<u8>, action: usize) {
        let position = action / self.alphabet;
        state[position] = self.original[position];
    }

    fn feature_width(&self) -> usize {
        self.original.len() * self.alphabet + 1
    }

    fn write_features(&self, state: &Vec<u8>, out: &mut [f32]) {
        for (i, s) in state.iter().enumerate() {
            out[i * self.alphabet + usize::from(*s)] = 1.0;
        }
        out[self.original.len() * self.alphabet] = self.edits(state) as f32 / self.budget as f32;
    }
}

/// Measured scores of strings: an objective for the environments above.
#[derive(Debug, Clone, Default)]
pub struct TabularLandscape {
    scores: HashMap<Vec<u8>, f64>,
}

impl TabularLandscape {
    /// The scores of these strings, min-max normalized to `[0, 1]`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an empty table, a string that occurs twice with different
    /// scores, and scores that are all the same; [`Error::NonFinite`].
    pub fn normalized(rows: impl IntoIterator<Item = (Vec<u8>, f64)>) -> Result<Self> {
        let mut scores: HashMap<Vec<u8>, f64> = HashMap::new();
        for (string, score) in rows {
            if !score.is_finite() {
                return Err(Error::non_finite(format!("the score of {string:?}")));
            }
            if let Some(other) = scores.insert(string.clone(), score) {
                if other != score {
                    let value = format!("{string:?} twice");
                    return Err(Error::argument("rows", value, "one score a string"));
                }
            }
        }
        let fold = |f: fn(f64, f64) -> f64, start| scores.values().copied().fold(start, f);
        let (low, high) = (
            fold(f64::min, f64::INFINITY),
            fold(f64::max, f64::NEG_INFINITY),
        );
        if low >= high {
            let expected = "at least two different scores";
            return Err(Error::argument("rows", scores.len(), expected));
        }
        scores
            .values_mut()
            .for_each(|s| *s = (*s - low) / (high - low));
        Ok(Self { scores })
    }

    /// The score of a string, if it is in the table.
    pub fn get(&self, string: &[u8]) -> Option<f64> {
        self.scores.get(string).copied()
    }

    /// Strings in the table.
    pub fn len(&self) -> usize {
        self.scores.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.scores.is_empty()
    }
}
