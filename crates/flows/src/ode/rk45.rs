//! The adaptive method of Dormand and Prince, with the controller of SciPy's `solve_ivp`.

use super::{add_scaled, check_call, evaluate, OdeField, OdeSolver, Solution, Times};
use crate::combine::linear_combination;
use crate::error::{check, Error, Result};
use candle_core::{DType, Tensor};
use tensor_core::kernels::sum_squares;

const A: [&[f64]; 6] = [
    &[],
    &[1.0 / 5.0],
    &[3.0 / 40.0, 9.0 / 40.0],
    &[44.0 / 45.0, -56.0 / 15.0, 32.0 / 9.0],
    &[
        19372.0 / 6561.0,
        -25360.0 / 2187.0,
        64448.0 / 6561.0,
        -212.0 / 729.0,
    ],
    &[
        9017.0 / 3168.0,
        -355.0 / 33.0,
        46732.0 / 5247.0,
        49.0 / 176.0,
        -5103.0 / 18656.0,
    ],
];
const C: [f64; 6] = [0.0, 0.2, 0.3, 0.8, 8.0 / 9.0, 1.0];
const B: [f64; 6] = [
    35.0 / 384.0,
    0.0,
    500.0 / 1113.0,
    125.0 / 192.0,
    -2187.0 / 6784.0,
    11.0 / 84.0,
];
const E: [f64; 7] = [
    -71.0 / 57600.0,
    0.0,
    71.0 / 16695.0,
    -71.0 / 1920.0,
    17253.0 / 339200.0,
    -22.0 / 525.0,
    1.0 / 40.0,
];

/// Over what the error of a step is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ErrorNorm {
    /// The whole batch takes the same steps, as in SciPy and the paper's code: a sample's steps
    /// depend on which others share its batch.
    #[default]
    Global,
    /// Every row has steps of its own. Rows that have arrived wait, at the price of evaluating
    /// them on.
    PerSample,
}

/// The method of order 5 with an error estimate of order 4.
#[derive(Debug, Clone, PartialEq)]
pub struct Rk45 {
    /// Allowed error relative to the state.
    pub rtol: f64,
    /// Allowed absolute error.
    pub atol: f64,
    /// The longest step.
    pub max_step: f64,
    /// Over what the error is measured.
    pub norm: ErrorNorm,
    /// Steps tried before giving up.
    pub max_tries: usize,
    /// Whether all states are kept ([`ErrorNorm::Global`] only).
    pub record: bool,
}

impl Default for Rk45 {
    fn default() -> Self {
        Self {
            rtol: 1e-5,
            atol: 1e-5,
            max_step: f64::INFINITY,
            norm: ErrorNorm::Global,
            max_tries: 100_000,
            record: false,
        }
    }
}

impl Rk45 {
    /// One tolerance for both kinds of error.
    pub fn with_tolerance(tolerance: f64) -> Self {
        Self {
            rtol: tolerance,
            atol: tolerance,
            ..Self::default()
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`].
    pub fn validate(&self) -> Result<()> {
        check::non_negative("Rk45::rtol", self.rtol)?;
        check::positive("Rk45::atol", self.atol)?;
        let holds = self.max_step > 0.0;
        check::require(holds, "Rk45::max_step", self.max_step, "a number > 0")?;
        check::at_least_one("Rk45::max_tries", self.max_tries)?;
        let both = self.record && self.norm == ErrorNorm::PerSample;
        check::require(
            !both,
            "Rk45::record",
            true,
            "false where rows have their own steps",
        )
    }

    /// `atol + rtol max(|a|, |b|)`
    fn scale(&self, a: &Tensor, b: &Tensor) -> Result<Tensor> {
        Ok(a.abs()?.maximum(&b.abs()?)?.affine(self.rtol, self.atol)?)
    }

    /// The norm of `x / scale`: one for the batch or one per row.
    fn norms(&self, x: &Tensor, scale: &Tensor) -> Result<Vec<f64>> {
        let ratio = (x / scale)?;
        match self.norm {
            ErrorNorm::Global => {
                let count = ratio.elem_count().max(1) as f64;
                Ok(vec![(sum_squares(&ratio)? / count).sqrt()])
            }
            ErrorNorm::PerSample => {
                let rows = ratio.dims()[0];
                let flat = ratio.reshape((rows, ()))?.to_dtype(DType::F64)?;
                let mean = flat.sqr()?.mean(1)?.sqrt()?;
                Ok(mean.to_vec1()?)
            }
        }
    }
}

/// Times and lengths of the step in progress: one for the batch, or one per row.
struct Clock {
    t: Vec<f64>,
    h: Vec<f64>,
    per_row: bool,
}

impl Clock {
    fn times(&self, c: f64) -> Times {
        match self.per_row {
            true => Times::PerRow(self.t.iter().zip(&self.h).map(|(t, h)| t + c * h).collect()),
            false => Times::Same(self.t[0] + c * self.h[0]),
        }
    }

    /// `h * k`, with the step of each row.
    fn scaled(&self, k: &Tensor) -> Result<Tensor> {
        match self.per_row {
            true => Ok(k.broadcast_mul(&self.column(k, &self.h)?)?),
            false => Ok(k.affine(self.h[0], 0.0)?),
        }
    }

    fn column(&self, like: &Tensor, values: &[f64]) -> Result<Tensor> {
        let mut shape = vec![1; like.rank()];
        shape[0] = values.len();
        Ok(Tensor::from_slice(values, shape, like.device())?.to_dtype(like.dtype())?)
    }
}

impl OdeSolver for Rk45 {
    fn solve(&self, field: &dyn OdeField, x0: &Tensor, t0: f64, t1: f64) -> Result<Solution> {
        self.validate()?;
        check_call(x0, t0, t1)?;
        let nothing = x0.elem_count() == 0 || t0 == t1;
        let mut run = Running::new(x0, t0);
        if !nothing {
            run.begin(self, field, t0, t1)?;
            while run.lanes.iter().any(|lane| lane.t != t1) {
                run.advance(self, field, t1)?;
            }
        }
        if self.norm == ErrorNorm::PerSample {
            run.times = vec![t0, t1];
        }
        Ok(Solution {
            x: run.y,
            nfe: run.nfe,
            times: run.times,
            trajectory: self.record.then_some(run.states),
            accepted: run.accepted,
            rejected: run.rejected,
        })
    }
}

/// The progress of the batch, or of one row.
#[derive(Clone, Copy)]
struct Lane {
    t: f64,
    /// Length of the next step, positive.
    h: f64,
    /// Whether the last try was given up.
    rejected: bool,
}

struct Running {
    y: Tensor,
    /// The slope at `y`.
    k1: Option<Tensor>,
    lanes: Vec<Lane>,
    nfe: usize,
    tries: usize,
    accepted: usize,
    rejected: usize,
    times: Vec<f64>,
    states: Vec<Tensor>,
}

impl Running {
    fn new(x0: &Tensor, t0: f64) -> Self {
        let y = x0.detach();
        Self {
            states: vec![y.clone()],
            y,
            k1: None,
            lanes: Vec::new(),
            nfe: 0,
            tries: 0,
            accepted: 0,
            rejected: 0,
            times: vec![t0],
        }
    }

    /// The first slope and the first lengths (Hairer, Norsett, Wanner, II.4).
    fn begin(&mut self, cfg: &Rk45, field: &dyn OdeField, t0: f64, t1: f64) -> Result<()> {
        let (span, sign) = ((t1 - t0).abs(), (t1 - t0).signum());
        let per_row = cfg.norm == ErrorNorm::PerSample;
        let f0 = evaluate(field, &self.y, &Times::Same(t0))?.detach();
        let scale = cfg.scale(&self.y, &self.y)?;
        let d0 = cfg.norms(&self.y, &scale)?;
        let d1 = cfg.norms(&f0, &scale)?;
        let first = |(d0, d1): (&f64, &f64)| match *d0 < 1e-5 || *d1 < 1e-5 {
            true => 1e-6_f64.min(span),
            false => (0.01 * d0 / d1).min(span),
        };
        let h0: Vec<f64> = d0.iter().zip(&d1).map(first).collect();
        let clock = Clock {
            t: vec![t0; h0.len()],
            h: h0.iter().map(|h| sign * h).collect(),
            per_row,
        };
        let y1 = (&self.y + clock.scaled(&f0)?)?;
        let f1 = evaluate(field, &y1, &clock.times(1.0))?.detach();
        let difference = cfg.norms(&(f1 - &f0)?, &scale)?;
        self.nfe = 2;
        self.k1 = Some(f0);
        for ((h0, d1), difference) in h0.iter().zip(&d1).zip(&difference) {
            let d2 = difference / h0;
            let h1 = match *d1 <= 1e-15 && d2 <= 1e-15 {
                true => (h0 * 1e-3).max(1e-6),
                false => (0.01 / d1.max(d2)).powf(0.2),
            };
            self.lanes.push(Lane {
                t: t0,
                h: (100.0 * h0).min(h1).min(span).min(cfg.max_step),
                rejected: false,
            });
        }
        Ok(())
    }

    /// One try of a step.
    fn advance(&mut self, cfg: &Rk45, field: &dyn OdeField, t1: f64) -> Result<()> {
        self.tries += 1;
        let stop = |t: f64, reason: String| Error::Solver {
            solver: "Rk45",
            t,
            reason,
        };
        if self.tries > cfg.max_tries {
            let reason = format!("{} steps tried", cfg.max_tries);
            return Err(stop(self.lanes[0].t, reason));
        }
        let mut ends = Vec::new();
        for lane in &mut self.lanes {
            let (end, smallest) = plan(lane, t1, cfg.max_step);
            if lane.h < smallest {
                let reason = format!("a step of {} is below the resolution of t", lane.h);
                return Err(stop(lane.t, reason));
            }
            ends.push(end);
        }
        let clock = Clock {
            t: self.lanes.iter().map(|l| l.t).collect(),
            h: ends.iter().zip(&self.lanes).map(|(e, l)| e - l.t).collect(),
            per_row: cfg.norm == ErrorNorm::PerSample,
        };
        let k1 = match &self.k1 {
            Some(k1) => k1.clone(),
            None => evaluate(field, &self.y, &clock.times(0.0))?.detach(),
        };
        let (y, k7, error) = try_step(field, &self.y, k1.clone(), &clock)?;
        self.nfe += 6;
        let scale = cfg.scale(&self.y, &y)?;
        let norms = cfg.norms(&error, &scale)?;
        let mut taken = Vec::new();
        for ((lane, end), norm) in self.lanes.iter_mut().zip(&ends).zip(&norms) {
            let waiting = lane.t == t1;
            // NaN is no success.
            let success = *norm < 1.0;
            if waiting {
            } else if success {
                let grow = match *norm == 0.0 {
                    true => 10.0,
                    false => (0.9 * norm.powf(-0.2)).min(10.0),
                };
                let length = (end - lane.t).abs();
                lane.h = length * if lane.rejected { grow.min(1.0) } else { grow };
                lane.t = *end;
                lane.rejected = false;
                self.accepted += 1;
            } else {
                lane.h = (end - lane.t).abs() * (0.9 * norm.powf(-0.2)).max(0.2);
                lane.rejected = true;
                self.rejected += 1;
            }
            taken.push(success && !waiting);
        }
        self.keep(&taken, y, k7, k1)?;
        if taken == [true] && cfg.norm == ErrorNorm::Global {
            self.times.push(self.lanes[0].t);
            if cfg.record {
                self.states.push(self.y.clone());
            }
        }
        Ok(())
    }

    /// Takes over the rows whose step succeeded.
    fn keep(&mut self, taken: &[bool], y: Tensor, k7: Tensor, k1: Tensor) -> Result<()> {
        let all = taken.iter().all(|t| *t);
        let none = !taken.iter().any(|t| *t);
        (self.y, self.k1) = if all {
            (y, Some(k7))
        } else if none {
            (self.y.clone(), Some(k1))
        } else {
            let flags: Vec<u8> = taken.iter().map(|t| u8::from(*t)).collect();
            let mut shape = vec![1; y.rank()];
            shape[0] = flags.len();
            let mask = Tensor::from_vec(flags, shape, y.device())?.broadcast_as(y.shape())?;
            (
                mask.where_cond(&y, &self.y)?,
                Some(mask.where_cond(&k7, &k1)?),
            )
        };
        Ok(())
    }
}

/// The end of a lane's next step and the smallest step that time resolves.
fn plan(lane: &mut Lane, t1: f64, max_step: f64) -> (f64, f64) {
    if lane.t == t1 {
        return (t1, 0.0);
    }
    let sign = (t1 - lane.t).signum();
    let next = if sign > 0.0 {
        lane.t.next_up()
    } else {
        lane.t.next_down()
    };
    let smallest = 10.0 * (next - lane.t).abs();
    lane.h = lane.h.min(max_step);
    if !lane.rejected {
        lane.h = lane.h.max(smallest);
    }
    let end = lane.t + sign * lane.h;
    let end = if sign * (end - t1) > 0.0 { t1 } else { end };
    (end, smallest)
}

/// The state after the step, its slope, and the error of the step.
fn try_step(
    field: &dyn OdeField,
    y: &Tensor,
    k1: Tensor,
    clock: &Clock,
) -> Result<(Tensor, Tensor, Tensor)> {
    // Slopes times the step.
    let mut k = vec![clock.scaled(&k1)?];
    for (row, c) in A.iter().zip(C).skip(1) {
        let terms: Vec<(f64, &Tensor)> = row.iter().copied().zip(&k).collect();
        let at = add_scaled(y, &terms)?;
        let slope = evaluate(field, &at, &clock.times(c))?.detach();
        k.push(clock.scaled(&slope)?);
    }
    let terms: Vec<(f64, &Tensor)> = B.iter().copied().zip(&k).collect();
    let next = add_scaled(y, &terms)?.detach();
    let k7 = evaluate(field, &next, &clock.times(1.0))?.detach();
    k.push(clock.scaled(&k7)?);
    let terms = E.iter().copied().zip(&k).filter(|(e, _)| *e != 0.0);
    let error = linear_combination(&terms.collect::<Vec<_>>())?;
    Ok((next, k7, error))
}
