//! Which nodes are trained reliably.

use super::score::{anchor_direction, Intervals, Pot, PotConfig, PotInputs, PotScore};
use crate::contrastive::GcnEncoder;
use crate::Result;
use candle_core::{DType, Tensor};

/// Compactness of every node of one view.
#[derive(Debug, Clone, PartialEq)]
pub struct CompactnessReport {
    /// The certified lower bound of each node.
    pub lower: Vec<f64>,
    /// What it bounds, on this view: `<w_i, z_i>`.
    pub actual: Vec<f64>,
    /// Share of the nodes whose bound is positive: closer to themselves than to the rest, whatever is
    /// dropped.
    pub fraction_positive: f64,
    /// Degree in the whole graph, number of nodes of this degree, and their mean bound; ascending.
    pub by_degree: Vec<(u32, usize, f64)>,
}

/// Audits an encoder on the view of `inputs`: sound intervals and the certified score, for all nodes or
/// those of `inputs`.
///
/// # Errors
/// As [`Pot::score`].
pub fn node_compactness(encoder: &GcnEncoder, inputs: &PotInputs) -> Result<CompactnessReport> {
    let config = PotConfig {
        score: PotScore::Certified,
        intervals: Intervals::Sound,
        ..PotConfig::default()
    };
    let lower = host(&Pot::new(config)?.score(encoder, inputs)?)?;
    let index = match inputs.nodes {
        Some(nodes) => Some(Tensor::from_slice(
            nodes,
            nodes.len(),
            inputs.other.device(),
        )?),
        None => None,
    };
    let direction = anchor_direction(inputs.other, index.as_ref())?;
    let z = encoder.forward(inputs.view, inputs.x)?;
    let z = match &index {
        Some(index) => z.index_select(index, 0)?,
        None => z,
    };
    let actual = host(&(direction * z)?.sum(1)?)?;
    let degrees = inputs.graph.in_degrees();
    let node = |i: usize| inputs.nodes.map_or(i, |nodes| nodes[i] as usize);
    let mut by_degree: Vec<(u32, usize, f64)> = Vec::new();
    let mut pairs: Vec<(u32, f64)> = lower
        .iter()
        .enumerate()
        .map(|(i, s)| (degrees[node(i)], *s))
        .collect();
    pairs.sort_by_key(|p| p.0);
    for (degree, score) in pairs {
        match by_degree.last_mut() {
            Some((d, count, sum)) if *d == degree => {
                *count += 1;
                *sum += score;
            }
            _ => by_degree.push((degree, 1, score)),
        }
    }
    by_degree
        .iter_mut()
        .for_each(|(_, count, sum)| *sum /= *count as f64);
    let positive = lower.iter().filter(|s| **s > 0.0).count();
    Ok(CompactnessReport {
        fraction_positive: positive as f64 / lower.len().max(1) as f64,
        lower,
        actual,
        by_degree,
    })
}

fn host(t: &Tensor) -> Result<Vec<f64>> {
    Ok(t.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}
