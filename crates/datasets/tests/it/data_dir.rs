use thalweg_datasets::load::idx::MNIST_FILES;
use thalweg_datasets::{DataDir, Error};

#[test]
fn missing_files_and_names_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let data = DataDir::new(dir.path()).unwrap();
    assert_eq!(
        DataDir::known(),
        ["mnist", "fashion-mnist", "cifar10", "cifar100", "tfbind8"]
    );
    for name in DataDir::known() {
        match data.check(name).unwrap_err() {
            Error::MissingFiles {
                dataset,
                dir: searched,
                missing,
            } => {
                assert_eq!(dataset, name);
                assert_eq!(searched, data.folder(name).display().to_string());
                assert!(!missing.is_empty());
            }
            other => panic!("{other}"),
        }
    }
    for read in [
        data.mnist(),
        data.fashion_mnist(),
        data.cifar10(),
        data.cifar100(),
        data.cifar100_coarse(),
    ] {
        assert!(matches!(read, Err(Error::MissingFiles { .. })));
    }
    assert!(matches!(
        data.check("imagenet"),
        Err(Error::UnknownDataset { .. })
    ));
}

#[test]
fn complete_folders_pass_the_check() {
    let dir = tempfile::tempdir().unwrap();
    let data = DataDir::new(dir.path()).unwrap();
    std::fs::create_dir(data.folder("mnist")).unwrap();
    for name in MNIST_FILES {
        std::fs::write(data.folder("mnist").join(format!("{name}.gz")), []).unwrap();
    }
    data.check("mnist").unwrap();
    // Empty files are there but are no images.
    assert!(matches!(data.mnist(), Err(Error::Truncated { .. })));
}

#[test]
fn the_root_must_be_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let error = DataDir::new(dir.path().join("absent")).unwrap_err();
    assert!(error.to_string().contains("absent"), "{error}");
}

#[test]
fn binding_tables_are_read_and_checked() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("tfbind8");
    std::fs::create_dir(&folder).unwrap();
    let data = DataDir::new(dir.path()).unwrap();
    let write = |rows: &str| {
        let text = format!("8-mer\t8-mer\tE-score\tMedian\tZ-score\n{rows}");
        std::fs::write(folder.join("SIX6_REF_R1_8mers.txt"), text).unwrap();
        data.binding(thalweg_datasets::data_dir::TFBIND8)
    };
    // The second row is its own other strand.
    let table = write("AAAAAAAC\tGTTTTTTT\t0.25\t1\t2\nACGTACGT\tACGTACGT\t-0.1\t1\t2\n").unwrap();
    assert_eq!(table.sequences.len(), 3);
    assert_eq!(table.scores, [0.25, 0.25, -0.1]);
    data.check("tfbind8").unwrap();
    for (rows, words) in [
        ("", "without rows"),
        ("AAAAAAAN\tGTTTTTTT\t0.1\t1\t2\n", "ACGT"),
        ("AAAAAAC\tGTTTTTT\t0.1\t1\t2\n", "ACGT"),
        ("AAAAAAAC\tGTTTTTTA\t0.1\t1\t2\n", "strand"),
        ("AAAAAAAC\tGTTTTTTT\tNaN\t1\t2\n", "no number"),
        ("AAAAAAAC\tGTTTTTTT\n", "row 1"),
    ] {
        let error = write(rows).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
}
