//! Data made on the spot, from a seed: problems whose answer is known.
//!
//! | generator | for |
//! | --- | --- |
//! | [`ModularTable`] | grokking: generalisation long after memorisation |
//! | [`MarkovChains`] | language models with a known best loss and changing token statistics |

mod markov;
mod modular;

pub use markov::{ChainChoice, MarkovChains};
pub use modular::{ModularOp, ModularTable};
