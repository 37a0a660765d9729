//! Bounds, relaxations, scores and losses of node compactness.

use super::{compare_gradients, edge_list, indices, tensor, var, Weights};
use crate::contrastive::pot::{
    anchor_direction, combined, ActivationIntervals, AdjacencyBounds, Budget, Intervals, Pot,
    PotConfig, PotInputs, PotScore,
};
use crate::contrastive::{ContrastiveObjective, EncoderActivation, GcnEncoder, Grace, GraceConfig};
use crate::graph::Graph;
use crate::sparse::Features;
use crate::{RandomStream, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use std::collections::HashMap;
use tensor_core::verify::{Reference, Tolerance};

const TOLERANCE: Tolerance = Tolerance::Mixed(1e-9);

/// What all checks share.
struct Setup {
    x: Features,
    graph: Graph,
    views: [Graph; 2],
    bounds: AdjacencyBounds,
    nodes: Vec<u32>,
    weights: [(String, Var); 4],
    encoder: GcnEncoder,
    tau: f64,
}

/// Checks every tensor of the file.
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn pot(reference: &mut Reference) -> Result<()> {
    let setup = Setup::read(reference)?;
    bounds(reference, &setup)?;
    let z = [setup.embed(0)?, setup.embed(1)?];
    for (i, z) in z.iter().enumerate() {
        reference.compare_tensor(&format!("z_view{}", i + 1), z, TOLERANCE)?;
    }
    intervals(reference, &setup)?;
    published(reference, &setup, &z)?;
    certified(reference, &setup, &z)?;
    contrastive(reference, &setup, &z)
}

impl Setup {
    fn read(reference: &mut Reference) -> Result<Self> {
        let x = tensor(reference, "x")?;
        let n = x.dims()[0];
        let graph = edge_list(reference, "edge_index", n)?;
        let view = |reference: &mut Reference, name: &str| -> Result<Graph> {
            let keep = reference.input(name)?.values;
            let kept = (0..keep.len()).filter(|e| keep[*e] != 0.0);
            graph.select_edges(&kept.map(|e| e as u32).collect::<Vec<_>>())
        };
        let views = [
            view(reference, "edge_keep_1")?,
            view(reference, "edge_keep_2")?,
        ];
        let rate: f64 = reference.number("drop_rate")?;
        let mut read =
            |name: &str| Ok::<_, crate::Error>((name.to_string(), var(reference, name)?));
        let weights = [read("W1")?, read("b1")?, read("W2")?, read("b2")?];
        let [w1, b1, w2, b2] = weights.each_ref().map(|(_, v)| v);
        let mut tensors = HashMap::from([
            ("conv.0.lin.weight".to_string(), w1.t()?.contiguous()?),
            ("conv.0.bias".to_string(), b1.as_tensor().clone()),
            ("conv.1.lin.weight".to_string(), w2.t()?.contiguous()?),
            ("conv.1.bias".to_string(), b2.as_tensor().clone()),
        ]);
        let trained = reference.text("activation")? == "prelu";
        if trained {
            let slope: f64 = reference.number("negative_slope")?;
            tensors.insert("act.weight".into(), Tensor::new(&[slope], &Device::Cpu)?);
        }
        let vb = VarBuilder::from_tensors(tensors, DType::F64, &Device::Cpu);
        let activation = match trained {
            true => EncoderActivation::prelu(vb.pp("act"))?,
            false => EncoderActivation::Relu,
        };
        Ok(Self {
            encoder: GcnEncoder::new(x.dims()[1], w2.dims()[1], activation, vb)?,
            bounds: AdjacencyBounds::from_graph(&graph, Budget::Rate(rate))?,
            x: x.into(),
            graph,
            views,
            nodes: indices(reference, "nodes")?,
            weights,
            tau: reference.number("tau")?,
        })
    }

    fn embed(&self, view: usize) -> Result<Tensor> {
        self.encoder.forward(&self.views[view], &self.x)
    }

    fn inputs<'a>(&'a self, view: usize, other: &'a Tensor, all: bool) -> PotInputs<'a> {
        PotInputs {
            x: &self.x,
            graph: &self.graph,
            view: &self.views[view],
            other,
            bounds: &self.bounds,
            nodes: (!all).then_some(self.nodes.as_slice()),
        }
    }

    fn index(&self) -> Result<Tensor> {
        Ok(Tensor::from_slice(
            &self.nodes,
            self.nodes.len(),
            &Device::Cpu,
        )?)
    }
}

fn bounds(reference: &mut Reference, setup: &Setup) -> Result<()> {
    let (upper, lower) = setup.bounds.to_dense()?;
    reference.compare_tensor("A_upper", &upper, TOLERANCE)?;
    reference.compare_tensor("A_lower", &lower, TOLERANCE)?;
    let deletions: Vec<f64> = setup
        .bounds
        .max_delete()
        .iter()
        .map(|m| *m as f64)
        .collect();
    reference.compare("max_delete", &deletions, TOLERANCE)?;
    Ok(())
}

fn intervals(reference: &mut Reference, setup: &Setup) -> Result<()> {
    let (some, index) = (setup.bounds.restrict(&setup.nodes)?, setup.index()?);
    let find = |bounds: &AdjacencyBounds, index: Option<&Tensor>, kind| {
        ActivationIntervals::new(&setup.encoder, &setup.x, &setup.graph, bounds, index, kind)
    };
    let published = find(&some, Some(&index), Intervals::Published)?;
    let sound = find(&setup.bounds, None, Intervals::Sound)?;
    for (prefix, found) in [("", published), ("sound_", sound)] {
        for (layer, (low, high)) in [("p1", &found.first), ("p2", &found.second)] {
            reference.compare_tensor(&format!("{prefix}{layer}L"), low, TOLERANCE)?;
            reference.compare_tensor(&format!("{prefix}{layer}U"), high, TOLERANCE)?;
        }
    }
    Ok(())
}

fn published(reference: &mut Reference, setup: &Setup, z: &[Tensor; 2]) -> Result<()> {
    let pot = Pot::new(PotConfig::default())?;
    let index = setup.index()?;
    let direction = anchor_direction(&z[1], Some(&index))?;
    reference.compare_tensor("Wcl", &direction, TOLERANCE)?;
    let inputs = setup.inputs(0, &z[1], false);
    let terms = pot.published(&setup.encoder, &inputs)?;
    let wt1 = terms.lambda1.matmul(setup.encoder.layers()[0].weight())?;
    for (name, value) in [
        ("Wt2", &terms.wt2),
        ("bt2", &terms.bt2),
        ("Wt1", &wt1),
        ("bt1", &terms.bt1),
        ("pot_score", &terms.score),
    ] {
        reference.compare_tensor(name, value, TOLERANCE)?;
    }
    let loss = pot.loss(&setup.encoder, &inputs)?;
    reference.compare_tensor("pot_loss", &loss, TOLERANCE)?;
    let grads: Vec<(String, &Var)> = setup
        .weights
        .iter()
        .map(|(name, var)| (format!("pot_grad_{name}"), var))
        .collect();
    compare_gradients(reference, &loss, &grads, TOLERANCE)?;
    let back = pot.loss(&setup.encoder, &setup.inputs(1, &z[0], false))?;
    reference.compare_tensor("pot_loss_dir2", &back, TOLERANCE)?;
    Ok(())
}

fn certified(reference: &mut Reference, setup: &Setup, z: &[Tensor; 2]) -> Result<()> {
    let direction = anchor_direction(&z[1], None)?;
    reference.compare_tensor("Wcl_full", &direction, TOLERANCE)?;
    let actual = (direction * &z[0])?.sum(1)?;
    reference.compare_tensor("true_score", &actual, TOLERANCE)?;
    let config = PotConfig {
        score: PotScore::Certified,
        intervals: Intervals::Sound,
        ..PotConfig::default()
    };
    let score = Pot::new(config)?.score(&setup.encoder, &setup.inputs(0, &z[1], true))?;
    reference.compare_tensor("edgewise_score", &score, TOLERANCE)?;
    Ok(())
}

fn contrastive(reference: &mut Reference, setup: &Setup, z: &[Tensor; 2]) -> Result<()> {
    let mut weights = Weights::default();
    for (layer, place) in [("fc1", 0), ("fc2", 2)] {
        for (part, name) in [("W", "weight"), ("b", "bias")] {
            let var = var(reference, &format!("{layer}_{part}"))?;
            weights.0.insert(format!("{place}.{name}"), var);
        }
    }
    let proj = weights.0.get("0.bias").map_or(1, |b| b.elem_count());
    let hidden = z[0].dims()[1];
    let grace = |batch| {
        let config = GraceConfig {
            tau: setup.tau,
            batch,
            anchors: None,
        };
        Grace::new(hidden, proj, config, weights.builder())
    };
    let z1 = Var::from_tensor(&z[0].detach())?;
    let z2 = Var::from_tensor(&z[1].detach())?;
    // All nodes, so that nothing is drawn.
    let rng = &mut RandomStream::new(0);
    let semi = grace(None)?.one_way(&z1, &z2, None)?;
    reference.compare_tensor("nce_semi_1to2", &semi, TOLERANCE)?;
    let nce = grace(None)?.loss(&z1, &z2, rng)?;
    reference.compare_tensor("nce_loss", &nce, TOLERANCE)?;
    let batched = grace(Some(4))?.loss(&z1, &z2, rng)?;
    reference.compare_tensor("nce_loss_batched", &batched, TOLERANCE)?;
    let grads = [
        ("nce_grad_z1".to_string(), &z1),
        ("nce_grad_z2".to_string(), &z2),
    ];
    compare_gradients(reference, &nce, &grads, TOLERANCE)?;
    let pot = Pot::new(PotConfig {
        kappa: reference.number("kappa")?,
        ..PotConfig::default()
    })?;
    let term = |view: usize| {
        let inputs = setup.inputs(view, &z[1 - view], false);
        pot.loss(&setup.encoder, &inputs)
    };
    let total = combined(&nce, &term(0)?, &term(1)?, pot.config().kappa)?;
    reference.compare_tensor("total_loss", &total, TOLERANCE)?;
    Ok(())
}
