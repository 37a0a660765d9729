//! What scenarios share that make samples: data in `[-1, 1]`, a distance between clouds of samples,
//! pictures.

use crate::scenario::{Picture, PictureFormat, TrialContext};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, Var};
use datasets::Classification;
use faer::{Mat, Side};
use flows::{AnalyticMixture, Condition, Level, Levels};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, PoisonError};

/// All digits, scaled to `[-1, 1]`, in an order that the seed decides.
///
/// # Errors
/// [`Error::Datasets`].
pub fn digits(trial: &TrialContext) -> Result<Classification> {
    let all = datasets::digits()?;
    let order = trial.stream("order").permutation(all.len())?;
    let order = Tensor::from_vec(order, all.len(), all.inputs.device())?;
    let inputs = all.inputs.index_select(&order, 0)?.affine(2.0, -1.0)?;
    let labels = all.labels.index_select(&order, 0)?;
    let shuffled = Classification::new(inputs, labels, all.classes)?;
    Ok(shuffled.to_device(&trial.device)?)
}

/// The exact conditional model of `count` digits: a kernel density estimate with this bandwidth.
///
/// # Errors
/// [`Error::Flows`] for a bandwidth that makes no sense.
pub fn exact_digits(
    data: &Classification,
    count: usize,
    bandwidth: f64,
) -> Result<AnalyticMixture> {
    let labels = data.labels.narrow(0, 0, count)?.to_vec1::<u32>()?;
    let mixture = AnalyticMixture::kernel_density(&data.inputs.narrow(0, 0, count)?, bandwidth)?;
    Ok(mixture.with_classes(&labels)?)
}

/// Weights by name, as they were trained.
type Weights = BTreeMap<String, Vec<f32>>;

/// Trains variables once per process and key (method, seed, budget or part); a later call with the same key sets
/// its variables to the weights of the first. For models that the arms of a seed share.
///
/// # Errors
/// Those of `train`; [`Error::Trial`] when the key was used for variables of other names.
pub fn trained_once(
    key: (&'static str, u64, usize),
    vars: &[(String, Var)],
    train: impl FnOnce() -> Result<()>,
) -> Result<()> {
    static KEPT: Mutex<BTreeMap<(&'static str, u64, usize), Weights>> = Mutex::new(BTreeMap::new());
    // A panic elsewhere cannot leave a half-written value here.
    let kept = || KEPT.lock().unwrap_or_else(PoisonError::into_inner);
    let found = kept().get(&key).cloned();
    if let Some(weights) = found {
        for (name, var) in vars {
            let values = weights.get(name);
            let values =
                values.ok_or_else(|| Error::Trial(format!("no kept weights of `{name}`")))?;
            let tensor = Tensor::from_slice(values, var.shape(), var.device())?;
            var.set(&tensor.to_dtype(var.dtype())?)?;
        }
        return Ok(());
    }
    train()?;
    let read = |(name, var): &(String, Var)| {
        let flat = var.as_detached_tensor().to_dtype(DType::F32)?;
        Ok((name.clone(), flat.flatten_all()?.to_vec1()?))
    };
    let weights = vars.iter().map(read).collect::<Result<Weights>>()?;
    kept().insert(key, weights);
    Ok(())
}

/// Classes `0, 1, .., classes - 1, 0, ..` for `count` samples.
///
/// # Errors
/// Those of candle.
pub fn all_classes(count: usize, classes: usize, device: &Device) -> Result<Condition> {
    let wanted: Vec<u32> = (0..count).map(|i| (i % classes) as u32).collect();
    Ok(Condition::classes(&wanted, device)?)
}

/// The part of clean samples whose most likely class under the model is the wanted one.
///
/// # Errors
/// Those of the model.
pub fn class_accuracy(
    model: &AnalyticMixture,
    samples: &Tensor,
    wanted: &Condition,
) -> Result<f64> {
    let Condition::Class(wanted) = wanted else {
        return Err(Error::Trial(
            "the samples were not asked for by class".into(),
        ));
    };
    let clean = Levels::Same(Level::new(1.0, 0.0, 0.0)?);
    let found = model.log_posterior(samples, &clean)?.argmax(1)?;
    let hits = found.eq(wanted)?.to_dtype(DType::F64)?;
    Ok(hits.mean_all()?.to_scalar()?)
}

/// Mean and covariance of a cloud of samples.
pub struct Cloud {
    mean: Vec<f64>,
    covariance: Mat<f64>,
}

impl Cloud {
    /// Of samples `[n, d]`.
    ///
    /// # Errors
    /// [`Error::Trial`] for fewer than two samples.
    pub fn new(samples: &Tensor) -> Result<Self> {
        let (n, d) = samples.dims2()?;
        if n < 2 {
            return Err(Error::Trial("a cloud needs two samples".into()));
        }
        let x = samples.detach().to_dtype(DType::F64)?;
        let mean = x.mean_keepdim(0)?;
        let centered = x.broadcast_sub(&mean)?;
        let c = centered
            .t()?
            .matmul(&centered)?
            .affine(1.0 / (n - 1) as f64, 0.0)?;
        let c = c.to_vec2::<f64>()?;
        Ok(Self {
            mean: mean.flatten_all()?.to_vec1()?,
            covariance: Mat::from_fn(d, d, |i, j| c[i][j]),
        })
    }

    /// The two directions of the largest variance, `[2][d]`.
    ///
    /// # Errors
    /// [`Error::Trial`] when the decomposition fails.
    pub fn main_plane(&self) -> Result<[Vec<f64>; 2]> {
        let (_, vectors) = eigen(&self.covariance)?;
        let d = vectors.nrows();
        let column = |k: usize| (0..d).map(|i| vectors[(i, d - 1 - k)]).collect();
        Ok([column(0), column(1)])
    }
}

/// Eigenvalues in ascending order, and vectors.
fn eigen(matrix: &Mat<f64>) -> Result<(Vec<f64>, Mat<f64>)> {
    let failed = |e| Error::Trial(format!("eigenvalues of a covariance: {e:?}"));
    let found = matrix.self_adjoint_eigen(Side::Lower).map_err(failed)?;
    let values = found.S().column_vector().iter().copied().collect();
    Ok((values, found.U().to_owned()))
}

/// The Frechet distance of two clouds read as Gaussians,
/// `|m1 - m2|^2 + tr(C1 + C2 - 2 (C1^(1/2) C2 C1^(1/2))^(1/2))`.
///
/// # Errors
/// [`Error::Trial`] when a decomposition fails.
pub fn frechet(a: &Cloud, b: &Cloud) -> Result<f64> {
    let mean: f64 = a
        .mean
        .iter()
        .zip(&b.mean)
        .map(|(x, y)| (x - y).powi(2))
        .sum();
    let (values, vectors) = eigen(&a.covariance)?;
    let d = values.len();
    let scaled = Mat::from_fn(d, d, |i, j| vectors[(i, j)] * values[j].max(0.0).sqrt());
    let root = &scaled * vectors.transpose();
    let (inner, _) = eigen(&(&root * &b.covariance * &root))?;
    let cross: f64 = inner.iter().map(|x| x.max(0.0).sqrt()).sum();
    let trace = |c: &Mat<f64>| (0..d).map(|i| c[(i, i)]).sum::<f64>();
    Ok(mean + trace(&a.covariance) + trace(&b.covariance) - 2.0 * cross)
}

/// Grey images `[n, side * side]` in `[-1, 1]` in rows of `columns`, as SVG.
///
/// # Errors
/// [`Error::Trial`] for images that are not square.
pub fn image_grid(caption: &str, images: &Tensor, columns: usize) -> Result<Picture> {
    const SHADES: usize = 16;
    let images = images.detach().to_dtype(DType::F64)?.to_vec2::<f64>()?;
    let pixels = images.first().map_or(0, Vec::len);
    let side = (pixels as f64).sqrt().round() as usize;
    if side * side != pixels || pixels == 0 {
        return Err(Error::Trial(format!("{pixels} pixels are no square")));
    }
    let cell = side + 1;
    let mut paths = vec![String::new(); SHADES];
    for (k, image) in images.iter().enumerate() {
        let (left, top) = ((k % columns) * cell, (k / columns) * cell);
        for (i, value) in image.iter().enumerate() {
            let shade = ((value + 1.0) * 0.5 * SHADES as f64).clamp(0.0, SHADES as f64 - 1.0);
            let (x, y) = (left + i % side, top + i / side);
            // Writing to a string cannot fail.
            let _ = write!(paths[shade as usize], "M{x} {y}h1v1h-1z");
        }
    }
    let (width, height) = (columns * cell, images.len().div_ceil(columns) * cell);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" \
         shape-rendering=\"crispEdges\"><rect width=\"{width}\" height=\"{height}\" fill=\"#808080\"/>"
    );
    for (shade, path) in paths.iter().enumerate().filter(|(_, p)| !p.is_empty()) {
        let grey = shade * 255 / (SHADES - 1);
        let _ = write!(
            svg,
            "<path fill=\"rgb({grey},{grey},{grey})\" d=\"{path}\"/>"
        );
    }
    svg.push_str("</svg>");
    Ok(Picture {
        caption: caption.to_string(),
        format: PictureFormat::Svg,
        bytes: svg.into_bytes(),
    })
}

/// Paths of samples in the plane of the data's largest variance, as SVG: where they start, how they
/// run, where they end. `states` are `[n, d]` each.
///
/// # Errors
/// Those of the decomposition.
pub fn path_picture(caption: &str, data: &Cloud, states: &[Tensor]) -> Result<Picture> {
    let plane = data.main_plane()?;
    let mut points: Vec<Vec<(f64, f64)>> = Vec::new();
    for state in states {
        let rows = state.detach().to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let project = |row: &Vec<f64>| {
            let along = |axis: &Vec<f64>| {
                let centered = row.iter().zip(&data.mean).map(|(x, m)| x - m);
                centered.zip(axis).map(|(x, a)| x * a).sum::<f64>()
            };
            (along(&plane[0]), along(&plane[1]))
        };
        points.push(rows.iter().map(project).collect());
    }
    let largest = points
        .iter()
        .flatten()
        .map(|(x, y)| x.abs().max(y.abs()))
        .fold(1e-9, f64::max);
    let place = |v: f64| 100.0 + 95.0 * v / largest;
    let mut svg = String::from(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 200 200\" fill=\"none\">",
    );
    let count = points.first().map_or(0, Vec::len);
    for i in 0..count {
        let line: Vec<String> = points
            .iter()
            .filter_map(|state| state.get(i))
            .map(|(x, y)| format!("{:.1},{:.1}", place(*x), place(*y)))
            .collect();
        let _ = write!(
            svg,
            "<polyline points=\"{}\" stroke=\"#4477aa\" stroke-width=\"0.6\"/>",
            line.join(" ")
        );
        if let Some((x, y)) = points.last().and_then(|state| state.get(i)) {
            let (x, y) = (place(*x), place(*y));
            let _ = write!(
                svg,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"1.4\" fill=\"#cc6677\"/>"
            );
        }
    }
    svg.push_str("</svg>");
    Ok(Picture {
        caption: caption.to_string(),
        format: PictureFormat::Svg,
        bytes: svg.into_bytes(),
    })
}
