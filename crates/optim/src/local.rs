//! One layer, one loss, one optimizer: training without a gradient between layers.
//!
//! A [`LocalLayer`] owns its variables and their optimizer. Its [`step`](LocalLayer::step) runs the
//! layer, takes the gradient of the layer's own loss and moves the layer's own variables; what it
//! hands on is cut from the graph, so that the memory of a step is that of one layer, whatever the
//! depth of the network.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::{linear, Linear, Module, VarBuilder, VarMap, SGD};
//! use candle_nn::Optimizer;
//! use thalweg_optim::local::LocalLayer;
//!
//! /// Raises the sum of squares of its output.
//! struct Loud { linear: Linear, sgd: SGD }
//!
//! impl LocalLayer<Tensor> for Loud {
//!     type Error = candle_core::Error;
//!     type Optimizer = SGD;
//!     fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> { self.linear.forward(x) }
//!     fn local_loss(&self, _: &Tensor, y: &Tensor) -> candle_core::Result<Tensor> {
//!         y.sqr()?.mean_all()?.neg()
//!     }
//!     fn optimizer(&mut self) -> &mut SGD { &mut self.sgd }
//! }
//!
//! let mut h = Tensor::ones((2, 3), DType::F32, &Device::Cpu)?;
//! for _ in 0..3 {
//!     let vars = VarMap::new();
//!     let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//!     let mut layer = Loud { linear: linear(3, 3, vb)?, sgd: SGD::new(vars.all_vars(), 0.1)? };
//!     let before = layer.step(&h)?;
//!     assert!(layer.step(&h)?.loss <= before.loss);
//!     h = before.output;
//! }
//! # Ok::<(), candle_core::Error>(())
//! ```

use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor};
use candle_nn::Optimizer;
use std::collections::HashSet;

/// A layer that is trained by itself on inputs of type `I`; see the [module](self) page.
pub trait LocalLayer<I: ?Sized> {
    /// What can go wrong.
    type Error: From<candle_core::Error>;
    /// What moves the layer's variables.
    type Optimizer: Optimizer;

    /// The layer's output.
    ///
    /// # Errors
    /// Those of the layer.
    fn forward(&self, input: &I) -> Result<Tensor, Self::Error>;

    /// The layer's own loss of its output, a scalar.
    ///
    /// # Errors
    /// Those of the layer.
    fn local_loss(&self, input: &I, output: &Tensor) -> Result<Tensor, Self::Error>;

    /// The optimizer of the layer's variables.
    fn optimizer(&mut self) -> &mut Self::Optimizer;

    /// Changes the gradients before the step (a clip, say); nothing by default.
    ///
    /// # Errors
    /// Those of the layer.
    fn adjust(&self, _input: &I, _grads: &mut GradStore) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Forward, loss, backward, step. The output is the one that the loss was taken of, cut from
    /// the graph.
    ///
    /// # Errors
    /// Those of the layer, of the optimizer, and of candle.
    fn step(&mut self, input: &I) -> Result<LocalStep, Self::Error> {
        let output = self.forward(input)?;
        let loss = self.local_loss(input, &output)?;
        let held_bytes = held_bytes(&loss);
        let mut grads = loss.backward()?;
        self.adjust(input, &mut grads)?;
        self.optimizer().step(&grads)?;
        let loss = loss.to_dtype(DType::F64)?.to_scalar()?;
        Ok(LocalStep {
            output: output.detach(),
            loss,
            held_bytes,
        })
    }
}

/// What one step of a [`LocalLayer`] gave.
#[derive(Debug, Clone)]
pub struct LocalStep {
    /// The output before the step, without a graph.
    pub output: Tensor,
    /// The loss before the step.
    pub loss: f64,
    /// [`held_bytes`] of the loss.
    pub held_bytes: usize,
}

/// Bytes of all intermediate results that the graph behind a tensor keeps for its backward pass.
/// Variables and constants are not counted; a view (a reshaped tensor, a transpose) counts like a
/// copy.
pub fn held_bytes(of: &Tensor) -> usize {
    let mut seen = HashSet::new();
    let held = |t: &&&Tensor| !t.is_variable();
    let nodes = of.sorted_nodes();
    let nodes = nodes.iter().filter(held).filter(|t| seen.insert(t.id()));
    nodes
        .map(|t| t.elem_count() * t.dtype().size_in_bytes())
        .sum()
}
