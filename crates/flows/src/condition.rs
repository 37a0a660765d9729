//! What a sample is conditioned on.

use crate::error::{Error, Result};
use crate::prediction::select_rows;
use candle_core::Tensor;
use std::collections::BTreeMap;

/// The condition of a batch.
#[derive(Debug, Clone, Default)]
pub enum Condition {
    /// None: an unconditional model, or a model's own idea of "no condition".
    #[default]
    Null,
    /// One class per row, `u32 [rows]`. The null class of a class-conditional model is usually one
    /// more index, the number of classes.
    Class(Tensor),
    /// One embedding per row, `[rows, ...]`.
    Embedding(Tensor),
    /// Several tensors by name, each `[rows, ...]`.
    Many(BTreeMap<String, Tensor>),
}

impl Condition {
    /// Classes of the rows.
    ///
    /// # Errors
    /// Those of candle.
    pub fn classes(classes: &[u32], device: &candle_core::Device) -> Result<Self> {
        Ok(Self::Class(Tensor::from_slice(
            classes,
            classes.len(),
            device,
        )?))
    }

    fn tensors(&self) -> Vec<(&str, &Tensor)> {
        match self {
            Self::Null => Vec::new(),
            Self::Class(t) => vec![("the classes", t)],
            Self::Embedding(t) => vec![("the embedding", t)],
            Self::Many(map) => map.iter().map(|(k, t)| (k.as_str(), t)).collect(),
        }
    }

    fn map(&self, mut f: impl FnMut(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(match self {
            Self::Null => Self::Null,
            Self::Class(t) => Self::Class(f(t)?),
            Self::Embedding(t) => Self::Embedding(f(t)?),
            Self::Many(map) => {
                let one = |(k, t): (&String, &Tensor)| Ok((k.clone(), f(t)?));
                Self::Many(map.iter().map(one).collect::<Result<_>>()?)
            }
        })
    }

    /// Checks that every tensor has `rows` rows, and repeats those with a single one.
    ///
    /// # Errors
    /// [`Error::Shape`] naming a tensor with another number of rows.
    pub fn for_rows(&self, rows: usize) -> Result<Self> {
        for (name, tensor) in self.tensors() {
            match tensor.dims().first() {
                Some(&n) if n == rows || n == 1 => {}
                _ => {
                    let expected = format!("{rows} rows, or one for all");
                    return Err(Error::shape(name, tensor.dims(), expected));
                }
            }
        }
        self.map(|t| match t.dims()[0] == rows {
            true => Ok(t.clone()),
            false => {
                let mut shape = t.dims().to_vec();
                shape[0] = rows;
                Ok(t.broadcast_as(shape)?.contiguous()?)
            }
        })
    }

    /// These rows only.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] when there is no such row.
    pub fn take_rows(&self, rows: &[u32]) -> Result<Self> {
        self.map(|t| select_rows(t, rows))
    }

    /// Conditions one after the other along the rows; `None` when they are of different kinds, so
    /// that they cannot share a network call.
    ///
    /// # Errors
    /// Those of candle when shapes differ beyond the rows.
    pub fn concat(parts: &[&Condition]) -> Result<Option<Self>> {
        let cat = |tensors: &[&Tensor]| -> Result<Tensor> { Ok(Tensor::cat(tensors, 0)?) };
        let Some(first) = parts.first() else {
            return Ok(Some(Self::Null));
        };
        let (mut single, mut many) = (Vec::new(), Vec::new());
        for part in parts {
            match (first, part) {
                (Self::Null, Self::Null) => {}
                (Self::Class(_), Self::Class(t)) | (Self::Embedding(_), Self::Embedding(t)) => {
                    single.push(t);
                }
                (Self::Many(a), Self::Many(b)) if a.keys().eq(b.keys()) => many.push(b),
                _ => return Ok(None),
            }
        }
        Ok(Some(match first {
            Self::Null => Self::Null,
            Self::Class(_) => Self::Class(cat(&single)?),
            Self::Embedding(_) => Self::Embedding(cat(&single)?),
            Self::Many(map) => {
                let mut joined = BTreeMap::new();
                for key in map.keys() {
                    let tensors: Vec<&Tensor> = many.iter().filter_map(|m| m.get(key)).collect();
                    joined.insert(key.clone(), cat(&tensors)?);
                }
                Self::Many(joined)
            }
        }))
    }

    /// Whether both are the same tensors (not merely equal ones), or both null.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let (a, b) = (self.tensors(), other.tensors());
        std::mem::discriminant(self) == std::mem::discriminant(other)
            && a.len() == b.len()
            && a.iter()
                .zip(&b)
                .all(|(x, y)| x.0 == y.0 && x.1.id() == y.1.id())
    }
}
