use candle_core::DType;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use thalweg_tensor_core::verify::{Reference, Report, Tolerance};
use thalweg_tensor_core::Error;

type Entry<'a> = (&'a str, Dtype, Vec<usize>, Vec<u8>);

fn f64s<'a>(name: &'a str, values: &[f64]) -> Entry<'a> {
    (
        name,
        Dtype::F64,
        vec![values.len()],
        values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    )
}

fn write(folder: &Path, entries: &[Entry], metadata: &[(&str, &str)]) -> PathBuf {
    let path = folder.join("file.safetensors");
    let view = |(name, dtype, shape, bytes): &Entry| {
        (
            name.to_string(),
            TensorView::new(
                *dtype,
                shape.clone(),
                Box::leak(bytes.clone().into_boxed_slice()),
            )
            .unwrap(),
        )
    };
    let header: HashMap<String, String> = metadata
        .iter()
        .map(|(k, v)| (k.to_string(), v.to_string()))
        .collect();
    safetensors::serialize_to_file(entries.iter().map(view), Some(header), &path).unwrap();
    path
}

fn open(entries: &[Entry], metadata: &[(&str, &str)]) -> Reference {
    let folder = tempfile::tempdir().unwrap();
    Reference::open(write(folder.path(), entries, metadata)).unwrap()
}

/// One comparison of `got` with `expected`.
fn compare(expected: &[f64], got: &[f64], tolerance: Tolerance) -> Report {
    let mut file = open(&[f64s("y", expected)], &[]);
    file.compare("y", got, tolerance).unwrap();
    file.finish()
}

#[test]
fn a_file_is_verified_when_everything_in_it_is_accounted_for() {
    let entries = [
        f64s("x", &[1.0, 2.0]),
        f64s("y", &[2.0, 4.0]),
        f64s("later", &[0.0]),
    ];
    let mut file = open(&entries, &[]);
    let x = file.input("x").unwrap();
    file.input("x").unwrap();
    let doubled: Vec<f64> = x.values.iter().map(|x| 2.0 * x).collect();
    file.compare("y", &doubled, Tolerance::Absolute(0.0))
        .unwrap();
    file.uncovered("later", "of a later version").unwrap();
    let report = file.finish();
    assert!(report.passed(), "{:?}", report.failures());
    assert!(report.failures().is_empty() && report.inputs == 1);
    assert_eq!(
        report.uncovered,
        [("later".to_string(), "of a later version".to_string())]
    );
}

#[test]
fn an_unknown_tensor_fails() {
    let mut file = open(&[f64s("y", &[1.0]), f64s("stray", &[1.0])], &[]);
    file.compare("y", &[1.0], Tolerance::Absolute(0.0)).unwrap();
    // Looking at it is not using it.
    file.expected("stray").unwrap();
    let report = file.finish();
    assert!(!report.passed());
    assert_eq!(report.failures(), ["stray: unknown tensor"]);
}

#[test]
fn a_file_of_which_nothing_is_compared_fails() {
    let mut file = open(&[f64s("x", &[1.0])], &[]);
    file.input("x").unwrap();
    let report = file.finish();
    assert!(!report.passed());
    assert_eq!(report.failures(), ["nothing was compared"]);
}

#[test]
fn wrong_values_fail_and_the_worst_is_named() {
    let report = compare(
        &[1.0, 2.0, 300.0],
        &[1.0, 2.1, 300.2],
        Tolerance::Mixed(1e-3),
    );
    let comparison = &report.comparisons[0];
    assert!(!report.passed() && !comparison.passed);
    assert!((comparison.worst - 50.0).abs() < 1e-6 && (comparison.max_abs - 0.2).abs() < 1e-9);
    assert!(
        comparison.detail.contains("2 of 3") && comparison.detail.contains("at 1: 2.1 for 2"),
        "{}",
        comparison.detail
    );
    assert!(!compare(&[1.0, 2.0], &[1.0], Tolerance::Mixed(1.0)).passed());
    assert!(!compare(&[1.0], &[1.0, 2.0], Tolerance::Mismatches(5)).passed());
}

#[test]
fn tolerances_mean_what_they_say() {
    use Tolerance::{Absolute, Mismatches, Mixed, Scaled};
    let ok = |expected: f64, got: f64, tolerance| compare(&[expected], &[got], tolerance).passed();
    assert!(ok(0.0, 0.99e-3, Mixed(1e-3)) && !ok(0.0, 1.01e-3, Mixed(1e-3)));
    assert!(ok(-100.0, -100.099, Mixed(1e-3)) && !ok(-100.0, -100.101, Mixed(1e-3)));
    assert!(ok(100.0, 100.0009, Absolute(1e-3)) && !ok(100.0, 100.0011, Absolute(1e-3)));
    let scaled = Scaled {
        tol: 1e-3,
        scale: 5.0,
    };
    assert!(ok(1.0, 1.0049, scaled) && !ok(1.0, 1.0051, scaled));
    assert!(ok(1.0, 1.0, Absolute(0.0)) && !ok(1.0, 1.0 + 1e-15, Absolute(0.0)));
    let flags = |allowed| {
        compare(
            &[0.0, 1.0, 1.0, 0.0],
            &[0.0, 0.0, 1.0, 1.0],
            Mismatches(allowed),
        )
    };
    assert!(flags(2).passed() && !flags(1).passed());
    assert_eq!(flags(2).comparisons[0].worst, 2.0);
}

#[test]
fn nan_and_infinity_match_only_themselves() {
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    let special = [nan, inf, -inf, 1.0];
    for expected in special {
        for got in special {
            let same = expected == got || (expected.is_nan() && got.is_nan());
            for tolerance in [
                Tolerance::Mixed(0.5),
                Tolerance::Absolute(0.5),
                Tolerance::Absolute(inf),
                Tolerance::Scaled {
                    tol: 0.5,
                    scale: 1.0,
                },
                Tolerance::Scaled {
                    tol: 0.5,
                    scale: inf,
                },
                Tolerance::Scaled {
                    tol: 0.5,
                    scale: nan,
                },
                Tolerance::Mismatches(0),
            ] {
                let report = compare(&[expected], &[got], tolerance);
                assert_eq!(
                    report.passed(),
                    same,
                    "{got} for {expected} with {tolerance:?}"
                );
                assert!(same || report.comparisons[0].worst > 0.0);
            }
        }
    }
    assert!(!compare(&[1.0], &[1.1], Tolerance::Absolute(nan)).passed());
}

#[test]
fn what_is_missing_is_an_error_that_names_it() {
    let mut file = open(&[f64s("y", &[1.0])], &[("lr", "0.1")]);
    let bad = |error: Error, name: &str| {
        assert!(
            matches!(&error, Error::BadFile { path, reason } if reason.contains(name) && path.contains("file.")),
            "{error}"
        );
    };
    bad(file.input("absent").unwrap_err(), "absent");
    bad(
        file.compare("absent", &[1.0], Tolerance::Absolute(0.0))
            .unwrap_err(),
        "absent",
    );
    bad(file.uncovered("absent", "because").unwrap_err(), "absent");
    bad(file.expected("absent").unwrap_err(), "absent");
    bad(file.text("beta").unwrap_err(), "beta");
    bad(file.number::<f64>("beta").unwrap_err(), "beta");
    bad(file.flag("lr").unwrap_err(), "lr");
    bad(file.json("beta").unwrap_err(), "beta");
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(
        Reference::open(folder.path().join("no")),
        Err(Error::Io { .. })
    ));
    let path = write(folder.path(), &[f64s("y", &[1.0])], &[]);
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 3]).unwrap();
    assert!(matches!(Reference::open(&path), Err(Error::BadFile { .. })));
}

#[test]
fn every_dtype_is_read() {
    let entries: [Entry; 12] = [
        ("bool", Dtype::BOOL, vec![3], vec![1, 0, 1]),
        ("u8", Dtype::U8, vec![1], vec![200]),
        ("i8", Dtype::I8, vec![1], vec![0xfe]),
        (
            "i16",
            Dtype::I16,
            vec![1],
            (-300_i16).to_le_bytes().to_vec(),
        ),
        (
            "u16",
            Dtype::U16,
            vec![1],
            60_000_u16.to_le_bytes().to_vec(),
        ),
        (
            "i32",
            Dtype::I32,
            vec![1],
            (-70_000_i32).to_le_bytes().to_vec(),
        ),
        (
            "u32",
            Dtype::U32,
            vec![1],
            4_000_000_000_u32.to_le_bytes().to_vec(),
        ),
        (
            "i64",
            Dtype::I64,
            vec![1],
            (-5_000_000_000_i64).to_le_bytes().to_vec(),
        ),
        (
            "u64",
            Dtype::U64,
            vec![1],
            5_000_000_000_u64.to_le_bytes().to_vec(),
        ),
        (
            "f16",
            Dtype::F16,
            vec![1],
            half::f16::from_f64(0.5).to_le_bytes().to_vec(),
        ),
        (
            "bf16",
            Dtype::BF16,
            vec![1],
            half::bf16::from_f64(-2.0).to_le_bytes().to_vec(),
        ),
        ("f32", Dtype::F32, vec![], 0.1_f32.to_le_bytes().to_vec()),
    ];
    let mut file = open(&entries, &[]);
    let expected: [(&str, &[f64]); 12] = [
        ("bool", &[1.0, 0.0, 1.0]),
        ("u8", &[200.0]),
        ("i8", &[-2.0]),
        ("i16", &[-300.0]),
        ("u16", &[60_000.0]),
        ("i32", &[-70_000.0]),
        ("u32", &[4e9]),
        ("i64", &[-5e9]),
        ("u64", &[5e9]),
        ("f16", &[0.5]),
        ("bf16", &[-2.0]),
        ("f32", &[f64::from(0.1_f32)]),
    ];
    for (name, values) in expected {
        assert_eq!(file.input(name).unwrap().values, values, "{name}");
    }
    assert_eq!(file.input("bool").unwrap().indices().unwrap(), [1, 0, 1]);
    assert_eq!(file.input("f32").unwrap().shape, [0; 0]);
    for bad in ["i8", "u64", "f16"] {
        assert!(
            matches!(
                file.input(bad).unwrap().indices(),
                Err(Error::InvalidArgument { .. })
            ),
            "{bad}"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let path = write(
        folder.path(),
        &[("f8", Dtype::F8_E4M3, vec![1], vec![0])],
        &[],
    );
    assert!(
        matches!(Reference::open(path), Err(Error::BadFile { reason, .. }) if reason.contains("f8"))
    );
}

#[test]
fn arrays_have_rows_and_become_tensors() {
    let bytes: Vec<u8> = (0..6).flat_map(|i| f64::from(i).to_le_bytes()).collect();
    let mut file = open(&[("m", Dtype::F64, vec![3, 2], bytes)], &[]);
    let m = file.input("m").unwrap();
    let row = m.row(1).unwrap();
    assert_eq!(
        (row.values.as_slice(), row.shape.as_slice()),
        (&[2.0, 3.0][..], &[2][..])
    );
    assert!(matches!(
        m.row(3),
        Err(Error::InvalidArgument { name: "row", .. })
    ));
    assert!(row.row(1).unwrap().row(0).is_err());
    let tensor = m.tensor(DType::F32).unwrap();
    assert_eq!((tensor.dims(), tensor.dtype()), (&[3, 2][..], DType::F32));
    file.compare_tensor("m", &tensor, Tolerance::Absolute(0.0))
        .unwrap();
    // The same values in another shape are wrong.
    file.compare_tensor(
        "m",
        &tensor.reshape((2, 3)).unwrap(),
        Tolerance::Absolute(1.0),
    )
    .unwrap();
    let report = file.finish();
    assert!(report.comparisons[0].passed && !report.comparisons[1].passed);
    assert!(report.comparisons[1].detail.contains("[2, 3]"));
}

#[test]
fn metadata_and_cases_are_read_as_they_come() {
    let metadata = [
        ("steps", "5.0"),
        ("lr", " 1e-3 "),
        ("on", "True"),
        ("off", "0"),
        ("list", "[1, 2.5]"),
        ("odd", "5.5"),
    ];
    let entries = [
        f64s("dense0.init", &[1.0]),
        f64s("dense1.init", &[1.0]),
        f64s("dense1.final", &[1.0]),
    ];
    let file = open(&entries, &metadata);
    assert_eq!(file.number::<usize>("steps").unwrap(), 5);
    assert_eq!(file.number::<f64>("lr").unwrap(), 1e-3);
    assert!(file.number::<usize>("odd").is_err() && file.number::<u8>("lr").is_err());
    assert!(file.flag("on").unwrap() && !file.flag("off").unwrap());
    assert_eq!(file.json("list").unwrap()[1], 2.5);
    assert_eq!(file.cases(".init"), ["dense0", "dense1"]);
    assert!(file.has("dense1.final") && !file.has("dense0.final"));
    assert_eq!(file.names().len(), 3);
    assert_eq!(file.metadata().len(), metadata.len());
}

#[test]
fn a_variant_is_a_file_of_its_own() {
    let shape = vec![2, 3];
    let matrix: Vec<u8> = (0..6).flat_map(|x| f64::from(x).to_le_bytes()).collect();
    let mut file = open(
        &[("m", Dtype::F64, shape, matrix), f64s("y", &[1.0])],
        &[("n", "3")],
    );
    file.input("m").unwrap();
    let mut variant = file.variant(|tensors, metadata| {
        let m = tensors.get_mut("m").unwrap();
        m.shorten(1, 2).unwrap();
        assert!(m.shorten(1, 3).is_err() && m.shorten(2, 1).is_err() && m.shorten(0, 0).is_err());
        metadata.insert("n".into(), "2".into());
    });
    let m = variant.expected("m").unwrap();
    assert_eq!(
        (m.values.as_slice(), m.shape.as_slice()),
        ([0.0, 1.0, 3.0, 4.0].as_slice(), [2, 2].as_slice())
    );
    assert_eq!(variant.number::<usize>("n").unwrap(), 2);
    variant
        .compare("y", &[1.0], Tolerance::Absolute(0.0))
        .unwrap();
    // What was used of the original does not count.
    assert_eq!(variant.finish().unknown, ["m"]);
    assert_eq!(file.expected("m").unwrap().values.len(), 6);
}
