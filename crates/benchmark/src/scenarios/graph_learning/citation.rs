//! Citation networks for scenarios: generated, or Cora from a folder.

use crate::scenario::TrialContext;
use crate::Result;
use graph_learning::generate::{citation_network, CitationConfig};
use graph_learning::io::{planetoid, NodeData};
use graph_learning::sparse::Features;
use graph_learning::split::random_per_class;

/// A network with row-normalized features and a split: Cora with its public split where the trial has a
/// folder, otherwise a generated one of a third of its size, with 20 training nodes a class, 200 for
/// validation and 400 for testing. Only the seed decides what is generated.
///
/// # Errors
/// [`Error::Graph`](crate::Error::Graph) when files are missing or damaged.
pub(super) fn citations(trial: &TrialContext) -> Result<NodeData> {
    let mut data = match &trial.data {
        Some(folder) => planetoid(folder.join("graphs").join("cora"), "cora")?,
        None => {
            let config = CitationConfig::default();
            let mut data = citation_network(config, &mut trial.stream("network"))?;
            let rng = &mut trial.stream("split");
            data.split = Some(random_per_class(
                &data.y,
                data.classes,
                20,
                (200, 400),
                rng,
            )?);
            data
        }
    };
    if let Features::Sparse(x) = &data.x {
        data.x = x.normalize_rows(false)?.into();
    }
    Ok(data)
}
