//! The gradient spike score.

use crate::error::check;
use crate::gradients::Gradients;
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use std::collections::VecDeque;

/// The gradient spike score of a whole series of gradients `[T, ..]`:
/// `|g_t| / mean over all t of |g_t|`, entry by entry, of the same shape. An entry that is always
/// zero scores 0.
///
/// # Errors
/// [`Error::Shape`] for a series without steps.
pub fn spike_scores(series: &Tensor) -> Result<Tensor> {
    if series.rank() == 0 || series.dim(0)? == 0 {
        return Err(Error::shape("series", series.dims(), "[T, ..] with T >= 1"));
    }
    let size = series.detach().abs()?;
    let mean = size.mean_keepdim(0)?;
    // Where the mean is 0 every entry is 0: divide by 1 there.
    let divisor = (&mean + mean.eq(0.0)?.to_dtype(mean.dtype())?)?;
    Ok(size.broadcast_div(&divisor)?)
}

/// Watches gradients for spikes: entries whose size is more than `threshold` times their own mean
/// size over the steps observed so far (or the last `window` of them), the present one included.
///
/// Keeps one `f64` per entry, and with a window one `f32` per entry and step of the window: a
/// diagnosis, not something to run in every step of a large model.
///
/// ```
/// use candle_core::{Device, Var};
/// use thalweg_optim::spam::SpikeMonitor;
///
/// let w = Var::new(&[1f32, 1.0], &Device::Cpu)?;
/// let mut monitor = SpikeMonitor::new(vec![("w".into(), w.clone())], None, 10.0)?;
/// for _ in 0..30 {
///     let report = monitor.observe(&w.sum_all()?.backward()?)?;
///     assert_eq!(report.count, 0);
/// }
/// let report = monitor.observe(&w.affine(1e3, 0.0)?.sum_all()?.backward()?)?;
/// assert_eq!((report.count, report.by_tensor[0].count), (2, 2));
/// # Ok::<(), thalweg_optim::Error>(())
/// ```
#[derive(Debug)]
pub struct SpikeMonitor {
    params: Vec<(String, Var)>,
    window: Option<usize>,
    threshold: f64,
    series: Vec<Series>,
    step: u64,
}

/// What is kept of one parameter's gradients.
#[derive(Debug, Default)]
struct Series {
    /// Sum of `|g|` per entry.
    sums: Vec<f64>,
    /// The sizes inside the window, oldest first.
    ring: VecDeque<Vec<f32>>,
    steps: usize,
}

/// Spikes of one observation.
#[derive(Debug, Clone, PartialEq)]
pub struct SpikeReport {
    /// Number of the observation, from 1.
    pub step: u64,
    /// Entries above the threshold.
    pub count: u64,
    /// The largest score.
    pub max_score: f64,
    /// Entries that are NaN or infinite; they do not enter any mean.
    pub nonfinite: u64,
    /// The parameters that had a gradient.
    pub by_tensor: Vec<TensorSpikes>,
}

/// Spikes of one parameter.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpikes {
    /// The parameter.
    pub name: String,
    /// Entries above the threshold.
    pub count: u64,
    /// The largest score.
    pub max_score: f64,
    /// Entries that are NaN or infinite.
    pub nonfinite: u64,
}

impl SpikeMonitor {
    /// The paper's threshold.
    pub const THRESHOLD: f64 = 50.0;

    /// A monitor of these parameters; `window` is the number of steps that the mean is taken
    /// over, `None` for all.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a threshold that is not positive, or a window that it does not
    /// fit in: a score cannot exceed the number of steps in the mean.
    pub fn new(params: Vec<(String, Var)>, window: Option<usize>, threshold: f64) -> Result<Self> {
        check::positive("SpikeMonitor::threshold", threshold)?;
        if let Some(window) = window {
            let expected = format!("more steps than the threshold {threshold}");
            check::require(
                window as f64 > threshold,
                "SpikeMonitor::window",
                window,
                &expected,
            )?;
        }
        Ok(Self {
            series: params.iter().map(|_| Series::default()).collect(),
            params,
            window,
            threshold,
            step: 0,
        })
    }

    /// Scores one step's gradients and takes them into the means.
    ///
    /// # Errors
    /// Those of candle.
    pub fn observe(&mut self, grads: &GradStore) -> Result<SpikeReport> {
        self.step += 1;
        let gradients = Gradients::collect(&self.params, grads);
        let mut report = SpikeReport {
            step: self.step,
            count: 0,
            max_score: 0.0,
            nonfinite: 0,
            by_tensor: Vec::new(),
        };
        for (i, series) in self.series.iter_mut().enumerate() {
            let Some((grad, _)) = gradients.get(i) else {
                continue;
            };
            let sizes = grad.detach().flatten_all()?.to_dtype(DType::F64)?;
            let sizes: Vec<f64> = sizes.to_vec1()?;
            let mut found = series.observe(sizes, self.window, self.threshold);
            found.name = gradients.name(i).to_string();
            report.count += found.count;
            report.max_score = report.max_score.max(found.max_score);
            report.nonfinite += found.nonfinite;
            report.by_tensor.push(found);
        }
        if report.count > 0 {
            tracing::info!(
                count = report.count,
                max_score = report.max_score,
                "gradient spikes"
            );
        }
        Ok(report)
    }
}

impl Series {
    fn observe(&mut self, mut sizes: Vec<f64>, window: Option<usize>, limit: f64) -> TensorSpikes {
        let mut found = TensorSpikes {
            name: String::new(),
            count: 0,
            max_score: 0.0,
            nonfinite: 0,
        };
        for size in &mut sizes {
            let finite = size.is_finite();
            found.nonfinite += u64::from(!finite);
            *size = if finite { size.abs() } else { 0.0 };
        }
        self.add(&sizes, window);
        let steps = self.steps as f64;
        for (size, sum) in sizes.iter().zip(&self.sums) {
            let score = if *sum > 0.0 { size * steps / sum } else { 0.0 };
            found.count += u64::from(score > limit);
            found.max_score = found.max_score.max(score);
        }
        found
    }

    fn add(&mut self, sizes: &[f64], window: Option<usize>) {
        self.steps += 1;
        let Some(window) = window else {
            self.sums.resize(sizes.len(), 0.0);
            self.sums.iter_mut().zip(sizes).for_each(|(s, x)| *s += x);
            return;
        };
        if self.steps > window {
            self.ring.pop_front();
            self.steps = window;
        }
        self.ring
            .push_back(sizes.iter().map(|x| *x as f32).collect());
        // Summed afresh: differences of a running sum would remember a spike for ever.
        self.sums.clear();
        self.sums.resize(sizes.len(), 0.0);
        for old in &self.ring {
            self.sums
                .iter_mut()
                .zip(old)
                .for_each(|(s, x)| *s += f64::from(*x));
        }
    }
}
