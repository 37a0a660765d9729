//! Several runs side by side.

use super::{Cbo, Rows, StepReport};
use crate::consensus::noise::NoiseSource;
use crate::consensus::objective::Objective;
use crate::{Error, RandomStream, Result};
use candle_core::Tensor;

/// Several independent runs whose particles are evaluated in one batch: `M` runs cost the calls of
/// one.
#[derive(Debug)]
pub struct CboEnsemble<S = RandomStream> {
    runs: Vec<Cbo<S>>,
}

impl<S: NoiseSource> CboEnsemble<S> {
    /// Runs of one dimension, dtype and device, without batches of particles.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when there are none or they differ.
    pub fn new(runs: Vec<Cbo<S>>) -> Result<Self> {
        let Some(first) = runs.first() else {
            return Err(Error::argument("runs", 0, "at least one"));
        };
        let same = |run: &Cbo<S>| {
            run.d == first.d
                && run.dtype == first.dtype
                && run.device.same_device(&first.device)
                && run.config.batching.is_none()
        };
        if !runs.iter().all(same) {
            let expected = "one dimension, dtype and device, and no batches of particles";
            return Err(Error::argument("runs", runs.len(), expected));
        }
        Ok(Self { runs })
    }

    /// The runs.
    pub fn runs(&self) -> &[Cbo<S>] {
        &self.runs
    }

    /// One step of every run.
    ///
    /// # Errors
    /// As [`Cbo::step`].
    pub fn step(&mut self, objective: &dyn Objective) -> Result<Vec<StepReport>> {
        let energies = self.together(objective, |run| {
            let known = run.memories.as_ref().and_then(|m| m.energies.clone());
            (run.remembered(), known)
        })?;
        let mut reports = Vec::with_capacity(self.runs.len());
        for (run, energies) in self.runs.iter_mut().zip(energies) {
            reports.push(run.advance(&energies, objective)?);
            if let Some(memories) = &mut run.memories {
                memories.energies = Some(energies);
            }
        }
        if self.runs.iter().any(|run| run.memories.is_some()) {
            let positions = self.together(objective, |_| (Rows::All, None))?;
            for (run, positions) in self.runs.iter_mut().zip(&positions) {
                run.remember(positions);
            }
        }
        Ok(reports)
    }

    /// Energies in all runs: the known ones, and the others from one call.
    fn together(
        &mut self,
        objective: &dyn Objective,
        of: impl Fn(&Cbo<S>) -> (Rows, Option<Vec<f64>>),
    ) -> Result<Vec<Vec<f64>>> {
        let wanted: Vec<_> = self.runs.iter().map(of).collect();
        let mut all = Vec::new();
        for (run, (rows, known)) in self.runs.iter().zip(&wanted) {
            if known.is_none() {
                all.extend_from_slice(run.rows(*rows));
            }
        }
        let values = match self.runs.first() {
            Some(first) if !all.is_empty() => Some(objective.values(&first.tensor(&all)?)?),
            _ => None,
        };
        let mut from = 0;
        let mut energies = Vec::with_capacity(wanted.len());
        for (run, (rows, known)) in self.runs.iter_mut().zip(wanted) {
            energies.push(match (known, &values) {
                (Some(known), _) => known,
                (None, Some(values)) => {
                    let count = run.rows(rows).len() / run.d;
                    from += count;
                    if values.elem_count() < from {
                        let expected = format!("at least [{from}]");
                        let dims = values.dims();
                        return Err(Error::shape("values of the objective", dims, expected));
                    }
                    run.accept(&values.flatten_all()?.narrow(0, from - count, count)?, rows)?
                }
                (None, None) => Vec::new(),
            });
        }
        Ok(energies)
    }

    /// The consensus of each run, `[M, d]`.
    ///
    /// # Errors
    /// As [`Cbo::step`].
    pub fn consensus(&mut self, objective: &dyn Objective) -> Result<Tensor> {
        let mut points = Vec::with_capacity(self.runs.len());
        for run in &mut self.runs {
            points.push(run.consensus(objective)?);
        }
        Ok(Tensor::stack(&points, 0)?)
    }
}
