//! Scenarios of the methods in `thalweg-convex`.

pub(super) mod attention_svm;
pub(super) mod bcd;
pub(super) mod convex_relu;
pub(super) mod sparse_ot;

use crate::scenario::{Picture, PictureFormat};
use crate::{Error, Result};
use plotters::prelude::*;

/// A picture of a matrix `[rows, columns]` (row-major): white where it is zero, darker with size.
fn heat_map(caption: &str, rows: usize, columns: usize, values: &[f64]) -> Result<Picture> {
    const CELL: usize = 9;
    let failed = |e: &dyn std::fmt::Display| Error::Trial(format!("drawing `{caption}`: {e}"));
    let largest = values.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
    let mut svg = String::new();
    {
        let size = ((columns * CELL) as u32, (rows * CELL) as u32);
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        area.fill(&WHITE).map_err(|e| failed(&e))?;
        for (p, x) in values.iter().enumerate().filter(|(_, x)| **x != 0.0) {
            let (r, c) = ((p / columns * CELL) as i32, (p % columns * CELL) as i32);
            // A small entry stays visible: the support is what is looked at.
            let shade = 200 - (200.0 * (x.abs() / largest).sqrt()) as u8;
            let cell = [(c, r), (c + CELL as i32 - 1, r + CELL as i32 - 1)];
            let style = RGBColor(shade, shade, 220).filled();
            area.draw(&Rectangle::new(cell, style))
                .map_err(|e| failed(&e))?;
        }
        area.present().map_err(|e| failed(&e))?;
    }
    Ok(Picture {
        caption: caption.to_string(),
        format: PictureFormat::Svg,
        bytes: svg.into_bytes(),
    })
}
