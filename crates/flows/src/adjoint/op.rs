//! The whole sampler as one operation of candle's graph.

use super::{AdjointSolver, Form, RhoOde, Tape};
use crate::condition::Condition;
use crate::denoiser::Denoiser;
use crate::error::Result;
use crate::schedule::Schedule;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, Layout, MetalStorage, Shape, Storage, Tensor,
};
use std::sync::Arc;

/// A sampler that can stand in the middle of somebody's own graph: [`apply`](Self::apply) maps start
/// noise to samples, and `backward()` goes through it by [`AdjointSolver::pullback`].
///
/// Gradients go to the start noise alone; for variables of the model or the condition take
/// [`AdjointSolver::value_and_grad`].
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use std::sync::Arc;
/// use thalweg_flows::adjoint::{AdjointSample, AdjointSolver};
/// use thalweg_flows::schedule::VpSde;
/// use thalweg_flows::{AnalyticMixture, Condition, Grid};
///
/// let means = Tensor::new(&[[1.0_f64, 0.0], [-1.0, 0.5]], &Device::Cpu)?;
/// let model = AnalyticMixture::new(&means, &[0.1, 0.1], &[1.0, 1.0])?;
/// let schedule = VpSde::default();
/// let grid = Grid::uniform_lambda_between(&schedule, 1.0, 0.02, 10)?;
/// let sampler = AdjointSample::new(AdjointSolver::new(grid), Arc::new(model), Arc::new(schedule));
///
/// let noise = Var::ones((1, 2), DType::F64, &Device::Cpu)?;
/// let loss = sampler.apply(&noise, &Condition::Null)?.sqr()?.sum_all()?;
/// assert!(loss.backward()?.get(&noise).is_some());
/// # Ok::<(), thalweg_flows::Error>(())
/// ```
#[derive(Clone)]
pub struct AdjointSample {
    solver: AdjointSolver,
    denoiser: Arc<dyn Denoiser + Send + Sync>,
    schedule: Arc<dyn Schedule + Send + Sync>,
    form: Form,
}

impl AdjointSample {
    /// A sampler of a model, in the noise form.
    pub fn new(
        solver: AdjointSolver,
        denoiser: Arc<dyn Denoiser + Send + Sync>,
        schedule: Arc<dyn Schedule + Send + Sync>,
    ) -> Self {
        Self {
            solver,
            denoiser,
            schedule,
            form: Form::Noise,
        }
    }

    /// Another form of the equation.
    #[must_use]
    pub fn form(self, form: Form) -> Self {
        Self { form, ..self }
    }

    fn ode<'a>(&'a self, condition: &'a Condition) -> RhoOde<'a> {
        RhoOde::new(self.denoiser.as_ref(), self.schedule.as_ref(), condition).form(self.form)
    }

    /// Samples at the last level from `x_start` at the first one, in its graph.
    ///
    /// # Errors
    /// As [`AdjointSolver::solve`].
    pub fn apply(&self, x_start: &Tensor, condition: &Condition) -> Result<Tensor> {
        let forward = self.solver.solve(&self.ode(condition), &x_start.detach())?;
        let op = Solved {
            sampler: self.clone(),
            condition: condition.clone(),
            result: forward.x_end.contiguous()?,
            tape: forward.tape,
        };
        Ok(x_start.apply_op1(op)?)
    }
}

/// A solve that has been made, as an operation on its start.
struct Solved {
    sampler: AdjointSample,
    condition: Condition,
    result: Tensor,
    tape: Tape,
}

impl CustomOp1 for Solved {
    fn name(&self) -> &'static str {
        "adjoint-sample"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let (storage, layout) = self.result.storage_and_layout();
        match &*storage {
            Storage::Cpu(values) => Ok((values.try_clone(layout)?, self.result.shape().clone())),
            _ => candle_core::bail!("the samples are not on the CPU"),
        }
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let (storage, layout) = self.result.storage_and_layout();
        match &*storage {
            Storage::Cuda(values) => Ok((values.try_clone(layout)?, self.result.shape().clone())),
            _ => candle_core::bail!("the samples are not on a CUDA device"),
        }
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
    ) -> candle_core::Result<(MetalStorage, Shape)> {
        let (storage, layout) = self.result.storage_and_layout();
        match &*storage {
            Storage::Metal(values) => Ok((values.try_clone(layout)?, self.result.shape().clone())),
            _ => candle_core::bail!("the samples are not on a Metal device"),
        }
    }

    fn bwd(&self, _: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
        let ode = self.sampler.ode(&self.condition);
        let gradients = self.sampler.solver.pullback(&ode, &self.tape, grad, &[])?;
        Ok(Some(gradients.start))
    }
}
