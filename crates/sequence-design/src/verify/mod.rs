//! Checks against reference files, one function per method.
//!
//! Each runs this crate on the file's inputs with the file's hyper-parameters and compares with
//! the file's outputs. Cases, counts and shapes are discovered in the file.

mod bib;
mod drakes;
mod op_gfn;
mod svdd;

pub use bib::bib;
pub use drakes::drakes;
pub use op_gfn::op_gfn;
pub use svdd::svdd;
