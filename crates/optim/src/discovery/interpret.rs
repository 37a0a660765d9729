//! Programs that run: values are computed over tiles that stay in the cache.
//!
//! A program is cut at its reductions (dot products and norms): one pass over memory for each level
//! of them, which computes what its reductions need and keeps nothing, and one last pass that writes
//! the outputs. A program without reductions is a single pass.

use super::check::{typecheck, Signature, Ty};
use super::ops::{Number, Op};
use super::program::{Arg, Program};
use crate::{Error, Result};
use rayon::prelude::*;
use std::ops::Range;

/// Elements that all values of a program are computed for at a time.
const TILE: usize = 256;

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

struct Builder {
    steps: Vec<Step>,
    reductions: Vec<Reduction>,
    scalars: usize,
    per_tensor: usize,
    trees: usize,
    level_of: Vec<(Operand, usize)>,
}

impl Builder {
    fn level(&self, operand: Operand) -> usize {
        let known = self.level_of.iter().find(|(o, _)| *o == operand);
        known.map_or(0, |(_, level)| *level)
    }

    fn fresh(&mut self, rank: u8) -> Operand {
        let (count, make): (&mut usize, fn(usize) -> Operand) = match rank {
            0 => (&mut self.scalars, Operand::Scalar),
            1 => (&mut self.per_tensor, Operand::PerTensor),
            _ => (&mut self.trees, Operand::Tree),
        };
        *count += 1;
        make(*count - 1)
    }

    fn step(&mut self, kind: Kind, args: &[Operand]) -> Operand {
        let rank = args.iter().map(|a| rank(*a)).max().unwrap_or(0);
        let level = args.iter().map(|a| self.level(*a)).max().unwrap_or(0);
        let dst = self.fresh(rank);
        let mut all = [Operand::Const(0.0); 3];
        all[..args.len()].copy_from_slice(args);
        self.level_of.push((dst, level));
        self.steps.push(Step {
            kind,
            args: all,
            dst,
            level,
        });
        dst
    }

    /// `sum a b` over everything, or of each tensor.
    fn reduce(&mut self, a: Operand, b: Operand, per_tensor: bool) -> Operand {
        if rank(a).max(rank(b)) == 0 || (per_tensor && rank(a).max(rank(b)) == 1) {
            return self.step(Kind::Op(Op::Mul), &[a, b]);
        }
        let dst = self.fresh(u8::from(per_tensor));
        let level = self.level(a).max(self.level(b));
        self.level_of.push((dst, level + 1));
        self.reductions.push(Reduction {
            args: [a, b],
            dst,
            level,
        });
        dst
    }

    fn statement(&mut self, op: Op, args: &[Operand]) -> Operand {
        match (op, args) {
            (Op::Copy, [x]) => *x,
            (Op::Dot, [a, b]) => self.reduce(*a, *b, false),
            (Op::GlobalNorm, [x]) => {
                let squares = self.reduce(*x, *x, false);
                self.step(Kind::Root, &[squares])
            }
            (Op::Norm, [x]) => {
                let squares = self.reduce(*x, *x, true);
                self.step(Kind::Root, &[squares])
            }
            (Op::CosineSim, [a, b]) => {
                let dot = self.reduce(*a, *b, false);
                let (aa, bb) = (self.reduce(*a, *a, false), self.reduce(*b, *b, false));
                self.step(Kind::Cosine, &[dot, aa, bb])
            }
            (Op::ClipByGlobalNorm, [x, limit]) => {
                let squares = self.reduce(*x, *x, false);
                let norm = self.step(Kind::Root, &[squares]);
                let factor = self.step(Kind::Factor, &[*limit, norm]);
                self.step(Kind::Op(Op::Mul), &[*x, factor])
            }
            (op, args) => self.step(Kind::Op(op), args),
        }
    }
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
        let mut build = Builder {
            steps: Vec::new(),
            reductions: Vec::new(),
            scalars: 0,
            per_tensor: 0,
            trees: 0,
            level_of: Vec::new(),
        };
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

/// A source of numbers for a tile.
#[derive(Clone, Copy)]
enum Source<'a, T> {
    Slice(&'a [T]),
    Value(T),
}

impl<T: Number> Source<'_, T> {
    #[inline(always)]
    fn get(&self, i: usize) -> T {
        match self {
            Self::Slice(x) => x[i],
            Self::Value(x) => *x,
        }
    }

    fn write(&self, out: &mut [T]) {
        match self {
            Self::Slice(x) => out.copy_from_slice(&x[..out.len()]),
            Self::Value(x) => out.fill(*x),
        }
    }
}

impl Pass {
    /// Gives every value a register by its last use; how many there are.
    fn allocate(&mut self, kept: &[Operand]) -> usize {
        let mut last = vec![0; self.registers.len()];
        let mut touch = |operand: &Operand, at: usize| {
            if let Operand::Tree(i) = operand {
                last[*i] = last[*i].max(at);
            }
        };
        for (at, step) in self.steps.iter().enumerate() {
            step.args.iter().for_each(|arg| touch(arg, at));
        }
        let of_reductions = self.reductions.iter().flat_map(|r| &r.args);
        kept.iter()
            .chain(of_reductions)
            .for_each(|arg| touch(arg, usize::MAX));
        let (mut free, mut count) = (Vec::new(), 0);
        for (at, step) in self.steps.iter().enumerate() {
            // An argument's register becomes free only after this step has written its own.
            let own = free.pop().unwrap_or_else(|| {
                count += 1;
                count - 1
            });
            if let Operand::Tree(i) = step.dst {
                self.registers[i] = own;
                if last[i] <= at {
                    free.push(own);
                }
            }
            let mut seen = Vec::new();
            for arg in &step.args {
                if let Operand::Tree(i) = arg {
                    if last[*i] == at && !seen.contains(i) {
                        seen.push(*i);
                        free.push(self.registers[*i]);
                    }
                }
            }
        }
        count
    }

    fn source<'a, T: Number>(
        &self,
        operand: Operand,
        registers: &'a [Vec<T>],
        inputs: &[&'a [T]],
        host: &Host,
        tensor: usize,
    ) -> Source<'a, T> {
        match operand {
            Operand::Const(x) => Source::Value(T::from_f64(x)),
            Operand::Scalar(i) => Source::Value(T::from_f64(host.scalars[i])),
            Operand::PerTensor(i) => Source::Value(T::from_f64(host.per_tensor[i][tensor])),
            Operand::Input(i) => Source::Slice(inputs[i]),
            Operand::Tree(i) => Source::Slice(&registers[self.registers[i]]),
        }
    }

    /// All steps for one tile of `len` elements of a tensor.
    fn evaluate<T: Number>(
        &self,
        registers: &mut [Vec<T>],
        inputs: &[&[T]],
        host: &Host,
        tensor: usize,
        len: usize,
    ) {
        for step in &self.steps {
            let Operand::Tree(i) = step.dst else {
                continue;
            };
            let own = self.registers[i];
            let mut out = std::mem::take(&mut registers[own]);
            let source = |arg| self.source(arg, registers, inputs, host, tensor);
            let [x, y, z] = step.args;
            if let Kind::Op(op) = step.kind {
                elementwise(op, &mut out[..len], source(x), source(y), source(z));
            }
            registers[own] = out;
        }
    }
}

/// `out = op(x, y, z)`: the operation is chosen outside the loop.
fn elementwise<T: Number>(
    op: Op,
    out: &mut [T],
    x: Source<'_, T>,
    y: Source<'_, T>,
    z: Source<'_, T>,
) {
    macro_rules! choose {
        ($($name:ident),*) => {
            match op {
                $(Op::$name => over(out, x, y, z, |x, y, z| Op::$name.apply(x, y, z)),)*
            }
        };
    }
    choose!(
        Copy,
        Pi,
        E,
        Eps,
        Abs,
        Cos,
        Sin,
        Tan,
        Arcsin,
        Arccos,
        Arctan,
        Sinh,
        Cosh,
        Tanh,
        Arcsinh,
        Arccosh,
        Arctanh,
        Exp,
        Exp2,
        Exp10,
        Expm1,
        Square,
        Cube,
        Cbrt,
        Sign,
        Reciprocal,
        Negative,
        Log,
        Log2,
        Log10,
        Log1p,
        Sqrt,
        Norm,
        Add,
        Sub,
        Mul,
        Div,
        Max,
        Min,
        Power,
        Dot,
        CosineSim,
        ClipByGlobalNorm,
        Clip,
        Interpolate,
        GlobalNorm
    );
}

#[inline(always)]
fn over<T: Number>(
    out: &mut [T],
    x: Source<'_, T>,
    y: Source<'_, T>,
    z: Source<'_, T>,
    f: impl Fn(T, T, T) -> T,
) {
    match (x, y, z) {
        (Source::Slice(x), Source::Slice(y), Source::Value(z)) => {
            for ((out, x), y) in out.iter_mut().zip(x).zip(y) {
                *out = f(*x, *y, z);
            }
        }
        (Source::Slice(x), Source::Value(y), Source::Value(z)) => {
            for (out, x) in out.iter_mut().zip(x) {
                *out = f(*x, y, z);
            }
        }
        (Source::Value(x), Source::Slice(y), Source::Value(z)) => {
            for (out, y) in out.iter_mut().zip(y) {
                *out = f(x, *y, z);
            }
        }
        (x, y, z) => {
            for (i, out) in out.iter_mut().enumerate() {
                *out = f(x.get(i), y.get(i), z.get(i));
            }
        }
    }
}

/// Scalars and numbers of tensors of one step.
#[derive(Debug, Clone)]
struct Host {
    scalars: Vec<f64>,
    per_tensor: Vec<Vec<f64>>,
    tensors: usize,
}

impl Host {
    fn new(program: &CompiledProgram, tensors: usize) -> Self {
        Self {
            scalars: vec![0.0; program.scalars],
            per_tensor: vec![vec![0.0; tensors]; program.per_tensor],
            tensors,
        }
    }

    /// Runs all passes but the last: afterwards everything that is not a tree is known. `parts` are
    /// the tree inputs of each tensor.
    fn prepare<T: Number>(
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

    fn value(&self, operand: Operand, tensor: usize) -> f64 {
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
                    for k in 0..tile.len() {
                        *sum += a.get(k).to_f64() * b.get(k).to_f64();
                    }
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
    program: &'a CompiledProgram,
    sizes: Vec<usize>,
    /// The carried trees of each tensor.
    state: Vec<Vec<Vec<T>>>,
    host: Host,
}

impl<T: Number> ProgramRun<'_, T> {
    /// One step of an update rule ([`Signature::optimizer`]): `w <- w - update`, and the carried
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
            self.finish(i, own, &g[range.clone()]);
            rest = after;
        }
        Ok(())
    }

    /// Computes everything that is not a tree, from the weights and gradients of all tensors.
    pub(super) fn prepare(&mut self, tensors: &[(&[T], &[T])], lr: f64) -> Result<()> {
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

    /// Writes the outputs of tensor `i`, after [`prepare`](Self::prepare).
    pub(super) fn finish(&mut self, i: usize, w: &mut [T], g: &[T]) {
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
            program.write(registers, host, i, item);
        };
        if work.len() > 1 {
            work.par_iter_mut().for_each_init(
                || program.registers(),
                |registers, item| one(registers, item),
            );
        } else {
            let mut registers = program.registers();
            work.iter_mut().for_each(|item| one(&mut registers, item));
        }
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
    pub(super) fn adopt(&mut self, sizes: Vec<usize>, state: Vec<Vec<Vec<T>>>) {
        self.host = Host::new(self.program, sizes.len());
        (self.sizes, self.state) = (sizes, state);
    }

    /// Gives the carried trees away.
    pub(super) fn release(self) -> Vec<Vec<Vec<T>>> {
        self.state
    }
}

type Work<'w, T> = (&'w mut [T], &'w [T], Vec<&'w mut [T]>);

impl CompiledProgram {
    /// The last pass over one chunk: the weights move, the carried trees are replaced.
    fn write<T: Number>(
        &self,
        registers: &mut [Vec<T>],
        host: &Host,
        tensor: usize,
        (w, g, states): &mut Work<'_, T>,
    ) {
        let Some(last) = self.passes.last() else {
            return;
        };
        let (registers, outputs) = registers.split_at_mut(self.registers);
        for tile in tiles(0..w.len()) {
            let len = tile.len();
            let mut inputs: [&[T]; MAX_TREES] = [&[]; MAX_TREES];
            (inputs[0], inputs[1]) = (&w[tile.clone()], &g[tile.clone()]);
            for (slot, state) in inputs[2..].iter_mut().zip(states.iter()) {
                *slot = &state[tile.clone()];
            }
            last.evaluate(registers, &inputs, host, tensor, len);
            for (out, operand) in outputs.iter_mut().zip(&self.outputs) {
                let source = last.source(*operand, registers, &inputs, host, tensor);
                source.write(&mut out[..len]);
            }
            for (w, update) in w[tile.clone()].iter_mut().zip(&outputs[0]) {
                *w = *w - *update;
            }
            for (state, (_, output)) in states.iter_mut().zip(&self.carried) {
                state[tile.clone()].copy_from_slice(&outputs[*output][..len]);
            }
        }
    }
}
