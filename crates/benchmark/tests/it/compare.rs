use crate::toy::{output, program};

#[test]
fn runs_databases_and_versions() {
    let folder = tempfile::tempdir().unwrap();
    let go = |mode: &str, args: &[&str]| output(&mut program(folder.path(), mode, args));
    assert_eq!(go("", &["run", "--suite", "standard"]).0, 0);
    assert_eq!(go("worse", &["run", "--suite", "standard", "--fresh"]).0, 0);
    assert_eq!(
        go("", &["run", "--suite", "standard", "--db", "other.sqlite"]).0,
        0
    );

    // The second run's method is worse by 1 or more; the baseline has the same numbers.
    let (code, out, err) = go("", &["compare", "run:1", "run:2"]);
    assert_eq!(code, 0, "{err}");
    let row = out
        .lines()
        .find(|l| l.contains("average") && l.contains("loss"))
        .unwrap();
    assert!(row.contains("toy") && row.contains(" 5 "), "{row}");
    assert!(
        !out.lines()
            .any(|l| l.contains("lr=0.2") && l.contains("loss")),
        "{out}"
    );
    let (_, all, _) = go("", &["compare", "run:1", "run:2", "--all"]);
    assert!(
        all.lines()
            .any(|l| l.contains("lr=0.2") && l.contains("loss")),
        "{all}"
    );

    let (code, out, _) = go(
        "",
        &["compare", "target/thalweg/results.sqlite", "other.sqlite"],
    );
    assert!(code == 0 && out.contains("average"), "{out}");
    let version = format!("version:{}", thalweg_benchmark::VERSION);
    assert_eq!(go("", &["compare", &version, "other.sqlite"]).0, 0);

    let (code, _, err) = go("", &["compare", "run:1", "run:77"]);
    assert!(
        code == 1 && err.contains("unknown run `77`: known are 1, 2"),
        "{err}"
    );
    let (code, _, err) = go("", &["compare", "version:9.9", "run:1"]);
    assert!(code == 1 && err.contains("unknown version `9.9`"), "{err}");
    let (code, _, err) = go("", &["compare", "nothing.sqlite", "run:1"]);
    assert!(
        code == 1 && err.contains("nothing.sqlite") && err.contains("no such file"),
        "{err}"
    );
}
