//! The command on files made here; the adaptors are tested in their crates.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use thalweg_benchmark::registry::Registry;
use thalweg_benchmark::verify::{adaptors, verify, Outcome};

/// A safetensors file with one f64 tensor, by the format's definition.
fn file(name: &str) -> Vec<u8> {
    let header = format!(r#"{{"{name}":{{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}}}"#);
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(1.5_f64.to_le_bytes());
    bytes
}

#[test]
fn every_scenario_has_an_adaptor() {
    let known: BTreeSet<&str> = adaptors().into_iter().map(|(slug, _)| slug).collect();
    for entry in Registry::builtin().unwrap().entries() {
        assert!(
            known.contains(entry.definition.slug),
            "{} has none",
            entry.definition.slug
        );
    }
}

#[test]
fn files_without_adaptor_are_listed_and_bad_ones_fail() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("someday.safetensors"), file("x")).unwrap();
    fs::write(folder.path().join("notes.txt"), "not a reference").unwrap();
    let checks = verify(folder.path(), &[]).unwrap();
    assert_eq!((checks.len(), checks[0].slug.as_str()), (1, "someday"));
    assert!(matches!(checks[0].result, Outcome::NoAdaptor) && !checks[0].failed());

    let (slug, _) = adaptors()[0].clone();
    let path = folder.path().join(format!("{slug}.safetensors"));
    for bytes in [file("nonsense"), b"garbage".to_vec()] {
        fs::write(&path, bytes).unwrap();
        let checks = verify(folder.path(), &[slug.to_string()]).unwrap();
        assert!(
            checks[0].failed() && !checks[0].lines().is_empty(),
            "{checks:?}"
        );
        let status = Command::new(env!("CARGO_BIN_EXE_thalweg-bench"))
            .args(["verify", "--reference"])
            .arg(folder.path())
            .output()
            .unwrap();
        assert_eq!(status.status.code(), Some(1));
        let out = String::from_utf8(status.stdout).unwrap();
        assert!(
            out.contains("someday") && out.contains("1 of 2 files compared, 1 failed"),
            "{out}"
        );
    }
}

#[test]
fn unknown_slugs_and_missing_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let error = verify(folder.path(), &[]).unwrap_err().to_string();
    assert!(error.contains("no .safetensors file"), "{error}");
    let error = verify(folder.path(), &["lyon".into()])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("unknown method `lyon`: known are"),
        "{error}"
    );
    let (slug, _) = adaptors()[0].clone();
    let error = verify(folder.path(), &[slug.to_string()])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains(&format!("there is no {slug}.safetensors")),
        "{error}"
    );
}
