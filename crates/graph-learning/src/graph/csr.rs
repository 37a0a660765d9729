//! Compressed sparse rows.

/// The edges of a graph grouped by one of their ends.
///
/// Row `r` holds the positions `indptr[r]..indptr[r + 1]`; at each position `indices` names the
/// other end and `perm` the edge in the order in which the graph was given. Positions of a row are
/// sorted by `(index, edge)`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Csr {
    cols: usize,
    indptr: Vec<u32>,
    indices: Vec<u32>,
    perm: Vec<u32>,
    in_order: bool,
    chunks: Vec<usize>,
}

/// Work (edges and rows) below which a chunk is not worth a task of its own.
const CHUNK_WORK: usize = 1 << 11;
/// Chunks at most.
const MAX_CHUNKS: usize = 256;

impl Csr {
    /// Groups edges by `major`, sorted by `minor` inside a row; the order of equal pairs is kept.
    /// All values are below `rows` and `cols`.
    pub(crate) fn build(rows: usize, cols: usize, major: &[u32], minor: &[u32]) -> Self {
        let key = |e: usize| (major[e], minor[e]);
        let in_order = (1..major.len()).all(|e| key(e - 1) <= key(e));
        let perm: Vec<u32> = if in_order {
            (0..major.len() as u32).collect()
        } else {
            let by_minor = counting_sort(cols, minor, 0..minor.len() as u32);
            counting_sort(rows, major, by_minor.into_iter())
        };
        let indptr = offsets(rows, major);
        let indices = perm.iter().map(|e| minor[*e as usize]).collect();
        Self {
            cols,
            chunks: even_chunks(&indptr),
            indptr,
            indices,
            perm,
            in_order,
        }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.indptr.len() - 1
    }

    /// Number of columns: what `indices` stays below.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number of edges.
    pub fn len(&self) -> usize {
        self.indices.len()
    }

    /// Whether there are no edges.
    pub fn is_empty(&self) -> bool {
        self.indices.is_empty()
    }

    /// Where each row begins, and where the last one ends: `rows + 1` numbers.
    pub fn indptr(&self) -> &[u32] {
        &self.indptr
    }

    /// The other end of the edge at each position.
    pub fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// The edge at each position, as its place in the graph's edge list.
    pub fn perm(&self) -> &[u32] {
        &self.perm
    }

    /// Whether the graph's edge list is in this order already (`perm` is the identity).
    pub fn in_order(&self) -> bool {
        self.in_order
    }

    /// The positions of row `r`.
    #[inline(always)]
    pub fn row(&self, r: usize) -> std::ops::Range<usize> {
        self.indptr[r] as usize..self.indptr[r + 1] as usize
    }

    /// The other ends of row `r`.
    pub fn neighbors(&self, r: usize) -> &[u32] {
        &self.indices[self.row(r)]
    }

    /// Number of edges of each row.
    pub fn degrees(&self) -> Vec<u32> {
        self.indptr.windows(2).map(|w| w[1] - w[0]).collect()
    }

    /// Borders of runs of rows with about the same work.
    pub(crate) fn chunks(&self) -> &[usize] {
        &self.chunks
    }
}

fn offsets(rows: usize, major: &[u32]) -> Vec<u32> {
    let mut indptr = vec![0u32; rows + 1];
    for r in major {
        indptr[*r as usize + 1] += 1;
    }
    for r in 0..rows {
        indptr[r + 1] += indptr[r];
    }
    indptr
}

/// The items of `order` by their key, stable.
fn counting_sort(keys: usize, key: &[u32], order: impl Iterator<Item = u32>) -> Vec<u32> {
    let mut next = offsets(keys, key);
    let mut sorted = vec![0u32; key.len()];
    for item in order {
        let slot = &mut next[key[item as usize] as usize];
        sorted[*slot as usize] = item;
        *slot += 1;
    }
    sorted
}

/// Row borders that cut edges and rows into even parts. Results never depend on the cut: a row is
/// summed by one thread, in its order.
fn even_chunks(indptr: &[u32]) -> Vec<usize> {
    let rows = indptr.len() - 1;
    let work = |r: usize| indptr[r] as usize + r;
    let parts = (work(rows) / CHUNK_WORK).clamp(1, MAX_CHUNKS);
    let mut borders = vec![0];
    let mut row = 0;
    for part in 1..=parts {
        let goal = work(rows) * part / parts;
        while row < rows && (work(row) < goal || part == parts) {
            row += 1;
        }
        if borders.last() != Some(&row) {
            borders.push(row);
        }
    }
    borders
}
