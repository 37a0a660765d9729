//! Logos, histograms, fronts and maps as SVG.

use crate::scenario::{Picture, PictureFormat};
use std::collections::HashMap;

/// The letters with the colors that logos give them.
const LETTERS: [(char, &str); 4] = [
    ('A', "#228833"),
    ('C', "#4477aa"),
    ('G', "#cc8800"),
    ('T', "#cc3311"),
];

fn open(width: f64, height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\"><rect width=\"{width}\" \
         height=\"{height}\" fill=\"white\"/>"
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

/// Shares of the four letters at each position of sequences of one length.
fn shares(sequences: &[Vec<u8>]) -> Vec<[f64; 4]> {
    let length = sequences.first().map_or(0, Vec::len);
    let mut shares = vec![[0.0; 4]; length];
    for sequence in sequences {
        for (place, code) in shares.iter_mut().zip(sequence) {
            place[usize::from(*code)] += 1.0 / sequences.len() as f64;
        }
    }
    shares
}

/// Sequence logos below each other: at each position the letters, as high as their share of the bits
/// that the position tells.
pub(super) fn logos(caption: &str, rows: &[(String, Vec<Vec<u8>>)]) -> Picture {
    const WIDTH: f64 = 14.0;
    const HEIGHT: f64 = 50.0;
    const TITLE: f64 = 12.0;
    let longest = rows.iter().map(|(_, s)| s.first().map_or(0, Vec::len));
    let width = (longest.max().unwrap_or(0) as f64 * WIDTH).max(160.0);
    let mut svg = open(width, rows.len() as f64 * (HEIGHT + TITLE));
    for (k, (title, sequences)) in rows.iter().enumerate() {
        let top = k as f64 * (HEIGHT + TITLE);
        svg += &format!(
            "<text x=\"1\" y=\"{:.1}\" font-size=\"8\" font-family=\"sans-serif\">{title}</text>",
            top + 9.0
        );
        for (i, place) in shares(sequences).iter().enumerate() {
            let bits = 2.0
                + place
                    .iter()
                    .filter(|p| **p > 0.0)
                    .map(|p| p * p.log2())
                    .sum::<f64>();
            let mut order: Vec<usize> = (0..4).collect();
            order.sort_by(|a, b| place[*a].total_cmp(&place[*b]));
            let mut base = top + TITLE + HEIGHT;
            for letter in order {
                let height = place[letter] * bits / 2.0 * HEIGHT;
                if height < 0.3 {
                    continue;
                }
                // A monospaced capital of size 10 is about 6 wide and 7 high.
                let (name, color) = LETTERS[letter];
                svg += &format!(
                    "<text transform=\"translate({:.1} {base:.2}) scale({:.3} {:.4})\" font-family=\"monospace\" \
                     font-weight=\"bold\" font-size=\"10\" fill=\"{color}\">{name}</text>",
                    i as f64 * WIDTH,
                    WIDTH / 6.0,
                    height / 7.0
                );
                base -= height;
            }
        }
    }
    close(svg, caption)
}

/// For each sequence the window, with two letters on either side, that shares most letters with a
/// motif; the first of equals.
pub(super) fn sites(sequences: &[Vec<u32>], motif: &[u32]) -> Vec<Vec<u8>> {
    const FLANK: usize = 2;
    let width = motif.len() + 2 * FLANK;
    let site = |sequence: &Vec<u32>| -> Option<Vec<u8>> {
        let hits = |w: &[u32]| w[FLANK..].iter().zip(motif).filter(|(a, b)| a == b).count();
        let windows: Vec<&[u32]> = sequence.windows(width).collect();
        let most = windows.iter().map(|w| hits(w)).max()?;
        let best = windows.iter().find(|w| hits(w) == most)?;
        Some(best.iter().map(|c| *c as u8).collect())
    };
    sequences.iter().filter_map(site).collect()
}

/// Histograms of numbers in `[0, 1]` below each other, each as high as its largest bar, with a line
/// at a number of interest.
pub(super) fn histograms(caption: &str, line: f64, rows: &[(&str, &[f64])]) -> Picture {
    const BINS: usize = 50;
    const WIDTH: f64 = 300.0;
    const HEIGHT: f64 = 50.0;
    const TITLE: f64 = 12.0;
    let mut svg = open(WIDTH, rows.len() as f64 * (HEIGHT + TITLE) + 12.0);
    for (k, (title, values)) in rows.iter().enumerate() {
        let bottom = (k + 1) as f64 * (HEIGHT + TITLE);
        let mut counts = [0usize; BINS];
        for value in *values {
            counts[((value * BINS as f64) as usize).min(BINS - 1)] += 1;
        }
        let largest = counts.iter().copied().max().unwrap_or(0).max(1) as f64;
        for (i, count) in counts.iter().enumerate().filter(|(_, c)| **c > 0) {
            let height = *count as f64 / largest * HEIGHT;
            let bin = WIDTH / BINS as f64;
            svg += &format!(
                "<rect x=\"{:.1}\" y=\"{:.2}\" width=\"{:.1}\" height=\"{height:.2}\" fill=\"#4477aa\"/>",
                i as f64 * bin,
                bottom - height,
                bin - 0.6
            );
        }
        let (x, top) = (line * WIDTH, bottom - HEIGHT);
        svg += &format!(
            "<line x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top:.1}\" y2=\"{bottom:.1}\" stroke=\"#cc3311\"/>\
             <text x=\"1\" y=\"{:.1}\" font-size=\"9\" font-family=\"sans-serif\">{title}</text>",
            top - 2.0
        );
    }
    let y = rows.len() as f64 * (HEIGHT + TITLE) + 10.0;
    svg += &format!(
        "<g font-size=\"9\" font-family=\"sans-serif\"><text x=\"1\" y=\"{y:.1}\">0</text><text x=\"{:.1}\" \
         y=\"{y:.1}\">1</text></g>",
        WIDTH - 7.0
    );
    close(svg, caption)
}

/// Points of two objectives with these names: found ones filled, those of the true front as rings.
pub(super) fn fronts(
    caption: &str,
    names: [&str; 2],
    found: &[Vec<f64>],
    front: &[Vec<f64>],
) -> Picture {
    const SIDE: f64 = 300.0;
    let axis = |k: usize| {
        let of = || found.iter().chain(front).map(move |p| p[k]);
        let (low, high) = (
            of().fold(f64::INFINITY, f64::min),
            of().fold(f64::NEG_INFINITY, f64::max),
        );
        (low, (high - low).max(1e-12))
    };
    let (x, y) = (axis(0), axis(1));
    let place = |p: &Vec<f64>| {
        let (across, up) = ((p[0] - x.0) / x.1, (p[1] - y.0) / y.1);
        (
            8.0 + (SIDE - 16.0) * across,
            SIDE - 8.0 - (SIDE - 28.0) * up,
        )
    };
    let mut svg = open(SIDE, SIDE + 14.0);
    for (axis, (name, (low, range))) in names.into_iter().zip([x, y]).enumerate() {
        let (place, arrow) = match axis {
            0 => (
                format!(
                    "x=\"{}\" y=\"{}\" text-anchor=\"end\"",
                    SIDE - 4.0,
                    SIDE + 9.0
                ),
                "\u{2192}",
            ),
            _ => ("x=\"4\" y=\"10\"".to_string(), "\u{2191}"),
        };
        svg += &format!(
            "<text {place} font-size=\"9\" font-family=\"sans-serif\">{name}, {low:.2} to {:.2} {arrow}</text>",
            low + range
        );
    }
    for (cx, cy) in found.iter().map(place) {
        svg += &format!(
            "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"2.6\" fill=\"#4477aa\" fill-opacity=\"0.5\"/>"
        );
    }
    for (cx, cy) in front.iter().map(place) {
        svg += &format!(
            "<circle cx=\"{cx:.1}\" cy=\"{cy:.1}\" r=\"4.5\" fill=\"none\" stroke=\"#cc3311\"/>"
        );
    }
    close(svg, caption)
}

/// Squares of `side * side` numbers beside each other, darker for larger; marked cells are outlined.
pub(super) fn heat_map(caption: &str, maps: &[&[f64]], side: usize, marks: &[bool]) -> Picture {
    let mut svg = open((maps.len() * (side + 1)) as f64, side as f64);
    for (k, map) in maps.iter().enumerate() {
        let largest = map.iter().copied().fold(1e-300, f64::max);
        for (i, value) in map.iter().enumerate() {
            let (x, y) = (k * (side + 1) + i / side, side - 1 - i % side);
            let shade = 255.0 - 225.0 * (value / largest).sqrt();
            let edge = match marks.get(i) {
                Some(true) => " stroke=\"#cc3311\" stroke-width=\"0.12\"",
                _ => "",
            };
            svg += &format!(
                "<rect x=\"{x}\" y=\"{y}\" width=\"0.9\" height=\"0.9\" fill=\"rgb({shade:.0},{shade:.0},255)\"{edge}/>"
            );
        }
    }
    close(svg, caption)
}

/// Two laws over the same few objects: bars up for the first, down for the second.
pub(super) fn mirrored(caption: &str, up: &[f64], down: &[f64]) -> Picture {
    const BAR: f64 = 3.0;
    let largest = up.iter().chain(down).copied().fold(1e-9, f64::max);
    let mut svg = open(4.0 + BAR * up.len() as f64, 84.0);
    for (k, (up, down)) in up.iter().zip(down).enumerate() {
        let (x, width) = (2.0 + BAR * k as f64, BAR - 1.0);
        let (up, down) = (40.0 * up / largest, 40.0 * down / largest);
        svg += &format!(
            "<rect x=\"{x:.1}\" y=\"{:.2}\" width=\"{width}\" height=\"{up:.2}\" fill=\"#4477aa\"/>\
             <rect x=\"{x:.1}\" y=\"42\" width=\"{width}\" height=\"{down:.2}\" fill=\"#999933\"/>",
            42.0 - up
        );
    }
    close(svg, caption)
}

/// The most frequent 6-letter words of sequences: what motifs look like.
pub(super) fn words(caption: &str, sequences: &[Vec<u32>]) -> Picture {
    let mut counts: HashMap<&[u32], usize> = HashMap::new();
    for word in sequences.iter().flat_map(|s| s.windows(6)) {
        *counts.entry(word).or_default() += 1;
    }
    let mut order: Vec<(&[u32], usize)> = counts.into_iter().collect();
    order.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(b.0)));
    let letters = |w: &[u32]| -> String { w.iter().map(|c| LETTERS[*c as usize].0).collect() };
    let lines = order
        .iter()
        .take(12)
        .map(|(w, n)| format!("{}  {n}\n", letters(w)));
    Picture {
        caption: caption.to_string(),
        format: PictureFormat::Text,
        bytes: lines.collect::<String>().into_bytes(),
    }
}
