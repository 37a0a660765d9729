//! Logistic regression on frozen embeddings.

use crate::split::{check_labels, NodeSplit};
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Tensor};

/// Settings of [`linear_probe`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ProbeConfig {
    /// Steps over all training nodes.
    pub epochs: usize,
    /// Learning rate of Adam.
    pub lr: f64,
    /// Added to the gradient: `wd` times the weights.
    pub wd: f64,
    /// Steps between two looks at the validation nodes.
    pub val_every: usize,
}

impl Default for ProbeConfig {
    fn default() -> Self {
        Self {
            epochs: 3000,
            lr: 0.01,
            wd: 0.0,
            val_every: 20,
        }
    }
}

/// What a probe found at the step that was best on the validation nodes (the last of equals).
#[derive(Debug, Clone, PartialEq)]
pub struct ProbeReport {
    /// Accuracy on the validation nodes; equal to the micro-averaged F1.
    pub val_accuracy: f64,
    /// Accuracy on the test nodes.
    pub test_accuracy: f64,
    /// The mean of the classes' F1 on the test nodes.
    pub test_f1_macro: f64,
    /// The predicted class of every node.
    pub prediction: Vec<u32>,
}

/// Multinomial logistic regression on embeddings `[n, h]`, trained on the split's training nodes with
/// Adam from Xavier-uniform weights; the validation nodes choose the step, and test nodes choose
/// nothing.
///
/// # Errors
/// [`Error::InvalidConfig`], [`Error::Shape`], [`Error::NonFinite`] for embeddings that are not finite,
/// [`Error::LabelOutOfRange`], [`Error::MissingClass`] and [`Error::InvalidArgument`] for a split that
/// does not fit.
pub fn linear_probe(
    z: &Tensor,
    labels: &[u32],
    classes: usize,
    split: &NodeSplit,
    config: ProbeConfig,
    rng: &mut RandomStream,
) -> Result<ProbeReport> {
    if config.epochs == 0 || config.val_every == 0 {
        return Err(Error::config(
            "ProbeConfig::epochs",
            config.epochs,
            "at least 1",
        ));
    }
    if !(config.lr > 0.0 && config.lr.is_finite() && config.wd >= 0.0 && config.wd.is_finite()) {
        let value = format!("{} and wd {}", config.lr, config.wd);
        return Err(Error::config(
            "ProbeConfig::lr",
            value,
            "a positive rate, wd >= 0",
        ));
    }
    let (n, h) = z.dims2()?;
    if labels.len() != n {
        return Err(Error::shape("labels", &[labels.len()], n));
    }
    check_labels(labels, classes)?;
    split.validate(n)?;
    split.require_classes(labels, classes)?;
    let z: Vec<f64> = z.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    let count = z.iter().filter(|v| !v.is_finite()).count();
    if count > 0 {
        let (what, total) = ("embeddings", z.len());
        return Err(Error::NonFinite { what, count, total });
    }
    let row = |v: u32| &z[v as usize * h..(v as usize + 1) * h];
    let mut probe = Probe::new(classes, h, rng);
    let mut best: Option<(f64, Vec<f64>)> = None;
    for epoch in 1..=config.epochs {
        probe.step(&split.train, &row, labels, config);
        if epoch % config.val_every == 0 || epoch == config.epochs {
            let accuracy = accuracy(&split.val, labels, |v| probe.predict(row(v)));
            if best.as_ref().is_none_or(|b| accuracy >= b.0) {
                best = Some((accuracy, probe.weights.clone()));
            }
        }
    }
    let (val_accuracy, weights) = best.unwrap_or((0.0, probe.weights.clone()));
    probe.weights = weights;
    let prediction: Vec<u32> = (0..n as u32).map(|v| probe.predict(row(v))).collect();
    Ok(ProbeReport {
        val_accuracy,
        test_accuracy: accuracy(&split.test, labels, |v| prediction[v as usize]),
        test_f1_macro: f1_macro(&split.test, labels, &prediction, classes)?,
        prediction,
    })
}

fn accuracy(nodes: &[u32], labels: &[u32], predict: impl Fn(u32) -> u32) -> f64 {
    let right = nodes
        .iter()
        .filter(|v| predict(**v) == labels[**v as usize]);
    right.count() as f64 / nodes.len().max(1) as f64
}

/// The mean over classes of `2 TP / (2 TP + FP + FN)` on some nodes; a class that neither occurs nor is
/// predicted there is left out.
///
/// # Errors
/// [`Error::InvalidArgument`] for a node without a label or a prediction.
pub fn f1_macro(nodes: &[u32], labels: &[u32], prediction: &[u32], classes: usize) -> Result<f64> {
    let known = labels.len().min(prediction.len());
    if let Some(bad) = nodes.iter().find(|v| **v as usize >= known) {
        let expected = format!("below {known} labels and predictions");
        return Err(Error::argument("node", bad, expected));
    }
    let (mut sum, mut count) = (0.0, 0.0);
    for class in 0..classes as u32 {
        let (mut hit, mut other) = (0.0, 0.0);
        for v in nodes {
            match (
                labels[*v as usize] == class,
                prediction[*v as usize] == class,
            ) {
                (true, true) => hit += 1.0,
                (false, false) => {}
                _ => other += 1.0,
            }
        }
        if hit + other > 0.0 {
            sum += 2.0 * hit / (2.0 * hit + other);
            count += 1.0;
        }
    }
    Ok(if count > 0.0 { sum / count } else { 0.0 })
}

/// `[classes, h + 1]` weights, the last column the bias, with Adam's moments.
struct Probe {
    weights: Vec<f64>,
    first: Vec<f64>,
    second: Vec<f64>,
    steps: i32,
    h: usize,
}

impl Probe {
    fn new(classes: usize, h: usize, rng: &mut RandomStream) -> Self {
        let bound = (6.0 / (classes + h) as f64).sqrt();
        let mut weights = vec![0.0; classes * (h + 1)];
        rng.fill_uniform(&mut weights);
        for (i, w) in weights.iter_mut().enumerate() {
            *w = if i % (h + 1) == h {
                0.0
            } else {
                bound * (2.0 * *w - 1.0)
            };
        }
        Self {
            first: vec![0.0; weights.len()],
            second: vec![0.0; weights.len()],
            weights,
            steps: 0,
            h,
        }
    }

    fn scores(&self, z: &[f64]) -> Vec<f64> {
        let one = |w: &[f64]| w[self.h] + w.iter().zip(z).map(|(w, z)| w * z).sum::<f64>();
        self.weights.chunks_exact(self.h + 1).map(one).collect()
    }

    fn predict(&self, z: &[f64]) -> u32 {
        let scores = self.scores(z).into_iter().enumerate();
        // The first of equals.
        let best = scores.fold((0, f64::NEG_INFINITY), |b, s| if s.1 > b.1 { s } else { b });
        best.0 as u32
    }

    fn step<'a>(
        &mut self,
        nodes: &[u32],
        row: &impl Fn(u32) -> &'a [f64],
        labels: &[u32],
        config: ProbeConfig,
    ) {
        let width = self.h + 1;
        let mut grad: Vec<f64> = self.weights.iter().map(|w| config.wd * w).collect();
        let share = 1.0 / nodes.len().max(1) as f64;
        for v in nodes {
            let z = row(*v);
            let mut p = self.scores(z);
            let max = p.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            p.iter_mut().for_each(|s| *s = (*s - max).exp());
            let total: f64 = p.iter().sum();
            for (class, p) in p.into_iter().enumerate() {
                let target = f64::from(u8::from(labels[*v as usize] as usize == class));
                let error = share * (p / total - target);
                let grad = &mut grad[class * width..][..width];
                grad.iter_mut().zip(z).for_each(|(g, z)| *g += error * z);
                grad[self.h] += error;
            }
        }
        self.steps += 1;
        let (c1, c2) = (
            1.0 - 0.9f64.powi(self.steps),
            1.0 - 0.999f64.powi(self.steps),
        );
        for (i, g) in grad.into_iter().enumerate() {
            self.first[i] = 0.9 * self.first[i] + 0.1 * g;
            self.second[i] = 0.999 * self.second[i] + 0.001 * g * g;
            let move_by = (self.first[i] / c1) / ((self.second[i] / c2).sqrt() + 1e-8);
            self.weights[i] -= config.lr * move_by;
        }
    }
}
