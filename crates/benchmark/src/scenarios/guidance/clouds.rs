//! Clouds of guided samples in the plane, over the densities that they were to meet.

use crate::scenario::{Picture, PictureFormat, TrialContext};
use crate::Result;
use candle_core::{DType, Device, Tensor};
use flows::schedule::VpSde;
use flows::{AnalyticMixture, Condition, Grid, Guidance, Level, Sampler};
use std::fmt::Write;

/// Classes of the [`ring`].
const CLASSES: u32 = 4;
/// Of each Gaussian of the clouds.
pub const VARIANCE: f64 = 0.03;
const SAMPLES: usize = 200;
const STEPS: usize = 20;
/// Half the side of the picture, in the units of the plane.
const REACH: f64 = 2.4;
/// Cells of the density along a side.
const CELLS: usize = 40;
const SHADES: usize = 12;

/// Twelve Gaussians at angles of 30 degrees, at the radii 1 and 1.6 in turn, in four classes.
///
/// # Errors
/// Those of the mixture.
pub fn ring(variance: f64, device: &Device) -> Result<AnalyticMixture> {
    let mut means = Vec::new();
    for k in 0..12 {
        let (angle, radius) = (
            f64::from(k) * 30.0_f64.to_radians(),
            [1.0, 1.6][k as usize % 2],
        );
        means.extend([radius * angle.cos(), radius * angle.sin()]);
    }
    let means = Tensor::from_vec(means, (12, 2), device)?;
    let classes: Vec<u32> = (0..12).map(|k| k % CLASSES).collect();
    let mixture = AnalyticMixture::new(&means, &[variance; 12], &[1.0; 12])?;
    Ok(mixture.with_classes(&classes)?)
}

/// Samples of one class of the ring under a rule, over the density of that class. The conditional model
/// is an imperfect one (a quarter of it is the whole ring), the weak model is wider and knows less.
///
/// # Errors
/// Those of the sampler.
pub fn guided_cloud(trial: &TrialContext, caption: &str, rule: impl Guidance) -> Result<Picture> {
    let device = &trial.device;
    let exact = ring(VARIANCE, device)?;
    let (model, weak) = (
        exact.clone().with_leak(0.25)?,
        ring(4.0 * VARIANCE, device)?.with_leak(0.5)?,
    );
    let wanted = Condition::classes(&[0], device)?;
    let grid = Grid::uniform_time(&VpSde::default(), STEPS)?;
    let mut stream = trial.stream("cloud");
    let noise = stream.normal(0.0, 1.0, (SAMPLES, 2), DType::F64, device)?;
    let mut sampler = Sampler::new(&model, grid)
        .weak(&weak)
        .null(Condition::classes(&[CLASSES], device)?)
        .guidance(rule);
    let x = sampler.sample(&noise, &wanted, None, &stream)?.x;
    over_density(caption, &exact, &wanted, &x)
}

/// Points `[n, 2]` over the density of a mixture, as SVG: the darker, the denser.
fn over_density(
    caption: &str,
    model: &AnalyticMixture,
    condition: &Condition,
    points: &Tensor,
) -> Result<Picture> {
    let side = 2.0 * REACH / CELLS as f64;
    let center = |k: usize| side * (k as f64 + 0.5) - REACH;
    let cells: Vec<f64> = (0..CELLS * CELLS)
        .flat_map(|i| [center(i % CELLS), -center(i / CELLS)])
        .collect();
    let cells = Tensor::from_vec(cells, (CELLS * CELLS, 2), points.device())?;
    let clean = Level::new(1.0, 0.0, 0.0)?;
    let condition = condition.for_rows(CELLS * CELLS)?;
    let density = model.log_density(&cells, &clean.into(), &condition)?;
    let density = density.to_dtype(DType::F64)?.exp()?.to_vec1::<f64>()?;
    let peak = density.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
    let mut paths = vec![String::new(); SHADES];
    for (i, value) in density.iter().enumerate() {
        let shade = (value / peak * (SHADES - 1) as f64).round() as usize;
        // Writing to a string cannot fail.
        let _ = write!(paths[shade], "M{} {}h1v1h-1z", i % CELLS, i / CELLS);
    }
    let mut svg =
        format!("<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {CELLS} {CELLS}\">");
    for (shade, path) in paths.iter().enumerate().filter(|(_, p)| !p.is_empty()) {
        let grey = 255 - shade * 150 / (SHADES - 1);
        let _ = write!(
            svg,
            "<path fill=\"rgb({grey},{grey},255)\" d=\"{path}\" shape-rendering=\"crispEdges\"/>"
        );
    }
    for row in points.to_dtype(DType::F64)?.to_vec2::<f64>()? {
        let (x, y) = ((row[0] + REACH) / side, (REACH - row[1]) / side);
        let _ = write!(
            svg,
            "<circle cx=\"{x:.2}\" cy=\"{y:.2}\" r=\"0.35\" fill=\"#cc6677\"/>"
        );
    }
    svg.push_str("</svg>");
    Ok(Picture {
        caption: caption.to_string(),
        format: PictureFormat::Svg,
        bytes: svg.into_bytes(),
    })
}
