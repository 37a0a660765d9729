use candle_core::DType;
use flate2::{write::GzEncoder, Compression};
use std::io::Write;
use std::path::{Path, PathBuf};
use thalweg_datasets::load::idx::{images, mnist, read, MNIST_FILES};
use thalweg_datasets::Error;

fn header(kind: u8, shape: &[u32]) -> Vec<u8> {
    let mut bytes = vec![0, 0, kind, shape.len() as u8];
    bytes.extend(shape.iter().flat_map(|d| d.to_be_bytes()));
    bytes
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

#[test]
fn all_types_are_read_plain_and_gzip() {
    let dir = tempfile::tempdir().unwrap();
    for kind in [0x08, 0x0B, 0x0C, 0x0D, 0x0E] {
        let empty = read(write(dir.path(), "x", &header(kind, &[0, 3]))).unwrap();
        assert_eq!(empty.dims(), &[0, 3]);
    }
    let be = |values: &[f64], to: &dyn Fn(f64) -> Vec<u8>| -> Vec<u8> {
        values.iter().flat_map(|v| to(*v)).collect()
    };
    let values = [3.0, -2.0, 100.0, 7.0, 0.0, -1.0];
    type Encode = Box<dyn Fn(f64) -> Vec<u8>>;
    let cases: [(u8, DType, Encode); 4] = [
        (
            0x0B,
            DType::I16,
            Box::new(|v| (v as i16).to_be_bytes().to_vec()),
        ),
        (
            0x0C,
            DType::I32,
            Box::new(|v| (v as i32).to_be_bytes().to_vec()),
        ),
        (
            0x0D,
            DType::F32,
            Box::new(|v| (v as f32).to_be_bytes().to_vec()),
        ),
        (0x0E, DType::F64, Box::new(|v| v.to_be_bytes().to_vec())),
    ];
    for (kind, dtype, encode) in &cases {
        let mut bytes = header(*kind, &[2, 3]);
        bytes.extend(be(&values, encode));
        for content in [bytes.clone(), gzip(&bytes)] {
            let tensor = read(write(dir.path(), "x", &content)).unwrap();
            assert_eq!((tensor.dtype(), tensor.dims()), (*dtype, &[2, 3][..]));
            let tensor = tensor.to_dtype(DType::F64).unwrap();
            assert_eq!(
                tensor.flatten_all().unwrap().to_vec1::<f64>().unwrap(),
                values
            );
        }
    }
}

#[test]
fn images_are_scaled_and_labelled() {
    let dir = tempfile::tempdir().unwrap();
    let mut x = header(8, &[2, 2, 2]);
    x.extend([0, 51, 255, 0, 1, 2, 3, 4]);
    let mut y = header(8, &[2]);
    y.extend([1, 0]);
    let (x, y) = (
        write(dir.path(), "x", &x),
        write(dir.path(), "y", &gzip(&y)),
    );
    let data = images(&x, &y, 2).unwrap();
    assert_eq!(data.inputs.dims(), &[2, 1, 2, 2]);
    let pixels = data.inputs.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert!((pixels[1] - 0.2).abs() < 1e-6 && (pixels[2] - 1.0).abs() < 1e-6);
    assert_eq!(data.label_vec().unwrap(), [1, 0]);
    assert!(matches!(
        images(&x, &y, 1),
        Err(Error::LabelOutOfRange { label: 1, .. })
    ));
    assert!(matches!(images(&y, &y, 2), Err(Error::BadFile { .. })));
    assert!(matches!(images(&x, &x, 2), Err(Error::BadFile { .. })));
}

#[test]
fn damaged_files_are_named_errors() {
    let dir = tempfile::tempdir().unwrap();
    let whole = [header(8, &[2, 3]), vec![1, 2, 3, 4, 5, 6]].concat();
    let truncated = |bytes: &[u8]| {
        let error = read(write(dir.path(), "short", bytes)).unwrap_err();
        assert!(
            matches!(error, Error::Truncated { .. }),
            "{} bytes: {error}",
            bytes.len()
        );
    };
    (0..whole.len()).for_each(|n| truncated(&whole[..n]));
    let packed = gzip(&whole);
    (2..packed.len()).for_each(|n| truncated(&packed[..n]));

    let long = [whole.as_slice(), &[7]].concat();
    let error = read(write(dir.path(), "long", &long)).unwrap_err();
    assert!(matches!(error, Error::TooLong { .. }), "{error}");
    for magic in [[0, 1, 8, 1], [0, 0, 7, 1], [0, 0, 8, 0], *b"PNG!"] {
        let error = read(write(dir.path(), "magic", &magic)).unwrap_err();
        assert!(matches!(error, Error::Magic { .. }), "{error}");
    }
    for header in [header(9, &[1]), header(8, &[1; 9])] {
        let error = read(write(dir.path(), "kind", &header)).unwrap_err();
        assert!(matches!(error, Error::BadFile { .. }), "{error}");
    }
    let error = read(dir.path().join("absent")).unwrap_err();
    assert!(error.to_string().contains("absent"), "{error}");
}

/// A header that promises more than memory has must not reserve it.
#[test]
fn a_lying_header_costs_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let lie = [header(8, &[u32::MAX, 1000]), vec![1, 2, 3]].concat();
    for bytes in [lie.clone(), gzip(&lie)] {
        let error = read(write(dir.path(), "lie", &bytes)).unwrap_err();
        assert!(
            matches!(error, Error::Truncated { found: 3, .. }),
            "{error}"
        );
    }
    let overflow = header(8, &[u32::MAX; 8]);
    let error = read(write(dir.path(), "overflow", &overflow)).unwrap_err();
    assert!(matches!(error, Error::BadFile { .. }), "{error}");
}

#[test]
fn mnist_lists_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), MNIST_FILES[1], &[]);
    write(dir.path(), &format!("{}.gz", MNIST_FILES[2]), &[]);
    match mnist(dir.path()).unwrap_err() {
        Error::MissingFiles { missing, .. } => {
            assert_eq!(missing, [MNIST_FILES[0], MNIST_FILES[3]]);
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_small_mnist_folder_is_read() {
    let dir = tempfile::tempdir().unwrap();
    for (i, name) in MNIST_FILES.iter().enumerate() {
        let n = if i < 2 { 3 } else { 2 };
        let bytes = if i % 2 == 0 {
            [header(8, &[n, 28, 28]), vec![9; 784 * n as usize]].concat()
        } else {
            [header(8, &[n]), vec![i as u8; n as usize]].concat()
        };
        if i == 0 {
            write(dir.path(), name, &bytes);
        } else {
            write(dir.path(), &format!("{name}.gz"), &gzip(&bytes));
        }
    }
    let data = mnist(dir.path()).unwrap();
    assert_eq!(data.train.inputs.dims(), &[3, 1, 28, 28]);
    assert_eq!(data.test.label_vec().unwrap(), [3, 3]);
}
