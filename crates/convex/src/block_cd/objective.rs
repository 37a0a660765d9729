//! Smooth convex objectives that know their blocks.

use super::columns::Columns;
use super::tree::Graph;
use super::Penalty;
use crate::error::check;
use crate::linalg::{axpy, dot, largest_eigenvalue};
use crate::{Error, Result};
use faer::Mat;
use rayon::prelude::*;

/// A smooth convex function at a point that moves by blocks. It keeps what makes a block's gradient
/// cheap (`A x`, say), so it is mutable.
pub trait SmoothObjective: Sync {
    /// Number of coordinates.
    fn dim(&self) -> usize;

    /// Moves to `x` and computes afresh what is kept, which takes out accumulated rounding.
    fn reset(&mut self, x: &[f64]);

    /// The point.
    fn point(&self) -> &[f64];

    /// Adds `delta` to the coordinates of `block`.
    fn update(&mut self, block: &[usize], delta: &[f64]);

    /// `f(x)`
    fn value(&self) -> f64;

    /// `f` where `delta` were added to the coordinates of `block`.
    fn value_moved(&self, block: &[usize], delta: &[f64]) -> f64;

    /// The whole gradient.
    fn grad(&self) -> Vec<f64>;

    /// The gradient of a block.
    fn grad_block(&self, block: &[usize]) -> Vec<f64>;

    /// The Hessian of a block.
    fn hess_block(&self, block: &[usize]) -> Mat<f64>;

    /// A matrix `H_b` that no Hessian of the block exceeds.
    fn bound_block(&self, block: &[usize]) -> Mat<f64>;

    /// Column `i` of that matrix for all coordinates.
    fn bound_column(&self, i: usize) -> Vec<f64>;

    /// The Lipschitz constant `L_i` of each coordinate.
    fn coord_lipschitz(&self) -> &[f64];

    /// `L_b`, the largest eigenvalue of `H_b`.
    ///
    /// # Errors
    /// Those of the eigenvalue decomposition.
    fn block_lipschitz(&self, block: &[usize]) -> Result<f64> {
        largest_eigenvalue(self.bound_block(block).as_ref())
    }

    /// `sum_j |H_ij|` of each coordinate.
    fn bound_row_sums(&self) -> Vec<f64> {
        let sum = |i| self.bound_column(i).iter().map(|x| x.abs()).sum();
        (0..self.dim()).into_par_iter().map(sum).collect()
    }

    /// The graph of a quadratic's matrix, where trees can be solved along it.
    fn graph(&self) -> Option<&Graph> {
        None
    }

    /// The distance of `f + g` to a lower bound of its minimum, where one is known, from the whole
    /// gradient.
    fn duality_gap(&self, _penalty: &Penalty, _grad: &[f64]) -> Option<f64> {
        None
    }
}

fn scaled(mut matrix: Mat<f64>, factor: f64) -> Mat<f64> {
    for j in 0..matrix.ncols() {
        for i in 0..matrix.nrows() {
            matrix[(i, j)] *= factor;
        }
    }
    matrix
}

fn move_point(x: &mut [f64], block: &[usize], delta: &[f64]) {
    for (&i, d) in block.iter().zip(delta) {
        x[i] += d;
    }
}

/// `1/2 |A x - b|^2`
#[derive(Debug, Clone)]
pub struct LeastSquares {
    a: Columns,
    b: Vec<f64>,
    x: Vec<f64>,
    residual: Vec<f64>,
    lipschitz: Vec<f64>,
}

impl LeastSquares {
    /// From a matrix `[n, p]` and `n` targets; starts at 0.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::NonFinite`].
    pub fn new(a: Columns, b: &[f64]) -> Result<Self> {
        check::length("b", b.len(), a.rows())?;
        check::finite("b", b)?;
        let lipschitz = (0..a.columns()).map(|j| a.product(j, j, None)).collect();
        Ok(Self {
            x: vec![0.0; a.columns()],
            residual: b.iter().map(|b| -b).collect(),
            b: b.to_vec(),
            lipschitz,
            a,
        })
    }
}

impl SmoothObjective for LeastSquares {
    fn dim(&self) -> usize {
        self.a.columns()
    }

    fn reset(&mut self, x: &[f64]) {
        self.x = x.to_vec();
        self.residual = self.a.times(x);
        axpy(-1.0, &self.b, &mut self.residual);
    }

    fn point(&self) -> &[f64] {
        &self.x
    }

    fn update(&mut self, block: &[usize], delta: &[f64]) {
        move_point(&mut self.x, block, delta);
        for (&j, d) in block.iter().zip(delta).filter(|(_, d)| **d != 0.0) {
            self.a.axpy(*d, j, &mut self.residual);
        }
    }

    fn value(&self) -> f64 {
        0.5 * dot(&self.residual, &self.residual)
    }

    fn value_moved(&self, block: &[usize], delta: &[f64]) -> f64 {
        let mut residual = self.residual.clone();
        for (&j, d) in block.iter().zip(delta) {
            self.a.axpy(*d, j, &mut residual);
        }
        0.5 * dot(&residual, &residual)
    }

    fn grad(&self) -> Vec<f64> {
        let mut out = vec![0.0; self.dim()];
        self.a.transposed_times(&self.residual, &mut out);
        out
    }

    fn grad_block(&self, block: &[usize]) -> Vec<f64> {
        let one = |&j: &usize| self.a.dot(j, &self.residual);
        block.iter().map(one).collect()
    }

    fn hess_block(&self, block: &[usize]) -> Mat<f64> {
        self.a.gram(block, None)
    }

    fn bound_block(&self, block: &[usize]) -> Mat<f64> {
        self.a.gram(block, None)
    }

    fn bound_column(&self, i: usize) -> Vec<f64> {
        let one = |j| self.a.product(i, j, None);
        (0..self.dim()).map(one).collect()
    }

    fn coord_lipschitz(&self) -> &[f64] {
        &self.lipschitz
    }

    /// Fenchel's: with `u` the residual, scaled until `A' u` obeys the penalty's bound, the minimum
    /// is at least `-1/2 |u|^2 - b' u`.
    fn duality_gap(&self, penalty: &Penalty, grad: &[f64]) -> Option<f64> {
        let (l1, violation) = match *penalty {
            Penalty::L1(l1) => (l1, grad.iter().fold(0.0f64, |m, g| m.max(g.abs()))),
            Penalty::NonNegative { l1 } => (l1, grad.iter().fold(0.0f64, |m, g| m.max(-g))),
            _ => return None,
        };
        let scale = if violation > l1 { l1 / violation } else { 1.0 };
        let bound = -0.5 * scale * scale * dot(&self.residual, &self.residual)
            - scale * dot(&self.residual, &self.b);
        Some(self.value() + penalty.value(&self.x) - bound)
    }
}

/// `sum_i log(1 + exp(-b_i a_i' x))`, labels `-1` and `1`.
#[derive(Debug, Clone)]
pub struct Logistic {
    a: Columns,
    labels: Vec<f64>,
    x: Vec<f64>,
    scores: Vec<f64>,
    lipschitz: Vec<f64>,
}

/// `log(1 + exp(-m))` without overflow.
fn softplus_neg(m: f64) -> f64 {
    (-m).max(0.0) + (-m.abs()).exp().ln_1p()
}

/// `1 / (1 + exp(-m))`
fn sigmoid(m: f64) -> f64 {
    if m >= 0.0 {
        1.0 / (1.0 + (-m).exp())
    } else {
        let e = m.exp();
        e / (1.0 + e)
    }
}

impl Logistic {
    /// From a matrix `[n, p]` and `n` labels; starts at 0.
    ///
    /// # Errors
    /// [`Error::Shape`], and [`Error::InvalidConfig`] for a label that is neither 1 nor -1.
    pub fn new(a: Columns, labels: &[f64]) -> Result<Self> {
        check::length("labels", labels.len(), a.rows())?;
        if let Some(bad) = labels.iter().find(|b| b.abs() != 1.0) {
            return Err(Error::config("label", bad, "1 or -1"));
        }
        let one = |j| 0.25 * a.product(j, j, None);
        let lipschitz = (0..a.columns()).map(one).collect();
        Ok(Self {
            x: vec![0.0; a.columns()],
            scores: vec![0.0; a.rows()],
            labels: labels.to_vec(),
            lipschitz,
            a,
        })
    }

    fn loss(&self, scores: &[f64]) -> f64 {
        let margins = scores.iter().zip(&self.labels);
        margins.map(|(s, b)| softplus_neg(s * b)).sum()
    }

    /// The derivative by each score.
    fn pull(&self) -> Vec<f64> {
        let margins = self.scores.iter().zip(&self.labels);
        margins.map(|(s, b)| -b * sigmoid(-s * b)).collect()
    }
}

impl SmoothObjective for Logistic {
    fn dim(&self) -> usize {
        self.a.columns()
    }

    fn reset(&mut self, x: &[f64]) {
        self.x = x.to_vec();
        self.scores = self.a.times(x);
    }

    fn point(&self) -> &[f64] {
        &self.x
    }

    fn update(&mut self, block: &[usize], delta: &[f64]) {
        move_point(&mut self.x, block, delta);
        for (&j, d) in block.iter().zip(delta).filter(|(_, d)| **d != 0.0) {
            self.a.axpy(*d, j, &mut self.scores);
        }
    }

    fn value(&self) -> f64 {
        self.loss(&self.scores)
    }

    fn value_moved(&self, block: &[usize], delta: &[f64]) -> f64 {
        let mut scores = self.scores.clone();
        for (&j, d) in block.iter().zip(delta) {
            self.a.axpy(*d, j, &mut scores);
        }
        self.loss(&scores)
    }

    fn grad(&self) -> Vec<f64> {
        let mut out = vec![0.0; self.dim()];
        self.a.transposed_times(&self.pull(), &mut out);
        out
    }

    fn grad_block(&self, block: &[usize]) -> Vec<f64> {
        let pull = self.pull();
        block.iter().map(|&j| self.a.dot(j, &pull)).collect()
    }

    fn hess_block(&self, block: &[usize]) -> Mat<f64> {
        let weight = |s: &f64| sigmoid(*s) * sigmoid(-s);
        let weights: Vec<f64> = self.scores.iter().map(weight).collect();
        self.a.gram(block, Some(&weights))
    }

    fn bound_block(&self, block: &[usize]) -> Mat<f64> {
        scaled(self.a.gram(block, None), 0.25)
    }

    fn bound_column(&self, i: usize) -> Vec<f64> {
        let one = |j| 0.25 * self.a.product(i, j, None);
        (0..self.dim()).map(one).collect()
    }

    fn coord_lipschitz(&self) -> &[f64] {
        &self.lipschitz
    }
}

/// `sum_i [logsumexp(a_i' X) - (a_i' X)_{y_i}]`. Coordinate `f * classes + c` is the weight of feature
/// `f` for class `c`.
#[derive(Debug, Clone)]
pub struct Softmax {
    a: Columns,
    labels: Vec<usize>,
    classes: usize,
    x: Vec<f64>,
    /// `[n, classes]`
    scores: Vec<f64>,
    lipschitz: Vec<f64>,
}

impl Softmax {
    /// From a matrix `[n, p]` and the class of each of the `n` examples; starts at 0.
    ///
    /// # Errors
    /// [`Error::Shape`], and [`Error::InvalidConfig`] for fewer than two classes or a label that is
    /// none of them.
    pub fn new(a: Columns, labels: &[usize], classes: usize) -> Result<Self> {
        check::length("labels", labels.len(), a.rows())?;
        check::at_least("classes", classes, 2)?;
        if let Some(bad) = labels.iter().find(|y| **y >= classes) {
            return Err(Error::config("label", bad, format!("below {classes}")));
        }
        let one = |i: usize| 0.25 * a.product(i / classes, i / classes, None);
        let lipschitz = (0..a.columns() * classes).map(one).collect();
        Ok(Self {
            x: vec![0.0; a.columns() * classes],
            scores: vec![0.0; a.rows() * classes],
            labels: labels.to_vec(),
            classes,
            lipschitz,
            a,
        })
    }

    fn add(&self, block: &[usize], delta: &[f64], scores: &mut [f64]) {
        for (&i, d) in block.iter().zip(delta).filter(|(_, d)| **d != 0.0) {
            let (feature, class) = (i / self.classes, i % self.classes);
            for (row, x) in self.a.entries(feature) {
                scores[row * self.classes + class] += d * x;
            }
        }
    }

    fn loss(&self, scores: &[f64]) -> f64 {
        let rows = scores.chunks_exact(self.classes).zip(&self.labels);
        rows.map(|(row, &y)| {
            let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = row.iter().map(|s| (s - max).exp()).sum();
            max + sum.ln() - row[y]
        })
        .sum()
    }

    /// Probabilities of one class.
    fn probabilities(&self, class: usize) -> Vec<f64> {
        let rows = self.scores.chunks_exact(self.classes);
        rows.map(|row| {
            let sum: f64 = row.iter().map(|s| (s - row[class]).exp()).sum();
            1.0 / sum
        })
        .collect()
    }

    /// The derivative by the scores of one class.
    fn pull(&self, class: usize) -> Vec<f64> {
        let mut out = self.probabilities(class);
        for (p, y) in out.iter_mut().zip(&self.labels) {
            *p -= f64::from(u8::from(*y == class));
        }
        out
    }

    fn bound_entry(&self, i: usize, j: usize, classes: f64) -> f64 {
        let same = f64::from(u8::from(i % self.classes == j % self.classes));
        let product = self.a.product(i / self.classes, j / self.classes, None);
        0.5 * (same - 1.0 / classes) * product
    }
}

impl SmoothObjective for Softmax {
    fn dim(&self) -> usize {
        self.x.len()
    }

    fn reset(&mut self, x: &[f64]) {
        self.x = x.to_vec();
        let mut scores = vec![0.0; self.scores.len()];
        let all: Vec<usize> = (0..x.len()).collect();
        self.add(&all, x, &mut scores);
        self.scores = scores;
    }

    fn point(&self) -> &[f64] {
        &self.x
    }

    fn update(&mut self, block: &[usize], delta: &[f64]) {
        move_point(&mut self.x, block, delta);
        let mut scores = std::mem::take(&mut self.scores);
        self.add(block, delta, &mut scores);
        self.scores = scores;
    }

    fn value(&self) -> f64 {
        self.loss(&self.scores)
    }

    fn value_moved(&self, block: &[usize], delta: &[f64]) -> f64 {
        let mut scores = self.scores.clone();
        self.add(block, delta, &mut scores);
        self.loss(&scores)
    }

    fn grad(&self) -> Vec<f64> {
        let mut out = vec![0.0; self.dim()];
        let mut one = vec![0.0; self.a.columns()];
        for class in 0..self.classes {
            self.a.transposed_times(&self.pull(class), &mut one);
            for (f, g) in one.iter().enumerate() {
                out[f * self.classes + class] = *g;
            }
        }
        out
    }

    fn grad_block(&self, block: &[usize]) -> Vec<f64> {
        let mut pulls: Vec<Option<Vec<f64>>> = vec![None; self.classes];
        let mut one = |&i: &usize| {
            let class = i % self.classes;
            let pull = pulls[class].get_or_insert_with(|| self.pull(class));
            self.a.dot(i / self.classes, pull)
        };
        block.iter().map(&mut one).collect()
    }

    fn hess_block(&self, block: &[usize]) -> Mat<f64> {
        let all: Vec<Vec<f64>> = (0..self.classes).map(|c| self.probabilities(c)).collect();
        Mat::from_fn(block.len(), block.len(), |r, s| {
            let (c, d) = (block[r] % self.classes, block[s] % self.classes);
            let same = f64::from(u8::from(c == d));
            let pairs = all[c].iter().zip(&all[d]);
            let weights: Vec<f64> = pairs.map(|(p, q)| p * same - p * q).collect();
            let (f, g) = (block[r] / self.classes, block[s] / self.classes);
            self.a.product(f, g, Some(&weights))
        })
    }

    /// With `K` classes in play, at most one more than occur in the block.
    fn bound_block(&self, block: &[usize]) -> Mat<f64> {
        let mut present = vec![false; self.classes];
        block.iter().for_each(|i| present[i % self.classes] = true);
        let distinct = present.iter().filter(|p| **p).count();
        let classes = self.classes.min(distinct + 1) as f64;
        Mat::from_fn(block.len(), block.len(), |r, s| {
            self.bound_entry(block[r], block[s], classes)
        })
    }

    fn bound_column(&self, i: usize) -> Vec<f64> {
        let one = |j| self.bound_entry(i, j, self.classes as f64);
        (0..self.dim()).map(one).collect()
    }

    fn coord_lipschitz(&self) -> &[f64] {
        &self.lipschitz
    }
}

/// `1/2 x' A x - b' x` with a sparse symmetric `A`: label propagation, and any graph quadratic.
#[derive(Debug, Clone)]
pub struct LabelPropagation {
    a: Columns,
    b: Vec<f64>,
    graph: Graph,
    x: Vec<f64>,
    product: Vec<f64>,
    diagonal: Vec<f64>,
    /// The node of each unknown.
    nodes: Vec<usize>,
}

impl LabelPropagation {
    /// From `(i, j, weight)` with weights of at least 0 in both directions, and a label per node,
    /// `None` where it is unknown: minimises `1/4 sum_ij w_ij (y_i - y_j)^2`.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for a negative weight or no unlabelled node, [`Error::Shape`] for a
    /// node outside, [`Error::Indefinite`] for a weight that is not symmetric.
    pub fn new(weights: &[(usize, usize, f64)], labels: &[Option<f64>]) -> Result<Self> {
        let nodes: Vec<usize> = (0..labels.len()).filter(|&i| labels[i].is_none()).collect();
        check::at_least("unlabelled nodes", nodes.len(), 1)?;
        let mut place = vec![usize::MAX; labels.len()];
        nodes.iter().enumerate().for_each(|(p, &i)| place[i] = p);
        let mut b = vec![0.0; nodes.len()];
        let mut entries = Vec::new();
        for &(i, j, w) in weights.iter().filter(|(i, j, _)| i != j) {
            check::non_negative("weight", w)?;
            if i >= labels.len() || j >= labels.len() {
                let expected = format!("below {}", labels.len());
                return Err(Error::config("node", i.max(j), expected));
            }
            if labels[j].is_some() {
                continue;
            }
            entries.push((place[j], place[j], w));
            match labels[i] {
                Some(y) => b[place[j]] += w * y,
                None => entries.push((place[i], place[j], -w)),
            }
        }
        let a = Columns::from_triplets(nodes.len(), nodes.len(), &entries)?;
        Ok(Self {
            nodes,
            ..Self::quadratic(a, &b)?
        })
    }

    /// `1/2 x' A x - b' x` for a symmetric positive semi-definite `A`; starts at 0.
    ///
    /// # Errors
    /// [`Error::Indefinite`] where `A` is not symmetric or has a negative diagonal,
    /// [`Error::Unbounded`] where a coordinate has a slope and no curvature, [`Error::Shape`],
    /// [`Error::NonFinite`].
    pub fn quadratic(a: Columns, b: &[f64]) -> Result<Self> {
        let p = a.columns();
        check::length("rows of A", a.rows(), p)?;
        check::length("b", b.len(), p)?;
        check::finite("b", b)?;
        let graph = Graph::of_symmetric(&a)?;
        let diagonal = graph.diagonal().to_vec();
        if let Some(i) = (0..p).find(|&i| diagonal[i] == 0.0 && b[i] != 0.0) {
            let row_empty = a.entries(i).iter().all(|(_, x)| *x == 0.0);
            if row_empty {
                return Err(Error::Unbounded {
                    problem: "the quadratic",
                    certificate: format!("along coordinate {i} it is the line {} x", -b[i]),
                });
            }
        }
        Ok(Self {
            x: vec![0.0; p],
            product: vec![0.0; p],
            b: b.to_vec(),
            diagonal,
            graph,
            nodes: (0..p).collect(),
            a,
        })
    }

    /// The node of each unknown.
    pub fn nodes(&self) -> &[usize] {
        &self.nodes
    }

    /// `A`, row-major.
    pub fn matrix(&self) -> Vec<f64> {
        let p = self.dim();
        let mut out = vec![0.0; p * p];
        for j in 0..p {
            self.a
                .entries(j)
                .iter()
                .for_each(|&(i, x)| out[i * p + j] = x);
        }
        out
    }

    /// `b`
    pub fn right_side(&self) -> &[f64] {
        &self.b
    }
}

impl SmoothObjective for LabelPropagation {
    fn dim(&self) -> usize {
        self.x.len()
    }

    fn reset(&mut self, x: &[f64]) {
        self.x = x.to_vec();
        self.product = self.a.times(x);
    }

    fn point(&self) -> &[f64] {
        &self.x
    }

    fn update(&mut self, block: &[usize], delta: &[f64]) {
        move_point(&mut self.x, block, delta);
        for (&j, d) in block.iter().zip(delta).filter(|(_, d)| **d != 0.0) {
            self.a.axpy(*d, j, &mut self.product);
        }
    }

    fn value(&self) -> f64 {
        0.5 * dot(&self.x, &self.product) - dot(&self.x, &self.b)
    }

    fn value_moved(&self, block: &[usize], delta: &[f64]) -> f64 {
        let grad = self.grad_block(block);
        let hess = self.hess_block(block);
        let mut out = self.value() + dot(&grad, delta);
        for (s, e) in delta.iter().enumerate() {
            for (r, d) in delta.iter().enumerate() {
                out += 0.5 * d * e * hess[(r, s)];
            }
        }
        out
    }

    fn grad(&self) -> Vec<f64> {
        let pairs = self.product.iter().zip(&self.b);
        pairs.map(|(p, b)| p - b).collect()
    }

    fn grad_block(&self, block: &[usize]) -> Vec<f64> {
        block.iter().map(|&i| self.product[i] - self.b[i]).collect()
    }

    fn hess_block(&self, block: &[usize]) -> Mat<f64> {
        let mut place = vec![usize::MAX; self.dim()];
        block.iter().enumerate().for_each(|(r, &i)| place[i] = r);
        let mut out = Mat::zeros(block.len(), block.len());
        for (s, &j) in block.iter().enumerate() {
            for (i, x) in self.a.entries(j) {
                if place[i] != usize::MAX {
                    out[(place[i], s)] = x;
                }
            }
        }
        out
    }

    fn bound_block(&self, block: &[usize]) -> Mat<f64> {
        self.hess_block(block)
    }

    fn bound_column(&self, i: usize) -> Vec<f64> {
        let mut out = vec![0.0; self.dim()];
        self.a.axpy(1.0, i, &mut out);
        out
    }

    fn coord_lipschitz(&self) -> &[f64] {
        &self.diagonal
    }

    fn graph(&self) -> Option<&Graph> {
        Some(&self.graph)
    }
}
