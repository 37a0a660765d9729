use candle_core::{DType, Device, Tensor};
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};
use thalweg_datasets::load::npy::{classification, read_npy, read_npz, read_npz_array};
use thalweg_datasets::Error;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/numpy.npz")
}

fn write(dir: &Path, bytes: &[u8]) -> PathBuf {
    let path = dir.join("x.npy");
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A file of version 1 with this dictionary and these bytes.
fn npy(dictionary: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend((dictionary.len() as u16).to_le_bytes());
    bytes.extend(dictionary.as_bytes());
    bytes.extend(data);
    bytes
}

const DICTIONARY: &str = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n";

#[test]
fn every_type_that_numpy_wrote_is_read() {
    let arrays = read_npz(fixture()).unwrap();
    assert_eq!(arrays.len(), 16);
    let expected: [(&str, DType, &[usize], &[f64]); 15] = [
        ("f2", DType::F16, &[2, 2], &[0.5, -2.0, 3.0, 4.0]),
        (
            "f4",
            DType::F32,
            &[2, 3],
            &[0.0, 0.25, 0.5, 0.75, 1.0, 1.25],
        ),
        ("i1", DType::I64, &[2], &[-3.0, 127.0]),
        ("i2", DType::I16, &[2], &[-300.0, 7.0]),
        ("i4", DType::I32, &[2], &[-70_000.0, 7.0]),
        ("i8", DType::I64, &[2], &[-(2f64.powi(40)), 7.0]),
        ("u1", DType::U8, &[2], &[200.0, 7.0]),
        ("u2", DType::U32, &[2], &[60_000.0, 7.0]),
        ("u4", DType::U32, &[2], &[2f64.powi(31) + 5.0, 7.0]),
        ("u8", DType::I64, &[2], &[2f64.powi(40), 7.0]),
        ("b1", DType::U8, &[2], &[1.0, 0.0]),
        ("big", DType::F64, &[2], &[1.5, -2.25]),
        ("big_u2", DType::U32, &[2], &[1.0, 60_000.0]),
        ("scalar", DType::F64, &[], &[2.5]),
        ("empty", DType::F32, &[0, 3], &[]),
    ];
    for (name, dtype, shape, values) in expected {
        let array = &arrays[name];
        assert_eq!((array.dtype(), array.dims()), (dtype, shape), "{name}");
        if shape != [0, 3] {
            let array = array.to_dtype(DType::F64).unwrap();
            let array = array.flatten_all().unwrap().to_vec1::<f64>().unwrap();
            assert_eq!(array, values, "{name}");
        }
    }
    // Written in Fortran order, the values count up in C order.
    let fortran = read_npz_array(fixture(), "f8").unwrap();
    assert_eq!(fortran.dims(), &[2, 3, 4]);
    assert_eq!(
        fortran.flatten_all().unwrap().to_vec1::<f64>().unwrap(),
        (0..24).map(f64::from).collect::<Vec<_>>()
    );
    let message = read_npz_array(fixture(), "absent").unwrap_err().to_string();
    assert!(
        message.contains("no array `absent`: it has f2, f4"),
        "{message}"
    );
}

#[test]
fn what_candle_wrote_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let tensor = Tensor::arange(0f32, 6.0, &Device::Cpu).unwrap();
    let tensor = tensor.reshape((3, 2)).unwrap();
    let path = dir.path().join("a.npy");
    tensor.write_npy(&path).unwrap();
    assert_eq!(
        read_npy(&path).unwrap().to_vec2::<f32>().unwrap(),
        tensor.to_vec2::<f32>().unwrap()
    );
    let path = dir.path().join("a.npz");
    Tensor::write_npz(&[("x", &tensor)], &path).unwrap();
    assert_eq!(read_npz(&path).unwrap()["x"].dims(), &[3, 2]);
}

#[test]
fn damaged_arrays_are_named_errors() {
    let dir = tempfile::tempdir().unwrap();
    let whole = npy(DICTIONARY, &[0; 24]);
    assert!(read_npy(write(dir.path(), &whole)).is_ok());
    for n in 0..whole.len() {
        let error = read_npy(write(dir.path(), &whole[..n])).unwrap_err();
        assert!(matches!(error, Error::Truncated { .. }), "{n}: {error}");
    }
    let error = read_npy(write(dir.path(), &npy(DICTIONARY, &[0; 25]))).unwrap_err();
    assert!(matches!(error, Error::TooLong { .. }), "{error}");
    let error = read_npy(write(dir.path(), b"PK\x03\x04 not an array")).unwrap_err();
    assert!(matches!(error, Error::Magic { .. }), "{error}");
    for (from, to) in [
        ("<f4", "<c8"),
        ("<f4", "|O"),
        ("<f4", ""),
        ("'<f4'", "[('x', '<f4')]"),
        ("False", "Maybe"),
        ("(2, 3)", "(2, -3)"),
        ("(2, 3)", "2, 3"),
        ("'shape'", "'form'"),
    ] {
        let file = npy(&DICTIONARY.replace(from, to), &[0; 24]);
        let error = read_npy(write(dir.path(), &file)).unwrap_err();
        assert!(matches!(error, Error::BadFile { .. }), "{to}: {error}");
    }
    let mut newer = whole.clone();
    newer[6] = 4;
    assert!(read_npy(write(dir.path(), &newer)).is_err());
    assert!(matches!(
        read_npy(dir.path().join("absent.npy")),
        Err(Error::Io { .. })
    ));
}

/// Sizes that no memory holds are refused or run into the end of the file; nothing is reserved.
#[test]
fn lying_headers_cost_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = npy(&DICTIONARY.replace("2, 3", "1000000000000, 3"), &[0; 24]);
    let error = read_npy(write(dir.path(), &file)).unwrap_err();
    assert!(
        matches!(error, Error::Truncated { found: 24, .. }),
        "{error}"
    );
    let file = npy(&DICTIONARY.replace("2, 3", "18446744073709551615, 3"), &[]);
    let error = read_npy(write(dir.path(), &file)).unwrap_err();
    assert!(matches!(error, Error::BadFile { .. }), "{error}");
    let mut header = b"\x93NUMPY\x02\x00".to_vec();
    header.extend(u32::MAX.to_le_bytes());
    let error = read_npy(write(dir.path(), &header)).unwrap_err();
    assert!(matches!(error, Error::BadFile { .. }), "{error}");

    let mut archive = zip::ZipWriter::new(Cursor::new(Vec::new()));
    let options = zip::write::FileOptions::<()>::default();
    archive.start_file("x.npy", options).unwrap();
    archive
        .write_all(&npy(&DICTIONARY.replace("2, 3", "1000000000, 3"), &[0; 24]))
        .unwrap();
    let bytes = archive.finish().unwrap().into_inner();
    let error = read_npz(write(dir.path(), &bytes)).unwrap_err();
    assert!(error.to_string().contains("[x]"), "{error}");
    assert!(read_npz(write(dir.path(), &bytes[..bytes.len() / 2])).is_err());
    assert!(read_npz(write(dir.path(), b"")).is_err());
}

#[test]
fn labels_of_any_integer_type_make_a_data_set() {
    let x = Tensor::zeros((3, 2), DType::F32, &Device::Cpu).unwrap();
    let column = Tensor::new(&[[0u8], [4], [2]], &Device::Cpu).unwrap();
    let data = classification(x.clone(), &column).unwrap();
    assert_eq!(
        (data.classes, data.label_vec().unwrap()),
        (5, vec![0, 4, 2])
    );
    let negative = Tensor::new(&[0i64, -1, 2], &Device::Cpu).unwrap();
    assert!(matches!(
        classification(x.clone(), &negative),
        Err(Error::InvalidArgument { .. })
    ));
    let floats = Tensor::new(&[0f32, 1.0, 2.0], &Device::Cpu).unwrap();
    assert!(matches!(
        classification(x.clone(), &floats),
        Err(Error::BadTensor { .. })
    ));
    let short = Tensor::new(&[0i64, 1], &Device::Cpu).unwrap();
    assert!(matches!(
        classification(x, &short),
        Err(Error::LengthMismatch { .. })
    ));
}
