//! Dropout from a seeded stream (Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov 2014).
//!
//! candle draws its masks from a generator that cannot be seeded on the CPU. Here they come from a
//! [`RandomStream`], so that a run repeats bit by bit, for any number of threads.
//!
//! ```
//! use candle_core::{DType, Device, ModuleT, Tensor};
//! use thalweg_nn::dropout::Dropout;
//! use thalweg_nn::RandomStream;
//! let x = Tensor::ones((4, 50), DType::F32, &Device::Cpu)?;
//! let draw = || Dropout::new(0.5, RandomStream::new(7))?.forward_t(&x, true)?.to_vec2::<f32>();
//! assert_eq!(draw()?, draw()?);
//! assert!(draw()?.concat().iter().all(|y| *y == 0.0 || *y == 2.0));
//! # Ok::<(), candle_core::Error>(())
//! ```

use crate::kernel::wide;
use crate::{Error, Result};
use candle_core::{ModuleT, Tensor};
use std::sync::{Arc, Mutex, PoisonError};
use tensor_core::random::{RandomState, RandomStream};

/// `x` with each entry zero with probability `p`, the others divided by `1 - p`; the shape and the
/// dtype stay. Candle operations: any device, gradients of any order.
///
/// # Errors
/// [`Error::InvalidConfig`] unless `0 <= p < 1`; [`Error::DType`] for integers.
pub fn dropout(x: &Tensor, p: f64, stream: &mut RandomStream) -> Result<Tensor> {
    check(p)?;
    wide(x.dtype())?;
    if p == 0.0 {
        return Ok(x.clone());
    }
    let kept = stream.bernoulli(1.0 - p, x.shape(), x.dtype(), x.device())?;
    Ok((x * (kept / (1.0 - p))?)?)
}

fn check(p: f64) -> Result<()> {
    match (0.0..1.0).contains(&p) {
        true => Ok(()),
        false => Err(Error::config("Dropout::p", p, "a number in [0, 1)")),
    }
}

/// [`dropout`] as a layer with a stream of its own, active in training only. Clones share the
/// stream.
#[derive(Debug, Clone)]
pub struct Dropout {
    p: f64,
    stream: Arc<Mutex<RandomStream>>,
}

impl Dropout {
    /// Drops entries with probability `p`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] unless `0 <= p < 1`.
    pub fn new(p: f64, stream: RandomStream) -> Result<Self> {
        check(p)?;
        Ok(Self {
            p,
            stream: Arc::new(Mutex::new(stream)),
        })
    }

    /// Where the stream stands, to go on later with the same bits.
    pub fn state(&self) -> RandomState {
        self.stream
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .state()
    }

    /// Goes on from a state.
    pub fn load_state(&self, state: &RandomState) {
        *self.stream.lock().unwrap_or_else(PoisonError::into_inner) =
            RandomStream::from_state(state);
    }
}

impl ModuleT for Dropout {
    fn forward_t(&self, x: &Tensor, train: bool) -> candle_core::Result<Tensor> {
        if !train {
            return Ok(x.clone());
        }
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(dropout(x, self.p, &mut stream)?)
    }
}
