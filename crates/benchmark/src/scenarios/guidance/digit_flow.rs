//! Flows of digits that the guidance of flows works on: a first one, and one after a reflow.

use crate::scenario::{Suite, TrialContext};
use crate::scenarios::flows::rectified_flow::{train, Net};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use flows::coupling::{reflow, Examples, Gaussian, Independent};
use flows::ode::FixedStep;
use flows::train::FlowLoss;
use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

/// Weights of the first flow and of the second.
type Weights = [Vec<Vec<f32>>; 2];

/// The first and the second flow of a seed, trained on `data` by the first trial that needs them; their
/// weights are kept for the other trials of the process.
pub fn digit_flows(trial: &TrialContext, data: &Tensor) -> Result<[Net; 2]> {
    static KEPT: Mutex<BTreeMap<(u64, Suite), Weights>> = Mutex::new(BTreeMap::new());
    let key = (trial.seed, trial.suite);
    let fresh = || Net::new(&trial.stream("weights"), data);
    // A panic elsewhere cannot leave a half-written value here.
    let kept = KEPT
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .get(&key)
        .cloned();
    if let Some([first, second]) = kept {
        return Ok([restored(fresh()?, &first)?, restored(fresh()?, &second)?]);
    }
    let (steps, pairs) = match trial.suite {
        Suite::Quick => (1000, 6000),
        _ => (3000, 12_000),
    };
    let mut examples = Independent {
        source: Gaussian::like(data)?,
        target: Examples(data.clone()),
    };
    let loss = FlowLoss::default();
    let first = train(trial, fresh()?, &mut examples, &loss, steps, "one")?;
    let first_weights = weights(&first)?;
    let mut source = Gaussian::like(data)?;
    let mut rng = trial.stream("pairs");
    let solver = FixedStep::euler(50);
    let mut coupled = reflow(&first, &mut source, pairs, 2000, &solver, &mut rng)?;
    let second = train(trial, first, &mut coupled, &loss, steps, "two")?;
    let both = [first_weights, weights(&second)?];
    let first = restored(fresh()?, &both[0])?;
    KEPT.lock()
        .unwrap_or_else(PoisonError::into_inner)
        .insert(key, both);
    Ok([first, second])
}

fn weights(net: &Net) -> Result<Vec<Vec<f32>>> {
    let read = |(_, var): &(String, candle_core::Var)| {
        let flat = var
            .as_detached_tensor()
            .to_dtype(DType::F32)?
            .flatten_all()?;
        Ok(flat.to_vec1()?)
    };
    net.params.iter().map(read).collect()
}

fn restored(net: Net, weights: &[Vec<f32>]) -> Result<Net> {
    if net.params.len() != weights.len() {
        return Err(Error::Trial("weights of another network".into()));
    }
    for ((_, var), values) in net.params.iter().zip(weights) {
        var.set(&Tensor::from_slice(values, var.shape(), var.device())?)?;
    }
    Ok(net)
}
