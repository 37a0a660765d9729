//! Scores and the loss.

use super::bounds::AdjacencyBounds;
use super::relax::{bias, slope, ActivationIntervals, Relaxation};
use crate::contrastive::GcnEncoder;
use crate::conv::normalize_rows;
use crate::graph::Graph;
use crate::sparse::{spmm, Features, Reduce};
use crate::{Error, RandomStream, Result};
use candle_core::{Device, Tensor};

/// Which score is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PotScore {
    /// As published: a regularizer, not a bound.
    #[default]
    Published,
    /// Each neighbor relaxed with its own interval and the target's sign: a lower bound with
    /// [`Intervals::Sound`].
    Certified,
}

/// How the second layer's intervals are found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Intervals {
    /// From the first layer's outputs on the whole graph, as published.
    #[default]
    Published,
    /// From the first layer's intervals.
    Sound,
}

/// Settings of [`Pot`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PotConfig {
    /// Weight of the term beside the contrastive loss, in `[0, 1]`.
    pub kappa: f64,
    /// Which score.
    pub score: PotScore,
    /// Which intervals.
    pub intervals: Intervals,
    /// Random nodes a step ([`Pot::draw`]); `None` takes all. Neighbors outside the batch are left out
    /// of the adjacency, so a small batch says little.
    pub batch: Option<usize>,
    /// Hold the direction `w` fixed: no gradient flows through the other view.
    pub detach_anchor: bool,
}

impl Default for PotConfig {
    fn default() -> Self {
        Self {
            kappa: 0.4,
            score: PotScore::Published,
            intervals: Intervals::Published,
            batch: None,
            detach_anchor: false,
        }
    }
}

impl PotConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.kappa) {
            return Err(Error::config(
                "PotConfig::kappa",
                self.kappa,
                "a number in [0, 1]",
            ));
        }
        match self.batch {
            Some(n) if n < 2 => Err(Error::config("PotConfig::batch", n, "at least 2, or None")),
            _ => Ok(()),
        }
    }
}

/// What a score is computed from.
#[derive(Debug, Clone, Copy)]
pub struct PotInputs<'a> {
    /// Features of all nodes.
    pub x: &'a Features,
    /// The whole graph, undirected.
    pub graph: &'a Graph,
    /// The view whose nodes are scored.
    pub view: &'a Graph,
    /// The encoder's output for the other view, all nodes.
    pub other: &'a Tensor,
    /// Bounds of the whole graph.
    pub bounds: &'a AdjacencyBounds,
    /// The nodes to score, in this order; `None` takes all.
    pub nodes: Option<&'a [u32]>,
}

/// The published score and what it is made of.
#[derive(Debug, Clone)]
pub struct PublishedTerms {
    /// `W~2`, `[N, 2 h]`.
    pub wt2: Tensor,
    /// `b~2`, `[N]`.
    pub bt2: Tensor,
    /// `k1 W~2`, `[N, 2 h]`: times `W1^T` it is `W~1`, which is never needed.
    pub lambda1: Tensor,
    /// `b~1`, `[N]`.
    pub bt1: Tensor,
    /// The score, `[N]`.
    pub score: Tensor,
}

/// `w_i = z'_i - mean_{k != i} z'_k` of embeddings `[n, h]`, normalized, between `nodes`.
///
/// # Errors
/// [`Error::InvalidArgument`] for fewer than two nodes.
pub fn anchor_direction(z: &Tensor, nodes: Option<&Tensor>) -> Result<Tensor> {
    let unit = normalize_rows(z)?;
    let unit = match nodes {
        Some(nodes) => unit.index_select(nodes, 0)?,
        None => unit,
    };
    let n = unit.dims()[0] as f64;
    if n < 2.0 {
        return Err(Error::argument(
            "nodes",
            n,
            "at least 2: one needs others to differ from",
        ));
    }
    let sum = unit.sum_keepdim(0)?;
    Ok((unit * (n / (n - 1.0)))?.broadcast_sub(&(sum / (n - 1.0))?)?)
}

/// `(1 - kappa) nce + kappa (pot1 + pot2) / 2`
///
/// # Errors
/// Those of candle.
pub fn combined(nce: &Tensor, pot1: &Tensor, pot2: &Tensor, kappa: f64) -> Result<Tensor> {
    let pot = ((pot1 + pot2)? * (kappa / 2.0))?;
    Ok(((nce * (1.0 - kappa))? + pot)?)
}

/// The score and the loss; see the [module](super) page.
#[derive(Debug, Clone, Copy)]
pub struct Pot {
    config: PotConfig,
}

impl Pot {
    /// With these settings.
    ///
    /// # Errors
    /// Those of [`PotConfig::validate`].
    pub fn new(config: PotConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config })
    }

    /// The settings.
    pub fn config(&self) -> PotConfig {
        self.config
    }

    /// The nodes of one step, where `batch` asks for some.
    ///
    /// # Errors
    /// Those of the stream, which cannot occur here.
    pub fn draw(&self, n: usize, rng: &mut RandomStream) -> Result<Option<Vec<u32>>> {
        match self.config.batch {
            Some(count) if count < n => {
                let mut order = rng.permutation(n)?;
                order.truncate(count);
                Ok(Some(order))
            }
            _ => Ok(None),
        }
    }

    /// The score of each node, `[N]`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for fewer than two nodes or a slope outside `[0, 1]`; shapes and
    /// dtypes that do not fit.
    pub fn score(&self, encoder: &GcnEncoder, inputs: &PotInputs) -> Result<Tensor> {
        let scope = Scope::new(inputs)?;
        let direction = self.direction(inputs, &scope)?;
        match self.config.score {
            PotScore::Published => Ok(self
                .published_with(encoder, inputs, &scope, &direction)?
                .score),
            PotScore::Certified => self.certified(encoder, inputs, &scope, &direction),
        }
    }

    /// `mean softplus(-score)`
    ///
    /// # Errors
    /// As [`score`](Self::score).
    pub fn loss(&self, encoder: &GcnEncoder, inputs: &PotInputs) -> Result<Tensor> {
        let score = self.score(encoder, inputs)?;
        // ln(1 + e^-s) = max(-s, 0) + ln(1 + e^-|s|), which does not overflow.
        let tail = (score.abs()?.neg()?.exp()? + 1.0)?.log()?;
        Ok((score.neg()?.relu()? + tail)?.mean_all()?)
    }

    /// The published score with its terms.
    ///
    /// # Errors
    /// As [`score`](Self::score).
    pub fn published(&self, encoder: &GcnEncoder, inputs: &PotInputs) -> Result<PublishedTerms> {
        let scope = Scope::new(inputs)?;
        let direction = self.direction(inputs, &scope)?;
        self.published_with(encoder, inputs, &scope, &direction)
    }

    fn direction(&self, inputs: &PotInputs, scope: &Scope) -> Result<Tensor> {
        let w = anchor_direction(inputs.other, scope.index.as_ref())?;
        Ok(if self.config.detach_anchor {
            w.detach()
        } else {
            w
        })
    }

    fn published_with(
        &self,
        encoder: &GcnEncoder,
        inputs: &PotInputs,
        scope: &Scope,
        direction: &Tensor,
    ) -> Result<PublishedTerms> {
        let a = slope(encoder)?;
        let (x, index) = (inputs.x, scope.index.as_ref());
        let kind = self.config.intervals;
        let intervals =
            ActivationIntervals::new(encoder, x, inputs.graph, &scope.bounds, index, kind)?;
        let [one, two] = encoder.layers();
        let relax = |ends: &(Tensor, Tensor)| Relaxation::new(&ends.0, &ends.1, a);
        let (lambda2, offset2) = relax(&intervals.second)?.below(direction)?;
        let wt2 = lambda2.matmul(two.weight())?;
        let bt2 = (lambda2 * offset2.broadcast_add(&bias(two)?)?)?.sum(1)?;
        let (lambda1, offset1) = relax(&intervals.first)?.below(&wt2)?;
        let bt1 = (&lambda1 * offset1.broadcast_add(&bias(one)?)?)?.sum(1)?;
        // <x, W~1> without W~1, which has a column per feature.
        let projected = scope.pick(&x.linear(one.weight())?)?;
        let own = (&lambda1 * projected)?.sum(1)?;
        let (graph, weights) = scope.view(inputs.view, own.dtype(), own.device())?;
        // Published: rows are sources, so messages travel against the edges.
        let travel = |y: &Tensor| spmm(graph.reversed(), Some(&weights), y, Reduce::Sum);
        let score = (travel(&(travel(&own)? + &bt1)?)? + &bt2)?;
        Ok(PublishedTerms {
            wt2,
            bt2,
            lambda1,
            bt1,
            score,
        })
    }

    /// Each neighbor with its own lines and the target's sign:
    /// `s_i = sum_j A_ij sum_c W~2_ic k_jc (P_jc + beta_jc [W~2_ic < 0]) + b~2_i`.
    fn certified(
        &self,
        encoder: &GcnEncoder,
        inputs: &PotInputs,
        scope: &Scope,
        direction: &Tensor,
    ) -> Result<Tensor> {
        let a = slope(encoder)?;
        let (x, index) = (inputs.x, scope.index.as_ref());
        let kind = self.config.intervals;
        let intervals =
            ActivationIntervals::new(encoder, x, inputs.graph, &scope.bounds, index, kind)?;
        let [one, two] = encoder.layers();
        let second = Relaxation::new(&intervals.second.0, &intervals.second.1, a)?;
        let (lambda2, offset2) = second.below(direction)?;
        let wt2 = lambda2.matmul(two.weight())?;
        let bt2 = (lambda2 * offset2.broadcast_add(&bias(two)?)?)?.sum(1)?;
        let first = Relaxation::new(&intervals.first.0, &intervals.first.1, a)?;
        let hidden = one.propagate(inputs.view, &x.linear(one.weight())?, None)?;
        let hidden = scope.pick(&hidden.broadcast_add(&bias(one)?)?)?;
        let lower = (&first.slope * &hidden)?;
        let upper = (&first.slope * (hidden + &first.upper)?)?;
        let (graph, weights) = scope.view(inputs.view, lower.dtype(), lower.device())?;
        let travel = |y: &Tensor| spmm(&graph, Some(&weights), y, Reduce::Sum);
        let positive = wt2.relu()?;
        let negative = wt2.neg()?.relu()?;
        let sum = ((positive * travel(&lower)?)? - (negative * travel(&upper)?)?)?.sum(1)?;
        Ok((sum + bt2)?)
    }
}

/// The nodes that are scored.
struct Scope {
    nodes: Option<Vec<u32>>,
    index: Option<Tensor>,
    bounds: AdjacencyBounds,
}

impl Scope {
    fn new(inputs: &PotInputs) -> Result<Self> {
        let n = inputs.graph.num_nodes();
        let fits = inputs.view.num_nodes() == n && inputs.bounds.num_nodes() == n;
        if !fits || inputs.other.dims().first() != Some(&n) {
            let value = format!(
                "{} nodes in the view, {} in the bounds, {:?} embeddings",
                inputs.view.num_nodes(),
                inputs.bounds.num_nodes(),
                inputs.other.dims()
            );
            return Err(Error::argument(
                "inputs",
                value,
                format!("all of {n} nodes"),
            ));
        }
        let device = inputs.other.device();
        Ok(match inputs.nodes {
            None => Self {
                nodes: None,
                index: None,
                bounds: inputs.bounds.clone(),
            },
            Some(nodes) => Self {
                nodes: Some(nodes.to_vec()),
                index: Some(Tensor::from_slice(nodes, nodes.len(), device)?),
                bounds: inputs.bounds.restrict(nodes)?,
            },
        })
    }

    fn pick(&self, y: &Tensor) -> Result<Tensor> {
        match &self.index {
            Some(index) => Ok(y.index_select(index, 0)?),
            None => Ok(y.clone()),
        }
    }

    /// The view's normalized adjacency between the nodes.
    fn view(
        &self,
        view: &Graph,
        dtype: candle_core::DType,
        device: &Device,
    ) -> Result<(Graph, Tensor)> {
        let looped = view.with_loops()?;
        let scale = looped.inverse_sqrt_in_degrees();
        let (graph, ids) = match &self.nodes {
            Some(nodes) => looped.induced_subgraph(nodes)?,
            None => (looped.clone(), (0..looped.num_edges() as u32).collect()),
        };
        let weight = |e: &u32| {
            let (s, t) = (looped.src()[*e as usize], looped.dst()[*e as usize]);
            scale[s as usize] * scale[t as usize]
        };
        let weights: Vec<f64> = ids.iter().map(weight).collect();
        let weights = Tensor::from_vec(weights, ids.len(), &Device::Cpu)?;
        Ok((graph, weights.to_dtype(dtype)?.to_device(device)?))
    }
}
