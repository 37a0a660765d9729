//! One file over HTTP, into a partial file that a later attempt continues.

use super::checksum::Checksum;
use crate::{Error, Result};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;
use ureq::http::{header, HeaderMap, Response};
use ureq::{Agent, Body};

/// Connections to one address, as long as each brings new bytes.
const MAX_ATTEMPTS: usize = 20;

/// Called with the bytes that have arrived and, where known, the bytes of the whole file.
type Report<'a> = dyn FnMut(u64, Option<u64>) + 'a;

/// Brings the file at one of `urls`, tried in order, to `target`. A target that is there and has
/// the right checksum is left alone, without any connection.
///
/// `progress(done, total)` is called after each piece.
///
/// # Errors
/// [`Error::Network`] when no address gave the whole file (what has arrived stays in
/// `TARGET.part`, and the next call continues there), [`Error::Checksum`] when the bytes are not
/// the published ones (they are thrown away), [`Error::Busy`] while another process downloads the
/// same file, [`Error::Io`], [`Error::InvalidArgument`] without addresses.
pub fn download(
    urls: &[&str],
    target: &Path,
    checksum: Checksum<'_>,
    progress: &mut dyn FnMut(u64, Option<u64>),
) -> Result<()> {
    if is_whole(target, checksum)? {
        tracing::debug!(file = %target.display(), "already there");
        return Ok(());
    }
    if let Some(folder) = target.parent() {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    }
    let mut part = Part::open(target)?;
    let agent = agent();
    let mut failure = Error::invalid("urls", "[]", "at least one address");
    for url in urls {
        match part.fill(&agent, url, checksum, progress) {
            Ok(()) => return part.finish(target),
            Err(error @ (Error::Network { .. } | Error::Checksum { .. })) => {
                tracing::warn!(%error, "address failed");
                failure = error;
            }
            Err(error) => return Err(error),
        }
    }
    part.remove_if_empty()?;
    Err(failure)
}

fn is_whole(target: &Path, checksum: Checksum<'_>) -> Result<bool> {
    let file = match File::open(target) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(e) => return Err(Error::io(target, e)),
    };
    match checksum.verify(target, &file) {
        Ok(()) => Ok(true),
        Err(Error::Checksum { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Phases are limited, the whole is not: a large file may take long, silence may not.
fn agent() -> Agent {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .accept_encoding("identity")
        .timeout_resolve(Some(Duration::from_secs(20)))
        .timeout_connect(Some(Duration::from_secs(30)))
        .timeout_recv_response(Some(Duration::from_secs(60)))
        .timeout_per_read(Some(Duration::from_secs(60)))
        .build();
    config.into()
}

/// The partial file, locked against other processes.
struct Part {
    path: PathBuf,
    file: File,
}

impl Part {
    fn open(target: &Path) -> Result<Self> {
        let mut name = target.as_os_str().to_owned();
        name.push(".part");
        let path = PathBuf::from(name);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|e| Error::io(&path, e))?;
        match file.try_lock() {
            Err(TryLockError::WouldBlock) => Err(Error::Busy {
                path: path.display().to_string(),
            }),
            // Some network file systems have no locks; then the checksum is what protects.
            Ok(()) | Err(TryLockError::Error(_)) => Ok(Self { path, file }),
        }
    }

    fn io(&self, error: std::io::Error) -> Error {
        Error::io(&self.path, error)
    }

    fn len(&self) -> Result<u64> {
        Ok(self.file.metadata().map_err(|e| self.io(e))?.len())
    }

    fn clear(&mut self) -> Result<()> {
        self.file.set_len(0).map_err(|e| self.io(e))
    }

    /// Downloads and verifies. Bytes of an earlier attempt that turn out to be wrong are thrown
    /// away, and the file is downloaded once more from its start.
    fn fill(
        &mut self,
        agent: &Agent,
        url: &str,
        checksum: Checksum<'_>,
        report: &mut Report<'_>,
    ) -> Result<()> {
        let mut resumed = self.len()? > 0;
        loop {
            self.receive_all(agent, url, report)?;
            match checksum.verify(&self.path, &self.file) {
                Err(error @ Error::Checksum { .. }) => {
                    self.clear()?;
                    if !resumed {
                        return Err(error);
                    }
                    tracing::warn!(url, "the kept part was wrong: downloading from the start");
                    resumed = false;
                }
                verified => return verified,
            }
        }
    }

    /// Connects again after each interruption, as long as that brings the file further.
    fn receive_all(&mut self, agent: &Agent, url: &str, report: &mut Report<'_>) -> Result<()> {
        let mut longest = self.len()?;
        for attempt in 1.. {
            let Some(reason) = self.receive(agent, url, report)? else {
                return Ok(());
            };
            let kept = self.len()?;
            if kept <= longest || attempt >= MAX_ATTEMPTS {
                let url = url.to_string();
                return Err(Error::Network { url, reason, kept });
            }
            tracing::info!(url, reason, kept, "interrupted: continuing");
            longest = kept;
        }
        Ok(())
    }

    /// One connection. `Ok(None)` when the file is complete, `Ok(Some(reason))` when it is not.
    fn receive(
        &mut self,
        agent: &Agent,
        url: &str,
        report: &mut Report<'_>,
    ) -> Result<Option<String>> {
        let start = self.len()?;
        let mut request = agent.get(url);
        if start > 0 {
            request = request.header(header::RANGE, format!("bytes={start}-"));
        }
        let response = match request.call() {
            Ok(response) => response,
            Err(e) => return Ok(Some(e.to_string())),
        };
        let range = content_range(response.headers());
        match response.status().as_u16() {
            206 if range.start == Some(start) => self.copy(response, start, range.total, report),
            206 => Ok(Some(format!(
                "sent another range than bytes {start} and up"
            ))),
            200 => {
                // Without ranges the server begins at the start, and so does the file.
                self.clear()?;
                self.copy(response, 0, None, report)
            }
            // Nothing lies beyond the kept part: it is complete, or not this file.
            416 if start > 0 => {
                if range.total != Some(start) {
                    self.clear()?;
                    return self.receive(agent, url, report);
                }
                report(start, range.total);
                Ok(None)
            }
            status => Ok(Some(format!("HTTP status {status}"))),
        }
    }

    /// Appends the body from `start` on.
    fn copy(
        &mut self,
        mut response: Response<Body>,
        start: u64,
        total: Option<u64>,
        report: &mut Report<'_>,
    ) -> Result<Option<String>> {
        let length = content_length(response.headers()).map(|n| start.saturating_add(n));
        let total = total.or(length);
        let mut body = response.body_mut().as_reader();
        let mut file = &self.file;
        file.seek(SeekFrom::Start(start)).map_err(|e| self.io(e))?;
        let mut done = start;
        let mut buffer = vec![0; 1 << 16];
        report(done, total);
        loop {
            let n = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) => return Ok(Some(e.to_string())),
            };
            file.write_all(&buffer[..n]).map_err(|e| self.io(e))?;
            done += n as u64;
            report(done, total);
        }
        match total {
            Some(total) if done < total => Ok(Some(format!(
                "the connection ended after {done} of {total} bytes"
            ))),
            _ => Ok(None),
        }
    }

    /// Leaves nothing behind where nothing has arrived.
    fn remove_if_empty(self) -> Result<()> {
        if self.len()? > 0 {
            return Ok(());
        }
        let path = self.path;
        drop(self.file);
        std::fs::remove_file(&path).map_err(|e| Error::io(&path, e))
    }

    /// Gives the file its name.
    fn finish(self, target: &Path) -> Result<()> {
        self.file.sync_all().map_err(|e| self.io(e))?;
        let path = self.path;
        // Some systems do not rename a file that is open.
        drop(self.file);
        std::fs::rename(&path, target).map_err(|e| Error::io(target, e))
    }
}

/// A `Content-Range` header: `bytes FIRST-LAST/TOTAL` or `bytes */TOTAL`.
#[derive(Debug, Default, PartialEq)]
struct ContentRange {
    start: Option<u64>,
    total: Option<u64>,
}

fn content_range(headers: &HeaderMap) -> ContentRange {
    let value = headers.get(header::CONTENT_RANGE);
    let text = value.and_then(|v| v.to_str().ok()).unwrap_or_default();
    let Some((range, total)) = text
        .strip_prefix("bytes ")
        .and_then(|rest| rest.split_once('/'))
    else {
        return ContentRange::default();
    };
    let start = range
        .split_once('-')
        .and_then(|(first, _)| first.parse().ok());
    ContentRange {
        start,
        total: total.parse().ok(),
    }
}

/// The length of the body as it will be read; unknown where the transport decodes it.
fn content_length(headers: &HeaderMap) -> Option<u64> {
    if headers.contains_key(header::CONTENT_ENCODING) {
        return None;
    }
    headers
        .get(header::CONTENT_LENGTH)?
        .to_str()
        .ok()?
        .parse()
        .ok()
}
