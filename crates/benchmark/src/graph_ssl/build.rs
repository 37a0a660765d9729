//! Methods by name.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, Var};
use graph_learning::contrastive::{Centrality, GraceConfig};
use graph_learning::sparse::Features;
use graph_learning::ssl::losses::Redundancy;
use graph_learning::ssl::{
    Bgrl, BgrlConfig, Contrastive, Dgi, Encoder, EncoderAct, EncoderConfig, EncoderConv, GraphEcl,
    GraphEclConfig, GraphMae, GraphMaeConfig, GraphView, LatentConfig, S2Gae, S2GaeConfig, Siamese,
    SiameseLoss, SslMethod, ViewConfig,
};
use graph_learning::Graph;
use nn::init::SeededVars;
use tensor_core::random::RandomStream;

/// All methods: what training must beat first.
pub const METHODS: [&str; 12] = [
    "raw", "random", "bgrl", "cca", "gbt", "grace", "gca", "ecl", "dgi", "mae", "mae2", "s2gae",
];

/// What may be set of a method; `None` is what its paper says. A method takes no notice of what it does
/// not have.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Width of the encoder.
    pub width: usize,
    /// Its layers; two, but one for DGI.
    pub layers: Option<usize>,
    /// Shares of the edges that the two views drop.
    pub edge_drop: [Option<f64>; 2],
    /// Shares of the feature columns that they drop.
    pub feature_drop: [Option<f64>; 2],
    /// Share of the nodes, or edges, that are hidden.
    pub mask_rate: Option<f64>,
    /// Exponent of the reconstruction error.
    pub alpha: Option<u32>,
    /// Temperature of a contrast.
    pub temperature: Option<f64>,
    /// Width of the decoder of edges; that of the encoder without it.
    pub decoder: Option<usize>,
}

impl Settings {
    /// Those of the papers at this width.
    pub fn new(width: usize) -> Self {
        Self {
            width,
            layers: None,
            edge_drop: [None; 2],
            feature_drop: [None; 2],
            mask_rate: None,
            alpha: None,
            temperature: None,
            decoder: None,
        }
    }

    fn widths(&self, layers: usize) -> Vec<usize> {
        vec![self.width; self.layers.unwrap_or(layers)]
    }

    fn views(&self, published: ViewConfig) -> ViewConfig {
        let either = |own: [Option<f64>; 2], published: [f64; 2]| {
            [0, 1].map(|side| own[side].unwrap_or(published[side]))
        };
        ViewConfig {
            edges: either(self.edge_drop, published.edges),
            features: either(self.feature_drop, published.features),
            ..published
        }
    }
}

/// A method for `total` steps.
///
/// # Errors
/// [`Error::Unknown`], and those of the method.
pub fn build(
    name: &str,
    inputs: usize,
    settings: &Settings,
    total: usize,
    vars: &SeededVars,
    place: (DType, &Device),
) -> Result<Box<dyn SslMethod>> {
    let width = settings.width;
    let gcn = EncoderConfig {
        widths: settings.widths(2),
        ..EncoderConfig::default()
    };
    let prelu = EncoderConfig {
        act: EncoderAct::PRelu,
        last_act: EncoderAct::PRelu,
        ..gcn.clone()
    };
    let grace = GraceConfig {
        tau: settings.temperature.unwrap_or(0.4),
        // All nodes against all: some of them at a step, as the memory of a small machine wants.
        anchors: Some(512),
        batch: None,
    };
    let views = settings.views(ViewConfig {
        edges: [0.3, 0.4],
        features: [0.1, 0.0],
        adaptive: None,
    });
    let adaptive = ViewConfig {
        adaptive: Some(Centrality::Degree),
        ..views
    };
    let redundancy = SiameseLoss::BarlowTwins(Redundancy::Decorrelated);
    let cca = SiameseLoss::Cca { lambda: 1e-3 };
    let mae = |latent| {
        let published = match latent {
            None => GraphMaeConfig::default(),
            Some(_) => GraphMaeConfig::second(),
        };
        GraphMaeConfig {
            // Where rows of features add up to 1, biases would fit the mean row and little else.
            encoder: EncoderConfig {
                bias: false,
                ..prelu.clone()
            },
            decoder: EncoderConv::Gcn,
            latent,
            alpha: settings.alpha.unwrap_or(published.alpha),
            mask_rate: settings.mask_rate.unwrap_or(published.mask_rate),
            ..published
        }
    };
    Ok(match name {
        "raw" => Box::new(Raw),
        "random" => Box::new(Untrained::new(inputs, &gcn, vars, place)?),
        "bgrl" => {
            let published = BgrlConfig::default();
            let config = BgrlConfig {
                encoder: EncoderConfig {
                    batch_norm: true,
                    ..prelu
                },
                views: settings.views(published.views),
                predictor: 2 * width,
                total,
                ..published
            };
            Box::new(Bgrl::new(inputs, config, vars, place)?)
        }
        "cca" => {
            let views = settings.views(ViewConfig::both(0.2, 0.2));
            Box::new(Siamese::new(inputs, &gcn, views, cca, vars, place)?)
        }
        "gbt" => {
            let views = settings.views(ViewConfig::both(0.5, 0.1));
            Box::new(Siamese::new(inputs, &gcn, views, redundancy, vars, place)?)
        }
        "grace" => {
            let grace = (width, grace);
            Box::new(Contrastive::new(inputs, &prelu, views, grace, vars, place)?)
        }
        "gca" => {
            let grace = (width, grace);
            Box::new(Contrastive::new(
                inputs, &prelu, adaptive, grace, vars, place,
            )?)
        }
        "ecl" => {
            let published = GraphEclConfig::default();
            let config = GraphEclConfig {
                encoder: gcn,
                hidden: 2 * width,
                negatives: Some(512),
                temperature: settings.temperature.unwrap_or(published.temperature),
                ..published
            };
            Box::new(GraphEcl::new(inputs, config, vars, place)?)
        }
        "dgi" => {
            let encoder = EncoderConfig {
                widths: settings.widths(1),
                ..prelu
            };
            Box::new(Dgi::new(inputs, &encoder, vars, place)?)
        }
        "mae" => Box::new(GraphMae::new(inputs, mae(None), vars, place)?),
        "mae2" => {
            let latent = LatentConfig {
                projector: 2 * width,
                ..LatentConfig::default()
            };
            Box::new(GraphMae::new(inputs, mae(Some(latent)), vars, place)?)
        }
        "s2gae" => {
            let published = S2GaeConfig::default();
            let config = S2GaeConfig {
                encoder: EncoderConfig {
                    last_act: EncoderAct::Relu,
                    ..gcn
                },
                mask_rate: settings.mask_rate.unwrap_or(published.mask_rate),
                decoder: settings.decoder.unwrap_or(width),
                ..published
            };
            Box::new(S2Gae::new(inputs, config, vars, place)?)
        }
        other => {
            return Err(Error::Unknown {
                kind: "method",
                name: other.to_string(),
                known: METHODS.iter().map(ToString::to_string).collect(),
            })
        }
    })
}

/// The features as they are.
struct Raw;

impl SslMethod for Raw {
    fn params(&self) -> &[(String, Var)] {
        &[]
    }

    fn loss(&mut self, _: &GraphView<'_>, _: &mut RandomStream) -> graph_learning::Result<Tensor> {
        Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?)
    }

    fn embed(&self, _: &Graph, x: &Features, _: Option<usize>) -> graph_learning::Result<Tensor> {
        x.to_dense(&Device::Cpu)
    }
}

/// An encoder with its first weights.
struct Untrained {
    encoder: Encoder,
}

impl Untrained {
    fn new(
        inputs: usize,
        config: &EncoderConfig,
        vars: &SeededVars,
        (dtype, device): (DType, &Device),
    ) -> Result<Self> {
        let vb = vars.builder(dtype, device).pp("encoder");
        let encoder = Encoder::new(inputs, config, vb)?;
        Ok(Self { encoder })
    }
}

impl SslMethod for Untrained {
    fn params(&self) -> &[(String, Var)] {
        &[]
    }

    fn loss(&mut self, _: &GraphView<'_>, _: &mut RandomStream) -> graph_learning::Result<Tensor> {
        Ok(Tensor::zeros((), DType::F32, &Device::Cpu)?)
    }

    fn embed(
        &self,
        graph: &Graph,
        x: &Features,
        batch: Option<usize>,
    ) -> graph_learning::Result<Tensor> {
        self.encoder.embed(graph, x, batch)
    }
}
