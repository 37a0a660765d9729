//! Trees of building blocks, as molecules are put together from fragments.

use super::super::Environment;
use crate::error::check;
use crate::Result;

/// A building block.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fragment {
    /// Its name (a SMILES string, say); the environment does not read it.
    pub name: String,
    /// Places where further blocks can be attached; the bond to the parent is not among them.
    pub stems: usize,
}

/// One block of a tree with the block and the stem it hangs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FragmentNode {
    /// The number of the block in the table.
    pub block: u16,
    /// The node of the tree it hangs on; the root hangs on itself.
    pub parent: u16,
    /// The stem of the parent.
    pub stem: u16,
}

/// A rooted tree of blocks, nodes in breadth-first order by stem: equal trees are equal lists,
/// whatever the order they were built in.
pub type FragmentTree = Vec<FragmentNode>;

/// Trees of at most `max_blocks` blocks; an action puts a block on an open stem of a block that is
/// there, the way back removes a leaf. Every tree of at least `min_blocks` may be stopped at.
///
/// Features: for each of the `max_blocks` places the one-hot block (one more for "none") and the
/// one-hot parent place and stem.
#[derive(Debug, Clone, PartialEq)]
pub struct FragmentGraph {
    fragments: Vec<Fragment>,
    max_blocks: usize,
    min_blocks: usize,
    stems: usize,
}

impl FragmentGraph {
    /// Trees of these blocks.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`](crate::Error::InvalidConfig) for an empty table, blocks without any
    /// stem where trees of more than one block are asked for, or `min_blocks` outside
    /// `1..=max_blocks`.
    pub fn new(fragments: Vec<Fragment>, min_blocks: usize, max_blocks: usize) -> Result<Self> {
        check::at_least("FragmentGraph::fragments", fragments.len(), 1)?;
        let holds = 1 <= min_blocks && min_blocks <= max_blocks && max_blocks <= 255;
        let value = (min_blocks, max_blocks);
        let expected = "1 <= min <= max <= 255";
        check::require(holds, "FragmentGraph::blocks", value, expected)?;
        let stems = fragments.iter().map(|f| f.stems).max().unwrap_or(0);
        // A tree that ran out of stems below the minimum would be a dead end.
        let enough = min_blocks == 1 || fragments.iter().all(|f| f.stems >= 1);
        let expected = "at least one stem on each block, or min_blocks = 1";
        check::require(
            enough,
            "FragmentGraph::fragments",
            "a block without stem",
            expected,
        )?;
        Ok(Self {
            fragments,
            max_blocks,
            min_blocks,
            stems: stems.max(1),
        })
    }

    /// The table of blocks.
    pub fn fragments(&self) -> &[Fragment] {
        &self.fragments
    }

    fn action(&self, node: &FragmentNode) -> usize {
        let place = usize::from(node.parent) * self.stems + usize::from(node.stem);
        place * self.fragments.len() + usize::from(node.block)
    }

    fn used(&self, state: &FragmentTree, parent: usize, stem: usize) -> bool {
        let mut below = state.iter().skip(1);
        below.any(|n| usize::from(n.parent) == parent && usize::from(n.stem) == stem)
    }
}

/// Puts nodes into breadth-first order, children by stem.
fn canonical(nodes: &[FragmentNode]) -> FragmentTree {
    let mut order: Vec<usize> = vec![0];
    let mut out: FragmentTree = vec![];
    let mut at = 0;
    while at < order.len() {
        let old = order[at];
        let node = nodes[old];
        let parent = order
            .iter()
            .position(|o| *o == usize::from(node.parent))
            .unwrap_or(0);
        out.push(FragmentNode {
            parent: parent as u16,
            ..node
        });
        let mut children: Vec<usize> = (1..nodes.len())
            .filter(|k| usize::from(nodes[*k].parent) == old)
            .collect();
        children.sort_by_key(|k| nodes[*k].stem);
        order.extend(children);
        at += 1;
    }
    out
}

impl Environment for FragmentGraph {
    type State = FragmentTree;

    fn actions(&self) -> usize {
        self.max_blocks * self.stems * self.fragments.len() + 1
    }

    fn initial(&self) -> FragmentTree {
        vec![]
    }

    fn max_steps(&self) -> usize {
        self.max_blocks
    }

    fn forward_mask(&self, state: &FragmentTree, mask: &mut [bool]) {
        let blocks = self.fragments.len();
        if state.is_empty() {
            mask[..blocks].fill(true);
            return;
        }
        if state.len() < self.max_blocks {
            for (k, node) in state.iter().enumerate() {
                for stem in 0..self.fragments[usize::from(node.block)].stems {
                    if !self.used(state, k, stem) {
                        let place = (k * self.stems + stem) * blocks;
                        mask[place..place + blocks].fill(true);
                    }
                }
            }
        }
        if let Some(stop) = mask.last_mut() {
            *stop = state.len() >= self.min_blocks;
        }
    }

    fn backward_mask(&self, state: &FragmentTree, mask: &mut [bool]) {
        for (k, node) in state.iter().enumerate() {
            let leaf = !state.iter().skip(1).any(|n| usize::from(n.parent) == k);
            if leaf && (k > 0 || state.len() == 1) {
                mask[self.action(node)] = true;
            }
        }
    }

    fn step(&self, state: &mut FragmentTree, action: usize) {
        let place = action / self.fragments.len();
        state.push(FragmentNode {
            block: (action % self.fragments.len()) as u16,
            parent: (place / self.stems) as u16,
            stem: (place % self.stems) as u16,
        });
        *state = canonical(state);
    }

    fn undo(&self, state: &mut FragmentTree, action: usize) {
        if state.len() == 1 {
            state.clear();
            return;
        }
        let leaf = (1..state.len()).find(|k| self.action(&state[*k]) == action);
        if let Some(leaf) = leaf {
            state.remove(leaf);
            // A leaf has no children, so that the order stays breadth first.
            for node in state.iter_mut().filter(|n| usize::from(n.parent) > leaf) {
                node.parent -= 1;
            }
        }
    }

    fn feature_width(&self) -> usize {
        self.max_blocks * (self.fragments.len() + 1 + self.max_blocks + self.stems)
    }

    fn write_features(&self, state: &FragmentTree, out: &mut [f32]) {
        let blocks = self.fragments.len();
        let width = blocks + 1 + self.max_blocks + self.stems;
        for (k, place) in out.chunks_mut(width).enumerate() {
            let Some(node) = state.get(k) else {
                place[blocks] = 1.0;
                continue;
            };
            place[usize::from(node.block)] = 1.0;
            if k > 0 {
                place[blocks + 1 + usize::from(node.parent)] = 1.0;
                place[blocks + 1 + self.max_blocks + usize::from(node.stem)] = 1.0;
            }
        }
    }
}
