//! The continuous half: Gaussian reverse kernels, and guidance by the reward's gradient.

use super::{Batch, ReverseKernel};
use crate::basic::score_factor;
use crate::error::{check, Error};
use crate::Result;
use candle_core::{DType, Device, Tensor, Var};
use flows::guidance::{Query, Role, RunInfo};
use flows::prediction::select_rows;
use flows::{
    Condition, Ddim, Denoised, Denoiser, Evaluator, GradientCheck, Grid, Guidance, Levels, StepCx,
};
use std::sync::OnceLock;
use tensor_core::random::RandomStream;

/// Noisy samples, with the clean ones that the model sees in them once it has been asked: what a
/// candidate was valued by is not computed again when it is chosen.
#[derive(Debug, Clone)]
pub struct Sample {
    x: Tensor,
    clean: OnceLock<Tensor>,
}

impl Sample {
    /// Samples `[rows, ...]`.
    pub fn new(x: Tensor) -> Self {
        Self {
            x,
            clean: OnceLock::new(),
        }
    }

    /// The samples themselves.
    pub fn x(&self) -> &Tensor {
        &self.x
    }
}

impl Batch for Sample {
    fn rows(&self) -> Result<usize> {
        self.x.rows()
    }

    fn take(&self, rows: &[u32]) -> Result<Self> {
        let clean = match self.clean.get() {
            Some(clean) => OnceLock::from(select_rows(clean, rows)?),
            None => OnceLock::new(),
        };
        let x = select_rows(&self.x, rows)?;
        Ok(Self { x, clean })
    }

    fn concat(parts: &[Self]) -> Result<Self> {
        let xs: Vec<Tensor> = parts.iter().map(|p| p.x.clone()).collect();
        let clean: Option<Vec<Tensor>> = parts.iter().map(|p| p.clean.get().cloned()).collect();
        Ok(Self {
            x: Tensor::concat(&xs)?,
            clean: match clean {
                Some(clean) => OnceLock::from(Tensor::concat(&clean)?),
                None => OnceLock::new(),
            },
        })
    }
}

/// The stochastic samplers of a [`Denoiser`]: DDPM, and DDIM with `eta > 0`.
///
/// ```
/// # extern crate flows as thalweg_flows;
/// use candle_core::{DType, Device, Tensor};
/// use thalweg_flows::schedule::VpSde;
/// use thalweg_flows::{AnalyticMixture, Condition, Grid, RandomStream};
/// use thalweg_guidance::svdd::{GaussianKernel, PosteriorMeanValue, Sample, Svdd};
///
/// let means = Tensor::new(&[[1.0_f64, 1.0], [-1.0, 0.5]], &Device::Cpu)?;
/// let model = AnalyticMixture::new(&means, &[0.04, 0.04], &[1.0, 1.0])?;
/// let grid = Grid::uniform_lambda(&VpSde::default(), 20)?;
/// let kernel = GaussianKernel::ddpm(&model, grid, &[2], DType::F64);
///
/// // Any judge: here one that rewards the first coordinate below zero, in steps.
/// let reward = |clean: &Sample| {
///     Ok(clean.x().narrow(1, 0, 1)?.squeeze(1)?.lt(0.0)?.to_dtype(DType::F64)?)
/// };
/// let value = PosteriorMeanValue::new(&kernel, &reward);
/// let out = Svdd::new(&kernel, &value).duplicates(8).sample(32, &RandomStream::new(2))?;
/// let first = out.states.x().narrow(1, 0, 1)?.flatten_all()?.to_vec1::<f64>()?;
/// assert!(first.iter().all(|x| *x < 0.0));
/// # Ok::<(), thalweg_guidance::Error>(())
/// ```
pub struct GaussianKernel<'a> {
    denoiser: &'a dyn Denoiser,
    grid: Grid,
    stepper: Ddim,
    shape: Vec<usize>,
    dtype: DType,
    device: Device,
    condition: Condition,
    max_rows: usize,
}

impl<'a> GaussianKernel<'a> {
    /// The ancestral sampler, for samples of this shape (without the rows).
    pub fn ddpm(denoiser: &'a dyn Denoiser, grid: Grid, shape: &[usize], dtype: DType) -> Self {
        Self {
            denoiser,
            grid,
            stepper: Ddim::ancestral(),
            shape: shape.to_vec(),
            dtype,
            device: Device::Cpu,
            condition: Condition::Null,
            max_rows: usize::MAX,
        }
    }

    /// DDIM with noise `eta` in `(0, 1]`; without any all candidates coincide, which the decoder
    /// refuses.
    #[must_use]
    pub fn eta(self, eta: f64) -> Self {
        Self {
            stepper: Ddim { eta },
            ..self
        }
    }

    /// The condition of all samples: tensors of one row.
    #[must_use]
    pub fn condition(self, condition: Condition) -> Self {
        Self { condition, ..self }
    }

    /// Where samples live.
    #[must_use]
    pub fn device(self, device: Device) -> Self {
        Self { device, ..self }
    }

    /// Rows that one call of the model may have.
    #[must_use]
    pub fn max_rows(self, rows: usize) -> Self {
        Self {
            max_rows: rows.max(1),
            ..self
        }
    }

    /// Mean (one row per state) and standard deviation of a step.
    ///
    /// # Errors
    /// Those of the model.
    pub fn moments(&self, x: &Sample, step: usize) -> Result<(Tensor, f64)> {
        let levels = self.grid.levels();
        let d = Denoised {
            x: x.x.clone(),
            x0: self.clean(x, step)?,
            levels: Levels::Same(levels[step]),
        };
        Ok(self.stepper.kernel(&d, &levels[step], &levels[step + 1])?)
    }

    fn clean(&self, x: &Sample, done: usize) -> Result<Tensor> {
        let level = self.grid.levels()[done];
        if level.sigma == 0.0 {
            return Ok(x.x.clone());
        }
        if let Some(clean) = x.clean.get() {
            return Ok(clean.clone());
        }
        let rows = x.rows()?;
        let mut parts = Vec::new();
        let mut start = 0;
        while start < rows {
            let count = (rows - start).min(self.max_rows);
            let part = x.x.narrow(0, start, count)?;
            let condition = self.condition.for_rows(count)?;
            let d = self.denoiser.denoise(&part, &level.into(), &condition)?;
            parts.push(d.x0.detach());
            start += count;
        }
        let clean = Tensor::concat(&parts)?;
        Ok(x.clean.get_or_init(|| clean).clone())
    }

    /// Candidates from noise `[rows * m, ...]` instead of drawn ones.
    ///
    /// # Errors
    /// [`Error::Shape`] for noise of another shape; those of the model.
    pub fn propose_with(&self, x: &Sample, step: usize, noise: &Tensor) -> Result<Sample> {
        let (mean, std) = self.moments(x, step)?;
        let (rows, total) = (x.rows()?, noise.rows()?);
        let fits = noise.dims()[1..] == mean.dims()[1..] && total.is_multiple_of(rows);
        if !fits {
            let expected = format!("a multiple of {rows} rows of {:?}", &mean.dims()[1..]);
            return Err(Error::shape("the noise", noise.dims(), expected));
        }
        let m = (total / rows) as u32;
        let owner: Vec<u32> = (0..total as u32).map(|i| i / m).collect();
        let mean = match m {
            1 => mean,
            _ => select_rows(&mean, &owner)?,
        };
        match std == 0.0 {
            true => Ok(Sample::new(mean)),
            false => Ok(Sample::new((mean + noise.affine(std, 0.0)?)?)),
        }
    }

    /// `m` rows of noise from each stream in turn.
    fn noise(&self, m: usize, streams: &mut [RandomStream]) -> Result<Tensor> {
        let mut shape = vec![m];
        shape.extend(&self.shape);
        let rows = streams
            .iter_mut()
            .map(|s| s.normal(0.0, 1.0, shape.clone(), self.dtype, &self.device))
            .collect::<tensor_core::Result<Vec<_>>>()?;
        Tensor::concat(&rows)
    }
}

impl ReverseKernel for GaussianKernel<'_> {
    type State = Sample;

    fn steps(&self) -> usize {
        self.grid.steps()
    }

    fn init(&self, streams: &mut [RandomStream]) -> Result<Sample> {
        Ok(Sample::new(self.grid.start(&self.noise(1, streams)?)?))
    }

    fn propose(
        &self,
        x: &Sample,
        step: usize,
        m: usize,
        streams: &mut [RandomStream],
    ) -> Result<Sample> {
        let noise = match self.is_stochastic(step) {
            true => self.noise(m, streams)?,
            // Nothing is drawn where nothing is added.
            false => {
                let mut shape = vec![m * streams.len()];
                shape.extend(&self.shape);
                Tensor::zeros(shape, self.dtype, &self.device)?
            }
        };
        self.propose_with(x, step, &noise)
    }

    fn predict_clean(&self, x: &Sample, done: usize) -> Result<Sample> {
        Ok(Sample::new(self.clean(x, done)?))
    }

    fn is_stochastic(&self, step: usize) -> bool {
        let last = self.grid.levels().get(step + 1);
        self.stepper.eta > 0.0 && last.is_some_and(|l| l.sigma > 0.0)
    }
}

/// Diffusion posterior sampling: `D + w (sigma^2 / alpha) grad r(D(x))`, the gradient taken through
/// the denoiser. What a differentiable reward allows, as a baseline.
///
/// The step is that of [`ClassifierGuidance`](crate::ClassifierGuidance) with the reward of the clean
/// prediction in the place of a log-probability.
pub struct DpsGuidance<F> {
    /// The reward `[rows]` of clean samples, with a graph.
    pub reward: F,
    /// The scale; 0 is no guidance.
    pub w: f64,
    /// The comparison of the first gradient with differences: two more evaluations, which are counted.
    pub gradient_check: GradientCheck,
}

impl<F: Fn(&Tensor) -> Result<Tensor>> DpsGuidance<F> {
    /// Guidance by a reward, with a scale.
    pub fn new(reward: F, w: f64) -> Self {
        Self {
            reward,
            w,
            gradient_check: GradientCheck::default(),
        }
    }
}

impl<F: Fn(&Tensor) -> Result<Tensor>> Guidance for DpsGuidance<F> {
    fn begin(&mut self, _: &RunInfo) -> flows::Result<()> {
        Ok(check::finite("DpsGuidance::w", self.w)?)
    }

    fn guide(&mut self, cx: &StepCx, net: &mut Evaluator) -> flows::Result<Denoised> {
        if self.w == 0.0 || net.rows() == 0 {
            return net.one(Query::main(flows::guidance::CondRole::Positive));
        }
        let at = Var::from_tensor(net.x())?;
        let levels = Levels::Same(cx.level);
        let model = net.model(Role::Main)?;
        let d = model.denoise(at.as_tensor(), &levels, net.positive())?;
        let rows = net.rows();
        let reward = (self.reward)(&d.x0)?;
        if reward.dims() != [rows] {
            return Err(Error::shape("the rewards", reward.dims(), format!("[{rows}]")).into());
        }
        let grads = reward.sum_all()?.backward()?;
        let g = grads.get(&at).ok_or_else(|| {
            tensor_core::Error::LostGradient(vec!["the sample, through denoiser and reward".into()])
        })?;
        let rewarded = |x: &Tensor| {
            let d = model.denoise(x, &levels, net.positive())?;
            Ok((self.reward)(&d.x0)?)
        };
        let checks = self
            .gradient_check
            .run("denoiser and reward", rewarded, net.x(), g)?;
        let nfe = net.nfe();
        nfe.main += (1 + checks) * rows;
        nfe.denoiser_backward += rows;
        nfe.reward_calls += (1 + checks) * rows;
        nfe.sequential_calls += 1 + checks;
        let factor = score_factor(self.w, &cx.level)?;
        let x0 = (d.x0.detach() + g.detach().affine(factor, 0.0)?)?;
        Ok(Denoised {
            x: net.x().clone(),
            x0,
            levels,
        })
    }
}
