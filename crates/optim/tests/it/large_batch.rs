use crate::support::{assert_passed, verify};

#[test]
fn reference() {
    let report = verify("large-batch", optim::verify::large_batch);
    assert_passed(&report, |name| name.starts_with("gbn"));
    assert_eq!(report.comparisons.len(), 7);
}
