//! Second-order and forward derivatives of closures over candle variables, and checks that no
//! gradient is lost or wrong.
//!
//! For a scalar `f(x, y)` and a direction `v`:
//!
//! | function | computes | by differences |
//! | --- | --- | --- |
//! | [`hvp`] | `H v = d/dx <grad_x f, v>` | `(grad_x f(x + h v) - grad_x f(x - h v)) / 2h` |
//! | [`mixed_vjp`] | `d/dy <grad_x f, v>` | `(grad_y f(x + h v, y) - grad_y f(x - h v, y)) / 2h` |
//! | [`jvp`] | `J v` for a tensor-valued `f` | `(f(x + h v) - f(x - h v)) / 2h` |
//!
//! candle cuts the graph of every gradient unless the process was started with
//! `CANDLE_GRAD_DO_NOT_DETACH=1` (read once per thread). Where it is set the results are exact, by
//! differentiating twice; where it is not they are central differences, and [`Derivative::method`]
//! says which. [`Mode`] forces either.
//!
//! The closures take no arguments: they read the variables that they close over, and must be
//! deterministic (no dropout, no running statistics) since they are evaluated more than once. They
//! return candle's `Result`, so a model's forward pass can be written with `?`. The variables have
//! the same bits afterwards, whatever happens. Results carry no graph.
//!
//! Exact means: as exact as every operation's own backward. A custom operation whose backward uses
//! a kernel without a backward drops its second-order terms; [`check_second_order`] finds that.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use thalweg_tensor_core::autograd::hvp;
//!
//! // f = x0^2 x1: the Hessian at (1, 2) is [[4, 2], [2, 0]].
//! let x = Var::from_tensor(&Tensor::new(&[1.0_f64, 2.0], &Device::Cpu)?)?;
//! let v = Tensor::new(&[1.0_f64, 0.0], &Device::Cpu)?;
//! let f = || x.get(0)?.sqr()? * x.get(1)?;
//! let hv = hvp(f, &[x.clone()], &[v])?;
//! let hv = hv.value[0].to_vec1::<f64>()?;
//! assert!((hv[0] - 4.0).abs() < 1e-6 && (hv[1] - 2.0).abs() < 1e-6);
//! # Ok::<(), thalweg_tensor_core::Error>(())
//! ```

mod check;

pub use check::{check_gradients, check_second_order, grad_check, CheckConfig};

use crate::kernels::{moments, sum_squares, GradMap};
use crate::{Error, Result};
use candle_core::{backprop::GradStore, DType, Device, Tensor, Var};

/// How a derivative was computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Method {
    /// By differentiating twice.
    Exact,
    /// By central differences: the variables moved by `step` times the direction.
    CentralDifferences {
        /// The step `h`.
        step: f64,
    },
}

/// How a derivative should be computed.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum Mode {
    /// Exact where candle keeps the graph of gradients, central differences elsewhere.
    #[default]
    Auto,
    /// Exact, or an error.
    Exact,
    /// Central differences.
    CentralDifferences {
        /// The step `h`; none chooses it from the dtype and the norms of variables and direction.
        step: Option<f64>,
    },
}

/// A derivative with the method that gave it.
#[derive(Debug, Clone)]
pub struct Derivative<T> {
    /// The derivative, without a graph.
    pub value: T,
    /// How it was computed.
    pub method: Method,
}

/// Whether gradients keep their graph on this thread, probed once by differentiating `x^3` twice.
///
/// # Errors
/// Those of candle.
pub fn keeps_graph() -> Result<bool> {
    thread_local!(static KEEPS: std::cell::OnceCell<bool> = const { std::cell::OnceCell::new() });
    KEEPS.with(|cell| {
        if let Some(known) = cell.get() {
            return Ok(*known);
        }
        let x = Var::new(3_f32, &Device::Cpu)?;
        let cube = x.mul(&x)?.mul(&x)?;
        // Where the graph is cut a part of it remains, and the second derivative is 12, not 18.
        let keeps = match cube.backward()?.get(&x) {
            Some(gradient) => match gradient.backward()?.get(&x) {
                Some(second) => second.to_scalar::<f32>()? == 18.0,
                None => false,
            },
            None => false,
        };
        Ok(*cell.get_or_init(|| keeps))
    })
}

/// Hessian-vector product `H v` of the scalar `f` with respect to `vars`, one tensor per variable;
/// `v` has their shapes and dtypes.
///
/// # Errors
/// [`Error::LostGradient`] when a variable gets no gradient; [`Error::InvalidArgument`],
/// [`Error::ShapeMismatch`] and [`Error::DTypeMismatch`] for a `v` that does not fit or is not
/// finite; [`Error::SharedStorage`] for a variable given twice; [`Error::NonFinite`] when the
/// product is not finite; those of `f`.
pub fn hvp<F>(f: F, vars: &[Var], v: &[Tensor]) -> Result<Derivative<Vec<Tensor>>>
where
    F: FnMut() -> candle_core::Result<Tensor>,
{
    hvp_with(Mode::Auto, f, vars, v)
}

/// [`hvp`] by a chosen method.
///
/// # Errors
/// As [`hvp`]; [`Error::Unsupported`] where [`Mode::Exact`] is impossible.
pub fn hvp_with<F>(mode: Mode, f: F, vars: &[Var], v: &[Tensor]) -> Result<Derivative<Vec<Tensor>>>
where
    F: FnMut() -> candle_core::Result<Tensor>,
{
    second_order(mode, f, ("vars", vars), ("vars", vars), v)
}

/// Mixed second derivative `d/dy <grad_x f, v>` of the scalar `f`, one tensor per variable of
/// `y_vars`; `v` has the shapes and dtypes of `x_vars`.
///
/// # Errors
/// As [`hvp`].
pub fn mixed_vjp<F>(
    f: F,
    x_vars: &[Var],
    y_vars: &[Var],
    v: &[Tensor],
) -> Result<Derivative<Vec<Tensor>>>
where
    F: FnMut() -> candle_core::Result<Tensor>,
{
    mixed_vjp_with(Mode::Auto, f, x_vars, y_vars, v)
}

/// [`mixed_vjp`] by a chosen method.
///
/// # Errors
/// As [`hvp_with`].
pub fn mixed_vjp_with<F>(
    mode: Mode,
    f: F,
    x_vars: &[Var],
    y_vars: &[Var],
    v: &[Tensor],
) -> Result<Derivative<Vec<Tensor>>>
where
    F: FnMut() -> candle_core::Result<Tensor>,
{
    second_order(mode, f, ("x_vars", x_vars), ("y_vars", y_vars), v)
}

/// Forward derivative `J v` of the tensor-valued `f` with respect to `vars`; it has the shape of
/// `f`'s value.
///
/// The exact form is two backward passes: `g(u) = J^T u` is linear in `u`, so `J v` is the gradient
/// of `<g(u), v>` with respect to `u`.
///
/// # Errors
/// As [`hvp`]; by differences `f` needs no gradient, so none can be lost.
pub fn jvp<F>(f: F, vars: &[Var], v: &[Tensor]) -> Result<Derivative<Tensor>>
where
    F: FnMut() -> candle_core::Result<Tensor>,
{
    jvp_with(Mode::Auto, f, vars, v)
}

/// [`jvp`] by a chosen method.
///
/// # Errors
/// As [`hvp_with`].
pub fn jvp_with<F>(mode: Mode, mut f: F, vars: &[Var], v: &[Tensor]) -> Result<Derivative<Tensor>>
where
    F: FnMut() -> candle_core::Result<Tensor>,
{
    fits("vars", vars, v)?;
    let method = choose(mode, vars, v)?;
    let value = match method {
        Method::Exact => exact_jvp(f()?, vars, v)?,
        Method::CentralDifferences { step } => {
            // A value that is a view of a variable would move with it: copied.
            let value = || Ok(f()?.detach().copy()?);
            let (plus, minus) = both_sides(vars, v, step, value)?;
            difference(&plus, &minus, step)?
        }
    };
    finite("the forward derivative", std::slice::from_ref(&value))?;
    Ok(Derivative { value, method })
}

fn exact_jvp(output: Tensor, vars: &[Var], v: &[Tensor]) -> Result<Tensor> {
    // Ones rather than zeros: the value of `u` has no influence, but 0 * inf would be NaN.
    let u = Var::ones(output.shape(), output.dtype(), output.device())?;
    let gradients = backward(&(output * u.as_tensor())?.sum_all()?)?;
    let pulled = collect(&gradients, "vars", vars)?;
    let forward = backward(&inner(&pulled, v)?)?;
    match forward.get(&u) {
        Some(value) => Ok(value.detach()),
        None => Err(Error::LostGradient(vec!["the forward derivative".into()])),
    }
}

type Named<'a> = (&'static str, &'a [Var]);

fn second_order<F>(
    mode: Mode,
    mut f: F,
    x: Named,
    y: Named,
    v: &[Tensor],
) -> Result<Derivative<Vec<Tensor>>>
where
    F: FnMut() -> candle_core::Result<Tensor>,
{
    fits(x.0, x.1, v)?;
    let method = choose(mode, x.1, v)?;
    let value = match method {
        Method::Exact => {
            let gradients = backward(&scalar(f()?)?)?;
            let in_x = collect(&gradients, x.0, x.1)?;
            collect(&gradients, y.0, y.1)?;
            let second = backward(&inner(&in_x, v)?)?;
            // Here none means zero: f is linear in x, or x and y do not meet.
            let one = |var: &Var| match second.get(var) {
                Some(gradient) => Ok(gradient.detach()),
                None => Ok(var.zeros_like()?),
            };
            y.1.iter().map(one).collect::<Result<Vec<_>>>()?
        }
        Method::CentralDifferences { step } => {
            let gradient = || collect(&backward(&scalar(f()?)?)?, y.0, y.1);
            let (plus, minus) = both_sides(x.1, v, step, gradient)?;
            let pairs = plus.iter().zip(&minus);
            pairs
                .map(|(p, m)| Ok(difference(p, m, step)?.detach()))
                .collect::<Result<Vec<_>>>()?
        }
    };
    finite("the second derivative", &value)?;
    Ok(Derivative { value, method })
}

fn backward(loss: &Tensor) -> Result<GradStore> {
    Ok(loss.backward()?)
}

fn scalar(loss: Tensor) -> Result<Tensor> {
    if loss.elem_count() == 1 {
        return Ok(loss);
    }
    Err(Error::ShapeMismatch {
        name: "the value of f".into(),
        got: loss.dims().to_vec(),
        expected: vec![],
    })
}

/// The gradients of all variables; those that get none are named.
fn collect(gradients: &GradStore, name: &str, vars: &[Var]) -> Result<Vec<Tensor>> {
    let lost =
        |(i, var): (usize, &Var)| gradients.get(var).is_none().then(|| format!("{name}[{i}]"));
    let lost: Vec<String> = vars.iter().enumerate().filter_map(lost).collect();
    if !lost.is_empty() {
        return Err(Error::LostGradient(lost));
    }
    Ok(vars
        .iter()
        .filter_map(|var| gradients.get(var))
        .cloned()
        .collect())
}

fn fits(name: &'static str, vars: &[Var], v: &[Tensor]) -> Result<()> {
    if vars.is_empty() {
        return Err(Error::invalid(name, "no variable", "at least one"));
    }
    if vars.len() != v.len() {
        let expected = format!("{}, one per variable of `{name}`", vars.len());
        return Err(Error::invalid("number of tensors in v", v.len(), expected));
    }
    for (i, (var, v)) in vars.iter().zip(v).enumerate() {
        if let Some(j) = vars[..i].iter().position(|other| other.id() == var.id()) {
            return Err(Error::SharedStorage {
                first: format!("{name}[{j}]"),
                second: format!("{name}[{i}]"),
            });
        }
        if var.dims() != v.dims() {
            return Err(Error::ShapeMismatch {
                name: format!("v[{i}]"),
                got: v.dims().to_vec(),
                expected: var.dims().to_vec(),
            });
        }
        if var.dtype() != v.dtype() {
            return Err(Error::DTypeMismatch {
                name: format!("v[{i}]"),
                got: v.dtype(),
                expected: format!("{:?}", var.dtype()),
            });
        }
    }
    Ok(())
}

fn choose(mode: Mode, vars: &[Var], v: &[Tensor]) -> Result<Method> {
    let directions = norms(v)?;
    if !directions.euclidean.is_finite() {
        return Err(Error::invalid(
            "v",
            "a direction with NaN or infinity",
            "finite numbers",
        ));
    }
    let given = match mode {
        Mode::Auto if keeps_graph()? => return Ok(Method::Exact),
        Mode::Exact if keeps_graph()? => return Ok(Method::Exact),
        Mode::Exact => {
            return Err(Error::unsupported(
                "an exact second derivative",
                "unless the process is started with CANDLE_GRAD_DO_NOT_DETACH=1",
            ))
        }
        Mode::Auto => None,
        Mode::CentralDifferences { step } => step,
    };
    match given {
        Some(step) if step.is_finite() && step > 0.0 => Ok(Method::CentralDifferences { step }),
        Some(step) => Err(Error::invalid("step", step, "a finite number > 0")),
        None => Ok(Method::CentralDifferences {
            step: step_for(vars, directions)?,
        }),
    }
}

/// The step of central differences: `eps^(1/3)`, where the errors of truncation and of rounding
/// meet, times `sqrt(1 + |x|) / |v|`. The root stands between a function that changes over a length
/// of 1, whatever `|x|` is, and one that changes over a length of `|x|`. Both norms count: with the
/// Euclidean one alone a direction along one coordinate of a large network would move it far, with
/// the maximum norm alone a dense direction would. A power of two, so that multiplying by it does
/// not round.
fn step_for(vars: &[Var], direction: Norms) -> Result<f64> {
    let tensors: Vec<Tensor> = vars.iter().map(Var::as_detached_tensor).collect();
    let point = norms(&tensors)?;
    let epsilon = vars
        .iter()
        .map(|var| epsilon(var.dtype()))
        .fold(0.0, f64::max);
    let relative = |x: f64, v: f64| (1.0 + x).sqrt() / v;
    let scale = relative(point.euclidean, direction.euclidean)
        .min(relative(point.maximum, direction.maximum));
    let step = (epsilon.cbrt() * scale).log2().round().exp2();
    // A zero direction: any step gives zero.
    Ok(if step.is_finite() { step } else { 1.0 })
}

/// The distance from 1 to the next number.
pub(crate) fn epsilon(dtype: DType) -> f64 {
    match dtype {
        DType::F64 => f64::EPSILON,
        DType::F16 => f64::exp2(-10.0),
        DType::BF16 => f64::exp2(-7.0),
        _ => f64::from(f32::EPSILON),
    }
}

#[derive(Debug, Clone, Copy)]
struct Norms {
    euclidean: f64,
    maximum: f64,
}

fn norms(tensors: &[Tensor]) -> Result<Norms> {
    let (mut squares, mut maximum) = (0.0, 0.0_f64);
    for tensor in tensors.iter().filter(|t| t.elem_count() > 0) {
        squares += sum_squares(tensor)?;
        maximum = maximum.max(read(&tensor.abs()?.flatten_all()?.max(0)?)?);
    }
    Ok(Norms {
        euclidean: squares.sqrt(),
        maximum,
    })
}

/// Sums are taken in f32 at least, and in f64 only for f64: some devices have none.
fn accumulator(dtype: DType) -> DType {
    match dtype {
        DType::F64 => DType::F64,
        _ => DType::F32,
    }
}

fn read(scalar: &Tensor) -> Result<f64> {
    Ok(match scalar.dtype() {
        DType::F64 => scalar.to_scalar::<f64>()?,
        _ => f64::from(scalar.to_dtype(DType::F32)?.to_scalar::<f32>()?),
    })
}

/// `sum_i <a_i, b_i>` as a scalar tensor with its graph.
fn inner(a: &[Tensor], b: &[Tensor]) -> Result<Tensor> {
    let wide = a.iter().any(|t| t.dtype() == DType::F64);
    let common = if wide { DType::F64 } else { DType::F32 };
    let mut sum: Option<Tensor> = None;
    for (a, b) in a.iter().zip(b) {
        let product = (a.to_dtype(common)? * b.detach().to_dtype(common)?)?.sum_all()?;
        sum = Some(match sum {
            Some(sum) => (sum + product)?,
            None => product,
        });
    }
    sum.ok_or_else(|| Error::invalid("v", "no tensor", "at least one"))
}

/// `(plus - minus) / 2h`.
fn difference(plus: &Tensor, minus: &Tensor, step: f64) -> Result<Tensor> {
    if plus.dims() != minus.dims() {
        return Err(Error::ShapeMismatch {
            name: "the second value of f".into(),
            got: minus.dims().to_vec(),
            expected: plus.dims().to_vec(),
        });
    }
    // In f32 at least: 1 / 2h overflows f16.
    let wide = accumulator(plus.dtype());
    let difference = (plus.to_dtype(wide)? - minus.to_dtype(wide)?)?;
    Ok((difference / (2.0 * step))?.to_dtype(plus.dtype())?)
}

fn finite(name: &str, tensors: &[Tensor]) -> Result<()> {
    let items: Vec<_> = tensors
        .iter()
        .map(|t| (None, t, GradMap::default()))
        .collect();
    let count = moments(&items)?.iter().map(|m| m.nonfinite).sum();
    if count == 0 {
        return Ok(());
    }
    Err(Error::NonFinite {
        tensor: name.to_string(),
        count,
    })
}

/// Values of variables, put back bit by bit at the end, on an error and on a panic.
struct Restore<'a> {
    vars: &'a [Var],
    saved: Vec<Tensor>,
    done: bool,
}

impl<'a> Restore<'a> {
    fn new(vars: &'a [Var]) -> Result<Self> {
        // The detached tensor shares the variable's memory; the copy does not.
        let copy = |var: &Var| Ok(var.as_detached_tensor().copy()?);
        Ok(Self {
            vars,
            saved: vars.iter().map(copy).collect::<Result<_>>()?,
            done: false,
        })
    }

    /// Sets the variables to their saved values plus `factor * v`.
    fn shift(&self, v: &[Tensor], factor: f64) -> Result<()> {
        for ((var, saved), v) in self.vars.iter().zip(&self.saved).zip(v) {
            // In f32 at least: the product of a 16-bit direction and a small step may underflow.
            let wide = accumulator(var.dtype());
            let moved = (saved.to_dtype(wide)? + (v.detach().to_dtype(wide)? * factor)?)?;
            var.set(&moved.to_dtype(var.dtype())?)?;
        }
        Ok(())
    }

    fn put_back(&mut self) -> Result<()> {
        self.done = true;
        for (var, saved) in self.vars.iter().zip(&self.saved) {
            var.set(saved)?;
        }
        Ok(())
    }
}

impl Drop for Restore<'_> {
    fn drop(&mut self) {
        if !self.done {
            if let Err(error) = self.put_back() {
                tracing::error!(%error, "a variable could not be restored");
            }
        }
    }
}

/// `evaluate` at `vars + step v` and at `vars - step v`.
fn both_sides<T>(
    vars: &[Var],
    v: &[Tensor],
    step: f64,
    mut evaluate: impl FnMut() -> Result<T>,
) -> Result<(T, T)> {
    let mut restore = Restore::new(vars)?;
    restore.shift(v, step)?;
    let plus = evaluate()?;
    restore.shift(v, -step)?;
    let minus = evaluate()?;
    restore.put_back()?;
    Ok((plus, minus))
}
