//! Lanczos iteration with full reorthogonalisation: both ends of a symmetric spectrum.
//!
//! From a random unit vector `q_1` (Lanczos 1950):
//!
//! ```text
//! w = A q_j    a_j = <w, q_j>    w <- w - sum_i <w, q_i> q_i    b_j = |w|    q_{j+1} = w / b_j
//! ```
//!
//! The eigenvalues of the tridiagonal matrix of `a` and `b` approximate those of `A`, the extreme
//! ones first; with an eigenvector `s` of it, `sum_j s_j q_j` is an approximate eigenvector whose
//! residual is `b_k |s_k|`. Where `w` vanishes the vectors span an invariant subspace; a random
//! vector orthogonal to it starts the next one, since an eigenvalue shows up only once in each.
//! The basis is kept: memory grows by one vector per application.

use super::{
    add_scaled, check_limits, check_residual, check_vector, epsilon, norm, random_unit, EigenPair,
    Operator,
};
use crate::kernels::dot;
use crate::random::RandomStream;
use crate::{Error, Result};
use candle_core::Tensor;
use faer::{Mat, Side};

const METHOD: &str = "Lanczos iteration";

/// Settings of [`lanczos`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LanczosConfig {
    /// How many of the smallest eigenvalues to find.
    pub smallest: usize,
    /// How many of the largest eigenvalues to find.
    pub largest: usize,
    /// Stop when all residuals are at most `tolerance` times the largest magnitude of an eigenvalue.
    pub tolerance: f64,
    /// Applications of `A`, and vectors kept, at most.
    pub max_iterations: usize,
}

impl Default for LanczosConfig {
    fn default() -> Self {
        Self {
            smallest: 1,
            largest: 1,
            tolerance: 1e-5,
            max_iterations: 100,
        }
    }
}

impl LanczosConfig {
    /// Refuses settings that make no sense.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a negative or non-finite tolerance, no iterations, no
    /// eigenvalue asked for, or more of them than iterations.
    pub fn validate(&self) -> Result<()> {
        check_limits(self.tolerance, self.max_iterations)?;
        let wanted = self.wanted();
        if wanted == 0 {
            return Err(Error::invalid(
                "smallest and largest",
                0,
                "at least 1 of either",
            ));
        }
        if wanted > self.max_iterations {
            let expected = format!("at least {wanted}, the number of eigenvalues");
            return Err(Error::invalid(
                "max_iterations",
                self.max_iterations,
                expected,
            ));
        }
        Ok(())
    }

    fn wanted(&self) -> usize {
        self.smallest.max(self.largest)
    }
}

/// What [`lanczos`] found. In a space with fewer dimensions than were asked for, all eigenvalues.
#[derive(Debug, Clone)]
pub struct Spectrum {
    /// The smallest eigenvalues, ascending.
    pub smallest: Vec<EigenPair>,
    /// The largest eigenvalues, descending.
    pub largest: Vec<EigenPair>,
    /// The worst residual estimate among the wanted pairs, at each test for convergence.
    pub residuals: Vec<f64>,
    /// Applications of `A` that built the basis.
    pub iterations: usize,
    /// Whether the tolerance was met.
    pub converged: bool,
}

/// The tridiagonal matrix and its basis.
struct Krylov {
    basis: Vec<Tensor>,
    diagonal: Vec<f64>,
    /// `off[j]` couples `basis[j]` and `basis[j + 1]`; 0 between invariant subspaces.
    off: Vec<f64>,
    /// Largest `|A q|` so far: the unit of rounding.
    scale: f64,
}

/// Eigenvalues of the tridiagonal matrix, ascending, with its eigenvectors as columns.
struct Ritz {
    values: Vec<f64>,
    vectors: Mat<f64>,
}

/// Extreme eigenvalues of a symmetric operator on tensors of the form of `like` (whose values are
/// not used). `apply` is `x -> A x`; beyond the iterations it is called once per returned pair, for
/// its residual.
///
/// # Errors
/// [`Error::Diverged`] when the operator returns numbers that are not finite;
/// [`Error::InvalidArgument`] for a bad configuration; errors for a `like` that is empty or not f32
/// or f64; those of `apply`.
pub fn lanczos<A>(
    apply: A,
    like: &Tensor,
    config: &LanczosConfig,
    stream: &mut RandomStream,
) -> Result<Spectrum>
where
    A: FnMut(&Tensor) -> Result<Tensor>,
{
    config.validate()?;
    let like = &like.zeros_like()?;
    check_vector("like", like)?;
    let mut apply = Operator {
        name: "A x",
        apply,
        like,
    };
    let dimension = like.elem_count();
    let cap = config.max_iterations.min(dimension);
    let mut krylov = Krylov {
        basis: vec![random_unit(like, stream)?],
        diagonal: Vec::new(),
        off: Vec::new(),
        scale: 0.0,
    };
    let (mut residuals, mut subspaces) = (Vec::new(), 0);
    let ritz = loop {
        let (next, length) = krylov.extend(&mut apply)?;
        let k = krylov.diagonal.len();
        let rounding = 16.0 * epsilon(like.dtype()) * krylov.scale;
        let closed = length <= rounding || k == dimension;
        subspaces += usize::from(closed);
        let length = if closed { 0.0 } else { length };
        // After a first invariant subspace only further ones end the search: an eigenvalue of
        // multiplicity m takes m of them.
        let done = k == cap || subspaces >= config.wanted();
        let test = subspaces == 0 && k >= config.wanted() && (k < 16 || k.is_multiple_of(8));
        if done || test {
            let ritz = krylov.ritz()?;
            let worst = ritz.worst_residual(config, length);
            residuals.push(worst);
            if done || worst <= config.tolerance {
                break ritz;
            }
        }
        let next = match closed {
            true => krylov.orthogonal(random_unit(like, stream)?)?,
            false => (next / length)?,
        };
        krylov.off.push(length);
        krylov.basis.push(next);
    };
    let iterations = krylov.diagonal.len();
    let mut pair = |i: usize| krylov.pair(&ritz, i, &mut apply);
    let smallest = (0..config.smallest.min(iterations))
        .map(&mut pair)
        .collect::<Result<Vec<_>>>()?;
    let down = (0..config.largest.min(iterations)).map(|i| iterations - 1 - i);
    let largest = down.map(&mut pair).collect::<Result<Vec<_>>>()?;
    // The computed residual of a pair cannot be smaller than its rounding.
    let goal = config.tolerance.max(32.0 * epsilon(like.dtype()));
    let converged = iterations >= config.wanted().min(dimension)
        && smallest
            .iter()
            .chain(&largest)
            .all(|pair| pair.residual <= goal);
    tracing::debug!(
        iterations,
        converged,
        residual = residuals.last(),
        "Lanczos iteration"
    );
    Ok(Spectrum {
        smallest,
        largest,
        residuals,
        iterations,
        converged,
    })
}

impl Krylov {
    /// Applies the operator to the last vector and returns what is orthogonal to all, with its norm.
    fn extend<A>(&mut self, apply: &mut Operator<'_, A>) -> Result<(Tensor, f64)>
    where
        A: FnMut(&Tensor) -> Result<Tensor>,
    {
        let Some(last) = self.basis.last() else {
            return Err(Error::invalid("basis", "empty", "at least one vector"));
        };
        let image = apply.call(last)?;
        let size = norm(&image)?;
        check_residual(METHOD, self.diagonal.len() + 1, size, f64::MAX)?;
        self.scale = self.scale.max(size);
        self.diagonal.push(dot(&image, last)?);
        let next = self.orthogonal_part(image)?;
        let length = norm(&next)?;
        Ok((next, length))
    }

    /// Twice is enough: what the first pass leaves by rounding the second one removes.
    fn orthogonal_part(&self, mut w: Tensor) -> Result<Tensor> {
        for _ in 0..2 {
            for q in &self.basis {
                w = add_scaled(&w, -dot(&w, q)?, q)?;
            }
        }
        Ok(w)
    }

    /// A unit vector orthogonal to all. It is cleaned again at length 1: where few dimensions are
    /// left the first part is short and its rounding is not.
    fn orthogonal(&self, start: Tensor) -> Result<Tensor> {
        let mut part = start;
        for _ in 0..2 {
            part = self.orthogonal_part(part)?;
            let length = norm(&part)?;
            part = (part / length)?;
        }
        Ok(part)
    }

    fn ritz(&self) -> Result<Ritz> {
        let k = self.diagonal.len();
        let entry = |i: usize, j: usize| match i.abs_diff(j) {
            0 => self.diagonal[i],
            1 => self.off[i.min(j)],
            _ => 0.0,
        };
        let matrix = Mat::from_fn(k, k, entry);
        let eigen = matrix
            .self_adjoint_eigen(Side::Lower)
            .map_err(|_| Error::Diverged {
                method: "eigenvalues of the tridiagonal matrix",
                iteration: k,
                residual: f64::NAN,
            })?;
        Ok(Ritz {
            values: eigen.S().column_vector().iter().copied().collect(),
            vectors: eigen.U().to_owned(),
        })
    }

    fn pair<A>(&self, ritz: &Ritz, i: usize, apply: &mut Operator<'_, A>) -> Result<EigenPair>
    where
        A: FnMut(&Tensor) -> Result<Tensor>,
    {
        let mut vector = self.basis[0].zeros_like()?;
        for (j, q) in self.basis.iter().enumerate().take(self.diagonal.len()) {
            vector = add_scaled(&vector, ritz.vectors[(j, i)], q)?;
        }
        let length = norm(&vector)?;
        let vector = (vector / length)?;
        let value = ritz.values[i];
        let distance = norm(&add_scaled(&apply.call(&vector)?, -value, &vector)?)?;
        Ok(EigenPair {
            value,
            vector,
            residual: relative(distance, ritz.scale()),
        })
    }
}

impl Ritz {
    /// The largest magnitude of an eigenvalue.
    fn scale(&self) -> f64 {
        let ends = [self.values.first(), self.values.last()];
        ends.iter()
            .flatten()
            .fold(0.0, |scale, x| x.abs().max(scale))
    }

    fn worst_residual(&self, config: &LanczosConfig, length: f64) -> f64 {
        let (k, scale) = (self.values.len(), self.scale());
        let wanted = (0..k).filter(|i| *i < config.smallest || k - 1 - i < config.largest);
        let residual = |i: usize| relative(length * self.vectors[(k - 1, i)].abs(), scale);
        wanted.map(residual).fold(0.0, f64::max)
    }
}

/// Residuals of the zero operator are zero.
fn relative(residual: f64, scale: f64) -> f64 {
    if scale > 0.0 {
        residual / scale
    } else {
        residual
    }
}
