//! Data made on the spot, from a seed: problems whose answer is known.
//!
//! | generator | for |
//! | --- | --- |
//! | [`GaussianMixture`] | clusters in any dimension; densities for samplers |
//! | [`two_moons`], [`spirals`] | the smallest problems that need a nonlinear model |
//! | [`linear_regression`], [`logistic_regression`] | optimizers on a chosen conditioning |
//! | [`ModularTable`] | grokking: generalisation long after memorisation |
//! | [`SparseParity`] | features that no gradient points to at the start |
//! | [`MarkovChains`] | language models with a known best loss and changing token statistics |
//! | [`binding_table`] | sequence design: scores of all DNA 8-mers, as a binding microarray has them |

pub mod binding;
mod conditioned;
mod curves;
mod markov;
mod mixture;
mod modular;
mod parity;

pub use binding::binding_table;
pub use conditioned::{
    linear_regression, logistic_regression, Conditioned, ConditionedConfig, Spectrum,
};
pub use curves::{spirals, two_moons};
pub use markov::{ChainChoice, MarkovChains};
pub use mixture::GaussianMixture;
pub use modular::{ModularOp, ModularTable};
pub use parity::{BitEncoding, SparseParity};
