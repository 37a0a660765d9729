//! What stands between the decoder and an expensive, repetitive or badly scaled reward.

use super::{numbers, Batch, Reward};
use crate::error::{check, Error};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Mutex;

/// Judgements as a tensor on the CPU: they are read there anyway.
fn judged(values: Vec<f64>) -> Result<Tensor> {
    let count = values.len();
    Ok(Tensor::from_vec(values, count, &Device::Cpu)?)
}

/// A reward that is asked about a few samples at a time, from several threads.
#[derive(Debug, Clone)]
pub struct Chunked<R> {
    /// The reward.
    pub inner: R,
    /// Samples per call.
    pub chunk: usize,
    /// Calls at the same time.
    pub parallel: usize,
}

impl<S: Batch + Send + Sync, R: Reward<S> + Sync> Reward<S> for Chunked<R> {
    fn reward(&self, clean: &S) -> Result<Tensor> {
        check::require(self.chunk > 0, "Chunked::chunk", self.chunk, "at least 1")?;
        let threads = self.parallel;
        check::require(threads > 0, "Chunked::parallel", threads, "at least 1")?;
        let rows = clean.rows()?;
        let chunks = rows.div_ceil(self.chunk);
        let next = AtomicUsize::new(0);
        let work = || -> Result<Vec<(usize, Vec<f64>)>> {
            let mut done = Vec::new();
            loop {
                let k = next.fetch_add(1, Ordering::Relaxed);
                if k >= chunks {
                    return Ok(done);
                }
                let (from, to) = (k * self.chunk, rows.min((k + 1) * self.chunk));
                let part: Vec<u32> = (from as u32..to as u32).collect();
                let values = self.inner.reward(&clean.take(&part)?)?;
                done.push((from, numbers(&values, to - from, "the rewards")?));
            }
        };
        let parts = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads.min(chunks))
                .map(|_| scope.spawn(work))
                .collect();
            let mut parts = vec![work()];
            for other in others {
                parts.push(other.join().unwrap_or_else(|_| {
                    Err(Error::unsupported(
                        "a reward that panics",
                        "return an error",
                    ))
                }));
            }
            parts
        });
        let mut all = vec![0.0; rows];
        for part in parts {
            for (from, values) in part? {
                all[from..from + values.len()].copy_from_slice(&values);
            }
        }
        judged(all)
    }
}

/// A reward that is asked once about each sample, for discrete states that come again: `key` names
/// a row.
pub struct Cached<R, F> {
    inner: R,
    key: F,
    known: Mutex<HashMap<Vec<u8>, f64>>,
    asked: AtomicUsize,
}

impl<R, F> Cached<R, F> {
    /// Remembers every judgement by the keys that `key` gives the rows of a state.
    pub fn new(inner: R, key: F) -> Self {
        Self {
            inner,
            key,
            known: Mutex::new(HashMap::new()),
            asked: AtomicUsize::new(0),
        }
    }

    /// Rows that the reward itself was asked about.
    pub fn misses(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }
}

/// The numbers of each row as bytes: the key of a batch of tokens.
///
/// # Errors
/// Those of candle.
pub fn token_keys(tokens: &Tensor) -> Result<Vec<Vec<u8>>> {
    let rows = tokens.rows()?;
    let tokens = tokens.to_dtype(DType::U32)?.reshape((rows, ()))?;
    let bytes = |row: Vec<u32>| row.iter().flat_map(|t| t.to_le_bytes()).collect();
    Ok(tokens.to_vec2::<u32>()?.into_iter().map(bytes).collect())
}

impl<S: Batch, R: Reward<S>, F: Fn(&S) -> Result<Vec<Vec<u8>>>> Reward<S> for Cached<R, F> {
    fn reward(&self, clean: &S) -> Result<Tensor> {
        let keys = (self.key)(clean)?;
        let rows = clean.rows()?;
        if keys.len() != rows {
            return Err(Error::argument("number of keys", keys.len(), rows));
        }
        // A thread that panicked left at worst a judgement out.
        let mut known = self.known.lock().unwrap_or_else(|e| e.into_inner());
        let mut fresh: HashMap<&[u8], u32> = HashMap::new();
        for (row, key) in (0u32..).zip(&keys) {
            if !known.contains_key(key) {
                fresh.entry(key).or_insert(row);
            }
        }
        let mut ask: Vec<u32> = fresh.into_values().collect();
        ask.sort_unstable();
        if !ask.is_empty() {
            let values = self.inner.reward(&clean.take(&ask)?)?;
            let values = numbers(&values, ask.len(), "the rewards")?;
            self.asked.fetch_add(ask.len(), Ordering::Relaxed);
            for (row, value) in ask.iter().zip(values) {
                known.insert(keys[*row as usize].clone(), value);
            }
        }
        judged(keys.iter().map(|key| known[key]).collect())
    }
}

/// A reward in standard deviations of a sample: `(r - mean) / std`, so that `alpha` means the same
/// for every reward.
#[derive(Debug, Clone)]
pub struct Standardized<R> {
    /// The reward.
    pub inner: R,
    /// What is taken off.
    pub mean: f64,
    /// What the rest is divided by.
    pub std: f64,
}

impl<R> Standardized<R> {
    /// Measures mean and standard deviation on finished samples, unguided ones say.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] where they are not finite or do not differ; those of the reward.
    pub fn fit<S: Batch>(inner: R, samples: &S) -> Result<Self>
    where
        R: Reward<S>,
    {
        let rows = samples.rows()?;
        let values = numbers(&inner.reward(samples)?, rows, "the rewards")?;
        let mean = values.iter().sum::<f64>() / rows as f64;
        let square: f64 = values.iter().map(|v| (v - mean).powi(2)).sum();
        let std = (square / rows.saturating_sub(1) as f64).sqrt();
        if !(std.is_finite() && std > 0.0) {
            let expected = "rewards that are finite and differ, of two samples or more";
            return Err(Error::argument("standard deviation", std, expected));
        }
        Ok(Self { inner, mean, std })
    }
}

impl<S, R: Reward<S>> Reward<S> for Standardized<R> {
    fn reward(&self, clean: &S) -> Result<Tensor> {
        let raw = self.inner.reward(clean)?.to_dtype(DType::F64)?;
        Ok(raw.affine(1.0 / self.std, -self.mean / self.std)?)
    }
}

/// Several rewards at once, each with its weight.
pub struct WeightedSum<'a, S>(pub Vec<(f64, &'a dyn Reward<S>)>);

impl<S: Batch> Reward<S> for WeightedSum<'_, S> {
    fn reward(&self, clean: &S) -> Result<Tensor> {
        let rows = clean.rows()?;
        let mut sum = vec![0.0; rows];
        for (weight, reward) in &self.0 {
            check::finite("WeightedSum weight", *weight)?;
            let values = numbers(&reward.reward(clean)?, rows, "the rewards")?;
            for (total, value) in sum.iter_mut().zip(values) {
                *total += weight * value;
            }
        }
        judged(sum)
    }
}
