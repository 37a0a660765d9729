//! Pairs of source and target samples to train a flow on.

use crate::error::{check, Error, Result};
use crate::ode::{OdeField, OdeSolver};
use candle_core::{DType, Device, Tensor};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use tensor_core::checkpoint::Checkpoint;
use tensor_core::random::RandomStream;

/// A distribution that can be sampled.
pub trait Source {
    /// `n` samples, `[n, ...]`.
    ///
    /// # Errors
    /// Whatever the source's own are.
    fn draw(&mut self, n: usize, rng: &mut RandomStream) -> Result<Tensor>;
}

impl<F: FnMut(usize, &mut RandomStream) -> Result<Tensor>> Source for F {
    fn draw(&mut self, n: usize, rng: &mut RandomStream) -> Result<Tensor> {
        self(n, rng)
    }
}

/// Standard normal noise.
#[derive(Debug, Clone)]
pub struct Gaussian {
    /// The shape of one sample.
    pub shape: Vec<usize>,
    /// Its dtype.
    pub dtype: DType,
    /// Where samples live.
    pub device: Device,
}

impl Gaussian {
    /// Noise like the samples of `x` `[rows, ...]`.
    ///
    /// # Errors
    /// [`Error::Shape`] for a scalar.
    pub fn like(x: &Tensor) -> Result<Self> {
        check::rows("x", x)?;
        Ok(Self {
            shape: x.dims()[1..].to_vec(),
            dtype: x.dtype(),
            device: x.device().clone(),
        })
    }
}

impl Source for Gaussian {
    fn draw(&mut self, n: usize, rng: &mut RandomStream) -> Result<Tensor> {
        let shape = [&[n], self.shape.as_slice()].concat();
        Ok(rng.normal(0.0, 1.0, shape, self.dtype, &self.device)?)
    }
}

/// Examples `[n, ...]`, drawn with replacement.
#[derive(Debug, Clone)]
pub struct Examples(pub Tensor);

/// `n` random row numbers below `count`.
fn random_rows(count: usize, n: usize, rng: &mut RandomStream) -> Result<Vec<u32>> {
    (0..n).map(|_| Ok(rng.below(count)? as u32)).collect()
}

impl Source for Examples {
    fn draw(&mut self, n: usize, rng: &mut RandomStream) -> Result<Tensor> {
        let rows = random_rows(check::rows("the examples", &self.0)?, n, rng)?;
        crate::prediction::select_rows(&self.0, &rows)
    }
}

/// Pairs `(x0, x1)` of source and target samples.
pub trait Coupling {
    /// `n` pairs, each `[n, ...]`.
    ///
    /// # Errors
    /// Those of the sources.
    fn batch(&mut self, n: usize, rng: &mut RandomStream) -> Result<(Tensor, Tensor)>;
}

/// A user's own pairs.
impl<F: FnMut(usize, &mut RandomStream) -> Result<(Tensor, Tensor)>> Coupling for F {
    fn batch(&mut self, n: usize, rng: &mut RandomStream) -> Result<(Tensor, Tensor)> {
        self(n, rng)
    }
}

/// Source and target samples that have nothing to do with each other: the first round of rectified
/// flow, for generation and for transfer between two domains.
pub struct Independent<S, T> {
    /// Samples at time 0.
    pub source: S,
    /// Samples at time 1.
    pub target: T,
}

impl<S: Source, T: Source> Coupling for Independent<S, T> {
    fn batch(&mut self, n: usize, rng: &mut RandomStream) -> Result<(Tensor, Tensor)> {
        Ok((self.source.draw(n, rng)?, self.target.draw(n, rng)?))
    }
}

/// Pairs in memory, drawn with replacement; a pair always stays together.
#[derive(Debug, Clone)]
pub struct StoredPairs {
    x0: Tensor,
    x1: Tensor,
}

impl StoredPairs {
    /// Pairs `[n, ...]` each.
    ///
    /// # Errors
    /// [`Error::Shape`] when the shapes differ or there is none.
    pub fn new(x0: Tensor, x1: Tensor) -> Result<Self> {
        check::same_shape("x1", &x1, &x0)?;
        match check::rows("x0", &x0)? {
            0 => Err(Error::shape("x0", x0.dims(), "at least one pair")),
            _ => Ok(Self { x0, x1 }),
        }
    }

    /// Source and target samples.
    pub fn tensors(&self) -> (&Tensor, &Tensor) {
        (&self.x0, &self.x1)
    }

    /// Number of pairs.
    pub fn len(&self) -> usize {
        self.x0.dims()[0]
    }

    /// Whether there is no pair; never.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Writes the pairs to a safetensors file.
    ///
    /// # Errors
    /// Those of `tensor_core::checkpoint`.
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let pairs = [("x0", &self.x0), ("x1", &self.x1)];
        let tensors = pairs
            .into_iter()
            .map(|(k, t)| (k.to_string(), t.clone()))
            .collect();
        Ok(Checkpoint::new("flow pairs", tensors).save(path)?)
    }

    /// Reads pairs that were saved.
    ///
    /// # Errors
    /// Those of `tensor_core::checkpoint`; [`Error::InvalidArgument`] for a file of something else.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let checkpoint = Checkpoint::load(path, device)?;
        let mut tensors: HashMap<String, Tensor> = checkpoint.tensors.into_iter().collect();
        match (tensors.remove("x0"), tensors.remove("x1")) {
            (Some(x0), Some(x1)) => Self::new(x0, x1),
            _ => Err(Error::argument("file", "no x0 and x1", "pairs of a flow")),
        }
    }
}

impl Coupling for StoredPairs {
    fn batch(&mut self, n: usize, rng: &mut RandomStream) -> Result<(Tensor, Tensor)> {
        let rows = random_rows(self.len(), n, rng)?;
        let take = |x| crate::prediction::select_rows(x, &rows);
        Ok((take(&self.x0)?, take(&self.x1)?))
    }
}

/// A stored coupling in several files, of which one is in memory at a time: for more pairs than fit.
///
/// A shard serves as many batches as it takes to draw as many pairs as it has; the shards' order is
/// drawn anew each time all have served.
#[derive(Debug, Clone)]
pub struct PairShards {
    files: Vec<PathBuf>,
    device: Device,
    /// The shards that are still to serve, last first.
    order: Vec<u32>,
    current: StoredPairs,
    /// Pairs that the current shard has still to serve.
    left: usize,
}

impl PairShards {
    /// These files of [`StoredPairs::save`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for no file; those of [`StoredPairs::load`] for the first one.
    pub fn open(files: Vec<PathBuf>, device: &Device) -> Result<Self> {
        let first = files.first();
        let first = first.ok_or_else(|| Error::argument("files", 0, "at least one shard"))?;
        Ok(Self {
            current: StoredPairs::load(first, device)?,
            files,
            device: device.clone(),
            order: Vec::new(),
            left: 0,
        })
    }
}

impl Coupling for PairShards {
    fn batch(&mut self, n: usize, rng: &mut RandomStream) -> Result<(Tensor, Tensor)> {
        if self.left == 0 {
            if self.order.is_empty() {
                self.order = rng.permutation(self.files.len())?;
            }
            // Filled just above, with one number per file.
            let next = self.order.pop().map_or(0, |i| i as usize);
            self.current = StoredPairs::load(&self.files[next], &self.device)?;
            self.left = self.current.len();
        }
        self.left = self.left.saturating_sub(n);
        self.current.batch(n, rng)
    }
}

/// Each batch of another coupling, its targets assigned anew to its sources: `assign` is given the squared
/// distances `[n, n]` (source, target) and gives each source a target. With an exact assignment (of
/// `thalweg-convex`, say) this is minibatch optimal transport, whose flows are straighter from the
/// first round on.
pub struct Reassigned<C, A> {
    /// The pairs to begin with.
    pub inner: C,
    /// From distances to a target for each source; each target once.
    pub assign: A,
}

impl<C: Coupling, A: FnMut(&Tensor) -> Result<Vec<u32>>> Coupling for Reassigned<C, A> {
    fn batch(&mut self, n: usize, rng: &mut RandomStream) -> Result<(Tensor, Tensor)> {
        let (x0, x1) = self.inner.batch(n, rng)?;
        let (a, b) = (x0.flatten_from(1)?, x1.flatten_from(1)?);
        let norms = |x: &Tensor| x.sqr()?.sum_keepdim(1);
        let products = a.matmul(&b.t()?)?.affine(-2.0, 0.0)?;
        let cost = products
            .broadcast_add(&norms(&a)?)?
            .broadcast_add(&norms(&b)?.t()?)?;
        let targets = (self.assign)(&cost)?;
        let mut once = vec![false; n];
        for target in &targets {
            match once.get_mut(*target as usize) {
                Some(seen) if !*seen => *seen = true,
                _ => {
                    return Err(Error::argument(
                        "assigned target",
                        target,
                        "each target once",
                    ))
                }
            }
        }
        if targets.len() != n {
            return Err(Error::argument(
                "assigned targets",
                targets.len(),
                format!("{n}"),
            ));
        }
        Ok((x0, crate::prediction::select_rows(&x1, &targets)?))
    }
}

/// Pairs that a teacher makes as they are needed: reflow without storing any.
pub struct OnlinePairs<'a, S> {
    /// The teacher's field (with averaged weights).
    pub teacher: &'a dyn OdeField,
    /// How it is solved; 20 Euler steps are usual.
    pub solver: &'a dyn OdeSolver,
    /// Samples at time 0.
    pub source: S,
}

impl<S: Source> Coupling for OnlinePairs<'_, S> {
    fn batch(&mut self, n: usize, rng: &mut RandomStream) -> Result<(Tensor, Tensor)> {
        let x0 = self.source.draw(n, rng)?;
        let x1 = self.solver.solve(self.teacher, &x0, 0.0, 1.0)?.x;
        Ok((x0, x1))
    }
}

/// Pairs for the next round: `n` source samples and where the teacher's flow takes them, solved
/// `chunk` at a time.
///
/// The teacher should have its averaged weights, and the new flow should start from them. Images
/// want a million pairs or more; with fewer the new flow learns them by heart.
///
/// # Errors
/// Those of source, solver and field.
pub fn reflow(
    teacher: &dyn OdeField,
    source: &mut dyn Source,
    n: usize,
    chunk: usize,
    solver: &dyn OdeSolver,
    rng: &mut RandomStream,
) -> Result<StoredPairs> {
    check::at_least_one("n", n)?;
    check::at_least_one("chunk", chunk)?;
    let (mut starts, mut ends) = (Vec::new(), Vec::new());
    let mut done = 0;
    while done < n {
        let x0 = source.draw(chunk.min(n - done), rng)?;
        ends.push(solver.solve(teacher, &x0, 0.0, 1.0)?.x);
        starts.push(x0);
        done += chunk;
    }
    StoredPairs::new(Tensor::cat(&starts, 0)?, Tensor::cat(&ends, 0)?)
}
