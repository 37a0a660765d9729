//! The reference files, and what the adaptors do with other files.

use tensor_core::testing::ReferenceFiles;
use tensor_core::verify::Reference;

fn open(name: &str) -> Reference {
    ReferenceFiles(env!("CARGO_MANIFEST_DIR")).open(name)
}

fn check(
    mut reference: Reference,
    prefixes: &[&str],
    run: impl Fn(&mut Reference) -> nn::Result<()>,
) {
    let expected = reference.names();
    let ours = |name: &&String| prefixes.iter().any(|p| name.starts_with(p));
    let count = expected.iter().filter(ours).count();
    run(&mut reference).unwrap();
    let report = reference.finish();
    let failed: Vec<_> = report.comparisons.iter().filter(|c| !c.passed).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert_eq!(
        report.comparisons.len() + report.inputs,
        count,
        "tensors used"
    );
    assert!(report
        .unknown
        .iter()
        .all(|name| !prefixes.iter().any(|p| name.starts_with(p))));
}

#[test]
fn power_norm() {
    check(
        open("power-norm.safetensors"),
        &[""],
        nn::verify::power_norm,
    );
}

#[test]
fn ghost_batch_norm() {
    check(
        open("large-batch.safetensors"),
        &["gbn"],
        nn::verify::ghost_batch_norm,
    );
}

#[test]
fn stablemax() {
    check(
        open("perp-grad.safetensors"),
        &["stablemax."],
        nn::verify::stablemax,
    );
}

#[test]
fn adaptors_leave_files_of_other_methods_alone() {
    let all: [fn(&mut Reference) -> nn::Result<()>; 3] = [
        nn::verify::power_norm,
        nn::verify::ghost_batch_norm,
        nn::verify::stablemax,
    ];
    let files = [
        "power-norm.safetensors",
        "large-batch.safetensors",
        "perp-grad.safetensors",
    ];
    for (i, adaptor) in all.into_iter().enumerate() {
        for (j, file) in files.into_iter().enumerate() {
            let mut reference = open(file);
            adaptor(&mut reference).unwrap();
            let report = reference.finish();
            assert_eq!(
                report.comparisons.is_empty(),
                i != j,
                "{file} by adaptor {i}"
            );
        }
    }
}
