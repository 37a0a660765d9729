use std::path::Path;
use thalweg_datasets::load::cifar::{CifarLayout, CIFAR10, CIFAR100, CIFAR100_COARSE};
use thalweg_datasets::{cifar10, Error};

/// Three records a file instead of thousands; everything else as published.
fn small(layout: CifarLayout) -> CifarLayout {
    CifarLayout {
        train_records: 3,
        test_records: 3,
        ..layout
    }
}

/// Record `r` of file `f` has the labels `10 f + r, r` and pixels that count up.
fn write(dir: &Path, layout: &CifarLayout, label: impl Fn(usize, usize, usize) -> u8) {
    for (f, name) in layout.files().iter().enumerate() {
        let mut bytes = Vec::new();
        for r in 0..3 {
            bytes.extend((0..layout.label_bytes).map(|i| label(f, r, i)));
            bytes.extend((0..3072).map(|p| (p / 1024 * 100 + p % 32) as u8));
        }
        std::fs::write(dir.join(name), bytes).unwrap();
    }
}

#[test]
fn records_become_images_and_labels() {
    let dir = tempfile::tempdir().unwrap();
    let layout = small(CIFAR10);
    let inner = dir.path().join("cifar-10-batches-bin");
    std::fs::create_dir(&inner).unwrap();
    write(&inner, &layout, |f, r, _| ((f + 2 * r) % 10) as u8);
    let data = layout.read(dir.path()).unwrap();
    assert_eq!(data.train.inputs.dims(), &[15, 3, 32, 32]);
    assert_eq!(data.test.inputs.dims(), &[3, 3, 32, 32]);
    assert_eq!(data.train.label_vec().unwrap()[..6], [0, 2, 4, 1, 3, 5]);
    assert_eq!(data.test.label_vec().unwrap(), [5, 7, 9]);
    // Channel 2, row 9, column 31 of any record is (200 + 31) / 255.
    let image = data.train.inputs.get(7).unwrap().to_vec3::<f32>().unwrap();
    assert!((image[2][9][31] - 231.0 / 255.0).abs() < 1e-6);
    assert!((image[1][31][0] - 100.0 / 255.0).abs() < 1e-6);
}

#[test]
fn fine_and_coarse_labels_are_two_bytes() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &CIFAR100, |_, r, i| [r as u8, 97 + r as u8][i]);
    let fine = small(CIFAR100).read(dir.path()).unwrap().train;
    assert_eq!(
        (fine.classes, fine.label_vec().unwrap()),
        (100, vec![97, 98, 99])
    );
    let coarse = small(CIFAR100_COARSE).read(dir.path()).unwrap().train;
    assert_eq!(
        (coarse.classes, coarse.label_vec().unwrap()),
        (20, vec![0, 1, 2])
    );
}

#[test]
fn damaged_folders_are_named_errors() {
    let dir = tempfile::tempdir().unwrap();
    match cifar10(dir.path()).unwrap_err() {
        Error::MissingFiles { missing, .. } => assert_eq!(missing.len(), 6),
        other => panic!("{other}"),
    }
    let layout = small(CIFAR10);
    write(dir.path(), &layout, |_, r, _| r as u8);
    // The published files are larger.
    let error = cifar10(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("ends after 9219 bytes: expected 30730000 bytes"),
        "{error}"
    );
    let first = dir.path().join("data_batch_3.bin");
    let whole = std::fs::read(&first).unwrap();
    std::fs::write(&first, &whole[..9000]).unwrap();
    assert!(matches!(
        layout.read(dir.path()),
        Err(Error::Truncated { .. })
    ));
    std::fs::write(&first, [whole.as_slice(), &[0]].concat()).unwrap();
    assert!(matches!(
        layout.read(dir.path()),
        Err(Error::TooLong { .. })
    ));
    write(dir.path(), &layout, |_, r, _| 9 + r as u8);
    assert!(matches!(
        layout.read(dir.path()),
        Err(Error::LabelOutOfRange {
            label: 10,
            index: 1,
            ..
        })
    ));
}
