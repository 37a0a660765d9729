//! The reference of soft value-based decoding: the Gaussian run. The discrete runs of the file are
//! the business of the crate that has the discrete kernels.

use crate::svdd::{Batch, GaussianKernel, PosteriorMeanValue, ReverseKernel, Sample, Svdd, Value};
use crate::Result;
use candle_core::{DType, Tensor};
use flows::schedule::Ddpm;
use flows::verify::{bad, input, rows};
use flows::{AnalyticMixture, Grid, RandomStream, Schedule};
use tensor_core::verify::{Reference, Tolerance};

/// A kernel that takes its noise from the file.
struct Given<'a> {
    kernel: GaussianKernel<'a>,
    start: Tensor,
    /// By step, `[m, samples, ...]`.
    noise: Vec<Tensor>,
}

impl ReverseKernel for Given<'_> {
    type State = Sample;

    fn steps(&self) -> usize {
        self.kernel.steps()
    }

    fn init(&self, _: &mut [RandomStream]) -> Result<Sample> {
        Ok(Sample::new(self.start.clone()))
    }

    fn propose(&self, x: &Sample, step: usize, m: usize, _: &mut [RandomStream]) -> Result<Sample> {
        // The file has the candidates first, the kernel the samples.
        let noise = self.noise[step].narrow(0, 0, m)?;
        let noise = noise.transpose(0, 1)?.contiguous()?.flatten(0, 1)?;
        self.kernel.propose_with(x, step, &noise)
    }

    fn predict_clean(&self, x: &Sample, done: usize) -> Result<Sample> {
        self.kernel.predict_clean(x, done)
    }

    fn is_stochastic(&self, step: usize) -> bool {
        self.kernel.is_stochastic(step)
    }
}

/// Checks states, values and choices of the Gaussian run of every case (a prefix before `gm_means`).
///
/// # Errors
/// An error when the file lacks an input; a difference is a failed comparison instead.
pub fn svdd(reference: &mut Reference) -> Result<()> {
    for prefix in reference.cases("gm_means") {
        case(reference, &prefix)?;
    }
    Ok(())
}

fn case(reference: &mut Reference, prefix: &str) -> Result<()> {
    let name = |part: &str| format!("{prefix}{part}");
    let means = input(reference, &name("gm_means"))?;
    let variance = reference.input(&name("gm_var"))?.values;
    let [variance] = variance[..] else {
        return Err(bad(reference, "`gm_var` is not one number").into());
    };
    let components = means.rows()?;
    let model = AnalyticMixture::new(&means, &vec![variance; components], &vec![1.0; components])?;
    let schedule = Ddpm::from_betas(reference.input(&name("beta"))?.values)?;
    let steps = schedule.train_steps();
    let levels = (0..steps).rev().map(|t| schedule.level(t as f64));
    let grid = Grid::with_clean_end(levels.collect::<flows::Result<_>>()?)?;

    let start = input(reference, &name("x_T"))?;
    // Noise and uniform numbers are stored by time, which runs down.
    let mut noise = rows(&reference.input(&name("z"))?)?;
    noise.reverse();
    let uniforms = input(reference, &name("u_select_cont"))?;
    let mut uniforms = uniforms.to_vec2::<f64>()?;
    uniforms.reverse();
    if noise.len() != steps || uniforms.len() != steps {
        return Err(bad(reference, "`z` or `u_select_cont` has not a row per `beta`").into());
    }
    let m = noise[0].rows()?;
    let kernel = Given {
        kernel: GaussianKernel::ddpm(&model, grid, &start.dims()[1..], DType::F64),
        start: start.clone(),
        noise,
    };
    let target = input(reference, &name("reward_target"))?;
    let reward = |clean: &Sample| {
        let off = clean.x().broadcast_sub(&target)?.flatten_from(1)?;
        Ok(off.sqr()?.sum(1)?.neg()?)
    };
    let value = PosteriorMeanValue::new(&kernel, &reward);
    let out = Svdd::new(&kernel, &value)
        .duplicates(m)
        .alpha(reference.number("alpha")?)
        .given_uniforms(uniforms)
        .record(true)
        .sample(start.rows()?, &RandomStream::new(0))?;

    let near = Tolerance::Mixed(1e-9);
    let history = out.history.unwrap_or_default();
    let states: Vec<Tensor> = history.iter().map(|s| s.x().clone()).collect();
    reference.compare_tensor(&name("cont_states"), &Tensor::stack(&states, 0)?, near)?;
    let mut values = out.values.concat();
    if m == 1 {
        // A single candidate is not valued on the way.
        for (done, state) in history.iter().enumerate().skip(1) {
            values.extend(value.value(state, done)?.to_vec1::<f64>()?);
        }
    }
    reference.compare(&name("cont_values"), &values, near)?;
    let index: Vec<f64> = out
        .selected_index
        .concat()
        .into_iter()
        .map(f64::from)
        .collect();
    Ok(reference.compare(&name("cont_index"), &index, Tolerance::Mismatches(0))?)
}

/// Names what belongs to masked diffusion: for builds without the crate that computes it.
///
/// # Errors
/// Those of the file.
pub fn svdd_without_tokens(reference: &mut Reference) -> Result<()> {
    let starts = ["mc_", "pm_", "conv_", "value_", "reward_lin", "reward_pair"];
    for name in reference.names() {
        let part = name.rsplit('.').next().unwrap_or(&name);
        let discrete = starts.iter().any(|s| part.starts_with(s));
        if discrete || part == "u_gumbel" || part == "u_select" {
            reference.uncovered(&name, "masked diffusion, of thalweg-sequence-design")?;
        }
    }
    Ok(())
}
