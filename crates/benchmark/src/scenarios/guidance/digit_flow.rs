//! Flows of digits that the guidance of flows works on: a first one, and one after a reflow.

use crate::scenario::{Suite, TrialContext};
use crate::scenarios::flows::rectified_flow::{train, Net};
use crate::scenarios::generation::trained_once;
use crate::Result;
use candle_core::Tensor;
use flows::coupling::{reflow, Examples, Gaussian, Independent};
use flows::ode::FixedStep;
use flows::train::FlowLoss;

/// The first and the second flow of a seed, trained on `data` by the first trial that needs them; their
/// weights are kept for the other trials of the process.
pub fn digit_flows(trial: &TrialContext, data: &Tensor) -> Result<[Net; 2]> {
    let (steps, pairs) = match trial.suite {
        Suite::Quick => (1000, 6000),
        _ => (3000, 12_000),
    };
    let loss = FlowLoss::default();
    let fresh = || Net::new(&trial.stream("weights"), data);
    let (first, second) = (fresh()?, fresh()?);
    trained_once(("digit-flow", trial.seed, steps), &first.params, || {
        let mut examples = Independent {
            source: Gaussian::like(data)?,
            target: Examples(data.clone()),
        };
        train(trial, &first, &mut examples, &loss, steps, "one")
    })?;
    trained_once(("digit-reflow", trial.seed, steps), &second.params, || {
        let mut source = Gaussian::like(data)?;
        let mut rng = trial.stream("pairs");
        let solver = FixedStep::euler(50);
        let mut coupled = reflow(&first, &mut source, pairs, 2000, &solver, &mut rng)?;
        // The second flow starts from the first one's weights.
        for ((_, to), (_, from)) in second.params.iter().zip(&first.params) {
            to.set(from.as_tensor())?;
        }
        train(trial, &second, &mut coupled, &loss, steps, "two")
    })?;
    Ok([first, second])
}
