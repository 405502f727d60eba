-- Answers that the response cache keeps, of projects whose policy asks for it. Each is sealed with a key of its own,
-- and bound to its project and its cache key: moved to another row, it does not open.
CREATE TABLE cache (
	id         INTEGER PRIMARY KEY, -- the first 8 bytes of the cache key
	project    INTEGER NOT NULL,
	token      INTEGER NOT NULL, -- 0: the tokens of the project share it
	model      TEXT    NOT NULL, -- that answered
	stored_at  INTEGER NOT NULL,
	expires_at INTEGER NOT NULL,
	used_at    INTEGER NOT NULL, -- about: uses of one minute are recorded once
	size       INTEGER NOT NULL, -- bytes that count in MAX_CACHE_BYTES
	answer     BLOB    NOT NULL
) STRICT;
CREATE INDEX cache_project ON cache (project, token, size);
CREATE INDEX cache_expires ON cache (expires_at);
CREATE INDEX cache_used ON cache (used_at);

-- What calls that were answered from the cache (requests.cache is 'hit') would have cost, and how much longer they
-- would have taken.
ALTER TABLE requests ADD COLUMN saved INTEGER NOT NULL DEFAULT 0; -- nano-dollars
ALTER TABLE requests ADD COLUMN saved_us INTEGER NOT NULL DEFAULT 0;
ALTER TABLE usage_sums ADD COLUMN cache_hits INTEGER NOT NULL DEFAULT 0;
ALTER TABLE usage_sums ADD COLUMN saved INTEGER NOT NULL DEFAULT 0; -- nano-dollars
ALTER TABLE usage_sums ADD COLUMN saved_us INTEGER NOT NULL DEFAULT 0;

DROP VIEW running;
CREATE VIEW running AS
	SELECT b.batch AS batch, c.value ->> 0 AS id, (c.value ->> 0) >> 21 AS started_at, c.value ->> 1 AS project, c.value ->> 2 AS token,
		c.value ->> 3 AS upstream, c.value ->> 4 AS endpoint, c.value ->> 5 AS model, c.value ->> 6 AS stream,
		c.value ->> 7 AS address, 0 AS status, 'open' AS outcome, '' AS error_code, 'estimated' AS usage_source,
		c.value ->> 8 AS input_tokens, 0 AS cached_tokens, 0 AS cache_write_tokens, c.value ->> 9 AS output_tokens,
		0 AS reasoning_tokens, NULL AS cost, NULL AS first_byte_us, NULL AS total_us, 1 AS attempts, '' AS cache,
		'' AS limit_hit, '' AS attempt_log, 0 AS saved, 0 AS saved_us
	FROM begun b, json_each(b.calls) c
	WHERE NOT EXISTS (SELECT 1 FROM requests r WHERE r.id = c.value ->> 0);
