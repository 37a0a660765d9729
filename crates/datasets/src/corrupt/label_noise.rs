//! Labels that are partly wrong.

use crate::data::check_labels;
use crate::{Classification, Error, Result};
use candle_core::Tensor;
use tensor_core::random::RandomStream;

/// How labels become wrong. Each label changes independently with probability `rate`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum LabelNoise {
    /// To a uniform one of the other classes.
    Symmetric {
        /// Probability of a change.
        rate: f64,
    },
    /// To the next class, `y + 1` modulo the number of classes.
    Pair {
        /// Probability of a change.
        rate: f64,
    },
}

/// Labels after [`LabelNoise::apply`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoisyLabels {
    /// The labels, partly wrong.
    pub labels: Vec<u32>,
    /// Which of them were changed.
    pub flipped: Vec<bool>,
}

impl LabelNoise {
    /// The probability of a change.
    pub fn rate(&self) -> f64 {
        match self {
            Self::Symmetric { rate } | Self::Pair { rate } => *rate,
        }
    }

    /// Changes labels.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a rate outside `[0, 1]` or fewer than two classes (there is
    /// no wrong class then), [`Error::LabelOutOfRange`].
    pub fn apply(
        &self,
        labels: &[u32],
        classes: usize,
        rng: &mut RandomStream,
    ) -> Result<NoisyLabels> {
        let rate = self.rate();
        if !(0.0..=1.0).contains(&rate) {
            return Err(Error::invalid("rate", rate, "a probability in [0, 1]"));
        }
        if classes < 2 {
            return Err(Error::invalid("classes", classes, "at least 2"));
        }
        check_labels(labels, classes)?;
        let mut noisy = NoisyLabels {
            labels: labels.to_vec(),
            flipped: vec![false; labels.len()],
        };
        for (label, flipped) in noisy.labels.iter_mut().zip(&mut noisy.flipped) {
            *flipped = rng.next_uniform() < rate;
            // Drawn for every label, so that the rate does not shift what follows.
            let step = match self {
                Self::Symmetric { .. } => 1 + rng.below(classes - 1)?,
                Self::Pair { .. } => 1,
            };
            if *flipped {
                *label = ((*label as usize + step) % classes) as u32;
            }
        }
        Ok(noisy)
    }

    /// The data set with wrong labels, and which of them were changed.
    ///
    /// # Errors
    /// Those of [`apply`](Self::apply).
    pub fn apply_to(
        &self,
        data: &Classification,
        rng: &mut RandomStream,
    ) -> Result<(Classification, Vec<bool>)> {
        let noisy = self.apply(&data.label_vec()?, data.classes, rng)?;
        let labels = Tensor::from_vec(noisy.labels, data.len(), data.labels.device())?;
        let data = Classification::new(data.inputs.clone(), labels, data.classes)?;
        Ok((data, noisy.flipped))
    }
}
