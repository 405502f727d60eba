-- Who is signed in to /admin. The browser holds a random id; here is its SHA-256.
CREATE TABLE sessions (
	hash       BLOB    PRIMARY KEY CHECK (length(hash) = 32),
	key        TEXT    NOT NULL, -- management_keys.id, or 'env' for MANAGEMENT_TOKEN
	proof      BLOB    NOT NULL, -- of MANAGEMENT_TOKEN: SHA-256 of the session's id and the token; else empty
	address    TEXT    NOT NULL, -- from where it was begun
	created_at INTEGER NOT NULL,
	seen_at    INTEGER NOT NULL  -- of late: not every page is written down
) STRICT, WITHOUT ROWID;
CREATE INDEX sessions_key ON sessions (key, created_at);
