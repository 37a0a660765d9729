//! Scores of all DNA 8-mers by a made-up transcription factor: the shape of a protein-binding
//! microarray without its measurements.
//!
//! The factor has a motif of seven letters with a cost for each wrong one, more in the middle, and
//! costs of neighbors that stand together. It binds wherever the motif fits, on either strand, also
//! where up to two of its letters hang over an end (they cost the mean of their place):
//!
//! ```text
//! A(x) = log sum over strands and places of exp(-cost),    o = 1 / (1 + exp(t - A))
//! s(x) = 0.3 log(1 + exp(A - t)) + 0.1 (1 - 0.8 o) triplets(x) + 0.065 (1 - 0.97 o) noise
//! ```
//!
//! with `t` the 0.9 quantile of `A`, a preference for triplets of letters wherever they stand, and
//! noise that both strands share. Measured scores are ranks among probes, so that those of different
//! factors have nearly the same distribution; here ranks of `s` are mapped to it. What the numbers
//! were chosen by are the tables that [`load::tfbind`](crate::load::tfbind) reads, of nine factors:
//! quantiles, correlations between neighbors, local maxima. No method's results were looked at.
//!
//! ```
//! use thalweg_datasets::generate::binding_table;
//! use thalweg_datasets::RandomStream;
//!
//! let table = binding_table(&mut RandomStream::new(1))?;
//! assert_eq!(table.scores.len(), 65_536);
//! assert!(table.scores.iter().all(|s| (0.0..=1.0).contains(s)));
//! # Ok::<(), thalweg_datasets::Error>(())
//! ```

use crate::load::tfbind::{BindingTable, LENGTH};
use crate::Result;
use tensor_core::random::RandomStream;

/// Letters of the motif.
const WIDTH: usize = 7;
/// Letters of it that may hang over an end.
const OVERHANG: usize = 2;

/// Quantiles of scores between 0 and 1, about the middle of those of nine measured factors.
const QUANTILES: [(f64, f64); 11] = [
    (0.0, 0.0),
    (0.01, 0.139),
    (0.05, 0.209),
    (0.25, 0.337),
    (0.5, 0.44),
    (0.75, 0.573),
    (0.9, 0.707),
    (0.95, 0.785),
    (0.99, 0.92),
    (0.999, 0.985),
    (1.0, 1.0),
];

type Sequence = [u8; LENGTH];

struct Factor {
    /// The cost of each letter at each place of the motif; 0 for the best.
    letters: [[f64; 4]; WIDTH],
    /// What two neighbors cost together; 0 for the best two.
    pairs: [[[f64; 4]; 4]; WIDTH - 1],
    /// How much each triplet is liked.
    triplets: [f64; 64],
}

impl Factor {
    fn new(rng: &mut RandomStream) -> Result<Self> {
        let mut factor = Self {
            letters: [[0.0; 4]; WIDTH],
            pairs: [[[0.0; 4]; 4]; WIDTH - 1],
            triplets: [0.0; 64],
        };
        let mut best = [0; WIDTH];
        let middle = (WIDTH - 1) as f64 / 2.0;
        for (j, costs) in factor.letters.iter_mut().enumerate() {
            best[j] = rng.below(4)?;
            let weight = 2.0 * (1.4 - 0.8 * (j as f64 - middle).abs() / middle);
            costs
                .iter_mut()
                .for_each(|c| *c = weight * (0.4 + 1.2 * rng.next_uniform()));
            costs[best[j]] = 0.0;
        }
        for (j, costs) in factor.pairs.iter_mut().enumerate() {
            costs
                .iter_mut()
                .flatten()
                .for_each(|c| *c = 0.5 * rng.next_normal());
            costs[best[j]][best[j + 1]] = 0.0;
        }
        let mut likes = [0.0; 64];
        rng.fill_normal(&mut likes);
        for (k, like) in factor.triplets.iter_mut().enumerate() {
            let (a, b, c) = (k / 16, k / 4 % 4, k % 4);
            *like = likes[k] + likes[16 * (3 - c) + 4 * (3 - b) + 3 - a];
        }
        Ok(factor)
    }

    /// The cost of the motif with its first letter at `place`, which may lie before the sequence.
    fn cost(&self, sequence: &Sequence, place: isize) -> f64 {
        let at = |j: usize| {
            let i = usize::try_from(place + j as isize).ok()?;
            sequence.get(i).map(|c| usize::from(*c))
        };
        let one = |j: usize| match (at(j), at(j + 1)) {
            (None, _) => self.letters[j].iter().sum::<f64>() / 4.0,
            (Some(a), Some(b)) if j + 1 < WIDTH => self.letters[j][a] + self.pairs[j][a][b],
            (Some(a), _) => self.letters[j][a],
        };
        (0..WIDTH).map(one).sum()
    }

    fn affinity(&self, strands: &[Sequence; 2]) -> f64 {
        let first = -(OVERHANG as isize);
        let last = (LENGTH + OVERHANG - WIDTH) as isize;
        let places = || (first..=last).flat_map(|place| strands.iter().map(move |s| (s, place)));
        places()
            .map(|(s, place)| (-self.cost(s, place)).exp())
            .sum::<f64>()
            .ln()
    }

    fn liking(&self, sequence: &Sequence) -> f64 {
        let number = |w: &[u8]| w.iter().fold(0, |k, c| 4 * k + usize::from(*c));
        sequence.windows(3).map(|w| self.triplets[number(w)]).sum()
    }
}

/// Scores between 0 and 1 of all DNA 8-mers by a made-up factor; see the [module](self) page. Both
/// strands have one score.
///
/// # Errors
/// Those of the stream.
pub fn binding_table(rng: &mut RandomStream) -> Result<BindingTable> {
    let factor = Factor::new(rng)?;
    let (mut strands, mut affinity, mut liking) = (vec![], vec![], vec![]);
    for code in 0u32..1 << (2 * LENGTH) {
        let sequence: Sequence = std::array::from_fn(|i| (code >> (14 - 2 * i) & 3) as u8);
        let mut other = sequence.map(|c| 3 - c);
        other.reverse();
        if other < sequence {
            continue;
        }
        strands.push([sequence, other]);
        affinity.push(factor.affinity(&[sequence, other]));
        liking.push(factor.liking(&sequence));
    }
    let n = strands.len();
    let mean = liking.iter().sum::<f64>() / n as f64;
    let std = (liking.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n as f64).sqrt();
    let mut sorted = affinity.clone();
    sorted.sort_by(f64::total_cmp);
    let threshold = sorted[n * 9 / 10];
    let mut noise = vec![0.0; n];
    rng.fill_normal(&mut noise);
    let raw = |i: usize| {
        let above = affinity[i] - threshold;
        let occupied = 1.0 / (1.0 + (-above).exp());
        0.3 * above.exp().ln_1p()
            + 0.1 * (1.0 - 0.8 * occupied) * (liking[i] - mean) / std
            + 0.065 * (1.0 - 0.97 * occupied) * noise[i]
    };
    let raw: Vec<f64> = (0..n).map(raw).collect();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|a, b| raw[*a].total_cmp(&raw[*b]));
    let mut scores = vec![0.0; n];
    for (rank, i) in order.into_iter().enumerate() {
        scores[i] = quantile(rank as f64 / (n - 1) as f64);
    }
    let mut table = BindingTable::default();
    for ([first, second], score) in strands.into_iter().zip(scores) {
        table.sequences.push(first);
        table.scores.push(score);
        if second != first {
            table.sequences.push(second);
            table.scores.push(score);
        }
    }
    Ok(table)
}

/// The score of a rank, by linear interpolation.
fn quantile(q: f64) -> f64 {
    let k = QUANTILES.iter().skip(1).position(|(at, _)| q <= *at);
    let k = k.unwrap_or(QUANTILES.len() - 2);
    let ((q0, s0), (q1, s1)) = (QUANTILES[k], QUANTILES[k + 1]);
    s0 + (s1 - s0) * (q - q0) / (q1 - q0)
}
