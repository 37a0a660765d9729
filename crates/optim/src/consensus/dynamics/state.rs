//! A run as named tensors.

use super::{Cbo, Memories};
use crate::consensus::point::{host, tensor_on};
use crate::fused::{counters, part, read_counters, State};
use crate::{RandomStream, Result};
use candle_core::{DType, Device};
use tensor_core::checkpoint::{expect_state, TensorSpec};
use tensor_core::random::RandomState;

impl Cbo<RandomStream> {
    /// Everything that a later run needs to continue with the same bits; not the configuration.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<State> {
        let double =
            |rows: &[f64], shape: &[usize]| tensor_on(rows, shape, DType::F64, &Device::Cpu);
        let shape = [self.len(), self.d];
        let mut state = State::new();
        state.insert("v".into(), double(&self.v, &shape)?);
        if let Some(memories) = &self.memories {
            state.insert("y".into(), double(&memories.y, &shape)?);
            if let Some(energies) = &memories.energies {
                state.insert("y_energies".into(), double(energies, &[self.len()])?);
            }
        }
        if let Some((energy, row)) = &self.best {
            state.insert("best".into(), double(row, &[self.d])?);
            state.insert("best_energy".into(), double(&[*energy], &[1])?);
        }
        let last = double(&self.last_consensus, &[self.d])?;
        state.insert("last_consensus".into(), last);
        let variance = self.variance.unwrap_or(f64::NAN);
        let numbers = [self.sigma, self.alpha, variance];
        state.insert("numbers".into(), double(&numbers, &[3])?);
        let counts = [
            self.steps as u64,
            self.moves as u64,
            self.epochs as u64,
            self.evaluations,
        ];
        state.insert("counts".into(), counters(&counts)?);
        state.insert("random".into(), self.noise.state().to_tensor()?);
        Ok(state)
    }

    /// Restores what [`state`](Self::state) returned.
    ///
    /// # Errors
    /// A list of everything that is missing, unexpected or of another shape; nothing is changed
    /// then.
    pub fn load_state(&mut self, state: &State) -> Result<()> {
        let n = part(state, "v")?.dims().first().copied().unwrap_or(0);
        let f = DType::F64;
        let mut expected = vec![
            TensorSpec::from(("v", &[n, self.d][..], f)),
            TensorSpec::from(("last_consensus", &[self.d][..], f)),
            TensorSpec::from(("numbers", &[3][..], f)),
            TensorSpec::from(("counts", &[4][..], DType::I64)),
            TensorSpec::from(("random", &[40][..], DType::U8)),
        ];
        if self.config.memory.is_some() {
            expected.push(TensorSpec::from(("y", &[n, self.d][..], f)));
        }
        for (name, shape) in [("y_energies", n), ("best", self.d), ("best_energy", 1)] {
            if state.contains_key(name) {
                expected.push(TensorSpec::from((name, &[shape][..], f)));
            }
        }
        expect_state(state, expected)?;
        let noise = RandomState::from_tensor(part(state, "random")?)?;
        let [steps, moves, epochs, evaluations] = read_counters(part(state, "counts")?)?;
        let read = |name: &str| host(part(state, name)?);
        let optional = |name: &str| state.get(name).map(host).transpose();
        let (v, numbers, last) = (read("v")?, read("numbers")?, read("last_consensus")?);
        let memories = match self.config.memory {
            Some(_) => Some(Memories {
                y: read("y")?,
                energies: optional("y_energies")?,
            }),
            None => None,
        };
        let best = optional("best")?.zip(optional("best_energy")?);
        self.best = best.map(|(row, energy)| (energy[0], row));
        (self.v, self.memories, self.last_consensus) = (v, memories, last);
        (self.sigma, self.alpha) = (numbers[0], numbers[1]);
        self.variance = Some(numbers[2]).filter(|x| !x.is_nan());
        (self.steps, self.moves) = (steps as usize, moves as usize);
        (self.epochs, self.evaluations) = (epochs as usize, evaluations);
        self.noise = RandomStream::from_state(&noise);
        Ok(())
    }
}
