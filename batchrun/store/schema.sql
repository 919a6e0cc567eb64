-- The state of one run, one SQLite file in the run's folder. Migration 1; later steps are in migrations.py.

-- All work on one manifest in one folder, however often stopped: one record.
CREATE TABLE run (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    manifest TEXT NOT NULL,               -- the manifest's absolute path, or '-'
    created_at REAL NOT NULL,             -- UTC unix seconds
    job TEXT NOT NULL,                    -- the job's settings as JSON, without secrets
    stamp TEXT NOT NULL DEFAULT '',       -- size, time, hash and settings of the manifest as last read
    form TEXT NOT NULL DEFAULT '{}',      -- its format, delimiter and columns, to write failed rows alike
    account_limit INTEGER,                -- active tasks the service allows, as last told
    spent_usd TEXT NOT NULL DEFAULT '0',  -- exact decimal text
    reserved_usd TEXT NOT NULL DEFAULT '0',
    settled INTEGER NOT NULL DEFAULT 0,   -- how many times a row was settled: gives settled numbers
    listed TEXT NOT NULL DEFAULT '{}',    -- watermarks of the sidecar files
    stop_order TEXT                       -- 'cancel' asks a live runner to stop and cancel
) STRICT;

-- One process's claim on rows: a fresh record per start.
CREATE TABLE leases (
    id INTEGER PRIMARY KEY,
    token TEXT NOT NULL UNIQUE,
    host TEXT NOT NULL,
    pid INTEGER NOT NULL,
    started_at REAL NOT NULL,
    ended_at REAL
) STRICT;

-- The tool descriptions that requests were bound to; a changed tool is a new record.
CREATE TABLE tools (
    id INTEGER PRIMARY KEY,
    description TEXT NOT NULL UNIQUE
) STRICT;

CREATE TABLE rows (
    seq INTEGER PRIMARY KEY,              -- first-seen order, never changes
    key TEXT NOT NULL,                    -- identity: 'id:...' or content hash and number
    content BLOB NOT NULL,                -- hash of what is asked for
    own BLOB NOT NULL,                    -- the same without --set
    id TEXT,
    line INTEGER NOT NULL,
    name TEXT NOT NULL,                   -- stem of its file names
    present INTEGER NOT NULL DEFAULT 1,   -- 1: in the manifest as last read
    tool INTEGER REFERENCES tools(id),    -- null: an invalid row
    given TEXT NOT NULL,                  -- values by parameter, as JSON
    extra TEXT NOT NULL DEFAULT '{}',
    images INTEGER NOT NULL,              -- expected
    state TEXT NOT NULL CHECK (state IN ('planned', 'submitting', 'in_flight', 'in_doubt', 'finished',
                                         'done', 'failed', 'cancelled', 'invalid')),
    attempts INTEGER NOT NULL DEFAULT 0,  -- tasks that failed, or the one that succeeded
    generation INTEGER NOT NULL DEFAULT 0,
    lease INTEGER REFERENCES leases(id),
    settled INTEGER,                      -- its place in the order of settling; null until settled
    cause TEXT,
    message TEXT
) STRICT;

CREATE UNIQUE INDEX rows_key ON rows (key);  -- before form 5 a constraint of the table
CREATE UNIQUE INDEX rows_name ON rows (name COLLATE NOCASE);
CREATE INDEX rows_unfinished ON rows (state, seq)  -- before form 6 with IN, which is slow in an index
    WHERE state = 'planned' OR state = 'submitting' OR state = 'in_flight' OR state = 'in_doubt'
        OR state = 'finished';
CREATE INDEX rows_troubled ON rows (state, seq)
    WHERE state = 'failed' OR state = 'cancelled' OR state = 'invalid' OR state = 'in_doubt';
CREATE INDEX rows_leased ON rows (lease) WHERE lease IS NOT NULL;
CREATE INDEX rows_settled ON rows (settled) WHERE settled IS NOT NULL;

-- Rows as the manifest had them (with the values of their expansion), to give failed ones back; only those
-- that cannot be told from what they give, and of most of these only what differs (records.given_back).
CREATE TABLE sources (
    row INTEGER PRIMARY KEY REFERENCES rows(seq),
    cells TEXT NOT NULL                   -- JSON object: the row; JSON list: a merge patch to what it gives
) STRICT;

-- One try for a row. A try that certainly made no task is removed again.
CREATE TABLE attempts (
    row INTEGER NOT NULL REFERENCES rows(seq),
    generation INTEGER NOT NULL,
    number INTEGER NOT NULL,
    open INTEGER NOT NULL DEFAULT 1,
    intent_at REAL NOT NULL,
    intent_server_at REAL,
    after_task INTEGER,
    reserved_usd TEXT NOT NULL DEFAULT '0',
    task_id TEXT UNIQUE,
    token TEXT NOT NULL DEFAULT '',       -- a secret: whoever has it can watch the task
    accepted_at REAL,
    ended_at REAL,
    status TEXT NOT NULL DEFAULT '',
    pexit TEXT,
    cost_usd TEXT,                        -- as the service tells it, exact decimal text
    seconds TEXT,                         -- as the service tells it
    error TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (row, generation, number)
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX attempts_one_open ON attempts (row) WHERE open = 1;

CREATE TABLE outputs (
    row INTEGER NOT NULL REFERENCES rows(seq),
    generation INTEGER NOT NULL,
    number INTEGER NOT NULL,              -- index of the image, from 0
    state TEXT NOT NULL CHECK (state IN ('pending', 'held', 'saved', 'superseded')),
    url TEXT,
    name TEXT NOT NULL DEFAULT '',
    content_type TEXT NOT NULL DEFAULT '',
    declared_bytes INTEGER,
    path TEXT,                            -- relative to the run's folder, with '/'
    sha256 TEXT,
    size_bytes INTEGER,
    media_type TEXT,
    width_px INTEGER,
    height_px INTEGER,
    warning TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (row, generation, number)
) STRICT, WITHOUT ROWID;

-- Local input images already given to the service, by content.
CREATE TABLE uploads (
    sha256 TEXT PRIMARY KEY,
    url TEXT NOT NULL,
    uploaded_at REAL NOT NULL
) STRICT, WITHOUT ROWID;

-- Running counts over the rows that are in the manifest: counting a million rows takes seconds.
CREATE TABLE counts (
    state TEXT PRIMARY KEY,
    rows INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE totals (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    images INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0
) STRICT;
INSERT INTO totals (id) VALUES (1);
