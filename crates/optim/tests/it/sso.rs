use crate::support::{assert_passed, verify};

#[test]
fn reference() {
    let report = verify("sso", optim::verify::sso);
    assert_passed(&report, |_| false);
    assert_eq!(report.comparisons.len(), 4 * 5 + 3);
}
