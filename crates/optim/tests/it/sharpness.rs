use crate::support::{assert_passed, verify};

#[test]
fn reference() {
    let report = verify("udim", optim::verify::sharpness);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 7);
    assert!(report
        .uncovered
        .iter()
        .all(|(name, _)| name.starts_with("udim_")));
}
