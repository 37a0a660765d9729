//! The projection itself.

use crate::error::check;
use crate::gradients::{finite_or_zero, Gradients};
use crate::param_group::ParamFilter;
use crate::transform::{Flow, GradientTransform};
use crate::{Error, Result};
use candle_core::{DType, Tensor};
use tensor_core::kernels::{self, GradMap, Moments};

/// Below this fraction of `|g|^2`, what is left is computed from the vectors themselves: the
/// difference of large sums has lost its digits, and scaling it up scales up the rounding of the
/// fused step, which puts a part back along the parameter. In `f32` that part stays below 1e-6;
/// narrower gradients are finer in the step's registers than written out.
fn cancellation(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1.0 / 64.0,
        _ => 1e-3,
    }
}

/// Keeps the division by `|g_perp|` finite.
const TINY: f64 = 1e-30;

/// What happens to a gradient that is parallel to its tensor, so that the projection leaves
/// nothing but rounding noise: `|g_perp| <= 16 u |g|` with `u` the unit roundoff.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Degenerate {
    /// The gradient becomes zero.
    #[default]
    Zero,
    /// The gradient stays what it is.
    Keep,
    /// The noise is scaled up to the gradient's norm, as in the official code.
    Official,
}

/// Configuration of the projection.
#[derive(Debug, Clone)]
pub struct PerpGradConfig {
    /// Rescales what is left to the gradient's original norm.
    pub rescale: bool,
    /// Added to `<w, w>`.
    pub eps: f64,
    /// What happens to gradients that are parallel to their tensor.
    pub degenerate: Degenerate,
    /// Which parameters are projected.
    pub filter: ParamFilter,
    /// Smaller tensors (scalars such as temperatures) are left alone: all of their gradient is
    /// parallel.
    pub min_numel: usize,
}

impl Default for PerpGradConfig {
    fn default() -> Self {
        Self {
            rescale: true,
            eps: 1e-30,
            degenerate: Degenerate::Zero,
            filter: ParamFilter::All,
            min_numel: 2,
        }
    }
}

impl PerpGradConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        check::non_negative("PerpGradConfig::eps", self.eps)
    }
}

/// What becomes of one gradient.
enum Outcome {
    /// Nothing changes.
    Same,
    /// `a g - b w`
    Affine { a: f64, b: f64 },
    /// Another tensor.
    Replaced(Tensor),
}

/// The gradient `g` without its part along `w` (any shape, the same for both), rescaled to its
/// norm unless the configuration says otherwise. The filter does not apply here.
///
/// # Errors
/// [`Error::Shape`] or [`Error::DType`] when the two differ.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use thalweg_optim::perp_grad::{orthogonalize, PerpGradConfig};
///
/// let w = Tensor::new(&[1f64, 0.0], &Device::Cpu)?;
/// let g = Tensor::new(&[3f64, 4.0], &Device::Cpu)?;
/// let projected = orthogonalize(&w, &g, &PerpGradConfig::default())?;
/// assert_eq!(projected.to_vec1::<f64>()?, [0.0, 5.0]);
/// # Ok::<(), thalweg_optim::Error>(())
/// ```
pub fn orthogonalize(w: &Tensor, g: &Tensor, config: &PerpGradConfig) -> Result<Tensor> {
    if w.dims() != g.dims() {
        return Err(Error::shape(
            "gradient",
            g.dims(),
            format!("{:?}", w.dims()),
        ));
    }
    if w.dtype() != g.dtype() {
        return Err(Error::DType {
            tensor: "gradient".into(),
            got: g.dtype(),
            expected: format!("{:?}", w.dtype()),
        });
    }
    let (w, g) = (w.detach(), g.detach());
    let mut moments = sums(&w, &g)?;
    if moments.nonfinite > 0 {
        let nonfinite = moments.nonfinite;
        moments = sums(&w, &finite_or_zero(&g)?)?;
        moments.nonfinite = nonfinite;
    }
    match project(&moments, &w, || Ok(g.clone()), config)? {
        Outcome::Same => Ok(g),
        Outcome::Affine { a, b } => Ok(GradMap::default().then_affine(a, b).apply(&g, &w)?),
        Outcome::Replaced(tensor) => Ok(tensor),
    }
}

fn sums(w: &Tensor, g: &Tensor) -> Result<Moments> {
    let all = kernels::moments(&[(Some(w), g, GradMap::default())])?;
    Ok(all.first().copied().unwrap_or_default())
}

/// Decides from the sums of finite entries; asks for the gradient as a tensor only where the sums
/// have lost their digits.
fn project(
    moments: &Moments,
    w: &Tensor,
    gradient: impl FnOnce() -> Result<Tensor>,
    config: &PerpGradConfig,
) -> Result<Outcome> {
    let Moments { pp, pg, gg, .. } = *moments;
    if w.elem_count() < config.min_numel || gg == 0.0 || pg == 0.0 {
        return Ok(Outcome::Same);
    }
    let along = pg / (pp + config.eps);
    let rest = gg - along * (2.0 * pg - along * pp);
    if rest >= cancellation(w.dtype()) * gg {
        let a = if config.rescale {
            gg.sqrt() / (rest.sqrt() + TINY)
        } else {
            1.0
        };
        return Ok(Outcome::Affine { a, b: a * along });
    }
    let gradient = gradient()?;
    let projected = nearly_parallel(moments, w, &gradient, along, config)?;
    Ok(projected.map_or(Outcome::Same, Outcome::Replaced))
}

/// The projection where `|g_perp|` is much smaller than `|g|`; `None` keeps the gradient.
fn nearly_parallel(
    moments: &Moments,
    w: &Tensor,
    gradient: &Tensor,
    along: f64,
    config: &PerpGradConfig,
) -> Result<Option<Tensor>> {
    // Half precision has no digits left for this.
    let compute = match gradient.dtype() {
        DType::F64 => DType::F64,
        _ => DType::F32,
    };
    let wide = w.detach().to_dtype(compute)?;
    let finite = finite_or_zero(&gradient.to_dtype(compute)?)?;
    let mut rest = (finite - wide.affine(along, 0.0)?)?;
    let norm = moments.gg.sqrt();
    let mut left = kernels::sum_squares(&rest)?.sqrt();
    let degenerate = left <= 16.0 * unit_roundoff(gradient.dtype()) * norm;
    match config.degenerate {
        Degenerate::Zero if degenerate => rest = rest.zeros_like()?,
        Degenerate::Keep if degenerate => return Ok(None),
        Degenerate::Official => {}
        Degenerate::Zero | Degenerate::Keep => {
            // Once more: the first projection has left a part of its own rounding along `w`.
            let again = kernels::dot(&wide, &rest)? / (moments.pp + config.eps);
            rest = (rest - wide.affine(again, 0.0)?)?;
            left = kernels::sum_squares(&rest)?.sqrt();
        }
    }
    if config.rescale {
        rest = rest.affine(norm / (left + TINY), 0.0)?;
    }
    let mut rest = rest.to_dtype(gradient.dtype())?;
    if moments.nonfinite > 0 {
        // Entries that were not finite stay so, for the optimizer's policy to treat.
        rest = (rest + gradient.affine(0.0, 0.0)?)?;
    }
    Ok(Some(rest))
}

/// Half the distance between 1 and the next number.
fn unit_roundoff(dtype: DType) -> f64 {
    let bits = match dtype {
        DType::F64 => 53,
        DType::F16 => 11,
        DType::BF16 => 8,
        _ => 24,
    };
    f64::powi(2.0, -bits)
}

/// The projection as a [`GradientTransform`].
#[derive(Debug, Clone)]
pub struct OrthogonalProjection {
    config: PerpGradConfig,
}

impl OrthogonalProjection {
    /// A projection of the parameters that the filter admits.
    ///
    /// # Errors
    /// Those of [`PerpGradConfig::validate`].
    pub fn new(config: PerpGradConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self { config })
    }
}

impl GradientTransform for OrthogonalProjection {
    fn apply(&mut self, gradients: &mut Gradients<'_>) -> Result<Flow> {
        let all = gradients.finite_moments()?;
        for (i, moments) in all.iter().enumerate() {
            let var = gradients.var(i);
            let Some((_, map)) = gradients.get(i) else {
                continue;
            };
            if !self.config.filter.admits(gradients.name(i), var) {
                continue;
            }
            // There is a gradient, so there is a tensor.
            let gradient = || Ok(gradients.materialized(i)?.unwrap_or(var.zeros_like()?));
            match project(moments, var, gradient, &self.config)? {
                Outcome::Same => {}
                Outcome::Affine { a, b } => gradients.set_map(i, map.then_affine(a, b)),
                Outcome::Replaced(tensor) => gradients.replace(i, tensor),
            }
        }
        Ok(Flow::Continue)
    }
}
