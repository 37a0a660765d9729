//! One pass: which register holds which value, and the loops over a tile.

use super::{Host, Kind, Operand, Pass};
use crate::discovery::ops::{Number, Op};
use crate::host::vectorized;

/// A source of numbers for a tile.
#[derive(Clone, Copy)]
pub(super) enum Source<'a, T> {
    Slice(&'a [T]),
    Value(T),
}

impl<T: Number> Source<'_, T> {
    #[inline(always)]
    pub(super) fn get(&self, i: usize) -> T {
        match self {
            Self::Slice(x) => x[i],
            Self::Value(x) => *x,
        }
    }

    pub(super) fn write(&self, out: &mut [T]) {
        match self {
            Self::Slice(x) => out.copy_from_slice(&x[..out.len()]),
            Self::Value(x) => out.fill(*x),
        }
    }
}

impl Pass {
    /// Gives every value a register by its last use; how many there are.
    pub(super) fn allocate(&mut self, kept: &[Operand]) -> usize {
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

    pub(super) fn source<'a, T: Number>(
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
    pub(super) fn evaluate<T: Number>(
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
    // Arithmetic becomes vector code; functions of the mathematical library are called one by one.
    macro_rules! choose {
        ($($arithmetic:ident),*; $($function:ident),*) => {
            match op {
                $(Op::$arithmetic => vectorized(
                    #[inline(always)]
                    || over(out, x, y, z, |x, y, z| Op::$arithmetic.apply(x, y, z)),
                ),)*
                $(Op::$function => over(out, x, y, z, |x, y, z| Op::$function.apply(x, y, z)),)*
            }
        };
    }
    choose!(
        Copy, Abs, Square, Cube, Sign, Reciprocal, Negative, Sqrt, Add, Sub, Mul, Div, Max, Min, Clip,
        Interpolate;
        Pi, E, Eps, Cos, Sin, Tan, Arcsin, Arccos, Arctan, Sinh, Cosh, Tanh, Arcsinh, Arccosh, Arctanh,
        Exp, Exp2, Exp10, Expm1, Cbrt, Log, Log2, Log10, Log1p, Norm, Power, Dot, CosineSim,
        ClipByGlobalNorm, GlobalNorm
    );
}

/// `sum a b` over `len` elements in double precision, by lanes: in a fixed order.
pub(super) fn product<T: Number>(a: Source<'_, T>, b: Source<'_, T>, len: usize) -> f64 {
    const LANES: usize = 16;
    vectorized(
        #[inline(always)]
        || {
            let mut lanes = [0.0; LANES];
            let mut from = 0;
            if let (Source::Slice(a), Source::Slice(b)) = (a, b) {
                let pairs = a[..len]
                    .chunks_exact(LANES)
                    .zip(b[..len].chunks_exact(LANES));
                for (a, b) in pairs {
                    for (lane, (a, b)) in lanes.iter_mut().zip(a.iter().zip(b)) {
                        *lane += a.to_f64() * b.to_f64();
                    }
                }
                from = len - len % LANES;
            }
            let rest: f64 = (from..len)
                .map(|k| a.get(k).to_f64() * b.get(k).to_f64())
                .sum();
            lanes.iter().sum::<f64>() + rest
        },
    )
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
