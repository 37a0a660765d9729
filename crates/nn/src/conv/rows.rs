//! Convolutions of sequences whose channels come last, without a stride and without groups: products
//! over shifted rows.

use super::geometry::Geometry;
use super::maps::{PIECES, WORTH};
use crate::activation::Activation;
use crate::kernel::{filled, tensor, total, vectorized, Computed, Scalar, View};
use crate::linear::{finish, output_gradient};
use crate::Result;
use candle_core::{Shape, Tensor};
use rayon::prelude::*;
use tensor_core::kernels::conv::{
    pack_rows, transpose, CorrelateRows, Map, Outer, OVERHANG, PAD, ROW_PANEL,
};

/// Positions of a register tile.
const TILE: usize = 10;
/// Outputs of a part of a weight's gradient, at least.
const PART: usize = 4096;

/// The fused node `f(x * w + bias)`, `[B, L', out]`.
pub(super) fn node<T: Scalar>(
    x: &Tensor,
    (weight, bias): (&Tensor, Option<&Tensor>),
    activation: Activation,
    g: Geometry,
) -> Result<Tensor> {
    let (x, weight) = (x.contiguous()?, weight.contiguous()?);
    let bias = bias.map(Tensor::contiguous).transpose()?;
    let y = {
        let (xv, wv) = (View::new(&x)?, View::new(&weight)?);
        let bv = bias.as_ref().map(View::new).transpose()?;
        let b = bv.as_ref().map(View::slice::<T>).transpose()?;
        let rows = Rows::new(Map::Forward, &g);
        rows.run(xv.slice()?, wv.slice()?, &g, |y| finish(y, b, activation))
    };
    let backward = move |arguments: &[&Tensor], y: &Tensor, dy: &Tensor| {
        gradients::<T>(arguments, y, dy, activation, &g)
    };
    let shape = Shape::from((g.batch, g.window.out[1], g.window.outputs));
    let node = Computed::new("convolution", y, &shape, backward);
    Ok(match &bias {
        Some(bias) => x.apply_op3(&weight, bias, node)?,
        None => x.apply_op2(&weight, node)?,
    })
}

fn gradients<T: Scalar>(
    arguments: &[&Tensor],
    y: &Tensor,
    dy: &Tensor,
    activation: Activation,
    g: &Geometry,
) -> Result<Vec<Option<Tensor>>> {
    let (x, weight) = (arguments[0], arguments[1]);
    let bias = arguments.get(2).filter(|t| t.track_op());
    let (yv, dyv) = (View::new(y)?, View::new(dy)?);
    let (y, dy) = (yv.slice::<T>()?, dyv.slice::<T>()?);
    let outputs = g.window.outputs;
    let (dz, db) = output_gradient(y, dy, outputs, activation, bias.is_some());
    let dz = dz.as_deref().unwrap_or(dy);
    let dx = match x.track_op() {
        true => {
            let wv = View::new(weight)?;
            let rows = Rows::new(Map::Transposed, g);
            let dx = rows.run(dz, wv.slice::<T>()?, g, |_| {});
            Some(tensor(dx, x.shape())?)
        }
        false => None,
    };
    let dw = match weight.track_op() {
        true => {
            let xv = View::new(x)?;
            Some(tensor(
                weight_sums(xv.slice::<T>()?, dz, g),
                weight.shape(),
            )?)
        }
        false => None,
    };
    let db = bias.map(|b| tensor(db, b.shape())).transpose()?;
    Ok(vec![dx, dw, db])
}

/// One of the two maps whose result is a sequence.
struct Rows {
    map: Map,
    /// Channels and positions of the source.
    channels: usize,
    size: usize,
    /// Positions of zeros before the source.
    lead: usize,
    /// Positions that a result reads, its first one included.
    reach: usize,
    /// Where the first result's inputs lie, for each tap of each channel of the source.
    offsets: Vec<usize>,
    /// Channels and positions of the result.
    results: usize,
    out: usize,
}

impl Rows {
    fn new(map: Map, g: &Geometry) -> Self {
        let w = &g.window;
        let (taps, dilation, padding) = (w.kernel[1], w.dilation[1], w.padding[1]);
        let span = dilation * (taps - 1);
        let (channels, size, lead) = match map {
            Map::Forward => (w.inputs, w.size[1], padding),
            Map::Transposed => (w.outputs, w.out[1], span.saturating_sub(padding)),
        };
        let shift = |t: usize| match map {
            Map::Forward => t * dilation,
            Map::Transposed => padding + lead - t * dilation,
        };
        let of_channel = |c: usize| (0..taps).map(move |t| shift(t) * channels + c);
        Self {
            map,
            channels,
            size,
            lead,
            reach: (0..taps).map(shift).max().unwrap_or(0) + 1,
            offsets: (0..channels).flat_map(of_channel).collect(),
            results: map.channels(w),
            out: map.size(w)[1],
        }
    }

    /// The source from the padded position `first` on, zeros before and after it.
    fn fill<T: Scalar>(&self, image: &[T], first: usize, out: &mut [T]) {
        let positions = out.len() / self.channels;
        let before = self.lead.saturating_sub(first).min(positions);
        let from = (first + before - self.lead.min(first + before)).min(self.size);
        let copied = (self.size - from).min(positions - before);
        let (zeros, rest) = out.split_at_mut(before * self.channels);
        let (values, after) = rest.split_at_mut(copied * self.channels);
        zeros.fill(T::ZERO);
        values.copy_from_slice(&image[from * self.channels..][..values.len()]);
        after.fill(T::ZERO);
    }

    /// The weights by panels of channels of the result.
    fn packed<T: Scalar>(&self, weight: &[T], width: usize, g: &Geometry) -> Vec<T> {
        let depth = self.offsets.len();
        let mut packed = vec![T::ZERO; depth * width];
        let panels = packed.par_chunks_mut(depth * ROW_PANEL).enumerate();
        panels.for_each(|(i, packed)| {
            let panel = packed.len() / depth;
            pack_rows(self.map, weight, &g.window, (i * ROW_PANEL, panel), packed);
        });
        packed
    }

    /// The map, and `after` over pieces of whole positions of its result.
    fn run<T: Scalar>(
        &self,
        input: &[T],
        weight: &[T],
        g: &Geometry,
        after: impl Fn(&mut [T]) + Sync,
    ) -> Vec<T> {
        let width = self.results.next_multiple_of(OVERHANG);
        let weights = self.packed(weight, width, g);
        // Few images: each is cut by positions as well.
        let cuts = PIECES.div_ceil(g.batch);
        let block = self.out.div_ceil(cuts).next_multiple_of(TILE).min(self.out);
        let work = block * self.results * self.offsets.len();
        let buffers = || {
            let wide = if width == self.results {
                0
            } else {
                block * width
            };
            let source = (block + self.reach - 1) * self.channels;
            (vec![T::ZERO; source], vec![T::ZERO; wide])
        };
        filled(g.batch * self.out * self.results, |out| {
            let images = out.chunks_mut(self.out * self.results).enumerate();
            let pieces: Vec<(usize, usize, &mut [T])> = images
                .flat_map(|(i, image)| {
                    let blocks = image.chunks_mut(block * self.results).enumerate();
                    blocks.map(move |(b, part)| (i, b * block, part))
                })
                .collect();
            let pieces = pieces.into_par_iter().with_min_len(WORTH / work.max(1) + 1);
            pieces.for_each_init(buffers, |(source, wide), (image, first, out)| {
                let rows = out.len() / self.results;
                let source = &mut source[..(rows + self.reach - 1) * self.channels];
                let size = self.size * self.channels;
                self.fill(&input[image * size..][..size], first, source);
                let direct = width == self.results;
                pulp::Arch::new().dispatch(CorrelateRows {
                    weights: &weights,
                    offsets: &self.offsets,
                    source,
                    step: self.channels,
                    out: if direct { &mut *out } else { wide },
                    rows,
                    width,
                });
                if !direct {
                    let pairs = out.chunks_exact_mut(self.results);
                    for (to, from) in pairs.zip(wide.chunks_exact(width)) {
                        to.copy_from_slice(&from[..self.results]);
                    }
                }
                vectorized(
                    #[inline(always)]
                    || after(out),
                );
            });
        })
    }
}

/// `dw` `[out, C, k]`: a fixed cut of the batch and of the weights, the parts of the batch added in
/// order.
fn weight_sums<T: Scalar>(x: &[T], dz: &[T], g: &Geometry) -> Vec<T> {
    let rows = Rows::new(Map::Forward, g);
    let (depth, outputs) = (rows.offsets.len(), g.window.outputs);
    let positions = rows.out;
    let width = outputs.next_multiple_of(OVERHANG);
    let padded = (positions + rows.reach - 1) * rows.channels;
    let sources = filled(g.batch * padded, |all| {
        let images = all.par_chunks_mut(padded).enumerate();
        let size = rows.size * rows.channels;
        images.for_each(|(i, out)| rows.fill(&x[i * size..][..size], 0, out));
    });
    let spread;
    let dz = match width == outputs {
        true => dz,
        false => {
            let mut wide = vec![T::ZERO; g.batch * positions * width];
            let pairs = wide.chunks_exact_mut(width).zip(dz.chunks_exact(outputs));
            pairs.for_each(|(to, from)| to[..outputs].copy_from_slice(from));
            spread = wide;
            &spread
        }
    };
    let parts = (g.batch * positions / PART).clamp(1, 4).min(g.batch);
    let each = g.batch.div_ceil(parts);
    let parts = g.batch.div_ceil(each);
    let block = depth
        .div_ceil(PIECES.div_ceil(2))
        .next_multiple_of(PAD)
        .min(depth);
    let one = |first: usize, images: std::ops::Range<usize>| {
        let k = block.min(depth - first);
        let mut offsets = rows.offsets[first..first + k].to_vec();
        offsets.resize(k + PAD, offsets[0]);
        let mut sums = vec![T::ZERO; (k + PAD) * width];
        for image in images {
            pulp::Arch::new().dispatch(Outer {
                offsets: &offsets,
                k,
                source: &sources[image * padded..][..padded],
                pitch: rows.channels,
                grid: [positions, 1],
                dy: &dz[image * positions * width..][..positions * width],
                width,
                sums: &mut sums,
            });
        }
        sums
    };
    let starts: Vec<usize> = (0..depth).step_by(block).collect();
    let pieces = (0..starts.len() * parts).into_par_iter();
    let work = each * positions * outputs * block;
    let pieces = pieces.with_min_len(WORTH / work.max(1) + 1);
    let all: Vec<Vec<T>> = pieces
        .map(|i| {
            let (first, part) = (starts[i / parts], i % parts);
            one(first, part * each..((part + 1) * each).min(g.batch))
        })
        .collect();
    let mut dw = vec![T::ZERO; outputs * depth];
    let mut all = all.into_iter();
    for first in starts {
        let k = block.min(depth - first);
        let sums = total(0, all.by_ref().take(parts));
        let mut across = vec![T::ZERO; outputs * k];
        transpose(&sums, (k, outputs, width), &mut across, k);
        for (to, from) in dw.chunks_exact_mut(depth).zip(across.chunks_exact(k)) {
            to[first..first + k].copy_from_slice(from);
        }
    }
    dw
}
