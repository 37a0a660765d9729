//! Does the gradient only scale the network?

use crate::gradients::Gradients;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::Var;
use tensor_core::kernels::Moments;

/// Measures naive loss minimization: how far the descent direction `-g` points along the weights,
/// where a step only makes the logits larger. For a bias-free ReLU network `-<g, w>` is the same
/// number in every layer.
#[derive(Debug, Clone, Copy)]
pub struct NlmMonitor;

/// What [`NlmMonitor::measure`] found.
#[derive(Debug, Clone, PartialEq)]
pub struct NlmReport {
    /// Cosine between `-g` and `w` over all tensors together; near 1 for pure scaling, 0 where
    /// one of them is zero.
    pub cos_global: f64,
    /// The same per tensor, by name; tensors without gradient are left out.
    pub cos_per_tensor: Vec<(String, f64)>,
    /// `sum_l -<g_l, w_l> / <w_l, w_l>`: the relative growth of the logits per unit of learning
    /// rate of plain gradient descent, if every tensor scales them (bias-free homogeneous
    /// networks).
    pub logit_scale_growth: f64,
}

impl NlmMonitor {
    /// Measures the gradients that `grads` holds for these parameters.
    ///
    /// # Errors
    /// [`Error::NonFiniteGradient`] when one of them holds NaN or infinity.
    pub fn measure(params: &[(String, Var)], grads: &GradStore) -> Result<NlmReport> {
        let gradients = Gradients::collect(params, grads);
        let all = gradients.moments()?;
        let bad = all.iter().enumerate().filter(|(_, m)| m.nonfinite > 0);
        let bad: Vec<String> = bad.map(|(i, _)| gradients.name(i).to_string()).collect();
        if !bad.is_empty() {
            return Err(Error::NonFiniteGradient(bad));
        }
        let mut total = Moments::default();
        let mut cos_per_tensor = Vec::with_capacity(all.len());
        let mut logit_scale_growth = 0.0;
        for (i, m) in all.iter().enumerate() {
            if gradients.get(i).is_none() {
                continue;
            }
            total.pp += m.pp;
            total.pg += m.pg;
            total.gg += m.gg;
            cos_per_tensor.push((gradients.name(i).to_string(), cosine(m)));
            if m.pp > 0.0 {
                logit_scale_growth -= m.pg / m.pp;
            }
        }
        Ok(NlmReport {
            cos_global: cosine(&total),
            cos_per_tensor,
            logit_scale_growth,
        })
    }
}

/// Cosine between `-g` and `w`.
fn cosine(m: &Moments) -> f64 {
    let norms = m.pp.sqrt() * m.gg.sqrt();
    if norms > 0.0 {
        -m.pg / norms
    } else {
        0.0
    }
}
