//! The operations of the program language.

/// An operation: what a statement applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // The names are those of the functions.
pub enum Op {
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
    GlobalNorm,
}

/// The guard of divisions, and the constant `eps()`.
pub(super) const EPS: f64 = 1e-8;

/// Name and number of arguments of every operation but [`Op::Copy`].
const TABLE: [(Op, &str, usize); 45] = [
    (Op::Pi, "pi", 0),
    (Op::E, "e", 0),
    (Op::Eps, "eps", 0),
    (Op::Abs, "abs", 1),
    (Op::Cos, "cos", 1),
    (Op::Sin, "sin", 1),
    (Op::Tan, "tan", 1),
    (Op::Arcsin, "arcsin", 1),
    (Op::Arccos, "arccos", 1),
    (Op::Arctan, "arctan", 1),
    (Op::Sinh, "sinh", 1),
    (Op::Cosh, "cosh", 1),
    (Op::Tanh, "tanh", 1),
    (Op::Arcsinh, "arcsinh", 1),
    (Op::Arccosh, "arccosh", 1),
    (Op::Arctanh, "arctanh", 1),
    (Op::Exp, "exp", 1),
    (Op::Exp2, "exp2", 1),
    (Op::Exp10, "exp10", 1),
    (Op::Expm1, "expm1", 1),
    (Op::Square, "square", 1),
    (Op::Cube, "cube", 1),
    (Op::Cbrt, "cbrt", 1),
    (Op::Sign, "sign", 1),
    (Op::Reciprocal, "reciprocal", 1),
    (Op::Negative, "negative", 1),
    (Op::Log, "log", 1),
    (Op::Log2, "log2", 1),
    (Op::Log10, "log10", 1),
    (Op::Log1p, "log1p", 1),
    (Op::Sqrt, "sqrt", 1),
    (Op::Norm, "norm", 1),
    (Op::Add, "+", 2),
    (Op::Sub, "-", 2),
    (Op::Mul, "*", 2),
    (Op::Div, "/", 2),
    (Op::Max, "max", 2),
    (Op::Min, "min", 2),
    (Op::Power, "power", 2),
    (Op::Dot, "dot", 2),
    (Op::CosineSim, "cosine_sim", 2),
    (Op::ClipByGlobalNorm, "clip_by_global_norm", 2),
    (Op::Clip, "clip", 2),
    (Op::Interpolate, "interpolate", 3),
    (Op::GlobalNorm, "global_norm", 1),
];

impl Op {
    /// All operations but the copy, in a fixed order.
    pub fn all() -> impl Iterator<Item = Op> {
        TABLE.iter().map(|(op, ..)| *op)
    }

    /// The name in program text; `+`, `-`, `*` and `/` stand between their arguments.
    pub fn name(self) -> &'static str {
        let entry = TABLE.iter().find(|(op, ..)| *op == self);
        entry.map_or("copy", |(_, name, _)| name)
    }

    /// The operation of this name.
    pub fn from_name(name: &str) -> Option<Op> {
        let entry = TABLE.iter().find(|(_, n, _)| *n == name);
        entry.map(|(op, ..)| *op)
    }

    /// Number of arguments.
    pub fn arity(self) -> usize {
        let entry = TABLE.iter().find(|(op, ..)| *op == self);
        entry.map_or(1, |(.., arity)| *arity)
    }

    /// Whether it stands between its arguments.
    pub fn is_infix(self) -> bool {
        matches!(self, Op::Add | Op::Sub | Op::Mul | Op::Div)
    }

    /// Whether the order of its arguments has no influence.
    pub fn is_commutative(self) -> bool {
        matches!(self, Op::Add | Op::Mul | Op::Max | Op::Min)
    }

    /// Whether it makes a scalar of trees.
    pub fn is_reduction(self) -> bool {
        matches!(self, Op::Dot | Op::CosineSim | Op::GlobalNorm)
    }

    /// Whether argument `i` must be a scalar.
    pub fn wants_scalar(self, i: usize) -> bool {
        matches!((self, i), (Op::Interpolate, 2) | (Op::ClipByGlobalNorm, 1))
    }

    /// The value of an elementwise operation; the reductions of numbers that are scalars.
    // Inlined where the operation is a constant, so that a loop over a tile has no choice inside; it
    // must not call itself for that.
    #[inline(always)]
    pub(super) fn apply<T: Number>(self, x: T, y: T, z: T) -> T {
        let number = T::from_f64;
        match self {
            Op::Copy => x,
            Op::Pi => number(std::f64::consts::PI),
            Op::E => number(std::f64::consts::E),
            Op::Eps => number(EPS),
            Op::Abs | Op::Norm | Op::GlobalNorm => x.map(f64::abs, f32::abs),
            Op::Cos => x.map(f64::cos, f32::cos),
            Op::Sin => x.map(f64::sin, f32::sin),
            Op::Tan => x.map(f64::tan, f32::tan),
            Op::Arcsin => x.map(f64::asin, f32::asin),
            Op::Arccos => x.map(f64::acos, f32::acos),
            Op::Arctan => x.map(f64::atan, f32::atan),
            Op::Sinh => x.map(f64::sinh, f32::sinh),
            Op::Cosh => x.map(f64::cosh, f32::cosh),
            Op::Tanh => x.map(f64::tanh, f32::tanh),
            Op::Arcsinh => x.map(f64::asinh, f32::asinh),
            Op::Arccosh => x.map(f64::acosh, f32::acosh),
            Op::Arctanh => x.map(f64::atanh, f32::atanh),
            Op::Exp => x.map(f64::exp, f32::exp),
            Op::Exp2 => x.map(f64::exp2, f32::exp2),
            Op::Exp10 => x.map(|x| 10f64.powf(x), |x| 10f32.powf(x)),
            Op::Expm1 => x.map(f64::exp_m1, f32::exp_m1),
            Op::Square => x * x,
            Op::Cube => x * x * x,
            Op::Cbrt => x.map(f64::cbrt, f32::cbrt),
            Op::Sign => sign(x),
            Op::Reciprocal => number(1.0) / x,
            Op::Negative => number(0.0) - x,
            Op::Log => x.map(|x| x.abs().ln(), |x| x.abs().ln()),
            Op::Log2 => x.map(|x| x.abs().log2(), |x| x.abs().log2()),
            Op::Log10 => x.map(|x| x.abs().log10(), |x| x.abs().log10()),
            Op::Log1p => x.map(|x| (1.0 + x).abs().ln(), |x| (1.0 + x).abs().ln()),
            Op::Sqrt => x.map(|x| x.abs().sqrt(), |x| x.abs().sqrt()),
            Op::Add => x + y,
            Op::Sub => x - y,
            Op::Mul | Op::Dot => x * y,
            Op::Div => x / (y + number(EPS)),
            Op::Max => larger(x, y),
            Op::Min => smaller(x, y),
            Op::Power => x.power(y),
            Op::CosineSim => {
                let both = (x * y).map(f64::abs, f32::abs);
                x * y / both
            }
            Op::ClipByGlobalNorm => {
                let norm = x.map(f64::abs, f32::abs);
                x * smaller(number(1.0), y / norm)
            }
            Op::Clip => smaller(larger(x, number(0.0) - y), y),
            Op::Interpolate => (number(1.0) - z) * x + z * y,
        }
    }
}

/// The larger number; a NaN on either side stays one.
#[inline(always)]
fn larger<T: Number>(x: T, y: T) -> T {
    if x > y || x.is_nan() {
        x
    } else {
        y
    }
}

/// The smaller number; a NaN on either side stays one.
#[inline(always)]
fn smaller<T: Number>(x: T, y: T) -> T {
    if x < y || x.is_nan() {
        x
    } else {
        y
    }
}

/// 1, -1, or zero and NaN as they are; by selections, because signs of gradients cannot be predicted.
#[inline(always)]
fn sign<T: Number>(x: T) -> T {
    let (zero, one) = (T::from_f64(0.0), T::from_f64(1.0));
    let positive = if x > zero { one } else { x };
    if x < zero {
        zero - one
    } else {
        positive
    }
}

/// The two precisions that programs run in.
pub trait Number:
    Copy
    + PartialOrd
    + Send
    + Sync
    + Default
    + std::fmt::Debug
    + std::ops::Add<Output = Self>
    + std::ops::Sub<Output = Self>
    + std::ops::Mul<Output = Self>
    + std::ops::Div<Output = Self>
    + 'static
{
    /// Rounds.
    fn from_f64(x: f64) -> Self;
    /// Exact.
    fn to_f64(self) -> f64;
    /// Whether it is NaN.
    fn is_nan(self) -> bool;
    /// `self` to the power `y`.
    fn power(self, y: Self) -> Self;
    /// Applies the function of this precision.
    fn map(self, double: fn(f64) -> f64, single: fn(f32) -> f32) -> Self;
}

impl Number for f64 {
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        self.is_nan()
    }
    #[inline(always)]
    fn power(self, y: Self) -> Self {
        self.powf(y)
    }
    #[inline(always)]
    fn map(self, double: fn(f64) -> f64, _: fn(f32) -> f32) -> Self {
        double(self)
    }
}

impl Number for f32 {
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as f32
    }
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn is_nan(self) -> bool {
        self.is_nan()
    }
    #[inline(always)]
    fn power(self, y: Self) -> Self {
        self.powf(y)
    }
    #[inline(always)]
    fn map(self, _: fn(f64) -> f64, single: fn(f32) -> f32) -> Self {
        single(self)
    }
}
