use crate::support::{assert_passed, verify};

#[test]
fn reference() {
    let report = verify("perp-grad", optim::verify::perp_grad);
    assert_passed(&report, |name| name.starts_with("stablemax."));
    assert_eq!(report.comparisons.len(), 5 * 2 + 3 * 2 + 4 + 1 + 3 + 2);
}
