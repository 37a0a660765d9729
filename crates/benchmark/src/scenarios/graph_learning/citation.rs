//! Citation networks for scenarios: generated, or Cora from a folder.

use crate::scenario::{TrialContext, TrialOutcome};
use crate::Result;
use graph_learning::generate::{citation_network, CitationConfig};
use graph_learning::io::{planetoid, NodeData};
use graph_learning::sparse::Features;
use graph_learning::split::random_per_class;
use std::path::Path;

/// A network with row-normalized features and a split: Cora with its public split where the trial has a
/// folder, otherwise a generated one of a third of its size, with 20 training nodes a class, 200 for
/// validation and 400 for testing. Only the seed decides what is generated.
///
/// # Errors
/// [`Error::Graph`](crate::Error::Graph) when files are missing or damaged.
pub(super) fn citations(trial: &TrialContext) -> Result<NodeData> {
    let mut data = match &trial.data {
        Some(folder) => return real(folder, "cora"),
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
    normalize(&mut data)?;
    Ok(data)
}

fn real(folder: &Path, name: &str) -> Result<NodeData> {
    let mut data = planetoid(folder.join("graphs").join(name), name)?;
    normalize(&mut data)?;
    Ok(data)
}

fn normalize(data: &mut NodeData) -> Result<()> {
    if let Features::Sparse(x) = &data.x {
        data.x = x.normalize_rows(false)?.into();
    }
    Ok(())
}

/// A trial on [`citations`], and where it has a folder on CiteSeer too: of that, the metrics in `also` are
/// kept, under the second of their names.
///
/// # Errors
/// Those of the files and of `run`.
pub(super) fn on_citations(
    trial: &TrialContext,
    also: &[(&str, &'static str)],
    run: impl Fn(NodeData) -> Result<TrialOutcome>,
) -> Result<TrialOutcome> {
    let mut outcome = run(citations(trial)?)?;
    if let Some(folder) = &trial.data {
        let second = run(real(folder, "citeseer")?)?;
        for (metric, name) in also {
            if let Some(value) = second.metrics.get(*metric) {
                outcome = outcome.metric(name, *value);
            }
        }
    }
    Ok(outcome)
}
