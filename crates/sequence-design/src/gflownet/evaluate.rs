//! Log-probabilities of whole batches of trajectories, in one pass of the network over all states.

use super::policy::heads_of;
use super::{Environment, PolicyNet, Trajectories};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use nn::masked::{hide, masked_log_prob, Wanted, IMPOSSIBLE};

/// What the losses are made of. `N` states of `B` trajectories; see [`Trajectories`].
#[derive(Debug, Clone)]
pub struct Evaluated {
    /// `log P_F` of the action taken in each state, `[N]`.
    pub log_pf: Tensor,
    /// `log P_B` of the step back from each state to the one before it, `[N]`; 0 at roots. The step
    /// from an object to the end has probability 1 and no entry.
    pub log_pb: Tensor,
    /// Logarithm of the flow of each state, `[N]`, where the policy has the head.
    pub log_flow: Option<Tensor>,
    /// Logits of all actions `[N, A]`, impossible ones far below all others.
    pub logits: Tensor,
    /// `KL(uniform over the parents || P_B)`, mean over the states that are not roots; `None` for a
    /// uniform `P_B`, where it is 0.
    pub backward_kl: Option<Tensor>,
    /// The logarithm of the partition function, where the policy has one.
    pub log_z: Option<Tensor>,
    pub(super) spans: Spans,
}

/// Where trajectories begin and end in a list of states.
#[derive(Debug, Clone)]
pub(super) struct Spans {
    pub offsets: Vec<usize>,
    pub device: Device,
}

impl Spans {
    pub fn trajectories(&self) -> usize {
        self.offsets.len() - 1
    }

    pub fn states(&self) -> usize {
        self.offsets[self.offsets.len() - 1]
    }

    /// Positions of the objects.
    pub fn last(&self) -> Vec<u32> {
        self.offsets[1..].iter().map(|o| (*o - 1) as u32).collect()
    }

    pub fn index(&self, index: Vec<u32>) -> Result<Tensor> {
        let count = index.len();
        Ok(Tensor::from_vec(index, count, &self.device)?)
    }

    /// Entries of `values` at these places.
    pub fn pick(&self, values: &Tensor, places: Vec<u32>) -> Result<Tensor> {
        Ok(values.contiguous()?.index_select(&self.index(places)?, 0)?)
    }

    /// Sums over the states of each trajectory, `[N]` to `[B]`.
    pub fn sums(&self, values: &Tensor) -> Result<Tensor> {
        let spans = self.offsets.windows(2).enumerate();
        let owners = spans
            .flat_map(|(i, span)| std::iter::repeat_n(i as u32, span[1] - span[0]))
            .collect();
        let zeros = Tensor::zeros(self.trajectories(), values.dtype(), &self.device)?;
        Ok(zeros.index_add(&self.index(owners)?, values, 0)?)
    }
}

/// Masks of the actions of each state, `[N, A]` and `[N, A - 1]`.
fn masks<E: Environment>(env: &E, states: &[E::State]) -> (Vec<bool>, Vec<bool>) {
    let a = env.actions();
    let (mut forward, mut backward) = (
        vec![false; states.len() * a],
        vec![false; states.len() * (a - 1)],
    );
    let rows = forward.chunks_mut(a).zip(backward.chunks_mut(a - 1));
    for (state, (f, b)) in states.iter().zip(rows) {
        env.forward_mask(state, f);
        env.backward_mask(state, b);
    }
    (forward, backward)
}

impl Evaluated {
    /// Evaluates a policy on trajectories, with its graph.
    ///
    /// # Errors
    /// [`Error::Shape`] when the heads do not fit the environment; [`Error::InvalidArgument`]
    /// without a trajectory; those of the network.
    pub fn new<E: Environment>(
        env: &E,
        policy: &impl PolicyNet,
        trajectories: &Trajectories<E::State>,
    ) -> Result<Self> {
        if trajectories.is_empty() {
            return Err(Error::argument("trajectories", 0, "at least one"));
        }
        let states = trajectories.states();
        let owners = trajectories.owners();
        let heads = heads_of(env, policy, states, |k| {
            trajectories.context_of(owners[k] as usize).to_vec()
        })?;
        let (forward, backward) = masks(env, states);
        let spans = Spans {
            offsets: trajectories.offsets().to_vec(),
            device: heads.forward.device().clone(),
        };
        let taken = Wanted::Action(trajectories.actions().to_vec());
        let log_pf = masked_log_prob(&heads.forward, &forward, &taken)?;
        let (log_pb, backward_kl) = match &heads.backward {
            Some(logits) => learned(
                &spans,
                logits,
                &backward,
                trajectories.actions(),
                env.actions() - 1,
            )?,
            None => (
                uniform(&log_pf, &spans, &backward, env.actions() - 1)?,
                None,
            ),
        };
        Ok(Self {
            log_pf,
            log_pb,
            log_flow: heads.log_flow,
            logits: hide(&heads.forward, &forward)?,
            backward_kl,
            log_z: policy.log_z().cloned(),
            spans,
        })
    }

    /// Sums of `log P_F` over each trajectory, `[B]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn sum_log_pf(&self) -> Result<Tensor> {
        self.spans.sums(&self.log_pf)
    }

    /// Sums of `log P_B` over each trajectory, `[B]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn sum_log_pb(&self) -> Result<Tensor> {
        self.spans.sums(&self.log_pb)
    }

    /// The flow head.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the policy has none.
    pub fn log_flow(&self) -> Result<&Tensor> {
        self.log_flow.as_ref().ok_or_else(|| {
            Error::unsupported(
                "this loss",
                "it needs a policy with a head for the state flow",
            )
        })
    }

    /// The logarithm of the partition function of each trajectory `[B]`: the policy's scalar, or the
    /// flow of the root.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when the policy has neither.
    pub fn log_z(&self) -> Result<Tensor> {
        let b = self.spans.trajectories();
        match (&self.log_z, &self.log_flow) {
            (Some(log_z), _) => Ok(log_z.broadcast_as(b)?),
            (None, Some(flow)) => {
                let roots = self.spans.offsets[..b].iter().map(|o| *o as u32);
                self.spans.pick(flow, roots.collect())
            }
            (None, None) => Err(Error::unsupported(
                "trajectory balance",
                "the policy has neither a log partition function nor a head for the state flow",
            )),
        }
    }
}

fn uniform(like: &Tensor, spans: &Spans, mask: &[bool], width: usize) -> Result<Tensor> {
    let counts = mask
        .chunks(width)
        .map(|row| row.iter().filter(|m| **m).count());
    let log: Vec<f64> = counts.map(|c| -(c.max(1) as f64).ln()).collect();
    Ok(Tensor::from_vec(log, mask.len() / width, &spans.device)?.to_dtype(like.dtype())?)
}

/// `log P_B` of the steps that were taken, 0 at roots, and the divergence from uniform.
fn learned(
    spans: &Spans,
    logits: &Tensor,
    mask: &[bool],
    actions: &[u32],
    width: usize,
) -> Result<(Tensor, Option<Tensor>)> {
    // Roots have no step back: their rows are left out, never softmaxed.
    let mut inner = vec![];
    for span in spans.offsets.windows(2) {
        inner.extend((span[0] + 1..span[1]).map(|k| k as u32));
    }
    let n = spans.states();
    let zeros = Tensor::zeros(n, logits.dtype(), &spans.device)?;
    if inner.is_empty() {
        return Ok((zeros, None));
    }
    let rows = spans.pick(logits, inner.clone())?;
    let rows_mask: Vec<bool> = inner
        .iter()
        .flat_map(|k| mask[*k as usize * width..(*k as usize + 1) * width].to_vec())
        .collect();
    let back: Vec<u32> = inner.iter().map(|k| actions[*k as usize - 1]).collect();
    let log_p = masked_log_prob(&rows, &rows_mask, &Wanted::Action(back))?;
    let mean = masked_log_prob(&rows, &rows_mask, &Wanted::Mean)?;
    let entropy: f64 = rows_mask
        .chunks(width)
        .map(|row| -(row.iter().filter(|m| **m).count() as f64).ln())
        .sum();
    let kl = mean
        .mean_all()?
        .affine(-1.0, entropy / inner.len() as f64)?;
    let log_pb = zeros.index_add(&spans.index(inner)?, &log_p, 0)?;
    Ok((log_pb, Some(kl)))
}

/// The logarithms of the flows into and out of states, for flow matching.
#[derive(Debug, Clone)]
pub struct EdgeFlows {
    /// Logarithm of the flow out of each state `[N]`, stop included.
    pub outgoing: Tensor,
    /// Logarithm of the flow into each state that is not a root `[M]`.
    pub incoming: Tensor,
    /// The places of these states among the `N`.
    pub inner: Vec<u32>,
    /// Logarithm of the flow of the stop edge of each object `[B]`.
    pub stop: Tensor,
}

impl EdgeFlows {
    /// Evaluates all parents of all states on the trajectories, in one more pass of the network.
    ///
    /// # Errors
    /// As [`Evaluated::new`].
    pub fn new<E: Environment>(
        env: &E,
        policy: &impl PolicyNet,
        trajectories: &Trajectories<E::State>,
        evaluated: &Evaluated,
    ) -> Result<Self> {
        let (a, spans) = (env.actions(), &evaluated.spans);
        let owners = trajectories.owners();
        let (mut inner, mut parents, mut edges) = (vec![], vec![], vec![]);
        let mut mask = vec![false; a - 1];
        for span in spans.offsets.windows(2) {
            for k in span[0] + 1..span[1] {
                mask.fill(false);
                env.backward_mask(&trajectories.states()[k], &mut mask);
                for action in (0..a - 1).filter(|x| mask[*x]) {
                    let mut parent = trajectories.states()[k].clone();
                    env.undo(&mut parent, action);
                    edges.push((inner.len(), action, k));
                    parents.push(parent);
                }
                inner.push(k as u32);
            }
        }
        let outgoing = log_sum_exp(&evaluated.logits)?;
        let stop = spans.pick(
            &evaluated.logits.narrow(1, a - 1, 1)?.squeeze(1)?,
            spans.last(),
        )?;
        if inner.is_empty() {
            let incoming = Tensor::zeros(0, stop.dtype(), &spans.device)?;
            return Ok(Self {
                outgoing,
                incoming,
                inner,
                stop,
            });
        }
        let heads = heads_of(env, policy, &parents, |e| {
            trajectories
                .context_of(owners[edges[e].2] as usize)
                .to_vec()
        })?;
        let actions: Vec<u32> = edges.iter().map(|e| e.1 as u32).collect();
        let actions = Tensor::from_vec(actions, (edges.len(), 1), &spans.device)?;
        let flows = heads.forward.gather(&actions, 1)?.squeeze(1)?;
        // Edge flows laid out as [M, A - 1]; the place behind the last one stands for "no edge".
        let mut layout = vec![edges.len() as u32; inner.len() * (a - 1)];
        for (e, (row, action, _)) in edges.iter().enumerate() {
            layout[row * (a - 1) + action] = e as u32;
        }
        let none = Tensor::full(IMPOSSIBLE, 1, &spans.device)?;
        let flows = Tensor::cat(&[&flows, &none.to_dtype(flows.dtype())?], 0)?;
        let table = spans.pick(&flows, layout)?.reshape((inner.len(), a - 1))?;
        Ok(Self {
            outgoing,
            incoming: log_sum_exp(&table)?,
            inner,
            stop,
        })
    }
}

/// Row-wise logarithm of the sum of exponentials.
fn log_sum_exp(x: &Tensor) -> Result<Tensor> {
    let max = x.detach().max_keepdim(1)?;
    let sum = x.broadcast_sub(&max)?.exp()?.sum_keepdim(1)?.log()?;
    Ok((sum + max)?.squeeze(1)?)
}

/// Values as `f64` on the host.
pub(super) fn host(x: &Tensor) -> Result<Vec<f64>> {
    Ok(x.detach().to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}
