//! A view over named variables that treats them as one vector.
//!
//! [`Params`] holds candle variables by name and order; the variables keep their memory. All
//! operations run over every tensor in one pass, in place where they write, and reductions have
//! the same bits for any number of threads.
//!
//! ```
//! use candle_core::{DType, Device};
//! use candle_nn::{VarBuilder, VarMap};
//! use thalweg_tensor_core::params::Params;
//!
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
//! let w = vb.get_with_hints((2, 3), "w", candle_nn::Init::Const(2.0))?;
//! let params = Params::from_named(vars.data().lock().unwrap().clone())?;
//! assert_eq!(params.norm()?, 24f64.sqrt());
//! let before = params.snapshot()?;
//! params.axpy(-0.5, &[w.ones_like()?])?;
//! assert_eq!(params.norm()?, 13.5f64.sqrt());
//! params.restore(&before)?;
//! assert_eq!(params.norm()?, 24f64.sqrt());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use crate::flat::{FlatLayout, FlatTensor};
use crate::kernels::{self, FusedUpdate, GradMap, Real, Rule, StateDType, Updated, Work};
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use std::sync::{Arc, Mutex, PoisonError};

/// Named variables as one vector; see the [module](self) page.
#[derive(Debug)]
pub struct Params {
    named: Vec<(String, Var)>,
    layout: Arc<FlatLayout>,
    /// The in-place pass; `None` where the variables live on a device.
    fused: Option<Mutex<FusedUpdate<0>>>,
}

/// A copy of all parameters, to come back to.
#[derive(Debug, Clone)]
pub struct Snapshot(Vec<Tensor>);

impl Snapshot {
    /// The copies, in the order of the parameters.
    pub fn tensors(&self) -> &[Tensor] {
        &self.0
    }
}

/// `p <- a p + b x`
#[derive(Clone, Copy)]
struct Combine {
    a: f64,
    b: f64,
}

impl Rule<0, 2> for Combine {
    const NAME: &'static str = "combine";
    const DEVICE_BODY: Option<&'static str> = Some("p = k[0] * p + k[1] * g;");

    fn scalars(&self) -> [f64; 2] {
        [self.a, self.b]
    }

    #[inline(always)]
    fn update<T: Real>(k: &[T; 2], param: T, grad: T, _: [T; 0]) -> Updated<T, 0> {
        Updated {
            param: k[0] * param + k[1] * grad,
            state: [],
            event: false,
        }
    }
}

impl Params {
    /// Variables in the given order.
    ///
    /// # Errors
    /// [`Error::SharedStorage`] when two variables share memory, [`Error::DTypeMismatch`] for
    /// integer variables.
    pub fn new(named: Vec<(String, Var)>) -> Result<Self> {
        let layout = FlatLayout::new(
            named
                .iter()
                .map(|(name, var)| (name.clone(), var.dims().to_vec())),
        );
        let on_cpu = named.iter().all(|(_, var)| var.device().is_cpu());
        let fused = if on_cpu {
            let fused = FusedUpdate::new(named.clone(), StateDType::Compute)?;
            Some(Mutex::new(fused))
        } else {
            None
        };
        Ok(Self {
            named,
            layout: Arc::new(layout),
            fused,
        })
    }

    /// Variables sorted by name: the order does not depend on the hash map that they come from
    /// (candle's `VarMap::data` is one).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_named(named: impl IntoIterator<Item = (String, Var)>) -> Result<Self> {
        let mut named: Vec<_> = named.into_iter().collect();
        named.sort_by(|a, b| a.0.cmp(&b.0));
        Self::new(named)
    }

    /// Variables named `0`, `1`, ... in the given order.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn from_vars(vars: impl IntoIterator<Item = Var>) -> Result<Self> {
        let named = vars.into_iter().enumerate();
        Self::new(named.map(|(i, var)| (i.to_string(), var)).collect())
    }

    /// Number of tensors.
    pub fn len(&self) -> usize {
        self.named.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.named.is_empty()
    }

    /// Number of elements of all tensors.
    pub fn numel(&self) -> usize {
        self.layout.numel()
    }

    /// Names and variables.
    pub fn named(&self) -> &[(String, Var)] {
        &self.named
    }

    /// The variables.
    pub fn vars(&self) -> Vec<Var> {
        self.named.iter().map(|(_, var)| var.clone()).collect()
    }

    /// Names, shapes and offsets of the flat form.
    pub fn layout(&self) -> &Arc<FlatLayout> {
        &self.layout
    }

    /// A flat copy of all parameters.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] unless all are `F32` or all `F64`.
    pub fn flatten(&self) -> Result<FlatTensor> {
        let tensors: Vec<Tensor> = self
            .named
            .iter()
            .map(|(_, v)| v.as_tensor().clone())
            .collect();
        FlatTensor::from_tensors(self.layout.clone(), &tensors)
    }

    /// Writes a flat copy back.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the layout differs.
    pub fn unflatten(&self, flat: &FlatTensor) -> Result<()> {
        if flat.layout() != &self.layout {
            return Err(Error::ShapeMismatch {
                name: "flat parameters".into(),
                got: vec![flat.layout().numel()],
                expected: vec![self.numel()],
            });
        }
        for (i, (_, var)) in self.named.iter().enumerate() {
            var.set(&flat.get(i, var.device())?)?;
        }
        Ok(())
    }

    /// The gradients of all parameters in order; zeros where there is none.
    ///
    /// # Errors
    /// Those of candle.
    pub fn gradients(&self, grads: &GradStore) -> Result<Vec<Tensor>> {
        let one = |(_, var): &(String, Var)| match grads.get(var) {
            Some(grad) => Ok(grad.detach()),
            None => Ok(var.zeros_like()?),
        };
        self.named.iter().map(one).collect()
    }

    /// [`gradients`](Self::gradients) in one flat buffer.
    ///
    /// # Errors
    /// [`Error::DTypeMismatch`] unless all are `F32` or all `F64`.
    pub fn flatten_gradients(&self, grads: &GradStore) -> Result<FlatTensor> {
        FlatTensor::from_tensors(self.layout.clone(), &self.gradients(grads)?)
    }

    /// `<p, x>` over all tensors, accumulated in `f64`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when `x` does not fit.
    pub fn dot(&self, x: &[Tensor]) -> Result<f64> {
        Ok(self.pair_moments(x)?.iter().map(|m| m.pg).sum())
    }

    /// Euclidean norm of all parameters together.
    ///
    /// # Errors
    /// Those of candle.
    pub fn norm(&self) -> Result<f64> {
        Ok(self.norms()?.iter().map(|n| n * n).sum::<f64>().sqrt())
    }

    /// Euclidean norm of each tensor.
    ///
    /// # Errors
    /// Those of candle.
    pub fn norms(&self) -> Result<Vec<f64>> {
        let items: Vec<_> = self
            .named
            .iter()
            .map(|(_, var)| (None, var.as_tensor(), GradMap::default()))
            .collect();
        Ok(kernels::moments(&items)?
            .iter()
            .map(|m| m.gg.sqrt())
            .collect())
    }

    /// `p <- p + alpha x`, in place.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when `x` does not fit.
    pub fn axpy(&self, alpha: f64, x: &[Tensor]) -> Result<()> {
        self.combine(1.0, alpha, x)
    }

    /// `p <- p + t (x - p)`, in place: an exponential moving average of `x` for `t = 1 - decay`.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when `x` does not fit, [`Error::InvalidArgument`] unless
    /// `0 <= t <= 1`.
    pub fn lerp(&self, t: f64, x: &[Tensor]) -> Result<()> {
        if !(0.0..=1.0).contains(&t) {
            return Err(Error::invalid("t", t, "a number in [0, 1]"));
        }
        self.combine(1.0 - t, t, x)
    }

    /// `p <- a p + b x`, in place, in one pass.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when `x` does not fit, [`Error::InvalidArgument`] for factors that
    /// are not finite.
    pub fn combine(&self, a: f64, b: f64, x: &[Tensor]) -> Result<()> {
        if !(a.is_finite() && b.is_finite()) {
            return Err(Error::invalid(
                "factors",
                format!("{a}, {b}"),
                "finite numbers",
            ));
        }
        self.check_count(x)?;
        let Some(fused) = &self.fused else {
            for ((_, var), x) in self.named.iter().zip(x) {
                let scaled = var.as_tensor().detach().affine(a, 0.0)?;
                var.set(&(scaled + x.affine(b, 0.0)?)?)?;
            }
            return Ok(());
        };
        // Without state there is nothing that a panic could leave half-done.
        let mut fused = fused.lock().unwrap_or_else(PoisonError::into_inner);
        fused.step(false, |i| {
            Ok(Some(Work {
                grad: &x[i],
                rule: Combine { a, b },
                map: GradMap::default(),
            }))
        })
    }

    /// A copy of all parameters.
    ///
    /// # Errors
    /// Those of candle.
    pub fn snapshot(&self) -> Result<Snapshot> {
        let copies: candle_core::Result<Vec<_>> = self
            .named
            .iter()
            .map(|(_, var)| var.as_tensor().detach().copy())
            .collect();
        Ok(Snapshot(copies?))
    }

    /// Sets all parameters to a snapshot, bit for bit.
    ///
    /// # Errors
    /// [`Error::ShapeMismatch`] when the snapshot is of other parameters.
    pub fn restore(&self, snapshot: &Snapshot) -> Result<()> {
        self.check_count(&snapshot.0)?;
        for ((_, var), copy) in self.named.iter().zip(&snapshot.0) {
            var.set(copy)?;
        }
        Ok(())
    }

    fn pair_moments(&self, x: &[Tensor]) -> Result<Vec<kernels::Moments>> {
        self.check_count(x)?;
        let items: Vec<_> = self
            .named
            .iter()
            .zip(x)
            .map(|((_, var), x)| (Some(var.as_tensor()), x, GradMap::default()))
            .collect();
        kernels::moments(&items)
    }

    fn check_count(&self, x: &[Tensor]) -> Result<()> {
        if x.len() != self.named.len() {
            return Err(Error::ShapeMismatch {
                name: "list of tensors".into(),
                got: vec![x.len()],
                expected: vec![self.named.len()],
            });
        }
        Ok(())
    }
}
