//! Programs that run: values are computed over tiles that stay in the cache.
//!
//! A program is cut at its reductions (dot products and norms): one pass over memory for each level
//! of them, which computes what its reductions need and keeps nothing, and one last pass that writes
//! the outputs. A program without reductions is a single pass.

mod build;
mod host;
mod pass;
mod run;

use super::check::{typecheck, Signature, Ty};
use super::ops::{Number, Op};
use super::program::{Arg, Program};
use crate::{Error, Result};
use build::Builder;
use host::Host;
pub use run::ProgramRun;
use std::ops::Range;

/// Elements that all values of a program are computed for at a time.
const TILE: usize = 512;

/// Elements that one task takes; fixed, so that sums have the same bits for any number of threads.
const CHUNK: usize = 16 * 1024;

/// Trees that go into a program, at most.
const MAX_TREES: usize = 8;

/// Where a value is.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Operand {
    Const(f64),
    Scalar(usize),
    /// One number for each tensor.
    PerTensor(usize),
    /// A tree that goes into the program.
    Input(usize),
    /// A tree that a step computes.
    Tree(usize),
}

/// What a host or tile step computes.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Kind {
    Op(Op),
    /// `sqrt(x)` of a sum of squares.
    Root,
    /// `x / (sqrt(y) sqrt(z))`
    Cosine,
    /// `min(1, x / y)`
    Factor,
}

#[derive(Debug, Clone)]
struct Step {
    kind: Kind,
    args: [Operand; 3],
    dst: Operand,
    level: usize,
}

#[derive(Debug, Clone)]
struct Reduction {
    /// `sum a b`, of one tensor each or over all.
    args: [Operand; 2],
    dst: Operand,
    level: usize,
}

/// The tile steps of one pass.
#[derive(Debug, Clone, Default)]
struct Pass {
    steps: Vec<Step>,
    reductions: Vec<Reduction>,
    /// The register of each tree value.
    registers: Vec<usize>,
}

/// A program ready to run. Made of a simplified program; holds no state.
#[derive(Debug, Clone)]
pub struct CompiledProgram {
    source: Program,
    signature: Signature,
    /// Steps over scalars and numbers of tensors.
    host: Vec<Step>,
    passes: Vec<Pass>,
    outputs: Vec<Operand>,
    scalars: usize,
    per_tensor: usize,
    registers: usize,
    /// Which scalar slot each scalar input has, in order.
    scalar_inputs: Vec<usize>,
    tree_inputs: usize,
    /// For each carried tree: its place among the tree inputs, and the output that feeds it.
    carried: Vec<(usize, usize)>,
}

/// Scalars 0, numbers of tensors 1, trees 2.
fn rank(operand: Operand) -> u8 {
    match operand {
        Operand::Const(_) | Operand::Scalar(_) => 0,
        Operand::PerTensor(_) => 1,
        Operand::Input(_) | Operand::Tree(_) => 2,
    }
}

impl CompiledProgram {
    /// Checks and compiles. Simplify the program first: dead statements cost time.
    ///
    /// # Errors
    /// Those of [`typecheck`].
    pub fn new(program: &Program, signature: &Signature) -> Result<Self> {
        typecheck(program, signature)?;
        let mut build = Builder::default();
        let mut names = vec![Operand::Const(0.0); program.names.len()];
        let (mut tree_inputs, mut scalar_inputs, mut places) = (0, Vec::new(), Vec::new());
        for (slot, (_, ty)) in names.iter_mut().zip(&signature.inputs) {
            places.push(tree_inputs);
            *slot = match ty {
                Ty::Scalar => build.fresh(0),
                Ty::Tree => {
                    tree_inputs += 1;
                    Operand::Input(tree_inputs - 1)
                }
            };
            if let Operand::Scalar(i) = *slot {
                scalar_inputs.push(i);
            }
        }
        for stmt in &program.body {
            let operand = |arg: &Arg| match arg {
                Arg::Var(id) => names[*id],
                Arg::Const(x) => Operand::Const(*x),
            };
            let args: Vec<Operand> = stmt.args.iter().map(operand).collect();
            names[stmt.dst] = build.statement(stmt.op, &args);
        }
        if tree_inputs > MAX_TREES {
            let expected = format!("at most {MAX_TREES}");
            return Err(Error::argument("trees that go in", tree_inputs, expected));
        }
        let outputs: Vec<Operand> = program.outputs.iter().map(|id| names[*id]).collect();
        let carried = signature.feeds();
        let carried = carried.into_iter().map(|(i, o)| (places[i], o)).collect();
        let mut compiled = Self {
            source: program.clone(),
            signature: signature.clone(),
            host: Vec::new(),
            passes: Vec::new(),
            outputs,
            scalars: build.scalars,
            per_tensor: build.per_tensor,
            registers: 0,
            scalar_inputs,
            tree_inputs,
            carried,
        };
        compiled.schedule(build);
        Ok(compiled)
    }

    /// Distributes the steps over the passes.
    fn schedule(&mut self, build: Builder) {
        let on_host = |step: &&Step| rank(step.dst) < 2;
        self.host = build.steps.iter().filter(on_host).cloned().collect();
        let levels = build.reductions.iter().map(|r| r.level + 1).max();
        for level in 0..=levels.unwrap_or(0) {
            let last = level == levels.unwrap_or(0);
            let own = |r: &&Reduction| r.level == level;
            let reductions: Vec<Reduction> = build.reductions.iter().filter(own).cloned().collect();
            let mut needed = vec![false; build.trees];
            let mut need = |operand: &Operand| {
                if let Operand::Tree(i) = operand {
                    needed[*i] = true;
                }
            };
            reductions.iter().flat_map(|r| &r.args).for_each(&mut need);
            if last {
                self.outputs.iter().for_each(&mut need);
            }
            let mut steps = Vec::new();
            for step in build.steps.iter().rev() {
                if let Operand::Tree(i) = step.dst {
                    if needed[i] {
                        for arg in &step.args {
                            if let Operand::Tree(j) = arg {
                                needed[*j] = true;
                            }
                        }
                        steps.push(step.clone());
                    }
                }
            }
            steps.reverse();
            let mut pass = Pass {
                steps,
                reductions,
                registers: vec![0; build.trees],
            };
            let kept = if last { self.outputs.as_slice() } else { &[] };
            self.registers = self.registers.max(pass.allocate(kept));
            self.passes.push(pass);
        }
    }

    /// The program that this was made of.
    pub fn program(&self) -> &Program {
        &self.source
    }

    /// Passes over memory that a step takes.
    pub fn passes(&self) -> usize {
        self.passes.len()
    }

    /// Fresh state for parameters of these sizes.
    pub fn run<T: Number>(&self, sizes: &[usize]) -> ProgramRun<'_, T> {
        let zeros = |n: &usize| vec![vec![T::default(); *n]; self.carried.len()];
        ProgramRun {
            program: self,
            sizes: sizes.to_vec(),
            state: sizes.iter().map(zeros).collect(),
            host: Host::new(self, sizes.len()),
        }
    }

    /// Evaluates as a pure function: trees in the order of the signature (`sizes` are those of each
    /// tree's tensors), scalars likewise; gives the outputs.
    ///
    /// # Errors
    /// [`Error::Shape`] when something does not fit.
    pub fn evaluate<T: Number>(
        &self,
        trees: &[&[T]],
        scalars: &[f64],
        sizes: &[usize],
    ) -> Result<Vec<Vec<T>>> {
        let numel: usize = sizes.iter().sum();
        if trees.len() != self.tree_inputs || trees.iter().any(|t| t.len() != numel) {
            let expected = format!("{} trees of {numel} entries", self.tree_inputs);
            let got: Vec<usize> = trees.iter().map(|t| t.len()).collect();
            return Err(Error::shape("inputs of the program", &got, expected));
        }
        let mut host = Host::new(self, sizes.len());
        let mut parts = Vec::new();
        for range in ranges(sizes) {
            parts.push(trees.iter().map(|t| &t[range.clone()]).collect::<Vec<_>>());
        }
        host.prepare(self, &parts, scalars)?;
        let mut outputs = vec![Vec::with_capacity(numel); self.outputs.len()];
        let mut registers = self.registers();
        let Some(last) = self.passes.last() else {
            return Ok(outputs);
        };
        for (i, inputs) in parts.iter().enumerate() {
            let n = inputs.first().map_or(0, |x| x.len());
            for tile in tiles(0..n) {
                let inputs: Vec<&[T]> = inputs.iter().map(|x| &x[tile.clone()]).collect();
                last.evaluate(&mut registers, &inputs, &host, i, tile.len());
                for (out, operand) in outputs.iter_mut().zip(&self.outputs) {
                    let source = last.source(*operand, &registers, &inputs, &host, i);
                    let from = out.len();
                    out.resize(from + tile.len(), T::default());
                    source.write(&mut out[from..]);
                }
            }
        }
        Ok(outputs)
    }

    fn registers<T: Number>(&self) -> Vec<Vec<T>> {
        vec![vec![T::default(); TILE]; self.registers + self.outputs.len()]
    }
}

fn ranges(sizes: &[usize]) -> impl Iterator<Item = Range<usize>> + '_ {
    sizes.iter().scan(0, |from, size| {
        *from += size;
        Some(*from - size..*from)
    })
}

fn tiles(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range
        .step_by(TILE)
        .map(move |from| from..(from + TILE).min(end))
}
