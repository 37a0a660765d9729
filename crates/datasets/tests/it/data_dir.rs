use thalweg_datasets::load::idx::MNIST_FILES;
use thalweg_datasets::{DataDir, Error};

#[test]
fn missing_files_and_names_are_listed() {
    let dir = tempfile::tempdir().unwrap();
    let data = DataDir::new(dir.path()).unwrap();
    assert_eq!(
        DataDir::known(),
        ["mnist", "fashion-mnist", "cifar10", "cifar100"]
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
