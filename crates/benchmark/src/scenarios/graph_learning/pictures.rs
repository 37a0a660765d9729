//! Matrices and clouds of points as SVG.

use crate::graph_ssl::embedding_for_probe;
use crate::scenario::{Picture, PictureFormat};
use crate::Result;
use candle_core::Tensor;
use std::fmt::Write;

/// One matrix of numbers in `[0, 1]` with its title.
pub(super) struct HeatMap {
    pub title: String,
    pub cells: usize,
    /// Row-major.
    pub values: Vec<f64>,
}

const SIDE: f64 = 150.0;
const GAP: f64 = 14.0;

/// Matrices in rows of `columns`, white for 0 and dark for 1.
pub(super) fn heat_maps(caption: &str, columns: usize, maps: &[HeatMap]) -> Picture {
    let columns = columns.max(1);
    let rows = maps.len().div_ceil(columns);
    let mut svg = open(
        columns as f64 * (SIDE + GAP),
        rows as f64 * (SIDE + GAP + 14.0),
    );
    for (at, map) in maps.iter().enumerate() {
        let left = (at % columns) as f64 * (SIDE + GAP) + GAP / 2.0;
        let top = (at / columns) as f64 * (SIDE + GAP + 14.0);
        // Writing to a string cannot fail.
        let _ = write!(
            svg,
            "<text x=\"{left:.1}\" y=\"{:.1}\" font-size=\"11\" font-family=\"sans-serif\">{}</text>",
            top + 12.0,
            map.title
        );
        let cell = SIDE / map.cells.max(1) as f64;
        for (p, value) in map.values.iter().enumerate() {
            let (r, c) = (p / map.cells, p % map.cells);
            let (x, y) = (left + c as f64 * cell, top + 18.0 + r as f64 * cell);
            let shade = (255.0 * (1.0 - value.clamp(0.0, 1.0))) as u8;
            let side = cell + 0.2;
            let _ = write!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{side:.1}\" height=\"{side:.1}\" fill=\"rgb({shade},{shade},255)\"/>"
            );
        }
    }
    close(svg, caption)
}

/// The color of a class.
const COLORS: [&str; 10] = [
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#882255",
    "#44aa99", "#332288",
];

/// Points in the plane in the colors of their classes, in a frame around all of them.
pub(super) fn scatter(caption: &str, points: &[[f64; 2]], classes: &[u32]) -> Picture {
    const FRAME: f64 = 360.0;
    let axis = |k: usize| {
        let of = points.iter().map(|p| p[k]);
        let low = of.clone().fold(f64::INFINITY, f64::min);
        let high = of.fold(f64::NEG_INFINITY, f64::max);
        (low, (high - low).max(1e-12))
    };
    let (x, y) = (axis(0), axis(1));
    let mut svg = open(FRAME, FRAME);
    for (point, class) in points.iter().zip(classes) {
        let left = 6.0 + (FRAME - 12.0) * (point[0] - x.0) / x.1;
        let top = FRAME - 6.0 - (FRAME - 12.0) * (point[1] - y.0) / y.1;
        let color = COLORS[*class as usize % COLORS.len()];
        let _ = write!(
            svg,
            "<circle cx=\"{left:.1}\" cy=\"{top:.1}\" r=\"2.2\" fill=\"{color}\" fill-opacity=\"0.7\"/>"
        );
    }
    close(svg, caption)
}

/// The two largest principal components of centered, normalized embeddings, by power iteration.
pub(super) fn principal_plane(z: &Tensor) -> Result<Vec<[f64; 2]>> {
    let z = embedding_for_probe(z)?;
    let covariance = z.t()?.contiguous()?.matmul(&z)?;
    let d = covariance.dims()[0];
    let mut axes: Vec<Tensor> = Vec::with_capacity(2);
    for k in 0..2 {
        // Any start will do that is not orthogonal to the axis.
        let start: Vec<f64> = (0..d).map(|i| 1.0 + ((i * 7 + k) % 11) as f64).collect();
        let mut axis = Tensor::from_vec(start, (d, 1), z.device())?;
        for _ in 0..100 {
            axis = covariance.matmul(&axis)?;
            for before in &axes {
                let share = before.t()?.matmul(&axis)?;
                axis = (axis - before.matmul(&share)?)?;
            }
            let norm = axis.sqr()?.sum_all()?.sqrt()?.to_scalar::<f64>()?;
            axis = (axis / norm.max(1e-300))?;
        }
        axes.push(axis);
    }
    let points = z.matmul(&Tensor::cat(&axes, 1)?)?.to_vec2::<f64>()?;
    Ok(points.into_iter().map(|p| [p[0], p[1]]).collect())
}

fn open(width: f64, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\"><rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>"
    )
}

fn close(mut svg: String, caption: &str) -> Picture {
    svg.push_str("</svg>");
    Picture {
        caption: caption.to_string(),
        format: PictureFormat::Svg,
        bytes: svg.into_bytes(),
    }
}
