//! A problem whose hyper-gradient is known in closed form.

use super::problem::{BatchRequest, BilevelProblem, Oracle, UpperGrads};
use super::LinearSolve;
use crate::{Error, Result};
use candle_core::Tensor;

type Direct = dyn Fn(&Tensor) -> candle_core::Result<Tensor>;
type Noise = dyn FnMut(BatchRequest) -> Result<Option<Tensor>>;

/// `g = y^T A y / 2 - y^T (B x + c)` and `f = p(x) + |y - t|^2 / 2`, with noise on each oracle: to
/// test methods on. The hyper-gradient is `grad p + B^T A^{-1} (y* - t)`.
pub struct QuadraticProblem {
    a: Tensor,
    b: Tensor,
    c: Tensor,
    t: Tensor,
    direct: Option<Box<Direct>>,
    noise: Option<Box<Noise>>,
}

impl std::fmt::Debug for QuadraticProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QuadraticProblem")
            .field("lower", &self.a.dims())
            .field("upper", &self.b.dims())
            .finish_non_exhaustive()
    }
}

impl QuadraticProblem {
    /// From `A` `[n, n]` (symmetric, positive definite), `B` `[n, d]`, `c` `[n]` and `t` `[n]`, with
    /// `p = 0`.
    ///
    /// # Errors
    /// [`Error::Shape`].
    pub fn new(a: &Tensor, b: &Tensor, c: &Tensor, t: &Tensor) -> Result<Self> {
        let n = c.elem_count();
        let fits = a.dims() == [n, n] && b.rank() == 2 && b.dims()[0] == n && t.dims() == [n];
        if !fits || c.rank() != 1 {
            let expected = "A [n, n], B [n, d], c [n], t [n]";
            return Err(Error::shape("A", a.dims(), expected));
        }
        let copy = |x: &Tensor| x.detach();
        Ok(Self {
            a: copy(a),
            b: copy(b),
            c: copy(c),
            t: copy(t),
            direct: None,
            noise: None,
        })
    }

    /// With the gradient of `p`.
    #[must_use]
    pub fn with_direct(
        mut self,
        grad: impl Fn(&Tensor) -> candle_core::Result<Tensor> + 'static,
    ) -> Self {
        self.direct = Some(Box::new(grad));
        self
    }

    /// With noise that is added to what an oracle returns: to `grad_y g`, to `(d2_yy g) v`, to
    /// `grad_y f`, and for [`Oracle::Cross`] subtracted from the mixed product, which adds it to the
    /// direction of `x`.
    #[must_use]
    pub fn with_noise(
        mut self,
        noise: impl FnMut(BatchRequest) -> Result<Option<Tensor>> + 'static,
    ) -> Self {
        self.noise = Some(Box::new(noise));
        self
    }

    /// `y*(x) = A^{-1} (B x + c)`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn minimizer(&self, x: &Tensor) -> Result<Tensor> {
        let right = (product(&self.b, x)? + &self.c)?;
        let (y, _) = LinearSolve::Exact.solve(|v| product(&self.a, v), &right, None)?;
        Ok(y)
    }

    /// The exact gradient of `x -> f(x, y*(x))`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn exact(&self, x: &Tensor) -> Result<Tensor> {
        let right = (self.minimizer(x)? - &self.t)?;
        let (z, _) = LinearSolve::Exact.solve(|v| product(&self.a, v), &right, None)?;
        let through = product(&self.b.t()?.contiguous()?, &z)?;
        match &self.direct {
            Some(grad) => Ok((grad(x)? + through)?),
            None => Ok(through),
        }
    }
}

fn product(matrix: &Tensor, x: &Tensor) -> Result<Tensor> {
    Ok(matrix.matmul(&x.unsqueeze(1)?)?.squeeze(1)?)
}

fn plus(x: Tensor, noise: &Option<Tensor>) -> Result<Tensor> {
    match noise {
        Some(noise) => Ok((x + noise)?),
        None => Ok(x),
    }
}

impl BilevelProblem for QuadraticProblem {
    type Batch = Option<Tensor>;

    fn batch(&mut self, request: BatchRequest) -> Result<Option<Tensor>> {
        match &mut self.noise {
            Some(noise) => {
                let drawn = noise(request)?;
                Ok(match request.oracle {
                    Oracle::Cross => drawn.map(|x| x.neg()).transpose()?,
                    _ => drawn,
                })
            }
            None => Ok(None),
        }
    }

    fn lower_grad(&mut self, x: &Tensor, y: &Tensor, noise: &Option<Tensor>) -> Result<Tensor> {
        let pull = (product(&self.b, x)? + &self.c)?;
        plus((product(&self.a, y)? - pull)?, noise)
    }

    fn upper_grads(
        &mut self,
        x: &Tensor,
        y: &Tensor,
        noise: &Option<Tensor>,
    ) -> Result<UpperGrads> {
        Ok(UpperGrads {
            value: None,
            x: self.direct.as_ref().map(|grad| grad(x)).transpose()?,
            y: plus((y - &self.t)?, noise)?,
        })
    }

    fn lower_hvp(
        &mut self,
        _: &Tensor,
        _: &Tensor,
        v: &Tensor,
        noise: &Option<Tensor>,
    ) -> Result<Tensor> {
        plus(product(&self.a, v)?, noise)
    }

    fn cross_vjp(
        &mut self,
        _: &Tensor,
        _: &Tensor,
        v: &Tensor,
        noise: &Option<Tensor>,
    ) -> Result<Tensor> {
        let through = product(&self.b.t()?.contiguous()?, v)?;
        plus(through.neg()?, noise)
    }
}
