//! What a bilevel problem must be able to compute.

use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use tensor_core::autograd::{hvp_with, mixed_vjp_with, Mode};
use tensor_core::kernels::sum_squares;
use tensor_core::params::Params;

/// What a batch is for; each use gets a batch of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Oracle {
    /// A gradient of the lower loss in `y`.
    Lower,
    /// A Hessian-vector product of the lower loss.
    Hessian,
    /// The gradients of the upper loss.
    Upper,
    /// The mixed product of the lower loss.
    Cross,
}

/// Which batch is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchRequest {
    /// What for.
    pub oracle: Oracle,
    /// The method's step.
    pub iteration: usize,
    /// Counts the uses of this kind within the step.
    pub index: usize,
}

/// The upper loss's gradients.
#[derive(Debug, Clone)]
pub struct UpperGrads {
    /// The loss itself, where it is known.
    pub value: Option<f64>,
    /// `grad_x f`; `None` where `f` does not depend on `x` directly.
    pub x: Option<Tensor>,
    /// `grad_y f`.
    pub y: Tensor,
}

/// A bilevel problem over tensors `x` (upper) and `y` (lower) of any one shape each, in `f32` or
/// `f64`.
///
/// The two second-order products have central differences of gradients as a default; give closed
/// forms where there are any. Results must not carry a graph.
pub trait BilevelProblem {
    /// A batch of data, a draw of noise, or `()`.
    type Batch;

    /// The batch for one use.
    ///
    /// # Errors
    /// The implementor's.
    fn batch(&mut self, request: BatchRequest) -> Result<Self::Batch>;

    /// `grad_y g`.
    ///
    /// # Errors
    /// The implementor's.
    fn lower_grad(&mut self, x: &Tensor, y: &Tensor, batch: &Self::Batch) -> Result<Tensor>;

    /// `grad_x f` and `grad_y f`.
    ///
    /// # Errors
    /// The implementor's.
    fn upper_grads(&mut self, x: &Tensor, y: &Tensor, batch: &Self::Batch) -> Result<UpperGrads>;

    /// `grad_x g`, from which the default of [`cross_vjp`](Self::cross_vjp) is made.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless the implementor gives it.
    fn lower_grad_upper(&mut self, x: &Tensor, y: &Tensor, batch: &Self::Batch) -> Result<Tensor> {
        let _ = (x, y, batch);
        let expected = "BilevelProblem::cross_vjp or lower_grad_upper to be given";
        Err(Error::argument(
            "problem",
            "without mixed products",
            expected,
        ))
    }

    /// `(d2_yy g) v`.
    ///
    /// # Errors
    /// Those of [`lower_grad`](Self::lower_grad).
    fn lower_hvp(
        &mut self,
        x: &Tensor,
        y: &Tensor,
        v: &Tensor,
        batch: &Self::Batch,
    ) -> Result<Tensor> {
        difference(y, v, |y| self.lower_grad(x, y, batch))
    }

    /// `d/dx <grad_y g(x, y), v>` with `v` held constant.
    ///
    /// # Errors
    /// Those of [`lower_grad_upper`](Self::lower_grad_upper).
    fn cross_vjp(
        &mut self,
        x: &Tensor,
        y: &Tensor,
        v: &Tensor,
        batch: &Self::Batch,
    ) -> Result<Tensor> {
        difference(y, v, |y| self.lower_grad_upper(x, y, batch))
    }
}

/// The derivative of `gradient` at `y` along `v`, by central differences; zero for a zero `v`.
fn difference(
    y: &Tensor,
    v: &Tensor,
    mut gradient: impl FnMut(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let length = norm(v)?;
    if length == 0.0 {
        return Ok(gradient(y)?.zeros_like()?);
    }
    let epsilon = match y.dtype() {
        candle_core::DType::F64 => f64::EPSILON,
        _ => f64::from(f32::EPSILON),
    };
    let step = 2.0 * epsilon.cbrt() * (1.0 + norm(y)?) / length;
    let shift = (v * step)?;
    let (plus, minus) = (gradient(&(y + &shift)?)?, gradient(&(y - &shift)?)?);
    Ok(((plus - minus)? / (2.0 * step))?.detach())
}

pub(super) fn norm(x: &Tensor) -> Result<f64> {
    Ok(sum_squares(x)?.sqrt())
}

/// `a + scale b`.
pub(super) fn axpy(a: &Tensor, scale: f64, b: &Tensor) -> Result<Tensor> {
    Ok((a + (b * scale)?)?.detach())
}

/// An error unless every entry is finite.
pub(super) fn finite(name: &str, x: &Tensor) -> Result<()> {
    if norm(x)?.is_finite() {
        Ok(())
    } else {
        Err(Error::NonFiniteGradient(vec![name.to_string()]))
    }
}

type Loss<'a, B> = Box<dyn FnMut(&B) -> candle_core::Result<Tensor> + 'a>;
type Batches<'a, B> = Box<dyn FnMut(BatchRequest) -> Result<B> + 'a>;

/// A bilevel problem from two losses of candle variables. `x` and `y` are the variables as flat
/// vectors; calling a method of the trait sets the variables.
///
/// Second-order products are exact where the process was started with `CANDLE_GRAD_DO_NOT_DETACH=1`
/// and central differences elsewhere, unless [`with_mode`](Self::with_mode) says otherwise.
pub struct LossProblem<'a, B> {
    upper: Params,
    lower: Params,
    lower_loss: Loss<'a, B>,
    upper_loss: Loss<'a, B>,
    batches: Batches<'a, B>,
    mode: Mode,
}

impl<B> std::fmt::Debug for LossProblem<'_, B> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LossProblem")
            .field("upper", &self.upper)
            .field("lower", &self.lower)
            .field("mode", &self.mode)
            .finish_non_exhaustive()
    }
}

impl<'a, B> LossProblem<'a, B> {
    /// From the variables of both levels, the lower loss `g`, the upper loss `f` (each of one
    /// element, for a batch) and the source of batches.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a level without variables; those of `Params::new`.
    pub fn new(
        upper: Vec<(String, Var)>,
        lower: Vec<(String, Var)>,
        lower_loss: impl FnMut(&B) -> candle_core::Result<Tensor> + 'a,
        upper_loss: impl FnMut(&B) -> candle_core::Result<Tensor> + 'a,
        batches: impl FnMut(BatchRequest) -> Result<B> + 'a,
    ) -> Result<Self> {
        for (name, vars) in [("upper", &upper), ("lower", &lower)] {
            if vars.iter().map(|(_, v)| v.elem_count()).sum::<usize>() == 0 {
                return Err(Error::argument(name, "no variables", "at least one entry"));
            }
        }
        Ok(Self {
            upper: Params::new(upper)?,
            lower: Params::new(lower)?,
            lower_loss: Box::new(lower_loss),
            upper_loss: Box::new(upper_loss),
            batches: Box::new(batches),
            mode: Mode::Auto,
        })
    }

    /// Chooses how second-order products are computed.
    #[must_use]
    pub fn with_mode(mut self, mode: Mode) -> Self {
        self.mode = mode;
        self
    }

    /// The upper variables as a flat vector.
    ///
    /// # Errors
    /// Unless they are all `F32` or all `F64`.
    pub fn upper(&self) -> Result<Tensor> {
        flat(&self.upper)
    }

    /// The lower variables as a flat vector.
    ///
    /// # Errors
    /// Unless they are all `F32` or all `F64`.
    pub fn lower(&self) -> Result<Tensor> {
        flat(&self.lower)
    }

    /// Writes flat vectors into the variables.
    ///
    /// # Errors
    /// [`Error::Shape`] when one has another length.
    pub fn set(&mut self, x: &Tensor, y: &Tensor) -> Result<()> {
        write(&self.upper, x)?;
        write(&self.lower, y)
    }

    fn gradients(&self, params: &Params, grads: &GradStore) -> Result<Tensor> {
        let names = params.named().iter();
        let lost = names.filter(|(_, var)| grads.get(var).is_none());
        let lost: Vec<String> = lost.map(|(name, _)| name.clone()).collect();
        if !lost.is_empty() {
            return Err(tensor_core::Error::LostGradient(lost).into());
        }
        join(&params.gradients(grads)?)
    }
}

fn flat(params: &Params) -> Result<Tensor> {
    let device = params.named()[0].1.device().clone();
    Ok(params.flatten()?.to_tensor(&device)?)
}

fn join(parts: &[Tensor]) -> Result<Tensor> {
    let flat: candle_core::Result<Vec<Tensor>> = parts.iter().map(Tensor::flatten_all).collect();
    Ok(Tensor::cat(&flat?, 0)?.detach())
}

fn cut(params: &Params, x: &Tensor) -> Result<Vec<Tensor>> {
    if x.elem_count() != params.numel() {
        let expected = format!("[{}]", params.numel());
        return Err(Error::shape("flat variables", x.dims(), expected));
    }
    let x = x.detach().flatten_all()?;
    let layout = params.layout();
    let one = |i: usize| {
        let range = layout.range(i);
        let part = x.narrow(0, range.start, range.len())?;
        Ok(part.reshape(layout.shape(i))?.contiguous()?)
    };
    (0..layout.len()).map(one).collect()
}

fn write(params: &Params, x: &Tensor) -> Result<()> {
    for ((_, var), part) in params.named().iter().zip(cut(params, x)?) {
        var.set(&part)?;
    }
    Ok(())
}

impl<B> BilevelProblem for LossProblem<'_, B> {
    type Batch = B;

    fn batch(&mut self, request: BatchRequest) -> Result<B> {
        (self.batches)(request)
    }

    fn lower_grad(&mut self, x: &Tensor, y: &Tensor, batch: &B) -> Result<Tensor> {
        self.set(x, y)?;
        let grads = (self.lower_loss)(batch)?.backward()?;
        self.gradients(&self.lower, &grads)
    }

    fn upper_grads(&mut self, x: &Tensor, y: &Tensor, batch: &B) -> Result<UpperGrads> {
        self.set(x, y)?;
        let loss = (self.upper_loss)(batch)?;
        let value = crate::closure::loss_value(&loss, "the upper loss")?;
        let grads = loss.backward()?;
        let direct = self
            .upper
            .named()
            .iter()
            .any(|(_, v)| grads.get(v).is_some());
        Ok(UpperGrads {
            value: Some(value),
            x: match direct {
                true => Some(join(&self.upper.gradients(&grads)?)?),
                false => None,
            },
            y: self.gradients(&self.lower, &grads)?,
        })
    }

    fn lower_grad_upper(&mut self, x: &Tensor, y: &Tensor, batch: &B) -> Result<Tensor> {
        self.set(x, y)?;
        let grads = (self.lower_loss)(batch)?.backward()?;
        self.gradients(&self.upper, &grads)
    }

    fn lower_hvp(&mut self, x: &Tensor, y: &Tensor, v: &Tensor, batch: &B) -> Result<Tensor> {
        self.set(x, y)?;
        let parts = cut(&self.lower, v)?;
        let vars = self.lower.vars();
        let loss = || (self.lower_loss)(batch);
        join(&hvp_with(self.mode, loss, &vars, &parts)?.value)
    }

    fn cross_vjp(&mut self, x: &Tensor, y: &Tensor, v: &Tensor, batch: &B) -> Result<Tensor> {
        self.set(x, y)?;
        let parts = cut(&self.lower, v)?;
        let (lower, upper) = (self.lower.vars(), self.upper.vars());
        let loss = || (self.lower_loss)(batch);
        join(&mixed_vjp_with(self.mode, loss, &lower, &upper, &parts)?.value)
    }
}
