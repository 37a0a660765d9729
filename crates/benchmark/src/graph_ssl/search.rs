//! A search over the settings of a method, judged on validation data.

use super::tasks::{embedding_for_probe, probe};
use super::tpe::{Dimension, Tpe};
use super::training::{train, Regime, TrainConfig};
use super::{build, link_split, Settings};
use crate::{Error, Result};
use candle_core::{DType, Device};
use clap::ValueEnum;
use graph_learning::io::NodeData;
use nn::init::SeededVars;
use tensor_core::random::RandomStream;

/// How settings are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Sampler {
    /// By a tree-structured Parzen estimator.
    #[default]
    Tpe,
    /// At random.
    Random,
}

/// One thing that is searched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parameter {
    /// The learning rate.
    LearningRate,
    /// The L2 penalty.
    WeightDecay,
    /// Seeds of a step that samples.
    Batch,
    /// Width of the encoder.
    Width,
    /// Its layers.
    Layers,
    /// Share of the edges that a view drops.
    EdgeDrop(usize),
    /// Share of the feature columns that a view drops.
    FeatureDrop(usize),
    /// Share of what is hidden.
    MaskRate,
    /// Exponent of the reconstruction error.
    Alpha,
    /// Temperature of a contrast.
    Temperature,
    /// Width of the decoder.
    Decoder,
}

/// The parameters that a method has in a regime, and their values.
pub fn space(method: &str, regime: &Regime) -> Vec<(Parameter, Dimension)> {
    let (low, high) = (1e-6, 1e-2);
    let choice = |values: &[f64]| Dimension::Choice(values.to_vec());
    let widths = choice(&[128.0, 256.0, 512.0, 1024.0]);
    let temperatures = choice(&[0.4, 0.5, 0.6, 0.7, 0.8]);
    let mut found = vec![(Parameter::Width, widths.clone())];
    if method == "raw" || method == "random" {
        return found;
    }
    found.extend([
        (
            Parameter::LearningRate,
            Dimension::Logarithmic { low, high },
        ),
        (Parameter::WeightDecay, Dimension::Logarithmic { low, high }),
        (Parameter::Layers, choice(&[1.0, 2.0, 3.0, 4.0])),
    ]);
    if *regime != Regime::FullBatch {
        let batches = choice(&[512.0, 1024.0, 2048.0, 4096.0, 10_000.0, 20_000.0]);
        found.push((Parameter::Batch, batches));
    }
    if matches!(method, "bgrl" | "cca" | "gbt" | "grace" | "gca") {
        let rates = choice(&[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]);
        for side in 0..2 {
            found.push((Parameter::EdgeDrop(side), rates.clone()));
            found.push((Parameter::FeatureDrop(side), rates.clone()));
        }
    }
    if matches!(method, "mae" | "mae2" | "s2gae") {
        found.push((Parameter::MaskRate, choice(&[0.4, 0.5, 0.6, 0.7, 0.8])));
    }
    if matches!(method, "mae" | "mae2") {
        found.push((Parameter::Alpha, choice(&[1.0, 2.0, 3.0])));
    }
    if matches!(method, "grace" | "gca" | "ecl") {
        found.push((Parameter::Temperature, temperatures));
    }
    if method == "s2gae" {
        found.push((Parameter::Decoder, widths));
    }
    found
}

/// A method's settings and those of its training.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuning {
    /// Of the method.
    pub settings: Settings,
    /// Of the training.
    pub config: TrainConfig,
}

impl Tuning {
    fn set(&mut self, parameter: Parameter, value: f64) {
        let (settings, config) = (&mut self.settings, &mut self.config);
        match parameter {
            Parameter::LearningRate => config.lr = value,
            Parameter::WeightDecay => config.weight_decay = value,
            Parameter::Batch => match &mut config.regime {
                Regime::FullBatch => {}
                Regime::NodeSampling { batch, .. } | Regime::SubgraphSampling { batch, .. } => {
                    *batch = value as usize;
                }
            },
            Parameter::Width => settings.width = value as usize,
            Parameter::Layers => settings.layers = Some(value as usize),
            Parameter::EdgeDrop(side) => settings.edge_drop[side] = Some(value),
            Parameter::FeatureDrop(side) => settings.feature_drop[side] = Some(value),
            Parameter::MaskRate => settings.mask_rate = Some(value),
            Parameter::Alpha => settings.alpha = Some(value as u32),
            Parameter::Temperature => settings.temperature = Some(value),
            Parameter::Decoder => settings.decoder = Some(value as usize),
        }
    }
}

/// The best of `trials` choices, and the accuracy of a probe of it on the validation nodes; test nodes
/// choose nothing. `start` gives whatever is not searched. A choice with which training diverges is the
/// worst there is.
///
/// # Errors
/// Those of training but for divergence; [`Error::Trial`] where no trial came to its end.
pub fn search(
    method: &str,
    data: &NodeData,
    start: &Tuning,
    (sampler, trials): (Sampler, usize),
    rng: &mut RandomStream,
) -> Result<(Tuning, f64)> {
    let links = link_split(data, &mut rng.split("links"))?;
    let inputs = data.x.dims()?.1;
    let space = space(method, &start.config.regime);
    let mut tpe = Tpe::new(space.iter().map(|(_, d)| d.clone()).collect())?;
    let mut draws = rng.split("draws");
    let mut best: Option<(Tuning, f64)> = None;
    for trial in 0..trials {
        let rng = &mut rng.split_index("trial", trial as u64);
        let point = match sampler {
            Sampler::Tpe => tpe.suggest(&mut draws)?,
            Sampler::Random => {
                let drawn = space.iter().map(|(_, d)| d.draw(&mut draws));
                drawn.collect::<Result<_>>()?
            }
        };
        let mut choice = start.clone();
        for ((parameter, _), value) in space.iter().zip(&point) {
            choice.set(*parameter, *value);
        }
        let Tuning { settings, config } = &choice;
        let vars = SeededVars::new(&rng.split("weights"));
        let place = (DType::F32, &Device::Cpu);
        let mut built = build(method, inputs, settings, config.epochs, &vars, place)?;
        match train(&mut *built, data, &links, config, rng, &mut |_, _| Ok(())) {
            Ok(_) => {}
            Err(Error::Diverged { epoch, loss }) => {
                tracing::info!(method, ?choice, epoch, loss, "diverged");
                tpe.tell(point, f64::NAN)?;
                continue;
            }
            Err(other) => return Err(other),
        }
        let z = built.embed(&data.graph, &data.x, config.regime.embedded())?;
        let accuracy = probe(&embedding_for_probe(&z)?, data, 0.0, rng)?.val_accuracy;
        tracing::debug!(method, ?choice, accuracy, "tried");
        tpe.tell(point, accuracy)?;
        if best.as_ref().is_none_or(|(_, b)| accuracy > *b) {
            best = Some((choice, accuracy));
        }
    }
    best.ok_or_else(|| Error::Trial(format!("no trial of {trials} came to its end")))
}

#[cfg(test)]
mod tests {
    use super::super::METHODS;
    use super::*;
    use graph_learning::generate::{citation_network, CitationConfig};
    use graph_learning::split::random_per_class;

    /// Whatever the search may choose can be built and trained, in full and in parts.
    #[test]
    fn all_methods_can_be_searched() {
        let rng = &mut RandomStream::new(0);
        let small = CitationConfig {
            nodes: 140,
            words: 70,
            ..CitationConfig::default()
        };
        let mut data = citation_network(small, rng).unwrap();
        data.split = Some(random_per_class(&data.y, data.classes, 5, (40, 40), rng).unwrap());
        let sampled = Regime::NodeSampling {
            fanouts: vec![5, 5],
            batch: 64,
        };
        for method in METHODS {
            for regime in [Regime::FullBatch, sampled.clone()] {
                let start = Tuning {
                    settings: Settings::new(16),
                    config: TrainConfig {
                        epochs: 1,
                        regime,
                        ..TrainConfig::of(method)
                    },
                };
                for sampler in [Sampler::Tpe, Sampler::Random] {
                    let (found, accuracy) =
                        search(method, &data, &start, (sampler, 1), rng).unwrap();
                    assert_ne!(found.settings, start.settings, "{method}");
                    assert!((0.0..=1.0).contains(&accuracy), "{method}");
                }
            }
        }
        let start = Tuning {
            settings: Settings::new(16),
            config: TrainConfig::of("cca"),
        };
        let none = search("cca", &data, &start, (Sampler::Tpe, 0), rng).unwrap_err();
        assert!(none.to_string().contains("no trial of 0"), "{none}");
    }
}
