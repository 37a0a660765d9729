//! What a sequence of steps gave, by the names that it has in the file.

use crate::{Error, Result};
use candle_core::{backprop::GradStore, Tensor, Var};
use tensor_core::verify::{Reference, Tolerance};

#[derive(Default)]
pub(super) struct Record {
    steps: Vec<(&'static str, Vec<Tensor>)>,
}

impl Record {
    pub(super) fn push(&mut self, name: &'static str, value: &Tensor) -> Result<()> {
        // A copy: running statistics move on in place.
        let value = value.detach().copy()?;
        match self.steps.iter_mut().find(|(known, _)| *known == name) {
            Some((_, steps)) => steps.push(value),
            None => self.steps.push((name, vec![value])),
        }
        Ok(())
    }

    /// Compares each name's steps, stacked, with the file's `case.name`.
    pub(super) fn compare(
        self,
        reference: &mut Reference,
        case: &str,
        tolerance: Tolerance,
    ) -> Result<()> {
        for (name, steps) in self.steps {
            let steps = Tensor::stack(&steps, 0)?;
            reference.compare_tensor(&format!("{case}.{name}"), &steps, tolerance)?;
        }
        Ok(())
    }
}

/// The gradient of a variable that must have one.
pub(super) fn gradient(store: &GradStore, name: &str, var: &Var) -> Result<Tensor> {
    store
        .get(var)
        .cloned()
        .ok_or_else(|| Error::Core(tensor_core::Error::LostGradient(vec![name.to_string()])))
}
