//! Small pictures as SVG.

use crate::scenario::{Picture, PictureFormat};
use std::fmt::Write;

/// Points over a landscape of colors.
pub(super) struct Landscape<'a> {
    /// Lower left and upper right corner.
    pub low: [f64; 2],
    pub high: [f64; 2],
    /// The height at a point.
    pub height: &'a dyn Fn(f64, f64) -> f64,
}

const CELLS: usize = 48;
const SIZE: f64 = 360.0;

impl Landscape<'_> {
    /// The landscape with clouds of points, each in one color.
    pub(super) fn draw(&self, caption: &str, clouds: &[(&str, Vec<[f64; 2]>)]) -> Picture {
        let side = SIZE / CELLS as f64;
        let at = |k: usize, axis: usize| {
            let t = (k as f64 + 0.5) / CELLS as f64;
            self.low[axis] + t * (self.high[axis] - self.low[axis])
        };
        let mut heights = Vec::new();
        for j in 0..CELLS {
            for i in 0..CELLS {
                heights.push((self.height)(at(i, 0), at(j, 1)));
            }
        }
        let top = heights.iter().copied().fold(f64::MIN_POSITIVE, f64::max);
        let mut svg = open(SIZE, SIZE);
        for (k, height) in heights.iter().enumerate() {
            let (i, j) = (k % CELLS, k / CELLS);
            let shade = 60.0 + 195.0 * (height / top).clamp(0.0, 1.0).sqrt();
            let (x, y) = (i as f64 * side, SIZE - (j + 1) as f64 * side);
            rect(&mut svg, x, y, side, &gray(shade));
        }
        for (color, points) in clouds {
            for [a, b] in points {
                let x = (a - self.low[0]) / (self.high[0] - self.low[0]) * SIZE;
                let y = SIZE - (b - self.low[1]) / (self.high[1] - self.low[1]) * SIZE;
                // Writing to a string cannot fail.
                let _ = write!(
                    svg,
                    "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"2.5\" fill=\"{color}\"/>"
                );
            }
        }
        close(svg, caption)
    }
}

/// Square images of gray values (0 dark, 1 light) in rows, with some space between groups.
pub(super) fn contact_sheet(caption: &str, groups: &[Vec<Vec<f64>>]) -> Picture {
    const PIXEL: f64 = 4.0;
    const COLUMNS: usize = 10;
    let side = |image: &[f64]| (image.len() as f64).sqrt().round().max(1.0);
    let first = groups.iter().flatten().next();
    let edge = first.map_or(1.0, |image| side(image)) * PIXEL + 4.0;
    let rows: usize = groups.iter().map(|g| g.len().div_ceil(COLUMNS)).sum();
    let height = rows as f64 * edge + groups.len().saturating_sub(1) as f64 * edge / 2.0;
    let mut svg = open(COLUMNS as f64 * edge, height);
    let mut top = 0.0;
    for group in groups {
        for (k, image) in group.iter().enumerate() {
            let (left, down) = (
                (k % COLUMNS) as f64 * edge,
                top + (k / COLUMNS) as f64 * edge,
            );
            let width = side(image) as usize;
            for (p, value) in image.iter().enumerate() {
                let (x, y) = ((p % width) as f64 * PIXEL, (p / width) as f64 * PIXEL);
                let shade = gray(255.0 * value.clamp(0.0, 1.0));
                rect(&mut svg, left + x, down + y, PIXEL, &shade);
            }
        }
        top += group.len().div_ceil(COLUMNS) as f64 * edge + edge / 2.0;
    }
    close(svg, caption)
}

fn open(width: f64, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" width=\"{width}\" height=\"{height}\">"
    )
}

fn rect(svg: &mut String, x: f64, y: f64, side: f64, color: &str) {
    // A little larger, so that no seams show.
    let side = side + 0.2;
    let _ = write!(
        svg,
        "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{side:.1}\" height=\"{side:.1}\" fill=\"{color}\"/>"
    );
}

fn gray(shade: f64) -> String {
    let level = shade.clamp(0.0, 255.0) as u8;
    format!("rgb({level},{level},{level})")
}

fn close(mut svg: String, caption: &str) -> Picture {
    svg.push_str("</svg>");
    Picture {
        caption: caption.to_string(),
        format: PictureFormat::Svg,
        bytes: svg.into_bytes(),
    }
}
