use crate::toy::{output, program, STEPS, TRIALS};
use std::fs;
use std::path::{Path, PathBuf};
use thalweg_benchmark::export::tensorboard::{crc32c, masked};
use thalweg_benchmark::summary::ScenarioResult;
use thalweg_benchmark::verdict::Verdict;

fn exported() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let go = |args: &[&str]| {
        let (code, out, err) = output(&mut program(folder.path(), "", args));
        assert_eq!(code, 0, "{out}{err}");
    };
    go(&["run", "--suite", "standard"]);
    go(&[
        "export",
        "--json",
        "out/r.json",
        "--csv",
        "out/r.csv",
        "--tensorboard",
        "out/tb",
    ]);
    folder
}

#[test]
fn json_and_csv_hold_every_trial() {
    let folder = exported();
    let text = fs::read_to_string(folder.path().join("out/r.json")).unwrap();
    let results: Vec<ScenarioResult> = serde_json::from_str(&text).unwrap();
    assert_eq!((results.len(), results[0].verdict), (1, Verdict::Holds));
    assert_eq!(results[0].arms.len(), 3);
    // Infinity survives a format that has none.
    assert_eq!(results[0].arms[2].metrics["steps"].mean, f64::INFINITY);

    let text = fs::read_to_string(folder.path().join("out/r.csv")).unwrap();
    let lines: Vec<&str> = text.split_terminator("\r\n").collect();
    assert_eq!(lines.len(), 1 + 5 * TRIALS * 2);
    assert_eq!(lines[0], thalweg_benchmark::export::COLUMNS);
    assert!(lines.iter().all(|l| l.split(',').count() == 12));
    assert!(lines
        .iter()
        .any(|l| l.starts_with("toy,standard,parabola,cpu,") && l.contains(",steps,inf,")));
}

/// Known answers: the check value of CRC-32C, and 32 zero bytes from RFC 3720.
#[test]
fn checksum_of_the_standard() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
    assert_eq!(masked(0), 0xa282_ead8);
}

#[derive(Debug, Default, PartialEq)]
struct Event {
    time: f64,
    step: u64,
    version: String,
    tag: String,
    value: Option<f32>,
}

/// Splits a protocol buffer into fields: number, wire type, payload.
fn fields(mut bytes: &[u8]) -> Vec<(u64, u64, Vec<u8>)> {
    fn varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }
    let mut out = Vec::new();
    while !bytes.is_empty() {
        let key = varint(&mut bytes);
        let payload = match key & 7 {
            0 => varint(&mut bytes).to_le_bytes().to_vec(),
            wire => {
                let length = match wire {
                    1 => 8,
                    5 => 4,
                    2 => varint(&mut bytes) as usize,
                    other => panic!("wire type {other}"),
                };
                let (payload, rest) = bytes.split_at(length);
                bytes = rest;
                payload.to_vec()
            }
        };
        out.push((key >> 3, key & 7, payload));
    }
    out
}

/// Reads an event file back by the format's definition.
fn events(path: &Path) -> Vec<Event> {
    let bytes = fs::read(path).unwrap();
    let mut rest = bytes.as_slice();
    let mut out = Vec::new();
    while !rest.is_empty() {
        let word = |b: &[u8]| u32::from_le_bytes(b.try_into().unwrap());
        let length = u64::from_le_bytes(rest[..8].try_into().unwrap()) as usize;
        assert_eq!(word(&rest[8..12]), masked(crc32c(&rest[..8])));
        let payload = &rest[12..12 + length];
        assert_eq!(
            word(&rest[12 + length..16 + length]),
            masked(crc32c(payload))
        );
        rest = &rest[16 + length..];
        let mut event = Event::default();
        for (number, wire, content) in fields(payload) {
            match (number, wire) {
                (1, 1) => event.time = f64::from_le_bytes(content.try_into().unwrap()),
                (2, 0) => event.step = u64::from_le_bytes(content.try_into().unwrap()),
                (3, 2) => event.version = String::from_utf8(content).unwrap(),
                (5, 2) => {
                    let values = fields(&content);
                    assert_eq!((values.len(), values[0].0, values[0].1), (1, 1, 2));
                    for (number, wire, content) in fields(&values[0].2) {
                        match (number, wire) {
                            (1, 2) => event.tag = String::from_utf8(content).unwrap(),
                            (2, 5) => {
                                event.value = Some(f32::from_le_bytes(content.try_into().unwrap()))
                            }
                            other => panic!("{other:?} in a value"),
                        }
                    }
                }
                other => panic!("{other:?} in an event"),
            }
        }
        out.push(event);
    }
    out
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else {
            found.push(path);
        }
    }
}

#[test]
fn event_files_read_back() {
    let folder = exported();
    let mut found = Vec::new();
    files(&folder.path().join("out/tb"), &mut found);
    assert_eq!(found.len(), 5 * TRIALS);
    let path = found
        .iter()
        .find(|p| {
            p.to_str()
                .unwrap()
                .contains("toy/standard/plain/lr=0.2/seed-11/")
        })
        .unwrap();
    let events = events(path);
    assert_eq!(
        (events[0].version.as_str(), events[0].value),
        ("brain.Event:2", None)
    );
    assert_eq!(events.len(), 1 + 2 + STEPS);
    assert!(events.iter().all(|e| e.time > 1.7e9));
    let curve: Vec<&Event> = events.iter().filter(|e| e.tag == "curve/loss").collect();
    assert!(curve.iter().enumerate().all(|(i, e)| e.step == i as u64));
    let last = events.iter().find(|e| e.tag == "metric/loss").unwrap();
    assert_eq!(curve.last().unwrap().value, last.value);
}
