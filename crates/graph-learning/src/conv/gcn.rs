//! The graph convolution of Kipf and Welling.

use super::{add_bias, glorot, linear, weight, GraphModule, ZEROS};
use crate::graph::Graph;
use crate::sparse::{gcn_norm, spmm, symmetric, Features, Norm, Reduce};
use crate::{RandomStream, Result};
use candle_core::{Device, Tensor};
use candle_nn::VarBuilder;
use std::sync::{Arc, Mutex, PoisonError};

/// Settings of [`GcnConv`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GcnConfig {
    /// Keep the normalized weights of the last graph and edge weights, by identity. Edge weights that
    /// are trained, or changed in place, must not be kept. Without edge weights the normalization is
    /// always kept, with the graph.
    pub cached: bool,
    /// Add a trained bias.
    pub bias: bool,
    /// Added self-loops weigh 2 instead of 1.
    pub improved: bool,
    /// Add the self-loops that are missing.
    pub add_self_loops: bool,
    /// Normalize symmetrically; otherwise weights are taken as they are and no self-loop is added.
    pub normalize: bool,
}

impl Default for GcnConfig {
    fn default() -> Self {
        Self {
            cached: false,
            bias: true,
            improved: false,
            add_self_loops: true,
            normalize: true,
        }
    }
}

/// `A W x + b` with `A = D^(-1/2) (adjacency + I) D^(-1/2)`, degrees by incoming weights.
///
/// Parameters `lin.weight` `[out, in]` and `bias` `[out]`.
#[derive(Debug, Clone)]
pub struct GcnConv {
    weight: Tensor,
    bias: Option<Tensor>,
    config: GcnConfig,
    kept: Arc<Mutex<Option<Kept>>>,
}

/// A normalization and what it is of.
#[derive(Debug)]
struct Kept {
    graph: Graph,
    weights: Tensor,
    normalized: (Graph, Tensor),
}

impl GcnConv {
    /// A layer from `inputs` to `outputs` features; weights are Glorot uniform, the bias 0.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a width of 0, and those of the
    /// builder.
    pub fn new(inputs: usize, outputs: usize, config: GcnConfig, vb: VarBuilder) -> Result<Self> {
        let init = glorot(inputs, outputs);
        let bias = match config.bias {
            true => Some(vb.get_with_hints(outputs, "bias", ZEROS)?),
            false => None,
        };
        Ok(Self {
            weight: weight(&vb, "lin.weight", (inputs, outputs), init)?,
            bias,
            config,
            kept: Arc::default(),
        })
    }

    /// The output `[targets, out]` for features `[sources, in]`.
    ///
    /// # Errors
    /// Those of [`apply`](Self::apply).
    pub fn forward(&self, graph: &Graph, x: &Tensor) -> Result<Tensor> {
        self.apply(graph, &Features::Dense(x.clone()), None)
    }

    /// The output for dense or sparse features and optional edge weights `[E]`.
    ///
    /// The features are multiplied by the weights first where that makes them narrower, after the
    /// propagation otherwise.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a normalization on a graph between two
    /// sets of nodes (degrees are not known there: normalize the whole graph, and set `normalize` to
    /// false), shapes and dtypes that do not fit.
    pub fn apply(
        &self,
        graph: &Graph,
        x: &Features,
        edge_weights: Option<&Tensor>,
    ) -> Result<Tensor> {
        let (outputs, inputs) = self.weight.dims2()?;
        let y = match x {
            Features::Dense(x) if outputs >= inputs => {
                return self.transform(&self.propagate(graph, x, edge_weights)?);
            }
            x => self.propagate(graph, &x.linear(&self.weight)?, edge_weights)?,
        };
        add_bias(y, self.bias.as_ref())
    }

    /// `A x` with this layer's normalization: constant while the features are, so that a loop over
    /// one layer computes it once and goes on with [`transform`](Self::transform).
    ///
    /// # Errors
    /// As [`apply`](Self::apply).
    pub fn propagate(
        &self,
        graph: &Graph,
        x: &Tensor,
        edge_weights: Option<&Tensor>,
    ) -> Result<Tensor> {
        let config = self.config;
        if !config.normalize {
            return spmm(graph, edge_weights, x, Reduce::Sum);
        }
        graph.require_square("a normalized graph convolution")?;
        match edge_weights {
            None if !config.improved => match config.add_self_loops {
                true => symmetric(graph.with_loops()?, x),
                false => symmetric(graph, x),
            },
            None => {
                let ones = Tensor::ones(graph.num_edges(), x.dtype(), x.device())?;
                let (graph, weights) = self.normalized(graph, &ones)?;
                spmm(&graph, Some(&weights), x, Reduce::Sum)
            }
            Some(weights) => {
                let (graph, weights) = self.normalized(graph, weights)?;
                spmm(&graph, Some(&weights), x, Reduce::Sum)
            }
        }
    }

    /// The output of the targets of a block of `looped`, the graph with its self-loops; `nodes` are the
    /// block's sources in it, of which the targets come first. The degrees are those of the whole graph.
    pub(crate) fn apply_block(
        &self,
        looped: &Graph,
        block: &Graph,
        nodes: &[u32],
        x: &Features,
    ) -> Result<Tensor> {
        let scale = looped.inverse_sqrt_in_degrees();
        let of = |v: u32| scale[nodes[v as usize] as usize];
        let weights: Vec<f64> = block.edges().map(|(s, t)| of(s) * of(t)).collect();
        let sent = x.linear(&self.weight)?;
        let weights = Tensor::from_vec(weights, block.num_edges(), &Device::Cpu)?;
        let weights = weights.to_dtype(sent.dtype())?.to_device(sent.device())?;
        let y = spmm(block, Some(&weights), &sent, Reduce::Sum)?;
        add_bias(y, self.bias.as_ref())
    }

    /// `x W^T + b` for features that have been propagated already.
    ///
    /// # Errors
    /// Those of candle.
    pub fn transform(&self, propagated: &Tensor) -> Result<Tensor> {
        linear(propagated, &self.weight, self.bias.as_ref())
    }

    fn normalized(&self, graph: &Graph, weights: &Tensor) -> Result<(Graph, Tensor)> {
        let compute = || -> Result<(Graph, Tensor)> {
            if self.config.add_self_loops {
                return gcn_norm(graph, Some(weights), Norm::Sym, self.config.improved);
            }
            crate::sparse::scale_by_degrees(graph, weights, Norm::Sym)
        };
        if !self.config.cached {
            return compute();
        }
        // The value is replaced whole: a panic elsewhere leaves a whole one.
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(k) = &*kept {
            if k.graph.is_same(graph) && k.weights.id() == weights.id() {
                return Ok(k.normalized.clone());
            }
        }
        let (looped, normal) = compute()?;
        let normalized = (looped, normal.detach());
        *kept = Some(Kept {
            graph: graph.clone(),
            weights: weights.clone(),
            normalized: normalized.clone(),
        });
        Ok(normalized)
    }

    /// `lin.weight` `[out, in]`.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `bias` `[out]`.
    pub fn bias(&self) -> Option<&Tensor> {
        self.bias.as_ref()
    }
}

impl GraphModule for GcnConv {
    fn forward_t(&self, graph: &Graph, x: &Tensor, _: Option<&mut RandomStream>) -> Result<Tensor> {
        self.forward(graph, x)
    }
}
