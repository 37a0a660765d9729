//! Solvers whose steps are given.

use super::{add_scaled, check_call, evaluate, OdeField, OdeSolver, Solution, Times};
use crate::error::{check, Error, Result};
use crate::watch::{FiniteCheck, Watch};
use candle_core::Tensor;

/// An explicit Runge-Kutta method.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Tableau {
    /// Row `i` gives stage `i` from those before it.
    pub a: &'static [&'static [f64]],
    /// Weights of the stages.
    pub b: &'static [f64],
    /// Where in the step the stages are.
    pub c: &'static [f64],
}

const EULER: Tableau = Tableau {
    a: &[&[]],
    b: &[1.0],
    c: &[0.0],
};
const MIDPOINT: Tableau = Tableau {
    a: &[&[], &[0.5]],
    b: &[0.0, 1.0],
    c: &[0.0, 0.5],
};
const HEUN: Tableau = Tableau {
    a: &[&[], &[1.0]],
    b: &[0.5, 0.5],
    c: &[0.0, 1.0],
};
const RK4: Tableau = Tableau {
    a: &[&[], &[0.5], &[0.0, 0.5], &[0.0, 0.0, 1.0]],
    b: &[1.0 / 6.0, 1.0 / 3.0, 1.0 / 3.0, 1.0 / 6.0],
    c: &[0.0, 0.5, 0.5, 1.0],
};
pub(crate) const RK38: Tableau = Tableau {
    a: &[&[], &[1.0 / 3.0], &[-1.0 / 3.0, 1.0], &[1.0, -1.0, 1.0]],
    b: &[1.0 / 8.0, 3.0 / 8.0, 3.0 / 8.0, 1.0 / 8.0],
    c: &[0.0, 1.0 / 3.0, 2.0 / 3.0, 1.0],
};

/// How a step is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Method {
    /// The slope at the start.
    #[default]
    Euler,
    /// The slope in the middle.
    Midpoint,
    /// The mean of the slopes at both ends (the explicit trapezoid).
    Heun,
    /// The classical method of order 4.
    Rk4,
    /// The 3/8 rule of order 4, which torchdiffeq calls `rk4`.
    Rk38,
    /// Explicit Adams with the slopes of this many steps (2 to 4), begun with [`Method::Rk4`]; its
    /// weights follow the lengths of the steps.
    AdamsBashforth(usize),
}

impl Method {
    /// Stages of the method; for Adams-Bashforth those of its first steps.
    pub(crate) fn tableau(self) -> Tableau {
        match self {
            Self::Euler => EULER,
            Self::Midpoint => MIDPOINT,
            Self::Heun => HEUN,
            Self::Rk4 | Self::AdamsBashforth(_) => RK4,
            Self::Rk38 => RK38,
        }
    }
}

/// Weights by which Adams-Bashforth sums the slopes at `nodes` (newest first, the newest at the
/// start of the step) over a step of length `h`: the integrals of the Lagrange polynomials, by a
/// quadrature that is exact up to degree 3.
pub(crate) fn adams_weights(nodes: &[f64], h: f64) -> Vec<f64> {
    let point = |sign: f64| nodes[0] + 0.5 * h * (1.0 + sign / 3.0_f64.sqrt());
    let basis = |j: usize, t: f64| -> f64 {
        let others = nodes.iter().enumerate().filter(|(i, _)| *i != j);
        others
            .map(|(_, node)| (t - node) / (nodes[j] - node))
            .product()
    };
    (0..nodes.len())
        .map(|j| 0.5 * h * (basis(j, point(-1.0)) + basis(j, point(1.0))))
        .collect()
}

/// Where the steps are.
#[derive(Debug, Clone, PartialEq)]
pub enum Steps {
    /// So many steps of equal length.
    Uniform(usize),
    /// So many steps of equal length `(t1 - t0) / n` whose slopes are taken `eps` late, at
    /// `t0 + (t1 - t0) ((i / n) (1 - eps) + eps)`: the rule of the rectified-flow code.
    Late {
        /// Number of steps.
        steps: usize,
        /// How late, as a part of the whole interval.
        eps: f64,
    },
    /// These times, which must begin and end with those of the call and be monotone.
    At(Vec<f64>),
}

impl Steps {
    /// `(time of the slope, length)` of every step.
    fn list(&self, t0: f64, t1: f64) -> Result<Vec<(f64, f64)>> {
        let even = |n: usize, eps: f64| {
            check::at_least_one("Steps", n)?;
            let h = (t1 - t0) / n as f64;
            let at = move |i: usize| {
                let part = i as f64 / n as f64;
                t0 + (t1 - t0) * (part * (1.0 - eps) + eps)
            };
            Ok((0..n).map(|i| (at(i), h)).collect())
        };
        match self {
            Self::Uniform(n) => even(*n, 0.0),
            Self::Late { steps, eps } => {
                let holds = (0.0..1.0).contains(eps);
                check::require(holds, "Steps::Late", eps, "eps in [0, 1)")?;
                even(*steps, *eps)
            }
            Self::At(times) => {
                let ends = times.first() == Some(&t0) && times.last() == Some(&t1);
                let forward = times.windows(2).all(|w| w[0] < w[1]);
                let backward = times.windows(2).all(|w| w[0] > w[1]);
                if !ends || !(forward || backward) || times.len() < 2 {
                    let expected = format!("monotone times from {t0} to {t1}");
                    return Err(Error::argument("Steps::At", times, expected));
                }
                Ok(times.windows(2).map(|w| (w[0], w[1] - w[0])).collect())
            }
        }
    }
}

/// A method on given steps.
#[derive(Debug, Clone, PartialEq)]
pub struct FixedStep {
    /// How a step is made.
    pub method: Method,
    /// Where the steps are.
    pub steps: Steps,
    /// Whether all states are kept.
    pub record: bool,
    /// When states are looked at for NaN.
    pub check: FiniteCheck,
}

impl FixedStep {
    /// A method on steps of equal length.
    pub fn new(method: Method, steps: usize) -> Self {
        Self {
            method,
            steps: Steps::Uniform(steps),
            record: false,
            check: FiniteCheck::Auto,
        }
    }

    /// Euler's method.
    pub fn euler(steps: usize) -> Self {
        Self::new(Method::Euler, steps)
    }

    /// The midpoint method.
    pub fn midpoint(steps: usize) -> Self {
        Self::new(Method::Midpoint, steps)
    }

    /// Heun's method.
    pub fn heun(steps: usize) -> Self {
        Self::new(Method::Heun, steps)
    }

    /// The classical method of order 4.
    pub fn rk4(steps: usize) -> Self {
        Self::new(Method::Rk4, steps)
    }

    /// Keeps all states.
    #[must_use]
    pub fn recorded(self) -> Self {
        Self {
            record: true,
            ..self
        }
    }
}

impl OdeSolver for FixedStep {
    fn solve(&self, field: &dyn OdeField, x0: &Tensor, t0: f64, t1: f64) -> Result<Solution> {
        check_call(x0, t0, t1)?;
        let steps = self.steps.list(t0, t1)?;
        let mut x = x0.detach();
        let (mut nfe, mut times) = (0, vec![t0]);
        let mut trajectory = self.record.then(|| vec![x.clone()]);
        let mut history = History::new();
        let mut watch = Watch::new(self.check)?;
        for (i, (t, h)) in steps.iter().enumerate() {
            let (next, calls) = step(self.method, field, &x, *t, *h, &mut history)?;
            for (_, slope) in &mut history {
                *slope = slope.detach();
            }
            x = next.detach();
            watch.see(&x, i, || format!("the solution by {:?}", self.method))?;
            nfe += calls;
            times.push(if i + 1 == steps.len() {
                t1
            } else {
                times[i] + h
            });
            if let Some(states) = &mut trajectory {
                states.push(x.clone());
            }
        }
        watch.finish()?;
        Ok(Solution {
            x,
            nfe,
            times,
            trajectory,
            accepted: steps.len(),
            rejected: 0,
        })
    }
}

/// Slopes of earlier steps with their times, newest first.
pub(crate) type History = Vec<(f64, Tensor)>;

/// How many slopes an Adams method has; none for a Runge-Kutta method.
pub(crate) fn adams_order(method: Method) -> Result<Option<usize>> {
    match method {
        Method::AdamsBashforth(k) => {
            check::require(
                (2..=4).contains(&k),
                "Method::AdamsBashforth",
                k,
                "2, 3 or 4",
            )?;
            Ok(Some(k))
        }
        _ => Ok(None),
    }
}

/// One step, with the number of evaluations.
pub(crate) fn step(
    method: Method,
    field: &dyn OdeField,
    y: &Tensor,
    t: f64,
    h: f64,
    history: &mut History,
) -> Result<(Tensor, usize)> {
    let order = adams_order(method)?;
    if order.is_none_or(|k| history.len() + 1 < k) {
        let (stages, next) = runge_kutta(&method.tableau(), field, y, t, h)?;
        if order.is_some() {
            history.insert(0, (t, stages[0].clone()));
        }
        return Ok((next, stages.len()));
    }
    history.insert(0, (t, evaluate(field, y, &Times::Same(t))?));
    history.truncate(order.unwrap_or(1));
    let nodes: Vec<f64> = history.iter().map(|(t, _)| *t).collect();
    let weights = adams_weights(&nodes, h);
    let slopes = history.iter().map(|(_, slope)| slope);
    let terms: Vec<(f64, &Tensor)> = weights.into_iter().zip(slopes).collect();
    Ok((add_scaled(y, &terms)?, 1))
}

/// The slopes of the stages and the state after the step.
pub(crate) fn runge_kutta(
    tableau: &Tableau,
    field: &dyn OdeField,
    y: &Tensor,
    t: f64,
    h: f64,
) -> Result<(Vec<Tensor>, Tensor)> {
    let mut stages: Vec<Tensor> = Vec::new();
    for (row, c) in tableau.a.iter().zip(tableau.c) {
        let terms: Vec<(f64, &Tensor)> = row.iter().map(|a| h * a).zip(&stages).collect();
        let at = add_scaled(y, &terms)?;
        stages.push(evaluate(field, &at, &Times::Same(t + c * h))?);
    }
    let terms: Vec<(f64, &Tensor)> = tableau.b.iter().map(|b| h * b).zip(&stages).collect();
    let next = add_scaled(y, &terms)?;
    Ok((stages, next))
}
