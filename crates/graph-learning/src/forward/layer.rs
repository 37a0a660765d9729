//! One layer with its optimizer, and what it is trained on.

use super::config::{ConvKind, ForwardGnnConfig};
use crate::conv::{GatConfig, GatConv, GcnConfig, GcnConv, SageConfig, SageConv};
use crate::graph::Graph;
use crate::sparse::Features;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Optimizer, VarBuilder};
use nn::goodness::{goodness, goodness_loss, logistic_loss};
use nn::init::SeededVars;
use nn::loss::{cross_entropy, Reduction};
use optim::local::LocalLayer;
use optim::transform::clip_grad_norm;
use optim::{AdamW, AdamWConfig, ParamGroup, WeightDecay};
use tensor_core::params::{Params, Snapshot};

/// Added to row norms, outside the root.
pub(crate) const NORM_EPS: f64 = 1e-8;

/// `x_i / (||x_i|| + 1e-8)`.
pub(crate) fn norm(x: &Tensor) -> Result<Tensor> {
    let norms = (x.sqr()?.sum_keepdim(1)?.sqrt()? + NORM_EPS)?;
    Ok(x.broadcast_div(&norms)?)
}

/// The default optimizer of a layer: Adam with an L2 penalty in the gradient.
///
/// # Errors
/// Those of the optimizer.
pub fn adam(params: Vec<(String, Var)>, lr: f64, weight_decay: f64) -> Result<AdamW> {
    let config = AdamWConfig {
        lr,
        weight_decay,
        decay: WeightDecay::Coupled,
        ..AdamWConfig::default()
    };
    Ok(AdamW::with_groups(vec![ParamGroup::named(params, config)])?)
}

#[derive(Debug, Clone)]
enum Conv {
    Gcn(GcnConv),
    Sage(SageConv),
    Gat(GatConv),
}

/// Features as a layer takes them: what does not depend on its weights is computed already.
#[derive(Debug, Clone)]
pub(crate) struct Prepared {
    graph: Graph,
    form: Form,
}

#[derive(Debug, Clone)]
enum Form {
    Plain(Features),
    /// The propagated features of a GCN layer.
    Propagated(Tensor),
    /// The means over neighbors, and the nodes' own features.
    Aggregated(Tensor, Tensor),
}

impl Conv {
    fn new(kind: ConvKind, inputs: usize, outputs: usize, vb: VarBuilder) -> Result<Self> {
        Ok(match kind {
            ConvKind::Gcn => Self::Gcn(GcnConv::new(inputs, outputs, GcnConfig::default(), vb)?),
            ConvKind::Sage => {
                Self::Sage(SageConv::new(inputs, outputs, SageConfig::default(), vb)?)
            }
            ConvKind::Gat {
                heads,
                negative_slope,
            } => {
                let config = GatConfig {
                    heads,
                    negative_slope,
                    ..GatConfig::default()
                };
                Self::Gat(GatConv::new(inputs, outputs / heads, config, vb)?)
            }
        })
    }

    /// Sparse features are cheaper multiplied by the weights first, so they are not propagated here.
    fn prepare(&self, graph: &Graph, x: &Features, cache: bool) -> Result<Prepared> {
        let form = match (self, x) {
            (Self::Gcn(conv), Features::Dense(x)) if cache => {
                Form::Propagated(conv.propagate(graph, &x.detach(), None)?)
            }
            (Self::Sage(conv), Features::Dense(x)) if cache => {
                Form::Aggregated(conv.aggregate(graph, &x.detach())?, x.detach())
            }
            _ => Form::Plain(x.clone()),
        };
        let graph = graph.clone();
        Ok(Prepared { graph, form })
    }

    fn apply(&self, input: &Prepared) -> Result<Tensor> {
        match (self, &input.form) {
            (Self::Gcn(conv), Form::Propagated(x)) => conv.transform(x),
            (Self::Sage(conv), Form::Aggregated(means, own)) => conv.transform(means, own),
            (Self::Gcn(conv), Form::Plain(x)) => conv.apply(&input.graph, x, None),
            (Self::Sage(conv), Form::Plain(x)) => conv.apply(&input.graph, x),
            (Self::Gat(conv), Form::Plain(x)) => conv.apply(&input.graph, x, None, None),
            _ => Err(Error::unsupported(
                "a prepared input",
                "for another kind of convolution",
            )),
        }
    }
}

/// `ReLU(conv(h))` with variables and an optimizer of its own.
#[derive(Debug)]
pub struct ForwardLayer<O = AdamW> {
    conv: Conv,
    params: Params,
    optimizer: O,
}

impl<O: Optimizer> ForwardLayer<O> {
    /// The layer named `layers.INDEX` of a set of variables.
    pub(crate) fn new(
        config: &ForwardGnnConfig,
        index: usize,
        inputs: usize,
        vars: &SeededVars,
        (dtype, device): (DType, &Device),
        make: &mut impl FnMut(Vec<(String, Var)>) -> Result<O>,
    ) -> Result<Self> {
        let prefix = format!("layers.{index}");
        let vb = vars.builder(dtype, device).pp(&prefix);
        let conv = Conv::new(config.conv, inputs, config.hidden, vb)?;
        let own = format!("{prefix}.");
        let named = vars.trainable().into_iter();
        let named: Vec<_> = named.filter(|(name, _)| name.starts_with(&own)).collect();
        Ok(Self {
            conv,
            optimizer: make(named.clone())?,
            params: Params::new(named)?,
        })
    }

    pub(crate) fn prepare(&self, graph: &Graph, x: &Features, cache: bool) -> Result<Prepared> {
        self.conv.prepare(graph, x, cache)
    }

    /// `ReLU(conv(input))`.
    pub(crate) fn output(&self, input: &Prepared) -> Result<Tensor> {
        Ok(self.conv.apply(input)?.relu()?)
    }

    /// The layer's variables by name.
    pub fn params(&self) -> &[(String, Var)] {
        self.params.named()
    }

    pub(crate) fn snapshot(&self) -> Result<Snapshot> {
        Ok(self.params.snapshot()?)
    }

    pub(crate) fn restore(&self, snapshot: &Snapshot) -> Result<()> {
        Ok(self.params.restore(snapshot)?)
    }
}

/// Labeled nodes of an augmented graph.
#[derive(Debug, Clone)]
pub(crate) struct Labeled {
    pub nodes: Tensor,
    pub classes: Tensor,
    pub real: usize,
    pub count: usize,
    pub temperature: f64,
}

impl Labeled {
    pub fn new(
        nodes: &[u32],
        labels: &[u32],
        (real, count): (usize, usize),
        temperature: f64,
        device: &Device,
    ) -> Result<Self> {
        let classes: Vec<u32> = nodes.iter().map(|v| labels[*v as usize]).collect();
        Ok(Self {
            nodes: Tensor::from_slice(nodes, nodes.len(), device)?,
            classes: Tensor::from_vec(classes, nodes.len(), device)?,
            real,
            count,
            temperature,
        })
    }

    /// `Z_i . Z_{N + c} / T` of some nodes, both factors with their gradient.
    pub fn logits(&self, z: &Tensor, nodes: &Tensor) -> Result<Tensor> {
        let classes = z.narrow(0, self.real, self.count)?;
        let logits = z.index_select(nodes, 0)?.matmul(&classes.t()?)?;
        Ok((logits / self.temperature)?)
    }

    /// Class probabilities `[N, C]` of all real nodes.
    pub fn probabilities(&self, z: &Tensor) -> Result<Tensor> {
        let (z, classes) = (
            z.narrow(0, 0, self.real)?,
            z.narrow(0, self.real, self.count)?,
        );
        let logits = (z.matmul(&classes.t()?)? / self.temperature)?;
        Ok(nn::softmax::softmax(&logits, 1)?)
    }

    pub fn loss(&self, z: &Tensor) -> Result<Tensor> {
        let logits = self.logits(z, &self.nodes)?;
        Ok(cross_entropy(&logits, &self.classes, Reduction::Mean)?)
    }
}

/// Single-forward: cross entropy of the similarities to virtual nodes.
pub(crate) struct SingleInput {
    pub input: Prepared,
    pub labeled: Labeled,
}

impl<O: Optimizer> LocalLayer<SingleInput> for ForwardLayer<O> {
    type Error = Error;
    type Optimizer = O;

    fn forward(&self, input: &SingleInput) -> Result<Tensor> {
        self.output(&input.input)
    }

    fn local_loss(&self, input: &SingleInput, output: &Tensor) -> Result<Tensor> {
        input.labeled.loss(output)
    }

    fn optimizer(&mut self) -> &mut O {
        &mut self.optimizer
    }
}

/// Forward-forward: the goodness of labeled nodes against wrong labels.
pub(crate) struct GoodnessInput {
    pub positive: Prepared,
    pub negatives: Vec<Prepared>,
    pub nodes: Tensor,
    pub theta: f64,
}

impl<O: Optimizer> LocalLayer<GoodnessInput> for ForwardLayer<O> {
    type Error = Error;
    type Optimizer = O;

    fn forward(&self, input: &GoodnessInput) -> Result<Tensor> {
        self.output(&input.positive)
    }

    fn local_loss(&self, input: &GoodnessInput, output: &Tensor) -> Result<Tensor> {
        let pick = |z: Tensor| -> Result<Tensor> { Ok(z.index_select(&input.nodes, 0)?) };
        let negatives = input.negatives.iter().map(|n| pick(self.output(n)?));
        let negatives: Vec<Tensor> = negatives.collect::<Result<_>>()?;
        Ok(goodness_loss(
            &pick(output.clone())?,
            &negatives,
            input.theta,
        )?)
    }

    fn optimizer(&mut self) -> &mut O {
        &mut self.optimizer
    }
}

/// Single-forward on the mean of the layer's output and the states of the layers above it.
pub(crate) struct TopLossInput {
    pub input: Prepared,
    pub labeled: Labeled,
    pub above: Vec<Tensor>,
    pub clip: f64,
}

impl TopLossInput {
    /// The mean of an output and of the states above.
    pub fn representation(output: &Tensor, above: &[Tensor]) -> Result<Tensor> {
        let mut sum = output.clone();
        for state in above {
            sum = (sum + state)?;
        }
        Ok((sum / (1 + above.len()) as f64)?)
    }
}

impl<O: Optimizer> LocalLayer<TopLossInput> for ForwardLayer<O> {
    type Error = Error;
    type Optimizer = O;

    fn forward(&self, input: &TopLossInput) -> Result<Tensor> {
        self.output(&input.input)
    }

    fn local_loss(&self, input: &TopLossInput, output: &Tensor) -> Result<Tensor> {
        let mean = TopLossInput::representation(output, &input.above)?;
        input.labeled.loss(&mean)
    }

    fn optimizer(&mut self) -> &mut O {
        &mut self.optimizer
    }

    fn adjust(&self, input: &TopLossInput, grads: &mut GradStore) -> Result<()> {
        clip_grad_norm(grads, self.params(), input.clip)?;
        Ok(())
    }
}

/// What the score of a pair of nodes is made of.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum LinkLoss {
    /// `sum_j z_uj z_vj`, the one of the published results.
    #[default]
    CrossEntropy,
    /// `sum_j (z_uj z_vj)^2 - theta`.
    Goodness {
        /// The threshold.
        theta: f64,
    },
}

impl LinkLoss {
    /// Logits `[pairs]` of node outputs.
    pub(crate) fn logits(self, z: &Tensor, u: &Tensor, v: &Tensor) -> Result<Tensor> {
        let edges = (z.index_select(u, 0)? * z.index_select(v, 0)?)?;
        Ok(match self {
            Self::CrossEntropy => edges.sum(1)?,
            Self::Goodness { theta } => (goodness(&edges)? - theta)?,
        })
    }
}

/// Pairs of nodes that are edges or not.
pub(crate) struct LinkInput {
    pub input: Prepared,
    pub ends: [Tensor; 2],
    pub targets: Tensor,
    pub loss: LinkLoss,
}

impl<O: Optimizer> LocalLayer<LinkInput> for ForwardLayer<O> {
    type Error = Error;
    type Optimizer = O;

    fn forward(&self, input: &LinkInput) -> Result<Tensor> {
        self.output(&input.input)
    }

    fn local_loss(&self, input: &LinkInput, output: &Tensor) -> Result<Tensor> {
        let [u, v] = &input.ends;
        let logits = input.loss.logits(output, u, v)?;
        Ok(logistic_loss(&logits, &input.targets)?)
    }

    fn optimizer(&mut self) -> &mut O {
        &mut self.optimizer
    }
}
