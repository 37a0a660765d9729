use crate::support::{assert_passed, verify};

#[test]
fn reference() {
    let report = verify("spam", optim::verify::spam);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 2 * 3 + 2 + 1 + 2);
}
