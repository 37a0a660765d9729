//! A graph convolutional network on a citation network in Planetoid's format.
//!
//! `cargo run --example planetoid -- FOLDER NAME [SEEDS]`, where `FOLDER` holds `ind.NAME.*`: two layers
//! of 16 and C features, dropout 0.5, Adam at 0.01 with a penalty of 5e-4 on the first layer, 120 epochs,
//! the test accuracy at the best validation accuracy.
#![allow(clippy::print_stdout)]

use candle_core::{DType, Device, Tensor};
use candle_nn::Optimizer;
use nn::init::SeededVars;
use nn::loss::{cross_entropy, Reduction};
use optim::{AdamW, AdamWConfig, ParamGroup, WeightDecay};
use std::time::Instant;
use thalweg_graph_learning::conv::{dropout, GcnConfig, GcnConv};
use thalweg_graph_learning::io::{planetoid, NodeData};
use thalweg_graph_learning::sparse::{Features, SparseFeatures};
use thalweg_graph_learning::RandomStream;

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, name, rest @ ..] = arguments.as_slice() else {
        return Err("expected FOLDER NAME [SEEDS]".into());
    };
    let seeds = rest.first().map_or(Ok(1), |s| s.parse())?;
    let data = planetoid(folder, name)?;
    let Features::Sparse(x) = &data.x else {
        return Err("expected sparse features".into());
    };
    println!(
        "{:?}, {} features, {} classes",
        data.graph,
        x.cols(),
        data.classes
    );
    let x = x.normalize_rows(true)?;
    for seed in 0..seeds {
        let start = Instant::now();
        let accuracy = train(&data, &x, seed)?;
        println!(
            "seed {seed}: test accuracy {accuracy:.3}, {:.1?}",
            start.elapsed()
        );
    }
    Ok(())
}

/// A random mask over the entries that are stored.
fn drop_entries(x: &SparseFeatures, p: f64, rng: &mut RandomStream) -> Result<Features, Failure> {
    let mut draws = vec![0.0; x.len()];
    rng.fill_uniform(&mut draws);
    let keep: Vec<f64> = draws
        .iter()
        .map(|u| f64::from(u8::from(*u >= p)) / (1.0 - p))
        .collect();
    Ok(x.scale_entries(&keep)?.into())
}

fn train(data: &NodeData, x: &SparseFeatures, seed: u64) -> Result<f64, Failure> {
    let device = &Device::Cpu;
    let root = RandomStream::new(seed);
    let vars = SeededVars::new(&root.split("weights"));
    let vb = vars.builder(DType::F32, device);
    let first = GcnConv::new(x.cols(), 16, GcnConfig::default(), vb.pp("conv1"))?;
    let second = GcnConv::new(16, data.classes, GcnConfig::default(), vb.pp("conv2"))?;
    let (decayed, free): (Vec<_>, Vec<_>) = vars
        .trainable()
        .into_iter()
        .partition(|(n, _)| n.starts_with("conv1"));
    let config = |weight_decay| AdamWConfig {
        lr: 0.01,
        weight_decay,
        decay: WeightDecay::Coupled,
        ..AdamWConfig::default()
    };
    let groups = vec![
        ParamGroup::named(decayed, config(5e-4)),
        ParamGroup::named(free, config(0.0)),
    ];
    let mut adam = AdamW::with_groups(groups)?;
    let split = data.split.as_ref().ok_or("the files have a split")?;
    let labels = Tensor::from_slice(&data.y, data.y.len(), device)?;
    let train = Tensor::from_slice(&split.train, split.train.len(), device)?;
    let targets = labels.index_select(&train, 0)?;
    let accuracy = |logits: &Tensor, nodes: &[u32]| -> Result<f64, Failure> {
        let classes = logits.argmax(1)?.to_vec1::<u32>()?;
        let right = nodes
            .iter()
            .filter(|v| classes[**v as usize] == data.y[**v as usize]);
        Ok(right.count() as f64 / nodes.len().max(1) as f64)
    };
    let rng = &mut root.split("dropout");
    let (mut best, mut found) = (0.0, 0.0);
    for _ in 0..120 {
        let h = first
            .apply(&data.graph, &drop_entries(x, 0.5, rng)?, None)?
            .relu()?;
        let h = dropout(&h, 0.5, Some(rng))?;
        let logits = second.forward(&data.graph, &h)?.index_select(&train, 0)?;
        adam.backward_step(&cross_entropy(&logits, &targets, Reduction::Mean)?)?;
        let h = first.apply(&data.graph, &x.clone().into(), None)?.relu()?;
        let logits = second.forward(&data.graph, &h)?;
        let val = accuracy(&logits, &split.val)?;
        if val > best {
            (best, found) = (val, accuracy(&logits, &split.test)?);
        }
    }
    Ok(found)
}
