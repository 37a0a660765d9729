//! Second derivatives, in a process that keeps the graph of gradients.

use crate::support::{normal, CPU};
use candle_core::{DType, Module, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use nn::activation::Activation;
use nn::attention::{multi_head_attention, AttentionConfig};
use nn::linear::linear_activation;
use nn::loss::{cross_entropy, cross_entropy_with, CrossEntropyConfig, Reduction};
use nn::norm::ghost_batch::{ghost_batch_norm, GhostBatchNormConfig};
use nn::norm::power::{PowerNormConfig, PowerNormV};
use nn::norm::{GroupNorm, LayerNorm, LayerNormConfig, RmsNorm};
use nn::pool::max_pool2d;
use nn::resample::upsample_bilinear2d;
use nn::softmax::softmax;
use nn::stablemax::{stablemax, stablemax_cross_entropy, StableMaxConfig};
use std::process::Command;
use tensor_core::autograd::check_second_order;

const SWITCH: &str = "CANDLE_GRAD_DO_NOT_DETACH";

/// candle reads the switch once per thread, so the checks run in a child of their own.
#[test]
fn second_derivatives_are_exact() {
    if std::env::var(SWITCH).is_ok() {
        return check();
    }
    let this = std::env::current_exe().unwrap();
    let output = Command::new(this)
        .args(["--exact", "second_order::second_derivatives_are_exact"])
        .env(SWITCH, "1")
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success() && text.contains("1 passed"),
        "{text}"
    );
}

fn check() {
    let x = Var::from_tensor(&normal(1, &[6, 4], DType::F64)).unwrap();
    let v = normal(2, &[6, 4], DType::F64);
    let c = normal(3, &[6, 4], DType::F64);
    let weight = normal(4, &[4], DType::F64);
    let labels = Tensor::new(&[0u32, 3, 1, 2, 2, 0], &CPU).unwrap();
    let vb = || VarBuilder::from_varmap(&VarMap::new(), DType::F64, &CPU);
    let ghost = GhostBatchNormConfig {
        ghost_size: 3,
        ..Default::default()
    };
    let ghost = ghost_batch_norm(4, ghost, vb()).unwrap();
    let layer = LayerNorm::new(weight.clone(), None, LayerNormConfig::default()).unwrap();
    let rms = RmsNorm::new(weight, 1e-5).unwrap();
    let power = PowerNormConfig {
        groups: 2,
        ..Default::default()
    };
    let power = PowerNormV::new(4, power, vb()).unwrap();
    let config = StableMaxConfig::default();
    let square = normal(5, &[4, 4], DType::F64);
    let conv = nn::conv::Conv1d::new(
        normal(6, &[4, 3, 3], DType::F64),
        Some(normal(7, &[4], DType::F64)),
        candle_nn::Conv1dConfig {
            padding: 1,
            ..Default::default()
        },
    );
    let conv = conv.with_activation(Activation::Silu);
    let back =
        nn::conv::ConvTranspose1d::new(normal(8, &[4, 3, 1], DType::F64), None, Default::default());
    let group = GroupNorm::new(
        normal(9, &[2], DType::F64),
        normal(10, &[2], DType::F64),
        1,
        1e-5,
    );
    let group = group.unwrap();
    let causal = AttentionConfig {
        causal: true,
        ..Default::default()
    };
    let smoothed = CrossEntropyConfig {
        label_smoothing: 0.1,
        ..Default::default()
    };
    // Cubed, so that no second derivative is constant.
    let cube = |y: Tensor| (y.powf(3.0)? * &c)?.sum_all();
    type F<'a> = Box<dyn Fn() -> candle_core::Result<Tensor> + 'a>;
    let functions: Vec<(&str, F)> = vec![
        ("softmax", Box::new(|| cube(softmax(&x, 1)?))),
        ("stablemax", Box::new(|| cube(stablemax(&x, 1)?))),
        ("layer norm", Box::new(|| cube(layer.forward(&x)?))),
        ("RMS norm", Box::new(|| cube(rms.forward(&x)?))),
        (
            "ghost batch norm",
            Box::new(|| cube(ghost.forward_train(&x)?)),
        ),
        (
            "ghost batch norm, evaluation",
            Box::new(|| cube(ghost.forward_eval(&x)?)),
        ),
        ("PN-V", Box::new(|| cube(power.forward(&x, None)?))),
        (
            "linear",
            Box::new(|| {
                let y = linear_activation(&x, &square, None, Activation::Gelu)?;
                cube(linear_activation(&y, &square, None, Activation::Tanh)?)
            }),
        ),
        (
            "convolution",
            Box::new(|| {
                let y = Module::forward(&conv, &x.reshape((2, 3, 4))?)?;
                cube(Module::forward(&back, &y)?.reshape((6, 4))?)
            }),
        ),
        (
            "group norm",
            Box::new(|| cube(group.forward(&x.reshape((3, 2, 4))?)?.reshape((6, 4))?)),
        ),
        (
            "attention",
            Box::new(|| {
                let t = x.reshape((2, 3, 4))?;
                cube(multi_head_attention(&t, &t, &t, 2, &causal)?.reshape((6, 4))?)
            }),
        ),
        (
            "pooling and resampling",
            Box::new(|| {
                let y = max_pool2d(&x.reshape((1, 1, 6, 4))?, 2.into())?;
                cube(upsample_bilinear2d(&y, (6, 4), false)?.reshape((6, 4))?)
            }),
        ),
        (
            "smoothed cross entropy",
            Box::new(|| Ok(cross_entropy_with(&x, &labels, &smoothed)?)),
        ),
        (
            "cross entropy",
            Box::new(|| Ok(cross_entropy(&x, &labels, Reduction::Mean)?)),
        ),
        (
            "StableMax cross entropy",
            Box::new(|| {
                Ok(stablemax_cross_entropy(
                    &x,
                    &labels,
                    Reduction::Mean,
                    &config,
                )?)
            }),
        ),
    ];
    for activation in crate::dense::ALL {
        let f = || cube(activation.forward(&x)?);
        let vars = [("x".to_string(), x.clone())];
        let error = check_second_order(f, &vars, std::slice::from_ref(&v), 1e-5);
        error.unwrap_or_else(|e| panic!("{activation:?}: {e}"));
    }
    for (name, f) in functions {
        let vars = [("x".to_string(), x.clone())];
        let error = check_second_order(f, &vars, std::slice::from_ref(&v), 1e-5);
        let error = error.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(error.is_some(), "{name}: the switch had no effect");
    }
}
