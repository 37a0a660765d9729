//! The designer.

use super::table::dot;
use super::{Encoding, LinearHead, OfflineTable, SequenceFeatures};
use crate::error::check;
use crate::{Error, Result};
use candle_core::{DType, Tensor, Var};
use tensor_core::random::RandomStream;

/// Which losses count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Both.
    #[default]
    Bidirectional,
    /// The table predicts the design: the same as a fixed `gamma` of 1.
    Forward,
    /// The design predicts the table: the same as a fixed `gamma` of 0.
    Backward,
}

/// The weight of the forward loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Gamma {
    /// The same at every step.
    Fixed(f64),
    /// Starts at 1/2 and is learned by Adam with this rate, for each design by itself.
    Adaptive {
        /// The rate.
        lr: f64,
        /// Decays of Adam's moments.
        beta: (f64, f64),
    },
}

/// The step size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Eta {
    /// The same at every step.
    Fixed(f64),
    /// From the second step on, see [`AdaptiveEta`].
    Adaptive(AdaptiveEta),
}

/// A step size that is larger where a step raises a score: for any designer that moves along
/// `-eta D`, with the score's gradient at hand.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdaptiveEta {
    /// Where it starts from at every step.
    pub base: f64,
    /// How strongly the score moves it.
    pub rate: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Default for AdaptiveEta {
    fn default() -> Self {
        Self {
            base: 0.1,
            rate: 0.01,
            min: 1e-4,
            max: 0.5,
        }
    }
}

impl AdaptiveEta {
    /// `clip(base - rate (grad score . direction), min, max)`: stepping by `-eta direction` raises
    /// the score where the product is negative.
    pub fn eta(&self, score_gradient: &[f64], direction: &[f64]) -> f64 {
        let along = dot(score_gradient, direction);
        (self.base - self.rate * along).clamp(self.min, self.max)
    }

    fn validate(&self) -> Result<()> {
        check::positive("AdaptiveEta::base", self.base)?;
        check::non_negative("AdaptiveEta::rate", self.rate)?;
        let holds = self.min > 0.0 && self.min <= self.max && self.max.is_finite();
        check::require(
            holds,
            "AdaptiveEta::min",
            (self.min, self.max),
            "0 < min <= max",
        )
    }
}

/// The small noise of the logits that a start gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum StartNoise {
    /// One draw for all starts (the published code for DNA).
    #[default]
    Shared,
    /// A draw for each (the published code for proteins).
    Each,
}

/// Settings of [`Bidirectional`].
#[derive(Debug, Clone, PartialEq)]
pub struct DesignConfig {
    /// The target `y_h`, in standard deviations of the table above its mean.
    pub target: f64,
    /// Which losses count.
    pub mode: Mode,
    /// The weight of the forward loss; it is not read unless both losses count.
    pub gamma: Gamma,
    /// The step size.
    pub eta: Eta,
    /// Steps; the paper takes 100 for DNA and 25 for proteins.
    pub steps: usize,
    /// Noise of the starts.
    pub noise: StartNoise,
    /// Positions that keep their letter; empty for none.
    pub fixed: Vec<bool>,
    /// At most so many letters of a design differ from its start: those that the logits are surest
    /// about.
    pub max_edits: Option<usize>,
}

impl Default for DesignConfig {
    fn default() -> Self {
        Self {
            target: 10.0,
            mode: Mode::Bidirectional,
            gamma: Gamma::Adaptive {
                lr: 0.1,
                beta: (0.9, 0.999),
            },
            eta: Eta::Fixed(0.1),
            steps: 100,
            noise: StartNoise::Shared,
            fixed: vec![],
            max_edits: None,
        }
    }
}

impl DesignConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] that names the first bad one.
    pub fn validate(&self) -> Result<()> {
        let holds = self.target.is_finite();
        check::require(
            holds,
            "DesignConfig::target",
            self.target,
            "a finite number",
        )?;
        match self.gamma {
            Gamma::Fixed(gamma) => check::unit("DesignConfig::gamma", gamma)?,
            Gamma::Adaptive { lr, beta } => {
                check::positive("Gamma::lr", lr)?;
                let holds = (0.0..1.0).contains(&beta.0) && (0.0..1.0).contains(&beta.1);
                check::require(holds, "Gamma::beta", beta, "two numbers in [0, 1)")?;
            }
        }
        match self.eta {
            Eta::Fixed(eta) => check::positive("DesignConfig::eta", eta)?,
            Eta::Adaptive(eta) => eta.validate()?,
        }
        check::at_least("DesignConfig::steps", self.steps, 1)
    }

    fn adaptive(&self) -> bool {
        let gamma = matches!(self.gamma, Gamma::Adaptive { .. });
        (self.mode == Mode::Bidirectional && gamma) || matches!(self.eta, Eta::Adaptive(_))
    }
}

/// The losses of a design before a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Losses {
    /// The forward loss.
    pub forward: f64,
    /// The backward loss.
    pub backward: f64,
}

/// What [`Bidirectional::optimize`] gives; every list has an entry a start.
#[derive(Debug, Clone, PartialEq)]
pub struct DesignReport {
    /// The designs.
    pub sequences: Vec<Vec<u8>>,
    /// What the table's regression predicts for them, in the units of its scores.
    pub predicted: Vec<f64>,
    /// `gamma` of each step; where only one loss counts it is not read, and stays.
    pub gamma_history: Vec<Vec<f64>>,
    /// The step size of each step.
    pub eta_history: Vec<Vec<f64>>,
    /// The losses before each step.
    pub losses: Vec<Vec<Losses>>,
    /// Letters that differ from the start.
    pub distances: Vec<usize>,
    /// The logits before each step and after the last one, `[steps + 1][L A]`.
    pub logits: Vec<Vec<Vec<f64>>>,
}

/// Moments of Adam.
#[derive(Debug, Clone)]
struct Moments {
    m: Vec<f64>,
    v: Vec<f64>,
    beta: (f64, f64),
    step: i32,
}

impl Moments {
    fn new(len: usize, beta: (f64, f64)) -> Self {
        Self {
            m: vec![0.0; len],
            v: vec![0.0; len],
            beta,
            step: 0,
        }
    }

    /// Takes a gradient in, and gives the direction: corrected first moment over root of the second.
    fn direction(&mut self, gradient: &[f64]) -> Vec<f64> {
        self.step += 1;
        let (b1, b2) = self.beta;
        let (c1, c2) = (1.0 - b1.powi(self.step), 1.0 - b2.powi(self.step));
        let all = self.m.iter_mut().zip(&mut self.v).zip(gradient);
        all.map(|((m, v), g)| {
            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * g * g;
            (*m / c1) / ((*v / c2).sqrt() + 1e-8)
        })
        .collect()
    }
}

/// One design under way.
struct Design {
    start: Vec<u8>,
    logits: Vec<f64>,
    moments: Moments,
    gamma: f64,
    gamma_moments: Moments,
}

/// Gradients of a design in its logits.
pub(crate) struct Slopes {
    pub forward: Vec<f64>,
    pub backward: Vec<f64>,
    pub score: Vec<f64>,
}

/// The designer; see the [module](super) page.
pub struct Bidirectional<'a, F> {
    model: &'a F,
    table: OfflineTable,
    encoding: Encoding,
    heads: Vec<LinearHead>,
    config: DesignConfig,
}

impl<'a, F: SequenceFeatures> Bidirectional<'a, F> {
    /// A designer on a fitted table. `heads` are the auxiliary heads on the features whose score the
    /// adaptive options raise ([`OfflineTable::bootstrap_heads`] makes some); without an adaptive
    /// option they may be none.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`]; [`Error::Shape`] for heads of another width.
    pub fn new(
        model: &'a F,
        table: OfflineTable,
        encoding: Encoding,
        heads: Vec<LinearHead>,
        config: DesignConfig,
    ) -> Result<Self> {
        config.validate()?;
        encoding.validate()?;
        for head in &heads {
            table.fits(&head.weight)?;
        }
        if heads.is_empty() && config.adaptive() {
            let reason = "give at least one, or fix gamma and eta";
            return Err(Error::unsupported(
                "an adaptive option without an auxiliary head",
                reason,
            ));
        }
        Ok(Self {
            model,
            table,
            encoding,
            heads,
            config,
        })
    }

    /// Designs from starts, the best sequences of the table usually. Each design is a problem of its
    /// own: they share nothing but the passes of the model (and the noise, if it is shared).
    ///
    /// # Errors
    /// [`Error::Shape`] for starts of unequal length, [`Error::InvalidArgument`] for letters outside
    /// the alphabet or features that vanish, [`Error::NonFinite`]; those of the model.
    pub fn optimize(&self, starts: &[Vec<u8>], rng: &mut RandomStream) -> Result<DesignReport> {
        let size = self.encoding.check(starts)? * self.encoding.alphabet();
        let mut noise = vec![0.0; size];
        let mut logits = vec![];
        for (k, start) in starts.iter().enumerate() {
            if k == 0 || self.config.noise == StartNoise::Each {
                rng.fill_normal(&mut noise);
                noise.iter_mut().for_each(|z| *z *= 0.01);
            }
            logits.push(self.start_logits(start, &noise));
        }
        self.optimize_from(starts, logits)
    }

    /// The logits of a start: noise whose largest entry of each position sits at the start's letter.
    pub fn start_logits(&self, start: &[u8], noise: &[f64]) -> Vec<f64> {
        let mut logits = noise.to_vec();
        let rows = logits.chunks_mut(self.encoding.alphabet());
        for (row, letter) in rows.zip(start) {
            let largest = argmax(row);
            row.swap(largest, usize::from(*letter));
        }
        logits
    }

    /// [`optimize`](Self::optimize) from given logits `[L A]` of each start.
    ///
    /// # Errors
    /// As [`optimize`](Self::optimize).
    pub fn optimize_from(&self, starts: &[Vec<u8>], logits: Vec<Vec<f64>>) -> Result<DesignReport> {
        let length = self.encoding.check(starts)?;
        let size = length * self.encoding.alphabet();
        if logits.len() != starts.len() || logits.iter().any(|l| l.len() != size) {
            return Err(Error::shape(
                "logits",
                &[logits.len()],
                format!("{} of {size}", starts.len()),
            ));
        }
        let fixed = &self.config.fixed;
        if !fixed.is_empty() && fixed.len() != length {
            return Err(Error::shape(
                "DesignConfig::fixed",
                &[fixed.len()],
                format!("[{length}]"),
            ));
        }
        let begin = |(start, logits): (&Vec<u8>, Vec<f64>)| self.begin(start, logits);
        let mut designs: Vec<Design> = starts.iter().zip(logits).map(begin).collect();
        let n = designs.len();
        let mut report = DesignReport {
            sequences: vec![],
            predicted: vec![],
            gamma_history: vec![vec![]; n],
            eta_history: vec![vec![]; n],
            losses: vec![vec![]; n],
            distances: vec![],
            logits: designs.iter().map(|d| vec![d.logits.clone()]).collect(),
        };
        for step in 0..self.config.steps {
            let (losses, slopes) = self.slopes(&designs)?;
            for (i, (design, slopes)) in designs.iter_mut().zip(slopes).enumerate() {
                let (gamma, eta) = self.advance(design, &slopes, step);
                report.losses[i].push(losses[i]);
                report.gamma_history[i].push(gamma);
                report.eta_history[i].push(eta);
                report.logits[i].push(design.logits.clone());
            }
        }
        for design in &designs {
            let sequence = self.decode(design);
            let pairs = sequence.iter().zip(&design.start);
            report.distances.push(pairs.filter(|(a, b)| a != b).count());
            report.sequences.push(sequence);
        }
        let phi = self.encoding.features_of(self.model, &report.sequences)?;
        report.predicted = self.table.predict(&phi)?;
        Ok(report)
    }

    fn begin(&self, start: &[u8], logits: Vec<f64>) -> Design {
        let gamma = match self.config.gamma {
            Gamma::Fixed(gamma) => gamma,
            Gamma::Adaptive { .. } => 0.5,
        };
        let beta = match self.config.gamma {
            Gamma::Adaptive { beta, .. } => beta,
            Gamma::Fixed(_) => (0.9, 0.999),
        };
        Design {
            start: start.to_vec(),
            moments: Moments::new(logits.len(), (0.9, 0.999)),
            logits,
            gamma,
            gamma_moments: Moments::new(1, beta),
        }
    }

    /// The weight of the forward loss.
    fn weight(&self, design: &Design) -> f64 {
        match self.config.mode {
            Mode::Forward => 1.0,
            Mode::Backward => 0.0,
            Mode::Bidirectional => design.gamma,
        }
    }

    /// The scores of features `[B, d]` by the auxiliary heads, in the units of the table's.
    ///
    /// # Errors
    /// [`Error::Shape`] for features of another width.
    pub fn scores(&self, phi: &Tensor) -> Result<Vec<f64>> {
        let rows = phi.detach().to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let (mean, std) = self.table.moments();
        let one = |row: &Vec<f64>| {
            let row = self.table.fits(row)?;
            let heads = self.heads.iter().map(|h| dot(&h.weight, row) + h.bias);
            Ok(mean + std * heads.sum::<f64>() / self.heads.len() as f64)
        };
        rows.iter().map(one).collect()
    }

    /// The gradients at given logits.
    #[cfg(feature = "verify")]
    pub(crate) fn slopes_at(&self, start: &[u8], logits: &[f64]) -> Result<Slopes> {
        let (_, mut slopes) = self.slopes(&[self.begin(start, logits.to_vec())])?;
        Ok(slopes.swap_remove(0))
    }

    /// The features of all designs with their graph, and the variable they come from.
    fn features(&self, designs: &[Design]) -> Result<(Var, Tensor)> {
        let (dtype, device) = self.model.place();
        let a = self.encoding.alphabet();
        let flat: Vec<f64> = designs.iter().flat_map(|d| d.logits.clone()).collect();
        let length = flat.len() / designs.len() / a;
        let x = Tensor::from_vec(flat, (designs.len(), length, a), &device)?;
        let x = Var::from_tensor(&x.to_dtype(dtype)?)?;
        let phi = self
            .model
            .features(&self.encoding.straight_through(x.as_tensor())?)?;
        Ok((x, phi))
    }

    /// Losses and gradients of all designs: one forward pass, and a product with the Jacobian for
    /// each gradient that is needed.
    fn slopes(&self, designs: &[Design]) -> Result<(Vec<Losses>, Vec<Slopes>)> {
        let (x, phi) = self.features(designs)?;
        let rows = phi.detach().to_dtype(DType::F64)?.to_vec2::<f64>()?;
        let (mut losses, mut up) = (vec![], (vec![], vec![]));
        for row in &rows {
            let (forward, df) = self
                .table
                .forward_loss(self.table.fits(row)?, self.config.target);
            let (backward, db) = self.table.backward_loss(row, self.config.target)?;
            if !(forward.is_finite() && backward.is_finite()) {
                return Err(Error::non_finite("the loss of a design"));
            }
            losses.push(Losses { forward, backward });
            up.0.push(df);
            up.1.push(db);
        }
        let pull = |upstream: Vec<Vec<f64>>| -> Result<Vec<Vec<f64>>> {
            let upstream = Tensor::new(upstream, phi.device())?.to_dtype(phi.dtype())?;
            let grads = (&phi * upstream)?.sum_all()?.backward()?;
            let grad = grads.get(&x).ok_or_else(|| {
                let reason = "its first layer must be a product with the tokens";
                Error::unsupported("a model without a gradient in its tokens", reason)
            })?;
            Ok(grad
                .to_dtype(DType::F64)?
                .flatten_from(1)?
                .to_vec2::<f64>()?)
        };
        if !self.config.adaptive() {
            // Only the mixture moves the designs: one product is enough.
            let mix = |(design, (f, b)): (&Design, (&Vec<f64>, &Vec<f64>))| {
                mixed(self.weight(design), f, b)
            };
            let upstream = designs
                .iter()
                .zip(up.0.iter().zip(&up.1))
                .map(mix)
                .collect();
            let slopes = pull(upstream)?.into_iter().map(|g| Slopes {
                forward: g.clone(),
                backward: g,
                score: vec![],
            });
            return Ok((losses, slopes.collect()));
        }
        let head = self.mean_head();
        let (forward, backward) = (pull(up.0)?, pull(up.1)?);
        let score = pull(vec![head; designs.len()])?;
        let all = forward.into_iter().zip(backward).zip(score);
        let slopes = all.map(|((forward, backward), score)| Slopes {
            forward,
            backward,
            score,
        });
        Ok((losses, slopes.collect()))
    }

    /// The gradient of the auxiliary score in `phi`.
    fn mean_head(&self) -> Vec<f64> {
        let share = self.table.moments().1 / self.heads.len() as f64;
        let d = self.table.weights().len();
        (0..d)
            .map(|j| share * self.heads.iter().map(|h| h.weight[j]).sum::<f64>())
            .collect()
    }

    /// One step of a design; gives the `gamma` and the step size that it used.
    fn advance(&self, design: &mut Design, slopes: &Slopes, step: usize) -> (f64, f64) {
        let both = self.config.mode == Mode::Bidirectional;
        if let (true, Gamma::Adaptive { lr, .. }) = (both, self.config.gamma) {
            let gap: Vec<f64> = slopes
                .forward
                .iter()
                .zip(&slopes.backward)
                .map(|(f, b)| f - b)
                .collect();
            let along = lr * dot(&slopes.score, &gap);
            let direction = design.gamma_moments.direction(&[along])[0];
            design.gamma = (design.gamma - lr * direction).clamp(0.0, 1.0);
        }
        let mut gradient = match self.config.adaptive() {
            true => mixed(self.weight(design), &slopes.forward, &slopes.backward),
            false => slopes.forward.clone(),
        };
        let a = self.encoding.alphabet();
        for (row, _) in gradient
            .chunks_mut(a)
            .zip(&self.config.fixed)
            .filter(|(_, f)| **f)
        {
            row.fill(0.0);
        }
        let direction = design.moments.direction(&gradient);
        let eta = match self.config.eta {
            Eta::Fixed(eta) => eta,
            Eta::Adaptive(eta) if step == 0 => eta.base,
            Eta::Adaptive(eta) => eta.eta(&slopes.score, &direction),
        };
        design
            .logits
            .iter_mut()
            .zip(&direction)
            .for_each(|(x, d)| *x -= eta * d);
        (design.gamma, eta)
    }

    /// The most likely letters, within the number of edits that is allowed.
    fn decode(&self, design: &Design) -> Vec<u8> {
        let rows: Vec<&[f64]> = design.logits.chunks(self.encoding.alphabet()).collect();
        let mut sequence: Vec<u8> = rows.iter().map(|row| argmax(row) as u8).collect();
        let mut changed: Vec<usize> = (0..sequence.len())
            .filter(|i| sequence[*i] != design.start[*i])
            .collect();
        let Some(limit) = self.config.max_edits else {
            return sequence;
        };
        let sure = |i: &usize| {
            rows[*i][usize::from(sequence[*i])] - rows[*i][usize::from(design.start[*i])]
        };
        changed.sort_by(|i, j| sure(j).total_cmp(&sure(i)));
        for i in changed.into_iter().skip(limit) {
            sequence[i] = design.start[i];
        }
        sequence
    }
}

fn mixed(gamma: f64, forward: &[f64], backward: &[f64]) -> Vec<f64> {
    forward
        .iter()
        .zip(backward)
        .map(|(f, b)| gamma * f + (1.0 - gamma) * b)
        .collect()
}

fn argmax(row: &[f64]) -> usize {
    let better = |best: usize, (k, x): (usize, &f64)| if *x > row[best] { k } else { best };
    row.iter().enumerate().fold(0, better)
}
