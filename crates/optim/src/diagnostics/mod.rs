//! Diagnostics of networks and of their training, from per-example losses and gradients that
//! closures give: they attach to anybody's model and return data.
//!
//! | module | question |
//! | --- | --- |
//! | [`gradsign`] | which of these untrained architectures will train best? |
//! | [`opposing`] | which examples make the loss oscillate, and is training at the edge of stability? |

pub mod gradsign;
pub mod opposing;
