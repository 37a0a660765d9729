//! Methods by name, at one width.

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

/// A method with the settings of its paper at this width, for `total` steps.
///
/// # Errors
/// [`Error::Unknown`], and those of the method.
pub fn build(
    name: &str,
    inputs: usize,
    width: usize,
    total: usize,
    vars: &SeededVars,
    place: (DType, &Device),
) -> Result<Box<dyn SslMethod>> {
    let gcn = EncoderConfig {
        widths: vec![width, width],
        ..EncoderConfig::default()
    };
    let prelu = EncoderConfig {
        act: EncoderAct::PRelu,
        last_act: EncoderAct::PRelu,
        ..gcn.clone()
    };
    let grace = GraceConfig {
        tau: 0.4,
        // All nodes against all: some of them at a step, as the memory of a small machine wants.
        anchors: Some(512),
        batch: None,
    };
    let views = ViewConfig {
        edges: [0.3, 0.4],
        features: [0.1, 0.0],
        adaptive: None,
    };
    let adaptive = ViewConfig {
        adaptive: Some(Centrality::Degree),
        ..views
    };
    let redundancy = SiameseLoss::BarlowTwins(Redundancy::Decorrelated);
    let cca = SiameseLoss::Cca { lambda: 1e-3 };
    let mae = |latent| GraphMaeConfig {
        encoder: prelu.clone(),
        decoder: EncoderConv::Gcn,
        latent,
        alpha: if latent.is_some() { 3 } else { 2 },
        ..GraphMaeConfig::default()
    };
    Ok(match name {
        "raw" => Box::new(Raw),
        "random" => Box::new(Untrained::new(inputs, &gcn, vars, place)?),
        "bgrl" => {
            let config = BgrlConfig {
                encoder: EncoderConfig {
                    batch_norm: true,
                    ..prelu
                },
                predictor: 2 * width,
                total,
                ..BgrlConfig::default()
            };
            Box::new(Bgrl::new(inputs, config, vars, place)?)
        }
        "cca" => {
            let views = ViewConfig::both(0.2, 0.2);
            Box::new(Siamese::new(inputs, &gcn, views, cca, vars, place)?)
        }
        "gbt" => {
            let views = ViewConfig::both(0.5, 0.1);
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
            let config = GraphEclConfig {
                encoder: gcn,
                hidden: 2 * width,
                negatives: Some(512),
                ..GraphEclConfig::default()
            };
            Box::new(GraphEcl::new(inputs, config, vars, place)?)
        }
        "dgi" => {
            let encoder = EncoderConfig {
                widths: vec![width],
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
            let config = S2GaeConfig {
                encoder: EncoderConfig {
                    last_act: EncoderAct::Relu,
                    ..gcn
                },
                decoder: width,
                ..S2GaeConfig::default()
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
