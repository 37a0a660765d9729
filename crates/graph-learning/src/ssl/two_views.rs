//! Methods that compare two views of a graph: BGRL, CCA-SSG, Graph Barlow Twins, GRACE and GCA.

use super::encoder::{Encoder, EncoderAct, EncoderConfig, PReluPerceptron};
use super::losses::{barlow_twins, bootstrap, cca, warmup_cosine, Redundancy};
use super::{GraphView, LinkScorer, SslMethod};
use crate::contrastive::{
    drop_edges, drop_edges_weighted, drop_features, drop_features_weighted, edge_weights,
    feature_weights, Centrality, ContrastiveObjective, Grace, GraceConfig,
};
use crate::graph::Graph;
use crate::sparse::Features;
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor, Var};
use nn::init::SeededVars;
use tensor_core::params::Params;

/// How the two views are made: shares of edges (each direction by itself) and of feature columns that
/// are dropped.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ViewConfig {
    /// Of edges, for each view.
    pub edges: [f64; 2],
    /// Of features, for each view.
    pub features: [f64; 2],
    /// Spare what is central (GCA); dropped with at most 0.7 then.
    pub adaptive: Option<Centrality>,
}

impl ViewConfig {
    /// The same rates for both views.
    pub fn both(edges: f64, features: f64) -> Self {
        Self {
            edges: [edges; 2],
            features: [features; 2],
            adaptive: None,
        }
    }

    fn validate(&self) -> Result<()> {
        for (field, rates) in [
            ("ViewConfig::edges", self.edges),
            ("ViewConfig::features", self.features),
        ] {
            if let Some(bad) = rates.iter().find(|p| !(0.0..1.0).contains(*p)) {
                return Err(Error::config(field, bad, "probabilities in [0, 1)"));
            }
        }
        Ok(())
    }

    /// One of the two views.
    ///
    /// # Errors
    /// Those of the drops.
    pub fn draw(
        &self,
        side: usize,
        view: &GraphView<'_>,
        rng: &mut RandomStream,
    ) -> Result<(Graph, Features)> {
        let (p, q) = (self.edges[side], self.features[side]);
        let Some(centrality) = self.adaptive else {
            let (graph, _) = drop_edges(view.graph, p, false, rng)?;
            return Ok((graph, drop_features(view.x, q, rng)?));
        };
        let weights = edge_weights(view.graph, centrality)?;
        let (graph, _) = drop_edges_weighted(view.graph, &weights, p, GCA_THRESHOLD, rng)?;
        let weights = feature_weights(view.graph, view.x, centrality)?;
        let x = drop_features_weighted(view.x, &weights, q, GCA_THRESHOLD, rng)?;
        Ok((graph, x))
    }
}

/// The largest probability with which GCA drops.
const GCA_THRESHOLD: f64 = 0.7;

/// The variables of a set below a prefix.
pub(super) fn below(vars: &SeededVars, prefixes: &[&str]) -> Vec<(String, Var)> {
    let wanted = |name: &str| prefixes.iter().any(|p| name.starts_with(p));
    let all = vars.trainable().into_iter();
    all.filter(|(name, _)| wanted(name)).collect()
}

/// The loss of a [`Siamese`] pair.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SiameseLoss {
    /// CCA-SSG's, with its weight `lambda` (0.001 as published).
    Cca {
        /// The weight of the decorrelation.
        lambda: f64,
    },
    /// Graph Barlow Twins'.
    BarlowTwins(Redundancy),
}

/// One encoder on two views, and a loss that decorrelates (CCA-SSG, Graph Barlow Twins).
#[derive(Debug)]
pub struct Siamese {
    encoder: Encoder,
    views: ViewConfig,
    loss: SiameseLoss,
    params: Vec<(String, Var)>,
}

impl Siamese {
    /// With variables `encoder.*`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], and those of the builder.
    pub fn new(
        inputs: usize,
        encoder: &EncoderConfig,
        views: ViewConfig,
        loss: SiameseLoss,
        vars: &SeededVars,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        views.validate()?;
        let vb = vars.builder(dtype, device).pp("encoder");
        Ok(Self {
            encoder: Encoder::new(inputs, encoder, vb)?,
            views,
            loss,
            params: below(vars, &["encoder."]),
        })
    }
}

impl SslMethod for Siamese {
    fn params(&self) -> &[(String, Var)] {
        &self.params
    }

    fn loss(&mut self, view: &GraphView<'_>, rng: &mut RandomStream) -> Result<Tensor> {
        let (one, x1) = self.views.draw(0, view, rng)?;
        let (two, x2) = self.views.draw(1, view, rng)?;
        let a = self.encoder.forward(&one, &x1, Some(rng))?;
        let b = self.encoder.forward(&two, &x2, Some(rng))?;
        match self.loss {
            SiameseLoss::Cca { lambda } => cca(&a, &b, lambda),
            SiameseLoss::BarlowTwins(redundancy) => barlow_twins(&a, &b, redundancy),
        }
    }

    fn embed(&self, graph: &Graph, x: &Features, batch: Option<usize>) -> Result<Tensor> {
        self.encoder.embed(graph, x, batch)
    }
}

/// GRACE, and GCA with adaptive views, as a method.
#[derive(Debug)]
pub struct Contrastive {
    encoder: Encoder,
    views: ViewConfig,
    objective: Grace,
    params: Vec<(String, Var)>,
}

impl Contrastive {
    /// With variables `encoder.*` and `projector.*`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], and those of the builder.
    pub fn new(
        inputs: usize,
        encoder: &EncoderConfig,
        views: ViewConfig,
        (proj_hidden, grace): (usize, GraceConfig),
        vars: &SeededVars,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        views.validate()?;
        encoder.validate()?;
        let vb = vars.builder(dtype, device);
        let hidden = encoder.widths[encoder.widths.len() - 1];
        Ok(Self {
            encoder: Encoder::new(inputs, encoder, vb.pp("encoder"))?,
            views,
            objective: Grace::new(hidden, proj_hidden, grace, vb.pp("projector"))?,
            params: below(vars, &["encoder.", "projector."]),
        })
    }
}

impl SslMethod for Contrastive {
    fn params(&self) -> &[(String, Var)] {
        &self.params
    }

    fn loss(&mut self, view: &GraphView<'_>, rng: &mut RandomStream) -> Result<Tensor> {
        let (one, x1) = self.views.draw(0, view, rng)?;
        let (two, x2) = self.views.draw(1, view, rng)?;
        let a = self.encoder.forward(&one, &x1, Some(rng))?;
        let b = self.encoder.forward(&two, &x2, Some(rng))?;
        self.objective.loss(&a, &b, rng)
    }

    fn embed(&self, graph: &Graph, x: &Features, batch: Option<usize>) -> Result<Tensor> {
        self.encoder.embed(graph, x, batch)
    }
}

/// Settings of [`Bgrl`].
#[derive(Debug, Clone, PartialEq)]
pub struct BgrlConfig {
    /// Both encoders.
    pub encoder: EncoderConfig,
    /// The views; edges 0.5 and 0.5, features 0.3 and 0.2 as published.
    pub views: ViewConfig,
    /// Hidden width of the predictor.
    pub predictor: usize,
    /// How far the target moves in the first step; the cosine schedule takes it to 0 at `total`.
    pub target_rate: f64,
    /// Steps in all. Beyond them the target stands still.
    pub total: usize,
}

impl Default for BgrlConfig {
    fn default() -> Self {
        let prelu = EncoderAct::PRelu;
        Self {
            encoder: EncoderConfig {
                widths: vec![512],
                act: prelu,
                last_act: prelu,
                batch_norm: true,
                ..EncoderConfig::default()
            },
            views: ViewConfig {
                edges: [0.5, 0.5],
                features: [0.3, 0.2],
                adaptive: None,
            },
            predictor: 512,
            target_rate: 0.01,
            total: 10_000,
        }
    }
}

/// BGRL: a predictor on the online encoder finds the output of a slowly moving target encoder. The
/// target's batch norm has statistics of its own batches.
#[derive(Debug)]
pub struct Bgrl {
    online: Encoder,
    target: Encoder,
    /// The target's variables, and the online ones in the same order.
    moving: Params,
    followed: Vec<Var>,
    predictor: PReluPerceptron,
    config: BgrlConfig,
    params: Vec<(String, Var)>,
}

impl Bgrl {
    /// With variables `encoder.*`, `predictor.*`, and `target.*`, which are drawn anew and never
    /// trained.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], and those of the builder.
    pub fn new(
        inputs: usize,
        config: BgrlConfig,
        vars: &SeededVars,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        config.views.validate()?;
        config.encoder.validate()?;
        if !(0.0..=1.0).contains(&config.target_rate) {
            let field = "BgrlConfig::target_rate";
            return Err(Error::config(
                field,
                config.target_rate,
                "a number in [0, 1]",
            ));
        }
        let vb = vars.builder(dtype, device);
        let online = Encoder::new(inputs, &config.encoder, vb.pp("encoder"))?;
        let target = Encoder::new(inputs, &config.encoder, vb.pp("target"))?;
        let hidden = config.encoder.widths[config.encoder.widths.len() - 1];
        let widths = [hidden, config.predictor, hidden];
        let predictor = PReluPerceptron::new(widths, vb.pp("predictor"))?;
        let followed = below(vars, &["encoder."]).into_iter().map(|(_, v)| v);
        Ok(Self {
            online,
            target,
            moving: Params::new(below(vars, &["target."]))?,
            followed: followed.collect(),
            predictor,
            params: below(vars, &["encoder.", "predictor."]),
            config,
        })
    }

    /// How far the target goes towards the online encoder after step `step`.
    pub fn rate(&self, step: usize) -> f64 {
        warmup_cosine(step, self.config.target_rate, 0, self.config.total)
    }

    /// The target's variables.
    pub fn target(&self) -> &[(String, Var)] {
        self.moving.named()
    }
}

impl SslMethod for Bgrl {
    fn params(&self) -> &[(String, Var)] {
        &self.params
    }

    fn loss(&mut self, view: &GraphView<'_>, rng: &mut RandomStream) -> Result<Tensor> {
        let (one, x1) = self.config.views.draw(0, view, rng)?;
        let (two, x2) = self.config.views.draw(1, view, rng)?;
        let predict = |h: Tensor| self.predictor.forward(&h);
        let q1 = predict(self.online.forward(&one, &x1, Some(rng))?)?;
        let q2 = predict(self.online.forward(&two, &x2, Some(rng))?)?;
        let t1 = self.target.forward(&one, &x1, Some(rng))?;
        let t2 = self.target.forward(&two, &x2, Some(rng))?;
        bootstrap(&q1, &q2, &t1, &t2)
    }

    fn after_step(&mut self, step: usize) -> Result<()> {
        let followed: Vec<Tensor> = self
            .followed
            .iter()
            .map(|v| v.as_tensor().detach())
            .collect();
        Ok(self.moving.lerp(self.rate(step), &followed)?)
    }

    fn embed(&self, graph: &Graph, x: &Features, batch: Option<usize>) -> Result<Tensor> {
        self.online.embed(graph, x, batch)
    }

    fn link_scorer(&self) -> LinkScorer {
        LinkScorer::Mlp
    }
}
