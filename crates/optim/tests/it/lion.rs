use crate::support::{assert_passed, verify};

#[test]
fn reference() {
    let report = verify("lion", optim::verify::lion);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 3 * 2 + 2);
    assert!(report
        .uncovered
        .iter()
        .all(|(name, _)| name.starts_with("prog.")));
}
