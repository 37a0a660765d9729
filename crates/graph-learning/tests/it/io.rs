use crate::support::*;
use candle_core::DType;
use graph_learning::io::*;
use graph_learning::sparse::Features;
use proptest::prelude::*;
use std::io::Write;
use std::path::Path;

fn write(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) {
    std::fs::write(dir.join(name), bytes).unwrap();
}

/// Pickle instructions of an array as NumPy 1 wrote it with protocol 2.
fn array(shape: &[u8], code: &str, data: &[u8]) -> Vec<u8> {
    let mut p =
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01"
            .to_vec();
    match shape {
        [a] => p.extend([b'K', *a, 0x85]),
        [a, b] => p.extend([b'K', *a, b'K', *b, 0x86]),
        _ => panic!(),
    }
    p.extend(b"cnumpy\ndtype\nU\x02");
    p.extend(code.as_bytes());
    p.extend(b"K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T");
    p.extend((data.len() as u32).to_le_bytes());
    p.extend(data);
    p.extend(b"tb");
    p
}

fn ints(values: &[i32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn pickle(body: Vec<u8>) -> Vec<u8> {
    [b"\x80\x02".to_vec(), body, b".".to_vec()].concat()
}

fn sparse(rows: u8, cols: u8, indptr: &[i32], indices: &[i32]) -> Vec<u8> {
    let ones: Vec<u8> = indices.iter().flat_map(|_| 1f32.to_le_bytes()).collect();
    let mut p = b"cscipy.sparse.csr\ncsr_matrix\n)\x81}(U\x06_shape".to_vec();
    p.extend([b'K', rows, b'K', cols, 0x86]);
    let mut field = |name: &str, value: Vec<u8>| {
        p.extend([b'U', name.len() as u8]);
        p.extend(name.as_bytes());
        p.extend(value);
    };
    field("indptr", array(&[indptr.len() as u8], "i4", &ints(indptr)));
    field(
        "indices",
        array(&[indices.len() as u8], "i4", &ints(indices)),
    );
    field("data", array(&[indices.len() as u8], "f4", &ones));
    p.extend(b"ub");
    pickle(p)
}

fn one_hot(labels: &[usize], classes: usize) -> Vec<u8> {
    let mut data = vec![0; labels.len() * classes];
    labels
        .iter()
        .enumerate()
        .for_each(|(i, c)| data[i * classes + c] = 1);
    pickle(array(
        &[labels.len() as u8, classes as u8],
        "i4",
        &ints(&data),
    ))
}

/// 502 described nodes of which 2 are for training, test nodes 502, 503 and 505; node 504 is never
/// described.
fn tiny_planetoid(dir: &Path) {
    let wide = |n: usize| -> (Vec<i32>, Vec<i32>) {
        (
            (0..=n as i32).collect(),
            (0..n as i32).map(|i| i % 3).collect(),
        )
    };
    let (indptr, indices) = wide(502);
    let long = |values: &[i32], code: &str, data: Vec<u8>| {
        // Shapes beyond 255 need two bytes.
        let mut p = array(&[0], code, &data);
        let at = p.windows(3).position(|w| w == [b'K', 0, 0x85]).unwrap();
        let at = at
            + 3
            + p[at + 3..]
                .windows(3)
                .position(|w| w == [b'K', 0, 0x85])
                .unwrap();
        let n = (values.len() as u16).to_le_bytes();
        p.splice(at..at + 2, [b'M', n[0], n[1]]);
        p
    };
    let mut all = b"cscipy.sparse.csr\ncsr_matrix\n)\x81}(U\x06_shapeM\xf6\x01K\x03\x86".to_vec();
    let ones: Vec<u8> = indices.iter().flat_map(|_| 1f32.to_le_bytes()).collect();
    for (name, value) in [
        ("indptr", long(&indptr, "i4", ints(&indptr))),
        ("indices", long(&indices, "i4", ints(&indices))),
        ("data", long(&indices, "f4", ones)),
    ] {
        all.extend([b'U', name.len() as u8]);
        all.extend(name.as_bytes());
        all.extend(value);
    }
    all.extend(b"ub");
    write(dir, "ind.tiny.allx", pickle(all));
    write(
        dir,
        "ind.tiny.tx",
        sparse(3, 3, &[0, 1, 2, 4], &[0, 1, 0, 2]),
    );
    write(dir, "ind.tiny.x", sparse(2, 3, &[0, 1, 2], &[0, 1]));
    let labels: Vec<usize> = (0..502).map(|i| i % 2).collect();
    let mut data = vec![0; 1004];
    labels
        .iter()
        .enumerate()
        .for_each(|(i, c)| data[2 * i + c] = 1);
    let mut ally = array(&[0, 2], "i4", &ints(&data));
    let at = ally.windows(2).rposition(|w| w == [b'K', 0]).unwrap();
    let at = ally[..at]
        .windows(5)
        .rposition(|w| w == [b'K', 0, b'K', 2, 0x86])
        .unwrap_or(at);
    ally.splice(at..at + 2, [b'M', 0xf6, 0x01]);
    write(dir, "ind.tiny.ally", pickle(ally));
    write(dir, "ind.tiny.ty", one_hot(&[1, 0, 1], 2));
    write(dir, "ind.tiny.y", one_hot(&[0, 1], 2));
    write(dir, "ind.tiny.test.index", "505\n502\n503\n");
    // 0: [1, 1, 505, 0] (a duplicate and a loop), 502: [503].
    let graph = b"ccollections\ndefaultdict\nc__builtin__\nlist\n\x85R(K\x00](K\x01K\x01M\xf9\x01K\x00eM\xf6\x01]M\xf7\x01au";
    write(dir, "ind.tiny.graph", pickle(graph.to_vec()));
}

#[test]
fn planetoid_files_are_assembled() {
    let dir = tempfile::tempdir().unwrap();
    tiny_planetoid(dir.path());
    let data = planetoid(dir.path(), "tiny").unwrap();
    assert_eq!(
        (data.graph.num_nodes(), data.graph.num_edges(), data.classes),
        (506, 6, 2)
    );
    assert!(data.graph.is_undirected() && !data.graph.has_self_loops());
    let x = data.x.to_dense(&CPU).unwrap().to_vec2::<f32>().unwrap();
    // Row 0 of tx belongs to the first id of test.index.
    assert_eq!(x[505], [1.0, 0.0, 0.0]);
    assert_eq!(x[502], [0.0, 1.0, 0.0]);
    assert_eq!(x[503], [1.0, 0.0, 1.0]);
    assert_eq!(x[504], [0.0, 0.0, 0.0]);
    assert_eq!(data.y[502..506], [0, 1, 0, 1]);
    let split = data.split.unwrap();
    assert_eq!(
        (split.train.len(), split.val.len(), split.test),
        (2, 500, vec![505, 502, 503])
    );
}

#[test]
fn pickles_that_ask_for_more_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    tiny_planetoid(dir.path());
    write(
        dir.path(),
        "ind.tiny.graph",
        b"\x80\x02cos\nsystem\nU\x02ls\x85R.",
    );
    assert_says(
        planetoid(dir.path(), "tiny"),
        &["ind.tiny.graph", "os.system", "refused"],
    );
    std::fs::remove_file(dir.path().join("ind.tiny.graph")).unwrap();
    assert_says(planetoid(dir.path(), "tiny"), &["ind.tiny.graph"]);
}

fn tiny_tu(dir: &Path) {
    write(dir, "T_A.txt", "1, 2\n2, 1\n4, 3\n3, 4\n");
    write(dir, "T_graph_indicator.txt", "1\n1\n3\n3\n");
    write(dir, "T_graph_labels.txt", "1\n-1\n1\n");
    write(dir, "T_node_labels.txt", "5\n7\n5\n5\n");
    write(dir, "T_edge_labels.txt", "0\n1\n1\n0\n");
    write(dir, "T_node_attributes.txt", " 1.5, 2\n0, 1\n3, 4\n5, 6\n");
}

#[test]
fn tu_files_are_split_into_graphs() {
    let dir = tempfile::tempdir().unwrap();
    tiny_tu(dir.path());
    let data = tu_dataset(dir.path(), "T").unwrap();
    assert_eq!((data.len(), data.y, data.classes), (3, vec![1, 0, 1], 2));
    let sizes: Vec<_> = data
        .graphs
        .iter()
        .map(|g| (g.num_nodes(), g.num_edges()))
        .collect();
    assert_eq!(sizes, [(2, 2), (0, 0), (2, 2)]);
    assert_eq!(data.graphs[2].edges().collect::<Vec<_>>(), [(1, 0), (0, 1)]);
    assert_eq!(values(&data.x[0]), [1.5, 2.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]);
    assert_eq!(data.num_node_attributes, 2);
    assert_eq!(data.node_labels.unwrap()[2], [0, 0]);
    assert_eq!(data.edge_labels.unwrap()[2], [1, 0]);
    for (file, text, words) in [
        ("T_A.txt", "1, 3\n", ["line 1", "one graph"]),
        ("T_A.txt", "0, 1\n", ["line 1", "nodes from 1"]),
        ("T_A.txt", "1 2\n", ["line 1", "row, col"]),
        (
            "T_graph_indicator.txt",
            "1\n1\n3\n9\n",
            ["line 4", "graph 9"],
        ),
        ("T_node_labels.txt", "1\n", ["1 lines", "expected 4"]),
        (
            "T_node_attributes.txt",
            "1\n2,3\n4\n5\n",
            ["line 2", "2 numbers"],
        ),
        ("T_graph_labels.txt", "x\n", ["line 1", "an integer"]),
    ] {
        tiny_tu(dir.path());
        write(dir.path(), file, text);
        assert_says(tu_dataset(dir.path(), "T"), &words);
    }
}

fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
    let header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({shape}), }}");
    let mut out = b"\x93NUMPY\x01\x00".to_vec();
    out.extend((header.len() as u16).to_le_bytes());
    out.extend(header.as_bytes());
    out.extend(data);
    out
}

fn tiny_npz() -> Vec<u8> {
    let mut archive = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
    let floats = |v: &[f32]| v.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    for (name, bytes) in [
        ("adj_data", npy("<f4", "2,", &floats(&[1.0, 1.0]))),
        ("adj_indices", npy("<i4", "2,", &ints(&[1, 2]))),
        ("adj_indptr", npy("<i4", "4,", &ints(&[0, 1, 2, 2]))),
        (
            "adj_shape",
            npy("<i8", "2,", &[3i64, 3].map(i64::to_le_bytes).concat()),
        ),
        ("attr_data", npy("<f4", "1,", &floats(&[2.0]))),
        ("attr_indices", npy("<i4", "1,", &ints(&[3]))),
        ("attr_indptr", npy("<i4", "4,", &ints(&[0, 0, 1, 1]))),
        (
            "attr_shape",
            npy("<i8", "2,", &[3i64, 5].map(i64::to_le_bytes).concat()),
        ),
        ("labels", npy("|i1", "3,", &[4, 9, 4])),
        ("node_names", npy("<U1", "3,", &[0; 12])),
    ] {
        let stored: zip::write::SimpleFileOptions = Default::default();
        archive.start_file(format!("{name}.npy"), stored).unwrap();
        archive.write_all(&bytes).unwrap();
    }
    archive.finish().unwrap().into_inner()
}

#[test]
fn npz_archives_are_read() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "g.npz", tiny_npz());
    let data = npz(dir.path().join("g.npz")).unwrap();
    assert_eq!(data.graph.edges().collect::<Vec<_>>(), [(0, 1), (1, 2)]);
    assert_eq!((data.y, data.classes), (vec![0, 1, 0], 2));
    assert_eq!(data.x.dims().unwrap(), (3, 5));
    assert_eq!(values(&data.x.to_dense(&CPU).unwrap())[8], 2.0);
}

fn tiny_ogb(dir: &Path) {
    let (raw, split) = (dir.join("raw"), dir.join("split/time"));
    std::fs::create_dir_all(&raw).unwrap();
    std::fs::create_dir_all(&split).unwrap();
    write(&raw, "num-node-list.csv", "3\n");
    write(&raw, "edge.csv", "0,1\n2,1\n");
    write(&raw, "node-label.csv", "0\n2\n0\n");
    write(&split, "train.csv", "0\n");
    write(&split, "valid.csv", "1\n");
    write(&split, "test.csv", "2\n");
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), Default::default());
    packed.write_all(b"1,2\n3,4\n5,-6\n").unwrap();
    write(&raw, "node-feat.csv.gz", packed.finish().unwrap());
}

#[test]
fn ogb_folders_are_read() {
    let dir = tempfile::tempdir().unwrap();
    tiny_ogb(dir.path());
    let data = ogb_node(dir.path()).unwrap();
    assert_eq!(
        (data.graph.num_edges(), data.y.clone(), data.classes),
        (2, vec![0, 1, 0], 2)
    );
    assert_eq!(
        values(&data.x.to_dense(&CPU).unwrap()),
        [1.0, 2.0, 3.0, 4.0, 5.0, -6.0]
    );
    assert_eq!(data.split.unwrap().test, [2]);
    write(&dir.path().join("raw"), "node-label.csv", "0\nnan\n0\n");
    assert_says(ogb_node(dir.path()), &["node-label.csv", "node 1"]);
    write(&dir.path().join("raw"), "edge.csv", "0,7\n");
    assert_says(ogb_node(dir.path()), &["edge.csv", "target 7"]);
}

#[test]
fn edge_lists_and_json_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("e.txt");
    write(dir.path(), "e.txt", "# comment\n0 1 0.5\n2,1,4\n");
    let list = edge_list(&path, None).unwrap();
    assert_eq!(list.graph.edges().collect::<Vec<_>>(), [(0, 1), (2, 1)]);
    assert_eq!(list.weights, Some(vec![0.5, 4.0]));
    assert_says(edge_list(&path, Some(2)), &["source 2"]);
    for (text, word) in [
        ("0\n", "u v"),
        ("0 1 nan\n", "u v"),
        ("0 1 1\n1 2\n", "1 of 2"),
        ("0 4000000000\n", "number of nodes"),
    ] {
        write(dir.path(), "e.txt", text);
        assert_says(edge_list(&path, None), &[word]);
    }
    write(
        dir.path(),
        "g.json",
        r#"{"directed": false, "nodes": [{"id": "a", "age": 3}, {"id": 7}],
        "links": [{"source": "a", "target": 7, "weight": 2.5}, {"source": 7, "target": 7, "weight": 1}]}"#,
    );
    let json = node_link(dir.path().join("g.json")).unwrap();
    assert_eq!(
        json.graph.edges().collect::<Vec<_>>(),
        [(0, 1), (1, 0), (1, 1)]
    );
    assert_eq!(json.edge_numbers("weight").unwrap(), [2.5, 2.5, 1.0]);
    assert_eq!(json.nodes[0]["age"], 3);
    assert!(json.edge_numbers("color").is_err());
    write(
        dir.path(),
        "g.json",
        r#"{"nodes": [{"id": 1}], "edges": [{"source": 1, "target": 2}]}"#,
    );
    assert_says(node_link(dir.path().join("g.json")), &["node 2"]);
}

#[test]
fn safetensors_files_are_read() {
    use candle_core::{safetensors::save, Tensor};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("g.safetensors");
    let tensor = |v: &[i64], shape: &[usize]| Tensor::from_slice(v, shape, &CPU).unwrap();
    let mut tensors = std::collections::HashMap::from([
        ("edge_index".to_string(), tensor(&[0, 1, 1, 0], &[2, 2])),
        ("x_indptr".to_string(), tensor(&[0, 1, 3], &[3])),
        ("x_indices".to_string(), tensor(&[2, 0, 1], &[3])),
        ("y".to_string(), tensor(&[1, 0], &[2])),
    ]);
    save(&tensors, &path).unwrap();
    let data = safetensors(&path).unwrap();
    assert!(matches!(data.x, Features::Sparse(_)) && data.split.is_none());
    assert_eq!((data.graph.num_edges(), data.classes), (2, 2));
    tensors.insert("x".into(), normal(1, &[2, 3], DType::F64));
    for name in ["train_idx", "val_idx", "test_idx"] {
        tensors.insert(name.into(), tensor(&[0], &[1]));
    }
    save(&tensors, &path).unwrap();
    assert_says(safetensors(&path), &["split", "node 0"]);
    tensors.remove("y");
    save(&tensors, &path).unwrap();
    assert_says(safetensors(&path), &["y"]);
}

/// The bytes with some of them changed, removed or the end cut off.
fn damaged(bytes: &[u8], seed: u64) -> Vec<u8> {
    let mut rng = graph_learning::RandomStream::new(seed);
    let mut bytes = bytes.to_vec();
    for _ in 0..1 + seed % 4 {
        if bytes.is_empty() {
            break;
        }
        let at = rng.below(bytes.len()).unwrap();
        match rng.bits() % 4 {
            0 => bytes.truncate(at),
            1 => {
                bytes.remove(at);
            }
            _ => bytes[at] = rng.bits() as u8,
        }
    }
    bytes
}

proptest! {
    #![proptest_config(cases(150))]

    /// A damaged file is an error or another valid file, never a panic.
    #[test]
    fn damaged_files_do_not_panic(seed in any::<u64>()) {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path();
        let npz_bytes = damaged(&tiny_npz(), seed);
        write(at, "g.npz", npz_bytes);
        let _ = npz(at.join("g.npz"));
        tiny_planetoid(at);
        let parts = ["allx", "tx", "ally", "ty", "y", "graph", "test.index"];
        let name = format!("ind.tiny.{}", parts[(seed % 7) as usize]);
        let bytes = std::fs::read(at.join(&name)).unwrap();
        write(at, &name, damaged(&bytes, seed));
        let _ = planetoid(at, "tiny");
        tiny_tu(at);
        let parts = ["A", "graph_indicator", "graph_labels", "node_labels", "edge_labels", "node_attributes"];
        let name = format!("T_{}.txt", parts[(seed % 6) as usize]);
        let bytes = std::fs::read(at.join(&name)).unwrap();
        write(at, &name, damaged(&bytes, seed));
        let _ = tu_dataset(at, "T");
        tiny_ogb(at);
        let parts = [
            "raw/num-node-list.csv", "raw/edge.csv", "raw/node-label.csv", "raw/node-feat.csv.gz",
            "split/time/train.csv",
        ];
        let name = parts[(seed % 5) as usize];
        let bytes = std::fs::read(at.join(name)).unwrap();
        write(at, name, damaged(&bytes, seed));
        let _ = ogb_node(at);
        write(at, "e.txt", damaged(b"0 1 0.5\n2 1 4\n", seed));
        let _ = edge_list(at.join("e.txt"), None);
        let json = br#"{"nodes": [{"id": 1}, {"id": 2}], "edges": [{"source": 1, "target": 2}]}"#;
        write(at, "g.json", damaged(json, seed));
        let _ = node_link(at.join("g.json"));
        let file = std::fs::read(FILES.path("cgs")).unwrap();
        write(at, "g.safetensors", damaged(&file[..2000], seed));
        let _ = safetensors(at.join("g.safetensors"));
    }
}
