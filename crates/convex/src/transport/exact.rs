//! The network simplex method on the complete bipartite graph (Cunningham's strongly feasible bases,
//! block search for the entering pair).

use super::plan::SparsePlan;
use super::OtProblem;
use crate::{Error, Result};

/// An optimal vertex and its potentials.
pub(super) struct Exact {
    pub plan: SparsePlan,
    pub alpha: Vec<f64>,
    pub beta: Vec<f64>,
    pub value: f64,
    pub pivots: usize,
}

const NONE: u32 = u32::MAX;

/// A spanning tree over rows, columns and a root; what hangs on the arc between a node and its parent
/// is stored with the node. It outlives a change of the costs: its flows stay feasible, and the next
/// optimum is mostly near.
pub(super) struct Basis {
    m: usize,
    n: usize,
    parent: Vec<u32>,
    /// The pair `j * m + i` between the node and its parent; `NONE` for an artificial arc.
    arc: Vec<u32>,
    /// Whether that arc leads from the node to its parent.
    up: Vec<bool>,
    flow: Vec<f64>,
    potential: Vec<f64>,
    depth: Vec<u32>,
    first_child: Vec<u32>,
    next: Vec<u32>,
    previous: Vec<u32>,
    stack: Vec<u32>,
    /// The cost of an artificial arc.
    artificial: f64,
}

pub(super) fn network_simplex(problem: &OtProblem) -> Result<Exact> {
    let mut basis = Basis::new(problem)?;
    let pivots = basis.optimize(problem)?;
    basis.read(problem, pivots)
}

impl Basis {
    /// All nodes on the root, by artificial arcs.
    pub(super) fn new(problem: &OtProblem) -> Result<Self> {
        let (m, n) = (problem.a().len(), problem.b().len());
        if m.saturating_mul(n) >= NONE as usize {
            let size = format!("with {m} x {n} pairs");
            return Err(Error::unsupported("the network simplex", size));
        }
        let (nodes, root) = (m + n + 1, m + n);
        let mut tree = Self {
            m,
            n,
            parent: vec![NONE; nodes],
            arc: vec![NONE; nodes],
            up: vec![true; nodes],
            flow: vec![0.0; nodes],
            potential: vec![0.0; nodes],
            depth: vec![0; nodes],
            first_child: vec![NONE; nodes],
            next: vec![NONE; nodes],
            previous: vec![NONE; nodes],
            stack: vec![],
            artificial: 0.0,
        };
        for node in 0..root {
            let row = node < m;
            tree.attach(node as u32, root as u32);
            tree.flow[node] = if row {
                problem.a()[node]
            } else {
                problem.b()[node - m]
            };
            // A basis stays strongly feasible when arcs without flow lead to the root.
            tree.up[node] = row || tree.flow[node] == 0.0;
            tree.depth[node] = 1;
        }
        Ok(tree)
    }

    /// Pivots until no pair is too cheap for the problem's costs; its weights must be those that the
    /// basis was made for. Gives the number of pivots.
    pub(super) fn optimize(&mut self, problem: &OtProblem) -> Result<usize> {
        let (m, n) = (self.m, self.n);
        let finite = problem.cost.iter().filter(|c| c.is_finite());
        let scale = finite.fold(0.0f64, |s, c| s.max(c.abs()));
        let tolerance = 1e-12 * scale.max(f64::MIN_POSITIVE);
        let cold = self.artificial == 0.0;
        self.artificial = (scale + 1.0) * (m + n) as f64;
        self.refresh(problem);
        let mut pivots = 0;
        if cold {
            pivots = self.first_pivots(problem, tolerance);
        }
        let limit = 1000 * (m + n) + 100_000;
        let block = (((m * n) as f64).sqrt().ceil() as usize).max(16);
        let mut position = 0;
        // Potentials are sums of differences; from the tree they are exact, so the end is tried twice.
        for refreshed in [false, true] {
            while let Some((arc, reduced)) = self.entering(problem, &mut position, block, tolerance)
            {
                self.pivot(arc, reduced);
                pivots += 1;
                if pivots > limit {
                    return Err(Error::NotConverged {
                        solver: "the network simplex",
                        iterations: pivots,
                        residual: -reduced,
                        tolerance,
                    });
                }
            }
            if !refreshed {
                self.refresh(problem);
            }
        }
        Ok(pivots)
    }

    fn attach(&mut self, node: u32, parent: u32) {
        let first = self.first_child[parent as usize];
        self.parent[node as usize] = parent;
        self.next[node as usize] = first;
        self.previous[node as usize] = NONE;
        if first != NONE {
            self.previous[first as usize] = node;
        }
        self.first_child[parent as usize] = node;
    }

    fn detach(&mut self, node: u32) {
        let (before, after) = (self.previous[node as usize], self.next[node as usize]);
        if before == NONE {
            self.first_child[self.parent[node as usize] as usize] = after;
        } else {
            self.next[before as usize] = after;
        }
        if after != NONE {
            self.previous[after as usize] = before;
        }
    }

    fn ends(&self, arc: usize) -> (usize, usize) {
        (arc % self.m, self.m + arc / self.m)
    }

    fn reduced(&self, problem: &OtProblem, arc: usize) -> f64 {
        let (i, j) = self.ends(arc);
        problem.cost[arc] + self.potential[i] - self.potential[j]
    }

    /// Starts with the cheapest row of each column.
    fn first_pivots(&mut self, problem: &OtProblem, tolerance: f64) -> usize {
        let mut pivots = 0;
        for j in 0..self.n {
            let column = problem.column(j);
            let cheapest = (0..self.m).min_by(|&p, &q| column[p].total_cmp(&column[q]));
            let Some(arc) = cheapest.map(|i| j * self.m + i) else {
                continue;
            };
            let reduced = self.reduced(problem, arc);
            if reduced < -tolerance {
                self.pivot(arc, reduced);
                pivots += 1;
            }
        }
        pivots
    }

    /// The pair with the most negative reduced cost of the first block that has one.
    fn entering(
        &self,
        problem: &OtProblem,
        position: &mut usize,
        block: usize,
        tolerance: f64,
    ) -> Option<(usize, f64)> {
        let arcs = self.m * self.n;
        let (mut best, mut found, mut left) = (-tolerance, NONE as usize, block);
        let mut arc = *position;
        let mut seen = 0;
        while seen < arcs {
            // As far as the column, the block and the pairs that were not looked at go.
            let (i, j) = (arc % self.m, arc / self.m);
            let run = (self.m - i).min(left).min(arcs - seen);
            let target = self.potential[self.m + j];
            let costs = &problem.cost[arc..arc + run];
            for (offset, (c, p)) in costs.iter().zip(&self.potential[i..i + run]).enumerate() {
                let reduced = c + p - target;
                if reduced < best {
                    best = reduced;
                    found = arc + offset;
                }
            }
            seen += run;
            left -= run;
            arc = if arc + run == arcs { 0 } else { arc + run };
            if left == 0 {
                if found != NONE as usize {
                    break;
                }
                left = block;
            }
        }
        *position = arc;
        (found != NONE as usize).then_some((found, best))
    }

    /// Sends as much as possible around the cycle that the pair closes, and exchanges it for the arc
    /// that runs empty.
    fn pivot(&mut self, arc: usize, reduced: f64) {
        let (source, target) = self.ends(arc);
        let (mut delta, mut out, mut out_on_source) = (f64::INFINITY, NONE as usize, true);
        let (mut p, mut q) = (source, target);
        // Of several empty arcs the last one on the way around leaves, which keeps the basis
        // strongly feasible: hence `<` on the one side and `<=` on the other.
        while p != q {
            if self.depth[p] >= self.depth[q] {
                if self.up[p] && self.flow[p] < delta {
                    (delta, out, out_on_source) = (self.flow[p], p, true);
                }
                p = self.parent[p] as usize;
            } else {
                if !self.up[q] && self.flow[q] <= delta {
                    (delta, out, out_on_source) = (self.flow[q], q, false);
                }
                q = self.parent[q] as usize;
            }
        }
        let join = p;
        let mut node = source;
        while node != join {
            let sign = if self.up[node] { -delta } else { delta };
            self.flow[node] = (self.flow[node] + sign).max(0.0);
            node = self.parent[node] as usize;
        }
        node = target;
        while node != join {
            let sign = if self.up[node] { delta } else { -delta };
            self.flow[node] = (self.flow[node] + sign).max(0.0);
            node = self.parent[node] as usize;
        }
        let (inner, outer, shift) = if out_on_source {
            (source, target, -reduced)
        } else {
            (target, source, reduced)
        };
        self.hang(inner, outer, arc, out_on_source, delta, out);
        self.shift(inner, shift);
    }

    /// Turns the way from `inner` up to `last` around and hangs `inner` under `outer`.
    fn hang(&mut self, inner: usize, outer: usize, arc: usize, up: bool, flow: f64, last: usize) {
        let (mut node, mut parent) = (inner, outer);
        let mut carried = (arc as u32, up, flow);
        loop {
            let above = self.parent[node] as usize;
            let own = (self.arc[node], !self.up[node], self.flow[node]);
            self.detach(node as u32);
            self.attach(node as u32, parent as u32);
            (self.arc[node], self.up[node], self.flow[node]) = carried;
            if node == last {
                break;
            }
            carried = own;
            parent = node;
            node = above;
        }
    }

    /// Adds to the potentials below and at `top`, and counts depths again.
    fn shift(&mut self, top: usize, by: f64) {
        let mut stack = std::mem::take(&mut self.stack);
        stack.push(top as u32);
        while let Some(node) = stack.pop() {
            let node = node as usize;
            self.potential[node] += by;
            self.depth[node] = self.depth[self.parent[node] as usize] + 1;
            let mut child = self.first_child[node];
            while child != NONE {
                stack.push(child);
                child = self.next[child as usize];
            }
        }
        self.stack = stack;
    }

    /// Potentials from the tree.
    fn refresh(&mut self, problem: &OtProblem) {
        let root = self.m + self.n;
        let mut stack = vec![root as u32];
        while let Some(node) = stack.pop() {
            let mut child = self.first_child[node as usize];
            while child != NONE {
                let c = child as usize;
                let cost = if self.arc[c] == NONE {
                    self.artificial
                } else {
                    problem.cost[self.arc[c] as usize]
                };
                let above = self.potential[node as usize];
                self.potential[c] = if self.up[c] {
                    above - cost
                } else {
                    above + cost
                };
                stack.push(child);
                child = self.next[c];
            }
        }
    }

    /// The plan and the potentials of the basis.
    pub(super) fn read(&self, problem: &OtProblem, pivots: usize) -> Result<Exact> {
        let (m, n) = (self.m, self.n);
        let mut columns = vec![vec![]; n];
        let mut unplaced = 0.0;
        for node in 0..m + n {
            match self.arc[node] {
                NONE => unplaced += self.flow[node],
                arc => {
                    let (i, j) = self.ends(arc as usize);
                    columns[j - m].push((i as u32, self.flow[node]));
                }
            }
        }
        if unplaced > 1e-9 * problem.mass() {
            return Err(Error::Infeasible {
                problem: "optimal transport",
                certificate: format!(
                    "the finite costs leave mass {:.3e} without a place",
                    unplaced / 2.0
                ),
                multipliers: vec![],
            });
        }
        let plan = SparsePlan::from_columns(m, columns.into_iter());
        let alpha: Vec<f64> = self.potential[..m].iter().map(|p| -p).collect();
        let beta = self.potential[m..m + n].to_vec();
        let dot = crate::linalg::dot;
        Ok(Exact {
            plan,
            value: dot(&alpha, problem.a()) + dot(&beta, problem.b()),
            alpha,
            beta,
            pivots,
        })
    }
}
