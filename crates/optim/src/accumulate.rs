//! Weighted sums of gradients in buffers that are allocated once.

use crate::gradients::Gradients;
use crate::Result;
use candle_core::{Tensor, Var};
use tensor_core::kernels::{FusedUpdate, Real, Rule, StateDType, Updated, Work};

/// `p <- keep p + weight g`, where `keep` is 0 or 1 and 0 forgets even NaN.
#[derive(Clone, Copy)]
struct Add {
    keep: bool,
    weight: f64,
}

impl Rule<0, 2> for Add {
    const NAME: &'static str = "accumulate";
    const DEVICE_BODY: Option<&'static str> = Some("p = (k[0] > 0 ? p : 0) + k[1] * g;");

    fn scalars(&self) -> [f64; 2] {
        [f64::from(u8::from(self.keep)), self.weight]
    }

    #[inline(always)]
    fn update<T: Real>(k: &[T; 2], param: T, grad: T, _: [T; 0]) -> Updated<T, 0> {
        let kept = T::select(k[0] > T::ZERO, param, T::ZERO);
        Updated {
            param: kept + k[1] * grad,
            state: [],
            event: false,
        }
    }
}

/// Sums of gradients, one per parameter.
#[derive(Debug)]
pub(crate) struct Sums {
    /// Over buffers of ours, not over the parameters.
    update: FusedUpdate<0>,
    /// The same buffers as tensors to hand out.
    views: Vec<Tensor>,
    /// Whether a buffer holds a sum; what it holds otherwise is forgotten.
    filled: Vec<bool>,
}

impl Sums {
    /// Empty sums of the parameters' shapes and dtypes.
    pub(crate) fn new(params: &[(String, Var)]) -> Result<Self> {
        let mut buffers = Vec::with_capacity(params.len());
        for (name, var) in params {
            let zeros = Var::zeros(var.shape(), var.dtype(), var.device())?;
            buffers.push((name.clone(), zeros));
        }
        Ok(Self {
            filled: vec![false; buffers.len()],
            views: buffers.iter().map(|(_, var)| var.detach()).collect(),
            update: FusedUpdate::new(buffers, StateDType::Compute)?,
        })
    }

    /// Adds `weight` times every gradient, in one pass.
    pub(crate) fn add(&mut self, gradients: &Gradients<'_>, weight: f64) -> Result<()> {
        // A map along the parameter means another parameter than the buffer: apply it first.
        let mut projected = Vec::new();
        for i in 0..gradients.len() {
            if gradients.get(i).is_some_and(|(_, map)| map.along != 0.0) {
                projected.push((i, gradients.materialized(i)?));
            }
        }
        let filled = &self.filled;
        self.update.step(false, |i| {
            let rule = Add {
                keep: filled[i],
                weight,
            };
            if let Ok(at) = projected.binary_search_by_key(&i, |(place, _)| *place) {
                return Ok(projected[at].1.as_ref().map(|grad| Work {
                    grad,
                    rule,
                    map: Default::default(),
                }));
            }
            Ok(gradients.get(i).map(|(grad, map)| Work { grad, rule, map }))
        })?;
        for (i, filled) in self.filled.iter_mut().enumerate() {
            *filled |= gradients.get(i).is_some();
        }
        Ok(())
    }

    /// Sum `i`, sharing the buffer's memory until the next [`add`](Self::add) after a
    /// [`clear`](Self::clear) overwrites it.
    pub(crate) fn get(&self, i: usize) -> Option<Tensor> {
        self.filled[i].then(|| self.views[i].clone())
    }

    /// Overwrites sum `i`; `None` empties it.
    pub(crate) fn set(&mut self, i: usize, sum: Option<&Tensor>) -> Result<()> {
        if let Some(sum) = sum {
            self.update.var(i).set(sum)?;
        }
        self.filled[i] = sum.is_some();
        Ok(())
    }

    /// Forgets all sums.
    pub(crate) fn clear(&mut self) {
        self.filled.fill(false);
    }

    /// Bytes of the buffers.
    pub(crate) fn bytes(&self) -> usize {
        let of = |i: usize| {
            let var = self.update.var(i);
            var.elem_count() * var.dtype().size_in_bytes()
        };
        (0..self.update.len()).map(of).sum()
    }
}

#[cfg(all(test, feature = "verify"))]
mod tests {
    use super::*;

    #[test]
    fn the_device_text_computes_the_same_bits() -> tensor_core::Result<()> {
        for keep in [false, true] {
            tensor_core::kernels::check_on_host(Add { keep, weight: 0.3 })?;
        }
        Ok(())
    }
}
