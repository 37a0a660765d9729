//! Plots as inline SVG whose colors are CSS variables, so that one picture serves light and dark.

use crate::scenario::Curve;
use crate::statistics::Interval;
use crate::summary::{digits, figure};
use crate::{Error, Result};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

/// Width of every plot in its own units; the page scales it.
const WIDTH: u32 = 480;
/// Font size in the same units: legible when the plot is 340 pixels wide.
const FONT: i32 = 18;
/// Colors for arms that the style sheet defines as `--s1` to `--s8`.
pub(super) const SERIES: usize = 8;

/// Stand-ins that [`finish`] turns into CSS variables; the drawing library knows only numbers.
const INK: RGBColor = RGBColor(2, 2, 2);
const GRID: RGBColor = RGBColor(3, 3, 3);

fn series_color(index: usize) -> RGBColor {
    RGBColor(1, 1, 1 + (index % SERIES) as u8)
}

/// A line with its spread over seeds.
pub(super) struct Line<'a> {
    /// Which color of the style sheet.
    pub color: usize,
    /// The curves of all seeds.
    pub seeds: Vec<&'a Curve>,
}

/// Mean, lowest and highest value over seeds at each position.
struct Band {
    x: Vec<f64>,
    mean: Vec<f64>,
    low: Vec<f64>,
    high: Vec<f64>,
}

impl Band {
    /// Positions that all seeds have, with finite values only.
    fn new(seeds: &[&Curve], map_x: &dyn Fn(f64) -> f64, map_y: &dyn Fn(f64) -> f64) -> Self {
        let mut band = Self {
            x: vec![],
            mean: vec![],
            low: vec![],
            high: vec![],
        };
        let points = seeds
            .iter()
            .map(|c| c.x.len().min(c.y.len()))
            .min()
            .unwrap_or(0);
        for i in 0..points {
            let values: Vec<f64> = seeds
                .iter()
                .map(|c| c.y[i])
                .filter(|y| y.is_finite())
                .collect();
            if values.is_empty() {
                continue;
            }
            let x = map_x(seeds[0].x[i]);
            let mean = map_y(crate::statistics::mean(&values));
            let low = map_y(values.iter().copied().fold(f64::INFINITY, f64::min));
            let high = map_y(values.iter().copied().fold(f64::NEG_INFINITY, f64::max));
            if [x, mean, low, high].iter().all(|v| v.is_finite()) {
                band.x.push(x);
                band.mean.push(mean);
                band.low.push(low);
                band.high.push(high);
            }
        }
        band
    }
}

fn log_or_linear(log: bool) -> Box<dyn Fn(f64) -> f64> {
    if log {
        Box::new(f64::log10)
    } else {
        Box::new(|v| v)
    }
}

fn label(log: bool) -> impl Fn(&f64) -> String {
    move |v: &f64| {
        if log {
            digits(10f64.powf(*v), 2)
        } else {
            short(*v)
        }
    }
}

/// An axis label: what binary fractions add to a round step is cut off.
fn short(v: f64) -> String {
    figure((v * 1e9).round() / 1e9)
}

/// One plot of all arms' curves of one name; `None` when there is nothing finite to draw.
///
/// # Errors
/// [`Error::Draw`].
pub(super) fn lines(title: &str, lines: &[Line]) -> Result<Option<String>> {
    let Some(first) = lines.iter().find_map(|l| l.seeds.first()) else {
        return Ok(None);
    };
    let (map_x, map_y) = (log_or_linear(first.log_x), log_or_linear(first.log_y));
    let bands: Vec<(usize, Band)> = lines
        .iter()
        .map(|l| (l.color, Band::new(&l.seeds, &map_x, &map_y)))
        .collect();
    let xs = range(bands.iter().flat_map(|(_, b)| b.x.iter()));
    let ys = range(bands.iter().flat_map(|(_, b)| b.low.iter().chain(&b.high)));
    let (Some((x0, x1)), Some((y0, y1))) = (xs, ys) else {
        return Ok(None);
    };
    let margin = 0.04 * (y1 - y0);
    draw(title, 300, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_right(28)
            .x_label_area_size(44)
            .y_label_area_size(62)
            .build_cartesian_2d(x0..x1, y0 - margin..y1 + margin)?;
        chart
            .configure_mesh()
            .disable_mesh()
            .bold_line_style(GRID)
            .axis_style(INK)
            .x_labels(5)
            .y_labels(6)
            .x_label_formatter(&label(first.log_x))
            .y_label_formatter(&label(first.log_y))
            .x_desc(first.x_label.as_str())
            .label_style(text())
            .axis_desc_style(text())
            .draw()?;
        for (color, band) in &bands {
            let up = band.x.iter().copied().zip(band.high.iter().copied());
            let down = band.x.iter().copied().zip(band.low.iter().copied()).rev();
            let outline: Vec<(f64, f64)> = up.chain(down).collect();
            let style = series_color(*color).mix(0.16).filled();
            chart.draw_series(std::iter::once(Polygon::new(outline, style)))?;
        }
        for (color, band) in &bands {
            let points: Vec<(f64, f64)> = band
                .x
                .iter()
                .copied()
                .zip(band.mean.iter().copied())
                .collect();
            let stroke = series_color(*color).stroke_width(2);
            if points.len() == 1 {
                let dot = Circle::new(points[0], 4, series_color(*color).filled());
                chart.draw_series(std::iter::once(dot))?;
            }
            chart.draw_series(LineSeries::new(points, stroke))?;
        }
        Ok(())
    })
    .map(Some)
}

/// One arm in the plot of two metrics.
pub(super) struct Spot {
    /// Which color of the style sheet.
    pub color: usize,
    /// The first metric.
    pub x: Interval,
    /// The second one.
    pub y: Interval,
}

/// Which spots no other one beats in both metrics, from left to right; `sign` is 1 where higher is
/// better and -1 where lower is.
fn frontier(spots: &[&Spot], sign: (f64, f64)) -> Vec<(f64, f64)> {
    let of = |s: &Spot| (sign.0 * s.x.mean, sign.1 * s.y.mean);
    let beaten = |s: &Spot| {
        let (x, y) = of(s);
        let beats = |o: &&Spot| of(o).0 >= x && of(o).1 >= y && of(o) != (x, y);
        spots.iter().any(beats)
    };
    let kept = spots.iter().filter(|s| !beaten(s));
    let mut line: Vec<(f64, f64)> = kept.map(|s| (s.x.mean, s.y.mean)).collect();
    line.sort_by(|a, b| a.0.total_cmp(&b.0));
    line
}

/// The means of two metrics against each other with their intervals, and the line of the arms that
/// no other one beats; `None` when there is nothing finite to draw.
///
/// # Errors
/// [`Error::Draw`].
pub(super) fn trade_off(
    title: &str,
    across: &str,
    spots: &[Spot],
    sign: (f64, f64),
) -> Result<Option<String>> {
    let ends = |i: &Interval| [i.low, i.mean, i.high];
    let finite = |s: &&Spot| ends(&s.x).iter().chain(&ends(&s.y)).all(|v| v.is_finite());
    let spots: Vec<&Spot> = spots.iter().filter(finite).collect();
    let all = |of: fn(&Spot) -> Interval| -> Vec<f64> {
        spots.iter().flat_map(|s| ends(&of(s))).collect()
    };
    let (xs, ys) = (all(|s| s.x), all(|s| s.y));
    let (Some((x0, x1)), Some((y0, y1))) = (range(xs.iter()), range(ys.iter())) else {
        return Ok(None);
    };
    let (dx, dy) = (0.05 * (x1 - x0), 0.05 * (y1 - y0));
    draw(title, 300, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_right(28)
            .x_label_area_size(44)
            .y_label_area_size(62)
            .build_cartesian_2d(x0 - dx..x1 + dx, y0 - dy..y1 + dy)?;
        chart
            .configure_mesh()
            .disable_mesh()
            .axis_style(INK)
            .x_labels(5)
            .y_labels(6)
            .x_label_formatter(&label(false))
            .y_label_formatter(&label(false))
            .x_desc(across)
            .label_style(text())
            .axis_desc_style(text())
            .draw()?;
        chart.draw_series(LineSeries::new(
            frontier(&spots, sign),
            GRID.stroke_width(2),
        ))?;
        for spot in &spots {
            let (x, y, color) = (spot.x, spot.y, series_color(spot.color));
            let bars = [
                vec![(x.low, y.mean), (x.high, y.mean)],
                vec![(x.mean, y.low), (x.mean, y.high)],
            ];
            let bars = bars.map(|bar| PathElement::new(bar, color.stroke_width(1)));
            chart.draw_series(bars)?;
            let dot = Circle::new((x.mean, y.mean), 5, color.filled());
            chart.draw_series(std::iter::once(dot))?;
        }
        Ok(())
    })
    .map(Some)
}

/// One arm in the plot of a metric's values.
pub(super) struct Strip<'a> {
    /// Which color of the style sheet.
    pub color: usize,
    /// The arm's label.
    pub label: &'a str,
    /// The values of all seeds.
    pub values: &'a [f64],
    /// Their mean with its interval.
    pub interval: Interval,
}

/// The values of all seeds, one row an arm, with mean and interval; `None` when there is nothing
/// finite to draw.
///
/// # Errors
/// [`Error::Draw`].
pub(super) fn strips(title: &str, strips: &[Strip]) -> Result<Option<String>> {
    let ends = |s: &Strip| {
        s.values
            .iter()
            .copied()
            .chain([s.interval.low, s.interval.high])
            .collect()
    };
    let all: Vec<f64> = strips
        .iter()
        .flat_map::<Vec<f64>, _>(ends)
        .filter(|v| v.is_finite())
        .collect();
    let Some((x0, x1)) = range(all.iter()) else {
        return Ok(None);
    };
    let margin = 0.05 * (x1 - x0);
    let rows = strips.len() as f64;
    let height = 52 + 46 * strips.len() as u32;
    draw(title, height, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_left(14)
            .margin_right(18)
            .x_label_area_size(30)
            .build_cartesian_2d(x0 - margin..x1 + margin, 0.0..rows)?;
        chart
            .configure_mesh()
            .disable_y_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(INK)
            .x_labels(5)
            .x_label_formatter(&label(false))
            .label_style(text())
            .draw()?;
        for (row, strip) in strips.iter().enumerate() {
            let y = rows - row as f64 - 0.72;
            let color = series_color(strip.color);
            let name = text().pos(Pos::new(HPos::Left, VPos::Top));
            let place = (x0 - margin, rows - row as f64 - 0.06);
            chart.draw_series(std::iter::once(Text::new(
                strip.label.to_string(),
                place,
                name,
            )))?;
            let Interval { mean, low, high } = strip.interval;
            if [mean, low, high].iter().all(|v| v.is_finite()) {
                let bar = PathElement::new(vec![(low, y), (high, y)], color.stroke_width(2));
                chart.draw_series(std::iter::once(bar))?;
                let tick = vec![(mean, y - 0.2), (mean, y + 0.2)];
                chart.draw_series(std::iter::once(PathElement::new(
                    tick,
                    color.stroke_width(3),
                )))?;
            }
            let finite = strip.values.iter().copied().filter(|v| v.is_finite());
            chart.draw_series(finite.map(|v| Circle::new((v, y), 5, color.mix(0.55).filled())))?;
        }
        Ok(())
    })
    .map(Some)
}

fn text() -> TextStyle<'static> {
    ("sans-serif", FONT).into_font().color(&INK)
}

/// The ends of some numbers, widened where they are one.
fn range<'a>(values: impl Iterator<Item = &'a f64>) -> Option<(f64, f64)> {
    let ends = values.fold(None, |ends: Option<(f64, f64)>, v| match ends {
        None => Some((*v, *v)),
        Some((low, high)) => Some((low.min(*v), high.max(*v))),
    });
    ends.map(|(low, high)| {
        let least = 1e-9 * low.abs().max(high.abs()).max(1e-3);
        if high - low > least {
            (low, high)
        } else {
            let half = (0.05 * low.abs()).max(1e-3);
            (low - half, high + half)
        }
    })
}

type Drawing<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = std::result::Result<(), Box<dyn std::error::Error>>;

fn draw(title: &str, height: u32, paint: impl FnOnce(&Drawing) -> Drawn) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, (WIDTH, height)).into_drawing_area();
        paint(&area).map_err(|e| Error::draw(title, e))?;
        area.present().map_err(|e| Error::draw(title, e))?;
    }
    Ok(finish(&svg, title, height))
}

/// Replaces the fixed size by a view box and the stand-in colors by CSS variables.
fn finish(svg: &str, title: &str, height: u32) -> String {
    let body = svg.find('>').map_or(svg, |end| &svg[end + 1..]);
    let mut body = body
        .replace("#020202", "var(--ink)")
        .replace("#030303", "var(--grid)");
    for index in 0..SERIES {
        body = body.replace(
            &format!("#0101{:02}", index + 1),
            &format!("var(--s{})", index + 1),
        );
    }
    let title = title
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('"', "&quot;");
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">{body}")
}
