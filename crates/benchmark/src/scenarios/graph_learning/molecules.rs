//! Graphs with a class each: MUTAG and PROTEINS from a folder, or generated molecules.

use crate::scenario::TrialContext;
use crate::Result;
use candle_core::{DType, Device, Tensor};
use graph_learning::io::tu_dataset;
use graph_learning::{Graph, GraphBatch};
use std::path::Path;
use tensor_core::random::RandomStream;

/// Generated graphs, half of each class.
const MOLECULES: usize = 160;
/// Nitrogens, and oxygens, of each.
const PAIRS: usize = 3;

/// Graphs with a class each, and features of their nodes.
pub(super) struct Labeled {
    pub graphs: Vec<Graph>,
    pub x: Vec<Tensor>,
    pub y: Vec<u32>,
}

impl Labeled {
    /// MUTAG from the trial's folder, or generated ones.
    ///
    /// # Errors
    /// Those of the files.
    pub fn new(trial: &TrialContext) -> Result<Self> {
        if let Some(folder) = &trial.data {
            return Self::read(folder, "MUTAG");
        }
        let mut rng = trial.stream("molecules");
        let mut drawn = Self {
            graphs: Vec::with_capacity(MOLECULES),
            x: Vec::with_capacity(MOLECULES),
            y: Vec::with_capacity(MOLECULES),
        };
        for i in 0..MOLECULES {
            let bonded = i % 2 == 1;
            let (graph, x) = molecule(bonded, &mut rng)?;
            drawn.graphs.push(graph);
            drawn.x.push(x.to_device(&trial.device)?);
            drawn.y.push(u32::from(bonded));
        }
        Ok(drawn)
    }

    /// A set of the folder.
    ///
    /// # Errors
    /// Those of the files.
    pub fn read(folder: &Path, name: &str) -> Result<Self> {
        let own = folder.join("graphs").join(name.to_lowercase());
        let read = tu_dataset(own, name)?;
        // Labels of nodes alone, as is usual.
        let labels = |x: &Tensor| {
            let (from, all) = (read.num_node_attributes, x.dims2()?.1);
            x.narrow(1, from, all - from)
        };
        Ok(Self {
            x: read
                .x
                .iter()
                .map(labels)
                .collect::<candle_core::Result<_>>()?,
            graphs: read.graphs,
            y: read.y,
        })
    }

    /// Number of features, and of classes.
    pub fn sizes(&self) -> (usize, usize) {
        let classes = self.y.iter().max().map_or(2, |c| *c as usize + 1);
        (self.x.first().map_or(1, |x| x.dims()[1]), classes)
    }

    /// Some graphs side by side, with the features of their nodes and their classes.
    ///
    /// # Errors
    /// Those of the batch.
    pub fn batch(&self, ids: &[u32], trial: &TrialContext) -> Result<(GraphBatch, Tensor, Tensor)> {
        let of = |i: &u32| self.graphs[*i as usize].clone();
        let graphs: Vec<Graph> = ids.iter().map(of).collect();
        let xs: Vec<&Tensor> = ids.iter().map(|i| &self.x[*i as usize]).collect();
        let y: Vec<u32> = ids.iter().map(|i| self.y[*i as usize]).collect();
        Ok((
            Graph::batch(&graphs)?,
            Tensor::cat(&xs, 0)?.to_device(&trial.device)?,
            Tensor::from_vec(y, ids.len(), &trial.device)?,
        ))
    }
}

/// What is in all folds but one.
pub(super) fn others(folds: &[Vec<u32>], fold: usize) -> Vec<u32> {
    let rest = folds.iter().enumerate().filter(|(g, _)| *g != fold);
    rest.flat_map(|(_, fold)| fold.clone()).collect()
}

/// A ring of 10 to 18 carbons with three nitrogens and three oxygens, one-hot: each nitrogen carries an
/// oxygen, as in a nitro group, or all six hang from carbons of their own. Both kinds have as many atoms
/// of each element and as many bonds.
fn molecule(bonded: bool, rng: &mut RandomStream) -> Result<(Graph, Tensor)> {
    let carbons = 10 + rng.below(9)?;
    let mut sites: Vec<u32> = (0..carbons as u32).collect();
    rng.shuffle(&mut sites)?;
    let mut bonds: Vec<(u32, u32)> = (0..carbons)
        .map(|v| (v as u32, ((v + 1) % carbons) as u32))
        .collect();
    let mut elements = vec![0u32; carbons];
    for pair in 0..PAIRS {
        let nitrogen = elements.len() as u32;
        let oxygen = nitrogen + 1;
        elements.extend([1, 2]);
        bonds.push((sites[2 * pair], nitrogen));
        let site = if bonded {
            nitrogen
        } else {
            sites[2 * pair + 1]
        };
        bonds.push((site, oxygen));
    }
    let (from, to): (Vec<u32>, Vec<u32>) = bonds.into_iter().unzip();
    let (src, dst) = ([&*from, &*to].concat(), [&*to, &*from].concat());
    let graph = Graph::from_edges(elements.len(), src, dst)?;
    let x = Tensor::eye(3, DType::F32, &Device::Cpu)?;
    let elements = Tensor::from_vec(elements, graph.num_nodes(), &Device::Cpu)?;
    Ok((graph, x.index_select(&elements, 0)?))
}
