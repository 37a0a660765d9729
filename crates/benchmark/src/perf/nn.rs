//! Layers: those that are matrix products against the product's rate, the others against the copy
//! bandwidth. Each call is a forward pass, or a forward and a backward one.

use super::{Ceiling, Kernel, Session};
use anyhow::Result;
use candle_core::{DType, Device, Module, ModuleT, Tensor, Var};
use candle_nn::{Conv2dConfig, VarBuilder, VarMap};
use nn::activation::Activation;
use nn::attention::{multi_head_attention, AttentionConfig};
use nn::conv::Conv2d;
use nn::linear::Linear;
use nn::loss::{cross_entropy, Reduction};
use nn::norm::{batch_norm, group_norm, layer_norm, LayerNormConfig};
use nn::pool::max_pool2d;
use nn::softmax::softmax;
use tensor_core::random::RandomStream;

const GROUP: &str = "nn";

/// The layers.
pub(super) fn kernels(session: &mut Session<'_>) -> Result<()> {
    if !session.wants(GROUP) {
        return Ok(());
    }
    products(session)?;
    passes(session)
}

fn normal(label: &str, shape: &[usize]) -> Result<Tensor> {
    let mut stream = RandomStream::new(0).split("perf").split(label);
    Ok(stream.normal(0.0, 1.0, shape, DType::F32, &Device::Cpu)?)
}

type Layer = Box<dyn Fn(&Tensor) -> Result<Tensor> + Send + Sync>;

/// Measures `forward` with `per_element` operations or bytes for each of `elements`.
fn measure(
    session: &mut Session<'_>,
    name: String,
    ceiling: Ceiling,
    (per_element, elements): (f64, usize),
    call: impl FnMut() -> Result<()> + Send,
) -> Result<()> {
    session.measure(
        GROUP,
        Kernel {
            name,
            ceiling,
            per_element,
            elements,
            call: Box::new(call),
        },
    )
}

/// A backward pass alone: of a graph that is built once, from a gradient of ones.
fn backward(y: &Tensor) -> impl FnMut() -> Result<()> + Send + '_ {
    move || {
        std::hint::black_box(y.backward()?);
        Ok(())
    }
}

fn products(session: &mut Session<'_>) -> Result<()> {
    for (rows, inputs, outputs) in [(256, 1024, 1024), (2048, 256, 1024)] {
        let x = Var::from_tensor(&normal("x", &[rows, inputs])?)?;
        let w = Var::from_tensor(&normal("w", &[outputs, inputs])?)?;
        let layer = Linear::new(w.as_tensor().clone(), None).with_activation(Activation::Relu);
        let (work, n) = (2.0 * inputs as f64, rows * outputs);
        let name = format!("linear + ReLU {rows}x{inputs} to {outputs}");
        let y = layer.forward(&x)?;
        measure(session, name.clone(), Ceiling::Gemm, (work, n), || {
            std::hint::black_box(layer.forward(&x)?);
            Ok(())
        })?;
        let name = format!("{name}, backward");
        measure(session, name, Ceiling::Gemm, (2.0 * work, n), backward(&y))?;
    }
    for (inputs, outputs, side) in [(32, 64, 16), (64, 64, 32), (128, 128, 8)] {
        let x = Var::from_tensor(&normal("x", &[32, inputs, side, side])?)?;
        let w = Var::from_tensor(&normal("w", &[outputs, inputs, 3, 3])?)?;
        let config = Conv2dConfig {
            padding: 1,
            ..Default::default()
        };
        let layer = Conv2d::new(w.as_tensor().clone(), None, config);
        let layer = layer.with_activation(Activation::Relu);
        let (work, n) = (18.0 * inputs as f64, 32 * outputs * side * side);
        let name = format!("3x3 convolution + ReLU {inputs} to {outputs}, {side}x{side}");
        let y = layer.forward(&x)?;
        measure(session, name.clone(), Ceiling::Gemm, (work, n), || {
            std::hint::black_box(layer.forward(&x)?);
            Ok(())
        })?;
        let name = format!("{name}, backward");
        measure(session, name, Ceiling::Gemm, (2.0 * work, n), backward(&y))?;
    }
    let (batch, time, width, heads) = (16, 512, 256, 4);
    let x = Var::from_tensor(&normal("x", &[batch, time, width])?)?;
    let (work, n) = (4.0 * time as f64, batch * time * width);
    let name = format!("attention {batch}x{time}x{width}, {heads} heads");
    measure(session, name, Ceiling::Gemm, (work, n), move || {
        let config = AttentionConfig::default();
        std::hint::black_box(multi_head_attention(&x, &x, &x, heads, &config)?);
        Ok(())
    })
}

/// Layers that pass over memory, with the bytes per number that they must move: forward, and
/// forward with backward.
fn passes(session: &mut Session<'_>) -> Result<()> {
    let map = VarMap::new();
    let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu);
    let rows: &[usize] = &[16_384, 1024];
    let images: &[usize] = &[64, 64, 64, 64];
    let norm = layer_norm(1024, LayerNormConfig::default(), vb.pp("layer"))?;
    let group = group_norm(8, 64, 1e-5, vb.pp("group"))?;
    let batch = batch_norm(64, 1e-5, vb.pp("batch"))?;
    let labels = Tensor::zeros(rows[0], DType::U32, &Device::Cpu)?;
    // Input in, output out: 8. The statistics of a batch need the input once more.
    let layers: Vec<(&str, &[usize], f64, Layer)> = vec![
        ("ReLU", rows, 8.0, Box::new(|x| Ok(Activation::Relu.of(x)?))),
        ("GELU", rows, 8.0, Box::new(|x| Ok(Activation::Gelu.of(x)?))),
        ("softmax", rows, 8.0, Box::new(|x| Ok(softmax(x, 1)?))),
        (
            "softmax of short rows",
            &[500_000, 9],
            8.0,
            Box::new(|x| Ok(softmax(x, 1)?)),
        ),
        (
            "layer norm",
            rows,
            8.0,
            Box::new(move |x| Ok(norm.forward(x)?)),
        ),
        (
            "group norm",
            images,
            8.0,
            Box::new(move |x| Ok(group.forward(x)?)),
        ),
        (
            "batch norm",
            images,
            12.0,
            Box::new(move |x| Ok(batch.forward_t(x, true)?)),
        ),
        (
            "max pooling 2x2",
            images,
            6.0,
            Box::new(|x| Ok(max_pool2d(x, 2.into())?)),
        ),
        (
            "cross entropy",
            rows,
            4.0,
            Box::new(move |x| Ok(cross_entropy(x, &labels, Reduction::Mean)?)),
        ),
    ];
    for (name, shape, bytes, layer) in layers {
        let x = normal("x", shape)?;
        let work = (bytes, x.elem_count());
        measure(session, name.to_string(), Ceiling::Copy, work, || {
            std::hint::black_box(layer(&x)?);
            Ok(())
        })?;
    }
    Ok(())
}
