use candle_core::DType;
use std::path::{Path, PathBuf};
use thalweg_datasets::load::table::{read_classification, read_regression, Column, CsvOptions};
use thalweg_datasets::Error;

fn write(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join("t.csv");
    std::fs::write(&path, text).unwrap();
    path
}

fn answer(answer: Column) -> CsvOptions {
    CsvOptions {
        answer,
        ..Default::default()
    }
}

#[test]
fn classes_by_name_index_and_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "a, kind ,b\n1,dog,2\n3, cat,4.5\n-1e2,dog,0\n");
    for column in [Column::Name("kind".into()), Column::Index(1)] {
        let table = read_classification(&path, &answer(column)).unwrap();
        assert_eq!(table.features, ["a", "b"]);
        assert_eq!(table.classes, ["cat", "dog"]);
        assert_eq!(table.data.label_vec().unwrap(), [1, 0, 1]);
        assert_eq!(
            table.data.inputs.to_vec2::<f32>().unwrap(),
            [[1.0, 2.0], [3.0, 4.5], [-100.0, 0.0]]
        );
    }
}

#[test]
fn integer_classes_are_ordered_as_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "0.5;10\n0.25;9\n1;-1\n2;9\n");
    let options = CsvOptions {
        header: false,
        delimiter: b';',
        dtype: DType::F64,
        ..Default::default()
    };
    let table = read_classification(&path, &options).unwrap();
    assert_eq!(table.classes, ["-1", "9", "10"]);
    assert_eq!(table.data.label_vec().unwrap(), [2, 1, 0, 1]);
    assert_eq!(table.features, ["0"]);
    assert_eq!(table.data.inputs.dtype(), DType::F64);
}

#[test]
fn targets_are_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "y,x\n1.5,2\n-2,4\n");
    let table = read_regression(&path, &answer(Column::Name("y".into()))).unwrap();
    assert_eq!(table.data.targets.to_vec1::<f32>().unwrap(), [1.5, -2.0]);
    assert_eq!(table.data.inputs.to_vec2::<f32>().unwrap(), [[2.0], [4.0]]);
    let path = write(dir.path(), "y,x\ninf,2\n");
    assert!(matches!(
        read_regression(&path, &answer(Column::Index(0))),
        Err(Error::Cell { line: 2, .. })
    ));
}

#[test]
fn bad_cells_name_line_and_column() {
    let dir = tempfile::tempdir().unwrap();
    for cell in ["NaN", "nan", "", "inf", "-inf", "1e999", "1,5x", "abc"] {
        let cell = cell.replace(',', ".");
        let path = write(dir.path(), &format!("a,b,y\n1,2,0\n3,{cell},1\n"));
        match read_classification(&path, &CsvOptions::default()).unwrap_err() {
            Error::Cell {
                line: 3,
                column,
                value,
                expected,
                ..
            } => assert_eq!(
                (column.as_str(), value, expected),
                ("b", cell, "a finite number")
            ),
            other => panic!("{other}"),
        }
    }
    let path = write(dir.path(), "a,y\n1,\n");
    let error = read_classification(&path, &CsvOptions::default()).unwrap_err();
    assert!(error.to_string().contains("expected a class"), "{error}");
}

#[test]
fn bad_tables_are_named_errors() {
    let dir = tempfile::tempdir().unwrap();
    let read = |text: &str, options: &CsvOptions| {
        read_classification(write(dir.path(), text), options).unwrap_err()
    };
    let options = CsvOptions::default();
    for text in ["", "a,b\n", "a,b\n1,2\n3\n", "y\n1\n"] {
        let error = read(text, &options);
        assert!(matches!(error, Error::BadFile { .. }), "{text:?}: {error}");
    }
    let error = read("a,b\n1,2\n", &answer(Column::Name("kind".into())));
    assert!(
        error
            .to_string()
            .contains("no column `kind`: the table has a, b"),
        "{error}"
    );
    let error = read("a,b\n1,2\n", &answer(Column::Index(2)));
    assert!(matches!(error, Error::UnknownColumn { .. }), "{error}");
    let nameless = CsvOptions {
        header: false,
        ..answer(Column::Name("a".into()))
    };
    let error = read("1,2\n", &nameless);
    assert!(
        error.to_string().contains("2 columns without names"),
        "{error}"
    );
    let integers = CsvOptions {
        dtype: DType::U32,
        ..Default::default()
    };
    assert!(matches!(
        read("a,b\n1,2\n", &integers),
        Error::InvalidArgument { name: "dtype", .. }
    ));
    let path = dir.path().join("absent.csv");
    assert!(matches!(
        read_classification(path, &options),
        Err(Error::Io { .. })
    ));
    let path = dir.path().join("latin1.csv");
    std::fs::write(&path, b"a,y\n1,\xe4\n").unwrap();
    assert!(matches!(
        read_classification(path, &options),
        Err(Error::BadFile { .. })
    ));
}
