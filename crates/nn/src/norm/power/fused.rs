//! The CPU path: one or two passes forward, one backward.

use super::config::{BackwardDenominator, PowerNormConfig};
use super::kernel::{self, Affine, Extent, InputGradient};
use super::rows::Rows;
use super::state::{check_finite, next_phi, State, BACKWARD_HINT, FORWARD_HINT};
use crate::kernel::{host, tensor, vector, Computed, Gradients, Scalar, View};
use crate::Result;
use candle_core::{DType, Tensor};
use std::sync::Arc;

/// What backward needs besides the input.
struct Saved<T> {
    r: Vec<T>,
    inv_d: Vec<f64>,
    inv_q: Vec<f64>,
    /// `Gamma`, the second moment of `z` over all rows; none where `nu'` is not in play.
    gamma: Option<Vec<f64>>,
}

/// `weight` and `bias` `[C]` in the dtype of the rows.
pub(super) fn forward(
    config: &PowerNormConfig,
    state: &Arc<State>,
    rows: &Rows,
    weight: &Tensor,
    bias: &Tensor,
    train: bool,
) -> Result<Tensor> {
    match rows.x.dtype() {
        DType::F64 => typed::<f64>(config, state, rows, weight, bias, train),
        _ => typed::<f32>(config, state, rows, weight, bias, train),
    }
}

fn typed<T: Scalar>(
    config: &PowerNormConfig,
    state: &Arc<State>,
    rows: &Rows,
    weight: &Tensor,
    bias: &Tensor,
    train: bool,
) -> Result<Tensor> {
    let (m, c) = rows.x.dims2()?;
    let extent = Extent {
        rows: m,
        cols: c,
        groups: config.group_scaling.then_some(config.groups),
    };
    let (w, b) = (host(weight)?, host(bias)?);
    let (value, saved) = {
        let view = View::new(&rows.x)?;
        let pass = Pass {
            config,
            state,
            extent,
            x: view.slice::<T>()?,
            weight: &w,
            shift: b.iter().map(|b| T::from_f64(*b)).collect(),
        };
        match train {
            true => pass.training(rows.keep.as_ref())?,
            false => pass.constant()?,
        }
    };
    let (config, state) = (config.clone(), state.clone());
    let backward = move |arguments: &[&Tensor], _: &Tensor, grad: &Tensor| {
        let (x, weight) = (arguments[0], arguments[1]);
        backward(&config, &state, extent, &saved, x, weight, grad)
    };
    let shape = rows.x.shape();
    let node = Computed::new("power-norm", value, shape, backward);
    Ok(rows.x.apply_op3(weight, bias, node)?)
}

struct Pass<'a, T> {
    config: &'a PowerNormConfig,
    state: &'a State,
    extent: Extent,
    x: &'a [T],
    weight: &'a [f64],
    shift: Vec<T>,
}

impl<T: Scalar> Pass<'_, T> {
    /// 1 / sqrt(v + eps).
    fn inverse(&self, v: &[f64]) -> Vec<f64> {
        v.iter()
            .map(|v| 1.0 / (v + self.config.eps).sqrt())
            .collect()
    }

    fn scale(&self, inv_d: &[f64]) -> Vec<T> {
        let pairs = inv_d.iter().zip(self.weight);
        pairs.map(|(d, w)| T::from_f64(d * w)).collect()
    }

    fn buffers(&self) -> (Vec<T>, Vec<T>) {
        let scales = vec![T::ONE; self.extent.rows * self.extent.scales()];
        (scales, vec![T::ZERO; self.x.len()])
    }

    /// Evaluation, or a batch of nothing but padding: phi divides, nothing moves.
    fn constant(&self) -> Result<(Vec<T>, Saved<T>)> {
        let inv_d = self.inverse(&host(&self.state.phi)?);
        let (mut r, mut y) = self.buffers();
        let scale = self.scale(&inv_d);
        let output = Affine {
            y: &mut y,
            scale: &scale,
            shift: &self.shift,
        };
        kernel::forward(self.x, self.extent, &mut r, None, Some(output));
        let inv_q = inv_d.clone();
        let saved = Saved {
            r,
            inv_d,
            inv_q,
            gamma: None,
        };
        Ok((y, saved))
    }

    fn training(&self, keep: Option<&Tensor>) -> Result<(Vec<T>, Saved<T>)> {
        let keep: Option<Vec<bool>> = match keep {
            Some(keep) => Some(host(keep)?.into_iter().map(|k| k != 0.0).collect()),
            None => None,
        };
        let tokens = match &keep {
            Some(keep) => keep.iter().filter(|k| **k).count(),
            None => self.extent.rows,
        };
        if tokens == 0 {
            tracing::warn!("power norm: every position is padding; statistics stay as they are");
            return self.constant();
        }
        let _guard = self.state.lock();
        let t = self.state.iters()? + 1;
        let phi = host(&self.state.phi)?;
        let (mut r, mut y) = self.buffers();
        let keep = keep.as_deref();
        let warm = t <= self.config.warmup_iters;
        let (squares, inv_d) = if warm {
            let squares = kernel::forward(self.x, self.extent, &mut r, Some(keep), None);
            (squares, None)
        } else {
            // The denominator is known beforehand: statistics and output in one pass.
            let inv_d = self.inverse(&phi);
            let scale = self.scale(&inv_d);
            let output = Affine {
                y: &mut y,
                scale: &scale,
                shift: &self.shift,
            };
            let squares = kernel::forward(self.x, self.extent, &mut r, Some(keep), Some(output));
            (squares, Some(inv_d))
        };
        let (q, second) = match squares {
            Some(squares) => (
                mean(squares.kept, tokens),
                mean(squares.all, self.extent.rows),
            ),
            None => (vec![], vec![]),
        };
        if self.config.check_finite {
            check_finite("the quadratic means of the batch", &q, FORWARD_HINT)?;
        }
        let inv_q = self.inverse(&q);
        let inv_d = match inv_d {
            Some(inv_d) => inv_d,
            None => {
                self.write(&mut r, &mut y, &inv_q);
                inv_q.clone()
            }
        };
        let next = |(phi, q): (&f64, &f64)| next_phi(self.config, t, *phi, *q);
        State::set(&self.state.phi, phi.iter().zip(&q).map(next).collect())?;
        self.state.set_iters(t)?;
        let gamma = second.iter().zip(&inv_d).map(|(s, d)| s * d * d).collect();
        let saved = Saved {
            r,
            inv_q: match self.config.denominator {
                BackwardDenominator::BatchQuadraticMean => inv_q,
                BackwardDenominator::RunningQuadraticMean => inv_d.clone(),
            },
            inv_d,
            gamma: Some(gamma),
        };
        Ok((y, saved))
    }

    /// The second pass of warm-up.
    fn write(&self, r: &mut [T], y: &mut [T], inv_d: &[f64]) {
        let scale = self.scale(inv_d);
        let output = Affine {
            y,
            scale: &scale,
            shift: &self.shift,
        };
        kernel::forward(self.x, self.extent, r, None, Some(output));
    }
}

fn mean(sums: Vec<f64>, count: usize) -> Vec<f64> {
    sums.into_iter().map(|s| s / count as f64).collect()
}

fn backward<T: Scalar>(
    config: &PowerNormConfig,
    state: &State,
    extent: Extent,
    saved: &Saved<T>,
    x: &Tensor,
    weight: &Tensor,
    grad: &Tensor,
) -> Gradients {
    let _guard = state.lock();
    let w = host(weight)?;
    let nu = match saved.gamma {
        Some(_) => host(&state.ema_gz)?,
        None => vec![0.0; w.len()],
    };
    let keep = 1.0 - config.alpha_bkw;
    let columns =
        |f: &dyn Fn(usize) -> f64| -> Vec<T> { (0..w.len()).map(|c| T::from_f64(f(c))).collect() };
    let a = columns(&|c| w[c] * saved.inv_q[c]);
    let b = columns(&|c| keep * nu[c] * saved.inv_d[c] * saved.inv_q[c]);
    let mut dx = vec![T::ZERO; grad.elem_count()];
    let sums = {
        let (x, grad) = (View::new(x)?, View::new(grad)?);
        let gradient = InputGradient { a: &a, b: &b };
        kernel::backward(
            x.slice()?,
            grad.slice()?,
            &saved.r,
            &mut dx,
            extent,
            &gradient,
        )
    };
    let dweight: Vec<f64> = sums
        .dy_h
        .iter()
        .zip(&saved.inv_d)
        .map(|(s, d)| s * d)
        .collect();
    if let Some(gamma) = &saved.gamma {
        let m = extent.rows as f64;
        let next = |c: usize| {
            let lambda = w[c] * dweight[c] / m;
            let gamma = config
                .max_gamma
                .map_or(gamma[c], |bound| gamma[c].min(bound));
            nu[c] + lambda - keep * nu[c] * gamma
        };
        let next: Vec<f64> = (0..w.len()).map(next).collect();
        if config.check_finite {
            check_finite("the running `ema_gz`", &next, BACKWARD_HINT)?;
        }
        State::set(&state.ema_gz, next)?;
    }
    let (dtype, device) = (x.dtype(), x.device());
    Ok(vec![
        Some(tensor(dx, x.shape())?),
        Some(vector(dweight, dtype, device)?),
        Some(vector(sums.dy, dtype, device)?),
    ])
}
