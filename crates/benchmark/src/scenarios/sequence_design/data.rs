//! Data that the scenarios of sequences share.

use crate::scenario::TrialContext;
use crate::{Error, Result};
use datasets::load::tfbind::BindingTable;
use datasets::DataDir;

/// Scores of all DNA 8-mers: measured ones where the trial has a data folder, otherwise generated.
///
/// # Errors
/// [`Error::Datasets`] when files are missing or damaged.
pub fn binding(trial: &TrialContext) -> Result<BindingTable> {
    match &trial.data {
        Some(folder) => Ok(DataDir::new(folder)?.binding(datasets::data_dir::TFBIND8)?),
        None => generated(trial),
    }
}

/// A factor that binds a motif of six letters on either strand: each wrong letter costs an energy
/// between 0.5 and 1.5 of its place, the best place counts, `exp(-energy / 2)` with noise of a
/// tenth for each pair of strands.
fn generated(trial: &TrialContext) -> Result<BindingTable> {
    const MOTIF: usize = 6;
    let mut rng = trial.stream("landscape");
    let mut motif = vec![];
    for _ in 0..MOTIF {
        motif.push((rng.below(4)? as u8, 0.5 + rng.next_uniform()));
    }
    let energy = |sequence: &[u8; 8]| {
        let at = |offset: usize| -> f64 {
            let pairs = sequence[offset..].iter().zip(&motif);
            pairs
                .map(|(s, (m, cost))| if s == m { 0.0 } else { *cost })
                .sum()
        };
        (0..=8 - MOTIF).map(at).fold(f64::INFINITY, f64::min)
    };
    let mut table = BindingTable::default();
    for code in 0u32..1 << 16 {
        let sequence: [u8; 8] = std::array::from_fn(|i| (code >> (14 - 2 * i) & 3) as u8);
        let mut other = sequence.map(|c| 3 - c);
        other.reverse();
        if other < sequence {
            continue;
        }
        let best = energy(&sequence).min(energy(&other));
        let score = (-0.5 * best).exp() + 0.1 * rng.next_normal();
        table.sequences.push(sequence);
        table.scores.push(score);
        if other != sequence {
            table.sequences.push(other);
            table.scores.push(score);
        }
    }
    if table.scores.len() != 1 << 16 {
        return Err(Error::Trial(format!(
            "{} generated 8-mers",
            table.scores.len()
        )));
    }
    Ok(table)
}
