//! The database's schema, as the list of steps that led to it.

/// Marks a file as ours (`thlw`), so that another program's database is refused.
pub(super) const APPLICATION_ID: i32 = 0x7468_6c77;

/// Step `i` takes a database from version `i` to `i + 1`; a step is never changed once released.
pub(super) const MIGRATIONS: &[&str] = &[
    // 1: runs and trials.
    "CREATE TABLE run (
        id INTEGER PRIMARY KEY,
        started INTEGER NOT NULL,
        suite TEXT NOT NULL,
        version TEXT NOT NULL,
        facts TEXT NOT NULL
    );
    CREATE TABLE trial (
        id INTEGER PRIMARY KEY,
        run INTEGER NOT NULL REFERENCES run(id),
        scenario TEXT NOT NULL,
        definition TEXT NOT NULL,
        arm TEXT NOT NULL,
        setting TEXT NOT NULL,
        seed INTEGER NOT NULL,
        suite TEXT NOT NULL,
        device TEXT NOT NULL,
        data TEXT NOT NULL,
        version TEXT NOT NULL,
        error TEXT,
        metrics TEXT NOT NULL,
        curves TEXT NOT NULL,
        seconds REAL NOT NULL,
        finished INTEGER NOT NULL
    );
    CREATE UNIQUE INDEX trial_key ON trial
        (scenario, definition, arm, setting, seed, suite, device, data, version, run);",
    // 2: pictures beside the numbers.
    "CREATE TABLE picture (
        trial INTEGER NOT NULL REFERENCES trial(id) ON DELETE CASCADE,
        position INTEGER NOT NULL,
        caption TEXT NOT NULL,
        format TEXT NOT NULL,
        bytes BLOB NOT NULL,
        PRIMARY KEY (trial, position)
    );",
];
