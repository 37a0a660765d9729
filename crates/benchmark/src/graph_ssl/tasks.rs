//! Tasks on frozen embeddings.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::ops::sigmoid;
use candle_nn::{Activation, Module, Optimizer};
use graph_learning::contrastive::{linear_probe, ProbeConfig, ProbeReport};
use graph_learning::conv::{dropout, Mlp};
use graph_learning::io::NodeData;
use graph_learning::metrics::{
    adjusted_rand_index, average_precision, kmeans, normalized_mutual_information, roc_auc,
};
use graph_learning::sample::negative::{negative_sampling, Negatives};
use graph_learning::split::{LinkPart, LinkSplit};
use graph_learning::ssl::{LinkScorer, SslMethod};
use nn::goodness::logistic_loss;
use nn::init::SeededVars;
use optim::{AdamW, AdamWConfig, ParamGroup, WeightDecay};
use tensor_core::random::RandomStream;

/// L2 penalties of the probe, chosen by validation accuracy.
const PENALTIES: [f64; 3] = [0.0, 1e-3, 1e-2];
const RESTARTS: usize = 10;

/// Columns centered, rows of norm 1.
///
/// # Errors
/// Those of candle.
pub fn embedding_for_probe(z: &Tensor) -> Result<Tensor> {
    let z = z.to_dtype(DType::F64)?;
    let z = z.broadcast_sub(&z.mean_keepdim(0)?)?;
    let norms = (z.sqr()?.sum_keepdim(1)?.sqrt()? + 1e-12)?;
    Ok(z.broadcast_div(&norms)?)
}

/// Logistic regression at one penalty.
pub(super) fn probe(
    z: &Tensor,
    data: &NodeData,
    wd: f64,
    rng: &mut RandomStream,
) -> Result<ProbeReport> {
    let split = data.split.as_ref();
    let split = split.ok_or_else(|| Error::Trial("the data has no split".into()))?;
    let config = ProbeConfig {
        epochs: 300,
        lr: 0.1,
        wd,
        val_every: 10,
    };
    Ok(linear_probe(z, &data.y, data.classes, split, config, rng)?)
}

/// A linear probe on the data's split; validation nodes choose its penalty and its step.
///
/// # Errors
/// Those of the probe.
pub fn node_classification(
    z: &Tensor,
    data: &NodeData,
    rng: &mut RandomStream,
) -> Result<ProbeReport> {
    let z = embedding_for_probe(z)?;
    let mut best: Option<ProbeReport> = None;
    for wd in PENALTIES {
        let found = probe(&z, data, wd, &mut rng.split("start"))?;
        if best
            .as_ref()
            .is_none_or(|b| found.val_accuracy > b.val_accuracy)
        {
            best = Some(found);
        }
    }
    best.ok_or_else(|| Error::Trial("no probe was trained".into()))
}

/// K-means with as many clusters as classes.
pub(super) fn kmeans_labels(
    z: &Tensor,
    classes: usize,
    rng: &mut RandomStream,
) -> Result<Vec<u32>> {
    let z = embedding_for_probe(z)?;
    let d = z.dims()[1];
    let rows = z.flatten_all()?.to_vec1::<f64>()?;
    Ok(kmeans(&rows, d, classes, RESTARTS, rng)?.labels)
}

/// Normalized mutual information and adjusted Rand index of k-means with the labels.
///
/// # Errors
/// Those of k-means.
pub fn cluster(z: &Tensor, data: &NodeData, rng: &mut RandomStream) -> Result<(f64, f64)> {
    let found = kmeans_labels(z, data.classes, rng)?;
    Ok((
        normalized_mutual_information(&data.y, &found)?,
        adjusted_rand_index(&data.y, &found)?,
    ))
}

/// Settings of the perceptron that scores links.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkProbe {
    /// Width of its hidden layer.
    pub hidden: usize,
    /// Probability that a hidden entry is dropped.
    pub dropout: f64,
    /// Learning rate of Adam.
    pub lr: f64,
    /// L2 penalty.
    pub wd: f64,
    /// Passes over all training links.
    pub epochs: usize,
    /// Looks at the validation links happen every so many passes.
    pub val_every: usize,
    /// Nodes that are embedded at a time; all for `None`.
    pub embedded: Option<usize>,
}

impl Default for LinkProbe {
    fn default() -> Self {
        Self {
            hidden: 256,
            dropout: 0.5,
            lr: 0.01,
            wd: 1e-5,
            epochs: 60,
            val_every: 10,
            embedded: None,
        }
    }
}

/// How well test links are told from other pairs.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkScores {
    /// Area under the ROC curve.
    pub auc: f64,
    /// Average precision.
    pub average_precision: f64,
}

/// All pairs of a part and which of them are edges.
fn pairs(part: &LinkPart) -> (Vec<(u32, u32)>, Vec<bool>) {
    let all = part
        .positive
        .iter()
        .chain(&part.negative)
        .copied()
        .collect();
    let count = part.positive.len() + part.negative.len();
    (all, (0..count).map(|i| i < part.positive.len()).collect())
}

fn ends(pairs: &[(u32, u32)]) -> Result<(Tensor, Tensor)> {
    let (u, v): (Vec<u32>, Vec<u32>) = pairs.iter().copied().unzip();
    let n = pairs.len();
    Ok((
        Tensor::from_vec(u, n, &Device::Cpu)?,
        Tensor::from_vec(v, n, &Device::Cpu)?,
    ))
}

/// `h_u * h_v` `[pairs, d]`.
fn products(z: &Tensor, pairs: &[(u32, u32)]) -> Result<Tensor> {
    let (u, v) = ends(pairs)?;
    Ok((z.index_select(&u, 0)? * z.index_select(&v, 0)?)?)
}

fn numbers(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// The area of dot products, without training.
pub(super) fn dot_auc(z: &Tensor, part: &LinkPart) -> Result<f64> {
    let (all, known) = pairs(part);
    Ok(roc_auc(&numbers(&products(z, &all)?.sum(1)?)?, &known)?)
}

/// Scores of the test links by the method's own way.
///
/// # Errors
/// Those of the probe.
pub fn link_prediction(
    method: &dyn SslMethod,
    data: &NodeData,
    links: &LinkSplit,
    config: &LinkProbe,
    rng: &mut RandomStream,
) -> Result<LinkScores> {
    let (test, known) = pairs(&links.test);
    let scores = match method.link_scorer() {
        LinkScorer::Dot => {
            let z = method.embed(&data.graph, &data.x, config.embedded)?;
            numbers(&sigmoid(&products(&z, &test)?.sum(1)?)?)?
        }
        LinkScorer::CrossLayer => {
            let own = method.score_links(&data.graph, &data.x, &test)?;
            numbers(&own.ok_or_else(|| Error::Trial("the method scores no links".into()))?)?
        }
        LinkScorer::Mlp => {
            let z = method.embed(&data.graph, &data.x, config.embedded)?;
            trained_scores(&z, links, &test, config, rng)?
        }
    };
    Ok(LinkScores {
        auc: roc_auc(&scores, &known)?,
        average_precision: average_precision(&scores, &known)?,
    })
}

/// A perceptron on products, trained on the training links against fresh non-edges, at its best on the
/// validation links.
fn trained_scores(
    z: &Tensor,
    links: &LinkSplit,
    test: &[(u32, u32)],
    config: &LinkProbe,
    rng: &mut RandomStream,
) -> Result<Vec<f64>> {
    let z = embedding_for_probe(z)?.to_dtype(DType::F32)?;
    let vars = SeededVars::new(&rng.split("weights"));
    let vb = vars.builder(DType::F32, &Device::Cpu);
    let d = z.dims()[1];
    let first = Mlp::new(&[d, config.hidden], Activation::Relu, vb.pp("first"))?
        .with_last(Activation::Relu);
    let last = Mlp::new(&[config.hidden, 1], Activation::Relu, vb.pp("last"))?;
    let adam = AdamWConfig {
        weight_decay: config.wd,
        decay: WeightDecay::Coupled,
        ..AdamWConfig::adam(config.lr)
    };
    let mut adam = AdamW::with_groups(vec![ParamGroup::named(vars.trainable(), adam)])?;
    let score = |pairs: &[(u32, u32)]| -> Result<Vec<f64>> {
        numbers(&last.forward(&first.forward(&products(&z, pairs)?)?)?)
    };
    let (val, val_known) = pairs(&links.val);
    let edges = &links.train.positive;
    let mut best: Option<(f64, Vec<f64>)> = None;
    for epoch in 0..config.epochs {
        let how = Negatives {
            undirected: true,
            ..Negatives::default()
        };
        let others = negative_sampling(&links.test.message_graph, edges.len(), how, rng)?;
        let batch: Vec<(u32, u32)> = edges.iter().chain(&others).copied().collect();
        let targets: Vec<f32> = (0..batch.len())
            .map(|i| if i < edges.len() { 1.0 } else { 0.0 })
            .collect();
        let h = first.forward(&products(&z, &batch)?)?;
        let h = dropout(&h, config.dropout, Some(rng))?;
        let logits = last.forward(&h)?.squeeze(1)?;
        let targets = Tensor::from_vec(targets, batch.len(), &Device::Cpu)?;
        adam.step(&logistic_loss(&logits, &targets)?.backward()?)?;
        if (epoch + 1).is_multiple_of(config.val_every) || epoch + 1 == config.epochs {
            let area = roc_auc(&score(&val)?, &val_known)?;
            if best.as_ref().is_none_or(|(b, _)| area > *b) {
                best = Some((area, score(test)?));
            }
        }
    }
    let best = best.ok_or_else(|| Error::Trial("no link probe was trained".into()))?;
    Ok(best.1)
}
