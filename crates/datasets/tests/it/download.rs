use crate::server::{Answer, Server};
use flate2::{write::GzEncoder, Compression};
use sha2::{Digest, Sha256};
use std::fs::{read, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use thalweg_datasets::download::{
    catalog, download, fetch, find, CatalogEntry, Checksum, Content, Hashed, RemoteFile,
};
use thalweg_datasets::{DataDir, Error, RandomStream};

/// Bytes that do not repeat and do not compress.
fn content(n: usize) -> Vec<u8> {
    let mut rng = RandomStream::new(7);
    (0..n).map(|_| rng.bits() as u8).collect()
}

fn sha256(bytes: &[u8]) -> String {
    let digest = Sha256::digest(bytes);
    digest.iter().map(|b| format!("{b:02x}")).collect()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

type Steps = Vec<(u64, Option<u64>)>;

/// A folder, the target in it, and the content's checksum.
struct Case {
    dir: tempfile::TempDir,
    content: Vec<u8>,
    sha256: String,
}

impl Case {
    fn new() -> Self {
        let content = content(300_000);
        Self {
            dir: tempfile::tempdir().unwrap(),
            sha256: sha256(&content),
            content,
        }
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("sub").join("data.bin")
    }

    fn part(&self) -> PathBuf {
        self.dir.path().join("sub").join("data.bin.part")
    }

    fn keep_part(&self, bytes: &[u8]) {
        std::fs::create_dir_all(self.dir.path().join("sub")).unwrap();
        std::fs::write(self.part(), bytes).unwrap();
    }

    /// The outcome, and every `(done, total)` that was reported.
    fn run(&self, urls: &[&str]) -> (Result<(), Error>, Steps) {
        let checksum = Checksum {
            sha256: &self.sha256,
            of: Hashed::File,
        };
        let mut steps = Vec::new();
        let result = download(urls, &self.target(), checksum, &mut |done, total| {
            steps.push((done, total));
        });
        (result, steps)
    }

    fn assert_whole(&self) {
        assert!(read(self.target()).unwrap() == self.content);
        assert!(!self.part().exists());
    }
}

fn range(start: usize) -> Option<String> {
    Some(format!("{start}-"))
}

#[test]
fn a_download_reports_progress_and_is_not_repeated() {
    let case = Case::new();
    let server = Server::start(case.content.clone(), &[]);
    let (result, steps) = case.run(&[&server.url("data.bin")]);
    result.unwrap();
    case.assert_whole();
    assert!(steps.is_sorted() && steps.len() > 2);
    assert_eq!(steps.first(), Some(&(0, Some(300_000))));
    assert_eq!(steps.last(), Some(&(300_000, Some(300_000))));
    // The second call needs no connection.
    let (result, steps) = case.run(&["http://127.0.0.1:1/absent"]);
    result.unwrap();
    assert!(steps.is_empty());
    assert_eq!(server.ranges(), [None]);
}

#[test]
fn an_interrupted_download_continues_where_it_stopped() {
    let case = Case::new();
    let script = [Answer::Cut(100_000), Answer::Cut(50_000)];
    let server = Server::start(case.content.clone(), &script);
    case.run(&[&server.url("x")]).0.unwrap();
    case.assert_whole();
    assert_eq!(server.ranges(), [None, range(100_000), range(150_000)]);
}

#[test]
fn a_later_call_continues_the_kept_part() {
    let case = Case::new();
    let script = [Answer::Cut(120_000), Answer::Status(503)];
    let server = Server::start(case.content.clone(), &script);
    match case.run(&[&server.url("x")]).0.unwrap_err() {
        Error::Network { reason, kept, .. } => {
            assert_eq!((reason.as_str(), kept), ("HTTP status 503", 120_000));
        }
        other => panic!("{other}"),
    }
    assert!(!case.target().exists());
    assert!(read(case.part()).unwrap() == case.content[..120_000]);
    let (result, steps) = case.run(&[&server.url("x")]);
    result.unwrap();
    case.assert_whole();
    assert_eq!(steps[0], (120_000, Some(300_000)));
    assert_eq!(server.ranges(), [None, range(120_000), range(120_000)]);
}

#[test]
fn a_server_without_ranges_starts_over() {
    let case = Case::new();
    case.keep_part(&case.content[..1000]);
    let server = Server::start(case.content.clone(), &[Answer::NoRange]);
    case.run(&[&server.url("x")]).0.unwrap();
    case.assert_whole();
    assert_eq!(server.ranges(), [range(1000)]);

    // One that always breaks at the same byte is given up instead of being asked forever.
    let case = Case::new();
    let server = Server::start(case.content.clone(), &[Answer::NoRangeCut(70_000); 9]);
    match case.run(&[&server.url("x")]).0.unwrap_err() {
        Error::Network { kept: 70_000, .. } => {}
        other => panic!("{other}"),
    }
    assert_eq!(server.ranges(), [None, range(70_000)]);
}

#[test]
fn a_complete_part_only_needs_its_name() {
    let case = Case::new();
    case.keep_part(&case.content);
    let server = Server::start(case.content.clone(), &[]);
    case.run(&[&server.url("x")]).0.unwrap();
    case.assert_whole();
    assert_eq!(server.ranges(), [range(300_000)]);
}

#[test]
fn a_wrong_part_is_thrown_away_and_downloaded_again() {
    for wrong in [vec![0; 5000], vec![0; 300_000], vec![0; 400_000]] {
        let case = Case::new();
        case.keep_part(&wrong);
        let server = Server::start(case.content.clone(), &[]);
        case.run(&[&server.url("x")]).0.unwrap();
        case.assert_whole();
        assert_eq!(server.ranges(), [range(wrong.len()), None]);
    }
}

#[test]
fn wrong_content_is_refused_and_leaves_nothing() {
    let mut case = Case::new();
    case.sha256 = sha256(b"something else");
    let server = Server::start(case.content.clone(), &[]);
    match case.run(&[&server.url("x")]).0.unwrap_err() {
        Error::Checksum {
            found, expected, ..
        } => {
            assert_eq!(found, sha256(&case.content));
            assert_eq!(expected, case.sha256);
        }
        other => panic!("{other}"),
    }
    assert!(!case.target().exists() && !case.part().exists());
}

#[test]
fn a_damaged_target_is_replaced() {
    let case = Case::new();
    case.keep_part(&[]);
    std::fs::write(case.target(), b"damaged").unwrap();
    let server = Server::start(case.content.clone(), &[]);
    case.run(&[&server.url("x")]).0.unwrap();
    case.assert_whole();
}

#[test]
fn the_next_address_takes_over() {
    let case = Case::new();
    let other = Server::start(content(10), &[]);
    let absent = Server::start(Vec::new(), &[Answer::Status(404)]);
    let half = Server::start(
        case.content.clone(),
        &[Answer::Cut(200_000), Answer::WrongRange],
    );
    let good = Server::start(case.content.clone(), &[]);
    let urls = [
        other.url("x"),
        absent.url("x"),
        half.url("x"),
        good.url("x"),
    ];
    let urls: Vec<&str> = urls.iter().map(String::as_str).collect();
    case.run(&urls).0.unwrap();
    case.assert_whole();
    assert_eq!(good.ranges(), [range(200_000)]);
}

#[test]
fn no_network_is_a_clear_error() {
    // Bound, then closed: nobody listens there.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    drop(listener);
    std::env::set_var("NO_PROXY", "127.0.0.1");
    let case = Case::new();
    let url = format!("http://{address}/x");
    let error = case.run(&[&url]).0.unwrap_err();
    assert!(matches!(error, Error::Network { kept: 0, .. }));
    assert!(error.to_string().contains(&url), "{error}");
    assert!(!case.part().exists());
    let error = case.run(&[]).0.unwrap_err();
    assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
}

#[test]
fn a_file_in_use_by_another_download_is_refused() {
    let case = Case::new();
    case.keep_part(&[]);
    let held = File::options().write(true).open(case.part()).unwrap();
    held.lock().unwrap();
    let error = case.run(&["http://127.0.0.1:1/x"]).0.unwrap_err();
    assert!(matches!(error, Error::Busy { .. }), "{error}");
}

#[test]
fn the_decompressed_checksum_holds_for_any_compression() {
    let dir = tempfile::tempdir().unwrap();
    let plain = content(5000);
    let sum = sha256(&plain);
    let check = |bytes: &[u8], size: u64| {
        let path = dir.path().join("x");
        std::fs::write(&path, bytes).unwrap();
        let of = Hashed::Decompressed { bytes: size };
        Checksum { sha256: &sum, of }.verify(&path, &File::open(&path).unwrap())
    };
    check(&gzip(&plain), 5000).unwrap();
    check(&plain, 5000).unwrap();
    let packed = gzip(&plain);
    for bad in [
        check(&packed[..packed.len() - 9], 5000),
        check(&packed, 4000),
        check(b"", 5000),
    ] {
        assert!(matches!(bad, Err(Error::Checksum { .. })));
    }
}

fn leak(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

/// A catalog entry of one file at a server.
fn entry(server: &Server, name: &'static str, sha256: String, content: Content) -> CatalogEntry {
    let urls = Box::leak(Box::new([leak(server.url(name))]));
    let file = RemoteFile {
        name,
        urls,
        sha256: leak(sha256),
        content,
    };
    CatalogEntry {
        name: "small",
        folder: "small",
        title: "a test",
        terms: "none",
        files: Box::leak(Box::new([file])),
    }
}

fn archive(members: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (name, bytes) in members {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, name, *bytes).unwrap();
    }
    gzip(&tar.into_inner().unwrap())
}

const MEMBERS: &[(&str, u64)] = &[("inner/a.bin", 3), ("inner/b.bin", 5)];

#[test]
fn an_archive_is_unpacked_and_removed() {
    let bytes = archive(&[
        ("inner/readme.html", b"not wanted"),
        ("inner/b.bin", b"bbbbb"),
        ("inner/a.bin", b"aaa"),
    ]);
    let dir = tempfile::tempdir().unwrap();
    let server = Server::start(bytes.clone(), &[]);
    let content = Content::TarGz { members: MEMBERS };
    let entry = entry(&server, "small.tar.gz", sha256(&bytes), content);
    let mut reports = 0;
    let folder = fetch(&entry, dir.path(), &mut |p| {
        assert_eq!(p.file, "small.tar.gz");
        reports += 1;
    })
    .unwrap();
    assert!(reports > 0);
    assert_eq!(names(&folder), ["a.bin", "b.bin"]);
    assert_eq!(read(folder.join("b.bin")).unwrap(), b"bbbbb");
    fetch(&entry, dir.path(), &mut |_| panic!("nothing to download")).unwrap();
    assert_eq!(server.ranges().len(), 1);
    // A member of another size is fetched again.
    std::fs::write(folder.join("a.bin"), b"aa").unwrap();
    fetch(&entry, dir.path(), &mut |_| {}).unwrap();
    assert_eq!(read(folder.join("a.bin")).unwrap(), b"aaa");
}

#[test]
fn an_archive_of_other_files_is_refused() {
    for bytes in [
        archive(&[("inner/a.bin", b"aaa")]),
        archive(&[("inner/a.bin", b"aaaa"), ("inner/b.bin", b"bbbbb")]),
        archive(&[("inner/a.bin", b"aa"), ("inner/b.bin", b"bbbbb")]),
        b"no archive at all".to_vec(),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let server = Server::start(bytes.clone(), &[]);
        let content = Content::TarGz { members: MEMBERS };
        let entry = entry(&server, "small.tar.gz", sha256(&bytes), content);
        let error = fetch(&entry, dir.path(), &mut |_| {}).unwrap_err();
        assert!(matches!(error, Error::BadFile { .. }), "{error}");
    }
}

fn names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_gzip_file_is_kept_as_it_is() {
    let (plain, dir) = (content(4000), tempfile::tempdir().unwrap());
    let server = Server::start(gzip(&plain), &[]);
    let content = Content::Gzip { bytes: 4000 };
    let entry = entry(&server, "x.gz", sha256(&plain), content);
    let folder = fetch(&entry, dir.path(), &mut |_| {}).unwrap();
    assert_eq!(read(folder.join("x.gz")).unwrap(), gzip(&plain));
}

/// What the catalog brings is what the folder layout asks for.
#[test]
fn the_catalog_fits_the_layout() {
    assert_eq!(catalog().len(), 8);
    for entry in catalog() {
        assert_eq!(find(entry.name).unwrap(), entry);
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::new(dir.path()).unwrap();
        std::fs::create_dir_all(data.folder(entry.folder)).unwrap();
        for file in entry.files {
            let hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
            assert!(file.sha256.len() == 64 && file.sha256.chars().all(hex));
            assert!(file.urls.iter().all(|url| url.starts_with("https://")));
            let stored: Vec<&str> = match file.content {
                Content::Gzip { .. } | Content::Plain => vec![file.name],
                Content::TarGz { members } => members
                    .iter()
                    .map(|(name, _)| name.rsplit('/').next().unwrap())
                    .collect(),
            };
            for name in stored {
                std::fs::write(data.folder(entry.folder).join(name), []).unwrap();
            }
        }
        // Graphs are read by another crate.
        if !entry.folder.starts_with("graphs/") {
            data.check(entry.folder).unwrap();
        }
    }
    let message = find("imagenet").unwrap_err().to_string();
    assert!(message.contains("mnist, cifar-10, cifar-100"), "{message}");
}
