//! Environments that come with the crate.

mod collection;
mod fragment;
mod grid;
mod sequence;

pub use collection::{BagOfItems, NasCell};
pub use fragment::{Fragment, FragmentGraph, FragmentNode, FragmentTree};
pub use grid::{HyperGrid, TestFunction};
pub use sequence::{AppendSequence, PrependAppend, SequenceEdit, TabularLandscape};
