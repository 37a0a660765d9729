//! The gradients of one step on their way to the parameters.

use crate::Result;
use candle_core::backprop::GradStore;
use candle_core::{Tensor, Var};
use std::borrow::Cow;
use tensor_core::kernels::{self, GradMap, Moments};

/// One parameter's gradient: a tensor, and a map that the fused step applies in registers.
#[derive(Debug, Clone)]
struct Gradient<'a> {
    tensor: Cow<'a, Tensor>,
    map: GradMap,
}

/// The gradients of one step, as [`transforms`](crate::transform) hand them on.
///
/// Each is a tensor and a [`GradMap`]. A transform that scales, clips or projects changes the
/// map's few scalars; only a transform that the map cannot express replaces the tensor.
#[derive(Debug)]
pub struct Gradients<'a> {
    params: &'a [(String, Var)],
    entries: Vec<Option<Gradient<'a>>>,
}

impl<'a> Gradients<'a> {
    /// The gradients of named parameters, borrowed from `store`; parameters without one are kept
    /// as absent.
    pub fn collect(params: &'a [(String, Var)], store: &'a GradStore) -> Self {
        let entry = |(_, var): &(String, Var)| {
            store.get(var).map(|tensor| Gradient {
                tensor: Cow::Borrowed(tensor),
                map: GradMap::default(),
            })
        };
        Self {
            params,
            entries: params.iter().map(entry).collect(),
        }
    }

    /// Number of parameters, with or without gradient.
    pub fn len(&self) -> usize {
        self.params.len()
    }

    /// Whether there are no parameters.
    pub fn is_empty(&self) -> bool {
        self.params.is_empty()
    }

    /// Name of parameter `i`.
    pub fn name(&self, i: usize) -> &'a str {
        &self.params[i].0
    }

    /// Parameter `i`.
    pub fn var(&self, i: usize) -> &'a Var {
        &self.params[i].1
    }

    /// Gradient `i` before its map, and the map.
    pub fn get(&self, i: usize) -> Option<(&Tensor, GradMap)> {
        self.entries[i]
            .as_ref()
            .map(|entry| (entry.tensor.as_ref(), entry.map))
    }

    /// The gradient of `var`, looked for at place `hint` first.
    pub fn find(&self, hint: usize, var: &Var) -> Option<(&Tensor, GradMap)> {
        let is_it = |i: &usize| self.params.get(*i).is_some_and(|p| p.1.id() == var.id());
        let place = Some(hint)
            .filter(is_it)
            .or_else(|| (0..self.len()).find(is_it))?;
        self.get(place)
    }

    /// Sets the map of gradient `i`; nothing happens where there is none.
    pub fn set_map(&mut self, i: usize, map: GradMap) {
        if let Some(entry) = &mut self.entries[i] {
            entry.map = map;
        }
    }

    /// Scales gradient `i` by `factor`.
    pub fn scale(&mut self, i: usize, factor: f64) {
        if let Some(entry) = &mut self.entries[i] {
            entry.map = entry.map.then_scale(factor);
        }
    }

    /// Replaces gradient `i` by a tensor without a map.
    pub fn replace(&mut self, i: usize, tensor: Tensor) {
        self.entries[i] = Some(Gradient {
            tensor: Cow::Owned(tensor),
            map: GradMap::default(),
        });
    }

    /// Gradient `i` with its map applied, as a tensor without history.
    ///
    /// # Errors
    /// Those of candle.
    pub fn materialized(&self, i: usize) -> Result<Option<Tensor>> {
        let Some((tensor, map)) = self.get(i) else {
            return Ok(None);
        };
        let tensor = tensor.detach();
        if map.is_identity() {
            return Ok(Some(tensor));
        }
        Ok(Some(map.apply(&tensor, self.var(i))?))
    }

    /// All gradients with their maps applied, for optimizers that know nothing of maps.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_store(&self) -> Result<GradStore> {
        let mut store = GradStore::default();
        for i in 0..self.len() {
            if let Some(tensor) = self.materialized(i)? {
                store.insert(self.var(i), tensor);
            }
        }
        Ok(store)
    }

    /// Sums over each mapped gradient and its parameter, in one pass over memory; zeros where
    /// there is no gradient. Includes entries that are not finite.
    ///
    /// # Errors
    /// Those of [`kernels::moments`].
    pub fn moments(&self) -> Result<Vec<Moments>> {
        self.sums(true)
    }

    /// [`moments`](Self::moments) without the parameter's part (`pp` and `pg` are 0), which
    /// saves reading the parameters where no map needs them.
    ///
    /// # Errors
    /// Those of [`kernels::moments`].
    pub fn squares(&self) -> Result<Vec<Moments>> {
        self.sums(false)
    }

    fn sums(&self, with_params: bool) -> Result<Vec<Moments>> {
        let mut items = Vec::with_capacity(self.len());
        for (i, entry) in self.entries.iter().enumerate() {
            if let Some(entry) = entry {
                let param =
                    (with_params || entry.map.along != 0.0).then(|| self.var(i).as_tensor());
                items.push((param, entry.tensor.as_ref(), entry.map));
            }
        }
        let mut found = kernels::moments(&items)?.into_iter();
        let mut all = Vec::with_capacity(self.len());
        for entry in &self.entries {
            all.push(
                entry
                    .as_ref()
                    .and_then(|_| found.next())
                    .unwrap_or_default(),
            );
        }
        Ok(all)
    }

    /// [`moments`](Self::moments) over the finite entries only: entries that are NaN or infinite
    /// count as zero in the sums, and are counted.
    ///
    /// # Errors
    /// Those of [`kernels::moments`].
    pub fn finite_moments(&self) -> Result<Vec<Moments>> {
        self.only_finite(self.moments()?, true)
    }

    /// [`squares`](Self::squares) over the finite entries only.
    ///
    /// # Errors
    /// Those of [`kernels::moments`].
    pub fn finite_squares(&self) -> Result<Vec<Moments>> {
        self.only_finite(self.squares()?, false)
    }

    /// Recomputes the sums of the tensors that hold something that is not finite.
    fn only_finite(&self, mut all: Vec<Moments>, with_params: bool) -> Result<Vec<Moments>> {
        for (i, moments) in all.iter_mut().enumerate() {
            if moments.nonfinite == 0 {
                continue;
            }
            if let Some(tensor) = self.materialized(i)? {
                let cleaned = finite_or_zero(&tensor)?;
                let param = with_params.then(|| self.var(i).as_tensor());
                let sums = kernels::moments(&[(param, &cleaned, GradMap::default())])?;
                let nonfinite = moments.nonfinite;
                *moments = Moments {
                    nonfinite,
                    ..sums.first().copied().unwrap_or_default()
                };
            }
        }
        Ok(all)
    }

    /// Names of the parameters whose gradient holds NaN or infinity, with the number of entries.
    ///
    /// # Errors
    /// Those of [`kernels::moments`].
    pub fn nonfinite(&self) -> Result<Vec<(&'a str, u64)>> {
        let all = self.squares()?;
        let mut found = Vec::new();
        for (i, moments) in all.iter().enumerate() {
            if moments.nonfinite > 0 {
                found.push((self.name(i), moments.nonfinite));
            }
        }
        Ok(found)
    }
}

/// The tensor with every entry that is NaN or infinite replaced by 0.
///
/// # Errors
/// Those of candle.
pub fn finite_or_zero(tensor: &Tensor) -> Result<Tensor> {
    // 0 x is 0 for finite x and NaN otherwise, and NaN differs from itself.
    let residue = tensor.affine(0.0, 0.0)?;
    let finite = residue.eq(&residue)?;
    Ok(finite.where_cond(tensor, &tensor.zeros_like()?)?)
}

/// The norm of all gradients that `store` holds for these parameters, together.
///
/// # Errors
/// Those of [`kernels::moments`].
pub fn global_norm(params: &[(String, Var)], store: &GradStore) -> Result<f64> {
    let all = Gradients::collect(params, store).squares()?;
    Ok(all.iter().map(|m| m.gg).sum::<f64>().sqrt())
}
