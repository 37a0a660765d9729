//! Cutting the coordinates into fixed blocks.

use super::{FixedRule, SmoothObjective};
use crate::error::check;
use crate::linalg::argsort;
use crate::{Error, Result};

/// The blocks of a rule, of `size` coordinates each; the last is shorter where that does not divide.
///
/// # Errors
/// [`Error::InvalidConfig`] for a size of 0, or given blocks in which a coordinate is missing or
/// occurs twice.
pub fn fixed_blocks(
    objective: &impl SmoothObjective,
    rule: &FixedRule,
    size: usize,
) -> Result<Vec<Vec<usize>>> {
    check::at_least("block size", size, 1)?;
    let sorted = match rule {
        FixedRule::Given(blocks) => return given(blocks, objective.dim()),
        FixedRule::Order => (0..objective.dim()).collect(),
        FixedRule::Sort => argsort(objective.coord_lipschitz()),
        FixedRule::Avg => interleave(&argsort(objective.coord_lipschitz())),
        FixedRule::HSort => argsort(&objective.bound_row_sums()),
        FixedRule::HAvg => interleave(&argsort(&objective.bound_row_sums())),
    };
    Ok(sorted.chunks(size).map(<[usize]>::to_vec).collect())
}

/// First, last, second, last but one, ...
fn interleave(sorted: &[usize]) -> Vec<usize> {
    let n = sorted.len();
    let at = |i: usize| {
        if i.is_multiple_of(2) {
            i / 2
        } else {
            n - 1 - i / 2
        }
    };
    (0..n).map(|i| sorted[at(i)]).collect()
}

fn given(blocks: &[Vec<usize>], dim: usize) -> Result<Vec<Vec<usize>>> {
    let mut seen = vec![0; dim];
    for &i in blocks.iter().flatten() {
        match seen.get_mut(i) {
            Some(count) => *count += 1,
            None => return Err(Error::config("FixedRule::Given", i, format!("below {dim}"))),
        }
    }
    if let Some(i) = seen.iter().position(|count| *count != 1) {
        let found = format!("coordinate {i} {} times", seen[i]);
        return Err(Error::config("FixedRule::Given", found, "each one once"));
    }
    Ok(blocks.iter().filter(|b| !b.is_empty()).cloned().collect())
}
