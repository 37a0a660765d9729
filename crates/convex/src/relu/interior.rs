//! The (adversarial) convex program as a cone program for an interior-point method.

use super::{ConvexLoss, Data, Patterns};
use crate::{Error, Result};
use clarabel::algebra::CscMatrix;
use clarabel::solver::{DefaultSettings, DefaultSolver, IPSolver, SolverStatus, SupportedConeT};

/// What is solved.
pub(super) struct Program<'a> {
    pub data: &'a Data,
    pub patterns: &'a Patterns,
    pub loss: ConvexLoss,
    pub beta: f64,
    pub eps: f64,
    pub perturbed: &'a [bool],
}

/// Units, optimum and the solver's own lower bound.
pub(super) struct Solved {
    pub v: Vec<f64>,
    pub w: Vec<f64>,
    pub bound: f64,
    pub iterations: usize,
}

/// Rows `A x + s = b` with `s` in cones, as they are added.
#[derive(Default)]
struct Rows {
    i: Vec<usize>,
    j: Vec<usize>,
    a: Vec<f64>,
    b: Vec<f64>,
    cones: Vec<SupportedConeT<f64>>,
}

impl Rows {
    /// `s = constant + sum terms`, the next entry of the cone that is being filled.
    fn push(&mut self, terms: &[(usize, f64)], constant: f64) {
        for &(column, x) in terms {
            self.i.push(self.b.len());
            self.j.push(column);
            self.a.push(-x);
        }
        self.b.push(constant);
    }

    /// `constant + sum terms = 0`
    fn zero(&mut self, terms: &[(usize, f64)], constant: f64) {
        self.push(terms, constant);
        match self.cones.last_mut() {
            Some(SupportedConeT::ZeroConeT(n)) => *n += 1,
            _ => self.cones.push(SupportedConeT::ZeroConeT(1)),
        }
    }

    /// `constant + sum terms >= 0`
    fn non_negative(&mut self, terms: &[(usize, f64)], constant: f64) {
        self.push(terms, constant);
        match self.cones.last_mut() {
            Some(SupportedConeT::NonnegativeConeT(n)) => *n += 1,
            _ => self.cones.push(SupportedConeT::NonnegativeConeT(1)),
        }
    }
}

/// Where the variables are: units, their norms, absolute values (with perturbations only), outputs,
/// losses (where they are squares, their roots are the outputs less the targets, in the same place).
struct Places {
    d: usize,
    norms: usize,
    sizes: usize,
    sample_sizes: usize,
    outputs: usize,
    losses: usize,
    parts: usize,
    total: usize,
}

impl Places {
    fn new(p: &Program<'_>) -> Self {
        let (n, d, units) = (p.patterns.n, p.patterns.d, 2 * p.patterns.len());
        let robust = usize::from(p.eps > 0.0);
        let norms = units * d;
        let sizes = norms + units;
        let sample_sizes = sizes + robust * units * d;
        let outputs = sample_sizes + robust * n * d;
        let losses = outputs + if p.is_least_squares() { 0 } else { n };
        let parts = losses + n;
        let logistic = usize::from(p.loss == ConvexLoss::Logistic);
        Self {
            d,
            norms,
            sizes,
            sample_sizes,
            outputs,
            losses,
            parts,
            total: parts + logistic * 2 * n,
        }
    }
}

impl Program<'_> {
    /// Whether the losses are squares, which the solver takes as they are.
    fn is_least_squares(&self) -> bool {
        self.loss == ConvexLoss::Squared && self.eps == 0.0
    }
}

/// Solves to a gap and an infeasibility, absolute and relative, of `tol`.
pub(super) fn solve(program: &Program<'_>, tol: f64) -> Result<Solved> {
    let places = Places::new(program);
    let mut rows = Rows::default();
    outputs(program, &places, &mut rows);
    units(program, &places, &mut rows);
    if program.eps > 0.0 {
        sample_sizes(program, &places, &mut rows);
    }
    if places.losses != places.outputs {
        (0..program.patterns.n).for_each(|k| loss(program, &places, k, &mut rows));
    }
    let (n, total) = (program.patterns.n, places.total);
    let mut q = vec![0.0; total];
    q[places.norms..places.sizes].fill(program.beta);
    let weights = &program.data.weights;
    let squares: Vec<usize> = match program.loss {
        ConvexLoss::Squared => (places.losses..places.losses + n).collect(),
        _ => {
            (0..n).for_each(|k| q[places.losses + k] = weights[k] / n as f64);
            vec![]
        }
    };
    let curvature = weights[..squares.len()].to_vec();
    let p = CscMatrix::new_from_triplets(total, total, squares.clone(), squares, curvature);
    let a = CscMatrix::new_from_triplets(rows.b.len(), total, rows.i, rows.j, rows.a);
    let settings = DefaultSettings {
        verbose: false,
        tol_gap_abs: tol,
        tol_gap_rel: tol,
        tol_feas: tol,
        ..DefaultSettings::default()
    };
    let mut solver = DefaultSolver::new(&p, &q, &a, &rows.b, &rows.cones, settings)
        .map_err(|e| Error::numerical("setting up the cone program", e))?;
    solver.solve();
    let solution = &solver.solution;
    if !matches!(
        solution.status,
        SolverStatus::Solved | SolverStatus::AlmostSolved
    ) {
        return Err(Error::numerical(
            "the interior-point method",
            solution.status,
        ));
    }
    let half = program.patterns.len() * places.d;
    Ok(Solved {
        v: solution.x[..half].to_vec(),
        w: solution.x[half..2 * half].to_vec(),
        bound: solution.obj_val.min(solution.obj_val_dual),
        iterations: solution.iterations as usize,
    })
}

/// Each sample's output in a variable of its own: only these rows join the units, so that the solver
/// eliminates one unit after the other and is left with a system of as many rows as there are samples.
fn outputs(p: &Program<'_>, at: &Places, rows: &mut Rows) {
    for k in 0..p.patterns.n {
        let mut terms: Vec<(usize, f64)> = (0..at.d)
            .flat_map(|j| gated(p, at, k, j, -p.data.x[(k, j)]))
            .collect();
        terms.push((at.outputs + k, 1.0));
        let target = if at.losses == at.outputs {
            p.data.y[k]
        } else {
            0.0
        };
        rows.zero(&terms, target);
    }
}

/// Cones, norms and absolute values of the units.
fn units(p: &Program<'_>, at: &Places, rows: &mut Rows) {
    let (d, count) = (at.d, p.patterns.len());
    for unit in 0..2 * count {
        let column = &p.patterns.columns[unit % count];
        let sizes: Vec<(usize, f64)> = if p.eps > 0.0 {
            let perturbed = (0..d).filter(|&j| p.perturbed[j]);
            perturbed
                .map(|j| (at.sizes + unit * d + j, -p.eps))
                .collect()
        } else {
            vec![]
        };
        for (k, active) in column.iter().enumerate() {
            let sign = if *active { 1.0 } else { -1.0 };
            let score = (0..d).map(|j| (unit * d + j, sign * p.data.x[(k, j)]));
            let terms: Vec<(usize, f64)> = score.chain(sizes.iter().copied()).collect();
            rows.non_negative(&terms, 0.0);
        }
        if p.eps > 0.0 {
            for j in 0..d {
                let (x, size) = (unit * d + j, at.sizes + unit * d + j);
                rows.non_negative(&[(size, 1.0), (x, -1.0)], 0.0);
                rows.non_negative(&[(size, 1.0), (x, 1.0)], 0.0);
            }
        }
    }
    for unit in 0..2 * count {
        rows.push(&[(at.norms + unit, 1.0)], 0.0);
        (0..d).for_each(|j| rows.push(&[(unit * d + j, 1.0)], 0.0));
        rows.cones.push(SupportedConeT::SecondOrderConeT(d + 1));
    }
}

/// `Q_kj`, times a factor.
fn gated(p: &Program<'_>, at: &Places, k: usize, j: usize, factor: f64) -> Vec<(usize, f64)> {
    let count = p.patterns.len();
    let active = (0..count).filter(|&i| p.patterns.columns[i][k]);
    active
        .flat_map(|i| [(i * at.d + j, factor), ((count + i) * at.d + j, -factor)])
        .collect()
}

fn sample_sizes(p: &Program<'_>, at: &Places, rows: &mut Rows) {
    for k in 0..p.patterns.n {
        for j in 0..at.d {
            for sign in [1.0, -1.0] {
                let mut terms = gated(p, at, k, j, sign);
                terms.push((at.sample_sizes + k * at.d + j, 1.0));
                rows.non_negative(&terms, 0.0);
            }
        }
    }
}

/// The loss of sample `k` below its variable.
fn loss(p: &Program<'_>, at: &Places, k: usize, rows: &mut Rows) {
    let (y, own) = (p.data.y[k], at.losses + k);
    // `factor f_k + eps |Q_k|_1`, negated: the argument of the loss.
    let argument = |factor: f64| -> Vec<(usize, f64)> {
        let mut terms = vec![(at.outputs + k, -factor)];
        if p.eps > 0.0 {
            let perturbed = (0..at.d).filter(|&j| p.perturbed[j]);
            terms.extend(perturbed.map(|j| (at.sample_sizes + k * at.d + j, -p.eps)));
        }
        terms
    };
    match p.loss {
        ConvexLoss::Squared => {
            for sign in [1.0, -1.0] {
                let mut terms = argument(sign);
                terms.push((own, 1.0));
                rows.non_negative(&terms, sign * y);
            }
        }
        ConvexLoss::Hinge => {
            rows.non_negative(&[(own, 1.0)], 0.0);
            let mut terms = argument(-y);
            terms.push((own, 1.0));
            rows.non_negative(&terms, -1.0);
        }
        ConvexLoss::Logistic => {
            // exp(-h) + exp(z - h) <= 1
            let (first, second) = (at.parts + 2 * k, at.parts + 2 * k + 1);
            rows.non_negative(&[(first, -1.0), (second, -1.0)], 1.0);
            rows.push(&[(own, -1.0)], 0.0);
            rows.push(&[], 1.0);
            rows.push(&[(first, 1.0)], 0.0);
            rows.cones.push(SupportedConeT::ExponentialConeT());
            let mut terms: Vec<(usize, f64)> =
                argument(-y).into_iter().map(|(i, x)| (i, -x)).collect();
            terms.push((own, -1.0));
            rows.push(&terms, 0.0);
            rows.push(&[], 1.0);
            rows.push(&[(second, 1.0)], 0.0);
            rows.cones.push(SupportedConeT::ExponentialConeT());
        }
    }
}
