//! The archives of Shchur et al., *Pitfalls of Graph Neural Network Evaluation*, 2018.

use super::{classes_of, NodeData};
use crate::graph::Graph;
use crate::sparse::{Features, SparseFeatures};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use zip::ZipArchive;

/// A numeric array of an archive.
struct Array {
    shape: Vec<usize>,
    values: Vec<f64>,
}

/// Reads an archive with the adjacency (`adj_data`, `adj_indices`, `adj_indptr`, `adj_shape`, or
/// `adj_matrix.data`, ...), the features (`attr_*`, sparse or `attr_matrix` dense) and `labels`.
/// Arrays of text are skipped. Edges are those of the file: row -> column, directed, with whatever
/// self-loops there are.
///
/// # Errors
/// [`Error::Io`], [`Error::BadFile`] for a damaged archive, a missing array, or arrays that do not fit
/// together.
pub fn npz(path: impl AsRef<Path>) -> Result<NodeData> {
    let path = path.as_ref();
    let arrays = numeric_arrays(path)?;
    let bad = |reason: String| Error::bad_file(path, reason);
    let get = |prefix: &str, part: &str| {
        let names = [
            format!("{prefix}_{part}"),
            format!("{prefix}_matrix.{part}"),
        ];
        let found = names.iter().find_map(|name| arrays.get(name));
        found.ok_or_else(|| bad(format!("no array `{prefix}_{part}`")))
    };
    let (n, indptr, indices, _) = csr(path, "adj", &get)?;
    let row_of = |(r, w): (usize, &[u32])| std::iter::repeat_n(r as u32, (w[1] - w[0]) as usize);
    let src: Vec<u32> = indptr.windows(2).enumerate().flat_map(row_of).collect();
    let graph = Graph::from_edges(n, src, indices).map_err(|e| bad(e.to_string()))?;
    let x = match arrays.get("attr_matrix") {
        Some(dense) if dense.shape.len() == 2 => {
            let data = Tensor::from_slice(&dense.values, dense.shape.as_slice(), &Device::Cpu)?;
            Features::Dense(data.to_dtype(DType::F32)?)
        }
        _ => {
            let (_, indptr, indices, values) = csr(path, "attr", &get)?;
            let cols = get("attr", "shape")?
                .values
                .get(1)
                .map_or(0, |c| *c as usize);
            let matrix = SparseFeatures::from_csr(cols, &indptr, &indices, values, DType::F32);
            matrix.map_err(|e| bad(e.to_string()))?.into()
        }
    };
    let labels = arrays
        .get("labels")
        .ok_or_else(|| bad("no array `labels`".into()))?;
    let raw: Vec<i64> = labels.values.iter().map(|v| *v as i64).collect();
    let (y, classes) = classes_of(&raw);
    let data = NodeData {
        graph,
        x,
        y,
        classes,
        split: None,
    };
    data.validate().map_err(|e| bad(e.to_string()))?;
    Ok(data)
}

type Csr = (usize, Vec<u32>, Vec<u32>, Vec<f64>);

/// Rows, borders, columns and values of a sparse matrix, with borders that do not decrease.
fn csr<'a>(
    path: &Path,
    prefix: &str,
    get: &impl Fn(&str, &str) -> Result<&'a Array>,
) -> Result<Csr> {
    let bad = |reason: String| Error::bad_file(path, reason);
    let indices = |part: &str| -> Result<Vec<u32>> {
        let one = |v: &f64| match *v {
            v if v >= 0.0 && v <= f64::from(u32::MAX) => Ok(v as u32),
            v => Err(bad(format!("`{prefix}_{part}` holds {v}"))),
        };
        get(prefix, part)?.values.iter().map(one).collect()
    };
    let (indptr, columns) = (indices("indptr")?, indices("indices")?);
    let rows = get(prefix, "shape")?
        .values
        .first()
        .map_or(0, |r| *r as usize);
    let whole = indptr.first() == Some(&0) && indptr.last() == Some(&(columns.len() as u32));
    if indptr.len() != rows.saturating_add(1) || !whole || indptr.windows(2).any(|w| w[0] > w[1]) {
        return Err(bad(format!(
            "`{prefix}_indptr` is not {rows} rows of {} entries",
            columns.len()
        )));
    }
    Ok((rows, indptr, columns, get(prefix, "data")?.values.clone()))
}

fn numeric_arrays(path: &Path) -> Result<BTreeMap<String, Array>> {
    let bad = |e: &dyn std::fmt::Display| Error::bad_file(path, e);
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    let mut archive = ZipArchive::new(BufReader::new(file)).map_err(|e| bad(&e))?;
    let mut arrays = BTreeMap::new();
    for i in 0..archive.len() {
        let mut entry = archive.by_index(i).map_err(|e| bad(&e))?;
        let name = entry.name().map_err(|e| bad(&e))?.to_string();
        let mut bytes = Vec::new();
        let limit = super::MAX_UNPACKED;
        let read = entry.by_ref().take(limit).read_to_end(&mut bytes);
        read.map_err(|e| bad(&format!("{name}: {e}")))?;
        let name = name.strip_suffix(".npy").unwrap_or(&name).to_string();
        let array = parse_npy(&bytes).map_err(|e| bad(&format!("{name}: {e}")))?;
        if let Some(array) = array {
            arrays.insert(name, array);
        }
    }
    Ok(arrays)
}

/// A `.npy` file as numbers; nothing for text and objects.
fn parse_npy(bytes: &[u8]) -> std::result::Result<Option<Array>, String> {
    let (start, wide) = match bytes.get(..8) {
        Some([0x93, b'N', b'U', b'M', b'P', b'Y', 1, _]) => (10, false),
        Some([0x93, b'N', b'U', b'M', b'P', b'Y', 2 | 3, _]) => (12, true),
        _ => return Err("not in NumPy's format".into()),
    };
    let length = bytes.get(8..start).ok_or("ends in its header")?;
    let length = length
        .iter()
        .rev()
        .fold(0usize, |n, b| n << 8 | usize::from(*b));
    if wide && length > 1 << 16 {
        return Err(format!("a header of {length} bytes"));
    }
    let header = bytes
        .get(start..start + length)
        .ok_or("ends in its header")?;
    let header = std::str::from_utf8(header).map_err(|_| "a header that is not text")?;
    let after = |key: &str| {
        header
            .split_once(&format!("'{key}':"))
            .map(|(_, v)| v.trim_start())
    };
    let descr = after("descr").and_then(|v| v.strip_prefix('\''));
    let descr = descr.and_then(|v| v.split('\'').next());
    let Some(descr) = descr else { return Ok(None) };
    if after("fortran_order").is_some_and(|v| v.starts_with("True")) {
        return Err("in Fortran order".into());
    }
    let shape = after("shape")
        .and_then(|v| v.strip_prefix('('))
        .and_then(|v| v.split_once(')'));
    let (shape, _) = shape.ok_or("no shape in its header")?;
    let sizes = shape.split(',').map(str::trim).filter(|s| !s.is_empty());
    let shape: Vec<usize> = sizes
        .map(|s| s.parse().map_err(|_| format!("a shape of `{s}`")))
        .collect::<std::result::Result<_, _>>()?;
    let data = &bytes[start + length..];
    macro_rules! numbers {
        ($t:ty) => {{
            let one = |b: &[u8]| {
                let mut word = [0u8; std::mem::size_of::<$t>()];
                word.copy_from_slice(b);
                <$t>::from_le_bytes(word) as f64
            };
            let size = std::mem::size_of::<$t>();
            (
                data.chunks_exact(size).map(one).collect::<Vec<f64>>(),
                data.len() % size,
            )
        }};
    }
    let (values, rest) = match descr.trim_start_matches(['<', '|', '=']) {
        "f4" => numbers!(f32),
        "f8" => numbers!(f64),
        "i1" => numbers!(i8),
        "i2" => numbers!(i16),
        "i4" => numbers!(i32),
        "i8" => numbers!(i64),
        "u1" | "b1" => numbers!(u8),
        "u4" => numbers!(u32),
        _ => return Ok(None),
    };
    let count = shape.iter().try_fold(1usize, |n, d| n.checked_mul(*d));
    if count != Some(values.len()) || rest != 0 {
        return Err(format!("{} numbers for shape {shape:?}", values.len()));
    }
    Ok(Some(Array { shape, values }))
}
