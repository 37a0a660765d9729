//! Gradients of several calls make one step.

use super::{Flow, GradientTransform, Withheld};
use crate::accumulate::Sums;
use crate::error::check;
use crate::fused::{counters, read_counters};
use crate::gradients::Gradients;
use crate::{Result, State};
use candle_core::Var;
use tensor_core::checkpoint::expect_state;

/// Averages the gradients of `every` calls and takes the step in the last of them; the calls
/// before report [`Withheld::Accumulating`]. A parameter without gradient in some of the calls
/// counts as zero there.
///
/// Sums are kept in the parameters' type, in buffers of this transform.
#[derive(Debug)]
pub struct Accumulate {
    every: usize,
    params: Vec<(String, Var)>,
    sums: Sums,
    done: usize,
}

impl Accumulate {
    /// Averages over `every` calls, for these parameters.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) for `every = 0`; an error for integer
    /// parameters.
    pub fn new(params: &[(String, Var)], every: usize) -> Result<Self> {
        check::at_least_one("Accumulate::every", every)?;
        Ok(Self {
            every,
            params: params.to_vec(),
            sums: Sums::new(params)?,
            done: 0,
        })
    }

    /// Calls since the last step.
    pub fn pending(&self) -> usize {
        self.done
    }

    /// Bytes of the sums.
    pub fn state_bytes(&self) -> usize {
        self.sums.bytes()
    }
}

impl GradientTransform for Accumulate {
    fn apply(&mut self, gradients: &mut Gradients<'_>) -> Result<Flow> {
        super::expect_params(&self.params, gradients)?;
        if self.done == 0 {
            self.sums.clear();
        }
        self.sums.add(gradients, 1.0)?;
        self.done += 1;
        if self.done < self.every {
            return Ok(Flow::Withhold(Withheld::Accumulating));
        }
        self.done = 0;
        for i in 0..gradients.len() {
            if let Some(sum) = self.sums.get(i) {
                gradients.replace(i, sum);
                gradients.scale(i, 1.0 / self.every as f64);
            }
        }
        Ok(Flow::Continue)
    }

    fn state(&self) -> Result<State> {
        let mut state = State::new();
        state.insert("done".into(), counters(&[self.done as u64])?);
        // Between two steps there is nothing to keep.
        if self.done > 0 {
            for (i, (name, _)) in self.params.iter().enumerate() {
                if let Some(sum) = self.sums.get(i) {
                    state.insert(format!("sum.{name}"), sum.copy()?);
                }
            }
        }
        Ok(state)
    }

    fn load_state(&mut self, state: &State) -> Result<()> {
        // Which sums there are depends on which gradients there were.
        let mut expected = vec![("done".to_string(), vec![1], candle_core::DType::I64)];
        for (name, var) in &self.params {
            let name = format!("sum.{name}");
            if state.contains_key(&name) {
                expected.push((name, var.dims().to_vec(), var.dtype()));
            }
        }
        expect_state(state, expected)?;
        let [done] = read_counters(crate::fused::part(state, "done")?)?;
        for (i, (name, _)) in self.params.iter().enumerate() {
            self.sums.set(i, state.get(&format!("sum.{name}")))?;
        }
        self.done = done as usize;
        Ok(())
    }
}
