//! A random search on validation accuracy.

use super::tasks::{embedding_for_probe, probe};
use super::training::{train, TrainConfig};
use super::{build, link_split};
use crate::{Error, Result};
use candle_core::{DType, Device};
use graph_learning::io::NodeData;
use nn::init::SeededVars;
use tensor_core::random::RandomStream;

/// What is searched.
#[derive(Debug, Clone, PartialEq)]
pub struct Space {
    /// Smallest and largest learning rate, drawn evenly on a logarithmic scale.
    pub lr: (f64, f64),
    /// Smallest and largest L2 penalty, likewise.
    pub weight_decay: (f64, f64),
    /// Widths.
    pub widths: Vec<usize>,
}

impl Default for Space {
    fn default() -> Self {
        Self {
            lr: (1e-6, 1e-2),
            weight_decay: (1e-6, 1e-2),
            widths: vec![128, 256, 512, 1024],
        }
    }
}

/// The best settings that were met.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Best {
    /// Learning rate.
    pub lr: f64,
    /// L2 penalty.
    pub weight_decay: f64,
    /// Width.
    pub width: usize,
    /// The probe's accuracy on the validation nodes.
    pub val_accuracy: f64,
}

/// The best of `trials` random settings by the accuracy of a probe on the validation nodes; test nodes
/// choose nothing.
///
/// # Errors
/// Those of training; [`Error::Trial`] for no trial.
pub fn search(
    method: &str,
    data: &NodeData,
    config: &TrainConfig,
    space: Space,
    trials: usize,
    rng: &mut RandomStream,
) -> Result<Best> {
    let links = link_split(data, &mut rng.split("links"))?;
    let inputs = data.x.dims()?.1;
    let mut best: Option<Best> = None;
    for trial in 0..trials {
        let rng = &mut rng.split_index("trial", trial as u64);
        let mut log = |(low, high): (f64, f64)| {
            (low.ln() + rng.next_uniform() * (high.ln() - low.ln())).exp()
        };
        let (lr, weight_decay) = (log(space.lr), log(space.weight_decay));
        let width = space.widths[rng.below(space.widths.len())?];
        let config = TrainConfig {
            lr,
            weight_decay,
            ..config.clone()
        };
        let vars = SeededVars::new(&rng.split("weights"));
        let place = (DType::F32, &Device::Cpu);
        let mut built = build(method, inputs, width, config.epochs, &vars, place)?;
        train(&mut *built, data, &links, &config, rng, &mut |_, _| Ok(()))?;
        let z =
            embedding_for_probe(&built.embed(&data.graph, &data.x, config.regime.embedded())?)?;
        let val_accuracy = probe(&z, data, 0.0, rng)?.val_accuracy;
        if best.is_none_or(|b| val_accuracy > b.val_accuracy) {
            best = Some(Best {
                lr,
                weight_decay,
                width,
                val_accuracy,
            });
        }
    }
    best.ok_or_else(|| Error::Trial("a search needs at least one trial".into()))
}
