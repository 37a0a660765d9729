//! How noise moves.

use super::numbers::{choose, column, row_dots, row_moments};
use super::NoiseOptimizer;
use crate::error::Error;
use crate::Result;
use candle_core::{Device, Tensor};
use flows::row_combination;
use tensor_core::checkpoint::State;

/// What optimizers remember.
#[derive(Default)]
pub(super) struct Update {
    first: Option<Tensor>,
    second: Option<Tensor>,
    steps: i32,
    /// Steps and changes of the gradient, newest last, with `1 / <s, y>` of the rows; 0 where a row has no
    /// such pair.
    pairs: Vec<(Tensor, Tensor, Vec<f64>)>,
}

/// What a step goes by.
pub(super) struct Pull<'t> {
    /// The noise.
    pub z: &'t Tensor,
    /// The gradient of the rewards there.
    pub g: &'t Tensor,
    /// The gradient of the regularizer is this multiple of the noise, row by row.
    pub along: &'t [f64],
    /// The largest norm of the sum of both.
    pub clip: f64,
    /// The learning rate.
    pub rate: f64,
    /// Rows that do not move any more.
    pub done: &'t [bool],
}

impl Update {
    /// The next noise by a step along the clipped gradient: the sums of the rows, and two passes over memory
    /// more for descent with momentum. A row without a finite gradient stays where it is, and its moments
    /// with it.
    pub(super) fn advance(&mut self, rule: NoiseOptimizer, pull: &Pull) -> Result<Tensor> {
        let z = pull.z;
        let sums = row_moments(z, pull.g)?;
        let squares = sums.iter().zip(pull.along);
        let squares: Vec<f64> = squares
            .map(|([zz, zg, gg], c)| match (gg + c).is_finite() {
                true => (gg + 2.0 * c * zg + c * c * zz).max(0.0),
                false => f64::NAN,
            })
            .collect();
        let held: Vec<bool> = squares.iter().map(|s| !s.is_finite()).collect();
        // Numbers for the rows that move; the others keep what they have.
        let each = |f: &dyn Fn(usize) -> f64| -> Vec<f64> {
            let one = |i: usize| if held[i] { 0.0 } else { f(i) };
            (0..held.len()).map(one).collect()
        };
        let factor = each(&|i| (pull.clip / (squares[i].sqrt() + 1e-6)).min(1.0));
        let along = each(&|i| factor[i] * pull.along[i]);
        let g = &choose(&held, &z.zeros_like()?, pull.g)?;
        let clipped = [(factor.as_slice(), g), (along.as_slice(), z)];
        match rule {
            NoiseOptimizer::Sgd { momentum, nesterov } => {
                let keep: Vec<f64> = held
                    .iter()
                    .map(|h| if *h { 1.0 } else { momentum })
                    .collect();
                let b = match &self.first {
                    Some(b) => row_combination(&[(&keep, b), clipped[0], clipped[1]])?,
                    None => row_combination(&clipped)?,
                };
                let moving = |c: &dyn Fn(usize) -> f64| -> Vec<f64> {
                    let still = |i: usize| held[i] || pull.done[i];
                    let one = |i: usize| if still(i) { 0.0 } else { -pull.rate * c(i) };
                    (0..held.len()).map(one).collect()
                };
                let next = match nesterov {
                    true => {
                        let on_z = moving(&|i| along[i]);
                        let on_z: Vec<f64> = on_z.into_iter().map(|c| 1.0 + c).collect();
                        let on_b = moving(&|_| momentum);
                        row_combination(&[(&on_z, z), (&moving(&|i| factor[i]), g), (&on_b, &b)])?
                    }
                    false => {
                        let ones = vec![1.0; held.len()];
                        row_combination(&[(&ones, z), (&moving(&|_| 1.0), &b)])?
                    }
                };
                self.first = Some(b);
                Ok(next)
            }
            NoiseOptimizer::Adam { eps } => {
                let change = self.adam(&row_combination(&clipped)?, (eps, pull.rate), &held)?;
                let next = (z - choose(&held, &z.zeros_like()?, &change)?)?;
                choose(pull.done, z, &next)
            }
            NoiseOptimizer::Lbfgs { .. } => Err(Error::unsupported(
                "a single clipped step of L-BFGS",
                "it makes its own steps",
            )),
        }
    }

    fn adam(&mut self, g: &Tensor, (eps, rate): (f64, f64), held: &[bool]) -> Result<Tensor> {
        const BETA1: f64 = 0.9;
        const BETA2: f64 = 0.999;
        let mix = |old: &Option<Tensor>, new: &Tensor, keep: f64| -> Result<Tensor> {
            let fresh = new.affine(1.0 - keep, 0.0)?;
            match old {
                Some(old) => choose(held, old, &(old.affine(keep, 0.0)? + fresh)?),
                None => Ok(fresh),
            }
        };
        self.steps += 1;
        let m = mix(&self.first, g, BETA1)?;
        let v = mix(&self.second, &g.sqr()?, BETA2)?;
        let grown = |beta: f64| 1.0 - beta.powi(self.steps);
        let root = v.affine(1.0 / grown(BETA2), 0.0)?.sqrt()?;
        let change = (m.affine(rate / grown(BETA1), 0.0)? / root.affine(1.0, eps)?)?;
        (self.first, self.second) = (Some(m.detach()), Some(v.detach()));
        Ok(change)
    }

    /// Whether each row remembers a pair.
    pub(super) fn curved(&self, rows: usize) -> Vec<bool> {
        let any = |i: usize| self.pairs.iter().any(|(_, _, inverse)| inverse[i] > 0.0);
        (0..rows).map(any).collect()
    }

    /// Adds everything to a state.
    pub(super) fn store(&self, state: &mut State) -> Result<()> {
        let steps = Tensor::new(&[f64::from(self.steps)], &Device::Cpu)?;
        state.insert("steps".into(), steps);
        let moments = [("first", &self.first), ("second", &self.second)];
        for (name, moment) in moments {
            if let Some(moment) = moment {
                state.insert(name.into(), moment.clone());
            }
        }
        for (i, (s, y, inverse)) in self.pairs.iter().enumerate() {
            state.insert(format!("pair{i}.s"), s.clone());
            state.insert(format!("pair{i}.y"), y.clone());
            let inverse = Tensor::new(inverse.as_slice(), &Device::Cpu)?;
            state.insert(format!("pair{i}.inverse"), inverse);
        }
        Ok(())
    }

    /// Reads it back; `tensor` and `values` look names up, of the noise's shape and of numbers.
    pub(super) fn read(
        tensor: &dyn Fn(&str) -> Result<Option<Tensor>>,
        values: &dyn Fn(&str) -> Result<Vec<f64>>,
    ) -> Result<Self> {
        let mut pairs = Vec::new();
        while let (Some(s), Some(y)) = (
            tensor(&format!("pair{}.s", pairs.len()))?,
            tensor(&format!("pair{}.y", pairs.len()))?,
        ) {
            let inverse = values(&format!("pair{}.inverse", pairs.len()))?;
            pairs.push((s, y, inverse));
        }
        Ok(Self {
            first: tensor("first")?,
            second: tensor("second")?,
            steps: values("steps")?.first().map_or(0, |n| *n as i32),
            pairs,
        })
    }

    /// `-H g` by the two loops over the remembered pairs.
    pub(super) fn two_loop(&self, g: &Tensor) -> Result<Tensor> {
        let mut q = g.clone();
        let mut factors = Vec::new();
        for (s, y, inverse) in self.pairs.iter().rev() {
            let a: Vec<f64> = row_dots(s, &q)?
                .iter()
                .zip(inverse)
                .map(|(d, r)| d * r)
                .collect();
            q = (&q - y.broadcast_mul(&column(a.clone(), &q)?)?)?;
            factors.push(a);
        }
        // The curvature of each row's newest pair; rows without one keep the plain gradient.
        let mut scale = vec![1.0; g.dims()[0]];
        for (_, y, inverse) in &self.pairs {
            for ((scale, r), yy) in scale.iter_mut().zip(inverse).zip(row_dots(y, y)?) {
                if *r > 0.0 {
                    *scale = 1.0 / (r * yy);
                }
            }
        }
        q = q.broadcast_mul(&column(scale, &q)?)?;
        for ((s, y, inverse), a) in self.pairs.iter().zip(factors.iter().rev()) {
            let b = row_dots(y, &q)?;
            let c: Vec<f64> = (0..a.len()).map(|i| a[i] - b[i] * inverse[i]).collect();
            q = (&q + s.broadcast_mul(&column(c, &q)?)?)?;
        }
        Ok(q.neg()?)
    }

    pub(super) fn remember(
        &mut self,
        next: &Tensor,
        z: &Tensor,
        next_g: &Tensor,
        g: &Tensor,
        history: usize,
    ) -> Result<()> {
        let (s, y) = ((next - z)?, (next_g - g)?);
        // A pair without positive curvature (or of a row that stayed) is left out for its row.
        let inverse = |d: &f64| {
            if d.is_finite() && *d > 1e-10 {
                1.0 / d
            } else {
                0.0
            }
        };
        let inverse: Vec<f64> = row_dots(&s, &y)?.iter().map(inverse).collect();
        let rows = inverse.len();
        self.pairs.push((s, y, inverse));
        // Every row forgets its own oldest pair; what no row uses any more is dropped.
        for i in 0..rows {
            let mut kept = 0;
            for (_, _, inverse) in self.pairs.iter_mut().rev() {
                kept += usize::from(inverse[i] > 0.0);
                if kept > history {
                    inverse[i] = 0.0;
                }
            }
        }
        self.pairs
            .retain(|(_, _, inverse)| inverse.iter().any(|r| *r > 0.0));
        Ok(())
    }
}
