//! What a GFlowNet learns: logits of the actions, and beside them whatever its loss needs.

use crate::error::check;
use crate::{Error, Result};
use candle_core::{DType, Device, Module, Tensor};
use candle_nn::{Init, VarBuilder};
use nn::activation::Activation;
use nn::linear::{linear, Linear};

/// A network's outputs for `n` states, `A` actions with stop.
#[derive(Debug, Clone)]
pub struct Heads {
    /// Logits of the actions `[n, A]`; for flow matching these are the logarithms of the edge
    /// flows.
    pub forward: Tensor,
    /// Logits of the steps back `[n, A - 1]`; `None` makes `P_B` uniform over the parents.
    pub backward: Option<Tensor>,
    /// Logarithm of the state's flow `[n]`, for the losses that need it.
    pub log_flow: Option<Tensor>,
}

/// Any network of the caller's: one row of features (followed by the context numbers of the
/// trajectory, where there are any) a state.
pub trait PolicyNet {
    /// The outputs for `features` `[n, width]`.
    ///
    /// # Errors
    /// The network's own.
    fn heads(&self, features: &Tensor) -> Result<Heads>;

    /// The logarithm of the partition function, a scalar, for trajectory balance; where there is
    /// none it takes the flow of the root.
    fn log_z(&self) -> Option<&Tensor>;

    /// Dtype and device of the features.
    fn place(&self) -> (DType, Device);
}

/// Widths and heads of a [`Policy`].
#[derive(Debug, Clone, PartialEq)]
pub struct PolicyConfig {
    /// Widths of the hidden layers; none makes the policy linear in the features (tabular, where
    /// the features are one-hot states).
    pub hidden: Vec<usize>,
    /// What follows each hidden layer.
    pub activation: Activation,
    /// A learned `P_B` instead of the uniform one.
    pub backward: bool,
    /// A head for the state flow.
    pub flow: bool,
    /// The initial logarithm of the partition function. `None` takes the flow of the root in its
    /// place: for conditional policies, whose partition function depends on the context.
    pub log_z: Option<f64>,
    /// Logits are clipped to this range on both sides of 0, so that no probability vanishes
    /// beyond recovery.
    pub clip: f64,
}

impl Default for PolicyConfig {
    fn default() -> Self {
        Self {
            hidden: vec![128, 128],
            activation: Activation::LeakyRelu(0.01),
            backward: false,
            flow: false,
            log_z: Some(0.0),
            clip: 50.0,
        }
    }
}

impl PolicyConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        let holds = self.hidden.iter().all(|w| *w > 0);
        check::require(holds, "PolicyConfig::hidden", &self.hidden, "widths >= 1")?;
        let holds = self.log_z.is_none_or(f64::is_finite);
        check::require(holds, "PolicyConfig::log_z", self.log_z, "a finite number")?;
        check::positive("PolicyConfig::clip", self.clip)
    }
}

/// A perceptron with one output layer for all heads.
#[derive(Debug, Clone)]
pub struct Policy {
    trunk: Vec<Linear>,
    output: Linear,
    log_z: Option<Tensor>,
    place: (DType, Device),
    actions: usize,
    config: PolicyConfig,
}

impl Policy {
    /// A policy for `features` numbers a state (contexts included) and `actions` actions.
    /// Variables: `trunk.K.*`, `heads.*` and the scalar `log_z`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; those of candle.
    pub fn new(
        features: usize,
        actions: usize,
        config: &PolicyConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        config.validate()?;
        check::at_least("Policy::features", features, 1)?;
        check::at_least("Policy::actions", actions, 2)?;
        let mut trunk = vec![];
        let mut width = features;
        for (k, next) in config.hidden.iter().enumerate() {
            let layer = linear(width, *next, vb.pp("trunk").pp(k))?;
            trunk.push(layer.with_activation(config.activation));
            width = *next;
        }
        let outputs =
            actions + if config.backward { actions - 1 } else { 0 } + usize::from(config.flow);
        let log_z = |value| vb.get_with_hints((), "log_z", Init::Const(value));
        let log_z = config.log_z.map(log_z).transpose()?;
        Ok(Self {
            trunk,
            output: linear(width, outputs, vb.pp("heads"))?,
            log_z,
            place: (vb.dtype(), vb.device().clone()),
            actions,
            config: config.clone(),
        })
    }
}

impl PolicyNet for Policy {
    fn heads(&self, features: &Tensor) -> Result<Heads> {
        let mut x = features.clone();
        for layer in &self.trunk {
            x = layer.forward(&x)?;
        }
        let out = self.output.forward(&x)?;
        let clip = self.config.clip;
        let logits = |start, count| -> Result<Tensor> {
            Ok(out.narrow(1, start, count)?.clamp(-clip, clip)?)
        };
        let mut at = self.actions;
        let backward = match self.config.backward {
            true => {
                at += self.actions - 1;
                Some(logits(self.actions, self.actions - 1)?)
            }
            false => None,
        };
        let log_flow = match self.config.flow {
            true => Some(out.narrow(1, at, 1)?.squeeze(1)?),
            false => None,
        };
        Ok(Heads {
            forward: logits(0, self.actions)?,
            backward,
            log_flow,
        })
    }

    fn log_z(&self) -> Option<&Tensor> {
        self.log_z.as_ref()
    }

    fn place(&self) -> (DType, Device) {
        self.place.clone()
    }
}

impl<P: PolicyNet + ?Sized> PolicyNet for &P {
    fn heads(&self, features: &Tensor) -> Result<Heads> {
        (**self).heads(features)
    }

    fn log_z(&self) -> Option<&Tensor> {
        (**self).log_z()
    }

    fn place(&self) -> (DType, Device) {
        (**self).place()
    }
}

/// The outputs for a list of states, with their number of actions checked.
pub(super) fn heads_of<E: super::Environment>(
    env: &E,
    policy: &impl PolicyNet,
    states: &[E::State],
    context: impl Fn(usize) -> Vec<f32>,
) -> Result<Heads> {
    let width = env.feature_width();
    let extra = if states.is_empty() {
        0
    } else {
        context(0).len()
    };
    let mut features = vec![0f32; states.len() * (width + extra)];
    for (k, (state, out)) in states
        .iter()
        .zip(features.chunks_mut(width + extra))
        .enumerate()
    {
        env.write_features(state, &mut out[..width]);
        if extra > 0 {
            out[width..].copy_from_slice(&context(k));
        }
    }
    let (dtype, device) = policy.place();
    let shape = (states.len(), width + extra);
    let features = Tensor::from_vec(features, shape, &device)?.to_dtype(dtype)?;
    let heads = policy.heads(&features)?;
    let (n, a) = (states.len(), env.actions());
    let fits = |t: &Tensor, dims: &[usize], what| match t.dims() == dims {
        true => Ok(()),
        false => Err(Error::shape(what, t.dims(), format!("{dims:?}"))),
    };
    fits(&heads.forward, &[n, a], "the forward head")?;
    if let Some(backward) = &heads.backward {
        fits(backward, &[n, a - 1], "the backward head")?;
    }
    if let Some(flow) = &heads.log_flow {
        fits(flow, &[n], "the flow head")?;
    }
    Ok(heads)
}
