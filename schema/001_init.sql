-- The schema, version 1. Never edited once released: a change is a new file.
--
-- Every _at is integer unix milliseconds, UTC. Money is integer nano-dollars.
-- seq is a table's own integer key, used inside the database only; id is the
-- random, prefixed name that the outside sees. Nothing that the ledger names
-- is ever deleted. version grows by one with every change of a row by an
-- admin: a PATCH that carries an older one is refused.

-- Facts about this database itself, such as the record that proves that an
-- encryption key is the right one.
CREATE TABLE settings (
	name  TEXT PRIMARY KEY,
	value TEXT NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE projects (
	seq        INTEGER PRIMARY KEY,
	id         TEXT    NOT NULL UNIQUE,
	name       TEXT    NOT NULL UNIQUE,
	is_active  INTEGER NOT NULL DEFAULT 1 CHECK (is_active IN (0, 1)),
	policy     TEXT    NOT NULL DEFAULT '{}', -- JSON, see policy.go
	version    INTEGER NOT NULL DEFAULT 1,
	created_at INTEGER NOT NULL,
	updated_at INTEGER NOT NULL,
	deleted_at INTEGER -- NULL while it exists; a deleted project's name is freed by a suffix
) STRICT;

-- Where a project's calls go. The provider's key is sealed (AES-256-GCM) and
-- bound to this row, its project and the host of its base_url: moved to another
-- row, or with another host in base_url, it does not open.
CREATE TABLE upstreams (
	seq          INTEGER PRIMARY KEY,
	id           TEXT    NOT NULL UNIQUE,
	project      INTEGER NOT NULL REFERENCES projects (seq),
	name         TEXT    NOT NULL,
	provider     TEXT    NOT NULL CHECK (provider IN ('openai', 'anthropic', 'azure', 'compatible')),
	base_url     TEXT    NOT NULL,
	sealed_key   BLOB    NOT NULL,
	key_hint     TEXT    NOT NULL, -- the last 4 characters, or '' of a short key
	organization TEXT    NOT NULL DEFAULT '', -- sent as OpenAI-Organization
	openai_project TEXT  NOT NULL DEFAULT '', -- sent as OpenAI-Project
	weight       INTEGER NOT NULL DEFAULT 1 CHECK (weight BETWEEN 0 AND 1000),
	priority     INTEGER NOT NULL DEFAULT 0,
	models       TEXT    NOT NULL DEFAULT '[]', -- JSON list of patterns; empty: every model
	rewrite      TEXT    NOT NULL DEFAULT '{}', -- JSON: model asked for -> model sent
	is_active    INTEGER NOT NULL DEFAULT 1 CHECK (is_active IN (0, 1)),
	version      INTEGER NOT NULL DEFAULT 1,
	created_at   INTEGER NOT NULL,
	updated_at   INTEGER NOT NULL,
	deleted_at   INTEGER
) STRICT;
CREATE INDEX upstreams_project ON upstreams (project, seq);

-- What clients present. The token itself is never stored. While a rotation
-- overlaps, the hash before is valid too, until old_hash_until.
CREATE TABLE tokens (
	seq            INTEGER PRIMARY KEY,
	id             TEXT    NOT NULL UNIQUE, -- tok_ and the token's public part
	project        INTEGER NOT NULL REFERENCES projects (seq),
	name           TEXT    NOT NULL,
	hash           BLOB    NOT NULL UNIQUE CHECK (length(hash) = 32), -- SHA-256
	old_hash       BLOB    UNIQUE CHECK (length(old_hash) = 32),
	old_hash_until INTEGER,
	expires_at     INTEGER, -- NULL: never; valid while now < expires_at
	idle_expiry    INTEGER, -- milliseconds without use after which it dies; NULL: never
	revoked_at     INTEGER, -- NULL while valid
	max_requests   INTEGER CHECK (max_requests >= 0), -- over its life; NULL: unlimited, 0: none
	request_count  INTEGER NOT NULL DEFAULT 0, -- changed only by x = x + ?, never by an admin
	policy         TEXT    NOT NULL DEFAULT '{}',
	version        INTEGER NOT NULL DEFAULT 1,
	last_used_at   INTEGER,
	created_at     INTEGER NOT NULL,
	updated_at     INTEGER NOT NULL
) STRICT;
CREATE INDEX tokens_project ON tokens (project, seq);
CREATE INDEX tokens_name ON tokens (name, seq);
CREATE INDEX tokens_project_name ON tokens (project, name, seq);

-- Keys for /manage and for signing in to /admin.
CREATE TABLE management_keys (
	seq          INTEGER PRIMARY KEY,
	id           TEXT    NOT NULL UNIQUE,
	name         TEXT    NOT NULL,
	hash         BLOB    NOT NULL UNIQUE CHECK (length(hash) = 32),
	role         TEXT    NOT NULL CHECK (role IN ('viewer', 'operator', 'admin')),
	expires_at   INTEGER,
	revoked_at   INTEGER,
	version      INTEGER NOT NULL DEFAULT 1,
	created_at   INTEGER NOT NULL,
	updated_at   INTEGER NOT NULL
) STRICT;

-- The ledger: one row for each call that was admitted, begun before its first
-- answer byte left and settled after the last. id is time-ordered (its upper
-- bits are started_at), so that a range of time is a range of ids, and is what
-- request ids are made from. project, token and upstream are seqs; there is no
-- REFERENCES because those rows are never deleted and this is the hot path.
CREATE TABLE requests (
	id               INTEGER PRIMARY KEY,
	started_at       INTEGER GENERATED ALWAYS AS (id >> 21) VIRTUAL,
	project          INTEGER NOT NULL,
	token            INTEGER NOT NULL,
	upstream         INTEGER NOT NULL, -- 0: none was reached
	endpoint         TEXT    NOT NULL, -- 'POST /v1/chat/completions'
	model            TEXT    NOT NULL, -- as the answer names it, else as asked for; '' unknown
	stream           INTEGER NOT NULL CHECK (stream IN (0, 1)),
	address          TEXT    NOT NULL, -- the client's
	status           INTEGER NOT NULL DEFAULT 0, -- HTTP status the client got; 0: none yet
	outcome          TEXT    NOT NULL, -- open, ok, refused, client_gone, truncated, upstream_error or lost
	error_code       TEXT    NOT NULL DEFAULT '', -- the code the client got, or why it was cut
	usage_source     TEXT    NOT NULL, -- exact, estimated or none
	input_tokens     INTEGER NOT NULL, -- includes the cached and cache_write ones
	cached_tokens    INTEGER NOT NULL DEFAULT 0,
	cache_write_tokens INTEGER NOT NULL DEFAULT 0,
	output_tokens    INTEGER NOT NULL, -- includes the reasoning ones
	reasoning_tokens INTEGER NOT NULL DEFAULT 0,
	cost             INTEGER, -- nano-dollars; NULL: the model's price is not known
	first_byte_us    INTEGER, -- to the first answer byte that left; NULL: none did
	total_us         INTEGER,
	attempts         INTEGER NOT NULL DEFAULT 1, -- calls made to providers
	cache            TEXT    NOT NULL DEFAULT '',
	-- Not IN (...): SQLite builds a table of the list for each row, on this hot path.
	CHECK (outcome = 'ok' OR outcome = 'open' OR outcome = 'client_gone' OR outcome = 'refused'
		OR outcome = 'upstream_error' OR outcome = 'truncated' OR outcome = 'lost'),
	CHECK (usage_source = 'exact' OR usage_source = 'estimated' OR usage_source = 'none')
) STRICT;
CREATE INDEX requests_project ON requests (project, id);
CREATE INDEX requests_token ON requests (token, id);

-- Sums of settled calls, kept in the same transaction that settles them, so
-- that they always agree with the ledger. token 0 stands for all tokens of the
-- project together; grain 'token' is a token's day over all models, endpoints
-- and outcomes, which are '' there. Pages and /manage/usage read this, never
-- raw rows. What is asked for of one project or token lies together in the
-- key's order, so that no second index has to be written.
CREATE TABLE usage_sums (
	grain            TEXT    NOT NULL CHECK (grain = 'hour' OR grain = 'day' OR grain = 'token'),
	project          INTEGER NOT NULL,
	token            INTEGER NOT NULL,
	at               INTEGER NOT NULL, -- start of the hour or day, by the call's started_at
	model            TEXT    NOT NULL,
	endpoint         TEXT    NOT NULL,
	outcome          TEXT    NOT NULL,
	calls            INTEGER NOT NULL,
	input_tokens     INTEGER NOT NULL,
	cached_tokens    INTEGER NOT NULL,
	output_tokens    INTEGER NOT NULL,
	reasoning_tokens INTEGER NOT NULL,
	cost             INTEGER NOT NULL, -- of the calls whose cost is known
	unpriced_calls   INTEGER NOT NULL, -- calls whose cost is not known
	estimated_calls  INTEGER NOT NULL, -- calls whose usage is an estimate
	total_us         INTEGER NOT NULL,
	PRIMARY KEY (grain, project, token, at, model, endpoint, outcome)
) STRICT, WITHOUT ROWID;

-- Prices that the operator sets over the list prices that come with the
-- program: micro-dollars per million tokens; NULL: not set for that kind.
CREATE TABLE prices (
	seq          INTEGER PRIMARY KEY,
	id           TEXT    NOT NULL UNIQUE,
	match        TEXT    NOT NULL UNIQUE, -- a model name, or a pattern with *
	input        INTEGER,
	cached_input INTEGER,
	cache_write  INTEGER,
	output       INTEGER,
	audio_input  INTEGER,
	audio_output INTEGER,
	updated_at   INTEGER NOT NULL
) STRICT;
