-- For whom and for what calls were made, as their clients said: a session, an end user (by the project's policy its keyed
-- hash) and tags, a JSON object. '' for none.
ALTER TABLE requests ADD COLUMN session TEXT NOT NULL DEFAULT '';
ALTER TABLE requests ADD COLUMN end_user TEXT NOT NULL DEFAULT '';
ALTER TABLE requests ADD COLUMN tags TEXT NOT NULL DEFAULT '';
CREATE INDEX requests_session ON requests (session, id) WHERE session <> '';
CREATE INDEX requests_end_user ON requests (end_user, id) WHERE end_user <> '';

-- A record in begun may have three more values: session, end user and tags.
DROP VIEW running;
CREATE VIEW running AS
	SELECT b.batch AS batch, c.value ->> 0 AS id, (c.value ->> 0) >> 21 AS started_at, c.value ->> 1 AS project, c.value ->> 2 AS token,
		c.value ->> 3 AS upstream, c.value ->> 4 AS endpoint, c.value ->> 5 AS model, c.value ->> 6 AS stream,
		c.value ->> 7 AS address, 0 AS status, 'open' AS outcome, '' AS error_code, 'estimated' AS usage_source,
		c.value ->> 8 AS input_tokens, 0 AS cached_tokens, 0 AS cache_write_tokens, c.value ->> 9 AS output_tokens,
		0 AS reasoning_tokens, NULL AS cost, NULL AS first_byte_us, NULL AS total_us, 1 AS attempts, '' AS cache,
		'' AS limit_hit, '' AS attempt_log, 0 AS saved, 0 AS saved_us, '' AS details, 0 AS price,
		coalesce(c.value ->> 10, '') AS session, coalesce(c.value ->> 11, '') AS end_user, coalesce(c.value ->> 12, '') AS tags
	FROM begun b, json_each(b.calls) c
	WHERE NOT EXISTS (SELECT 1 FROM requests r WHERE r.id = c.value ->> 0);

-- Sums of what calls with an attribute used, by hour, in the transaction of their rows. attribute is session, end_user or
-- tag: and a key, value is a value of it. They are kept as long as calls, those of end users and tags at least 62 days.
CREATE TABLE attribution_sums (
	project          INTEGER NOT NULL,
	attribute        TEXT    NOT NULL,
	at               INTEGER NOT NULL, -- start of the hour, by the call's started_at
	value            TEXT    NOT NULL,
	token            INTEGER NOT NULL,
	model            TEXT    NOT NULL, -- like the next three, as in usage_sums
	endpoint         TEXT    NOT NULL,
	outcome          TEXT    NOT NULL,
	asked            TEXT    NOT NULL,
	calls            INTEGER NOT NULL,
	input_tokens     INTEGER NOT NULL,
	cached_tokens    INTEGER NOT NULL,
	output_tokens    INTEGER NOT NULL,
	reasoning_tokens INTEGER NOT NULL,
	cost             INTEGER NOT NULL,
	unpriced_calls   INTEGER NOT NULL,
	estimated_calls  INTEGER NOT NULL,
	would_refuse     INTEGER NOT NULL,
	total_us         INTEGER NOT NULL,
	cache_hits       INTEGER NOT NULL,
	saved            INTEGER NOT NULL,
	saved_us         INTEGER NOT NULL,
	prompt_saved     INTEGER NOT NULL,
	PRIMARY KEY (project, attribute, at, value, token, model, endpoint, outcome, asked)
) STRICT, WITHOUT ROWID;
