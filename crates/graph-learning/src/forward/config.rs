//! Settings of all forward-learning models.

use crate::{Error, Result};

/// The convolution of every layer.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub enum ConvKind {
    /// [`GcnConv`](crate::conv::GcnConv).
    #[default]
    Gcn,
    /// [`SageConv`](crate::conv::SageConv), means.
    Sage,
    /// [`GatConv`](crate::conv::GatConv), heads side by side.
    Gat {
        /// Number of heads; 4 as published. It must divide the width.
        heads: usize,
        /// Slope of the leaky ReLU below 0; 0.2 as published.
        negative_slope: f64,
    },
}

/// Where the label columns are appended to features (one-hot for labeled nodes, uniform for others).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AppendLabel {
    /// Nowhere: virtual nodes alone carry the labels, as in the published runs.
    #[default]
    None,
    /// To the input of the first layer.
    Input,
    /// To the input of every layer.
    All,
}

/// Which edges tie a labeled node to its class's virtual node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AugDirection {
    /// Both directions.
    #[default]
    Both,
    /// From the node to the virtual node.
    ToVirtual,
}

/// Settings of forward learning.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ForwardGnnConfig {
    /// The convolution.
    pub conv: ConvKind,
    /// Width of each layer's output.
    pub hidden: usize,
    /// Number of layers.
    pub layers: usize,
    /// Learning rate of the default optimizer.
    pub lr: f64,
    /// L2 penalty of the default optimizer, in the gradient.
    pub weight_decay: f64,
    /// Epochs of each layer; time steps in all for the top-down models.
    pub epochs: usize,
    /// Epochs between two looks at the validation nodes; there is none after the first epoch.
    pub val_every: usize,
    /// Looks without strict improvement before a layer is done; 0 for never, then the last weights
    /// stay and validation nodes are not looked at.
    pub patience: usize,
    /// Temperature `T` of the similarities to virtual nodes.
    pub temperature: f64,
    /// Threshold `theta` of the goodness.
    pub theta: f64,
    /// Negative graphs, at most the number of classes minus 1.
    pub num_negatives: usize,
    /// Where label columns go.
    pub append_label: AppendLabel,
    /// Edges to and from virtual nodes.
    pub edge_direction: AugDirection,
    /// Updates without learning before a top-down model answers.
    pub inference_steps: usize,
    /// The first of these updates, counted from 0, whose outputs are summed.
    pub read_out_from: usize,
    /// Largest norm of a layer's gradient, for the model with top-down loss.
    pub grad_clip: f64,
    /// Compute what does not change while a layer trains (the propagated features of a GCN or
    /// GraphSAGE layer) once.
    pub cache: bool,
}

impl Default for ForwardGnnConfig {
    fn default() -> Self {
        Self {
            conv: ConvKind::Gcn,
            hidden: 128,
            layers: 2,
            lr: 1e-3,
            weight_decay: 5e-4,
            epochs: 1000,
            val_every: 2,
            patience: 100,
            temperature: 1.0,
            theta: 2.0,
            num_negatives: 100,
            append_label: AppendLabel::None,
            edge_direction: AugDirection::Both,
            inference_steps: 10,
            read_out_from: 2,
            grad_clip: 1.0,
            cache: true,
        }
    }
}

impl ForwardGnnConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in [
            ("ForwardGnnConfig::hidden", self.hidden),
            ("ForwardGnnConfig::layers", self.layers),
            ("ForwardGnnConfig::epochs", self.epochs),
            ("ForwardGnnConfig::val_every", self.val_every),
            ("ForwardGnnConfig::num_negatives", self.num_negatives),
        ] {
            if value == 0 {
                return Err(Error::config(field, value, "at least 1"));
            }
        }
        for (field, value) in [
            ("ForwardGnnConfig::lr", self.lr),
            ("ForwardGnnConfig::temperature", self.temperature),
            ("ForwardGnnConfig::grad_clip", self.grad_clip),
        ] {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::config(field, value, "a positive number"));
            }
        }
        for (field, value) in [
            ("ForwardGnnConfig::weight_decay", self.weight_decay),
            ("ForwardGnnConfig::theta", self.theta),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(Error::config(field, value, "a number >= 0"));
            }
        }
        if let ConvKind::Gat {
            heads,
            negative_slope,
        } = self.conv
        {
            if heads == 0 || !self.hidden.is_multiple_of(heads) {
                let expected = format!("a divisor of the width {}", self.hidden);
                return Err(Error::config("ConvKind::Gat::heads", heads, expected));
            }
            if !negative_slope.is_finite() {
                let field = "ConvKind::Gat::negative_slope";
                return Err(Error::config(field, negative_slope, "a finite number"));
            }
        }
        if self.read_out_from >= self.inference_steps {
            return Err(Error::config(
                "ForwardGnnConfig::read_out_from",
                self.read_out_from,
                format!("below the {} inference steps", self.inference_steps),
            ));
        }
        Ok(())
    }
}
