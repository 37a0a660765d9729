//! Steps over parameters: the carried trees, and the pass that writes.

use super::pass::Source;
use super::{ranges, tiles, CompiledProgram, Host, Operand, CHUNK, MAX_TREES};
use crate::discovery::check::Ty;
use crate::discovery::ops::Number;
use crate::host::vectorized;
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

/// A program with its carried trees, over parameters in flat buffers.
///
/// ```
/// use thalweg_optim::discovery::{CompiledProgram, Program, Signature};
///
/// let text = "def sgd(w, g, m, v, lr):\n  update = g * lr\n  return (update, m, v)";
/// let program = CompiledProgram::new(&text.parse()?, &Signature::optimizer())?;
/// let mut run = program.run::<f64>(&[2]);
/// let mut w = [1.0, 2.0];
/// run.update(&mut w, &[10.0, 20.0], 0.1)?;
/// assert_eq!(w, [0.0, 0.0]);
/// # Ok::<(), thalweg_optim::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ProgramRun<'a, T> {
    pub(super) program: &'a CompiledProgram,
    pub(super) sizes: Vec<usize>,
    /// The carried trees of each tensor.
    pub(super) state: Vec<Vec<Vec<T>>>,
    pub(super) host: Host,
}

impl<T: Number> ProgramRun<'_, T> {
    /// One step of an update rule ([`Signature::optimizer`](crate::discovery::Signature::optimizer)): `w <- w - update`, and the carried
    /// trees are replaced. All tensors one after the other in `w` and `g`; `lr` is the schedule's
    /// value.
    ///
    /// # Errors
    /// [`Error::Shape`] when lengths do not fit the sizes; [`Error::InvalidArgument`] for a program
    /// of another signature.
    pub fn update(&mut self, w: &mut [T], g: &[T], lr: f64) -> Result<()> {
        let numel: usize = self.sizes.iter().sum();
        for (name, len) in [("w", w.len()), ("g", g.len())] {
            if len != numel {
                return Err(Error::shape(name, &[len], format!("[{numel}]")));
            }
        }
        let sizes = std::mem::take(&mut self.sizes);
        let all: Vec<Range<usize>> = ranges(&sizes).collect();
        self.sizes = sizes;
        let tensors: Vec<(&[T], &[T])> = all
            .iter()
            .map(|range| (&w[range.clone()], &g[range.clone()]))
            .collect();
        self.prepare(&tensors, lr)?;
        let mut rest = w;
        for (i, range) in all.iter().enumerate() {
            let (own, after) = rest.split_at_mut(range.len());
            self.finish(i, own, &g[range.clone()], false);
            rest = after;
        }
        Ok(())
    }

    /// Computes everything that is not a tree, from the weights and gradients of all tensors.
    pub(in crate::discovery) fn prepare(
        &mut self,
        tensors: &[(&[T], &[T])],
        lr: f64,
    ) -> Result<()> {
        let inputs = &self.program.signature.inputs;
        let scalars = inputs.iter().filter(|(_, ty)| *ty == Ty::Scalar).count();
        let mut carried = self.program.carried.iter().enumerate();
        let in_order = carried.all(|(k, (place, _))| *place == k + 2);
        let trees = 2 + self.program.carried.len();
        if self.program.tree_inputs != trees || scalars != 1 || !in_order {
            let expected = "weights, gradients, carried trees, and one scalar";
            return Err(Error::argument("inputs of the program", inputs, expected));
        }
        let mut parts = Vec::with_capacity(tensors.len());
        for ((w, g), state) in tensors.iter().zip(&self.state) {
            let mut inputs = vec![*w, *g];
            inputs.extend(state.iter().map(Vec::as_slice));
            parts.push(inputs);
        }
        self.host.prepare(self.program, &parts, &[lr])
    }

    /// Writes the outputs of tensor `i`, after [`prepare`](Self::prepare). With `hold`, entries whose
    /// gradient is not finite keep everything; gives their number.
    pub(in crate::discovery) fn finish(
        &mut self,
        i: usize,
        w: &mut [T],
        g: &[T],
        hold: bool,
    ) -> u64 {
        let (program, host) = (self.program, &self.host);
        let mut states: Vec<_> = self.state[i]
            .iter_mut()
            .map(|s| s.chunks_mut(CHUNK))
            .collect();
        let mut work = Vec::new();
        for (w, g) in w.chunks_mut(CHUNK).zip(g.chunks(CHUNK)) {
            let own: Vec<&mut [T]> = states.iter_mut().filter_map(Iterator::next).collect();
            work.push((w, g, own));
        }
        let one = |registers: &mut Vec<Vec<T>>, item: &mut Work<'_, T>| {
            program.write(registers, host, i, item, hold)
        };
        if work.len() > 1 {
            let parts = work.par_iter_mut();
            return parts
                .map_init(
                    || program.registers(),
                    |registers, item| one(registers, item),
                )
                .sum();
        }
        let mut registers = program.registers();
        work.iter_mut().map(|item| one(&mut registers, item)).sum()
    }

    /// The carried trees of each tensor.
    pub fn state(&self) -> &[Vec<Vec<T>>] {
        &self.state
    }

    /// Replaces the carried trees.
    ///
    /// # Errors
    /// [`Error::Shape`] when numbers or lengths differ.
    pub fn load_state(&mut self, state: &[Vec<Vec<T>>]) -> Result<()> {
        let lengths = |s: &[Vec<Vec<T>>]| s.iter().flatten().map(Vec::len).collect::<Vec<_>>();
        let same = state.len() == self.state.len() && lengths(state) == lengths(&self.state);
        if !same {
            let expected = format!("{:?}", lengths(&self.state));
            return Err(Error::shape("carried trees", &lengths(state), expected));
        }
        self.state = state.to_vec();
        Ok(())
    }

    /// Works on these tensors from now on.
    pub(in crate::discovery) fn adopt(&mut self, sizes: Vec<usize>, state: Vec<Vec<Vec<T>>>) {
        self.host = Host::new(self.program, sizes.len());
        (self.sizes, self.state) = (sizes, state);
    }

    /// Gives the carried trees away.
    pub(in crate::discovery) fn release(self) -> Vec<Vec<Vec<T>>> {
        self.state
    }
}

type Work<'w, T> = (&'w mut [T], &'w [T], Vec<&'w mut [T]>);

impl CompiledProgram {
    /// The last pass over one chunk: the weights move, the carried trees are replaced. A carried tree
    /// that goes through unchanged is not touched.
    fn write<T: Number>(
        &self,
        registers: &mut [Vec<T>],
        host: &Host,
        tensor: usize,
        (w, g, states): &mut Work<'_, T>,
        hold: bool,
    ) -> u64 {
        let Some(last) = self.passes.last() else {
            return 0;
        };
        let (registers, outputs) = registers.split_at_mut(self.registers);
        let mut held = 0;
        for tile in tiles(0..w.len()) {
            let len = tile.len();
            let mut inputs: [&[T]; MAX_TREES] = [&[]; MAX_TREES];
            (inputs[0], inputs[1]) = (&w[tile.clone()], &g[tile.clone()]);
            for (slot, state) in inputs[2..].iter_mut().zip(states.iter()) {
                *slot = &state[tile.clone()];
            }
            last.evaluate(registers, &inputs, host, tensor, len);
            // What an output takes from a tree that goes in may be overwritten before it is written.
            for (o, (out, operand)) in outputs.iter_mut().zip(&self.outputs).enumerate() {
                let moves = |from| {
                    let carried = |(place, output): &(usize, usize)| *output == o && *place != from;
                    o == 0 || self.carried.iter().any(carried)
                };
                match *operand {
                    Operand::Input(from) if moves(from) => {
                        out[..len].copy_from_slice(inputs[from]);
                    }
                    _ => {}
                }
            }
            let result = |output: usize| match self.outputs[output] {
                Operand::Input(_) => Source::Slice(&outputs[output][..len]),
                operand => last.source(operand, registers, &[], host, tensor),
            };
            let bad = if hold {
                not_finite(&g[tile.clone()])
            } else {
                Vec::new()
            };
            held += bad.len() as u64;
            store(&mut w[tile.clone()], result(0), &bad, |w, update| {
                w - update
            });
            for (state, (place, output)) in states.iter_mut().zip(&self.carried) {
                if self.outputs[*output] != Operand::Input(*place) {
                    store(&mut state[tile.clone()], result(*output), &bad, |_, new| {
                        new
                    });
                }
            }
        }
        held
    }
}

/// Places of the entries that are not finite.
fn not_finite<T: Number>(g: &[T]) -> Vec<usize> {
    // 0 x is 0 for finite x and NaN otherwise.
    let zero = T::default();
    let bad = |x: &T| (zero * *x).is_nan();
    let any = vectorized(
        #[inline(always)]
        || g.iter().fold(false, |any, x| any | bad(x)),
    );
    match any {
        true => (0..g.len()).filter(|k| bad(&g[*k])).collect(),
        false => Vec::new(),
    }
}

/// `target = f(target, source)` but for the entries of `kept`.
#[inline(always)]
fn store<T: Number>(
    target: &mut [T],
    source: Source<'_, T>,
    kept: &[usize],
    f: impl Fn(T, T) -> T,
) {
    let before: Vec<(usize, T)> = kept.iter().map(|k| (*k, target[*k])).collect();
    vectorized(
        #[inline(always)]
        || match source {
            Source::Slice(new) => {
                target
                    .iter_mut()
                    .zip(new)
                    .for_each(|(old, new)| *old = f(*old, *new));
            }
            Source::Value(new) => target.iter_mut().for_each(|old| *old = f(*old, new)),
        },
    );
    before.into_iter().for_each(|(k, value)| target[k] = value);
}
