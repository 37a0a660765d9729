//! The four classic losses and one without a partition function, as functions of evaluated
//! trajectories.

use super::evaluate::{EdgeFlows, Evaluated};
use crate::error::check;
use crate::{Error, Result};
use candle_core::Tensor;

/// How sub-trajectories are weighted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum SubTrajectoryWeights {
    /// `lambda^length`, normalized within each trajectory; the mean over trajectories.
    Lambda(f64),
    /// For each length `k` the mean over all sub-trajectories of the batch, weighted by
    /// `(1 - lambda) / (1 - lambda^T) lambda^(k - 1)`.
    Geometric(f64),
}

impl SubTrajectoryWeights {
    pub(super) fn lambda(self) -> f64 {
        match self {
            Self::Lambda(lambda) | Self::Geometric(lambda) => lambda,
        }
    }
}

/// A loss that is zero where flows are consistent with the rewards.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum BaseLoss {
    /// Trajectory balance (Malkin et al., 2022).
    TrajectoryBalance,
    /// Detailed balance (Bengio et al., 2021).
    DetailedBalance,
    /// Sub-trajectory balance (Madan et al., 2023).
    SubTrajectory(SubTrajectoryWeights),
    /// Flow matching (Bengio et al., 2021).
    FlowMatching {
        /// Weight of the term that ties the stop edges to the rewards.
        reward_weight: f64,
    },
    /// The variance of what trajectory balance would estimate for `log Z` (Zhang et al., 2023).
    LogPartitionVariance,
}

impl BaseLoss {
    /// Sub-trajectory balance with `lambda = 0.9`.
    pub fn sub_trajectory() -> Self {
        Self::SubTrajectory(SubTrajectoryWeights::Lambda(0.9))
    }

    /// Whether the policy needs a flow head.
    pub fn needs_flow(self) -> bool {
        matches!(self, Self::DetailedBalance | Self::SubTrajectory(_))
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(self) -> Result<()> {
        match self {
            Self::SubTrajectory(weights) => {
                let lambda = weights.lambda();
                let holds = lambda > 0.0 && lambda.is_finite();
                check::require(
                    holds,
                    "SubTrajectory::lambda",
                    lambda,
                    "a finite number > 0",
                )
            }
            Self::FlowMatching { reward_weight } => {
                check::non_negative("FlowMatching::reward_weight", reward_weight)
            }
            _ => Ok(()),
        }
    }
}

/// `mean (log Z + sum log P_F - sum log P_B - log R)^2`.
///
/// # Errors
/// [`Error::Unsupported`] without a partition function; those of candle.
pub fn trajectory_balance(e: &Evaluated, log_reward: &Tensor) -> Result<Tensor> {
    let delta = (trajectory_log_reward(e)? - log_reward)?;
    Ok(delta.sqr()?.mean_all()?)
}

/// `log Z + sum log P_F - sum log P_B`, `[B]`: the log reward that trajectory balance has learned.
///
/// # Errors
/// As [`trajectory_balance`].
pub fn trajectory_log_reward(e: &Evaluated) -> Result<Tensor> {
    Ok(((e.sum_log_pf()? - e.sum_log_pb()?)? + e.log_z()?)?)
}

/// The variance over the batch of `sum log P_F - sum log P_B - log R`.
///
/// # Errors
/// Those of candle.
pub fn log_partition_variance(e: &Evaluated, log_reward: &Tensor) -> Result<Tensor> {
    let sums = ((e.sum_log_pf()? - e.sum_log_pb()?)? - log_reward)?;
    let mean = sums.mean_all()?;
    Ok(sums.broadcast_sub(&mean)?.sqr()?.mean_all()?)
}

/// `log F(x) + log P_F(stop | x)`, `[B]`: the log reward that detailed and sub-trajectory balance
/// have learned.
///
/// # Errors
/// [`Error::Unsupported`] without a flow head.
pub fn flow_log_reward(e: &Evaluated) -> Result<Tensor> {
    let sum = (e.log_flow()? + &e.log_pf)?;
    e.spans.pick(&sum, e.spans.last())
}

/// Mean over transitions of
/// `(log F(s) + log P_F(s' | s) - log F(s') - log P_B(s | s'))^2`, where the last transition of a
/// trajectory has `log R(x)` in the place of `log F(s') + log P_B`. Without a reward only the
/// transitions between states count (0 where there are none).
///
/// # Errors
/// [`Error::Unsupported`] without a flow head.
pub fn detailed_balance(e: &Evaluated, log_reward: Option<&Tensor>) -> Result<Tensor> {
    let (n, spans) = (e.spans.states(), &e.spans);
    let arriving = (e.log_flow()? + &e.log_pb)?;
    let (targets, places) = match log_reward {
        Some(log_reward) => (Tensor::cat(&[&arriving, log_reward], 0)?, None),
        None => {
            let last = spans.last();
            let inner: Vec<u32> = (0..n as u32)
                .filter(|k| last.binary_search(k).is_err())
                .collect();
            (arriving, Some(inner))
        }
    };
    let mut next: Vec<u32> = (1..=n as u32).collect();
    for (i, last) in spans.last().into_iter().enumerate() {
        next[last as usize] = (n + i) as u32;
    }
    let leaving = (e.log_flow()? + &e.log_pf)?;
    let delta = match places {
        None => (leaving - spans.pick(&targets, next)?)?,
        Some(inner) if inner.is_empty() => return Ok(e.log_pf.sum_all()?.affine(0.0, 0.0)?),
        Some(inner) => {
            let after: Vec<u32> = inner.iter().map(|k| next[*k as usize]).collect();
            (spans.pick(&leaving, inner)? - spans.pick(&targets, after)?)?
        }
    };
    Ok(delta.sqr()?.mean_all()?)
}

/// Sub-trajectory balance over all pairs `i < j` of points of each trajectory. The point behind the
/// object has the flow `R(x)`; without a reward it is left out.
///
/// The residual of a pair is a difference, `V_i - V_j`, of `V_i = log F_i - sum_{k < i} (log P_F -
/// log P_B)`, so that all pairs come from one cumulative sum.
///
/// # Errors
/// [`Error::Unsupported`] without a flow head.
pub fn sub_trajectory_balance(
    e: &Evaluated,
    log_reward: Option<&Tensor>,
    weights: SubTrajectoryWeights,
) -> Result<Tensor> {
    let values = potentials(e, log_reward)?;
    let (left, right, weight) = pairs(&e.spans.offsets, log_reward.is_some(), weights);
    if left.is_empty() {
        return Ok(e.log_pf.sum_all()?.affine(0.0, 0.0)?);
    }
    let delta = (e.spans.pick(&values, left)? - e.spans.pick(&values, right)?)?;
    let count = weight.len();
    let weight = Tensor::from_vec(weight, count, &e.spans.device)?.to_dtype(delta.dtype())?;
    Ok((delta.sqr()? * weight)?.sum_all()?)
}

/// `V` of all points: first the `N` states, then the `B` ends.
fn potentials(e: &Evaluated, log_reward: Option<&Tensor>) -> Result<Tensor> {
    let (n, b, spans) = (e.spans.states(), e.spans.trajectories(), &e.spans);
    // Step k of a trajectory: log P_F(k) - log P_B(k + 1), and log P_F(stop) at its end.
    let mut next: Vec<u32> = (1..=n as u32).collect();
    spans
        .last()
        .into_iter()
        .for_each(|last| next[last as usize] = n as u32);
    let zero = Tensor::zeros(1, e.log_pb.dtype(), &spans.device)?;
    let back = spans.pick(&Tensor::cat(&[&e.log_pb, &zero], 0)?, next)?;
    let steps = Tensor::cat(&[&(&e.log_pf - back)?, &zero], 0)?;
    // Cumulative sums along padded rows: a product with a triangular matrix.
    let longest = spans
        .offsets
        .windows(2)
        .map(|s| s[1] - s[0])
        .max()
        .unwrap_or(1);
    let mut padded = vec![n as u32; b * longest];
    for (i, span) in spans.offsets.windows(2).enumerate() {
        for (place, k) in padded[i * longest..].iter_mut().zip(span[0]..span[1]) {
            *place = k as u32;
        }
    }
    let rows = spans.pick(&steps, padded)?.reshape((b, longest))?;
    let triangle = |k: usize| f64::from(u8::from(k / (longest + 1) < k % (longest + 1)));
    let triangle: Vec<f64> = (0..longest * (longest + 1)).map(triangle).collect();
    let triangle = Tensor::from_vec(triangle, (longest, longest + 1), &spans.device)?;
    let sums = rows
        .matmul(&triangle.to_dtype(rows.dtype())?)?
        .flatten_all()?;
    let (mut states, mut ends) = (vec![], vec![]);
    for (i, span) in spans.offsets.windows(2).enumerate() {
        let row = i * (longest + 1);
        states.extend((0..span[1] - span[0]).map(|k| (row + k) as u32));
        ends.push((row + span[1] - span[0]) as u32);
    }
    let at_states = (e.log_flow()? - spans.pick(&sums, states)?)?;
    Ok(match log_reward {
        Some(reward) => Tensor::cat(&[&at_states, &(reward - spans.pick(&sums, ends)?)?], 0)?,
        None => at_states,
    })
}

/// Both points and the weight of every sub-trajectory.
fn pairs(
    offsets: &[usize],
    with_end: bool,
    weights: SubTrajectoryWeights,
) -> (Vec<u32>, Vec<u32>, Vec<f64>) {
    let (n, b) = (offsets[offsets.len() - 1], offsets.len() - 1);
    let (mut left, mut right, mut length, mut owner) = (vec![], vec![], vec![], vec![]);
    for (i, span) in offsets.windows(2).enumerate() {
        let mut points: Vec<u32> = (span[0] as u32..span[1] as u32).collect();
        if with_end {
            points.push((n + i) as u32);
        }
        for a in 0..points.len() {
            for c in a + 1..points.len() {
                left.push(points[a]);
                right.push(points[c]);
                length.push(c - a);
                owner.push(i);
            }
        }
    }
    let lambda = weights.lambda();
    let power = |k: usize| lambda.powi(k as i32);
    let weight = match weights {
        SubTrajectoryWeights::Lambda(_) => {
            let mut totals = vec![0.0; b];
            for (i, k) in owner.iter().zip(&length) {
                totals[*i] += power(*k);
            }
            let one = |(i, k): (&usize, &usize)| power(*k) / totals[*i] / b as f64;
            owner.iter().zip(&length).map(one).collect()
        }
        SubTrajectoryWeights::Geometric(_) => {
            let longest = length.iter().copied().max().unwrap_or(1);
            let mut counts = vec![0usize; longest + 1];
            length.iter().for_each(|k| counts[*k] += 1);
            let total: f64 = (1..=longest).map(|k| power(k - 1)).sum();
            let one = |k: &usize| power(k - 1) / total / counts[*k] as f64;
            length.iter().map(one).collect()
        }
    };
    (left, right, weight)
}

/// Mean over visited states other than roots, each as often as it was visited, of
/// `(log flow in - log flow out)^2`.
///
/// # Errors
/// Those of candle.
pub fn flow_matching(flows: &EdgeFlows) -> Result<Tensor> {
    if flows.inner.is_empty() {
        return Ok(flows.outgoing.sum_all()?.affine(0.0, 0.0)?);
    }
    let count = flows.inner.len();
    let inner = Tensor::from_slice(&flows.inner, count, flows.outgoing.device())?;
    let delta = (&flows.incoming - flows.outgoing.index_select(&inner, 0)?)?;
    Ok(delta.sqr()?.mean_all()?)
}

/// Mean of `(log flow of the stop edge - log R)^2`.
///
/// # Errors
/// Those of candle.
pub fn flow_matching_reward(flows: &EdgeFlows, log_reward: &Tensor) -> Result<Tensor> {
    Ok((&flows.stop - log_reward)?.sqr()?.mean_all()?)
}

/// A tensor of log rewards, checked.
///
/// # Errors
/// [`Error::NonFinite`].
pub fn log_rewards(values: &[f64], like: &Tensor) -> Result<Tensor> {
    if let Some(i) = values.iter().position(|x| !x.is_finite()) {
        return Err(Error::non_finite(format!("log reward {i}")));
    }
    let tensor = Tensor::from_slice(values, values.len(), like.device())?;
    Ok(tensor.to_dtype(like.dtype())?)
}
