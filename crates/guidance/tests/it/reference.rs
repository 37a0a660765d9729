//! The reference files.

use crate::support::verify as verify_file;
use crate::support::*;
use guidance::verify;

#[test]
fn guidance_core() {
    assert_passed(
        &verify_file("guidance-core", verify::guidance_core),
        |name| {
            [
                "abar", "conv", "flow", "ddim", "dpmpp", "euler", "heun", "karras",
            ]
            .iter()
            .any(|start| name.starts_with(start))
        },
    );
}

#[test]
fn apg() {
    assert_passed(&verify_file("apg", verify::apg), |_| false);
}
