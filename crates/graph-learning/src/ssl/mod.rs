//! Self-supervised pre-training on a graph: one trait, ten published methods behind it.
//!
//! The methods that *GraphFM: A Comprehensive Benchmark for Graph Foundation Model* (Xu et al., arXiv
//! 2406.08310) compares, and DGI.
//!
//! | type | method | kind |
//! | --- | --- | --- |
//! | [`Bgrl`] | BGRL (Thakoor et al., ICLR 2022) | bootstrap: a moving target |
//! | [`Siamese`] with [`SiameseLoss::Cca`] | CCA-SSG (Zhang et al., NeurIPS 2021) | decorrelation |
//! | [`Siamese`] with [`SiameseLoss::BarlowTwins`] | Graph Barlow Twins (Bielak et al., 2022) | decorrelation |
//! | [`Contrastive`] | GRACE (2020); GCA (WWW 2021) with [`ViewConfig::adaptive`] | contrast between nodes |
//! | [`GraphEcl`] | GraphECL (Xiao et al., 2024) | contrast with a graph-free encoder |
//! | [`Dgi`] | Deep Graph Infomax (Velickovic et al., ICLR 2019) | contrast with a summary |
//! | [`GraphMae`] | GraphMAE (KDD 2022); GraphMAE2 (WWW 2023) with [`GraphMaeConfig::second`] | hidden features |
//! | [`S2Gae`] | S2GAE (WSDM 2023) | hidden edges |
//!
//! A method gives a loss for a view of the graph (the graph itself, a sampled neighborhood, a cluster)
//! and embeddings of all nodes afterwards; whoever trains it owns the optimizer and calls
//! [`SslMethod::after_step`]. The losses themselves are functions of embeddings in [`losses`].
//!
//! To go on after a stop, make the method again, put the values of all its variables back (those of
//! [`SeededVars::varmap`](crate::SeededVars::varmap): targets and the statistics of norms are among them),
//! and count the steps on.
//!
//! ```
//! use candle_core::{DType, Device};
//! use candle_nn::{Optimizer, SGD};
//! use thalweg_graph_learning::generate::{citation_network, CitationConfig};
//! use thalweg_graph_learning::ssl::{EncoderConfig, GraphView, Siamese, SiameseLoss, SslMethod, ViewConfig};
//! use thalweg_graph_learning::{RandomStream, SeededVars};
//!
//! let rng = &mut RandomStream::new(0);
//! let small = CitationConfig { nodes: 140, words: 70, ..Default::default() };
//! let data = citation_network(small, rng)?;
//! let vars = SeededVars::new(rng);
//! let encoder = EncoderConfig { widths: vec![16, 16], ..Default::default() };
//! let loss = SiameseLoss::Cca { lambda: 1e-3 };
//! let views = ViewConfig::both(0.2, 0.2);
//! let mut method = Siamese::new(70, &encoder, views, loss, &vars, (DType::F32, &Device::Cpu))?;
//! let mut sgd = SGD::new(method.params().iter().map(|(_, v)| v.clone()).collect(), 0.01)?;
//! let mut losses = vec![];
//! for step in 0..20 {
//!     let view = GraphView { graph: &data.graph, x: &data.x };
//!     let loss = method.loss(&view, rng)?;
//!     losses.push(loss.to_scalar::<f32>()?);
//!     sgd.backward_step(&loss)?;
//!     method.after_step(step)?;
//! }
//! assert!(losses.iter().all(|loss| loss.is_finite()));
//! assert_eq!(method.embed(&data.graph, &data.x, None)?.dims(), &[140, 16]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod encoder;
pub mod losses;
mod masked;
mod others;
mod two_views;

pub use encoder::{Encoder, EncoderAct, EncoderConfig, EncoderConv};
pub use masked::{GraphMae, GraphMaeConfig, LatentConfig, Remask, S2Gae, S2GaeConfig};
pub use others::{Dgi, GraphEcl, GraphEclConfig};
pub use two_views::{Bgrl, BgrlConfig, Contrastive, Siamese, SiameseLoss, ViewConfig};

use crate::graph::Graph;
use crate::sparse::Features;
use crate::{RandomStream, Result};
use candle_core::{Tensor, Var};

/// What a step is taken on: all of a graph or a part of it.
#[derive(Debug, Clone, Copy)]
pub struct GraphView<'a> {
    /// The graph.
    pub graph: &'a Graph,
    /// Features of its nodes.
    pub x: &'a Features,
}

/// How links are predicted from a method's embeddings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkScorer {
    /// By a perceptron on products of embeddings, trained for the purpose.
    Mlp,
    /// By the dot product, without training.
    Dot,
    /// By the method's own decoder ([`SslMethod::score_links`]).
    CrossLayer,
}

/// A self-supervised method; see the [module](self) page.
pub trait SslMethod {
    /// What an optimizer should move.
    fn params(&self) -> &[(String, Var)];

    /// The loss of one step, a scalar.
    ///
    /// # Errors
    /// Views that do not fit or are too small.
    fn loss(&mut self, view: &GraphView<'_>, rng: &mut RandomStream) -> Result<Tensor>;

    /// To be called after the optimizer's step number `step`, from 0: targets move.
    ///
    /// # Errors
    /// Those of candle.
    fn after_step(&mut self, _step: usize) -> Result<()> {
        Ok(())
    }

    /// Embeddings `[n, h]` of all nodes, without a graph behind them: of all at once, or layer by layer
    /// and `batch` nodes at a time, each with all its neighbors ([`Encoder::embed`]).
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit;
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a batch of 0.
    fn embed(&self, graph: &Graph, x: &Features, batch: Option<usize>) -> Result<Tensor>;

    /// How links are predicted.
    fn link_scorer(&self) -> LinkScorer {
        LinkScorer::Mlp
    }

    /// The method's own scores `[pairs]`, where it has a decoder for links.
    ///
    /// # Errors
    /// Shapes and dtypes that do not fit.
    fn score_links(
        &self,
        _graph: &Graph,
        _x: &Features,
        _pairs: &[(u32, u32)],
    ) -> Result<Option<Tensor>> {
        Ok(None)
    }

    /// Prefixes of variables whose gradients are clipped to norm 1 as published, each group apart.
    fn clip_groups(&self) -> &[&'static str] {
        &[]
    }
}
