//! The running statistics of power normalization.

use super::config::{PowerNormConfig, MAX_ITERS};
use crate::kernel::{host, vector, wide};
use crate::{Error, Result};
use candle_core::{Tensor, Var};
use candle_nn::{Init, VarBuilder};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// What a training run may want to watch, all per channel and as plain numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct PowerNormStatistics {
    /// The running quadratic mean phi.
    pub running_phi: Vec<f64>,
    /// The backward statistic `nu'`.
    pub ema_gz: Vec<f64>,
    /// Training steps so far.
    pub iters: u64,
}

/// Buffers of the layer: variables, so that they are saved with the weights; never trained.
#[derive(Debug)]
pub(super) struct State {
    pub phi: Var,
    pub ema_gz: Var,
    iters: Var,
    lock: Mutex<()>,
}

const NAMES: [&str; 3] = ["running_phi", "ema_gz", "iters"];

impl State {
    pub(super) fn new(channels: usize, vb: &VarBuilder) -> Result<Self> {
        let dtype = wide(vb.dtype())?;
        let get = |n: usize, name, init| vb.get_with_hints_dtype(n, name, Init::Const(init), dtype);
        Ok(Self {
            phi: Var::from_tensor(&get(channels, NAMES[0], 1.0)?)?,
            ema_gz: Var::from_tensor(&get(channels, NAMES[1], 0.0)?)?,
            iters: Var::from_tensor(&get(1, NAMES[2], 0.0)?)?,
            lock: Mutex::new(()),
        })
    }

    /// Held while statistics are read and written back.
    pub(super) fn lock(&self) -> MutexGuard<'_, ()> {
        self.lock.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn iters(&self) -> Result<u64> {
        Ok(host(&self.iters)?.first().map_or(0, |t| *t as u64))
    }

    /// Stays at the largest number that the counter holds.
    pub(super) fn set_iters(&self, iters: u64) -> Result<()> {
        let value = iters.min(MAX_ITERS) as f64;
        Ok(self.iters.set(&vector(
            vec![value],
            self.iters.dtype(),
            self.iters.device(),
        )?)?)
    }

    pub(super) fn set(var: &Var, values: Vec<f64>) -> Result<()> {
        Ok(var.set(&vector(values, var.dtype(), var.device())?)?)
    }

    pub(super) fn statistics(&self) -> Result<PowerNormStatistics> {
        let _guard = self.lock();
        Ok(PowerNormStatistics {
            running_phi: host(&self.phi)?,
            ema_gz: host(&self.ema_gz)?,
            iters: self.iters()?,
        })
    }

    fn named(&self) -> [(&'static str, &Var); 3] {
        [
            (NAMES[0], &self.phi),
            (NAMES[1], &self.ema_gz),
            (NAMES[2], &self.iters),
        ]
    }

    pub(super) fn save(&self) -> Result<BTreeMap<String, Tensor>> {
        let _guard = self.lock();
        // A copy: the variables go on moving.
        let copy = |(name, var): (&str, &Var)| Ok((name.to_string(), var.copy()?.detach()));
        self.named().into_iter().map(copy).collect()
    }

    pub(super) fn load(&self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let mut wrong = vec![];
        for (name, var) in self.named() {
            match state.get(name) {
                None => wrong.push(format!("`{name}` is missing")),
                Some(t) if t.dims() != var.dims() || t.dtype() != var.dtype() => {
                    let (got, expected) = (t.dims(), var.dims());
                    let (a, b) = (t.dtype(), var.dtype());
                    wrong.push(format!(
                        "`{name}` is {a:?} {got:?}, expected {b:?} {expected:?}"
                    ));
                }
                Some(_) => {}
            }
        }
        let unknown = state.keys().filter(|name| !NAMES.contains(&name.as_str()));
        wrong.extend(unknown.map(|name| format!("`{name}` is unknown")));
        if !wrong.is_empty() {
            return Err(Error::StateMismatch(wrong));
        }
        let _guard = self.lock();
        for (name, var) in self.named() {
            if let Some(tensor) = state.get(name) {
                var.set(&tensor.to_device(var.device())?)?;
            }
        }
        Ok(())
    }
}

/// phi after step `t` with the batch's quadratic mean `q`.
pub(super) fn next_phi(config: &PowerNormConfig, t: u64, phi: f64, q: f64) -> f64 {
    let t_real = t as f64;
    let average = match t < config.warmup_iters {
        true => phi * (t_real - 1.0) / t_real + q / t_real,
        false => phi,
    };
    config.alpha_fwd * average + (1.0 - config.alpha_fwd) * q
}

/// Statistics that must be finite before they become state.
pub(super) fn check_finite(what: &'static str, values: &[f64], hint: &'static str) -> Result<()> {
    let count = values.iter().filter(|x| !x.is_finite()).count();
    if count == 0 {
        return Ok(());
    }
    Err(Error::NonFinite {
        what,
        count,
        total: values.len(),
        hint,
    })
}

pub(super) const FORWARD_HINT: &str = ": the batch holds NaN or overflows";
pub(super) const BACKWARD_HINT: &str =
    ": a gradient holds NaN, or `ema_gz` diverges; set `max_gamma` or raise `alpha_bkw`";
