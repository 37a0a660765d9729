//! The recorded layers on the CPU: layers whose weights get no gradient, and signs of single
//! examples' gradients that are counted while the gradient is still in the cache.

use super::counter::{count_into, Signs};
use crate::host::contents;
use crate::Result;
use candle_core::{CpuStorage, CustomOp1, DType, Layout, Shape, Tensor, WithDType};
use candle_nn::Conv2dConfig;
use rayon::prelude::*;
use std::ops::Range;

/// How a weight acts on one example.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Form {
    /// `positions` rows of `inputs` numbers, each times `[out, inputs]`.
    Linear { positions: usize, inputs: usize },
    /// An image whose patches are multiplied with `[out, patch]`.
    Conv(Window),
}

/// A window that slides over an image.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Window {
    image: [usize; 3],
    kernel: [usize; 2],
    out: [usize; 2],
    padding: usize,
    stride: usize,
    dilation: usize,
}

impl Window {
    /// The window of a weight `[out, in, kh, kw]` over images `[B, in, H, W]`; `None` where it does not
    /// fit.
    pub(super) fn new(x: &[usize], weight: &[usize], config: Conv2dConfig) -> Option<Self> {
        let (&[_, channels, height, width], &[_, inputs, kh, kw]) = (x, weight) else {
            return None;
        };
        let out = |size: usize, kernel: usize| {
            let span = config.dilation * kernel.checked_sub(1)? + 1;
            Some((size + 2 * config.padding).checked_sub(span)? / config.stride.max(1) + 1)
        };
        if channels != inputs || config.stride == 0 {
            return None;
        }
        Some(Self {
            image: [channels, height, width],
            kernel: [kh, kw],
            out: [out(height, kh)?, out(width, kw)?],
            padding: config.padding,
            stride: config.stride,
            dilation: config.dilation,
        })
    }

    /// The shape of the output.
    pub(super) fn output(&self, examples: usize, channels: usize) -> [usize; 4] {
        [examples, channels, self.out[0], self.out[1]]
    }

    fn patch(&self) -> usize {
        self.image[0] * self.kernel[0] * self.kernel[1]
    }

    fn positions(&self) -> usize {
        self.out[0] * self.out[1]
    }

    fn pixels(&self) -> usize {
        self.image.iter().product()
    }

    /// Outputs along an axis whose window entry `at` lies inside the image.
    fn inside(&self, axis: usize, at: usize) -> Range<usize> {
        let offset = at * self.dilation;
        let first = self.padding.saturating_sub(offset).div_ceil(self.stride);
        let end = (self.image[axis + 1] + self.padding).saturating_sub(offset);
        let end = end.div_ceil(self.stride).min(self.out[axis]);
        first.min(end)..end
    }

    /// Calls `run(patches, pixels, count)` for every row of outputs: `count` entries of the patches
    /// `[patch, positions]` from one place on, and the pixels, `stride` apart, that they come from.
    fn walk(&self, mut run: impl FnMut(usize, usize, usize)) {
        let ([channels, height, width], [kh, kw]) = (self.image, self.kernel);
        for row in 0..channels * kh * kw {
            let (c, dy, dx) = (row / (kh * kw), row / kw % kh, row % kw);
            let columns = self.inside(1, dx);
            if columns.is_empty() {
                continue;
            }
            for oy in self.inside(0, dy) {
                let y = oy * self.stride + dy * self.dilation - self.padding;
                let x = columns.start * self.stride + dx * self.dilation - self.padding;
                let from = row * self.positions() + oy * self.out[1] + columns.start;
                run(from, (c * height + y) * width + x, columns.len());
            }
        }
    }

    /// The patches of an image, `[patch, positions]`.
    fn unfold<T: WithDType>(&self, image: &[T], patches: &mut [T]) {
        patches.fill(T::zero());
        self.walk(|to, from, count| {
            let pixels = image[from..].iter().step_by(self.stride);
            let patches = &mut patches[to..to + count];
            patches.iter_mut().zip(pixels).for_each(|(p, x)| *p = *x);
        });
    }

    /// Adds patches to the image that they come from.
    fn fold<T: WithDType>(&self, patches: &[T], image: &mut [T]) {
        self.walk(|from, to, count| {
            let pixels = image[to..].iter_mut().step_by(self.stride);
            let patches = &patches[from..from + count];
            pixels.zip(patches).for_each(|(x, p)| *x += *p);
        });
    }
}

impl Form {
    /// Numbers of one example that go in.
    fn inputs(&self) -> usize {
        match self {
            Self::Linear { positions, inputs } => positions * inputs,
            Self::Conv(window) => window.pixels(),
        }
    }

    fn positions(&self) -> usize {
        match self {
            Self::Linear { positions, .. } => *positions,
            Self::Conv(window) => window.positions(),
        }
    }

    /// Columns of the weight.
    fn columns(&self) -> usize {
        match self {
            Self::Linear { inputs, .. } => *inputs,
            Self::Conv(window) => window.patch(),
        }
    }

    /// Examples of one product; fixed, so that the bits do not depend on the number of threads.
    fn block(&self) -> usize {
        match self {
            Self::Linear { .. } => 32,
            Self::Conv(_) => 1,
        }
    }

    /// Room for patches.
    fn scratch<T: WithDType>(&self) -> Vec<T> {
        match self {
            Self::Linear { .. } => Vec::new(),
            Self::Conv(window) => vec![T::zero(); window.patch() * window.positions()],
        }
    }
}

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

/// A layer without bias whose weight is a constant, so that its backward pass makes the gradient of the
/// input alone. The output is `[B, positions, out]` for a linear layer and `[B, out, H', W']` for a
/// convolution.
pub(super) struct Frozen {
    pub(super) weight: Tensor,
    pub(super) form: Form,
    /// The output's shape.
    pub(super) shape: Vec<usize>,
}

impl Frozen {
    fn forward<T: WithDType>(&self, x: &[T]) -> Result<Vec<T>> {
        let (storage, layout) = self.weight.storage_and_layout();
        let weight = contents::<T>(&storage, layout)?;
        let (out, columns, positions) = self.sizes();
        let weight = Matrix::new(weight, out, columns);
        let mut y = vec![T::zero(); self.shape.iter().product()];
        let one = |patches: &mut Vec<T>, (y, x): (&mut [T], &[T])| match self.form {
            Form::Linear { .. } => {
                let x = Matrix::new(x, x.len() / columns.max(1), columns);
                product(x, weight.t(), y, false);
            }
            Form::Conv(window) => {
                window.unfold(x, patches);
                product(weight, Matrix::new(patches, columns, positions), y, false);
            }
        };
        let block = self.form.block();
        y.par_chunks_mut((block * out * positions).max(1))
            .zip(x.par_chunks((block * self.form.inputs()).max(1)))
            .for_each_init(|| self.form.scratch(), one);
        Ok(y)
    }

    fn backward<T: WithDType>(&self, delta: &[T], examples: usize) -> Result<Vec<T>> {
        let (storage, layout) = self.weight.storage_and_layout();
        let weight = contents::<T>(&storage, layout)?;
        let (out, columns, positions) = self.sizes();
        let weight = Matrix::new(weight, out, columns);
        let mut x = vec![T::zero(); examples * self.form.inputs()];
        let one = |patches: &mut Vec<T>, (x, delta): (&mut [T], &[T])| match self.form {
            Form::Linear { .. } => {
                let delta = Matrix::new(delta, delta.len() / out.max(1), out);
                product(delta, weight, x, false);
            }
            Form::Conv(window) => {
                product(
                    weight.t(),
                    Matrix::new(delta, out, positions),
                    patches,
                    false,
                );
                window.fold(patches, x);
            }
        };
        let block = self.form.block();
        x.par_chunks_mut((block * self.form.inputs()).max(1))
            .zip(delta.par_chunks((block * out * positions).max(1)))
            .for_each_init(|| self.form.scratch(), one);
        Ok(x)
    }

    /// Rows and columns of the weight, and positions of an example.
    fn sizes(&self) -> (usize, usize, usize) {
        let out = self.weight.dims().first().copied().unwrap_or(0);
        (out, self.form.columns(), self.form.positions())
    }
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen layer"
    }

    fn cpu_fwd(
        &self,
        storage: &CpuStorage,
        layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let Some((from, to)) = layout.contiguous_offsets() else {
            candle_core::bail!("a frozen layer needs contiguous inputs");
        };
        let out = match storage {
            CpuStorage::F32(x) => CpuStorage::F32(self.forward(&x[from..to])?),
            CpuStorage::F64(x) => CpuStorage::F64(self.forward(&x[from..to])?),
            _ => candle_core::bail!("a frozen layer works in f32 and f64"),
        };
        Ok((out, Shape::from(self.shape.as_slice())))
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, delta: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let delta = delta.contiguous()?;
        let examples = delta.dims().first().copied().unwrap_or(0);
        let (storage, layout) = delta.storage_and_layout();
        let (device, shape) = (x.device(), x.shape());
        let gradient = match x.dtype() {
            DType::F64 => {
                let values = self.backward(contents::<f64>(&storage, layout)?, examples)?;
                Tensor::from_vec(values, shape, device)?
            }
            _ => {
                let values = self.backward(contents::<f32>(&storage, layout)?, examples)?;
                Tensor::from_vec(values, shape, device)?
            }
        };
        Ok(Some(gradient))
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
pub(super) fn signs<T: WithDType + Default>(
    parts: &[Part<'_, T>],
    examples: usize,
    rows: usize,
    numel: usize,
) -> Signs {
    let room = parts.iter().map(|part| part.form.scratch::<T>());
    let room = room.max_by_key(Vec::len).unwrap_or_default();
    let start = || (Signs::zeros(numel), room.clone(), vec![T::zero(); numel]);
    let one = |(mut signs, mut patches, mut grad): (Signs, Vec<T>, Vec<T>), i: usize| {
        for (call, part) in parts.iter().enumerate() {
            let (positions, inputs) = (part.form.positions(), part.form.inputs());
            let delta = &part.delta[i * rows * positions..(i + 1) * rows * positions];
            let input = &part.input[i * inputs..(i + 1) * inputs];
            let columns = part.form.columns();
            match part.form {
                Form::Linear { .. } => {
                    let delta = Matrix::new(delta, positions, rows).t();
                    product(
                        delta,
                        Matrix::new(input, positions, columns),
                        &mut grad,
                        call > 0,
                    );
                }
                Form::Conv(window) => {
                    let patches = &mut patches[..columns * positions];
                    window.unfold(input, patches);
                    let patches = Matrix::new(patches, columns, positions).t();
                    product(
                        Matrix::new(delta, rows, positions),
                        patches,
                        &mut grad,
                        call > 0,
                    );
                }
            }
        }
        if !parts.is_empty() {
            count_into(&mut signs, &grad);
        }
        (signs, patches, grad)
    };
    (0..examples)
        .into_par_iter()
        .with_min_len(4)
        .fold(start, one)
        .map(|(signs, ..)| signs)
        .reduce(
            || Signs::zeros(numel),
            |mut all, more| {
                all.merge(&more);
                all
            },
        )
}
