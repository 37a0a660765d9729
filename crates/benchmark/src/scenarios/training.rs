//! What scenarios that train a classifier share.

use crate::scenario::{Curve, TrialContext};
use crate::{Error, Result};
use candle_core::backprop::GradStore;
use candle_core::{DType, Tensor, Var};
use candle_nn::{ModuleT, Optimizer};
use datasets::{BatchConfig, Batches, Classification, DataDir, Sizes, TrainTest};
use nn::init::SeededVars;
use nn::loss::{accuracy, cross_entropy, Reduction};
use nn::models::{Mlp, MlpConfig};
use optim::transform::{Chain, ClipByGlobalNorm};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use tensor_core::autograd::grad_check;

/// The digits, split at random by the seed into parts of these sizes, on the trial's device.
///
/// # Errors
/// [`Error::Datasets`] for sizes beyond the 1797 examples.
pub fn digits(trial: &TrialContext, sizes: &[usize]) -> Result<Vec<Classification>> {
    let parts = datasets::digits()?.split(Sizes::Counts(sizes), &mut trial.stream("split"))?;
    parts
        .iter()
        .map(|part| Ok(part.to_device(&trial.device)?))
        .collect()
}

/// Training and test images: MNIST where the trial has a data folder, otherwise the digits, of
/// which `train` examples are for training and the rest for testing.
///
/// # Errors
/// [`Error::Datasets`] when files are missing or damaged.
pub fn images(trial: &TrialContext, train: usize) -> Result<(Classification, Classification)> {
    let Some(folder) = &trial.data else {
        let mut parts = digits(trial, &[train, datasets::digits::EXAMPLES - train])?.into_iter();
        return match (parts.next(), parts.next()) {
            (Some(train), Some(test)) => Ok((train, test)),
            _ => Err(Error::Trial("the digits could not be split".into())),
        };
    };
    let data = mnist(folder)?;
    let flat = |part: &Classification| -> Result<Classification> {
        Ok(part.flatten()?.to_device(&trial.device)?)
    };
    Ok((flat(&data.train)?, flat(&data.test)?))
}

/// MNIST, read once for all trials of the process.
fn mnist(folder: &PathBuf) -> Result<Arc<TrainTest>> {
    static READ: Mutex<Option<(PathBuf, Arc<TrainTest>)>> = Mutex::new(None);
    // A panic elsewhere cannot leave a half-written value here.
    let mut read = READ.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((from, data)) = &*read {
        if from == folder {
            return Ok(data.clone());
        }
    }
    let data = Arc::new(DataDir::new(folder)?.mnist()?);
    *read = Some((folder.clone(), data.clone()));
    Ok(data)
}

/// A network that is trained to classify.
pub struct Classifier<M> {
    /// The network.
    pub model: M,
    /// Its trained variables by name.
    pub params: Vec<(String, Var)>,
    /// Examples to train on.
    pub train: Classification,
    /// Examples to judge by.
    pub test: Classification,
}

impl Classifier<Mlp> {
    /// A perceptron whose first and last widths are those of the data; the seed alone decides the
    /// initial weights.
    ///
    /// # Errors
    /// [`Error::Nn`] for widths that make no sense.
    pub fn mlp(
        trial: &TrialContext,
        (train, test): (Classification, Classification),
        hidden: &[usize],
        config: MlpConfig,
    ) -> Result<Self> {
        let inputs = train.inputs.dims().get(1).copied().unwrap_or(0);
        let widths = [&[inputs], hidden, &[train.classes]].concat();
        let vars = SeededVars::new(&trial.stream("weights"));
        let vb = vars.builder(train.inputs.dtype(), &trial.device);
        let model = Mlp::new(&MlpConfig { widths, ..config }, vb)?;
        Ok(Self {
            model,
            params: vars.trainable(),
            train,
            test,
        })
    }
}

impl<M: ModuleT> Classifier<M> {
    /// The variables alone.
    pub fn vars(&self) -> Vec<Var> {
        self.params.iter().map(|(_, var)| var.clone()).collect()
    }

    /// Mean cross entropy of a training batch, with its graph.
    ///
    /// # Errors
    /// [`Error::Nn`], also for a loss that is not finite.
    pub fn loss(&self, inputs: &Tensor, labels: &Tensor) -> Result<Tensor> {
        let logits = self.model.forward_t(inputs, true)?;
        Ok(cross_entropy(&logits, labels, Reduction::Mean)?)
    }

    /// Mean cross entropy and accuracy in evaluation mode. Weights that are no numbers any more
    /// give an infinite loss.
    ///
    /// # Errors
    /// Those of candle.
    pub fn evaluate(&self, data: &Classification) -> Result<(f64, f64)> {
        let logits = self.model.forward_t(&data.inputs, false)?;
        match cross_entropy(&logits, &data.labels, Reduction::Mean) {
            Ok(loss) => Ok((scalar(&loss)?, accuracy(&logits, &data.labels)?)),
            Err(nn::Error::NonFinite { .. }) => Ok((f64::INFINITY, 0.0)),
            Err(error) => Err(error.into()),
        }
    }

    /// Checks on the first examples that a gradient arrives at every parameter.
    ///
    /// # Errors
    /// [`Error::TensorCore`] naming the parameters without a gradient.
    pub fn check_gradients(&self) -> Result<()> {
        let count = self.train.len().min(16);
        let (x, y) = (
            self.train.inputs.narrow(0, 0, count)?,
            self.train.labels.narrow(0, 0, count)?,
        );
        Ok(grad_check(&[&self.loss(&x, &y)?], &self.params)?)
    }
}

/// How [`fit`] trains.
pub struct Fit<'a> {
    /// Optimizer steps.
    pub steps: usize,
    /// Examples in a batch.
    pub batch: usize,
    /// The learning rate of each step.
    pub lr: &'a dyn Fn(usize) -> f64,
    /// Changes the gradients of a step before the optimizer sees them: what the experiment does to
    /// them, not part of a method.
    pub disturb: &'a mut dyn FnMut(usize, &mut GradStore) -> Result<()>,
}

/// Points of a training curve.
pub const POINTS: usize = 60;

/// Trains on mini-batches, whose order the seed alone decides, and gives the curve of the training
/// loss, averaged between its points. `watch` sees the optimizer after every step.
///
/// # Errors
/// [`Error::Cancelled`] when the user asked to stop; those of network and optimizer.
pub fn fit<M: ModuleT, O: Optimizer>(
    trial: &TrialContext,
    net: &Classifier<M>,
    optimizer: &mut O,
    how: Fit,
    mut watch: impl FnMut(&O),
) -> Result<Curve> {
    net.check_gradients()?;
    let order = BatchConfig::shuffled(how.batch);
    let mut batches = Batches::new(net.train.len(), order, &mut trial.stream("batches"))?;
    let mut curve = Curve::new("training loss", "step").log_y();
    let every = how.steps.div_ceil(POINTS).max(1);
    let (mut sum, mut count) = (0.0, 0.0);
    for step in 0..how.steps {
        trial.step(step, how.steps)?;
        let (inputs, labels) = batches.draw(&net.train)?;
        let loss = net.loss(&inputs, &labels)?;
        sum += scalar(&loss)?;
        count += 1.0;
        let mut grads = loss.backward()?;
        (how.disturb)(step, &mut grads)?;
        optimizer.set_learning_rate((how.lr)(step));
        optimizer.step(&grads)?;
        watch(optimizer);
        if (step + 1) % every == 0 || step + 1 == how.steps {
            curve.push((step + 1) as f64, sum / count);
            (sum, count) = (0.0, 0.0);
        }
    }
    Ok(curve)
}

/// Leaves the gradients as they are.
///
/// # Errors
/// None.
pub fn undisturbed(_: usize, _: &mut GradStore) -> Result<()> {
    Ok(())
}

/// A chain that scales all gradients together to a norm of at most `limit`.
///
/// # Errors
/// [`Error::Optim`] unless `limit` is positive.
pub fn clip_norm(limit: f64) -> Result<Chain> {
    Ok(Chain::new().then(ClipByGlobalNorm::new(limit)?))
}

/// The value of a scalar tensor.
///
/// # Errors
/// Those of candle, for a tensor that is no scalar.
pub fn scalar(tensor: &Tensor) -> Result<f64> {
    Ok(tensor.to_dtype(DType::F64)?.to_scalar::<f64>()?)
}
