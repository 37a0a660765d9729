//! Low-rank adapters (LoRA) for linear layers, convolutions, and whole networks.
//!
//! ```text
//! W' = W + (alpha / r) B A             linear: A [r, in], B [out, r]
//! convolution [out, in, k, k]:         A [r k, in k], B [out k, r k], B A read row by row as the kernel
//! ```
//!
//! `A` starts uniform in `+-1 / sqrt(fan_in)`, `B` at zero, so that an adapter changes nothing before
//! it is trained. *LoRA: Low-Rank Adaptation of Large Language Models*, arXiv 2106.09685; the
//! factorization of convolutions is that of the authors' library.
//!
//! [`LoraLinear`] and [`LoraConv2d`] are layers. [`Adapters`] adapts any network that is built from a
//! [`VarBuilder`]: it hands the network `W'` in the place of `W`, and copies of the biases and norms
//! that are tuned too. The product `B A` is made once per build, so inference costs what the base
//! network costs; during training the network is built anew for every step, which is a look-up of its
//! tensors.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_nn::Optimizer;
//! use thalweg_nn::init::SeededVars;
//! use thalweg_nn::lora::{Adapters, PeftSpec};
//! use thalweg_nn::{linear, RandomStream};
//! use candle_core::Module;
//!
//! let vars = SeededVars::new(&RandomStream::new(1));
//! let base = linear::linear(4, 3, vars.builder(DType::F32, &Device::Cpu).pp("layer"))?;
//! let weights = vars.varmap().data().lock().unwrap().iter()
//!     .map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
//!
//! let spec = PeftSpec { rank: 2, ..PeftSpec::default() };
//! let adapters = Adapters::new(weights, &spec, &mut RandomStream::new(2))?;
//! let build = || linear::linear(4, 3, adapters.builder()?.pp("layer"));
//! let x = Tensor::ones((2, 4), DType::F32, &Device::Cpu)?;
//! assert_eq!(build()?.forward(&x)?.to_vec2::<f32>()?, base.forward(&x)?.to_vec2::<f32>()?);
//!
//! let mut sgd = candle_nn::SGD::new(adapters.vars(), 0.01)?;
//! for _ in 0..200 {
//!     sgd.backward_step(&(build()?.forward(&x)? - 1.0)?.sqr()?.mean_all()?)?;
//! }
//! let off = (build()?.forward(&x)? - 1.0)?.sqr()?.mean_all()?.to_scalar::<f32>()?;
//! assert!(off < 0.05);
//! # Ok::<(), thalweg_nn::Error>(())
//! ```

use crate::conv::Conv2d;
use crate::linear::Linear;
use crate::{Error, Result};
use candle_core::{DType, Module, Tensor, Var};
use candle_nn::VarBuilder;
use std::collections::{BTreeMap, HashMap};
use tensor_core::checkpoint::{expect_state, State};
use tensor_core::random::RandomStream;

/// The shapes of `A` and `B` for a weight, and the bound of `A`'s first values.
fn factors(weight: &[usize], rank: usize) -> Result<([usize; 2], [usize; 2], f64)> {
    if rank == 0 {
        return Err(Error::config("rank", rank, "at least 1"));
    }
    let (a, b) = match *weight {
        [out, inputs] => ([rank, inputs], [out, rank]),
        [out, inputs, k, l] if k == l => ([rank * k, inputs * k], [out * k, rank * k]),
        _ => {
            let expected = "[out, in], or [out, in, k, k]";
            return Err(Error::shape(
                "the weight under an adapter",
                weight,
                expected,
            ));
        }
    };
    Ok((a, b, 1.0 / (a[1].max(1) as f64).sqrt()))
}

/// `(alpha / r) B A` in the shape of the weight.
///
/// # Errors
/// [`Error::Shape`] when the factors do not belong to a weight of this shape.
pub fn delta_weight(
    shape: &[usize],
    a: &Tensor,
    b: &Tensor,
    rank: usize,
    alpha: f64,
) -> Result<Tensor> {
    let (a_shape, b_shape, _) = factors(shape, rank)?;
    if a.dims() != a_shape {
        return Err(Error::shape("A", a.dims(), format!("{a_shape:?}")));
    }
    if b.dims() != b_shape {
        return Err(Error::shape("B", b.dims(), format!("{b_shape:?}")));
    }
    let product = b.matmul(a)?.affine(alpha / rank as f64, 0.0)?;
    Ok(product.reshape(shape)?)
}

/// The factors of one weight.
#[derive(Debug, Clone)]
struct Pair {
    a: Var,
    b: Var,
    rank: usize,
    alpha: f64,
}

impl Pair {
    fn new(weight: &Tensor, rank: usize, alpha: f64, rng: &mut RandomStream) -> Result<Self> {
        if !alpha.is_finite() {
            return Err(Error::config("alpha", alpha, "a finite number"));
        }
        let (a, b, bound) = factors(weight.dims(), rank)?;
        let (dtype, device) = (weight.dtype(), weight.device());
        let start = rng.uniform(-bound, bound, (a[0], a[1]), dtype, device)?;
        Ok(Self {
            a: Var::from_tensor(&start)?,
            b: Var::zeros((b[0], b[1]), dtype, device)?,
            rank,
            alpha,
        })
    }

    fn delta(&self, shape: &[usize]) -> Result<Tensor> {
        delta_weight(shape, &self.a, &self.b, self.rank, self.alpha)
    }
}

macro_rules! adapted_layer {
    ($name:ident, $base:ident, $what:literal) => {
        #[doc = concat!("A frozen ", $what, " with an adapter.")]
        #[derive(Debug, Clone)]
        pub struct $name {
            base: $base,
            pair: Pair,
            enabled: bool,
        }

        impl $name {
            /// An adapter of this rank and scale `alpha / rank` over a layer, which is frozen.
            ///
            /// # Errors
            /// [`Error::InvalidConfig`] for rank 0; [`Error::Shape`] for a weight that cannot be
            /// adapted.
            pub fn new(
                base: $base,
                rank: usize,
                alpha: f64,
                rng: &mut RandomStream,
            ) -> Result<Self> {
                let pair = Pair::new(base.weight(), rank, alpha, rng)?;
                Ok(Self {
                    base,
                    pair,
                    enabled: true,
                })
            }

            /// `A` and `B`.
            pub fn factors(&self) -> [&Var; 2] {
                [&self.pair.a, &self.pair.b]
            }

            /// What is added to the weight.
            ///
            /// # Errors
            /// Those of candle.
            pub fn delta_weight(&self) -> Result<Tensor> {
                self.pair.delta(self.base.weight().dims())
            }

            /// Whether the adapter is applied.
            pub fn set_enabled(&mut self, enabled: bool) {
                self.enabled = enabled;
            }
        }

        impl Module for $name {
            fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
                match self.enabled {
                    true => self.merged()?.forward(x),
                    false => self.base.forward(x),
                }
            }
        }
    };
}

adapted_layer!(LoraLinear, Linear, "linear layer");
adapted_layer!(LoraConv2d, Conv2d, "convolution");

impl LoraLinear {
    /// The plain layer with the adapter in its weight, still in its graph.
    fn merged(&self) -> Result<Linear> {
        let weight = (self.base.weight().detach() + self.delta_weight()?)?;
        let bias = self.base.bias().map(Tensor::detach);
        Ok(Linear::new(weight, bias).with_activation(self.base.activation()))
    }

    /// The plain layer with the adapter in its weight.
    ///
    /// # Errors
    /// Those of candle.
    pub fn merge(&self) -> Result<Linear> {
        let merged = self.merged()?;
        let plain = Linear::new(merged.weight().detach(), merged.bias().cloned());
        Ok(plain.with_activation(merged.activation()))
    }
}

impl LoraConv2d {
    /// The plain layer with the adapter in its weight, still in its graph.
    fn merged(&self) -> Result<Conv2d> {
        let weight = (self.base.weight().detach() + self.delta_weight()?)?;
        let bias = self.base.bias().map(Tensor::detach);
        let config = *self.base.config();
        Ok(Conv2d::new(weight, bias, config).with_activation(self.base.activation()))
    }

    /// The plain layer with the adapter in its weight.
    ///
    /// # Errors
    /// Those of candle.
    pub fn merge(&self) -> Result<Conv2d> {
        let merged = self.merged()?;
        let (weight, bias) = (merged.weight().detach(), merged.bias().cloned());
        Ok(Conv2d::new(weight, bias, *merged.config()).with_activation(merged.activation()))
    }
}

/// What of a network is adapted, and how.
pub struct PeftSpec {
    /// The rank `r` of the adapters.
    pub rank: usize,
    /// Their scale is `alpha / rank`.
    pub alpha: f64,
    /// Which weights get one, by name; they must be matrices or square kernels.
    pub targets: Box<dyn Fn(&str) -> bool>,
    /// Whether biases are trained.
    pub train_bias: bool,
    /// Whether scales of norms (vectors named `weight`) are trained.
    pub train_norm: bool,
    /// Whether targets are trained themselves, of any shape, instead of by adapters: what adapters are
    /// compared with.
    pub full: bool,
    /// Variables whose path has one of these parts are left alone.
    pub exclude: Vec<String>,
}

impl Default for PeftSpec {
    /// Rank 16 and `alpha` 8 on every weight; biases and norms are trained; `head` and `fc` are not.
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 8.0,
            targets: Box::new(|_| true),
            train_bias: true,
            train_norm: true,
            full: false,
            exclude: vec!["head".into(), "fc".into()],
        }
    }
}

/// Adapters of a network; see the [module](self) page. Copies share their variables.
///
/// Running statistics of batch norms (`running_mean`, `running_var`) are kept too: a norm that is built from
/// them and runs in training mode updates them, and they are part of the state.
#[derive(Debug, Clone)]
pub struct Adapters {
    base: BTreeMap<String, Tensor>,
    pairs: BTreeMap<String, Pair>,
    tuned: BTreeMap<String, Var>,
    /// Running statistics, which layers update in place.
    running: BTreeMap<String, Var>,
    enabled: bool,
}

impl Adapters {
    /// Adapters over the weights of a network, by name. `A` of a weight depends on the stream and on
    /// the weight's name.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for rank 0, no weights, or nothing to train; [`Error::Shape`] for a
    /// target that is no matrix and no square kernel.
    pub fn new(
        base: BTreeMap<String, Tensor>,
        spec: &PeftSpec,
        rng: &mut RandomStream,
    ) -> Result<Self> {
        let (mut pairs, mut tuned, mut running) =
            (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        let stream = RandomStream::new(rng.bits());
        for (name, tensor) in &base {
            if name
                .split('.')
                .any(|part| spec.exclude.iter().any(|e| e == part))
            {
                continue;
            }
            let last = name.rsplit('.').next().unwrap_or(name);
            let vector = tensor.rank() == 1;
            let target = last == "weight" && !vector && (spec.targets)(name);
            let own = || Var::from_tensor(&tensor.detach().copy()?);
            if last == "bias" && spec.train_bias
                || last == "weight" && vector && spec.train_norm
                || target && spec.full
            {
                tuned.insert(name.clone(), own()?);
            } else if ["running_mean", "running_var"].contains(&last) {
                running.insert(name.clone(), own()?);
            } else if target {
                let mut own = stream.split(name);
                pairs.insert(
                    name.clone(),
                    Pair::new(tensor, spec.rank, spec.alpha, &mut own)?,
                );
            }
        }
        if pairs.is_empty() && tuned.is_empty() {
            return Err(Error::config("PeftSpec", base.len(), "something to train"));
        }
        Ok(Self {
            base: base.into_iter().map(|(n, t)| (n, t.detach())).collect(),
            pairs,
            tuned,
            running,
            enabled: true,
        })
    }

    /// The network's weights as it is to see them, with the graph to the adapters' variables.
    ///
    /// # Errors
    /// Those of candle.
    pub fn weights(&self) -> Result<HashMap<String, Tensor>> {
        let one = |(name, base): (&String, &Tensor)| {
            let tensor = match (self.pairs.get(name), self.tuned.get(name)) {
                _ if !self.enabled => base.clone(),
                (Some(pair), _) => (base + pair.delta(base.dims())?)?,
                (None, Some(var)) => var.as_tensor().clone(),
                (None, None) => match self.running.get(name) {
                    Some(var) => var.as_tensor().clone(),
                    None => base.clone(),
                },
            };
            Ok((name.clone(), tensor))
        };
        self.base.iter().map(one).collect()
    }

    /// A builder that gives a network these weights.
    ///
    /// # Errors
    /// Those of candle.
    pub fn builder(&self) -> Result<VarBuilder<'static>> {
        let weights = self.weights()?;
        let first = self.base.values().next();
        let (dtype, device) = match first {
            Some(tensor) => (tensor.dtype(), tensor.device().clone()),
            None => (DType::F32, candle_core::Device::Cpu),
        };
        Ok(VarBuilder::from_tensors(weights, dtype, &device))
    }

    /// The weights without graph: a network that needs no adapters any more.
    ///
    /// # Errors
    /// Those of candle.
    pub fn merge(&self) -> Result<State> {
        let weights = self.weights()?;
        Ok(weights.into_iter().map(|(n, t)| (n, t.detach())).collect())
    }

    /// What is added to a weight, where it has an adapter.
    ///
    /// # Errors
    /// Those of candle.
    pub fn delta_weight(&self, name: &str) -> Result<Option<Tensor>> {
        let shape = self.base.get(name).map(|t| t.dims());
        match (self.pairs.get(name), shape) {
            (Some(pair), Some(shape)) => pair.delta(shape).map(Some),
            _ => Ok(None),
        }
    }

    /// Whether networks built from now on see the adapters (and their running statistics).
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// The variables to train.
    pub fn vars(&self) -> Vec<Var> {
        let named = self.named();
        named.into_iter().map(|(_, var)| var.clone()).collect()
    }

    fn named(&self) -> Vec<(String, &Var)> {
        let mut all = Vec::new();
        for (name, pair) in &self.pairs {
            all.push((format!("{name}.lora_a"), &pair.a));
            all.push((format!("{name}.lora_b"), &pair.b));
        }
        all.extend(self.tuned.iter().map(|(name, var)| (name.clone(), var)));
        all
    }

    /// The part of the network's numbers that is trained, in units of the network.
    pub fn trainable_fraction(&self) -> f64 {
        let count = |t: &Tensor| t.elem_count() as f64;
        let trained: f64 = self.named().iter().map(|(_, var)| count(var)).sum();
        trained / self.base.values().map(count).sum::<f64>()
    }

    /// Everything that differs from the base: what is trained, and running statistics.
    fn kept(&self) -> Vec<(String, &Var)> {
        let running = self.running.iter().map(|(name, var)| (name.clone(), var));
        self.named().into_iter().chain(running).collect()
    }

    /// The adapters' variables and the running statistics by name, without the network.
    ///
    /// # Errors
    /// Those of candle.
    pub fn state(&self) -> Result<State> {
        let copy = |(name, var): (String, &Var)| Ok((name, var.as_detached_tensor().copy()?));
        self.kept().into_iter().map(copy).collect()
    }

    /// Puts a state back.
    ///
    /// # Errors
    /// A mismatch that lists every difference; then nothing has changed.
    pub fn load_state(&self, state: &State) -> Result<()> {
        let named = self.kept();
        let spec = |(name, var): &(String, &Var)| (name.clone(), var.shape().clone(), var.dtype());
        expect_state(state, named.iter().map(spec))?;
        for (name, var) in named {
            if let Some(tensor) = state.get(&name) {
                var.set(tensor)?;
            }
        }
        Ok(())
    }

    /// Fresh variables with the same values: an expert that starts from another.
    ///
    /// # Errors
    /// Those of candle.
    pub fn fork(&self) -> Result<Self> {
        let copy = |var: &Var| Var::from_tensor(&var.as_detached_tensor().copy()?);
        let pair = |(name, pair): (&String, &Pair)| -> Result<(String, Pair)> {
            let fresh = Pair {
                a: copy(&pair.a)?,
                b: copy(&pair.b)?,
                rank: pair.rank,
                alpha: pair.alpha,
            };
            Ok((name.clone(), fresh))
        };
        let one = |(name, var): (&String, &Var)| -> Result<(String, Var)> {
            Ok((name.clone(), copy(var)?))
        };
        Ok(Self {
            base: self.base.clone(),
            pairs: self.pairs.iter().map(pair).collect::<Result<_>>()?,
            tuned: self.tuned.iter().map(one).collect::<Result<_>>()?,
            running: self.running.iter().map(one).collect::<Result<_>>()?,
            enabled: self.enabled,
        })
    }
}
