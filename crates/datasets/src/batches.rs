//! Mini-batches in a seeded order, with a state that resumes in the middle of an epoch.
//!
//! [`Batches`] knows only how many examples there are; the data comes in with each call. The order
//! of epoch `e` is a function of the stream's key and `e`, so a state is a few numbers, whatever
//! the size of the data.
//!
//! ```
//! use thalweg_datasets::{digits, BatchConfig, Batches, RandomStream};
//!
//! let data = digits()?;
//! let mut rng = RandomStream::new(1);
//! let mut batches = Batches::new(data.len(), BatchConfig::shuffled(256), &mut rng)?;
//! for epoch in 0..2 {
//!     for batch in batches.epoch(&data) {
//!         let (inputs, labels) = batch?;
//!         assert_eq!(inputs.dims()[0], labels.dims()[0]);
//!     }
//!     assert_eq!(batches.epochs_done(), epoch + 1);
//! }
//! let (inputs, _) = batches.draw(&data)?; // step-wise training: epochs follow by themselves
//! assert_eq!(inputs.dims(), &[256, 64]);
//! # Ok::<(), thalweg_datasets::Error>(())
//! ```

use crate::data::Examples;
use crate::split::check_count;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use tensor_core::random::{RandomState, RandomStream};

/// In which order examples come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As they are stored, the same in every epoch.
    Sequential,
    /// A new random permutation in every epoch.
    Shuffled,
    /// Each index uniform and independent; an "epoch" is as many draws as there are examples.
    WithReplacement,
}

/// What a [`Batches`] does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchConfig {
    /// Examples in a batch.
    pub size: usize,
    /// In which order they come.
    pub order: Order,
    /// Leave out the last batch of an epoch when it is smaller than `size`.
    pub drop_last: bool,
}

impl BatchConfig {
    /// Shuffled, without a smaller last batch: what training usually wants.
    pub fn shuffled(size: usize) -> Self {
        Self {
            size,
            order: Order::Shuffled,
            drop_last: true,
        }
    }

    /// In stored order, every example once: what evaluation wants.
    pub fn sequential(size: usize) -> Self {
        Self {
            size,
            order: Order::Sequential,
            drop_last: false,
        }
    }

    /// Independent uniform draws, as the theory of SGD assumes; the last batch is never smaller
    /// than `size`.
    pub fn with_replacement(size: usize) -> Self {
        Self {
            size,
            order: Order::WithReplacement,
            drop_last: true,
        }
    }

    /// Checks the values for `examples` examples.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no examples, a batch of size 0, and a full batch that
    /// `drop_last` asks for but the examples cannot fill.
    pub fn validate(&self, examples: usize) -> Result<()> {
        check_count(examples)?;
        if examples == 0 {
            return Err(Error::invalid("examples", 0, "at least 1"));
        }
        if self.size == 0 {
            return Err(Error::invalid("size", 0, "at least 1"));
        }
        if self.drop_last && self.size > examples {
            let expected = format!("at most {examples}, the number of examples, with drop_last");
            return Err(Error::invalid("size", self.size, expected));
        }
        Ok(())
    }
}

/// A [`Batches`] as plain data; see [`Batches::state`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchState {
    /// The stream that the orders derive from.
    pub stream: RandomState,
    /// The running epoch, counted from 0.
    pub epoch: u64,
    /// Examples of this epoch that have been handed out.
    pub position: u64,
    /// How many examples there are.
    pub examples: u64,
    /// The configuration.
    pub config: BatchConfig,
}

/// Bytes of a [`BatchState`] as a tensor: key, four numbers and two flags, each 8 bytes.
const STATE_BYTES: usize = 32 + 7 * 8;

impl BatchState {
    /// The state as a `u8` tensor on the CPU, for a checkpoint.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_tensor(&self) -> Result<Tensor> {
        let order = match self.config.order {
            Order::Sequential => 0,
            Order::Shuffled => 1,
            Order::WithReplacement => 2,
        };
        let numbers = [
            self.stream.position,
            self.epoch,
            self.position,
            self.examples,
            self.config.size as u64,
            order,
            u64::from(self.config.drop_last),
        ];
        let mut bytes = self.stream.key.to_vec();
        bytes.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
        Ok(Tensor::from_vec(bytes, STATE_BYTES, &Device::Cpu)?)
    }

    /// Reads what [`to_tensor`](Self::to_tensor) wrote.
    ///
    /// # Errors
    /// [`Error::State`] for another length or an unknown order.
    pub fn from_tensor(tensor: &Tensor) -> Result<Self> {
        let bytes = tensor.flatten_all()?.to_vec1::<u8>()?;
        if bytes.len() != STATE_BYTES {
            let message = format!("{} bytes: expected {STATE_BYTES}", bytes.len());
            return Err(Error::State(message));
        }
        let mut key = [0; 32];
        key.copy_from_slice(&bytes[..32]);
        let number = |i: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&bytes[32 + 8 * i..40 + 8 * i]);
            u64::from_le_bytes(word)
        };
        let order = match number(5) {
            0 => Order::Sequential,
            1 => Order::Shuffled,
            2 => Order::WithReplacement,
            other => return Err(Error::State(format!("order {other}: expected 0, 1 or 2"))),
        };
        Ok(Self {
            stream: RandomState {
                key,
                position: number(0),
            },
            epoch: number(1),
            position: number(2),
            examples: number(3),
            config: BatchConfig {
                size: number(4) as usize,
                order,
                drop_last: number(6) != 0,
            },
        })
    }
}

/// A never-ending source of batches, cut into epochs; see the [module](self) page.
#[derive(Debug, Clone)]
pub struct Batches {
    config: BatchConfig,
    examples: usize,
    stream: RandomStream,
    epoch: u64,
    position: usize,
    /// Indices of the running epoch; empty for [`Order::Sequential`].
    order: Vec<u32>,
}

impl Batches {
    /// Batches over `0..examples`. Takes one number from `rng`, so that two calls give two orders.
    ///
    /// # Errors
    /// Those of [`BatchConfig::validate`].
    pub fn new(examples: usize, config: BatchConfig, rng: &mut RandomStream) -> Result<Self> {
        let word = rng.bits();
        let stream = rng.split_index("batches", word);
        Self::at(examples, config, stream, 0, 0)
    }

    fn at(
        examples: usize,
        config: BatchConfig,
        stream: RandomStream,
        epoch: u64,
        position: usize,
    ) -> Result<Self> {
        config.validate(examples)?;
        let mut batches = Self {
            config,
            examples,
            stream,
            epoch,
            position,
            order: Vec::new(),
        };
        batches.fill_order()?;
        Ok(batches)
    }

    fn fill_order(&mut self) -> Result<()> {
        let mut rng = self.stream.split_index("epoch", self.epoch);
        self.order = match self.config.order {
            Order::Sequential => Vec::new(),
            Order::Shuffled => rng.permutation(self.examples)?,
            Order::WithReplacement => {
                let draw = |_| Ok(rng.below(self.examples)? as u32);
                (0..self.examples).map(draw).collect::<Result<_>>()?
            }
        };
        Ok(())
    }

    /// The configuration.
    pub fn config(&self) -> BatchConfig {
        self.config
    }

    /// How many examples there are.
    pub fn examples(&self) -> usize {
        self.examples
    }

    /// Batches in an epoch.
    pub fn batches_per_epoch(&self) -> usize {
        if self.config.drop_last {
            self.examples / self.config.size
        } else {
            self.examples.div_ceil(self.config.size)
        }
    }

    /// Epochs that have been handed out completely.
    pub fn epochs_done(&self) -> u64 {
        self.epoch + u64::from(self.remaining() == 0)
    }

    /// Examples that the running epoch still hands out.
    fn remaining(&self) -> usize {
        let left = self.examples - self.position;
        if self.config.drop_last && left < self.config.size {
            0
        } else {
            left
        }
    }

    /// The indices of the next batch; `None` once at the end of an epoch, after which the next one
    /// begins.
    ///
    /// # Errors
    /// Those of the random stream.
    pub fn next_indices(&mut self) -> Result<Option<Vec<u32>>> {
        let take = self.remaining().min(self.config.size);
        if take == 0 {
            self.epoch += 1;
            self.position = 0;
            self.fill_order()?;
            return Ok(None);
        }
        let range = self.position..self.position + take;
        self.position += take;
        Ok(Some(match self.config.order {
            Order::Sequential => range.map(|i| i as u32).collect(),
            Order::Shuffled | Order::WithReplacement => self.order[range].to_vec(),
        }))
    }

    /// The next batch (inputs, labels) of `data`, on its device; `None` once at the end of an
    /// epoch, after which the next one begins.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when `data` has another number of examples than this was made
    /// for.
    pub fn next_batch(&mut self, data: &impl Examples) -> Result<Option<(Tensor, Tensor)>> {
        let count = data.count()?;
        if count != self.examples {
            let expected = format!("{}, as the batches were made for", self.examples);
            return Err(Error::invalid("examples", count, expected));
        }
        match self.next_indices()? {
            Some(indices) => Ok(Some(data.gather(&indices)?)),
            None => Ok(None),
        }
    }

    /// The next batch, without end: at the end of an epoch the next one begins at once.
    ///
    /// # Errors
    /// Those of [`next_batch`](Self::next_batch).
    pub fn draw(&mut self, data: &impl Examples) -> Result<(Tensor, Tensor)> {
        loop {
            if let Some(batch) = self.next_batch(data)? {
                return Ok(batch);
            }
        }
    }

    /// Iterates over what is left of the running epoch, or over the next one where nothing is
    /// left.
    pub fn epoch<'a, E: Examples>(&'a mut self, data: &'a E) -> Epoch<'a, E> {
        if self.remaining() == 0 {
            self.epoch += 1;
            self.position = 0;
            let filled = self.fill_order();
            return Epoch {
                failed: filled.err(),
                done: false,
                batches: self,
                data,
            };
        }
        Epoch {
            batches: self,
            data,
            failed: None,
            done: false,
        }
    }

    /// Everything that decides which batches follow; [`from_state`](Self::from_state) continues
    /// with the same bits, also in the middle of an epoch.
    pub fn state(&self) -> BatchState {
        BatchState {
            stream: self.stream.state(),
            epoch: self.epoch,
            position: self.position as u64,
            examples: self.examples as u64,
            config: self.config,
        }
    }

    /// Continues where [`state`](Self::state) was taken.
    ///
    /// # Errors
    /// [`Error::State`] for a position beyond the examples; those of [`BatchConfig::validate`].
    pub fn from_state(state: &BatchState) -> Result<Self> {
        let (examples, position) = (state.examples as usize, state.position as usize);
        if position > examples {
            let message = format!("position {position}: expected at most {examples}");
            return Err(Error::State(message));
        }
        let stream = RandomStream::from_state(&state.stream);
        Self::at(examples, state.config, stream, state.epoch, position)
    }
}

/// Iterator over the batches of one epoch; see [`Batches::epoch`]. It borrows the [`Batches`], and
/// a loop that is left early continues with the next call.
#[derive(Debug)]
pub struct Epoch<'a, E: Examples> {
    batches: &'a mut Batches,
    data: &'a E,
    failed: Option<Error>,
    done: bool,
}

impl<E: Examples> Iterator for Epoch<'_, E> {
    type Item = Result<(Tensor, Tensor)>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(error) = self.failed.take() {
            self.done = true;
            return Some(Err(error));
        }
        // The last batch leaves the position at the end, so that `epochs_done` counts it.
        if self.done || self.batches.remaining() == 0 {
            return None;
        }
        let batch = self.batches.next_batch(self.data);
        self.done = batch.is_err();
        batch.transpose()
    }
}
