//! Matrices and clouds of points as SVG.

use crate::graph_ssl::embedding_for_probe;
use crate::scenario::{Picture, PictureFormat};
use crate::Result;
use candle_core::Tensor;
use std::fmt::Write;

/// One matrix of numbers in `[0, 1]` with its title.
pub(super) struct HeatMap {
    /// Lines above the matrix.
    pub title: Vec<String>,
    pub cells: usize,
    /// Row-major.
    pub values: Vec<f64>,
}

const SIDE: f64 = 160.0;
const GAP: f64 = 16.0;
const LINE: f64 = 15.0;

/// Matrices in two columns, row by row: white for 0 and dark for 1. Two fit a telephone.
pub(super) fn heat_maps(caption: &str, maps: &[HeatMap]) -> Picture {
    const COLUMNS: usize = 2;
    let lines = maps.iter().map(|m| m.title.len()).max().unwrap_or(0) as f64;
    let above = lines * LINE + 4.0;
    let rows = maps.len().div_ceil(COLUMNS) as f64;
    let mut svg = open(COLUMNS as f64 * (SIDE + GAP), rows * (above + SIDE + GAP));
    for (at, map) in maps.iter().enumerate() {
        let left = (at % COLUMNS) as f64 * (SIDE + GAP) + GAP / 2.0;
        let top = (at / COLUMNS) as f64 * (above + SIDE + GAP);
        for (i, line) in map.title.iter().enumerate() {
            text(&mut svg, left, top + LINE * (i as f64 + 0.9), "", line);
        }
        let cell = SIDE / map.cells.max(1) as f64;
        for (p, value) in map.values.iter().enumerate() {
            let (r, c) = (p / map.cells, p % map.cells);
            let (x, y) = (left + c as f64 * cell, top + above + r as f64 * cell);
            let shade = (255.0 * (1.0 - value.clamp(0.0, 1.0))) as u8;
            let side = cell + 0.2;
            // Writing to a string cannot fail.
            let _ = write!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{side:.1}\" height=\"{side:.1}\" fill=\"rgb({shade},{shade},255)\"/>"
            );
        }
        frame(&mut svg, left, top + above, SIDE);
    }
    close(svg, caption)
}

fn text(svg: &mut String, x: f64, y: f64, attributes: &str, words: &str) {
    let _ = write!(
        svg,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" font-size=\"12\" font-family=\"sans-serif\" {attributes}>{words}</text>"
    );
}

fn frame(svg: &mut String, x: f64, y: f64, side: f64) {
    let _ = write!(
        svg,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{side:.1}\" height=\"{side:.1}\" fill=\"none\" stroke=\"#888\"/>"
    );
}

/// The color of a class.
const COLORS: [&str; 10] = [
    "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#882255",
    "#44aa99", "#332288",
];

/// Embeddings in the plane of their two largest principal components, in the colors of their classes.
pub(super) fn embeddings(z: &Tensor, classes: &[u32]) -> Result<Picture> {
    const PLOT: f64 = 330.0;
    const LEFT: f64 = 22.0;
    let points = principal_plane(z)?;
    let axis = |k: usize| {
        let of = points.iter().map(|p| p[k]);
        let low = of.clone().fold(f64::INFINITY, f64::min);
        let high = of.fold(f64::NEG_INFINITY, f64::max);
        (low, (high - low).max(1e-12))
    };
    let (x, y) = (axis(0), axis(1));
    let count = classes.iter().max().map_or(0, |c| *c as usize + 1);
    let legend = 18.0 * (count as f64 / 5.0).ceil();
    let mut svg = open(LEFT + PLOT + 4.0, PLOT + 30.0 + legend);
    frame(&mut svg, LEFT, 2.0, PLOT);
    for (point, class) in points.iter().zip(classes) {
        let left = LEFT + 6.0 + (PLOT - 12.0) * (point[0] - x.0) / x.1;
        let top = PLOT - 4.0 - (PLOT - 12.0) * (point[1] - y.0) / y.1;
        dot(&mut svg, left, top, (2.2, 0.7), *class);
    }
    let middle = "text-anchor=\"middle\"";
    let words = "first principal component";
    text(&mut svg, LEFT + PLOT / 2.0, PLOT + 18.0, middle, words);
    let (at, turned) = (PLOT / 2.0, format!("{middle} transform=\"rotate(-90)\""));
    text(
        &mut svg,
        -at,
        LEFT - 8.0,
        &turned,
        "second principal component",
    );
    for class in 0..count {
        let (row, column) = ((class / 5) as f64, (class % 5) as f64);
        let (left, top) = (LEFT + 8.0 + 66.0 * column, PLOT + 36.0 + 18.0 * row);
        dot(&mut svg, left, top - 4.0, (4.0, 1.0), class as u32);
        text(&mut svg, left + 8.0, top, "", &format!("class {class}"));
    }
    let caption = "Embeddings of the nodes, centered and normalized, by class.";
    Ok(close(svg, caption))
}

fn dot(svg: &mut String, x: f64, y: f64, (radius, opacity): (f64, f64), class: u32) {
    let color = COLORS[class as usize % COLORS.len()];
    let _ = write!(
        svg,
        "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius}\" fill=\"{color}\" fill-opacity=\"{opacity}\"/>"
    );
}

/// The two largest principal components of centered, normalized embeddings, by power iteration.
fn principal_plane(z: &Tensor) -> Result<Vec<[f64; 2]>> {
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
