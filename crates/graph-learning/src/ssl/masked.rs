//! Masked autoencoders of features (GraphMAE, GraphMAE2) and of edges (S2GAE).

use super::encoder::{Encoder, EncoderAct, EncoderConfig, EncoderConv, PReluPerceptron};
use super::losses::{
    clear_rows, cross_layers, link_loss, link_probability, mask_count, scaled_cosine_error,
    MaskPlan,
};
use super::two_views::below;
use super::{GraphView, LinkScorer, SslMethod};
use crate::contrastive::EncoderActivation;
use crate::conv::Mlp;
use crate::graph::Graph;
use crate::sample::negative::{negative_sampling, Negatives};
use crate::sparse::Features;
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::{Activation, Init, Module};
use nn::init::SeededVars;
use tensor_core::params::Params;

/// Settings of [`GraphMae`], and of GraphMAE2 through [`latent`](Self::latent).
#[derive(Debug, Clone, PartialEq)]
pub struct GraphMaeConfig {
    /// The encoder.
    pub encoder: EncoderConfig,
    /// The decoder's one convolution; it has a bias where the encoder's have. Without biases training is
    /// better where features are small: they fit the mean row before anything else is learned.
    pub decoder: EncoderConv,
    /// Share of the nodes that are hidden.
    pub mask_rate: f64,
    /// Share of the hidden nodes that show another node's features instead of the token.
    pub replace_rate: f64,
    /// Exponent of the error.
    pub alpha: u32,
    /// GraphMAE2's additions.
    pub latent: Option<LatentConfig>,
}

/// What GraphMAE2 adds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LatentConfig {
    /// Weight of the latent loss.
    pub weight: f64,
    /// How much of the target stays at each step.
    pub momentum: f64,
    /// The first step, from 0, after which the target moves.
    pub delayed_ema: usize,
    /// Move the target when the loss is taken, before the optimizer's step, as the published code does:
    /// it lags by one step then.
    pub ema_in_loss: bool,
    /// Which codes are hidden from the decoder.
    pub remask: Remask,
    /// Hidden width of the projector.
    pub projector: usize,
}

/// Which codes are hidden from GraphMAE2's decoder.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Remask {
    /// Those of the masked nodes.
    Fixed,
    /// Random ones, several times; the losses are added.
    Random {
        /// How often.
        times: usize,
        /// The share of the nodes.
        rate: f64,
    },
}

impl Default for LatentConfig {
    fn default() -> Self {
        Self {
            weight: 0.5,
            momentum: 0.996,
            delayed_ema: 0,
            ema_in_loss: false,
            remask: Remask::Random {
                times: 3,
                rate: 0.5,
            },
            projector: 256,
        }
    }
}

impl Default for GraphMaeConfig {
    /// GraphMAE as published.
    fn default() -> Self {
        let prelu = EncoderAct::PRelu;
        let gat = EncoderConv::Gat {
            heads: 4,
            dropout: 0.1,
        };
        Self {
            encoder: EncoderConfig {
                conv: gat,
                widths: vec![256, 256],
                act: prelu,
                last_act: prelu,
                dropout: 0.2,
                ..EncoderConfig::default()
            },
            decoder: EncoderConv::Gat {
                heads: 1,
                dropout: 0.1,
            },
            mask_rate: 0.5,
            replace_rate: 0.05,
            alpha: 2,
            latent: None,
        }
    }
}

impl GraphMaeConfig {
    /// GraphMAE2 as published.
    pub fn second() -> Self {
        Self {
            alpha: 3,
            latent: Some(LatentConfig::default()),
            ..Self::default()
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        self.encoder.validate()?;
        let share = |field, value: f64| match (0.0..=1.0).contains(&value) {
            true => Ok(()),
            false => Err(Error::config(field, value, "a share in [0, 1]")),
        };
        share("GraphMaeConfig::mask_rate", self.mask_rate)?;
        share("GraphMaeConfig::replace_rate", self.replace_rate)?;
        if self.alpha == 0 {
            return Err(Error::config("GraphMaeConfig::alpha", 0, "at least 1"));
        }
        let Some(latent) = self.latent else {
            return Ok(());
        };
        share("LatentConfig::momentum", latent.momentum)?;
        if !(latent.weight.is_finite() && latent.weight >= 0.0) {
            let field = "LatentConfig::weight";
            return Err(Error::config(field, latent.weight, "a number >= 0"));
        }
        if let Remask::Random { times, rate } = latent.remask {
            share("Remask::Random::rate", rate)?;
            if times == 0 {
                return Err(Error::config("Remask::Random::times", 0, "at least 1"));
            }
        }
        Ok(())
    }
}

/// GraphMAE: hidden nodes' features are reconstructed from the graph around them. With
/// [`GraphMaeConfig::latent`], GraphMAE2: the decoder meets random codes hidden, and the codes
/// themselves are predicted.
#[derive(Debug)]
pub struct GraphMae {
    encoder: Encoder,
    to_decoder: Tensor,
    decoder: Encoder,
    token: Tensor,
    latent: Option<Latent>,
    config: GraphMaeConfig,
    params: Vec<(String, Var)>,
}

/// The latent branch.
#[derive(Debug)]
struct Latent {
    config: LatentConfig,
    decoder_token: Tensor,
    projector: PReluPerceptron,
    act: EncoderActivation,
    predictor: Mlp,
    target: Encoder,
    target_projector: PReluPerceptron,
    moving: Params,
    followed: Vec<Var>,
    /// Steps that are behind.
    steps: usize,
}

impl GraphMae {
    /// With variables `encoder.*`, `decoder.*`, `to_decoder.weight`, `token`; and `projector.*`,
    /// `predictor.*`, `decoder_token`, `target.*` of the latent branch.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], and those of the builder.
    pub fn new(
        inputs: usize,
        config: GraphMaeConfig,
        vars: &SeededVars,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        config.validate()?;
        let vb = vars.builder(dtype, device);
        let width = config.encoder.widths[config.encoder.widths.len() - 1];
        let decoder = EncoderConfig {
            conv: config.decoder,
            widths: vec![inputs],
            bias: config.encoder.bias,
            ..EncoderConfig::default()
        };
        let bound = 1.0 / (width as f64).sqrt();
        let uniform = Init::Uniform {
            lo: -bound,
            up: bound,
        };
        let latent = config
            .latent
            .map(|latent| Latent::new(inputs, &config.encoder, latent, vars, (dtype, device)));
        let latent = latent.transpose()?;
        Ok(Self {
            encoder: Encoder::new(inputs, &config.encoder, vb.pp("encoder"))?,
            to_decoder: vb.get_with_hints((width, width), "to_decoder.weight", uniform)?,
            decoder: Encoder::new(width, &decoder, vb.pp("decoder"))?,
            token: vb.get_with_hints((1, inputs), "token", Init::Const(0.0))?,
            params: below(
                vars,
                &[
                    "encoder.",
                    "decoder.",
                    "to_decoder.",
                    "token",
                    "projector.",
                    "predictor.",
                    "decoder_token",
                ],
            ),
            latent: latent.map(|l| l.following(vars)).transpose()?,
            config,
        })
    }

    fn plan(&self, n: usize, rng: &mut RandomStream) -> Result<MaskPlan> {
        let nodes = rng.permutation(n)?;
        let among = rng.permutation(mask_count(self.config.mask_rate, n)?)?;
        let sources = rng.permutation(n)?;
        let (rate, replace) = (self.config.mask_rate, self.config.replace_rate);
        let plan = MaskPlan::new(rate, replace, &nodes, &among, &sources)?;
        if plan.masked.is_empty() {
            let expected = "enough nodes for one to be hidden";
            return Err(Error::argument("nodes", n, expected));
        }
        Ok(plan)
    }

    /// The reconstruction error of the masked nodes with the codes of some nodes hidden.
    fn reconstruct(
        &self,
        graph: &Graph,
        x: &Tensor,
        codes: &Tensor,
        plan: &MaskPlan,
        hidden: &[u32],
        rng: &mut RandomStream,
    ) -> Result<Tensor> {
        let mut codes = clear_rows(codes, hidden)?;
        if let Some(latent) = &self.latent {
            let mut column = vec![0.0; x.dims()[0]];
            hidden.iter().for_each(|v| column[*v as usize] = 1.0);
            let column = Tensor::from_vec(column, (x.dims()[0], 1), &Device::Cpu)?;
            let column = column.to_dtype(x.dtype())?.to_device(x.device())?;
            codes = (codes + column.matmul(&latent.decoder_token)?)?;
        }
        let decoded = self.decoder.forward(graph, &codes.into(), Some(rng))?;
        let rows = Tensor::from_slice(&plan.masked, plan.masked.len(), x.device())?;
        let (found, wanted) = (decoded.index_select(&rows, 0)?, x.index_select(&rows, 0)?);
        scaled_cosine_error(&found, &wanted, self.config.alpha)
    }
}

impl SslMethod for GraphMae {
    fn params(&self) -> &[(String, Var)] {
        &self.params
    }

    fn loss(&mut self, view: &GraphView<'_>, rng: &mut RandomStream) -> Result<Tensor> {
        let x = view.x.to_dense(self.token.device())?;
        let plan = self.plan(x.dims()[0], rng)?;
        let shown = plan.apply(&x, &self.token)?;
        let h = self.encoder.forward(view.graph, &shown.into(), Some(rng))?;
        let codes = h.matmul(&self.to_decoder.t()?)?;
        let Some(latent) = &self.latent else {
            return self.reconstruct(view.graph, &x, &codes, &plan, &plan.masked, rng);
        };
        let (config, n) = (latent.config, x.dims()[0]);
        let mut sum = (latent.loss(view.graph, &x, &h, rng)? * config.weight)?;
        let hidden = match config.remask {
            Remask::Fixed => vec![plan.masked.clone()],
            Remask::Random { times, rate } => {
                let count = mask_count(rate, n)?;
                let draw = |_| -> Result<Vec<u32>> {
                    let mut order = rng.permutation(n)?;
                    order.truncate(count);
                    Ok(order)
                };
                (0..times).map(draw).collect::<Result<_>>()?
            }
        };
        for hidden in hidden {
            sum = (sum + self.reconstruct(view.graph, &x, &codes, &plan, &hidden, rng)?)?;
        }
        if let Some(latent) = self.latent.as_ref().filter(|l| l.config.ema_in_loss) {
            latent.follow()?;
        }
        Ok(sum)
    }

    fn after_step(&mut self, step: usize) -> Result<()> {
        let Some(latent) = &mut self.latent else {
            return Ok(());
        };
        // The caller's count: it goes on where training was stopped.
        latent.steps = step;
        if !latent.config.ema_in_loss {
            latent.follow()?;
        }
        latent.steps += 1;
        Ok(())
    }

    fn embed(&self, graph: &Graph, x: &Features, batch: Option<usize>) -> Result<Tensor> {
        self.encoder.embed(graph, x, batch)
    }

    fn link_scorer(&self) -> LinkScorer {
        LinkScorer::Dot
    }
}

impl Latent {
    fn new(
        inputs: usize,
        encoder: &EncoderConfig,
        config: LatentConfig,
        vars: &SeededVars,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        let vb = vars.builder(dtype, device);
        let width = encoder.widths[encoder.widths.len() - 1];
        let widths = [width, config.projector, width];
        let target = vb.pp("target");
        Ok(Self {
            config,
            decoder_token: vb.get_with_hints((1, width), "decoder_token", Init::Const(0.0))?,
            projector: PReluPerceptron::new(widths, vb.pp("projector"))?,
            act: EncoderActivation::prelu(vb.pp("predictor"))?,
            predictor: Mlp::new(&[width, width], Activation::Relu, vb.pp("predictor"))?,
            target: Encoder::new(inputs, encoder, target.pp("encoder"))?,
            target_projector: PReluPerceptron::new(widths, target.pp("projector"))?,
            moving: Params::new(Vec::new())?,
            followed: Vec::new(),
            steps: 0,
        })
    }

    /// Begins as a copy of the online encoder and projector, which exist by now.
    fn following(mut self, vars: &SeededVars) -> Result<Self> {
        let moving = below(vars, &["target."]);
        let online = below(vars, &["encoder.", "projector."]);
        for ((_, target), (_, online)) in moving.iter().zip(&online) {
            target.set(&online.as_tensor().detach().copy()?)?;
        }
        self.moving = Params::new(moving)?;
        self.followed = online.into_iter().map(|(_, v)| v).collect();
        Ok(self)
    }

    /// The predicted codes against the target's codes of the whole graph, over all nodes.
    fn loss(
        &self,
        graph: &Graph,
        x: &Tensor,
        h: &Tensor,
        rng: &mut RandomStream,
    ) -> Result<Tensor> {
        let projected = self.act.apply(&self.projector.forward(h)?)?;
        let found = self.predictor.forward(&projected)?;
        let target = self.target.forward(graph, &x.clone().into(), Some(rng))?;
        let wanted = self.target_projector.forward(&target.detach())?.detach();
        scaled_cosine_error(&found, &wanted, 1)
    }

    fn follow(&self) -> Result<()> {
        if self.steps < self.config.delayed_ema {
            return Ok(());
        }
        let online: Vec<Tensor> = self
            .followed
            .iter()
            .map(|v| v.as_tensor().detach())
            .collect();
        Ok(self.moving.lerp(1.0 - self.config.momentum, &online)?)
    }
}

/// Settings of [`S2Gae`].
#[derive(Debug, Clone, PartialEq)]
pub struct S2GaeConfig {
    /// The encoder; all its widths are equal.
    pub encoder: EncoderConfig,
    /// Share of the edges that are hidden and predicted.
    pub mask_rate: f64,
    /// Hide both directions of an edge together (um); otherwise each by itself (dm).
    pub undirected: bool,
    /// Hidden width of the decoder.
    pub decoder: usize,
}

impl Default for S2GaeConfig {
    fn default() -> Self {
        Self {
            encoder: EncoderConfig {
                last_act: EncoderAct::Relu,
                ..EncoderConfig::default()
            },
            mask_rate: 0.5,
            undirected: false,
            decoder: 128,
        }
    }
}

/// S2GAE: hidden edges are told from other pairs by products across all layers.
#[derive(Debug)]
pub struct S2Gae {
    encoder: Encoder,
    decoder: Mlp,
    config: S2GaeConfig,
    params: Vec<(String, Var)>,
}

impl S2Gae {
    /// With variables `encoder.*` and `decoder.*`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`], and those of the builder.
    pub fn new(
        inputs: usize,
        config: S2GaeConfig,
        vars: &SeededVars,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        config.encoder.validate()?;
        let widths = &config.encoder.widths;
        if widths.iter().any(|w| *w != widths[0]) {
            let value = format!("{widths:?}");
            return Err(Error::config("S2GaeConfig::encoder", value, "equal widths"));
        }
        if !(config.mask_rate > 0.0 && config.mask_rate < 1.0) {
            let field = "S2GaeConfig::mask_rate";
            return Err(Error::config(field, config.mask_rate, "a share in (0, 1)"));
        }
        let crossed = widths.len() * widths.len() * widths[0];
        let vb = vars.builder(dtype, device);
        let layers = [crossed, config.decoder, 1];
        Ok(Self {
            encoder: Encoder::new(inputs, &config.encoder, vb.pp("encoder"))?,
            decoder: Mlp::new(&layers, Activation::Relu, vb.pp("decoder"))?,
            params: below(vars, &["encoder.", "decoder."]),
            config,
        })
    }

    /// The probability `[pairs]` of an edge, with messages along `graph`.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn score(&self, graph: &Graph, x: &Features, pairs: &[(u32, u32)]) -> Result<Tensor> {
        let layers = self.encoder.layers(graph, x, None)?;
        Ok(self.probability(&layers, pairs)?.detach())
    }

    /// The outputs of all layers side by side: the second embedding that is published.
    ///
    /// # Errors
    /// Those of the encoder.
    pub fn embed_all(&self, graph: &Graph, x: &Features) -> Result<Tensor> {
        let layers = self.encoder.layers(graph, x, None)?;
        Ok(Tensor::cat(&layers, 1)?.detach())
    }

    fn probability(&self, layers: &[Tensor], pairs: &[(u32, u32)]) -> Result<Tensor> {
        let device = layers[0].device();
        let (u, v): (Vec<u32>, Vec<u32>) = pairs.iter().copied().unzip();
        let (u, v) = (
            Tensor::from_vec(u, pairs.len(), device)?,
            Tensor::from_vec(v, pairs.len(), device)?,
        );
        link_probability(&self.decoder, &cross_layers(layers, &u, &v)?)
    }

    /// Hidden edges, and the graph of the others.
    fn hide(&self, graph: &Graph, rng: &mut RandomStream) -> Result<(Vec<(u32, u32)>, Graph)> {
        let reverse = match self.config.undirected {
            false => None,
            true => {
                let expected = "each edge in both directions";
                let reverse = graph.reverse_edges();
                Some(reverse.ok_or_else(|| Error::argument("graph", "directed", expected))?)
            }
        };
        let first = |e: &u32| reverse.is_none_or(|r| r[*e as usize] >= *e);
        let mut order: Vec<u32> = (0..graph.num_edges() as u32).filter(first).collect();
        rng.shuffle(&mut order)?;
        let count = mask_count(self.config.mask_rate, order.len())?;
        if count == 0 {
            let expected = "enough for one to be hidden";
            return Err(Error::argument("edges", order.len(), expected));
        }
        let mut kept = order.split_off(count);
        if let Some(reverse) = reverse {
            let back: Vec<u32> = kept.iter().map(|e| reverse[*e as usize]).collect();
            kept.extend(back);
            // A self-loop is its own reverse.
            kept.sort_unstable();
            kept.dedup();
        }
        kept.sort_unstable();
        let ends = |e: &u32| (graph.src()[*e as usize], graph.dst()[*e as usize]);
        let hidden = order.iter().map(ends).collect();
        Ok((hidden, graph.select_edges(&kept)?))
    }
}

impl SslMethod for S2Gae {
    fn params(&self) -> &[(String, Var)] {
        &self.params
    }

    fn loss(&mut self, view: &GraphView<'_>, rng: &mut RandomStream) -> Result<Tensor> {
        let (hidden, shown) = self.hide(view.graph, rng)?;
        let layers = self.encoder.layers(&shown, view.x, Some(rng))?;
        let others = negative_sampling(view.graph, hidden.len(), Negatives::default(), rng)?;
        let positive = self.probability(&layers, &hidden)?;
        link_loss(&positive, &self.probability(&layers, &others)?)
    }

    fn embed(&self, graph: &Graph, x: &Features, batch: Option<usize>) -> Result<Tensor> {
        self.encoder.embed(graph, x, batch)
    }

    fn link_scorer(&self) -> LinkScorer {
        LinkScorer::CrossLayer
    }

    fn score_links(
        &self,
        graph: &Graph,
        x: &Features,
        pairs: &[(u32, u32)],
    ) -> Result<Option<Tensor>> {
        Ok(Some(self.score(graph, x, pairs)?))
    }

    fn clip_groups(&self) -> &[&'static str] {
        &["encoder.", "decoder."]
    }
}
