//! The results database: one row a trial, in SQLite.
//!
//! A trial is committed by itself as soon as it ends, with the write-ahead log synced, so whatever
//! kills the process costs at most the trial that was running. Nothing is ever overwritten by a
//! later run: running again adds rows, and readers take the latest row of each [`TrialKey`].

mod schema;

use crate::scenario::{Number, Picture, PictureFormat, TrialOutcome};
use crate::{Error, Result};
use rusqlite::{params, Connection, OpenFlags, OptionalExtension, Row};
use schema::{APPLICATION_ID, MIGRATIONS};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// What makes two trials the same trial.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct TrialKey {
    /// The scenario's slug.
    pub scenario: String,
    /// Hash of the scenario's definition.
    pub definition: String,
    /// The arm.
    pub arm: String,
    /// The point of the arm's grid.
    pub setting: String,
    /// The seed.
    pub seed: u64,
    /// The suite.
    pub suite: String,
    /// The device.
    pub device: String,
    /// The data.
    pub data: String,
    /// The version of this crate.
    pub version: String,
}

/// A trial as it stands in the database.
#[derive(Debug, Clone, PartialEq)]
pub struct StoredTrial {
    /// The run that made it.
    pub run: i64,
    /// What it is a trial of.
    pub key: TrialKey,
    /// The message of a failed trial.
    pub error: Option<String>,
    /// What it measured; empty for a failed trial.
    pub outcome: TrialOutcome,
    /// How long it took.
    pub seconds: f64,
    /// When it ended, in seconds since 1970.
    pub finished: u64,
}

/// An invocation that stored trials.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Run {
    /// Its number.
    pub id: i64,
    /// When it started, in seconds since 1970.
    pub started: u64,
    /// The suite.
    pub suite: String,
    /// The version of this crate.
    pub version: String,
    /// Facts about the machine.
    pub facts: BTreeMap<String, String>,
}

/// Which trials to read; `None` = any.
#[derive(Debug, Clone, Default)]
pub struct Query {
    /// The run.
    pub run: Option<i64>,
    /// The scenario.
    pub scenario: Option<String>,
    /// The suite.
    pub suite: Option<String>,
    /// The version of this crate.
    pub version: Option<String>,
}

/// An open results database.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    connection: Connection,
}

impl Store {
    /// Opens the database at `path`, creating it and its folder where missing, and brings an older
    /// schema up to date.
    ///
    /// # Errors
    /// [`Error::Store`], naming the path, when the folder cannot be written, the file is not a
    /// results database, is damaged, or was written by a newer version. The file is left as it is.
    pub fn open(path: &Path) -> Result<Self> {
        if let Some(folder) = path.parent().filter(|f| !f.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder).map_err(|e| Error::Store {
                path: path.display().to_string(),
                reason: format!("cannot create the folder {}: {e}", folder.display()),
            })?;
        }
        Self::connect(path, OpenFlags::default())
    }

    /// Opens an existing database.
    ///
    /// # Errors
    /// As [`open`](Self::open), and when there is no such file.
    pub fn open_existing(path: &Path) -> Result<Self> {
        if !path.is_file() {
            return Err(Error::Store {
                path: path.display().to_string(),
                reason: "there is no such file; `thalweg-bench run` makes one".into(),
            });
        }
        Self::connect(path, OpenFlags::default())
    }

    fn connect(path: &Path, flags: OpenFlags) -> Result<Self> {
        let connection = Connection::open_with_flags(path, flags).map_err(|e| failure(path, &e))?;
        let mut store = Self {
            path: path.to_path_buf(),
            connection,
        };
        store.prepare()?;
        Ok(store)
    }

    /// The database's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn prepare(&mut self) -> Result<()> {
        let fail = |e: rusqlite::Error| failure(&self.path, &e);
        self.connection
            .busy_timeout(Duration::from_secs(10))
            .map_err(fail)?;
        let (application, version, tables) = self.identity().map_err(fail)?;
        if tables > 0 && application != i64::from(APPLICATION_ID) {
            return Err(self.refuse("is an SQLite database, but not one of results"));
        }
        let known = MIGRATIONS.len() as i64;
        if version > known {
            return Err(self.refuse(&format!(
                "has schema version {version}; this build knows versions up to {known}"
            )));
        }
        if tables > 0 {
            self.check()?;
        }
        self.use_wal().map_err(fail)?;
        self.connection
            .execute_batch("PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;")
            .map_err(fail)?;
        self.migrate()
    }

    /// Application id, schema version and number of tables, at one moment: another process may be
    /// making the tables.
    fn identity(&self) -> rusqlite::Result<(i64, i64, i64)> {
        let snapshot = self.connection.unchecked_transaction()?;
        let tables =
            snapshot.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get(0))?;
        let number = |name| snapshot.pragma_query_value(None, name, |row| row.get(0));
        let found = (number("application_id")?, number("user_version")?, tables);
        snapshot.finish()?;
        Ok(found)
    }

    /// The change of the journal needs the file for itself for a moment, and SQLite does not wait
    /// for that by itself.
    fn use_wal(&self) -> rusqlite::Result<()> {
        let patience = Instant::now() + Duration::from_secs(10);
        loop {
            match self.connection.execute_batch("PRAGMA journal_mode = WAL;") {
                Err(error) if is_busy(&error) && Instant::now() < patience => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                other => return other,
            }
        }
    }

    fn refuse(&self, reason: &str) -> Error {
        Error::Store {
            path: self.path.display().to_string(),
            reason: format!("{reason}; move it away or name another file with --db"),
        }
    }

    /// SQLite's own consistency check.
    fn check(&self) -> Result<()> {
        let verdict: String = self
            .connection
            .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
            .map_err(|e| failure(&self.path, &e))?;
        if verdict == "ok" {
            Ok(())
        } else {
            Err(self.refuse(&format!("is damaged ({verdict})")))
        }
    }

    fn migrate(&mut self) -> Result<()> {
        let path = self.path.clone();
        let fail = |e: rusqlite::Error| failure(&path, &e);
        // Two processes may open a new file at once: the lock comes before the version is read.
        let transaction = self
            .connection
            .transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)
            .map_err(fail)?;
        let version: usize = transaction
            .pragma_query_value(None, "user_version", |row| row.get::<_, i64>(0))
            .map_err(fail)? as usize;
        for step in MIGRATIONS.iter().skip(version) {
            transaction.execute_batch(step).map_err(fail)?;
        }
        if version < MIGRATIONS.len() {
            transaction
                .pragma_update(None, "application_id", APPLICATION_ID)
                .map_err(fail)?;
            transaction
                .pragma_update(None, "user_version", MIGRATIONS.len() as i64)
                .map_err(fail)?;
        }
        transaction.commit().map_err(fail)
    }

    /// Registers an invocation and gives its number.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn begin_run(&self, suite: &str, facts: &BTreeMap<String, String>) -> Result<i64> {
        let text = self.json(facts)?;
        self.connection
            .execute(
                "INSERT INTO run (started, suite, version, facts) VALUES (?1, ?2, ?3, ?4)",
                params![now() as i64, suite, crate::VERSION, text],
            )
            .map_err(|e| failure(&self.path, &e))?;
        Ok(self.connection.last_insert_rowid())
    }

    /// Commits one trial.
    ///
    /// # Errors
    /// [`Error::Store`] (disk full, file removed); what was stored before stays.
    pub fn insert(&mut self, trial: &StoredTrial) -> Result<()> {
        let path = self.path.clone();
        let fail = |e: rusqlite::Error| failure(&path, &e);
        let metrics: BTreeMap<&str, Number> = trial
            .outcome
            .metrics
            .iter()
            .map(|(name, value)| (name.as_str(), Number::from(*value)))
            .collect();
        let (metrics, curves) = (self.json(&metrics)?, self.json(&trial.outcome.curves)?);
        let key = &trial.key;
        let transaction = self.connection.transaction().map_err(fail)?;
        transaction
            .execute(
                "INSERT INTO trial (run, scenario, definition, arm, setting, seed, suite, device,
                    data, version, error, metrics, curves, seconds, finished)
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15)",
                params![
                    trial.run,
                    key.scenario,
                    key.definition,
                    key.arm,
                    key.setting,
                    key.seed as i64,
                    key.suite,
                    key.device,
                    key.data,
                    key.version,
                    trial.error,
                    metrics,
                    curves,
                    trial.seconds,
                    trial.finished as i64,
                ],
            )
            .map_err(fail)?;
        let row = transaction.last_insert_rowid();
        for (position, picture) in trial.outcome.pictures.iter().enumerate() {
            transaction
                .execute(
                    "INSERT INTO picture VALUES (?1, ?2, ?3, ?4, ?5)",
                    params![
                        row,
                        position as i64,
                        picture.caption,
                        form(picture.format),
                        picture.bytes
                    ],
                )
                .map_err(fail)?;
        }
        transaction.commit().map_err(fail)
    }

    /// The latest successful trial of this key.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn find(&self, key: &TrialKey) -> Result<Option<StoredTrial>> {
        let found = self
            .connection
            .query_row(
                &format!(
                    "{SELECT} WHERE error IS NULL AND scenario = ?1 AND definition = ?2 AND arm = ?3
                     AND setting = ?4 AND seed = ?5 AND suite = ?6 AND device = ?7 AND data = ?8
                     AND version = ?9 ORDER BY id DESC LIMIT 1"
                ),
                params![
                    key.scenario,
                    key.definition,
                    key.arm,
                    key.setting,
                    key.seed as i64,
                    key.suite,
                    key.device,
                    key.data,
                    key.version,
                ],
                raw,
            )
            .optional()
            .map_err(|e| failure(&self.path, &e))?;
        found.map(|row| self.trial(row)).transpose()
    }

    /// The latest row of every key that the query leaves; a success replaces earlier failures and
    /// a failure never replaces a success. Ordered by key.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn trials(&self, query: &Query) -> Result<Vec<StoredTrial>> {
        let fail = |e: rusqlite::Error| failure(&self.path, &e);
        let mut statement = self
            .connection
            .prepare(&format!(
                "{SELECT} WHERE (?1 IS NULL OR run = ?1) AND (?2 IS NULL OR scenario = ?2)
                 AND (?3 IS NULL OR suite = ?3) AND (?4 IS NULL OR version = ?4) ORDER BY id"
            ))
            .map_err(fail)?;
        let rows = statement
            .query_map(
                params![query.run, query.scenario, query.suite, query.version],
                raw,
            )
            .map_err(fail)?;
        let mut latest = BTreeMap::new();
        for row in rows {
            let trial = self.trial(row.map_err(fail)?)?;
            let replaces = latest
                .get(&trial.key)
                .is_none_or(|old: &StoredTrial| trial.error.is_none() || old.error.is_some());
            if replaces {
                latest.insert(trial.key.clone(), trial);
            }
        }
        Ok(latest.into_values().collect())
    }

    /// All runs, oldest first.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn runs(&self) -> Result<Vec<Run>> {
        let fail = |e: rusqlite::Error| failure(&self.path, &e);
        let mut statement = self
            .connection
            .prepare("SELECT id, started, suite, version, facts FROM run ORDER BY id")
            .map_err(fail)?;
        let rows = statement
            .query_map([], |row| {
                Ok((
                    row.get(0)?,
                    row.get::<_, i64>(1)?,
                    row.get(2)?,
                    row.get(3)?,
                    row.get::<_, String>(4)?,
                ))
            })
            .map_err(fail)?;
        let mut runs = Vec::new();
        for row in rows {
            let (id, started, suite, version, facts) = row.map_err(fail)?;
            let facts = self.parse(&facts)?;
            runs.push(Run {
                id,
                started: started as u64,
                suite,
                version,
                facts,
            });
        }
        Ok(runs)
    }

    fn trial(&self, raw: Raw) -> Result<StoredTrial> {
        let metrics: BTreeMap<String, Number> = self.parse(&raw.metrics)?;
        Ok(StoredTrial {
            run: raw.run,
            key: raw.key,
            error: raw.error,
            outcome: TrialOutcome {
                metrics: metrics
                    .into_iter()
                    .map(|(name, x)| (name, x.into()))
                    .collect(),
                curves: self.parse(&raw.curves)?,
                pictures: self.pictures(raw.id)?,
            },
            seconds: raw.seconds,
            finished: raw.finished as u64,
        })
    }

    fn pictures(&self, trial: i64) -> Result<Vec<Picture>> {
        let fail = |e: rusqlite::Error| failure(&self.path, &e);
        let mut statement = self
            .connection
            .prepare_cached(
                "SELECT caption, format, bytes FROM picture WHERE trial = ?1 ORDER BY position",
            )
            .map_err(fail)?;
        let rows = statement
            .query_map([trial], |row| {
                let format: String = row.get(1)?;
                let format = match format.as_str() {
                    "svg" => PictureFormat::Svg,
                    "png" => PictureFormat::Png,
                    _ => PictureFormat::Text,
                };
                Ok(Picture {
                    caption: row.get(0)?,
                    format,
                    bytes: row.get(2)?,
                })
            })
            .map_err(fail)?;
        rows.collect::<rusqlite::Result<_>>().map_err(fail)
    }

    fn json(&self, value: &impl Serialize) -> Result<String> {
        serde_json::to_string(value).map_err(|e| self.refuse(&format!("cannot hold a value ({e})")))
    }

    fn parse<T: for<'de> Deserialize<'de>>(&self, text: &str) -> Result<T> {
        serde_json::from_str(text).map_err(|e| self.refuse(&format!("holds a damaged row ({e})")))
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    // A clock before 1970 is the only failure; the moment is for people, not for logic.
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs())
}

const SELECT: &str = "SELECT id, run, scenario, definition, arm, setting, seed, suite, device,
    data, version, error, metrics, curves, seconds, finished FROM trial";

/// A row before its JSON is read.
struct Raw {
    id: i64,
    run: i64,
    key: TrialKey,
    error: Option<String>,
    metrics: String,
    curves: String,
    seconds: f64,
    finished: i64,
}

fn raw(row: &Row) -> rusqlite::Result<Raw> {
    Ok(Raw {
        id: row.get(0)?,
        run: row.get(1)?,
        key: TrialKey {
            scenario: row.get(2)?,
            definition: row.get(3)?,
            arm: row.get(4)?,
            setting: row.get(5)?,
            seed: row.get::<_, i64>(6)? as u64,
            suite: row.get(7)?,
            device: row.get(8)?,
            data: row.get(9)?,
            version: row.get(10)?,
        },
        error: row.get(11)?,
        metrics: row.get(12)?,
        curves: row.get(13)?,
        seconds: row.get(14)?,
        finished: row.get(15)?,
    })
}

fn form(format: PictureFormat) -> &'static str {
    match format {
        PictureFormat::Svg => "svg",
        PictureFormat::Png => "png",
        PictureFormat::Text => "text",
    }
}

/// An SQLite error as a sentence that names the file and says what to do.
fn failure(path: &Path, error: &rusqlite::Error) -> Error {
    use rusqlite::ErrorCode as Code;
    let advice = match error.sqlite_error_code() {
        Some(Code::NotADatabase) => {
            "is not an SQLite database; move it away or name another file with --db"
        }
        Some(Code::DatabaseCorrupt) => "is damaged; move it away or name another file with --db",
        Some(Code::DiskFull) => {
            "the disk is full; what was stored before is kept, free some space and run again"
        }
        Some(Code::ReadOnly) | Some(Code::PermissionDenied) => {
            "cannot be written; check the permissions or name another file with --db"
        }
        Some(Code::CannotOpen) => {
            "cannot be opened; check that the folder exists and can be written, or name another \
             file with --db"
        }
        Some(Code::SystemIoFailure) => "reading or writing failed; what was stored before is kept",
        Some(Code::DatabaseBusy) | Some(Code::DatabaseLocked) => "is in use by another process",
        _ => "cannot be used",
    };
    Error::Store {
        path: path.display().to_string(),
        reason: format!("{advice} ({error})"),
    }
}

fn is_busy(error: &rusqlite::Error) -> bool {
    use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked};
    matches!(
        error.sqlite_error_code(),
        Some(DatabaseBusy | DatabaseLocked)
    )
}
