//! Layers that record what the signs of all examples' gradients need, in one backward pass.

use super::counter::{count, Signs};
use super::host::{self, Form, Frozen, Slot};
use crate::host::contents;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Module, Tensor, Var, WithDType};
use candle_nn::Conv2dConfig;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tensor_core::kernels::conv::Lanes;

/// One call of a layer while the tape was on.
#[derive(Debug, Clone)]
struct Call {
    weight: Var,
    kind: Kind,
    input: Tensor,
    delta: Delta,
    /// Numbers in the output.
    outputs: usize,
}

/// Where the gradient of the output is to be found after a backward pass.
#[derive(Debug, Clone)]
enum Delta {
    /// Left here by the layer.
    Slot(Slot),
    /// The gradient of zeros that were added to the output.
    Probe(Var),
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Linear,
    Conv(Conv2dConfig),
}

#[derive(Debug, Default)]
struct Records {
    on: bool,
    weights: Vec<Var>,
    calls: Vec<Call>,
}

/// Makes layers that record, and holds what they recorded. Off (as it begins) the layers compute
/// what plain ones do and record nothing.
///
/// ```
/// use candle_core::{Device, Module, Tensor, Var};
/// use thalweg_optim::diagnostics::gradsign::{gradsign, GradSignConfig, Method, SignTape};
///
/// let (w0, w1) = (Var::new(&[[0.3f32, -0.2], [0.1, 0.4]], &Device::Cpu)?, Var::new(&[[1f32, -1.0]], &Device::Cpu)?);
/// let tape = SignTape::new();
/// let (hidden, out) = (tape.linear(&w0, None)?, tape.linear(&w1, None)?);
/// let model = |x: &Tensor| out.forward(&hidden.forward(x)?.tanh()?);
/// let x = Tensor::new(&[[1f32, 2.0], [-0.5, 1.5]], &Device::Cpu)?;
/// let y = Tensor::new(&[[1f32], [-1.0]], &Device::Cpu)?;
/// let loss = |out: &Tensor, y: &Tensor| (out - y)?.sqr()?.mean_all();
/// let params = vec![("hidden".to_string(), w0.clone()), ("out".to_string(), w1.clone())];
/// let config = GradSignConfig { tape: Some(tape.clone()), ..Default::default() };
/// let fast = gradsign(model, &params, &x, &y, loss, &config)?;
/// let slow = gradsign(model, &params, &x, &y, loss, &GradSignConfig { method: Method::PerExample, ..config })?;
/// assert_eq!(fast.score, slow.score);
/// # Ok::<(), thalweg_optim::Error>(())
/// ```
#[derive(Debug, Clone, Default)]
pub struct SignTape(Arc<Mutex<Records>>);

/// A layer from which the signs of every example's gradient can be had after one backward pass.
pub trait PerExampleSigns {
    /// The weight whose signs these are.
    fn weight(&self) -> &Var;

    /// `sum_i sign(g_i)` for the weight, row-major, over the examples of the recorded batch, after
    /// a backward pass of their summed (or mean) loss. NaN columns are 0.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when the layer was not called while its tape was on.
    fn sign_sums(&self, grads: &GradStore) -> Result<Vec<i32>>;
}

/// A linear layer on a [`SignTape`]: inputs `[B, .., in]`, weight `[out, in]`.
#[derive(Debug, Clone)]
pub struct SignLinear {
    tape: SignTape,
    weight: Var,
    bias: Option<Tensor>,
}

/// A two-dimensional convolution on a [`SignTape`]: inputs `[B, in, H, W]`, weight
/// `[out, in, k, k]`, without groups.
#[derive(Debug, Clone)]
pub struct SignConv2d {
    tape: SignTape,
    weight: Var,
    bias: Option<Tensor>,
    config: Conv2dConfig,
}

/// Examples whose weight gradients exist at a time on a device.
const AT_A_TIME: usize = 16;

impl SignTape {
    /// A tape that is off.
    pub fn new() -> Self {
        Self::default()
    }

    /// A linear layer with weight `[out, in]` and bias `[out]`.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn linear(&self, weight: &Var, bias: Option<&Tensor>) -> Result<SignLinear> {
        if weight.rank() != 2 {
            return Err(Error::shape("weight", weight.dims(), "[out, in]"));
        }
        self.lock().weights.push(weight.clone());
        Ok(SignLinear {
            tape: self.clone(),
            weight: weight.clone(),
            bias: bias.cloned(),
        })
    }

    /// A convolution with weight `[out, in, k, k]` and bias `[out]`.
    ///
    /// # Errors
    /// [`Error::Shape`]; [`Error::InvalidArgument`] for groups.
    pub fn conv2d(
        &self,
        weight: &Var,
        bias: Option<&Tensor>,
        config: Conv2dConfig,
    ) -> Result<SignConv2d> {
        if weight.rank() != 4 {
            return Err(Error::shape("weight", weight.dims(), "[out, in, k, k]"));
        }
        if config.groups != 1 {
            let expected = "1 (use Method::PerExample for grouped convolutions)";
            return Err(Error::argument("groups", config.groups, expected));
        }
        self.lock().weights.push(weight.clone());
        Ok(SignConv2d {
            tape: self.clone(),
            weight: weight.clone(),
            bias: bias.cloned(),
            config,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Records> {
        // Whoever panicked has at most not added a call.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a layer of this tape has the weight.
    pub(super) fn covers(&self, var: &Var) -> bool {
        self.lock().weights.iter().any(|w| w.id() == var.id())
    }

    pub(super) fn start(&self) {
        let mut records = self.lock();
        (records.on, records.calls) = (true, Vec::new());
    }

    pub(super) fn stop(&self) {
        let mut records = self.lock();
        (records.on, records.calls) = (false, Vec::new());
    }

    /// Notes a call whose output no kernel has noted.
    fn probe(
        &self,
        weight: &Var,
        kind: Kind,
        input: &Tensor,
        output: Tensor,
    ) -> candle_core::Result<Tensor> {
        let mut records = self.lock();
        if !records.on {
            return Ok(output);
        }
        let probe = Var::zeros(output.shape(), output.dtype(), output.device())?;
        let probed = (output + probe.as_tensor())?;
        records.calls.push(Call {
            weight: weight.clone(),
            kind,
            input: input.detach(),
            outputs: probe.elem_count(),
            delta: Delta::Probe(probe),
        });
        Ok(probed)
    }

    /// The layer without bias, noted; `None` while the tape is off and where there is no kernel for it.
    fn frozen(
        &self,
        kind: Kind,
        x: &Tensor,
        weight: &Var,
        shape: &[usize],
    ) -> candle_core::Result<Option<Tensor>> {
        let mut records = self.lock();
        let supported = matches!(x.dtype(), DType::F32 | DType::F64);
        let same = x.dtype() == weight.dtype() && x.device().is_cpu() && weight.device().is_cpu();
        let form = form(kind, x.dims(), weight.dims());
        let usable = records.on && supported && same && weight.is_contiguous();
        let (true, Some(form)) = (usable, form) else {
            return Ok(None);
        };
        let slot = Slot::default();
        let layer = Frozen {
            form,
            shape: shape.to_vec(),
            delta: slot.clone(),
        };
        let x = x.contiguous()?;
        let output = x.apply_op2(weight.as_tensor(), layer)?;
        records.calls.push(Call {
            weight: weight.clone(),
            kind,
            input: x.detach(),
            outputs: output.elem_count(),
            delta: Delta::Slot(slot),
        });
        Ok(Some(output))
    }

    /// Multiplications of a forward pass over one example, in the recorded layers.
    pub(super) fn multiplications(&self, examples: usize) -> u64 {
        let of = |call: &Call| {
            let positions = call.outputs / call.weight.dims()[0];
            (call.weight.elem_count() * positions) as u64
        };
        let total: u64 = self.lock().calls.iter().map(of).sum();
        total / examples.max(1) as u64
    }

    /// The signs of all examples at one weight; `None` where no call of it was recorded.
    pub(super) fn signs(&self, weight: &Var, grads: &GradStore) -> Result<Option<Signs>> {
        let calls: Vec<Call> = {
            let records = self.lock();
            let of = records
                .calls
                .iter()
                .filter(|c| c.weight.id() == weight.id());
            of.cloned().collect()
        };
        let Some(first) = calls.first() else {
            return Ok(None);
        };
        let examples = first.input.dims()[0];
        let mut parts = Vec::with_capacity(calls.len());
        for call in &calls {
            let delta = match &call.delta {
                Delta::Slot(slot) => slot.lock().unwrap_or_else(PoisonError::into_inner).clone(),
                Delta::Probe(probe) => grads.get(probe).map(Tensor::detach),
            };
            // No gradient: this output does not reach the loss.
            if let Some(delta) = delta {
                parts.push((delta, call));
            }
        }
        let mut signs = Signs::zeros(weight.elem_count());
        if let [(delta, call)] = parts.as_slice() {
            if call.kind == Kind::Linear
                && delta.rank() == 2
                && finite(delta)?
                && finite(&call.input)?
            {
                outer(&mut signs, delta, &call.input)?;
                return Ok(Some(signs));
            }
        }
        let dtype = weight.dtype();
        let on_host =
            weight.device().is_cpu() && parts.iter().all(|(_, call)| call.form().is_some());
        match dtype {
            DType::F32 if on_host => return Ok(Some(on_cpu::<f32>(&parts, examples, weight)?)),
            DType::F64 if on_host => return Ok(Some(on_cpu::<f64>(&parts, examples, weight)?)),
            _ => {}
        }
        for from in (0..examples).step_by(AT_A_TIME) {
            let count_of = AT_A_TIME.min(examples - from);
            let mut sum: Option<Tensor> = None;
            for (delta, call) in &parts {
                let grad = per_example(call, delta, from, count_of)?;
                sum = Some(match sum {
                    // A weight that is used twice: the contributions add before the sign.
                    Some(sum) => (sum + grad)?,
                    None => grad,
                });
            }
            if let Some(sum) = sum {
                let rows = sum.flatten_from(1)?.to_device(&Device::Cpu)?;
                for row in rows.to_dtype(DType::F64)?.to_vec2::<f64>()? {
                    count(&mut signs, &row);
                }
            }
        }
        Ok(Some(signs))
    }
}

impl Call {
    fn form(&self) -> Option<Form> {
        form(self.kind, self.input.dims(), self.weight.dims())
    }
}

/// How a weight acts on the examples of an input; `None` where it does not fit.
fn form(kind: Kind, x: &[usize], weight: &[usize]) -> Option<Form> {
    match kind {
        Kind::Linear => {
            let (last, before) = x.get(1..)?.split_last()?;
            (weight.get(1) == Some(last)).then(|| Form::Linear {
                positions: before.iter().product(),
                inputs: *last,
            })
        }
        Kind::Conv(config) => host::window(x, weight, config).map(Form::Conv),
    }
}

/// Signs at a weight from its calls, by the kernels of the CPU.
fn on_cpu<T: WithDType + Lanes + Default>(
    parts: &[(Tensor, &Call)],
    examples: usize,
    weight: &Var,
) -> Result<Signs> {
    let mut tensors = Vec::with_capacity(parts.len());
    for (delta, call) in parts {
        tensors.push((delta.contiguous()?, call.input.contiguous()?, call.form()));
    }
    let held: Vec<_> = tensors
        .iter()
        .map(|(delta, input, form)| (delta.storage_and_layout(), input.storage_and_layout(), form))
        .collect();
    let mut calls = Vec::with_capacity(held.len());
    for ((delta, delta_layout), (input, input_layout), form) in &held {
        if let Some(form) = form {
            calls.push(host::Part {
                delta: contents::<T>(delta, delta_layout)?,
                input: contents::<T>(input, input_layout)?,
                form: *form,
            });
        }
    }
    let rows = weight.dims().first().copied().unwrap_or(0);
    Ok(host::signs(&calls, examples, rows, weight.elem_count()))
}

impl Module for SignLinear {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let mut shape = x.dims().to_vec();
        if let Some(last) = shape.last_mut() {
            *last = self.weight.dims()[0];
        }
        let recorded = self.tape.frozen(Kind::Linear, x, &self.weight, &shape)?;
        let out = match (recorded, x.rank()) {
            (Some(out), _) => out,
            (None, 2) => {
                let out = x.matmul(&self.weight.t()?)?;
                self.tape.probe(&self.weight, Kind::Linear, x, out)?
            }
            (None, rank) => {
                let rows = x.flatten_to(rank - 2)?;
                let out = rows.matmul(&self.weight.t()?)?.reshape(shape)?;
                self.tape.probe(&self.weight, Kind::Linear, x, out)?
            }
        };
        match &self.bias {
            Some(bias) => out.broadcast_add(bias),
            None => Ok(out),
        }
    }
}

impl Module for SignConv2d {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let Conv2dConfig {
            padding,
            stride,
            dilation,
            groups,
            ..
        } = self.config;
        let kind = Kind::Conv(self.config);
        let recorded = match host::window(x.dims(), self.weight.dims(), self.config) {
            Some(window) => {
                let [height, width] = window.out;
                let shape = [x.dims()[0], window.outputs, height, width];
                self.tape.frozen(kind, x, &self.weight, &shape)?
            }
            None => None,
        };
        let out = match recorded {
            Some(out) => out,
            None => {
                let out = x.conv2d(&self.weight, padding, stride, dilation, groups)?;
                self.tape.probe(&self.weight, kind, x, out)?
            }
        };
        match &self.bias {
            Some(bias) => out.broadcast_add(&bias.reshape((1, (), 1, 1))?),
            None => Ok(out),
        }
    }
}

fn sums(tape: &SignTape, weight: &Var, grads: &GradStore) -> Result<Vec<i32>> {
    let signs = tape.signs(weight, grads)?.ok_or_else(|| {
        Error::argument(
            "layer",
            "no recorded call",
            "a forward pass with the tape on",
        )
    })?;
    let counts = signs.positive.iter().zip(&signs.negative).zip(&signs.nan);
    Ok(counts
        .map(|((p, n), nan)| if *nan { 0 } else { p - n })
        .collect())
}

impl PerExampleSigns for SignLinear {
    fn weight(&self) -> &Var {
        &self.weight
    }

    fn sign_sums(&self, grads: &GradStore) -> Result<Vec<i32>> {
        sums(&self.tape, &self.weight, grads)
    }
}

impl PerExampleSigns for SignConv2d {
    fn weight(&self) -> &Var {
        &self.weight
    }

    fn sign_sums(&self, grads: &GradStore) -> Result<Vec<i32>> {
        sums(&self.tape, &self.weight, grads)
    }
}

fn finite(x: &Tensor) -> Result<bool> {
    // 0 x is 0 for finite x and NaN otherwise.
    let residue = x.affine(0.0, 0.0)?.abs()?.sum_all()?;
    Ok(residue.to_dtype(DType::F64)?.to_scalar::<f64>()? == 0.0)
}

/// `sum_i sign(d_i a_i^T)` by two products of sign matrices: exact, since they count.
fn outer(signs: &mut Signs, delta: &Tensor, input: &Tensor) -> Result<()> {
    let (d, a) = (delta.sign()?, input.sign()?);
    let to_host =
        |x: Tensor| -> Result<Vec<f32>> { Ok(x.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?) };
    let single = |x: &Tensor| x.to_dtype(DType::F32);
    let d_t = single(&d)?.t()?.contiguous()?;
    let sum = to_host(d_t.matmul(&single(&a)?)?)?;
    let any = to_host(d_t.abs()?.matmul(&single(&a)?.abs()?)?)?;
    for (i, (sum, any)) in sum.iter().zip(any).enumerate() {
        signs.positive[i] = ((any + sum) / 2.0) as i32;
        signs.negative[i] = ((any - sum) / 2.0) as i32;
    }
    Ok(())
}

/// Gradients of the weight for examples `from..from + count`: `[count, out, in..]`.
fn per_example(call: &Call, delta: &Tensor, from: usize, count: usize) -> Result<Tensor> {
    let (delta, input) = (
        delta.narrow(0, from, count)?.contiguous()?,
        call.input.narrow(0, from, count)?.contiguous()?,
    );
    match call.kind {
        Kind::Linear => {
            let (out, inputs) = call.weight.dims2()?;
            let delta = delta.reshape((count, (), out))?;
            let input = input.reshape((count, (), inputs))?;
            Ok(delta.transpose(1, 2)?.contiguous()?.matmul(&input)?)
        }
        Kind::Conv(config) => {
            let (out, _, kh, kw) = call.weight.dims4()?;
            let (_, _, height, width) = delta.dims4()?;
            let patches = unfold(&input, config, (kh, kw), (height, width))?;
            let delta = delta.reshape((count, out, height * width))?;
            Ok(delta.matmul(&patches)?)
        }
    }
}

/// Patches `[B, H' W', in k k]` of images `[B, in, H, W]`, in the order of a weight's entries.
fn unfold(
    x: &Tensor,
    config: Conv2dConfig,
    (kh, kw): (usize, usize),
    (height, width): (usize, usize),
) -> Result<Tensor> {
    let p = config.padding;
    let padded = x.pad_with_zeros(2, p, p)?.pad_with_zeros(3, p, p)?;
    let places = |offset: usize, count: usize| -> Result<Tensor> {
        let at: Vec<u32> = (0..count)
            .map(|i| (offset * config.dilation + i * config.stride) as u32)
            .collect();
        Ok(Tensor::new(at, x.device())?)
    };
    let mut shifted = Vec::with_capacity(kh * kw);
    for dy in 0..kh {
        let rows = padded.index_select(&places(dy, height)?, 2)?;
        for dx in 0..kw {
            shifted.push(rows.index_select(&places(dx, width)?, 3)?);
        }
    }
    // [B, in, k k, H', W'] to [B, H' W', in k k].
    let (batch, channels) = (x.dims()[0], x.dims()[1]);
    let all = Tensor::stack(&shifted, 2)?;
    let all = all.reshape((batch, channels * kh * kw, height * width))?;
    Ok(all.transpose(1, 2)?.contiguous()?)
}
