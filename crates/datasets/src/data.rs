//! What every data set of this crate is: inputs and labels (or targets), as candle tensors.

use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};

/// Examples that a batch iterator can draw from: rows of inputs with one answer each.
///
/// Implemented for [`Classification`], [`Regression`] and plain pairs `(inputs, answers)`, so that
/// one's own tensors need no wrapping.
pub trait Examples {
    /// Inputs and answers; both have the examples along dimension 0.
    fn tensors(&self) -> (&Tensor, &Tensor);

    /// How many examples there are.
    ///
    /// # Errors
    /// [`Error::BadTensor`] for a scalar, [`Error::LengthMismatch`] when the two disagree.
    fn count(&self) -> Result<usize> {
        let (inputs, answers) = self.tensors();
        let (n, m) = (rows("inputs", inputs)?, rows("labels", answers)?);
        if n != m {
            return Err(Error::LengthMismatch {
                inputs: n,
                labels: m,
            });
        }
        Ok(n)
    }

    /// The examples at `indices`, in that order, on the data's device.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an index that is not there.
    fn gather(&self, indices: &[u32]) -> Result<(Tensor, Tensor)> {
        let (inputs, answers) = self.tensors();
        let n = self.count()?;
        Ok((gather(inputs, indices, n)?, gather(answers, indices, n)?))
    }
}

impl Examples for (Tensor, Tensor) {
    fn tensors(&self) -> (&Tensor, &Tensor) {
        (&self.0, &self.1)
    }
}

impl Examples for (&Tensor, &Tensor) {
    fn tensors(&self) -> (&Tensor, &Tensor) {
        (self.0, self.1)
    }
}

fn rows(name: &'static str, tensor: &Tensor) -> Result<usize> {
    let first = tensor.dims().first().copied();
    first.ok_or_else(|| Error::tensor(name, tensor, "examples along dimension 0"))
}

fn gather(tensor: &Tensor, indices: &[u32], n: usize) -> Result<Tensor> {
    if let Some(bad) = indices.iter().find(|i| **i as usize >= n) {
        return Err(Error::invalid("index", bad, format!("less than {n}")));
    }
    // candle's index_select wants at least one index.
    if indices.is_empty() {
        return Ok(tensor.narrow(0, 0, 0)?);
    }
    let index = Tensor::from_slice(indices, indices.len(), tensor.device())?;
    Ok(tensor.contiguous()?.index_select(&index, 0)?)
}

/// Examples with a class each.
#[derive(Debug, Clone)]
pub struct Classification {
    /// `[n, ...]`.
    pub inputs: Tensor,
    /// `u32 [n]`, each less than `classes`.
    pub labels: Tensor,
    /// Number of classes.
    pub classes: usize,
}

impl Classification {
    /// Checks that inputs and labels belong together.
    ///
    /// # Errors
    /// [`Error::BadTensor`] for scalar inputs or labels that are not `u32 [n]`,
    /// [`Error::LengthMismatch`], [`Error::LabelOutOfRange`].
    pub fn new(inputs: Tensor, labels: Tensor, classes: usize) -> Result<Self> {
        let data = Self {
            inputs,
            labels,
            classes,
        };
        data.count()?;
        check_labels(&labels_of(&data.labels)?, classes)?;
        Ok(data)
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.inputs.dims().first().copied().unwrap_or(0)
    }

    /// True without examples.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The labels on the host.
    ///
    /// # Errors
    /// [`Error::BadTensor`] unless the labels are `u32 [n]`.
    pub fn label_vec(&self) -> Result<Vec<u32>> {
        labels_of(&self.labels)
    }

    /// How many examples each class has; length `classes`.
    ///
    /// # Errors
    /// [`Error::LabelOutOfRange`].
    pub fn class_counts(&self) -> Result<Vec<usize>> {
        class_counts(&self.label_vec()?, self.classes)
    }

    /// The examples at `indices`, in that order; an index may occur several times.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an index that is not there.
    pub fn select(&self, indices: &[u32]) -> Result<Self> {
        let (inputs, labels) = self.gather(indices)?;
        Ok(Self {
            inputs,
            labels,
            classes: self.classes,
        })
    }

    /// Inputs and labels on `device`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            inputs: self.inputs.to_device(device)?,
            labels: self.labels.to_device(device)?,
            classes: self.classes,
        })
    }

    /// Inputs as `dtype`; labels stay `u32`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        self.map_inputs(|x| Ok(x.to_dtype(dtype)?))
    }

    /// Every example in the shape `example`, such as `&[1, 8, 8]` for a convolution.
    ///
    /// # Errors
    /// candle's error when the element counts differ.
    pub fn reshape(&self, example: &[usize]) -> Result<Self> {
        let mut shape = vec![self.len()];
        shape.extend_from_slice(example);
        self.map_inputs(|x| Ok(x.reshape(shape.as_slice())?))
    }

    /// Every example as one vector: inputs `[n, features]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn flatten(&self) -> Result<Self> {
        let features = self.inputs.dims().iter().skip(1).product();
        self.reshape(&[features])
    }

    /// The same labels with `map(inputs)`.
    ///
    /// # Errors
    /// That of `map`, and [`Error::LengthMismatch`] when it changes the number of examples.
    pub fn map_inputs(&self, map: impl FnOnce(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let mapped = Self {
            inputs: map(&self.inputs)?,
            labels: self.labels.clone(),
            classes: self.classes,
        };
        mapped.count()?;
        Ok(mapped)
    }

    /// Labels as rows of zeros with a one at the class: `[n, classes]`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn one_hot_labels(&self, dtype: DType) -> Result<Tensor> {
        one_hot(
            &self.label_vec()?,
            self.classes,
            dtype,
            self.labels.device(),
        )
    }
}

impl Examples for Classification {
    fn tensors(&self) -> (&Tensor, &Tensor) {
        (&self.inputs, &self.labels)
    }
}

/// Examples with real targets.
#[derive(Debug, Clone)]
pub struct Regression {
    /// `[n, ...]`.
    pub inputs: Tensor,
    /// `[n]` or `[n, outputs]`.
    pub targets: Tensor,
}

impl Regression {
    /// Checks that inputs and targets belong together.
    ///
    /// # Errors
    /// [`Error::BadTensor`] for scalars, [`Error::LengthMismatch`].
    pub fn new(inputs: Tensor, targets: Tensor) -> Result<Self> {
        let data = Self { inputs, targets };
        data.count()?;
        Ok(data)
    }

    /// Number of examples.
    pub fn len(&self) -> usize {
        self.inputs.dims().first().copied().unwrap_or(0)
    }

    /// True without examples.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The examples at `indices`, in that order; an index may occur several times.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for an index that is not there.
    pub fn select(&self, indices: &[u32]) -> Result<Self> {
        let (inputs, targets) = self.gather(indices)?;
        Ok(Self { inputs, targets })
    }

    /// Inputs and targets on `device`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            inputs: self.inputs.to_device(device)?,
            targets: self.targets.to_device(device)?,
        })
    }

    /// Inputs and targets as `dtype`.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(Self {
            inputs: self.inputs.to_dtype(dtype)?,
            targets: self.targets.to_dtype(dtype)?,
        })
    }
}

impl Examples for Regression {
    fn tensors(&self) -> (&Tensor, &Tensor) {
        (&self.inputs, &self.targets)
    }
}

/// A data set as it is published: what to train on and what to test on.
#[derive(Debug, Clone)]
pub struct TrainTest {
    /// Examples to train on.
    pub train: Classification,
    /// Examples to test on.
    pub test: Classification,
}

impl TrainTest {
    /// [`Classification::to_device`] of both.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self {
            train: self.train.to_device(device)?,
            test: self.test.to_device(device)?,
        })
    }

    /// [`Classification::to_dtype`] of both.
    ///
    /// # Errors
    /// Those of candle.
    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        Ok(Self {
            train: self.train.to_dtype(dtype)?,
            test: self.test.to_dtype(dtype)?,
        })
    }
}

/// Reads labels `u32 [n]` to the host.
pub(crate) fn labels_of(labels: &Tensor) -> Result<Vec<u32>> {
    if labels.dtype() != DType::U32 || labels.rank() != 1 {
        return Err(Error::tensor("labels", labels, "U32 of shape [n]"));
    }
    Ok(labels.to_vec1()?)
}

pub(crate) fn check_labels(labels: &[u32], classes: usize) -> Result<()> {
    let bad = |(_, y): &(usize, &u32)| **y as usize >= classes;
    match labels.iter().enumerate().find(bad) {
        None => Ok(()),
        Some((index, label)) => Err(Error::LabelOutOfRange {
            label: u64::from(*label),
            index,
            classes,
        }),
    }
}

pub(crate) fn class_counts(labels: &[u32], classes: usize) -> Result<Vec<usize>> {
    check_labels(labels, classes)?;
    let mut counts = vec![0; classes];
    labels.iter().for_each(|y| counts[*y as usize] += 1);
    Ok(counts)
}

/// Rows of zeros with a one at `labels`.
pub(crate) fn one_hot(
    labels: &[u32],
    classes: usize,
    dtype: DType,
    device: &Device,
) -> Result<Tensor> {
    check_labels(labels, classes)?;
    let mut rows = vec![0u8; labels.len() * classes];
    for (row, y) in rows.chunks_mut(classes.max(1)).zip(labels) {
        row[*y as usize] = 1;
    }
    let rows = Tensor::from_vec(rows, (labels.len(), classes), device)?;
    Ok(rows.to_dtype(dtype)?)
}
