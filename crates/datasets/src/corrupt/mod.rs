//! Data made worse on purpose: test images from a shifted world, wrong labels, rare classes.
//!
//! | item | for |
//! | --- | --- |
//! | [`Shift`] | domain generalization: noise, contrast, inversion, rotation, blur, missing pixels |
//! | [`LabelNoise`] | learning from labels that are partly wrong |
//! | [`LongTail`] | classes with very different numbers of examples |

mod label_noise;
mod long_tail;
mod shift;

pub use label_noise::{LabelNoise, NoisyLabels};
pub use long_tail::{LongTail, TailShape};
pub use shift::Shift;
