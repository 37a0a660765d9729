//! Rows of numbers as the weights of a network, and back.

use super::point::tensor_on;
use crate::{Error, RandomStream, Result};
use candle_core::{DType, Device, Tensor, Var};
use tensor_core::params::Params;

/// The weights of a network as particles `[N, d]`: variables one after the other in one row.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use thalweg_optim::consensus::Particles;
/// use thalweg_optim::RandomStream;
///
/// let w = Var::zeros((3, 2), DType::F32, &Device::Cpu)?;
/// let b = Var::zeros(2, DType::F32, &Device::Cpu)?;
/// let particles = Particles::new(vec![("b".into(), b.clone()), ("w".into(), w.clone())])?;
/// let rows = particles.draw(10, 1.0, &mut RandomStream::new(0))?;
/// assert_eq!(rows.dims(), [10, 8]);
/// // Weights of all networks at once, for one batched matrix product.
/// let parts = particles.unpack(&rows)?;
/// assert_eq!((parts[0].dims(), parts[1].dims()), (&[10, 2][..], &[10, 3, 2][..]));
/// particles.load(&rows.get(4)?)?;
/// assert_eq!(w.to_vec2::<f32>()?, parts[1].get(4)?.to_vec2::<f32>()?);
/// # Ok::<(), thalweg_optim::Error>(())
/// ```
#[derive(Debug)]
pub struct Particles {
    params: Params,
    dtype: DType,
    device: Device,
}

impl Particles {
    /// Named variables of one dtype on one device (`optim::param_group::named` gives those of a
    /// `VarMap`).
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for none or several dtypes; those of `Params::new`.
    pub fn new(params: Vec<(String, Var)>) -> Result<Self> {
        let Some((_, first)) = params.first() else {
            return Err(Error::argument("params", 0, "at least one variable"));
        };
        let (dtype, device) = (first.dtype(), first.device().clone());
        if let Some((name, var)) = params.iter().find(|(_, var)| var.dtype() != dtype) {
            return Err(Error::DType {
                tensor: name.clone(),
                got: var.dtype(),
                expected: format!("{dtype:?}, that of the first"),
            });
        }
        Ok(Self {
            params: Params::new(params)?,
            dtype,
            device,
        })
    }

    /// Numbers of a particle.
    pub fn dim(&self) -> usize {
        self.params.numel()
    }

    /// `n` normal particles with mean 0, `[n, d]`.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn draw(&self, n: usize, std: f64, rng: &mut RandomStream) -> Result<Tensor> {
        Ok(rng.normal(0.0, std, (n, self.dim()), self.dtype, &self.device)?)
    }

    /// `n` particles around the present weights, `[n, d]`.
    ///
    /// # Errors
    /// Those of the stream.
    pub fn around(&self, n: usize, std: f64, rng: &mut RandomStream) -> Result<Tensor> {
        let parts: candle_core::Result<Vec<Tensor>> = self
            .params
            .named()
            .iter()
            .map(|(_, var)| var.as_tensor().detach().flatten_all())
            .collect();
        let center = Tensor::cat(&parts?, 0)?.unsqueeze(0)?;
        Ok(self.draw(n, std, rng)?.broadcast_add(&center)?)
    }

    /// The variables of all particles: one tensor `[N, shape..]` for each variable.
    ///
    /// # Errors
    /// [`Error::Shape`] for rows of another width.
    pub fn unpack(&self, particles: &Tensor) -> Result<Vec<Tensor>> {
        let (n, _) = self.check(particles, 2)?;
        let layout = self.params.layout();
        let one = |i: usize| {
            let range = layout.range(i);
            let shape = [&[n], layout.shape(i)].concat();
            Ok(particles
                .narrow(1, range.start, range.len())?
                .reshape(shape)?)
        };
        (0..layout.len()).map(one).collect()
    }

    /// Writes one particle `[d]` (a consensus, say) into the variables.
    ///
    /// # Errors
    /// [`Error::Shape`] for another length.
    pub fn load(&self, particle: &Tensor) -> Result<()> {
        self.check(particle, 1)?;
        let rows = particle.detach().unsqueeze(0)?;
        for ((_, var), value) in self.params.named().iter().zip(self.unpack(&rows)?) {
            let value = value.squeeze(0)?.to_dtype(self.dtype)?.contiguous()?;
            var.set(&value.to_device(&self.device)?)?;
        }
        Ok(())
    }

    /// The rows' numbers as particles of this layout.
    ///
    /// # Errors
    /// [`Error::Shape`] when they are no multiple of the width.
    pub fn from_rows(&self, rows: &[f64]) -> Result<Tensor> {
        let d = self.dim();
        if rows.is_empty() || !rows.len().is_multiple_of(d) {
            let expected = format!("a multiple of {d}");
            return Err(Error::shape("rows", &[rows.len()], expected));
        }
        tensor_on(rows, &[rows.len() / d, d], self.dtype, &self.device)
    }

    fn check(&self, particles: &Tensor, rank: usize) -> Result<(usize, usize)> {
        let d = self.dim();
        let dims = particles.dims();
        if dims.len() != rank || dims.last() != Some(&d) {
            let expected = if rank == 1 {
                format!("[{d}]")
            } else {
                format!("[N, {d}]")
            };
            return Err(Error::shape("particles", dims, expected));
        }
        Ok((dims[0], d))
    }
}
