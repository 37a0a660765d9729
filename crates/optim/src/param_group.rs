//! Parameters with names and hyper-parameters of their own.

use crate::{Error, Result};
use candle_core::Var;
use candle_nn::VarMap;
use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, PoisonError};

/// Parameters that share hyper-parameters. One type serves all optimizers; `C` is what an
/// optimizer lets vary between groups (its whole configuration for most).
///
/// The learning rates of all groups move together: `set_learning_rate(lr)` gives the first group
/// `lr` and keeps the ratios of the others to it.
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use thalweg_optim::adamw::{AdamW, AdamWConfig};
/// use thalweg_optim::{ParamGroup, StepWith};
///
/// let body = Var::zeros((4, 4), DType::F32, &Device::Cpu)?;
/// let head = Var::zeros(4, DType::F32, &Device::Cpu)?;
/// let base = AdamWConfig::default();
/// let optimizer = AdamW::with_groups(vec![
///     ParamGroup::named([("body".to_string(), body)], base.clone()),
///     ParamGroup::named([("head".to_string(), head)], AdamWConfig { lr: 1e-2, weight_decay: 0.0, ..base }),
/// ])?;
/// # assert_eq!(optimizer.params()[1].0, "head");
/// # Ok::<(), thalweg_optim::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct ParamGroup<C> {
    /// Names and variables. An empty name stands for the parameter's position among all groups.
    pub params: Vec<(String, Var)>,
    /// The group's hyper-parameters.
    pub config: C,
}

impl<C> ParamGroup<C> {
    /// Parameters without names: they are called `0`, `1`, ... by their position.
    pub fn new(vars: Vec<Var>, config: C) -> Self {
        let params = vars.into_iter().map(|var| (String::new(), var)).collect();
        Self { params, config }
    }

    /// Named parameters in the given order.
    pub fn named(params: impl IntoIterator<Item = (String, Var)>, config: C) -> Self {
        Self {
            params: params.into_iter().collect(),
            config,
        }
    }

    /// All variables of a map, sorted by name.
    pub fn from_varmap(vars: &VarMap, config: C) -> Self {
        Self {
            params: named(vars),
            config,
        }
    }
}

/// All variables of a map, sorted by name: the order does not depend on the hash map inside.
pub fn named(vars: &VarMap) -> Vec<(String, Var)> {
    let data = vars.data().lock().unwrap_or_else(PoisonError::into_inner);
    let mut params: Vec<_> = data.iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    params.sort_by(|a, b| a.0.cmp(&b.0));
    params
}

/// Variables named by their position.
pub(crate) fn numbered(vars: Vec<Var>) -> Vec<(String, Var)> {
    let vars = vars.into_iter().enumerate();
    vars.map(|(i, var)| (i.to_string(), var)).collect()
}

/// Parameters of all groups in order with their names filled in, the group of each, and the
/// groups' configurations.
pub(crate) type Flattened<C> = (Vec<(String, Var)>, Vec<usize>, Vec<C>);

/// Joins groups into one list.
///
/// # Errors
/// [`Error::DuplicateParameter`] for a name or a variable that occurs twice.
pub(crate) fn flatten<C>(groups: Vec<ParamGroup<C>>) -> Result<Flattened<C>> {
    let (mut params, mut group_of, mut configs) = (Vec::new(), Vec::new(), Vec::new());
    let (mut names, mut ids) = (HashSet::new(), HashSet::new());
    for (g, group) in groups.into_iter().enumerate() {
        for (name, var) in group.params {
            let name = if name.is_empty() {
                params.len().to_string()
            } else {
                name
            };
            if !ids.insert(var.id()) || !names.insert(name.clone()) {
                return Err(Error::DuplicateParameter(name));
            }
            params.push((name, var));
            group_of.push(g);
        }
        configs.push(group.config);
    }
    Ok((params, group_of, configs))
}

/// What all groups must have in common; the default without a group.
///
/// # Errors
/// [`Error::InvalidConfig`] where a group differs from the first one.
pub(crate) fn shared<T: Default + PartialEq + fmt::Debug>(
    field: &'static str,
    mut values: impl Iterator<Item = T>,
) -> Result<T> {
    let Some(first) = values.next() else {
        return Ok(T::default());
    };
    match values.find(|value| *value != first) {
        Some(other) => {
            let expected = format!("{first:?} in every group, as in the first");
            Err(Error::config(field, format!("{other:?}"), expected))
        }
        None => Ok(first),
    }
}

/// A predicate on a parameter's name and value.
pub type ParamPredicate = Arc<dyn Fn(&str, &Var) -> bool + Send + Sync>;

/// Which parameters something applies to.
#[derive(Clone, Default)]
pub enum ParamFilter {
    /// All of them.
    #[default]
    All,
    /// Those with at least two dimensions: matrices and convolutions, not biases and norms.
    NoOneDimensional,
    /// Those whose name contains none of these.
    ExceptNames(Vec<String>),
    /// Those whose name contains one of these.
    Names(Vec<String>),
    /// Those for which the predicate holds.
    Predicate(ParamPredicate),
}

/// Which parameters are decayed.
pub type DecayMask = ParamFilter;

impl ParamFilter {
    /// Whether the filter lets the parameter through.
    pub fn admits(&self, name: &str, var: &Var) -> bool {
        let in_name = |parts: &[String]| parts.iter().any(|part| name.contains(part.as_str()));
        match self {
            Self::All => true,
            Self::NoOneDimensional => var.rank() >= 2,
            Self::ExceptNames(parts) => !in_name(parts),
            Self::Names(parts) => in_name(parts),
            Self::Predicate(predicate) => predicate(name, var),
        }
    }
}

impl fmt::Debug for ParamFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::All => f.write_str("All"),
            Self::NoOneDimensional => f.write_str("NoOneDimensional"),
            Self::ExceptNames(parts) => f.debug_tuple("ExceptNames").field(parts).finish(),
            Self::Names(parts) => f.debug_tuple("Names").field(parts).finish(),
            Self::Predicate(_) => f.write_str("Predicate(..)"),
        }
    }
}
