//! The loop around a layer: looks at validation data, the best weights, reports.

use super::layer::ForwardLayer;
use super::ForwardGnnConfig;
use crate::{Error, Result};
use candle_nn::Optimizer;
use optim::local::LocalLayer;
use std::ops::ControlFlow;
use std::time::Instant;
use tensor_core::params::Snapshot;

/// What an observer is told after each step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// The layer that is trained; 0 for models whose layers are trained together.
    pub layer: usize,
    /// The epoch or time step, from 0.
    pub epoch: usize,
    /// The loss of the step, the mean over layers where they are trained together.
    pub loss: f64,
    /// The score on validation data, where it was looked at.
    pub validation: Option<f64>,
}

/// Watches a fit; [`ControlFlow::Break`] ends it with [`Error::Stopped`].
pub type Observer<'a> = dyn FnMut(&Progress) -> ControlFlow<()> + 'a;

/// What became of one layer, or of all of them where they are trained together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LayerReport {
    /// Steps taken.
    pub epochs: usize,
    /// The best score on validation data, where it was looked at.
    pub best_validation: Option<f64>,
    /// Wall-clock time.
    pub seconds: f64,
    /// The most bytes that a step held for its backward pass
    /// ([`optim::local::held_bytes`]).
    pub peak_bytes: usize,
}

/// What became of a fit.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct FitReport {
    /// In the order of the layers.
    pub per_layer: Vec<LayerReport>,
}

/// Keeps the best weights and says when to stop.
pub(super) struct Best {
    every: usize,
    patience: usize,
    best: Option<(f64, Vec<Snapshot>)>,
    since: usize,
}

impl Best {
    pub fn new(config: &ForwardGnnConfig) -> Self {
        Self {
            every: config.val_every,
            patience: config.patience,
            best: None,
            since: 0,
        }
    }

    /// Whether validation data are looked at after this epoch.
    pub fn looks(&self, epoch: usize) -> bool {
        self.patience > 0 && epoch > 0 && (epoch + 1).is_multiple_of(self.every)
    }

    /// Takes a score; `true` when it is time to stop.
    pub fn take(
        &mut self,
        score: f64,
        weights: impl FnOnce() -> Result<Vec<Snapshot>>,
    ) -> Result<bool> {
        if self.best.as_ref().is_none_or(|(best, _)| score > *best) {
            self.best = Some((score, weights()?));
            self.since = 0;
        } else {
            self.since += 1;
        }
        Ok(self.since >= self.patience)
    }

    pub fn score(&self) -> Option<f64> {
        self.best.as_ref().map(|(score, _)| *score)
    }

    /// Puts the best weights back; the last ones stay where there was no look.
    pub fn restore<O: Optimizer>(self, layers: &[&ForwardLayer<O>]) -> Result<()> {
        if let Some((_, weights)) = self.best {
            for (layer, snapshot) in layers.iter().zip(&weights) {
                layer.restore(snapshot)?;
            }
        }
        Ok(())
    }
}

/// Trains one layer on one input until the epochs or the patience end; the best weights are back
/// afterwards. `validate` scores the layer as it is.
pub(super) fn train_layer<O: Optimizer, I>(
    layer: &mut ForwardLayer<O>,
    index: usize,
    input: &I,
    config: &ForwardGnnConfig,
    observer: &mut Observer<'_>,
    validate: impl Fn(&ForwardLayer<O>) -> Result<f64>,
) -> Result<LayerReport>
where
    ForwardLayer<O>: LocalLayer<I, Error = Error>,
{
    let start = Instant::now();
    let mut best = Best::new(config);
    let (mut epochs, mut peak_bytes) = (0, 0);
    for epoch in 0..config.epochs {
        let step = layer.step(input)?;
        require_finite_loss(step.loss)?;
        peak_bytes = peak_bytes.max(step.held_bytes);
        epochs = epoch + 1;
        let (mut validation, mut done) = (None, false);
        if best.looks(epoch) {
            let score = validate(layer)?;
            validation = Some(score);
            done = best.take(score, || Ok(vec![layer.snapshot()?]))?;
        }
        tell(
            observer,
            Progress {
                layer: index,
                epoch,
                loss: step.loss,
                validation,
            },
        )?;
        if done {
            break;
        }
    }
    let best_validation = best.score();
    best.restore(&[&*layer])?;
    tracing::debug!(layer = index, epochs, ?best_validation, "layer trained");
    Ok(LayerReport {
        epochs,
        best_validation,
        seconds: start.elapsed().as_secs_f64(),
        peak_bytes,
    })
}

pub(super) fn require_finite_loss(loss: f64) -> Result<()> {
    if loss.is_finite() {
        return Ok(());
    }
    let (what, count, total) = ("a layer's loss", 1, 1);
    Err(Error::NonFinite { what, count, total })
}

pub(super) fn tell(observer: &mut Observer<'_>, progress: Progress) -> Result<()> {
    match observer(&progress) {
        ControlFlow::Continue(()) => Ok(()),
        ControlFlow::Break(()) => Err(Error::Stopped {
            at: format!("layer {}, epoch {}", progress.layer, progress.epoch),
        }),
    }
}
