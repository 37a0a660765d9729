//! The recorded layers on the CPU: layers whose weights get no gradient, and signs of single
//! examples' gradients that are counted while the gradient is still in the cache.

use super::counter::{count_into, Signs};
use crate::host::contents;
use crate::Result;
use candle_core::{CpuStorage, CustomOp2, DType, Layout, Shape, Tensor, WithDType};
use candle_nn::Conv2dConfig;
use rayon::prelude::*;
use std::sync::{Arc, Mutex, PoisonError};
use tensor_core::kernels::conv::{
    pack, transpose, Correlate, Lanes, Map, Outer, Pass, Source, Window, OVERHANG, PAD,
};

/// How a weight acts on one example.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Form {
    /// `positions` rows of `inputs` numbers, each times `[out, inputs]`.
    Linear { positions: usize, inputs: usize },
    /// An image whose patches are multiplied with `[out, patch]`.
    Conv(Window),
}

/// The sizes of a weight `[out, in, kh, kw]` over images `[B, in, H, W]`; `None` where it does not fit.
pub(super) fn window(x: &[usize], weight: &[usize], config: Conv2dConfig) -> Option<Window> {
    let (&[_, channels, height, width], &[outputs, inputs, kh, kw]) = (x, weight) else {
        return None;
    };
    let whole = x.iter().chain(weight).all(|n| *n > 0);
    if channels != inputs || config.groups != 1 || !whole {
        return None;
    }
    let window = Window {
        inputs,
        outputs,
        size: [height, width],
        out: [0, 0],
        kernel: [kh, kw],
        stride: [config.stride; 2],
        padding: [config.padding; 2],
        dilation: [config.dilation; 2],
    };
    window.fitted()
}

/// Examples of one product of a linear layer; fixed, so that the bits do not depend on the number of
/// threads.
const BLOCK: usize = 32;

/// A matrix in a slice.
#[derive(Clone, Copy)]
struct Matrix<'a, T> {
    data: &'a [T],
    rows: usize,
    columns: usize,
    strides: [usize; 2],
}

impl<'a, T> Matrix<'a, T> {
    fn new(data: &'a [T], rows: usize, columns: usize) -> Self {
        Self {
            data,
            rows,
            columns,
            strides: [columns, 1],
        }
    }

    fn t(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            strides: [self.strides[1], self.strides[0]],
            ..self
        }
    }
}

/// `out = a b`, or `out += a b`, on one thread; `out` is row-major.
fn product<T: WithDType>(a: Matrix<'_, T>, b: Matrix<'_, T>, out: &mut [T], add: bool) {
    let (m, n, k) = (a.rows, b.columns, a.columns);
    assert!(k == b.rows && out.len() == m * n);
    assert!(a.data.len() >= m * k && b.data.len() >= k * n);
    if m == 0 || n == 0 {
        return;
    }
    let [a_row, a_column] = a.strides.map(|s| s as isize);
    let [b_row, b_column] = b.strides.map(|s| s as isize);
    // SAFETY: both factors are dense matrices inside their slices and the output fills its own
    // (asserted above); a mutable slice overlaps no other.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            n as isize,
            add,
            a.data.as_ptr(),
            a_column,
            a_row,
            b.data.as_ptr(),
            b_column,
            b_row,
            T::one(),
            T::one(),
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// A convolution of all images, or its transpose.
fn correlate<T: WithDType + Lanes>(
    map: Map,
    window: &Window,
    weight: &[T],
    input: &[T],
    out: &mut [T],
) {
    let (source, passes) = map.plan(window);
    let lay = |pass: Pass| {
        (
            source.offsets(&pass),
            pack(map, &pass, weight, window),
            pass,
        )
    };
    let passes: Vec<_> = passes.into_iter().map(lay).collect();
    let (channels, size) = (map.channels(window), map.size(window));
    let lines = passes.iter().map(|(.., pass)| pass.line(source.pitch));
    let stride = lines.max().unwrap_or(0).next_multiple_of(OVERHANG);
    let image = channels * size[0] * size[1];
    let from = input.len() / (out.len() / image).max(1);
    let buffers = || {
        let padded = vec![T::ZERO; source.padded_len()];
        (padded, vec![T::ZERO; channels * stride])
    };
    let images = out.par_chunks_mut(image).zip(input.par_chunks(from.max(1)));
    images.for_each_init(buffers, |(padded, lines), (out, image)| {
        source.fill(image, padded);
        for (offsets, weights, pass) in &passes {
            pulp::Arch::new().dispatch(Correlate {
                weights,
                offsets,
                source: padded,
                out: lines,
                channels,
                line: pass.line(source.pitch),
                stride,
            });
            scatter(pass, source.pitch, (lines, stride), out, size);
        }
    });
}

/// From lines of outputs to the image.
fn scatter<T: Copy>(
    pass: &Pass,
    pitch: usize,
    (lines, stride): (&[T], usize),
    image: &mut [T],
    [h, w]: [usize; 2],
) {
    let [rows, cols] = pass.grid;
    for (line, plane) in lines
        .chunks_exact(stride)
        .zip(image.chunks_exact_mut(h * w))
    {
        for i in 0..rows {
            let from = &line[i * pitch..][..cols];
            let at = (pass.start[0] + i * pass.step[0]) * w + pass.start[1];
            let to = plane[at..].iter_mut().step_by(pass.step[1]);
            to.zip(from).for_each(|(to, x)| *to = *x);
        }
    }
}

/// Where a layer leaves the gradient of its output.
pub(super) type Slot = Arc<Mutex<Option<Tensor>>>;

/// A layer without bias whose backward pass makes the gradient of the input alone, and leaves that of
/// the output behind. The output is `[B, positions, out]` for a linear layer and `[B, out, H', W']` for a
/// convolution.
pub(super) struct Frozen {
    pub(super) form: Form,
    /// The output's shape.
    pub(super) shape: Vec<usize>,
    pub(super) delta: Slot,
}

impl Frozen {
    fn forward<T: WithDType + Lanes>(&self, x: &[T], weight: &[T]) -> Vec<T> {
        let mut y = vec![T::ZERO; self.shape.iter().product()];
        match self.form {
            Form::Linear { positions, inputs } => {
                let out = weight.len() / inputs;
                let blocks = y.par_chunks_mut(BLOCK * out * positions);
                let pairs = blocks.zip(x.par_chunks(BLOCK * positions * inputs));
                let weight = Matrix::new(weight, out, inputs);
                pairs.for_each(|(y, x)| {
                    let x = Matrix::new(x, x.len() / inputs, inputs);
                    product(x, weight.t(), y, false);
                });
            }
            Form::Conv(window) => correlate(Map::Forward, &window, weight, x, &mut y),
        }
        y
    }

    fn backward<T: WithDType + Lanes>(&self, delta: &[T], weight: &[T], numel: usize) -> Vec<T> {
        let mut x = vec![T::ZERO; numel];
        match self.form {
            Form::Linear { positions, inputs } => {
                let out = weight.len() / inputs;
                let blocks = x.par_chunks_mut(BLOCK * positions * inputs);
                let pairs = blocks.zip(delta.par_chunks(BLOCK * out * positions));
                let weight = Matrix::new(weight, out, inputs);
                pairs.for_each(|(x, delta)| {
                    let delta = Matrix::new(delta, delta.len() / out, out);
                    product(delta, weight, x, false);
                });
            }
            Form::Conv(window) => correlate(Map::Transposed, &window, weight, delta, &mut x),
        }
        x
    }
}

impl CustomOp2 for Frozen {
    fn name(&self) -> &'static str {
        "frozen layer"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let ranges = (
            x_layout.contiguous_offsets(),
            weight_layout.contiguous_offsets(),
        );
        let (Some((from, to)), Some((first, end))) = ranges else {
            candle_core::bail!("a frozen layer needs contiguous tensors");
        };
        let out = match (x, weight) {
            (CpuStorage::F32(x), CpuStorage::F32(w)) => {
                CpuStorage::F32(self.forward(&x[from..to], &w[first..end]))
            }
            (CpuStorage::F64(x), CpuStorage::F64(w)) => {
                CpuStorage::F64(self.forward(&x[from..to], &w[first..end]))
            }
            _ => candle_core::bail!("a frozen layer works in f32 and f64"),
        };
        Ok((out, Shape::from(self.shape.as_slice())))
    }

    fn bwd(
        &self,
        x: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        delta: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let delta = delta.detach().contiguous()?;
        let gradient = match (x.track_op(), x.dtype()) {
            (false, _) => None,
            (true, DType::F64) => Some(self.input_gradient::<f64>(x, weight, &delta)?),
            (true, _) => Some(self.input_gradient::<f32>(x, weight, &delta)?),
        };
        *self.delta.lock().unwrap_or_else(PoisonError::into_inner) = Some(delta);
        Ok((gradient, None))
    }
}

impl Frozen {
    fn input_gradient<T: WithDType + Lanes>(
        &self,
        x: &Tensor,
        weight: &Tensor,
        delta: &Tensor,
    ) -> Result<Tensor> {
        let (delta, delta_layout) = delta.storage_and_layout();
        let (weight, weight_layout) = weight.storage_and_layout();
        let values = self.backward(
            contents::<T>(&delta, delta_layout)?,
            contents::<T>(&weight, weight_layout)?,
            x.elem_count(),
        );
        Ok(Tensor::from_vec(values, x.shape(), x.device())?)
    }
}

/// One call of a layer: the gradient of its output and what went in.
#[derive(Clone, Copy)]
pub(super) struct Part<'a, T> {
    pub(super) delta: &'a [T],
    pub(super) input: &'a [T],
    pub(super) form: Form,
}

/// Signs of the examples' gradients of a weight with `rows` rows and `numel` entries; several calls
/// add before the sign. Every thread holds one example's gradient.
pub(super) fn signs<T: WithDType + Lanes + Default>(
    parts: &[Part<'_, T>],
    examples: usize,
    rows: usize,
    numel: usize,
) -> Signs {
    let convolutions = parts.iter().filter_map(|part| match part.form {
        Form::Conv(window) => Some((part, window)),
        Form::Linear { .. } => None,
    });
    let convolutions: Vec<_> = convolutions.collect();
    if !convolutions.is_empty() {
        return Convolved::new(&convolutions, rows, numel).signs(examples);
    }
    let start = || (Signs::zeros(numel), vec![T::ZERO; numel]);
    let one = |(mut signs, mut grad): (Signs, Vec<T>), i: usize| {
        for (call, part) in parts.iter().enumerate() {
            if let Form::Linear { positions, inputs } = part.form {
                let delta = &part.delta[i * rows * positions..(i + 1) * rows * positions];
                let input = &part.input[i * positions * inputs..(i + 1) * positions * inputs];
                let delta = Matrix::new(delta, positions, rows).t();
                let input = Matrix::new(input, positions, inputs);
                product(delta, input, &mut grad, call > 0);
            }
        }
        if !parts.is_empty() {
            count_into(&mut signs, &grad);
        }
        (signs, grad)
    };
    let all = (0..examples).into_par_iter().with_min_len(4);
    sum(all.fold(start, one).map(|(signs, _)| signs), numel)
}

fn sum(parts: impl ParallelIterator<Item = Signs>, numel: usize) -> Signs {
    parts.reduce(
        || Signs::zeros(numel),
        |mut all, more| {
            all.merge(&more);
            all
        },
    )
}

/// The calls of a convolution's weight.
struct Convolved<'a, T> {
    calls: Vec<ConvolvedCall<'a, T>>,
    rows: usize,
    /// Columns of the weight.
    k: usize,
    /// Rows of the weight, padded.
    width: usize,
}

struct ConvolvedCall<'a, T> {
    part: &'a Part<'a, T>,
    window: Window,
    source: Source,
    offsets: Vec<usize>,
}

/// What a thread works in.
struct Own<T> {
    signs: Signs,
    /// A padded image for each call.
    padded: Vec<Vec<T>>,
    /// Gradients of outputs by position, `[positions, width]`.
    across: Vec<T>,
    /// One example's gradient, `[k, width]`.
    sums: Vec<T>,
}

impl<'a, T: WithDType + Lanes + Default> Convolved<'a, T> {
    fn new(parts: &[(&'a Part<'a, T>, Window)], rows: usize, numel: usize) -> Self {
        let k = numel / rows;
        let call = |(part, window): &(&'a Part<'a, T>, Window)| {
            let (source, passes) = Map::Forward.plan(window);
            let mut offsets: Vec<usize> = passes.iter().flat_map(|p| source.offsets(p)).collect();
            offsets.resize(k + PAD, offsets.first().copied().unwrap_or(0));
            ConvolvedCall {
                part,
                window: *window,
                source,
                offsets,
            }
        };
        Self {
            calls: parts.iter().map(call).collect(),
            rows,
            k,
            width: rows.next_multiple_of(OVERHANG),
        }
    }

    fn signs(&self, examples: usize) -> Signs {
        let numel = self.k * self.width;
        let one = |mut own: Own<T>, i: usize| {
            own.sums.fill(T::ZERO);
            for (call, padded) in self.calls.iter().zip(&mut own.padded) {
                self.add(call, i, padded, &mut own.across, &mut own.sums);
            }
            count_into(&mut own.signs, &own.sums[..numel]);
            own
        };
        let all = (0..examples).into_par_iter().with_min_len(4);
        let counted = all.fold(|| self.own(), one).map(|own| own.signs);
        let by_column = sum(counted, numel);
        by_column.picked((0..self.rows).flat_map(|o| (0..self.k).map(move |k| k * self.width + o)))
    }

    fn own(&self) -> Own<T> {
        let calls = self.calls.iter();
        let positions = calls.map(|call| call.window.out[0] * call.window.out[1]);
        let padded = self.calls.iter().map(|call| call.source.padded_len());
        Own {
            signs: Signs::zeros(self.k * self.width),
            padded: padded.map(|len| vec![T::ZERO; len]).collect(),
            across: vec![T::ZERO; positions.max().unwrap_or(0) * self.width],
            sums: vec![T::ZERO; (self.k + PAD) * self.width],
        }
    }

    /// Adds one call's gradient for example `i`, as `[k, width]`.
    fn add(
        &self,
        call: &ConvolvedCall<'_, T>,
        i: usize,
        padded: &mut [T],
        across: &mut [T],
        sums: &mut [T],
    ) {
        let window = &call.window;
        let pixels = window.inputs * window.size[0] * window.size[1];
        let positions = window.out[0] * window.out[1];
        call.source
            .fill(&call.part.input[i * pixels..(i + 1) * pixels], padded);
        let delta = &call.part.delta[i * self.rows * positions..(i + 1) * self.rows * positions];
        transpose(delta, (self.rows, positions, positions), across, self.width);
        pulp::Arch::new().dispatch(Outer {
            offsets: &call.offsets,
            k: self.k,
            source: padded,
            pitch: call.source.pitch,
            grid: window.out,
            dy: across,
            width: self.width,
            sums,
        });
    }
}
