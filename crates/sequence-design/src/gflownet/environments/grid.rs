//! A grid whose coordinates only grow.

use super::super::Environment;
use crate::error::check;
use crate::{Error, Result};

/// Points `x` of `{0, .., side - 1}^ndim`; an action adds 1 to a coordinate, and every point may be
/// stopped at. The reward with modes near the corners is
///
/// ```text
/// R(x) = r0 + r1 prod_d 1[|x_d / (side - 1) - 1/2| > 1/4] + r2 prod_d 1[3/10 < |x_d / (side - 1) - 1/2| < 2/5]
/// ```
///
/// and with `cos` the smoother one of the same literature,
/// `r0 + r1 prod_d (cos(50 a_d) + 1) phi(5 a_d)` with `a_d = |x_d / (side - 1) - 1/2|` and the
/// standard normal density `phi`.
///
/// Features: one-hot coordinates, `ndim * side` numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct HyperGrid {
    /// Dimensions.
    pub ndim: usize,
    /// Points along each.
    pub side: usize,
    /// The reward everywhere.
    pub r0: f64,
    /// What the outer corners add.
    pub r1: f64,
    /// What the modes add.
    pub r2: f64,
    /// The smoother reward.
    pub cos: bool,
}

impl HyperGrid {
    /// A grid with `r0 = 0.1`, `r1 = 0.5`, `r2 = 2`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] without a dimension or with fewer than two points along it.
    pub fn new(ndim: usize, side: usize) -> Result<Self> {
        check::at_least("HyperGrid::ndim", ndim, 1)?;
        check::at_least("HyperGrid::side", side, 2)?;
        if side > usize::from(u16::MAX) {
            return Err(Error::config("HyperGrid::side", side, "at most 65535"));
        }
        Ok(Self {
            ndim,
            side,
            r0: 0.1,
            r1: 0.5,
            r2: 2.0,
            cos: false,
        })
    }

    /// The reward of a point.
    pub fn reward(&self, state: &[u16]) -> f64 {
        let away = |x: &u16| (f64::from(*x) / (self.side - 1) as f64 - 0.5).abs();
        if self.cos {
            let density = |a: f64| (-0.5 * a * a).exp() / std::f64::consts::TAU.sqrt();
            let factor = |a: f64| ((50.0 * a).cos() + 1.0) * density(5.0 * a);
            let product: f64 = state.iter().map(away).map(factor).product();
            return self.r0 + self.r1 * product;
        }
        let outer = state.iter().map(away).all(|a| a > 0.25);
        let mode = state.iter().map(away).all(|a| a > 0.3 && a < 0.4);
        self.r0 + f64::from(u8::from(outer)) * self.r1 + f64::from(u8::from(mode)) * self.r2
    }

    /// The row-major number of a point, dimension 0 most significant.
    pub fn index(&self, state: &[u16]) -> usize {
        state.iter().fold(0, |i, x| i * self.side + usize::from(*x))
    }

    /// The point in `[0, 1]^ndim`.
    pub fn unit(&self, state: &[u16]) -> Vec<f64> {
        let scale = (self.side - 1) as f64;
        state.iter().map(|x| f64::from(*x) / scale).collect()
    }
}

impl Environment for HyperGrid {
    type State = Vec<u16>;

    fn actions(&self) -> usize {
        self.ndim + 1
    }

    fn initial(&self) -> Vec<u16> {
        vec![0; self.ndim]
    }

    fn max_steps(&self) -> usize {
        self.ndim * (self.side - 1)
    }

    fn forward_mask(&self, state: &Vec<u16>, mask: &mut [bool]) {
        for (m, x) in mask.iter_mut().zip(state) {
            *m = usize::from(*x) + 1 < self.side;
        }
        mask[self.ndim] = true;
    }

    fn backward_mask(&self, state: &Vec<u16>, mask: &mut [bool]) {
        for (m, x) in mask.iter_mut().zip(state) {
            *m = *x > 0;
        }
    }

    fn step(&self, state: &mut Vec<u16>, action: usize) {
        state[action] += 1;
    }

    fn undo(&self, state: &mut Vec<u16>, action: usize) {
        state[action] -= 1;
    }

    fn feature_width(&self) -> usize {
        self.ndim * self.side
    }

    fn write_features(&self, state: &Vec<u16>, out: &mut [f32]) {
        for (d, x) in state.iter().enumerate() {
            out[d * self.side + usize::from(*x)] = 1.0;
        }
    }
}

/// Functions of the square `[-1, 1]^2`, scaled to about `[0, 1]`; all are maximized here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TestFunction {
    /// Branin's function, one minus its value over 308.13.
    Branin,
    /// Currin's exponential function over 13.77.
    Currin,
    /// Shubert's function at `-1.5 x`.
    Shubert,
    /// Beale's function over 38.8, as it is written.
    Beale,
    /// `(x^2 + y^2) / 2`.
    Sphere,
}

impl TestFunction {
    /// The value at a point of the square.
    pub fn at(self, x: f64, y: f64) -> f64 {
        use std::f64::consts::PI;
        match self {
            Self::Branin => {
                let (u, v) = (15.0 * (x / 2.0 + 0.5) - 5.0, 15.0 * (y / 2.0 + 0.5));
                let inner = v - 5.1 / (4.0 * PI * PI) * u * u + 5.0 / PI * u - 6.0;
                let wave = 10.0 * (1.0 - 1.0 / (8.0 * PI)) * u.cos();
                1.0 - (inner * inner + wave + 10.0) / 308.13
            }
            Self::Currin => {
                let (a, b) = (x / 2.0 + 0.5, y / 2.0 + 0.5);
                let factor = 1.0 - (-1.0 / (2.0 * b + 1e-10)).exp();
                let over = 2300.0 * a.powi(3) + 1900.0 * a * a + 2092.0 * a + 60.0;
                factor * over / (100.0 * a.powi(3) + 500.0 * a * a + 4.0 * a + 20.0) / 13.77
            }
            Self::Shubert => {
                let sum = |v: f64| {
                    let term = |k: f64| k * ((k + 1.0) * v + k).cos();
                    (1..=5).map(f64::from).map(term).sum::<f64>()
                };
                (sum(-1.5 * x) * sum(-1.5 * y) + 186.8) / 397.0
            }
            Self::Beale => {
                let part = |c: f64, k: i32| (c - x + x * y.powi(k)).powi(2);
                (part(1.5, 1) + part(2.25, 2) + part(2.625, 3)) / 38.8
            }
            Self::Sphere => (x * x + y * y) / 2.0,
        }
    }

    /// The value at a point of a grid with two dimensions; the grid spans the square.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a grid of another dimension.
    pub fn on(self, grid: &HyperGrid, state: &[u16]) -> Result<f64> {
        match grid.unit(state)[..] {
            [x, y] => Ok(self.at(2.0 * x - 1.0, 2.0 * y - 1.0)),
            _ => Err(Error::argument("grid", grid.ndim, "two dimensions")),
        }
    }
}
