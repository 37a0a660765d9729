use crate::child;
use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use proptest::prelude::*;
use std::path::Path;
use thalweg_tensor_core::checkpoint::{expect_state, spec_of, Checkpoint, State, FORMAT_VERSION};
use thalweg_tensor_core::Error;

const CPU: Device = Device::Cpu;

/// The bits of a tensor: NaN payloads and the sign of zero count.
fn bits(tensor: &Tensor) -> Vec<u64> {
    let flat = tensor.flatten_all().unwrap();
    match tensor.dtype() {
        DType::U8 => flat
            .to_vec1::<u8>()
            .unwrap()
            .iter()
            .map(|x| u64::from(*x))
            .collect(),
        DType::U32 => flat
            .to_vec1::<u32>()
            .unwrap()
            .iter()
            .map(|x| u64::from(*x))
            .collect(),
        DType::I64 => flat
            .to_vec1::<i64>()
            .unwrap()
            .iter()
            .map(|x| *x as u64)
            .collect(),
        DType::BF16 => flat
            .to_vec1::<bf16>()
            .unwrap()
            .iter()
            .map(|x| u64::from(x.to_bits()))
            .collect(),
        DType::F16 => flat
            .to_vec1::<f16>()
            .unwrap()
            .iter()
            .map(|x| u64::from(x.to_bits()))
            .collect(),
        DType::F32 => flat
            .to_vec1::<f32>()
            .unwrap()
            .iter()
            .map(|x| u64::from(x.to_bits()))
            .collect(),
        DType::F64 => flat
            .to_vec1::<f64>()
            .unwrap()
            .iter()
            .map(|x| x.to_bits())
            .collect(),
        other => panic!("{other:?}"),
    }
}

/// A tensor of the `kind`-th dtype with the given bits.
fn from_bits(kind: usize, words: &[u64], shape: &[usize]) -> Tensor {
    macro_rules! make {
        ($f:expr) => {
            Tensor::from_vec(words.iter().map($f).collect::<Vec<_>>(), shape, &CPU).unwrap()
        };
    }
    match kind {
        0 => make!(|w| *w as u8),
        1 => make!(|w| *w as u32),
        2 => make!(|w| *w as i64),
        3 => make!(|w| bf16::from_bits(*w as u16)),
        4 => make!(|w| f16::from_bits(*w as u16)),
        5 => make!(|w| f32::from_bits(*w as u32)),
        _ => make!(|w| f64::from_bits(*w)),
    }
}

fn assert_same(a: &Checkpoint, b: &Checkpoint) {
    assert_eq!(
        (&a.kind, &a.metadata, &a.written_by),
        (&b.kind, &b.metadata, &b.written_by)
    );
    assert_eq!(spec_of(&a.tensors), spec_of(&b.tensors));
    for (name, tensor) in &a.tensors {
        assert_eq!(bits(tensor), bits(&b.tensors[name]), "{name}");
    }
}

fn sample() -> Checkpoint {
    let mut state = State::new();
    state.insert(
        "m".into(),
        Tensor::new(&[[1.0_f32, -0.0], [f32::NAN, 4.0]], &CPU).unwrap(),
    );
    state.insert("step".into(), Tensor::new(7_i64, &CPU).unwrap());
    state.insert(
        "none".into(),
        Tensor::zeros((0, 3), DType::F64, &CPU).unwrap(),
    );
    Checkpoint::new("adamw", state)
        .with("lr", 1e-3)
        .with("text", "ligne \"ä\"\n\u{0}")
}

fn saved(folder: &Path) -> std::path::PathBuf {
    let path = folder.join("state.safetensors");
    sample().save(&path).unwrap();
    path
}

fn files(folder: &Path) -> Vec<String> {
    let name =
        |e: std::io::Result<std::fs::DirEntry>| e.unwrap().file_name().into_string().unwrap();
    let mut names: Vec<String> = std::fs::read_dir(folder).unwrap().map(name).collect();
    names.sort();
    names
}

proptest! {
    #![proptest_config(crate::few(48))]

    #[test]
    fn round_trip_keeps_every_bit(
        tensors in prop::collection::btree_map(
            "[a-z_. \"\\\\é]{0,12}",
            (0_usize..7, prop::collection::vec(any::<u64>(), 24), prop::sample::select(vec![
                vec![24], vec![4, 6], vec![2, 3, 4], vec![1, 24], vec![24, 1, 1],
            ])),
            0..5,
        ),
        metadata in prop::collection::btree_map("[a-zé\"]{0,6}", any::<String>(), 0..4),
        kind in any::<String>(),
    ) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let state: State = tensors
            .iter()
            .map(|(name, (kind, words, shape))| (name.clone(), from_bits(*kind, words, shape)))
            .collect();
        let mut checkpoint = Checkpoint::new(kind, state);
        checkpoint.metadata = metadata;
        checkpoint.save(&path).unwrap();
        assert_same(&checkpoint, &Checkpoint::load(&path, &CPU).unwrap());
    }

    /// Whatever byte of the file changes, the load says so or gives what was saved (the padding
    /// of the header carries nothing).
    #[test]
    fn a_changed_byte_is_noticed(position in any::<prop::sample::Index>(), flip in 1_u8..=255) {
        let folder = tempfile::tempdir().unwrap();
        let path = saved(folder.path());
        let mut bytes = std::fs::read(&path).unwrap();
        let at = position.index(bytes.len());
        bytes[at] ^= flip;
        std::fs::write(&path, &bytes).unwrap();
        match Checkpoint::load(&path, &CPU) {
            Ok(loaded) => assert_same(&sample(), &loaded),
            Err(Error::BadFile { .. } | Error::NewerFormat { .. }) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_flipped_bit_of_a_number_is_damage() {
    let folder = tempfile::tempdir().unwrap();
    let path = saved(folder.path());
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, &bytes).unwrap();
    let error = Checkpoint::load(&path, &CPU).unwrap_err();
    assert!(error.to_string().contains("damaged"), "{error}");
}

#[test]
fn scalars_empty_tensors_views_and_text_survive() {
    let folder = tempfile::tempdir().unwrap();
    let loaded = Checkpoint::load(saved(folder.path()), &CPU).unwrap();
    assert_same(&sample(), &loaded);
    assert_eq!(loaded.number::<f64>("lr").unwrap(), 1e-3);
    // A transposed view is saved by its values, not by its memory.
    let wide = Tensor::arange(0_f32, 6.0, &CPU)
        .unwrap()
        .reshape((2, 3))
        .unwrap();
    let view = wide.t().unwrap().narrow(0, 1, 2).unwrap();
    let state = State::from([("view".to_string(), view)]);
    let path = folder.path().join("view.safetensors");
    Checkpoint::new("view", state).save(&path).unwrap();
    let back = Checkpoint::load(&path, &CPU).unwrap().tensors["view"]
        .to_vec2::<f32>()
        .unwrap();
    assert_eq!(back, [[1.0, 4.0], [2.0, 5.0]]);
}

#[test]
fn one_message_lists_every_difference() {
    let state = State::from([
        ("extra".to_string(), Tensor::new(1_u32, &CPU).unwrap()),
        (
            "shape".to_string(),
            Tensor::zeros((2, 3), DType::F32, &CPU).unwrap(),
        ),
        (
            "both".to_string(),
            Tensor::zeros(5, DType::F64, &CPU).unwrap(),
        ),
        (
            "right".to_string(),
            Tensor::zeros(5, DType::F64, &CPU).unwrap(),
        ),
    ]);
    let expected = [
        ("gone", vec![4], DType::F32),
        ("shape", vec![3, 2], DType::F32),
        ("both", vec![], DType::F32),
        ("right", vec![5], DType::F64),
    ];
    let error = Checkpoint::new("lion", state.clone())
        .check("adamw", expected)
        .unwrap_err();
    let Error::CheckpointMismatch(lines) = &error else {
        panic!("{error}")
    };
    assert_eq!(
        lines,
        &[
            "state of `lion`, expected `adamw`",
            "missing tensor `gone` [4] F32",
            "`shape` has shape [2, 3], expected [3, 2]",
            "`both` has shape [5], expected []",
            "`both` has dtype F64, expected F32",
            "unexpected tensor `extra` [] U32",
        ]
    );
    assert!(lines.iter().all(|line| error.to_string().contains(line)));
    expect_state(&state, spec_of(&state)).unwrap();
    let none: [(&str, (), DType); 0] = [];
    assert!(
        matches!(expect_state(&state, none), Err(Error::CheckpointMismatch(l)) if l.len() == 4)
    );
}

#[test]
fn names_that_the_format_keeps_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x");
    let key = sample().with("thalweg.format", 3).save(&path);
    assert!(matches!(key, Err(Error::InvalidArgument { .. })));
    let mut checkpoint = sample();
    checkpoint
        .tensors
        .insert("__metadata__".into(), Tensor::new(1_u8, &CPU).unwrap());
    assert!(matches!(
        checkpoint.save(&path),
        Err(Error::InvalidArgument { .. })
    ));
    let i16s = Tensor::new(1_i16, &CPU).unwrap();
    let unsupported = Checkpoint::new("x", State::from([("a".into(), i16s)])).save(&path);
    assert!(matches!(unsupported, Err(Error::Unsupported { .. })));
    assert!(files(folder.path()).is_empty());
}

#[test]
fn truncated_files_are_refused_at_every_length() {
    let folder = tempfile::tempdir().unwrap();
    let path = saved(folder.path());
    let whole = std::fs::read(&path).unwrap();
    for length in (0..whole.len()).step_by(7) {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = Checkpoint::load(&path, &CPU).unwrap_err();
        assert!(
            matches!(&error, Error::BadFile { path: p, .. } if p.contains("state")),
            "{error}"
        );
    }
    std::fs::write(&path, [&whole[..], b"more"].concat()).unwrap();
    assert!(matches!(
        Checkpoint::load(&path, &CPU),
        Err(Error::BadFile { .. })
    ));
    let absent = Checkpoint::load(folder.path().join("absent"), &CPU).unwrap_err();
    assert!(matches!(absent, Error::Io { .. }));
}

#[test]
fn other_formats_and_versions_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = saved(folder.path());
    let whole = String::from_utf8_lossy(&std::fs::read(&path).unwrap()).into_owned();
    let current = format!("\"thalweg.format\":\"{FORMAT_VERSION}\"");
    assert!(whole.contains(&current));
    // Same length, so that the header stays valid.
    let newer = "\"thalweg.format\":\"9\"";
    let bytes = std::fs::read(&path).unwrap();
    let at = bytes
        .windows(current.len())
        .position(|w| w == current.as_bytes())
        .unwrap();
    let mut changed = bytes.clone();
    changed[at..at + newer.len()].copy_from_slice(newer.as_bytes());
    std::fs::write(&path, changed).unwrap();
    let error = Checkpoint::load(&path, &CPU).unwrap_err();
    assert!(matches!(
        error,
        Error::NewerFormat {
            found: 9,
            supported: FORMAT_VERSION,
            ..
        }
    ));
    assert!(error.to_string().contains("format 9"), "{error}");

    let plain = folder.path().join("plain.safetensors");
    sample().tensors["m"].save_safetensors("m", &plain).unwrap();
    let error = Checkpoint::load(&plain, &CPU).unwrap_err();
    assert!(error.to_string().contains("not a checkpoint"), "{error}");
}

#[test]
fn a_crash_while_writing_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = saved(folder.path());
    // What a crash leaves: half of a new file under its temporary name.
    let whole = std::fs::read(&path).unwrap();
    let leftover = folder.path().join(".state.safetensors.abcdef.tmp");
    std::fs::write(&leftover, &whole[..whole.len() / 2]).unwrap();
    assert_same(&sample(), &Checkpoint::load(&path, &CPU).unwrap());
    sample().with("epoch", 2).save(&path).unwrap();
    assert_eq!(
        Checkpoint::load(&path, &CPU)
            .unwrap()
            .text("epoch")
            .unwrap(),
        "2"
    );
    assert_eq!(
        files(folder.path()),
        [".state.safetensors.abcdef.tmp", "state.safetensors"]
    );
}

#[test]
fn a_save_that_fails_keeps_the_old_file_and_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let path = saved(folder.path());
    let mut bad = sample();
    bad.tensors
        .insert("z".into(), Tensor::new(1_i16, &CPU).unwrap());
    assert!(bad.save(&path).is_err());
    assert_same(&sample(), &Checkpoint::load(&path, &CPU).unwrap());
    // The target is a folder: the rename fails after the temporary file has been written.
    let target = folder.path().join("folder");
    std::fs::create_dir_all(target.join("full")).unwrap();
    assert!(matches!(sample().save(&target), Err(Error::Io { .. })));
    assert!(matches!(
        sample().save(folder.path().join("no/such")),
        Err(Error::Io { .. })
    ));
    assert!(matches!(
        sample().save("/"),
        Err(Error::InvalidArgument { .. })
    ));
    assert_eq!(files(folder.path()), ["folder", "state.safetensors"]);
}

#[cfg(unix)]
#[test]
fn files_get_the_permissions_of_plain_new_files() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let plain = folder.path().join("plain");
    std::fs::write(&plain, "x").unwrap();
    let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode();
    assert_eq!(mode(&saved(folder.path())), mode(&plain));
}

/// The child saves without end; it is killed at different moments, and the file is whole each time.
#[test]
fn killing_the_writer_never_leaves_half_a_file() {
    let constant = |i: u32| {
        let tensor = Tensor::full(i, 300_000, &CPU).unwrap();
        Checkpoint::new("count", State::from([("i".to_string(), tensor)])).with("i", i)
    };
    if let Some(path) = child::argument() {
        for i in 0.. {
            constant(i).save(&path).unwrap();
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("count.safetensors");
    constant(0).save(&path).unwrap();
    let mut newest = 0;
    for round in 0..5 {
        let name = "checkpoint::killing_the_writer_never_leaves_half_a_file";
        let mut writer = child::command(name, path.to_str().unwrap())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(60 + 17 * round));
        writer.kill().unwrap();
        writer.wait().unwrap();
        let loaded = Checkpoint::load(&path, &CPU).unwrap();
        let i: u32 = loaded.number("i").unwrap();
        assert_same(&constant(i), &loaded);
        newest = newest.max(i);
    }
    assert!(newest > 0, "the writer never got to write");
}
