//! Which block comes next.

use super::partition::fixed_blocks;
use super::tree::{
    color_graph, forest_partition, greedy_forest, lattice_red_black, lattice_trees, Graph,
};
use super::{
    BlockCdConfig, DiagBound, GsqSolver, Layout, Partition, ScoreNorm, Select, SmoothObjective,
    TreeRule, Update,
};
use crate::error::check;
use crate::linalg::{axpy, dot, largest_eigenvalue, norm, solve_psd};
use crate::{Error, RandomStream, Result};
use rayon::prelude::*;

/// A block, and the whole gradient where the rule needed it.
pub(super) struct Picked {
    pub block: Vec<usize>,
    pub grad: Option<Vec<f64>>,
}

/// What a rule keeps between steps.
pub(super) struct Selector {
    /// Fixed blocks, or those of a graph partition; empty for variable blocks.
    blocks: Vec<Vec<usize>>,
    block_lipschitz: Vec<f64>,
    row_sums: Vec<f64>,
    /// The largest eigenvalue of the whole bound.
    largest: f64,
    turn: usize,
    order: Vec<usize>,
}

/// Added to the diagonal of `H_b` in the GSQ score, as in the authors' code: a singular block has one
/// too.
const RIDGE: f64 = 1e-10;

/// Above this many coordinates the largest eigenvalue is replaced by the largest row sum.
const EIGENVALUES: usize = 1024;

impl Selector {
    pub(super) fn new(config: &BlockCdConfig, objective: &impl SmoothObjective) -> Result<Self> {
        let mut blocks = match &config.partition {
            Partition::Variable => vec![],
            Partition::Fixed(rule) => fixed_blocks(objective, rule, config.block_size)?,
        };
        if let Select::Tree(rule) = &config.select {
            blocks = graph_blocks(rule, objective)?;
        }
        let needs_constants = matches!(config.select, Select::Gsl | Select::LipschitzSampling);
        let block_lipschitz = if needs_constants && config.update != Update::AdaptiveLipschitz {
            let one = |b: &Vec<usize>| objective.block_lipschitz(b);
            blocks.par_iter().map(one).collect::<Result<_>>()?
        } else {
            vec![]
        };
        let needs_sums = matches!(
            config.select,
            Select::Gsd(DiagBound::RowSum) | Select::Tree(TreeRule::GreedyGsl)
        );
        Ok(Self {
            row_sums: if needs_sums {
                objective.bound_row_sums()
            } else {
                vec![]
            },
            largest: match config.select {
                Select::Gsq(GsqSolver::Iht { .. }) => largest(objective)?,
                _ => 0.0,
            },
            blocks,
            block_lipschitz,
            turn: 0,
            order: vec![],
        })
    }

    pub(super) fn pick(
        &mut self,
        config: &BlockCdConfig,
        objective: &impl SmoothObjective,
        estimates: &[f64],
        stream: &mut RandomStream,
    ) -> Result<Picked> {
        let dim = objective.dim();
        let size = config.block_size.min(dim);
        let without = |block| Picked { block, grad: None };
        match &config.select {
            Select::Random if self.blocks.is_empty() => {
                let mut block = stream.permutation(dim)?;
                block.truncate(size);
                return Ok(without(block.into_iter().map(|i| i as usize).collect()));
            }
            Select::Random => {
                let i = stream.below(self.blocks.len())?;
                return Ok(without(self.blocks[i].clone()));
            }
            Select::Cyclic | Select::Perm => {
                let shuffle = config.select == Select::Perm;
                return Ok(without(self.in_turn(
                    dim,
                    size,
                    shuffle.then_some(stream),
                )?));
            }
            Select::LipschitzSampling => {
                return Ok(without(self.sample(config, objective, estimates, stream)?));
            }
            Select::Tree(TreeRule::TreePartition(_) | TreeRule::RedBlack(_)) => {
                self.turn += 1;
                let i = (self.turn - 1) % self.blocks.len();
                return Ok(without(self.blocks[i].clone()));
            }
            _ => {}
        }
        let grad = objective.grad();
        let constants = if config.update == Update::AdaptiveLipschitz {
            estimates
        } else {
            objective.coord_lipschitz()
        };
        let block = match &config.select {
            Select::Tree(rule) => self.along_graph(rule, objective, &grad, stream)?,
            Select::Gsq(GsqSolver::Iht { iters }) => {
                let start: Vec<f64> = grad
                    .iter()
                    .zip(objective.coord_lipschitz())
                    .map(|(g, l)| if *l > 0.0 { -g / l } else { 0.0 })
                    .collect();
                threshold_iteratively(objective, &grad, start, size, *iters, self.largest)
            }
            _ if self.blocks.is_empty() => {
                let scores = self.coordinate_scores(config, objective, &grad, constants);
                largest_of(&scores, size)
            }
            _ => {
                let scores = self.fixed_scores(config, objective, &grad, constants)?;
                self.blocks[largest_of(&scores, 1)[0]].clone()
            }
        };
        Ok(Picked {
            block,
            grad: Some(grad),
        })
    }

    /// The next block of an order, which is drawn again at its end where there is a stream.
    fn in_turn(
        &mut self,
        dim: usize,
        size: usize,
        stream: Option<&mut RandomStream>,
    ) -> Result<Vec<usize>> {
        let variable = self.blocks.is_empty();
        let (items, width) = if variable {
            (dim, size)
        } else {
            (self.blocks.len(), 1)
        };
        if self.turn >= items || self.order.is_empty() {
            self.turn = 0;
            self.order = match stream {
                Some(stream) => {
                    let order = stream.permutation(items)?;
                    order.into_iter().map(|i| i as usize).collect()
                }
                None => (0..items).collect(),
            };
        }
        let chosen = &self.order[self.turn..(self.turn + width).min(items)];
        let block = if variable {
            chosen.to_vec()
        } else {
            self.blocks[chosen[0]].clone()
        };
        self.turn += width;
        Ok(block)
    }

    fn sample(
        &self,
        config: &BlockCdConfig,
        objective: &impl SmoothObjective,
        estimates: &[f64],
        stream: &mut RandomStream,
    ) -> Result<Vec<usize>> {
        let adaptive = config.update == Update::AdaptiveLipschitz;
        let coordinates = if adaptive {
            estimates
        } else {
            objective.coord_lipschitz()
        };
        if self.blocks.is_empty() {
            // Gumbel's trick: without replacement, proportional to the weights.
            let mut uniform = vec![0.0; objective.dim()];
            stream.fill_uniform(&mut uniform);
            let keys: Vec<f64> = coordinates
                .iter()
                .zip(&uniform)
                .map(|(l, u)| l.ln() - (-(1.0 - u).ln()).ln())
                .collect();
            return Ok(largest_of(&keys, config.block_size.min(keys.len())));
        }
        let largest = |b: &Vec<usize>| b.iter().fold(0.0f64, |m, &i| m.max(estimates[i]));
        let weights: Vec<f64> = if adaptive {
            self.blocks.iter().map(largest).collect()
        } else {
            self.block_lipschitz.clone()
        };
        let sum: f64 = weights.iter().sum();
        let mut left = stream.next_uniform() * sum;
        let chosen = weights.iter().position(|w| {
            left -= w;
            left < 0.0
        });
        let last = self.blocks.len() - 1;
        Ok(self.blocks[chosen.unwrap_or(last)].clone())
    }

    fn diagonal<'a>(&'a self, bound: DiagBound, constants: &'a [f64]) -> &'a [f64] {
        match bound {
            DiagBound::RowSum => &self.row_sums,
            // The factor tau changes no order.
            DiagBound::TauLi | DiagBound::Li => constants,
        }
    }

    fn coordinate_scores(
        &self,
        config: &BlockCdConfig,
        objective: &impl SmoothObjective,
        grad: &[f64],
        constants: &[f64],
    ) -> Vec<f64> {
        let squares = || grad.iter().map(|g| g * g);
        match config.select {
            Select::Gsd(bound) => squares()
                .zip(self.diagonal(bound, constants))
                .map(|(g, d)| if *d > 0.0 { g / d } else { 0.0 })
                .collect(),
            Select::ProxGsq => prox_progress(config, objective, grad),
            _ => squares().collect(),
        }
    }

    fn fixed_scores(
        &self,
        config: &BlockCdConfig,
        objective: &impl SmoothObjective,
        grad: &[f64],
        constants: &[f64],
    ) -> Result<Vec<f64>> {
        match config.select {
            Select::ProxGsq => {
                let progress = prox_progress(config, objective, grad);
                let sum = |b: &Vec<usize>| b.iter().map(|&i| progress[i]).sum();
                Ok(self.blocks.iter().map(sum).collect())
            }
            Select::Gsd(bound) => {
                let d = self.diagonal(bound, constants);
                Ok(norms(&self.blocks, grad, config.score_norm, |_, i| d[i]))
            }
            Select::Gsl if config.update == Update::AdaptiveLipschitz => {
                let largest = |b: usize, _| {
                    self.blocks[b]
                        .iter()
                        .fold(0.0f64, |m, &i| m.max(constants[i]))
                };
                Ok(norms(&self.blocks, grad, config.score_norm, largest))
            }
            Select::Gsl => {
                let constant = |b: usize, _| self.block_lipschitz[b];
                Ok(norms(&self.blocks, grad, config.score_norm, constant))
            }
            Select::Gsq(_) => quadratic_scores(objective, &self.blocks, grad),
            _ => Ok(norms(&self.blocks, grad, config.score_norm, |_, _| 1.0)),
        }
    }

    fn along_graph(
        &self,
        rule: &TreeRule,
        objective: &impl SmoothObjective,
        grad: &[f64],
        stream: &mut RandomStream,
    ) -> Result<Vec<usize>> {
        let graph = graph_of(objective)?;
        let over = |d: &[f64]| -> Vec<f64> {
            let scale = |(g, d): (&f64, &f64)| if *d > 0.0 { g * g / d } else { 0.0 };
            grad.iter().zip(d).map(scale).collect()
        };
        let scores = match rule {
            TreeRule::GreedyGsd => over(objective.coord_lipschitz()),
            TreeRule::GreedyGsl => over(&self.row_sums),
            TreeRule::RandomTree => {
                let mut scores = vec![0.0; graph.len()];
                stream.fill_uniform(&mut scores);
                scores
            }
            _ => grad.iter().map(|g| g * g).collect(),
        };
        if let TreeRule::Dense { size } = rule {
            let cube_root = (graph.len() as f64).cbrt().round() as usize;
            let size = size.unwrap_or(cube_root.max(1)).min(graph.len());
            return Ok(largest_of(&scores, size));
        }
        Ok(greedy_forest(graph, &descending(&scores)))
    }
}

/// The score of each block by a rule: GS, GSL, GSD or GSQ.
///
/// # Errors
/// [`Error::Unsupported`] for a rule without scores, and those of the decompositions.
pub fn block_scores(
    objective: &impl SmoothObjective,
    blocks: &[Vec<usize>],
    select: &Select,
    norm: ScoreNorm,
) -> Result<Vec<f64>> {
    let config = BlockCdConfig {
        select: select.clone(),
        partition: Partition::Fixed(super::FixedRule::Given(blocks.to_vec())),
        score_norm: norm,
        ..BlockCdConfig::default()
    };
    if !matches!(
        select,
        Select::Gs | Select::Gsl | Select::Gsd(_) | Select::Gsq(GsqSolver::Exact)
    ) {
        return Err(Error::unsupported("a score", format!("for {select:?}")));
    }
    let selector = Selector::new(&config, objective)?;
    let grad = objective.grad();
    selector.fixed_scores(&config, objective, &grad, objective.coord_lipschitz())
}

fn norms(
    blocks: &[Vec<usize>],
    grad: &[f64],
    norm: ScoreNorm,
    scale: impl Fn(usize, usize) -> f64,
) -> Vec<f64> {
    let score = |(b, block): (usize, &Vec<usize>)| -> f64 {
        block
            .iter()
            .map(|&i| match (norm, scale(b, i)) {
                (_, d) if d <= 0.0 => 0.0,
                (ScoreNorm::L2, d) => grad[i] * grad[i] / d,
                (ScoreNorm::L1, d) => grad[i].abs() / d.sqrt(),
            })
            .sum()
    };
    blocks.iter().enumerate().map(score).collect()
}

fn quadratic_scores(
    objective: &impl SmoothObjective,
    blocks: &[Vec<usize>],
    grad: &[f64],
) -> Result<Vec<f64>> {
    blocks
        .par_iter()
        .map(|block| {
            let g: Vec<f64> = block.iter().map(|&i| grad[i]).collect();
            let mut bound = objective.bound_block(block);
            (0..g.len()).for_each(|i| bound[(i, i)] += RIDGE);
            Ok(dot(&g, &solve_psd(bound.as_ref(), &g)?))
        })
        .collect()
}

/// By how much a proximal step of each coordinate alone decreases the objective, at least.
fn prox_progress(
    config: &BlockCdConfig,
    objective: &impl SmoothObjective,
    grad: &[f64],
) -> Vec<f64> {
    let penalty = &config.penalty;
    let constants = objective.coord_lipschitz();
    let one = |i: usize| {
        let (x, g, l) = (objective.point()[i], grad[i], constants[i]);
        if l <= 0.0 {
            return 0.0;
        }
        let d = penalty.prox(x - g / l, 1.0 / l) - x;
        -(g * d + 0.5 * l * d * d + penalty.change(x, d))
    };
    (0..grad.len()).map(one).collect()
}

/// Indices by descending score; ties: lowest index first.
fn descending(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order
}

/// The indices of the `k` largest scores, ascending; ties: lowest index first.
fn largest_of(scores: &[f64], k: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    if k < order.len() {
        let by = |a: &usize, b: &usize| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b));
        order.select_nth_unstable_by(k - 1, by);
        order.truncate(k);
    }
    order.sort_unstable();
    order
}

fn largest(objective: &impl SmoothObjective) -> Result<f64> {
    if objective.dim() <= EIGENVALUES {
        let all: Vec<usize> = (0..objective.dim()).collect();
        return largest_eigenvalue(objective.bound_block(&all).as_ref());
    }
    Ok(objective.bound_row_sums().into_iter().fold(0.0, f64::max))
}

/// `d <- top_tau(d - (g + H d) / lambda)`: the support of the last `d`.
pub(crate) fn threshold_iteratively(
    objective: &impl SmoothObjective,
    grad: &[f64],
    start: Vec<f64>,
    size: usize,
    iters: usize,
    largest: f64,
) -> Vec<usize> {
    let mut d = start;
    let mut block = vec![];
    for _ in 0..iters {
        let mut model = grad.to_vec();
        for (i, x) in d.iter().enumerate().filter(|(_, x)| **x != 0.0) {
            axpy(*x, &objective.bound_column(i), &mut model);
        }
        let mut next = d.clone();
        axpy(-1.0 / largest, &model, &mut next);
        let sizes: Vec<f64> = next.iter().map(|x| x.abs()).collect();
        block = largest_of(&sizes, size);
        let mut kept = vec![0.0; d.len()];
        block.iter().for_each(|&i| kept[i] = next[i]);
        let change: Vec<f64> = kept.iter().zip(&d).map(|(a, b)| a - b).collect();
        d = kept;
        if norm(&change) < 1e-10 {
            break;
        }
    }
    block
}

fn graph_of(objective: &impl SmoothObjective) -> Result<&Graph> {
    objective
        .graph()
        .ok_or_else(|| Error::unsupported("a graph rule", "for an objective without a graph"))
}

/// The blocks of a partition rule; none for a greedy one.
fn graph_blocks(rule: &TreeRule, objective: &impl SmoothObjective) -> Result<Vec<Vec<usize>>> {
    let graph = graph_of(objective)?;
    let (layout, forests) = match rule {
        TreeRule::TreePartition(layout) => (layout, true),
        TreeRule::RedBlack(layout) => (layout, false),
        _ => return Ok(vec![]),
    };
    let blocks = match layout {
        Layout::General => {
            let order = descending(objective.coord_lipschitz());
            let number = if forests {
                forest_partition(graph, &order)
            } else {
                color_graph(graph, &order)
            };
            let count = number.iter().max().map_or(0, |m| m + 1);
            let mut blocks = vec![vec![]; count];
            number
                .iter()
                .enumerate()
                .for_each(|(i, &c)| blocks[c].push(i));
            blocks
        }
        Layout::Lattice {
            rows,
            columns,
            nodes,
        } => {
            check::length("Layout::Lattice::nodes", nodes.len(), objective.dim())?;
            if let Some(node) = nodes.iter().find(|n| **n >= rows * columns) {
                let expected = format!("below {}", rows * columns);
                return Err(Error::config("Layout::Lattice::nodes", node, expected));
            }
            let (first, second) = if forests {
                let (white, black) = lattice_trees(*rows, *columns);
                (black, white)
            } else {
                lattice_red_black(*rows, *columns)
            };
            let unknown = |lattice: Vec<usize>| -> Vec<usize> {
                let mut inside = vec![false; rows * columns];
                lattice.iter().for_each(|&n| inside[n] = true);
                (0..nodes.len()).filter(|&i| inside[nodes[i]]).collect()
            };
            vec![unknown(first), unknown(second)]
        }
    };
    // Blocks whose nodes are all labelled vanish.
    Ok(blocks.into_iter().filter(|b| !b.is_empty()).collect())
}
