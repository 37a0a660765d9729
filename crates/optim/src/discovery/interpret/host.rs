//! Scalars and numbers of tensors: what is known before the last pass.

use super::pass::product;
use super::{rank, tiles, CompiledProgram, Kind, Operand, Pass, CHUNK};
use crate::discovery::ops::{Number, Op};
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

/// Scalars and numbers of tensors of one step.
#[derive(Debug, Clone)]
pub(super) struct Host {
    pub(super) scalars: Vec<f64>,
    pub(super) per_tensor: Vec<Vec<f64>>,
    tensors: usize,
}

impl Host {
    pub(super) fn new(program: &CompiledProgram, tensors: usize) -> Self {
        Self {
            scalars: vec![0.0; program.scalars],
            per_tensor: vec![vec![0.0; tensors]; program.per_tensor],
            tensors,
        }
    }

    /// Runs all passes but the last: afterwards everything that is not a tree is known. `parts` are
    /// the tree inputs of each tensor.
    pub(super) fn prepare<T: Number>(
        &mut self,
        program: &CompiledProgram,
        parts: &[Vec<&[T]>],
        scalars: &[f64],
    ) -> Result<()> {
        if scalars.len() != program.scalar_inputs.len() {
            let expected = format!("{} numbers", program.scalar_inputs.len());
            return Err(Error::shape("scalar inputs", &[scalars.len()], expected));
        }
        for (slot, x) in program.scalar_inputs.iter().zip(scalars) {
            self.scalars[*slot] = *x;
        }
        self.host_steps(program, 0);
        for (level, pass) in program.passes.iter().enumerate() {
            if pass.reductions.is_empty() {
                continue;
            }
            self.reduce(program, pass, parts);
            self.host_steps(program, level + 1);
        }
        Ok(())
    }

    pub(super) fn value(&self, operand: Operand, tensor: usize) -> f64 {
        match operand {
            Operand::Const(x) => x,
            Operand::Scalar(i) => self.scalars[i],
            Operand::PerTensor(i) => self.per_tensor[i][tensor],
            // Trees have no place in a host step.
            Operand::Input(_) | Operand::Tree(_) => f64::NAN,
        }
    }

    fn host_steps(&mut self, program: &CompiledProgram, level: usize) {
        for step in program.host.iter().filter(|step| step.level == level) {
            let compute = |host: &Self, tensor: usize| {
                let [x, y, z] = step.args.map(|arg| host.value(arg, tensor));
                match step.kind {
                    Kind::Op(op) => op.apply(x, y, z),
                    Kind::Root => x.sqrt(),
                    Kind::Cosine => x / (y.sqrt() * z.sqrt()),
                    Kind::Factor => Op::Min.apply(1.0, x / y, 0.0),
                }
            };
            match step.dst {
                Operand::Scalar(i) => self.scalars[i] = compute(self, 0),
                Operand::PerTensor(i) => {
                    for tensor in 0..self.tensors {
                        self.per_tensor[i][tensor] = compute(self, tensor);
                    }
                }
                _ => {}
            }
        }
    }

    /// One pass over memory for all reductions of a level.
    fn reduce<T: Number>(&mut self, program: &CompiledProgram, pass: &Pass, parts: &[Vec<&[T]>]) {
        let count = pass.reductions.len();
        let mut work = Vec::new();
        for (tensor, inputs) in parts.iter().enumerate() {
            let n = inputs.first().map_or(0, |x| x.len());
            work.extend(
                (0..n)
                    .step_by(CHUNK)
                    .map(|from| (tensor, from..(from + CHUNK).min(n))),
            );
        }
        let one = |registers: &mut Vec<Vec<T>>, (tensor, range): &(usize, Range<usize>)| {
            let mut sums = vec![0.0; count];
            for tile in tiles(range.clone()) {
                let inputs: Vec<&[T]> = parts[*tensor].iter().map(|x| &x[tile.clone()]).collect();
                pass.evaluate(registers, &inputs, self, *tensor, tile.len());
                for (sum, reduction) in sums.iter_mut().zip(&pass.reductions) {
                    let [a, b] = reduction
                        .args
                        .map(|arg| pass.source(arg, registers, &inputs, self, *tensor));
                    *sum += product(a, b, tile.len());
                }
            }
            sums
        };
        let found: Vec<Vec<f64>> = if work.len() > 1 {
            work.par_iter()
                .map_init(
                    || program.registers(),
                    |registers, item| one(registers, item),
                )
                .collect()
        } else {
            let mut registers = program.registers();
            work.iter().map(|item| one(&mut registers, item)).collect()
        };
        for (i, reduction) in pass.reductions.iter().enumerate() {
            let trees = reduction.args.iter().any(|arg| rank(*arg) == 2);
            let mut per_tensor = vec![0.0; self.tensors];
            if trees {
                for ((tensor, _), sums) in work.iter().zip(&found) {
                    per_tensor[*tensor] += sums[i];
                }
            } else {
                for (tensor, slot) in per_tensor.iter_mut().enumerate() {
                    let [a, b] = reduction.args.map(|arg| self.value(arg, tensor));
                    *slot = a * b;
                }
            }
            match reduction.dst {
                Operand::Scalar(slot) => self.scalars[slot] = per_tensor.iter().sum(),
                Operand::PerTensor(slot) => self.per_tensor[slot] = per_tensor,
                _ => {}
            }
        }
    }
}
