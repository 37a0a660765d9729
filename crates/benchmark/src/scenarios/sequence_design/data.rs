//! Data that the scenarios of sequences share.

use crate::scenario::TrialContext;
use crate::Result;
use datasets::generate::binding_table;
use datasets::load::tfbind::BindingTable;
use datasets::DataDir;

/// Scores of all DNA 8-mers: measured ones where the trial has a data folder, otherwise generated.
///
/// # Errors
/// [`Error::Datasets`] when files are missing or damaged.
pub fn binding(trial: &TrialContext) -> Result<BindingTable> {
    match &trial.data {
        Some(folder) => Ok(DataDir::new(folder)?.binding(datasets::data_dir::TFBIND8)?),
        None => Ok(binding_table(&mut trial.stream("landscape"))?),
    }
}
