//! Forward and backward of one layer, from the gradient of its output, and of a loss.

use super::{Case, Peer, Session};
use anyhow::Result;
use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Shape, Tensor, Var};
use candle_nn::{ModuleT, VarBuilder, VarMap};
use nn::norm::ghost_batch::{ghost_batch_norm, GhostBatchNormConfig};
use nn::norm::power::{PowerNorm, PowerNormConfig};
use nn::stablemax::{stablemax_cross_entropy, StableMaxConfig};
use serde_json::json;
use tensor_core::random::RandomStream;

const GROUP: &str = "nn";

pub(super) fn cases(session: &mut Session<'_>) -> Result<()> {
    for (shape, peer) in [
        (&[4096, 512][..], "BatchNorm1d"),
        (&[256, 64, 32, 32], "BatchNorm2d"),
    ] {
        if session.wants(GROUP, "large-batch") {
            let config = GhostBatchNormConfig::default();
            let layer = ghost_batch_norm(shape[1], config, builder(&VarMap::new()))?;
            layer_case(
                session,
                "large-batch",
                "GhostBatchNorm",
                shape,
                peer,
                move |x| Ok(layer.forward_t(x, true)?),
            )?;
        }
    }
    for shape in [&[4096, 512][..], &[16_384, 1024]] {
        for peer in ["LayerNorm", "RMSNorm", "BatchNorm1d"] {
            if session.wants(GROUP, "power-norm") {
                let config = PowerNormConfig::default();
                let layer = PowerNorm::new(shape[1], config, builder(&VarMap::new()))?;
                layer_case(session, "power-norm", "PowerNorm", shape, peer, move |x| {
                    Ok(layer.forward_t(x, None, true)?)
                })?;
            }
        }
    }
    if session.wants(GROUP, "perp-grad") {
        stablemax_case(session)?;
    }
    Ok(())
}

fn builder(vars: &VarMap) -> VarBuilder<'static> {
    VarBuilder::from_varmap(vars, DType::F32, &Device::Cpu)
}

fn layer_case(
    session: &mut Session<'_>,
    slug: &'static str,
    ours: &'static str,
    shape: &[usize],
    peer: &'static str,
    forward: impl Fn(&Tensor) -> Result<Tensor> + Send,
) -> Result<()> {
    let mut stream = RandomStream::new(0).split("peers");
    let mut draw = || stream.normal(0.0, 1.0, shape, DType::F32, &Device::Cpu);
    let (x, c) = (Var::from_tensor(&draw()?)?, draw()?);
    session.measure(Case {
        slug,
        operation: format!("forward and backward {shape:?}"),
        ours,
        call: Box::new(move || {
            forward(&x)?.apply_op1(Cotangent(c.clone()))?.backward()?;
            Ok(())
        }),
        peer: Peer::Python(peer, json!({ "shape": shape })),
    })
}

/// A loss whose gradient with respect to its argument is given, and whose value nobody reads.
struct Cotangent(Tensor);

impl CustomOp1 for Cotangent {
    fn name(&self) -> &'static str {
        "cotangent"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok((CpuStorage::F32(vec![0.0]), Shape::from(())))
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, _: &Tensor) -> candle_core::Result<Option<Tensor>> {
        Ok(Some(self.0.clone()))
    }
}

fn stablemax_case(session: &mut Session<'_>) -> Result<()> {
    let shape = [1024, 50_257];
    let mut stream = RandomStream::new(0).split("peers");
    let logits = stream.normal(0.0, 1.0, &shape[..], DType::F32, &Device::Cpu)?;
    let logits = Var::from_tensor(&logits)?;
    let labels: Result<Vec<u32>, _> = (0..shape[0])
        .map(|_| stream.below(shape[1]).map(|i| i as u32))
        .collect();
    let labels = Tensor::from_vec(labels?, shape[0], &Device::Cpu)?;
    session.measure(Case {
        slug: "perp-grad",
        operation: format!("loss forward and backward {shape:?}"),
        ours: "stablemax_cross_entropy",
        call: Box::new(move || {
            let config = StableMaxConfig::default();
            stablemax_cross_entropy(&logits, &labels, nn::loss::Reduction::Mean, &config)?
                .backward()?;
            Ok(())
        }),
        peer: Peer::Python("cross_entropy", json!({ "shape": shape })),
    })
}
