//! The report in a real browser, where one is installed.

use crate::report::page;
use crate::toy::Toy;
use std::path::Path;
use std::process::Command;

fn present(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .output()
        .is_ok_and(|o| o.status.success())
}

/// Table, plots, navigation and search work at two widths, light and dark, with no console error
/// and no request.
#[test]
fn report_in_chromium() {
    let browsers = ["chromium", "chromium-browser", "google-chrome"];
    let Some(browser) = browsers.into_iter().find(|b| present(b)) else {
        eprintln!("skipped: no chromium");
        return;
    };
    if !present("python3") {
        eprintln!("skipped: no python3 to drive the browser");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("index.html");
    std::fs::write(&path, page(Some(Toy::default()))).unwrap();
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/browser/report.py");
    let mut driver = Command::new("python3");
    driver.arg(script).args(["--browser", browser]).arg(&path);
    let out = driver.output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        out.status.success(),
        "{}{}",
        text(&out.stdout),
        text(&out.stderr)
    );
    assert!(
        text(&out.stdout).contains("checks passed"),
        "{}",
        text(&out.stdout)
    );
}
