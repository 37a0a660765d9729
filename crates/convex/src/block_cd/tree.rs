//! Blocks whose graph is a forest, and their exact solution by elimination along it.

use super::columns::Columns;
use crate::{Error, Result};
use std::collections::VecDeque;

/// A weighted graph: the off-diagonal entries of a symmetric matrix, with its diagonal.
#[derive(Debug, Clone)]
pub struct Graph {
    neighbors: Vec<Vec<(usize, f64)>>,
    diagonal: Vec<f64>,
}

impl Graph {
    pub(super) fn of_symmetric(a: &Columns) -> Result<Self> {
        let p = a.columns();
        let mut neighbors = vec![vec![]; p];
        let mut diagonal = vec![0.0; p];
        for j in 0..p {
            for (i, x) in a.entries(j) {
                if i == j {
                    diagonal[j] = x;
                } else if x != 0.0 {
                    neighbors[j].push((i, x));
                }
            }
        }
        let bad = |detail: String| Error::Indefinite {
            what: "A",
            kind: "semi-definite",
            detail,
        };
        if let Some(j) = diagonal.iter().position(|d| *d < 0.0) {
            return Err(bad(format!("diagonal entry {j} is {}", diagonal[j])));
        }
        let graph = Self {
            neighbors,
            diagonal,
        };
        for j in 0..p {
            for &(i, x) in &graph.neighbors[j] {
                let back = graph.neighbors[i].iter().find(|(k, _)| *k == j);
                let y = back.map_or(0.0, |(_, y)| *y);
                if (x - y).abs() > 1e-12 * x.abs().max(y.abs()) {
                    return Err(bad(format!(
                        "entries ({i}, {j}) and ({j}, {i}) are {x} and {y}"
                    )));
                }
            }
        }
        Ok(graph)
    }

    /// Number of nodes.
    pub fn len(&self) -> usize {
        self.diagonal.len()
    }

    /// Whether there is no node.
    pub fn is_empty(&self) -> bool {
        self.diagonal.is_empty()
    }

    /// The other nodes on a node's edges, with the matrix' entries.
    pub fn neighbors(&self, node: usize) -> &[(usize, f64)] {
        &self.neighbors[node]
    }

    pub(super) fn diagonal(&self) -> &[f64] {
        &self.diagonal
    }
}

/// Sets that only grow together.
struct Union {
    parent: Vec<usize>,
}

impl Union {
    fn new(n: usize) -> Self {
        Self {
            parent: (0..n).collect(),
        }
    }

    fn find(&mut self, mut node: usize) -> usize {
        while self.parent[node] != node {
            self.parent[node] = self.parent[self.parent[node]];
            node = self.parent[node];
        }
        node
    }

    /// Whether no two of these are in one set; joins them with `node` if so.
    fn join_if_apart(&mut self, node: usize, others: impl Iterator<Item = usize>) -> bool {
        let mut roots: Vec<usize> = others.map(|o| self.find(o)).collect();
        roots.sort_unstable();
        if roots.windows(2).any(|w| w[0] == w[1]) {
            return false;
        }
        for root in roots {
            self.parent[root] = node;
        }
        true
    }
}

/// The largest forest that grows greedily in this order: a node is taken when its neighbors taken so
/// far belong to different trees. Sorted.
pub fn greedy_forest(graph: &Graph, order: &[usize]) -> Vec<usize> {
    let mut union = Union::new(graph.len());
    let mut taken = vec![false; graph.len()];
    for &node in order {
        let inside = graph.neighbors[node].iter().map(|(o, _)| *o);
        let inside: Vec<usize> = inside.filter(|o| taken[*o]).collect();
        if union.join_if_apart(node, inside.into_iter()) {
            taken[node] = true;
        }
    }
    (0..graph.len()).filter(|&i| taken[i]).collect()
}

/// The number of the forest that each node goes to: in this order, to the first that stays a forest.
pub fn forest_partition(graph: &Graph, order: &[usize]) -> Vec<usize> {
    let mut number = vec![usize::MAX; graph.len()];
    let mut unions: Vec<Union> = Vec::new();
    for &node in order {
        let mut forest = 0;
        loop {
            if forest == unions.len() {
                unions.push(Union::new(graph.len()));
            }
            let inside = graph.neighbors[node].iter().map(|(o, _)| *o);
            let inside: Vec<usize> = inside.filter(|o| number[*o] == forest).collect();
            if unions[forest].join_if_apart(node, inside.into_iter()) {
                break;
            }
            forest += 1;
        }
        number[node] = forest;
    }
    number
}

/// A color for each node that none of its neighbors has: in this order, the least used of those that
/// are allowed, or a new one.
pub fn color_graph(graph: &Graph, order: &[usize]) -> Vec<usize> {
    let mut color = vec![usize::MAX; graph.len()];
    let mut sizes: Vec<usize> = Vec::new();
    for &node in order {
        let mut allowed = vec![true; sizes.len()];
        for (other, _) in &graph.neighbors[node] {
            if let Some(seat) = allowed.get_mut(color[*other]) {
                *seat = false;
            }
        }
        let free = (0..sizes.len()).filter(|&c| allowed[c]);
        let chosen = free.min_by_key(|&c| (sizes[c], c)).unwrap_or(sizes.len());
        if chosen == sizes.len() {
            sizes.push(0);
        }
        sizes[chosen] += 1;
        color[node] = chosen;
    }
    color
}

/// Two combs that cover a lattice of `rows x columns` (index `column * rows + row`): white has the
/// first row and the even columns without their end, black the rest.
pub fn lattice_trees(rows: usize, columns: usize) -> (Vec<usize>, Vec<usize>) {
    let white = |r: usize, c: usize| r == 0 || (c.is_multiple_of(2) && r + 1 < rows);
    split(rows, columns, white)
}

/// The two colors of a checkerboard, red with the even rows of even columns.
pub fn lattice_red_black(rows: usize, columns: usize) -> (Vec<usize>, Vec<usize>) {
    split(rows, columns, |r, c| r % 2 == c % 2)
}

fn split(
    rows: usize,
    columns: usize,
    first: impl Fn(usize, usize) -> bool,
) -> (Vec<usize>, Vec<usize>) {
    (0..rows * columns).partition(|i| first(i % rows, i / rows))
}

/// The step `d` with `A_bb d = -g_b` for a block whose graph is a forest, in time linear in its edges:
/// leaves are eliminated, then substituted back.
///
/// # Errors
/// [`Error::InvalidConfig`] for a block with a cycle, [`Error::Indefinite`] for a pivot that is not
/// positive.
pub fn solve_forest(graph: &Graph, block: &[usize], grad: &[f64]) -> Result<Vec<f64>> {
    let mut place = vec![usize::MAX; graph.len()];
    block.iter().enumerate().for_each(|(p, &i)| place[i] = p);
    let mut diagonal: Vec<f64> = block.iter().map(|&i| graph.diagonal[i]).collect();
    let mut rhs: Vec<f64> = grad.iter().map(|g| -g).collect();
    // Breadth first, so that parents come before their children.
    let mut parent = vec![(usize::MAX, 0.0); block.len()];
    let (mut seen, mut order) = (vec![false; block.len()], Vec::new());
    let mut queue = VecDeque::new();
    for root in 0..block.len() {
        if std::mem::replace(&mut seen[root], true) {
            continue;
        }
        queue.push_back(root);
        while let Some(node) = queue.pop_front() {
            order.push(node);
            for &(other, weight) in &graph.neighbors[block[node]] {
                let other = place[other];
                if other == usize::MAX || other == parent[node].0 {
                    continue;
                }
                if std::mem::replace(&mut seen[other], true) {
                    return Err(Error::config(
                        "block",
                        format!("a cycle at node {}", block[other]),
                        "a forest",
                    ));
                }
                parent[other] = (node, weight);
                queue.push_back(other);
            }
        }
    }
    for &node in order.iter().rev() {
        if diagonal[node].is_nan() || diagonal[node] <= 0.0 {
            return Err(Error::Indefinite {
                what: "the matrix of a tree",
                kind: "definite",
                detail: format!("node {} has the pivot {}", block[node], diagonal[node]),
            });
        }
        let (above, weight) = parent[node];
        if above != usize::MAX {
            let factor = weight / diagonal[node];
            diagonal[above] -= weight * factor;
            rhs[above] -= rhs[node] * factor;
        }
    }
    for &node in &order {
        let (above, weight) = parent[node];
        if above != usize::MAX {
            rhs[node] -= weight * rhs[above];
        }
        rhs[node] /= diagonal[node];
    }
    Ok(rhs)
}
