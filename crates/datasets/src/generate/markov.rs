//! Sequences of tokens from several Markov chains: a language whose statistics change from one
//! document to the next, with a known best loss.
//!
//! A sequence begins with the index of its chain, as a token, and continues with that chain's
//! transitions, so that a model which reads the first token can predict as well as anybody.
//! Batches from one chain only have the fluctuating token statistics of length-bucketed text;
//! mixed batches do not.
//!
//! ```
//! use candle_core::Device;
//! use thalweg_datasets::generate::{ChainChoice, MarkovChains};
//! use thalweg_datasets::RandomStream;
//!
//! let mut rng = RandomStream::new(0);
//! let chains = MarkovChains::dirichlet(8, 32, 0.15, &mut rng)?;
//! let batch = chains.sample(8, 25, ChainChoice::OneAtRandom, &mut rng, &Device::Cpu)?;
//! assert_eq!(batch.dims(), &[8, 25]);
//! # Ok::<(), thalweg_datasets::Error>(())
//! ```

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rand_distr::{Distribution, Gamma};
use tensor_core::random::RandomStream;

/// Which chain the sequences of a batch come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainChoice {
    /// This chain.
    One(usize),
    /// One chain for the whole batch, uniform.
    OneAtRandom,
    /// A uniform chain for each sequence.
    Mixed,
}

/// First-order Markov chains over the same tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct MarkovChains {
    chains: usize,
    tokens: usize,
    /// `[chains, tokens, tokens]`: probability of the next token (last axis).
    transitions: Vec<f64>,
}

impl MarkovChains {
    /// Chains whose rows are drawn from the symmetric Dirichlet distribution with the given
    /// concentration: small values make rows that prefer few successors.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] without chains, for more chains than tokens (the first token
    /// names the chain), or a concentration outside `1e-6..=1e6`.
    pub fn dirichlet(
        chains: usize,
        tokens: usize,
        concentration: f64,
        rng: &mut RandomStream,
    ) -> Result<Self> {
        let total = table_size(chains, tokens)?;
        // Outside, rows are one-hot or uniform to the last bit.
        if !(1e-6..=1e6).contains(&concentration) {
            let expected = "1e-6 to 1e6";
            return Err(Error::invalid("concentration", concentration, expected));
        }
        // Gamma(a) = Gamma(a + 1) U^(1/a), kept as a logarithm: small concentrations underflow.
        let gamma = Gamma::new(concentration + 1.0, 1.0)
            .map_err(|e| Error::invalid("concentration", concentration, e))?;
        let mut transitions = vec![0.0; total];
        for row in transitions.chunks_mut(tokens) {
            for x in row.iter_mut() {
                let u = 1.0 - rng.next_uniform();
                *x = gamma.sample(rng).ln() + u.ln() / concentration;
            }
            normalize_logarithms(row);
        }
        Ok(Self {
            chains,
            tokens,
            transitions,
        })
    }

    /// Chains with given transitions `[chains, tokens, tokens]`: non-negative rows, which are
    /// divided by their sum.
    ///
    /// # Errors
    /// [`Error::BadTensor`] for another shape, [`Error::InvalidArgument`] for a negative or
    /// non-finite entry, a row of zeros, or more chains than tokens.
    pub fn from_transitions(transitions: &Tensor) -> Result<Self> {
        let &[chains, tokens, successors] = transitions.dims() else {
            let expected = "[chains, tokens, tokens]";
            return Err(Error::tensor("transitions", transitions, expected));
        };
        if tokens != successors {
            let expected = "[chains, tokens, tokens]";
            return Err(Error::tensor("transitions", transitions, expected));
        }
        table_size(chains, tokens)?;
        let mut values: Vec<f64> = transitions.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
        for (i, row) in values.chunks_mut(tokens).enumerate() {
            let sum: f64 = row.iter().sum();
            let valid = row.iter().all(|p| *p >= 0.0) && sum.is_finite() && sum > 0.0;
            if !valid {
                let expected = "finite numbers >= 0, not all zero";
                let value = format!("row {} of chain {}", i % tokens, i / tokens);
                return Err(Error::invalid("transitions", value, expected));
            }
            row.iter_mut().for_each(|p| *p /= sum);
        }
        Ok(Self {
            chains,
            tokens,
            transitions: values,
        })
    }

    /// Number of chains.
    pub fn chains(&self) -> usize {
        self.chains
    }

    /// Number of tokens, the vocabulary of a model.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Transition probabilities `[chains, tokens, tokens]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn transitions(&self, dtype: DType, device: &Device) -> Result<Tensor> {
        let shape = (self.chains, self.tokens, self.tokens);
        let table = Tensor::from_slice(&self.transitions, shape, device)?;
        Ok(table.to_dtype(dtype)?)
    }

    /// `u32 [sequences, length]`, each row from one chain, first token = the chain's index.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a length of 0 or a chain that does not exist.
    pub fn sample(
        &self,
        sequences: usize,
        length: usize,
        choice: ChainChoice,
        rng: &mut RandomStream,
        device: &Device,
    ) -> Result<Tensor> {
        if length == 0 {
            return Err(Error::invalid("length", 0, "at least 1"));
        }
        let chosen = self.choose(sequences, choice, rng)?;
        let mut tokens = Vec::with_capacity(sequences * length);
        for chain in chosen {
            let mut token = chain;
            tokens.push(token as u32);
            for _ in 1..length {
                token = pick(self.row(chain, token), rng.next_uniform());
                tokens.push(token as u32);
            }
        }
        Ok(Tensor::from_vec(tokens, (sequences, length), device)?)
    }

    fn choose(
        &self,
        sequences: usize,
        choice: ChainChoice,
        rng: &mut RandomStream,
    ) -> Result<Vec<usize>> {
        match choice {
            ChainChoice::One(chain) if chain >= self.chains => {
                let expected = format!("less than {}", self.chains);
                Err(Error::invalid("chain", chain, expected))
            }
            ChainChoice::One(chain) => Ok(vec![chain; sequences]),
            ChainChoice::OneAtRandom => Ok(vec![rng.below(self.chains)?; sequences]),
            ChainChoice::Mixed => (0..sequences)
                .map(|_| Ok(rng.below(self.chains)?))
                .collect(),
        }
    }

    /// The least possible next-token cross-entropy (nats a token) on sequences of `length` tokens
    /// with uniform chains: the mean of the transitions' entropy over chains and over the
    /// `length - 1` predictions, exactly.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a length below 2.
    pub fn best_cross_entropy(&self, length: usize) -> Result<f64> {
        if length < 2 {
            return Err(Error::invalid("length", length, "at least 2"));
        }
        let mut total = 0.0;
        for chain in 0..self.chains {
            let mut state = vec![0.0; self.tokens];
            state[chain] = 1.0;
            for _ in 1..length {
                let mut next = vec![0.0; self.tokens];
                for (token, weight) in state.iter().enumerate() {
                    let row = self.row(chain, token);
                    total += weight * entropy(row);
                    for (to, p) in next.iter_mut().zip(row) {
                        *to += weight * p;
                    }
                }
                state = next;
            }
        }
        Ok(total / (self.chains * (length - 1)) as f64)
    }

    fn row(&self, chain: usize, token: usize) -> &[f64] {
        let start = (chain * self.tokens + token) * self.tokens;
        &self.transitions[start..start + self.tokens]
    }
}

/// Entries of the table of transitions.
fn table_size(chains: usize, tokens: usize) -> Result<usize> {
    if chains == 0 || chains > tokens {
        let expected = format!("1 to {tokens}, the number of tokens");
        return Err(Error::invalid("chains", chains, expected));
    }
    let total = tokens
        .checked_mul(tokens)
        .and_then(|n| n.checked_mul(chains));
    // 2^28 entries are 2 GiB.
    total
        .filter(|n| *n <= 1 << 28)
        .ok_or_else(|| Error::invalid("tokens", tokens, "chains * tokens^2 of at most 2^28"))
}

/// Replaces logarithms of weights by weights with sum 1.
fn normalize_logarithms(row: &mut [f64]) {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    row.iter_mut().for_each(|x| *x = (*x - max).exp());
    let sum: f64 = row.iter().sum();
    row.iter_mut().for_each(|x| *x /= sum);
}

/// The index at which the cumulative sum of a row (of sum 1) passes `u`.
fn pick(row: &[f64], u: f64) -> usize {
    let mut sum = 0.0;
    let mut last = 0;
    for (i, p) in row.iter().enumerate().filter(|(_, p)| **p > 0.0) {
        sum += p;
        last = i;
        if u < sum {
            break;
        }
    }
    last
}

fn entropy(row: &[f64]) -> f64 {
    let terms = row.iter().filter(|p| **p > 0.0);
    terms.map(|p| -p * p.ln()).sum()
}
