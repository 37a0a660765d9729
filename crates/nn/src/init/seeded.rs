//! Variables whose initial values depend on a seed and on their names only.

use super::Initializer;
use crate::Error;
use candle_core::{DType, Device, Shape, Tensor, Var};
use candle_nn::var_builder::SimpleBackend;
use candle_nn::{Init, VarBuilder, VarMap};
use std::collections::HashMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use tensor_core::random::RandomStream;

/// Overrides a layer's own hint: variable name, shape, hint -> what to draw instead.
type Rule = dyn Fn(&str, &[usize], Init) -> Option<Initializer> + Send + Sync;

/// A source of variables for any network built on candle's [`VarBuilder`]: like
/// `VarBuilder::from_varmap`, but each initial value is drawn from the stream
/// `root.split(variable name)`. The values are therefore the same for the same seed, in whatever
/// order layers are made, and adding a layer changes no other.
///
/// The layers' own hints (candle's `Init`, `Init::Kaiming` included) are honoured, unless a
/// [rule](Self::with_rule) says otherwise.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{Module, Optimizer};
/// use thalweg_nn::{init::SeededVars, loss::{cross_entropy, Reduction}};
/// use thalweg_nn::RandomStream;
///
/// let vars = SeededVars::new(&RandomStream::new(7));
/// let vb = vars.builder(DType::F32, &Device::Cpu);
/// let layer = candle_nn::linear(4, 3, vb.pp("layer"))?;
/// let mut sgd = candle_nn::SGD::new(vars.trainable().into_iter().map(|(_, v)| v).collect(), 0.5)?;
///
/// let x = Tensor::eye(4, DType::F32, &Device::Cpu)?;
/// let labels = Tensor::new(&[0u32, 1, 2, 1], &Device::Cpu)?;
/// let mut losses = vec![];
/// for _ in 0..20 {
///     let loss = cross_entropy(&layer.forward(&x)?, &labels, Reduction::Mean)?;
///     sgd.backward_step(&loss)?;
///     losses.push(loss.to_scalar::<f32>()?);
/// }
/// assert!(losses[19] < 0.7 * losses[0]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct SeededVars {
    map: VarMap,
    root: RandomStream,
    rule: Option<Arc<Rule>>,
}

impl SeededVars {
    /// An empty set of variables. The stream is split by variable names and does not move.
    pub fn new(root: &RandomStream) -> Self {
        Self {
            map: VarMap::new(),
            root: root.clone(),
            rule: None,
        }
    }

    /// Puts new variables into a map that exists already; what the map has keeps its value.
    #[must_use]
    pub fn with_varmap(mut self, map: VarMap) -> Self {
        self.map = map;
        self
    }

    /// Draws from another distribution than the layer's hint wherever `rule` (variable name,
    /// shape, hint) gives one.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use thalweg_nn::init::{Gain, Initializer, SeededVars};
    /// # use thalweg_nn::RandomStream;
    /// let vars = SeededVars::new(&RandomStream::new(7)).with_rule(|name, _shape, _hint| {
    ///     let gain = Gain::Linear;
    ///     name.ends_with("weight").then_some(Initializer::Orthogonal { gain })
    /// });
    /// let layer = candle_nn::linear(4, 4, vars.builder(DType::F64, &Device::Cpu))?;
    /// let w = layer.weight();
    /// let distance = (w.matmul(&w.t()?)? - Tensor::eye(4, DType::F64, &Device::Cpu)?)?;
    /// assert!(distance.abs()?.max_all()?.to_scalar::<f64>()? < 1e-14);
    /// # use candle_core::Tensor;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    #[must_use]
    pub fn with_rule(
        mut self,
        rule: impl Fn(&str, &[usize], Init) -> Option<Initializer> + Send + Sync + 'static,
    ) -> Self {
        self.rule = Some(Arc::new(rule));
        self
    }

    /// What layers are built from.
    pub fn builder(&self, dtype: DType, device: &Device) -> VarBuilder<'static> {
        VarBuilder::from_backend(Box::new(self.clone()), dtype, device.clone())
    }

    /// The variables, for saving and loading.
    pub fn varmap(&self) -> &VarMap {
        &self.map
    }

    /// What networks are built from that have the values of now for constants: see [`frozen`].
    ///
    /// # Errors
    /// As [`frozen`].
    pub fn frozen(&self, dtype: DType, device: &Device) -> crate::Result<VarBuilder<'static>> {
        frozen(&self.map, dtype, device)
    }

    /// The variables that an optimizer should see; see [`trainable`].
    pub fn trainable(&self) -> Vec<(String, Var)> {
        trainable(&self.map)
    }
}

impl SimpleBackend for SeededVars {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        hint: Init,
        dtype: DType,
        device: &Device,
    ) -> candle_core::Result<Tensor> {
        let mut vars = lock(&self.map);
        if let Some(var) = vars.get(name) {
            if var.shape() != &shape {
                let expected = format!("{:?}, the shape of `{name}` in the map", var.dims());
                return Err(Error::shape("variable", shape.dims(), expected).into());
            }
            return Ok(var.as_tensor().clone());
        }
        let chosen = self
            .rule
            .as_ref()
            .and_then(|rule| rule(name, shape.dims(), hint));
        let initializer = chosen.unwrap_or_else(|| hint.into());
        let mut stream = self.root.split(name);
        let var = Var::from_tensor(&initializer.tensor(shape, &mut stream, dtype, device)?)?;
        let tensor = var.as_tensor().clone();
        vars.insert(name.to_string(), var);
        Ok(tensor)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> candle_core::Result<Tensor> {
        match lock(&self.map).get(name) {
            Some(var) => Ok(var.as_tensor().clone()),
            None => Err(candle_core::Error::CannotFindTensor { path: name.into() }.bt()),
        }
    }

    fn contains_tensor(&self, name: &str) -> bool {
        lock(&self.map).contains_key(name)
    }
}

/// A thread that panicked while it held the map leaves whole entries behind.
fn lock(map: &VarMap) -> MutexGuard<'_, HashMap<String, Var>> {
    map.data().lock().unwrap_or_else(PoisonError::into_inner)
}

/// Last parts of the names of variables that layers keep for themselves: running statistics that
/// are saved with the weights and that no optimizer may touch.
const BUFFERS: [&str; 5] = [
    "running_mean",
    "running_var",
    "running_phi",
    "ema_gz",
    "iters",
];

/// Whether a variable of this name holds a layer's running statistics rather than a parameter.
pub fn is_buffer(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    BUFFERS.contains(&last)
}

/// The variables of a map that an optimizer should see: floating point, no
/// [buffers](is_buffer), sorted by name (a `VarMap` itself has no stable order).
pub fn trainable(map: &VarMap) -> Vec<(String, Var)> {
    let vars = lock(map);
    let wanted = |(name, var): &(&String, &Var)| var.dtype().is_float() && !is_buffer(name);
    let pairs = vars.iter().filter(wanted);
    let mut found: Vec<(String, Var)> = pairs.map(|(n, v)| (n.clone(), v.clone())).collect();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}

/// A builder over copies of a map's values, as constants: for a network that is run, or differentiated
/// in its input alone. Backward passes then make no gradients of its parameters, which with variables
/// they do whether somebody asks for them or not.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_nn::Module;
/// use thalweg_nn::{init::SeededVars, linear::linear, RandomStream};
///
/// let vars = SeededVars::new(&RandomStream::new(7));
/// let trained = linear(4, 3, vars.builder(DType::F32, &Device::Cpu))?;
/// let before = linear(4, 3, vars.frozen(DType::F32, &Device::Cpu)?)?;
/// let x = Var::from_tensor(&Tensor::ones((1, 4), DType::F32, &Device::Cpu)?)?;
/// let gap = (trained.forward(&x)? - before.forward(&x)?)?.sqr()?.sum_all()?;
/// let grads = gap.backward()?;
/// assert!(grads.get(trained.weight()).is_some() && grads.get(before.weight()).is_none());
/// assert_eq!(gap.to_scalar::<f32>()?, 0.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// Those of candle.
pub fn frozen(map: &VarMap, dtype: DType, device: &Device) -> crate::Result<VarBuilder<'static>> {
    let mut constants = HashMap::new();
    for (name, var) in lock(map).iter() {
        constants.insert(name.clone(), var.as_detached_tensor().copy()?);
    }
    Ok(VarBuilder::from_tensors(constants, dtype, device))
}

impl std::fmt::Debug for SeededVars {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SeededVars")
            .field("variables", &lock(&self.map).len())
            .field("rule", &self.rule.is_some())
            .finish()
    }
}
