//! The three bilinear maps of a convolution on the CPU, each the derivative of the others.

use super::geometry::Geometry;
use crate::activation::Activation;
use crate::kernel::{filled, sum2, vectorized, Computed, Scalar, View};
use crate::Result;
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use tensor_core::kernels::conv::{
    pack, transpose, Correlate, Map, Outer, Pass, Source, OVERHANG, PAD, PANEL,
};

/// Multiply-adds below which a piece of work is not worth another thread.
pub(super) const WORTH: usize = 200_000;
/// Pieces that a map is cut into where the batch alone gives fewer.
pub(super) const PIECES: usize = 16;
/// Outputs that a part of a weight gradient has at least, if the batch has as many.
const OUTPUTS: usize = 512;
/// Channels of a group up to which a vector of channels would be mostly empty.
const FEW: usize = 2;

/// `y` from `x` and `w`: convolution, differentiable any number of times.
pub(crate) fn convolve(x: &Tensor, w: &Tensor, g: Geometry) -> Result<Tensor> {
    match x.dtype() {
        DType::F64 => convolve_typed::<f64>(x, w, g),
        _ => convolve_typed::<f32>(x, w, g),
    }
}

/// `dx` from `dy` and `w`: transposed convolution, differentiable any number of times.
pub(crate) fn input_gradient(dy: &Tensor, w: &Tensor, g: Geometry) -> Result<Tensor> {
    match dy.dtype() {
        DType::F64 => input_gradient_typed::<f64>(dy, w, g),
        _ => input_gradient_typed::<f32>(dy, w, g),
    }
}

/// `dw` from `x` and `dy`, differentiable any number of times.
pub(crate) fn weight_gradient(x: &Tensor, dy: &Tensor, g: Geometry) -> Result<Tensor> {
    match x.dtype() {
        DType::F64 => weight_gradient_typed::<f64>(x, dy, g),
        _ => weight_gradient_typed::<f32>(x, dy, g),
    }
}

/// The gradient, where somebody wants it.
fn if_tracked(of: &Tensor, gradient: impl FnOnce() -> Result<Tensor>) -> Result<Option<Tensor>> {
    match of.track_op() {
        true => Ok(Some(gradient()?)),
        false => Ok(None),
    }
}

fn convolve_typed<T: Scalar>(x: &Tensor, w: &Tensor, g: Geometry) -> Result<Tensor> {
    let (x, w) = (x.contiguous()?, w.contiguous()?);
    let y = forward::<T>(&x, &w, None, Activation::Identity, &g)?;
    let backward = move |arguments: &[&Tensor], _: &Tensor, dy: &Tensor| {
        let (x, w) = (arguments[0], arguments[1]);
        Ok(vec![
            if_tracked(x, || input_gradient(dy, w, g))?,
            if_tracked(w, || weight_gradient(x, dy, g))?,
        ])
    };
    let node = Computed::new("convolution", y, &g.output_shape(), backward);
    Ok(x.apply_op2(&w, node)?)
}

fn input_gradient_typed<T: Scalar>(dy: &Tensor, w: &Tensor, g: Geometry) -> Result<Tensor> {
    let (dy, w) = (dy.contiguous()?, w.contiguous()?);
    let dx = transposed::<T>(&dy, &w, None, Activation::Identity, &g)?;
    let backward = move |arguments: &[&Tensor], _: &Tensor, d: &Tensor| {
        let (dy, w) = (arguments[0], arguments[1]);
        Ok(vec![
            if_tracked(dy, || convolve(d, w, g))?,
            if_tracked(w, || weight_gradient(d, dy, g))?,
        ])
    };
    let node = Computed::new("transposed convolution", dx, &g.input_shape(), backward);
    Ok(dy.apply_op2(&w, node)?)
}

fn weight_gradient_typed<T: Scalar>(x: &Tensor, dy: &Tensor, g: Geometry) -> Result<Tensor> {
    let (x, dy) = (x.contiguous()?, dy.contiguous()?);
    let dw = {
        let (xv, dyv) = (View::new(&x)?, View::new(&dy)?);
        weight_sums::<T>(xv.slice()?, dyv.slice()?, &g)
    };
    let backward = move |arguments: &[&Tensor], _: &Tensor, d: &Tensor| {
        let (x, dy) = (arguments[0], arguments[1]);
        Ok(vec![
            if_tracked(x, || input_gradient(dy, d, g))?,
            if_tracked(dy, || convolve(x, d, g))?,
        ])
    };
    let node = Computed::new("weight gradient", dw, &g.weight_shape(), backward);
    Ok(x.apply_op2(&dy, node)?)
}

/// `f(x * w + added)`; contiguous operands, values only.
pub(super) fn forward<T: Scalar>(
    x: &Tensor,
    w: &Tensor,
    added: Option<&Tensor>,
    activation: Activation,
    g: &Geometry,
) -> Result<Vec<T>> {
    correlation(Map::Forward, [x, w], added, activation, g)
}

/// `f(w^T * dy + added)`; contiguous operands, values only.
pub(super) fn transposed<T: Scalar>(
    dy: &Tensor,
    w: &Tensor,
    added: Option<&Tensor>,
    activation: Activation,
    g: &Geometry,
) -> Result<Vec<T>> {
    correlation(Map::Transposed, [dy, w], added, activation, g)
}

fn correlation<T: Scalar>(
    map: Map,
    [input, weight]: [&Tensor; 2],
    added: Option<&Tensor>,
    activation: Activation,
    g: &Geometry,
) -> Result<Vec<T>> {
    let (iv, wv) = (View::new(input)?, View::new(weight)?);
    let av = added.map(View::new).transpose()?;
    let correlation = Correlation {
        input: iv.slice()?,
        added: match (&av, added) {
            (Some(view), Some(added)) => Added::new(view.slice()?, added.rank()),
            _ => Added::Nothing,
        },
        activation,
        outputs: map.channels(&g.window),
        size: map.size(&g.window),
        groups: g.groups,
    };
    let (source, passes) = map.plan(&g.window);
    let weights = wv.slice()?;
    let passes = passes.into_iter();
    let passes: Vec<_> = passes
        .map(|pass| Packed::new(pass, map, &source, weights, g))
        .collect();
    let total =
        g.batch * g.groups * correlation.outputs * correlation.size[0] * correlation.size[1];
    Ok(filled(total, |out| correlation.run(&source, &passes, out)))
}

/// A pass with its weights in the order in which the tiles read them.
struct Packed<T> {
    pass: Pass,
    offsets: Vec<usize>,
    /// For each group.
    weights: Vec<Vec<T>>,
}

impl<T: Scalar> Packed<T> {
    fn new(pass: Pass, map: Map, source: &Source, w: &[T], g: &Geometry) -> Self {
        let of_group = g.window.outputs * g.window.inputs * g.window.taps();
        let groups = w.chunks_exact(of_group);
        Self {
            offsets: source.offsets(&pass),
            weights: groups.map(|w| pack(map, &pass, w, &g.window)).collect(),
            pass,
        }
    }
}

/// What is added to the result of a correlation.
#[derive(Clone, Copy)]
enum Added<'a, T> {
    Nothing,
    /// A number for each channel.
    Channels(&'a [T]),
    /// A number for each channel of each image.
    Planes(&'a [T]),
    /// As many numbers as the result has.
    All(&'a [T]),
}

impl<'a, T: Scalar> Added<'a, T> {
    fn new(data: &'a [T], rank: usize) -> Self {
        match rank {
            1 => Added::Channels(data),
            2 => Added::Planes(data),
            _ => Added::All(data),
        }
    }

    /// To the channels from `first` of the group in place `image` of all groups of all images.
    fn piece(self, (image, first): (usize, usize), c: &Correlation<'_, T>) -> Self {
        let at = image * c.outputs + first;
        match self {
            Added::Nothing => self,
            Added::Channels(all) => Added::Channels(&all[image % c.groups * c.outputs + first..]),
            Added::Planes(all) => Added::Planes(&all[at..]),
            Added::All(all) => Added::All(&all[at * c.size[0] * c.size[1]..]),
        }
    }
}

/// A batch of images, each group correlated with its weights.
struct Correlation<'a, T> {
    input: &'a [T],
    added: Added<'a, T>,
    activation: Activation,
    /// Channels of the result in a group.
    outputs: usize,
    /// Height and width of the result.
    size: [usize; 2],
    groups: usize,
}

impl<T: Scalar> Correlation<'_, T> {
    fn run(&self, source: &Source, passes: &[Packed<T>], out: &mut [T]) {
        let plane = self.size[0] * self.size[1];
        let images = out.len() / (self.outputs * plane);
        // Few images: each is cut by panels of channels as well.
        let cuts = PIECES.div_ceil(images);
        let block = self
            .outputs
            .div_ceil(cuts)
            .next_multiple_of(PANEL)
            .min(self.outputs);
        let pieces: Vec<(usize, usize, &mut [T])> = out
            .chunks_mut(self.outputs * plane)
            .enumerate()
            .flat_map(|(i, image)| {
                let blocks = image.chunks_mut(block * plane).enumerate();
                blocks.map(move |(b, part)| (i, b * block, part))
            })
            .collect();
        let depth: usize =
            passes.iter().map(|p| p.offsets.len()).sum::<usize>() / passes.len().max(1);
        let least = WORTH / (block * plane * depth.max(1)).max(1) + 1;
        let lines = passes.iter().map(|p| p.pass.line(source.pitch)).max();
        let stride = lines.unwrap_or(0).next_multiple_of(OVERHANG);
        let buffers = || {
            (
                vec![T::ZERO; source.padded_len()],
                vec![T::ZERO; block * stride],
            )
        };
        let pieces = pieces.into_par_iter().with_min_len(least);
        pieces.for_each_init(buffers, |(padded, lines), (image, first, out)| {
            let size = self.input.len() / images;
            source.fill(&self.input[image * size..(image + 1) * size], padded);
            let group = image % self.groups;
            for packed in passes {
                let channels = out.len() / plane;
                let depth = packed.offsets.len();
                pulp::Arch::new().dispatch(Correlate {
                    weights: &packed.weights[group][first * depth..],
                    offsets: &packed.offsets,
                    source: padded,
                    out: lines,
                    channels,
                    line: packed.pass.line(source.pitch),
                    stride,
                });
                let added = self.added.piece((image, first), self);
                vectorized(
                    #[inline(always)]
                    || self.scatter(&packed.pass, source.pitch, (lines, stride), added, out),
                );
            }
            vectorized(
                #[inline(always)]
                || self.activation.apply(out),
            );
        });
    }

    /// From lines to the result, with what is added.
    #[inline(always)]
    fn scatter(
        &self,
        pass: &Pass,
        pitch: usize,
        (lines, stride): (&[T], usize),
        added: Added<'_, T>,
        out: &mut [T],
    ) {
        let [h, w] = self.size;
        let [rows, cols] = pass.grid;
        for (c, plane) in out.chunks_exact_mut(h * w).enumerate() {
            let bias = match added {
                Added::Channels(numbers) | Added::Planes(numbers) => numbers[c],
                Added::Nothing | Added::All(_) => T::ZERO,
            };
            for i in 0..rows {
                let from = &lines[c * stride + i * pitch..][..cols];
                let at = (pass.start[0] + i * pass.step[0]) * w + pass.start[1];
                let step = pass.step[1];
                match (added, step) {
                    (Added::All(all), 1) => {
                        let onto = &all[c * h * w + at..][..cols];
                        for ((to, x), y) in plane[at..at + cols].iter_mut().zip(from).zip(onto) {
                            *to = *x + *y;
                        }
                    }
                    (Added::All(all), _) => {
                        let onto = all[c * h * w + at..].iter().step_by(step);
                        let to = plane[at..].iter_mut().step_by(step);
                        for ((to, x), y) in to.zip(from).zip(onto) {
                            *to = *x + *y;
                        }
                    }
                    (_, 1) => {
                        for (to, x) in plane[at..at + cols].iter_mut().zip(from) {
                            *to = *x + bias;
                        }
                    }
                    _ => {
                        for (to, x) in plane[at..].iter_mut().step_by(step).zip(from) {
                            *to = *x + bias;
                        }
                    }
                }
            }
        }
    }
}

/// `dw`: a fixed cut of the batch, each part's sums in order, the parts added in order.
pub(super) fn weight_sums<T: Scalar>(x: &[T], dy: &[T], g: &Geometry) -> Vec<T> {
    let (source, passes) = Map::Forward.plan(&g.window);
    let Some(pass) = passes.first() else {
        return vec![];
    };
    let mut offsets = source.offsets(pass);
    let k = offsets.len();
    let first = offsets.first().map_or(0, |o| *o);
    offsets.resize(k + PAD, first);
    let sums = WeightSums {
        x,
        dy,
        g,
        source: &source,
        offsets: &offsets,
        k,
    };
    // Each part has sums of its own: as many parts as stay small beside the data, and each with
    // enough outputs to pay for making its sums and adding them up.
    let weights = g.window.outputs * k * g.groups;
    let paid = (g.batch * g.window.out[0] * g.window.out[1] / OUTPUTS).max(1);
    let parts = ((4 << 20) / weights)
        .clamp(1, PIECES.min(paid))
        .min(g.batch);
    let each = g.batch.div_ceil(parts);
    let parts = g.batch.div_ceil(each);
    let cuts = (PIECES / (parts * g.groups)).clamp(1, g.window.outputs.div_ceil(4 * OVERHANG));
    let block = g.window.outputs.div_ceil(cuts);
    let block = block.next_multiple_of(OVERHANG).min(g.window.outputs);
    let blocks = g.window.outputs.div_ceil(block);
    let one = |i: usize| {
        let (part, rest) = (i / (g.groups * blocks), i % (g.groups * blocks));
        let (group, b) = (rest / blocks, rest % blocks);
        let images = part * each..((part + 1) * each).min(g.batch);
        let channels = b * block..((b + 1) * block).min(g.window.outputs);
        sums.part(images, group, channels)
    };
    let work = each * g.window.out[0] * g.window.out[1] * block * k;
    let pieces = (0..parts * g.groups * blocks).into_par_iter();
    let pieces = pieces.with_min_len(WORTH / work.max(1) + 1);
    let all: Vec<Vec<T>> = pieces.map(one).collect();
    // Channels of all blocks and groups follow each other.
    let mut dw = Vec::with_capacity(weights);
    for rest in 0..g.groups * blocks {
        let first = rest % blocks * block;
        let channels = block.min(g.window.outputs - first);
        let parts = all.iter().skip(rest).step_by(g.groups * blocks);
        dw.extend(sums.by_channel(parts, channels));
    }
    dw
}

struct WeightSums<'a, T> {
    x: &'a [T],
    dy: &'a [T],
    g: &'a Geometry,
    source: &'a Source,
    offsets: &'a [usize],
    k: usize,
}

impl<T: Scalar> WeightSums<'_, T> {
    /// The sum of parts, as `[channels, k]`.
    fn by_channel<'a>(&self, parts: impl Iterator<Item = &'a Vec<T>>, channels: usize) -> Vec<T> {
        let mut all = vec![];
        for part in parts {
            match all.is_empty() {
                true => all.clone_from(part),
                false => {
                    for (s, x) in all.iter_mut().zip(part) {
                        *s = *s + *x;
                    }
                }
            }
        }
        if channels <= FEW {
            return all;
        }
        let width = channels.next_multiple_of(OVERHANG);
        let mut by_channel = Vec::with_capacity(channels * self.k);
        for o in 0..channels {
            by_channel.extend(all.iter().skip(o).step_by(width).take(self.k));
        }
        by_channel
    }

    /// Sums over some images: `[k, width]`, or `[channels, k]` for a few channels.
    fn part(
        &self,
        images: std::ops::Range<usize>,
        group: usize,
        channels: std::ops::Range<usize>,
    ) -> Vec<T> {
        let g = self.g;
        let plane = g.window.out[0] * g.window.out[1];
        let n = channels.len();
        let mut padded = vec![T::ZERO; self.source.padded_len()];
        let image_of = |image: usize| {
            let size = self.source.channels * g.window.size[0] * g.window.size[1];
            &self.x[(image * g.groups + group) * size..][..size]
        };
        let gradient_of = |image: usize| {
            let first = (image * g.groups + group) * g.window.outputs + channels.start;
            &self.dy[first * plane..][..n * plane]
        };
        if n <= FEW {
            let line = (g.window.out[0] - 1) * self.source.pitch + g.window.out[1];
            let mut spread = vec![T::ZERO; n * line];
            let mut sums = vec![T::ZERO; n * self.k];
            for image in images {
                self.source.fill(image_of(image), &mut padded);
                vectorized(
                    #[inline(always)]
                    || self.dots(gradient_of(image), &mut spread, &padded, &mut sums),
                );
            }
            return sums;
        }
        let width = n.next_multiple_of(OVERHANG);
        let mut sums = vec![T::ZERO; (self.k + PAD) * width];
        let mut across = vec![T::ZERO; plane * width];
        for image in images {
            self.source.fill(image_of(image), &mut padded);
            transpose(gradient_of(image), (n, plane, plane), &mut across, width);
            pulp::Arch::new().dispatch(Outer {
                offsets: self.offsets,
                k: self.k,
                source: &padded,
                pitch: self.source.pitch,
                grid: g.window.out,
                dy: &across,
                width,
                sums: &mut sums,
            });
        }
        sums
    }

    /// Few channels (depthwise): scalar products of whole lines.
    #[inline(always)]
    fn dots(&self, dy: &[T], spread: &mut [T], padded: &[T], sums: &mut [T]) {
        let [rows, cols] = self.g.window.out;
        let pitch = self.source.pitch;
        let line = (rows - 1) * pitch + cols;
        let channels = dy
            .chunks_exact(rows * cols)
            .zip(spread.chunks_exact_mut(line));
        for ((dy, spread), sums) in channels.zip(sums.chunks_exact_mut(self.k)) {
            for (i, row) in dy.chunks_exact(cols).enumerate() {
                spread[i * pitch..i * pitch + cols].copy_from_slice(row);
            }
            for (sum, offset) in sums.iter_mut().zip(self.offsets) {
                *sum = *sum + sum2(spread, &padded[*offset..*offset + line], |a, b| a * b);
            }
        }
    }
}
