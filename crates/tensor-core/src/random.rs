//! Seeded, splittable random streams that fill tensors.
//!
//! A [`RandomStream`] is a ChaCha8 generator with a key and a position. Every draw takes a number
//! of 64-bit words that depends only on the number of elements, and element `i` of a draw is a
//! function of (key, position + i): large draws are therefore filled in parallel and give the same
//! bits for any number of threads. [`RandomStream::split`] derives an independent stream from a
//! label without moving the parent, so adding a consumer never shifts the numbers of another one.
//!
//! ```
//! use candle_core::{DType, Device};
//! use thalweg_tensor_core::random::RandomStream;
//!
//! let root = RandomStream::new(7);
//! let mut weights = root.split("weights");
//! let mut noise = root.split("noise");
//! let w = weights.normal(0.0, 0.02, (4, 3), DType::F32, &Device::Cpu)?;
//! let u = noise.uniform(-1.0, 1.0, 5, DType::F64, &Device::Cpu)?;
//! assert_eq!((w.dims(), u.dims()), (&[4, 3][..], &[5][..]));
//! # Ok::<(), thalweg_tensor_core::Error>(())
//! ```

use crate::{Error, Result};
use candle_core::{DType, Device, Shape, Tensor};
use half::{bf16, f16};
use rand_chacha::ChaCha8Rng;
use rand_core::{Rng, SeedableRng, TryRng};
use rayon::prelude::*;
use sha2::{Digest, Sha256};

/// Elements that one task fills; fixed, so that it has no influence on the numbers.
const BLOCK: usize = 8192;

/// Words that are drawn before they are used; divides [`BLOCK`], and even for pairs.
const RUN: usize = 128;

/// A reproducible stream of random numbers; see the [module](self) page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RandomStream {
    key: [u8; 32],
    /// Position in 64-bit words.
    position: u64,
    rng: ChaCha8Rng,
}

/// A [`RandomStream`] as plain data, for checkpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RandomState {
    /// The generator's key.
    pub key: [u8; 32],
    /// How many 64-bit words have been drawn.
    pub position: u64,
}

impl RandomState {
    /// 40 bytes as a `u8` tensor on the CPU.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_tensor(&self) -> Result<Tensor> {
        let mut bytes = self.key.to_vec();
        bytes.extend_from_slice(&self.position.to_le_bytes());
        Ok(Tensor::from_vec(bytes, 40, &Device::Cpu)?)
    }

    /// Reads what [`to_tensor`](Self::to_tensor) wrote.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] unless the tensor holds 40 bytes.
    pub fn from_tensor(tensor: &Tensor) -> Result<Self> {
        let bytes = tensor.flatten_all()?.to_vec1::<u8>()?;
        if bytes.len() != 40 {
            return Err(Error::ShapeMismatch {
                name: "random state".into(),
                got: tensor.dims().to_vec(),
                expected: vec![40],
            });
        }
        let (mut key, mut position) = ([0; 32], [0; 8]);
        key.copy_from_slice(&bytes[..32]);
        position.copy_from_slice(&bytes[32..]);
        Ok(Self {
            key,
            position: u64::from_le_bytes(position),
        })
    }
}

impl RandomStream {
    /// A stream for `seed`.
    pub fn new(seed: u64) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"thalweg random stream");
        hash.update(seed.to_le_bytes());
        Self::from_key(hash.finalize().into())
    }

    fn from_key(key: [u8; 32]) -> Self {
        Self {
            key,
            position: 0,
            rng: ChaCha8Rng::from_seed(key),
        }
    }

    /// An independent stream that depends on this stream's key and on `label` only, not on how
    /// much has been drawn. The parent does not move.
    pub fn split(&self, label: impl AsRef<str>) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.key);
        hash.update(label.as_ref().as_bytes());
        Self::from_key(hash.finalize().into())
    }

    /// [`split`](Self::split) for members of a family: steps, workers, tensors.
    pub fn split_index(&self, label: &str, index: u64) -> Self {
        self.split(format!("{label}\u{0}{index}"))
    }

    /// Key and position, to continue later with the same bits.
    pub fn state(&self) -> RandomState {
        RandomState {
            key: self.key,
            position: self.position,
        }
    }

    /// The stream that [`state`](Self::state) described.
    pub fn from_state(state: &RandomState) -> Self {
        let mut stream = Self::from_key(state.key);
        stream.advance_to(state.position);
        stream
    }

    fn advance_to(&mut self, position: u64) {
        self.position = position;
        self.rng.set_word_pos(2 * u128::from(position));
    }

    /// The next 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.position += 1;
        self.rng.next_u64()
    }

    /// One uniform number in `[0, 1)` with 53 random bits.
    pub fn next_uniform(&mut self) -> f64 {
        unit_f64(self.bits())
    }

    /// One standard normal number (Box-Muller; takes two words).
    pub fn next_normal(&mut self) -> f64 {
        let (a, b) = (self.bits(), self.bits());
        box_muller(a, b).0
    }

    /// A uniform integer in `0..n` without bias (Lemire's rejection).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for `n = 0`.
    pub fn below(&mut self, n: usize) -> Result<usize> {
        if n == 0 {
            return Err(Error::invalid("n", 0, "at least 1"));
        }
        let n = n as u64;
        let threshold = n.wrapping_neg() % n;
        loop {
            let wide = u128::from(self.bits()) * u128::from(n);
            if wide as u64 >= threshold {
                return Ok((wide >> 64) as usize);
            }
        }
    }

    /// Fills a slice in place with uniform numbers in `[0, 1)`.
    pub fn fill_uniform(&mut self, out: &mut [f64]) {
        self.fill(out, 1, |words, block| {
            for (x, w) in block.iter_mut().zip(words) {
                *x = unit_f64(*w);
            }
        });
    }

    /// Fills a slice in place with standard normal numbers (Box-Muller, pairwise; an odd length
    /// takes one word more than elements).
    pub fn fill_normal(&mut self, out: &mut [f64]) {
        self.fill(out, 2, |words, block| {
            for (pair, w) in block.chunks_mut(2).zip(words.chunks(2)) {
                let (a, b) = box_muller(w[0], w[1]);
                pair[0] = a;
                if let Some(second) = pair.get_mut(1) {
                    *second = b;
                }
            }
        });
    }

    /// Cuts `out` into blocks, gives each its own words of the stream, and moves the position.
    fn fill<T: Send>(
        &mut self,
        out: &mut [T],
        granule: usize,
        write: impl Fn(&[u64], &mut [T]) + Sync,
    ) {
        let start = self.position;
        let words_for = |n: usize| n.div_ceil(granule) * granule;
        let total = words_for(out.len());
        let one = |(i, block): (usize, &mut [T])| {
            let mut rng = ChaCha8Rng::from_seed(self.key);
            rng.set_word_pos(2 * (u128::from(start) + (i * BLOCK) as u128));
            let mut words = [0u64; RUN];
            for run in block.chunks_mut(RUN) {
                let words = &mut words[..words_for(run.len())];
                words.iter_mut().for_each(|w| *w = rng.next_u64());
                write(words, run);
            }
        };
        if out.len() <= BLOCK {
            if !out.is_empty() {
                one((0, out));
            }
        } else {
            out.par_chunks_mut(BLOCK).enumerate().for_each(one);
        }
        self.advance_to(start + total as u64);
    }

    /// Uniform numbers in `[low, high)`, also after rounding to the dtype; `low` itself where the
    /// dtype has no number in that range (`low = high`, say).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless `low <= high` and both and their difference are finite; an
    /// error for integer dtypes.
    pub fn uniform(
        &mut self,
        low: f64,
        high: f64,
        shape: impl Into<Shape>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let width = high - low;
        // A finite width implies finite ends.
        if !(width.is_finite() && width >= 0.0) {
            return Err(Error::invalid(
                "range",
                format!("[{low}, {high})"),
                "finite low <= high with a finite difference",
            ));
        }
        let shape = shape.into();
        let mut data = vec![0.0; shape.elem_count()];
        self.fill_uniform(&mut data);
        // Rounding to the dtype must reach neither the open end nor what lies below the other one.
        let (first, last) = (at_least(low, dtype), below(high, dtype));
        to_tensor(data, shape, dtype, device, move |u| {
            let u = match dtype {
                DType::F32 => truncate(u, 24),
                DType::F16 => truncate(u, 11),
                DType::BF16 => truncate(u, 8),
                _ => u,
            };
            if first <= last {
                (low + width * u).clamp(first, last)
            } else {
                low
            }
        })
    }

    /// Normal numbers with the given mean and standard deviation.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a negative or non-finite parameter; an error for integer
    /// dtypes.
    pub fn normal(
        &mut self,
        mean: f64,
        std: f64,
        shape: impl Into<Shape>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        if !mean.is_finite() {
            return Err(Error::invalid("mean", mean, "a finite number"));
        }
        if !(std.is_finite() && std >= 0.0) {
            return Err(Error::invalid("std", std, "a finite number >= 0"));
        }
        let shape = shape.into();
        let mut data = vec![0.0; shape.elem_count()];
        self.fill_normal(&mut data);
        to_tensor(data, shape, dtype, device, move |z| mean + std * z)
    }

    /// Standard Gumbel numbers `-ln(-ln U)`.
    ///
    /// # Errors
    /// An error for integer dtypes.
    pub fn gumbel(
        &mut self,
        shape: impl Into<Shape>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        let shape = shape.into();
        let mut data = vec![0.0; shape.elem_count()];
        self.fill_uniform(&mut data);
        to_tensor(data, shape, dtype, device, |u| -(-open_unit(u).ln()).ln())
    }

    /// Zeros and ones, one with probability `p`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless `0 <= p <= 1`.
    pub fn bernoulli(
        &mut self,
        p: f64,
        shape: impl Into<Shape>,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        if !(0.0..=1.0).contains(&p) {
            return Err(Error::invalid("p", p, "a probability in [0, 1]"));
        }
        let shape = shape.into();
        let mut data = vec![0.0; shape.elem_count()];
        self.fill_uniform(&mut data);
        if dtype == DType::U8 {
            let bits: Vec<u8> = data.iter().map(|u| u8::from(*u < p)).collect();
            return Ok(Tensor::from_vec(bits, shape, device)?);
        }
        to_tensor(data, shape, dtype, device, move |u| {
            f64::from(u8::from(u < p))
        })
    }

    /// One index per row, drawn with probability proportional to `weights` `[.., n]` (any
    /// non-negative numbers, not all zero). Returns `u32` of shape `[..]` on the same device.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a negative or non-finite weight or a row of zeros.
    pub fn categorical(&mut self, weights: &Tensor) -> Result<Tensor> {
        let (rows, shape) = rows_of(weights)?;
        let mut uniforms = vec![0.0; rows.len()];
        self.fill_uniform(&mut uniforms);
        let draw = |(row, u): (&Vec<f64>, &f64)| pick(row, *u);
        let picks: Result<Vec<u32>> = rows.iter().zip(&uniforms).map(draw).collect();
        Ok(Tensor::from_vec(picks?, shape, weights.device())?)
    }

    /// [`categorical`](Self::categorical) from unnormalised log-probabilities `[.., n]`; `-inf`
    /// excludes an index.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for NaN, `+inf`, or a row of `-inf` only.
    pub fn categorical_logits(&mut self, logits: &Tensor) -> Result<Tensor> {
        let (mut rows, shape) = rows_of(logits)?;
        for row in &mut rows {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            if !max.is_finite() || row.iter().any(|x| x.is_nan()) {
                return Err(Error::invalid(
                    "logits",
                    format!("a row with maximum {max}"),
                    "no NaN, no +inf, at least one finite entry",
                ));
            }
            row.iter_mut().for_each(|x| *x = (*x - max).exp());
        }
        let mut uniforms = vec![0.0; rows.len()];
        self.fill_uniform(&mut uniforms);
        let draw = |(row, u): (&Vec<f64>, &f64)| pick(row, *u);
        let picks: Result<Vec<u32>> = rows.iter().zip(&uniforms).map(draw).collect();
        Ok(Tensor::from_vec(picks?, shape, logits.device())?)
    }

    /// A uniformly random permutation of `0..n`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when `n - 1` is not a `u32`.
    pub fn permutation(&mut self, n: usize) -> Result<Vec<u32>> {
        let last = u32::try_from(n.saturating_sub(1))
            .map_err(|_| Error::invalid("n", n, "at most 2^32"))?;
        let mut order: Vec<u32> = (0..=last).take(n).collect();
        self.shuffle(&mut order)?;
        Ok(order)
    }

    /// [`permutation`](Self::permutation) as a `u32` tensor `[n]`, ready for `index_select`.
    ///
    /// # Errors
    /// As [`permutation`](Self::permutation), and those of candle.
    pub fn permutation_tensor(&mut self, n: usize, device: &Device) -> Result<Tensor> {
        Ok(Tensor::from_vec(self.permutation(n)?, n, device)?)
    }

    /// Fisher-Yates shuffle in place.
    ///
    /// # Errors
    /// Those of [`below`](Self::below), which cannot occur here.
    pub fn shuffle<T>(&mut self, items: &mut [T]) -> Result<()> {
        for i in (1..items.len()).rev() {
            let j = self.below(i + 1)?;
            items.swap(i, j);
        }
        Ok(())
    }
}

/// So that the distributions of `rand_distr` can be drawn from a stream.
impl TryRng for RandomStream {
    type Error = std::convert::Infallible;

    fn try_next_u32(&mut self) -> std::result::Result<u32, Self::Error> {
        Ok((self.bits() >> 32) as u32)
    }

    fn try_next_u64(&mut self) -> std::result::Result<u64, Self::Error> {
        Ok(self.bits())
    }

    fn try_fill_bytes(&mut self, out: &mut [u8]) -> std::result::Result<(), Self::Error> {
        for chunk in out.chunks_mut(8) {
            let bytes = self.bits().to_le_bytes();
            chunk.copy_from_slice(&bytes[..chunk.len()]);
        }
        Ok(())
    }
}

fn unit_f64(word: u64) -> f64 {
    (word >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

/// Keeps the first `bits` bits after the binary point of a number in `[0, 1)`.
fn truncate(u: f64, bits: i32) -> f64 {
    let scale = f64::powi(2.0, bits);
    (u * scale).floor() / scale
}

/// The largest number of `dtype` below `x`.
fn below(x: f64, dtype: DType) -> f64 {
    // One step down in the order of 16-bit patterns, the sign bit being the highest.
    fn down(bits: u16) -> u16 {
        match bits {
            0 | 0x8000 => 0x8001,
            negative if negative > 0x8000 => negative + 1,
            positive => positive - 1,
        }
    }
    let (nearest, previous) = match dtype {
        DType::F32 => (f64::from(x as f32), f64::from((x as f32).next_down())),
        DType::F16 => {
            let near = f16::from_f64(x);
            (near.to_f64(), f16::from_bits(down(near.to_bits())).to_f64())
        }
        DType::BF16 => {
            let near = bf16::from_f64(x);
            (
                near.to_f64(),
                bf16::from_bits(down(near.to_bits())).to_f64(),
            )
        }
        _ => (x, x.next_down()),
    };
    if nearest < x {
        nearest
    } else {
        previous
    }
}

/// The smallest number of `dtype` that is not below `x`.
fn at_least(x: f64, dtype: DType) -> f64 {
    // Not below x is above the number before x, mirrored.
    -below((-x).next_up(), dtype)
}

/// Moves `[0, 1)` to `(0, 1)` for logarithms; near 1 the sum would round to it.
fn open_unit(u: f64) -> f64 {
    (u + 0.5 / (1u64 << 53) as f64).min(1.0 - f64::EPSILON / 2.0)
}

fn box_muller(a: u64, b: u64) -> (f64, f64) {
    let radius = (-2.0 * open_unit(unit_f64(a)).ln()).sqrt();
    let (sin, cos) = (std::f64::consts::TAU * unit_f64(b)).sin_cos();
    (radius * cos, radius * sin)
}

fn pick(weights: &[f64], u: f64) -> Result<u32> {
    let mut total = 0.0;
    for (i, w) in weights.iter().enumerate() {
        if !(w.is_finite() && *w >= 0.0) {
            return Err(Error::invalid(
                "weights",
                format!("{w} at index {i}"),
                "finite numbers >= 0",
            ));
        }
        total += w;
    }
    if total <= 0.0 {
        return Err(Error::invalid("weights", "all zero", "a positive sum"));
    }
    let target = u * total;
    let mut sum = 0.0;
    let mut last = 0;
    for (i, w) in weights.iter().enumerate().filter(|(_, w)| **w > 0.0) {
        sum += w;
        last = i;
        if target < sum {
            break;
        }
    }
    Ok(last as u32)
}

fn rows_of(tensor: &Tensor) -> Result<(Vec<Vec<f64>>, Vec<usize>)> {
    let n = *tensor
        .dims()
        .last()
        .ok_or_else(|| Error::invalid("weights", "a scalar", "at least one dimension"))?;
    if n == 0 {
        return Err(Error::invalid(
            "weights",
            "an empty row",
            "at least one entry",
        ));
    }
    let flat = tensor.to_dtype(DType::F64)?.reshape(((), n))?;
    Ok((flat.to_vec2()?, tensor.dims()[..tensor.rank() - 1].to_vec()))
}

fn to_tensor(
    data: Vec<f64>,
    shape: Shape,
    dtype: DType,
    device: &Device,
    map: impl Fn(f64) -> f64 + Sync,
) -> Result<Tensor> {
    let tensor = match dtype {
        DType::F64 => {
            let mut data = data;
            data.iter_mut().for_each(|x| *x = map(*x));
            Tensor::from_vec(data, shape, device)?
        }
        DType::F32 => {
            let data: Vec<f32> = data.iter().map(|x| map(*x) as f32).collect();
            Tensor::from_vec(data, shape, device)?
        }
        DType::BF16 => {
            let data: Vec<bf16> = data.iter().map(|x| bf16::from_f64(map(*x))).collect();
            Tensor::from_vec(data, shape, device)?
        }
        DType::F16 => {
            let data: Vec<f16> = data.iter().map(|x| f16::from_f64(map(*x))).collect();
            Tensor::from_vec(data, shape, device)?
        }
        other => {
            return Err(Error::unsupported(
                "drawing real numbers",
                format!("for dtype {other:?}"),
            ))
        }
    };
    Ok(tensor)
}
