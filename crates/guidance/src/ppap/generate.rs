//! Samples of the unconditional model, for experts to learn from.

use crate::error::{check, Error};
use crate::Result;
use candle_core::{Device, Tensor};
use flows::prediction::select_rows;
use flows::{Condition, Ddim, Denoiser, Grid, Sampler};
use std::path::{Path, PathBuf};
use tensor_core::checkpoint::{Checkpoint, State};
use tensor_core::random::RandomStream;

/// Where each batch of so many samples begins, and how many it has.
fn batches(count: usize, batch: usize) -> Result<impl Iterator<Item = (usize, usize)>> {
    check::require(count > 0, "generate::count", count, "at least 1")?;
    check::require(batch > 0, "generate::batch", batch, "at least 1")?;
    let begins = (0..count).step_by(batch);
    Ok(begins.map(move |first| (first, batch.min(count - first))))
}

/// The samples `first..first + rows`.
fn one_batch(
    denoiser: &dyn Denoiser,
    grid: &Grid,
    like: &Tensor,
    (first, rows): (usize, usize),
    rng: &RandomStream,
) -> Result<Tensor> {
    let mut shape = like.dims().to_vec();
    shape[0] = rows;
    let stream = rng.split_index("generated", first as u64);
    let noise = stream
        .split("start")
        .normal(0.0, 1.0, shape, like.dtype(), like.device())?;
    let mut sampler = Sampler::new(denoiser, grid.clone()).stepper(Ddim::default());
    let out = sampler.sample(&noise, &Condition::Null, None, &stream)?;
    Ok(out.x)
}

/// Samples of the unconditional model to learn from: DDIM, 25 steps in the paper, `batch` at a time.
///
/// # Errors
/// Those of the sampler.
pub fn generate(
    denoiser: &dyn Denoiser,
    grid: &Grid,
    like: &Tensor,
    count: usize,
    batch: usize,
    rng: &RandomStream,
) -> Result<Tensor> {
    let parts = batches(count, batch)?
        .map(|part| one_batch(denoiser, grid, like, part, rng))
        .collect::<Result<Vec<_>>>()?;
    Ok(Tensor::cat(&parts, 0)?)
}

/// The same samples as files of a folder, one a batch, for sets that do not fit into memory (500 000 in the
/// paper). Files that are there already are left as they are: what was stopped goes on.
///
/// # Errors
/// Those of the sampler and of the files.
pub fn generate_shards(
    denoiser: &dyn Denoiser,
    grid: &Grid,
    like: &Tensor,
    (count, batch): (usize, usize),
    folder: impl AsRef<Path>,
    rng: &RandomStream,
) -> Result<Shards> {
    let mut files = Vec::new();
    for (first, rows) in batches(count, batch)? {
        let file = folder.as_ref().join(format!("{first:09}.safetensors"));
        if !file.exists() {
            let x = one_batch(denoiser, grid, like, (first, rows), rng)?;
            let state = State::from([("x".to_string(), x)]);
            Checkpoint::new("generated samples", state)
                .with("rows", rows)
                .save(&file)?;
        }
        files.push((file, rows));
    }
    Shards::of(files, like.device())
}

/// Samples in files, in an order of their own for every pass: shards in turn, and the samples of each.
#[derive(Debug)]
pub struct Shards {
    files: Vec<(PathBuf, usize)>,
    device: Device,
    /// Shards of this pass that are still to come.
    coming: Vec<u32>,
    /// The shard that is open, and its samples that are still to come.
    open: Option<(Tensor, Vec<u32>)>,
}

impl Shards {
    /// Files with their numbers of samples.
    fn of(files: Vec<(PathBuf, usize)>, device: &Device) -> Result<Self> {
        if files.iter().all(|(_, rows)| *rows == 0) {
            return Err(Error::argument(
                "number of shards",
                files.len(),
                "some with samples",
            ));
        }
        Ok(Self {
            files,
            device: device.clone(),
            coming: Vec::new(),
            open: None,
        })
    }

    /// The shards of a folder, as [`generate_shards`] wrote them.
    ///
    /// # Errors
    /// Those of the files; [`Error::InvalidArgument`] for a folder without samples.
    pub fn open(folder: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let folder = folder.as_ref();
        let listed = std::fs::read_dir(folder).map_err(|e| Error::argument("folder", folder, e))?;
        let mut paths: Vec<PathBuf> = listed.flatten().map(|entry| entry.path()).collect();
        paths.retain(|path| path.extension().is_some_and(|e| e == "safetensors"));
        paths.sort();
        let rows = |path: PathBuf| {
            let rows = Checkpoint::load(&path, &Device::Cpu)?.number("rows")?;
            Ok((path, rows))
        };
        Self::of(paths.into_iter().map(rows).collect::<Result<_>>()?, device)
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.files.iter().map(|(_, rows)| rows).sum()
    }

    /// Whether there are none; a [`Shards`] always has some.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next `rows` samples; one shard is in memory at a time.
    ///
    /// # Errors
    /// Those of the files.
    pub fn draw(&mut self, rows: usize, rng: &mut RandomStream) -> Result<Tensor> {
        check::require(rows > 0, "Shards::draw rows", rows, "at least 1")?;
        let (mut parts, mut missing) = (Vec::new(), rows);
        while missing > 0 {
            let (x, mut left) = match self.open.take() {
                Some(open) => open,
                None => self.next(rng)?,
            };
            let take = left.split_off(left.len().saturating_sub(missing));
            missing -= take.len();
            if !take.is_empty() {
                parts.push(select_rows(&x, &take)?);
            }
            self.open = Some((x, left)).filter(|(_, left)| !left.is_empty());
        }
        Ok(Tensor::cat(&parts, 0)?)
    }

    /// The next shard, in an order of its own.
    fn next(&mut self, rng: &mut RandomStream) -> Result<(Tensor, Vec<u32>)> {
        if self.coming.is_empty() {
            self.coming = rng.permutation(self.files.len())?;
        }
        let k = self.coming.pop().unwrap_or(0) as usize;
        let checkpoint = Checkpoint::load(&self.files[k].0, &self.device)?;
        let x = checkpoint.tensors.get("x").cloned();
        let x = x.ok_or_else(|| Error::Mismatch {
            what: "the file of samples",
            reason: "it has no `x`".into(),
        })?;
        let order = rng.permutation(x.dims().first().copied().unwrap_or(0))?;
        Ok((x, order))
    }
}
