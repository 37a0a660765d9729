//! Checks against reference files; each adaptor reads inputs, shapes and hyper-parameters from the
//! file.

mod cgs;
mod forward_gnn;
mod graph_core;
mod graphfm;
mod pot;
mod w2pgnn;

pub use cgs::cgs;
pub use forward_gnn::forward_gnn;
pub use graph_core::graph_core;
pub use graphfm::graphfm;
pub use pot::pot;
pub use w2pgnn::w2pgnn;

use crate::{Graph, Result};
use candle_core::{DType, Device, Tensor, Var};
use candle_nn::VarBuilder;
use std::collections::HashMap;
use tensor_core::verify::{Reference, Tolerance};

/// A tensor of the file as f64.
pub(crate) fn tensor(reference: &mut Reference, name: &str) -> Result<Tensor> {
    Ok(reference.input(name)?.tensor(DType::F64)?)
}

/// A tensor of the file as a variable.
pub(crate) fn var(reference: &mut Reference, name: &str) -> Result<Var> {
    Ok(Var::from_tensor(&tensor(reference, name)?)?)
}

/// Indices of the file.
pub(crate) fn indices(reference: &mut Reference, name: &str) -> Result<Vec<u32>> {
    Ok(reference.input(name)?.indices()?)
}

/// The graph of `n` nodes with a list `[2, E]` of the file.
pub(crate) fn edge_list(reference: &mut Reference, name: &str, n: usize) -> Result<Graph> {
    let ends = indices(reference, name)?;
    let (src, dst) = ends.split_at(ends.len() / 2);
    Graph::from_edges(n, src.to_vec(), dst.to_vec())
}

/// Variables by the names that layers ask for.
#[derive(Default)]
pub(crate) struct Weights(pub HashMap<String, Var>);

impl Weights {
    pub(crate) fn builder(&self) -> VarBuilder<'static> {
        let tensors = self.0.iter();
        let tensors = tensors.map(|(k, v)| (k.clone(), v.as_tensor().clone()));
        VarBuilder::from_tensors(tensors.collect(), DType::F64, &Device::Cpu)
    }

    /// Reads `PREFIX_NAME` for every name (with dots as underscores) that the file has.
    pub(crate) fn read(reference: &mut Reference, prefix: &str, names: &[&str]) -> Result<Self> {
        let mut vars = HashMap::new();
        for name in names {
            let key = format!("{prefix}_{}", name.replace('.', "_"));
            if reference.has(&key) {
                vars.insert(name.to_string(), var(reference, &key)?);
            }
        }
        Ok(Self(vars))
    }
}

/// The gradients of `vars` compared with the tensors of the given names.
pub(crate) fn compare_gradients(
    reference: &mut Reference,
    loss: &Tensor,
    vars: &[(String, &Var)],
    tolerance: Tolerance,
) -> Result<()> {
    let store = loss.backward()?;
    for (name, var) in vars {
        match store.get(var) {
            Some(grad) => reference.compare_tensor(name, grad, tolerance)?,
            None => reference.compare_tensor(name, &var.zeros_like()?, tolerance)?,
        }
    }
    Ok(())
}
