-- What calls used beside plain tokens, what their costs were made of, and prices of more kinds.

-- Kinds of usage that most calls do not have, and the conditions of the call, as JSON (see usageDetails in billing.go);
-- '' for none. price is the price that held when the call began, in billed_prices; 0 if there was none, or the call is
-- from before this version.
ALTER TABLE requests ADD COLUMN details TEXT NOT NULL DEFAULT '';
ALTER TABLE requests ADD COLUMN price INTEGER NOT NULL DEFAULT 0;

-- Each price that the cost of a call was made of. Rows are never changed.
CREATE TABLE billed_prices (
	id    INTEGER PRIMARY KEY, -- a hash of the price
	price TEXT    NOT NULL     -- JSON
) STRICT;

-- The columns of requests.
DROP VIEW running;
CREATE VIEW running AS
	SELECT b.batch AS batch, c.value ->> 0 AS id, (c.value ->> 0) >> 21 AS started_at, c.value ->> 1 AS project, c.value ->> 2 AS token,
		c.value ->> 3 AS upstream, c.value ->> 4 AS endpoint, c.value ->> 5 AS model, c.value ->> 6 AS stream,
		c.value ->> 7 AS address, 0 AS status, 'open' AS outcome, '' AS error_code, 'estimated' AS usage_source,
		c.value ->> 8 AS input_tokens, 0 AS cached_tokens, 0 AS cache_write_tokens, c.value ->> 9 AS output_tokens,
		0 AS reasoning_tokens, NULL AS cost, NULL AS first_byte_us, NULL AS total_us, 1 AS attempts, '' AS cache,
		'' AS limit_hit, '' AS attempt_log, 0 AS saved, 0 AS saved_us, '' AS details, 0 AS price
	FROM begun b, json_each(b.calls) c
	WHERE NOT EXISTS (SELECT 1 FROM requests r WHERE r.id = c.value ->> 0);

-- Sums are kept apart by service tier, '' being the standard one. prompt_saved is what input that the providers had
-- cached would have cost more at the price of other input, in nano-dollars.
CREATE TABLE sums (
	grain            TEXT    NOT NULL CHECK (grain = 'hour' OR grain = 'day' OR grain = 'token'),
	project          INTEGER NOT NULL,
	token            INTEGER NOT NULL,
	at               INTEGER NOT NULL,
	model            TEXT    NOT NULL,
	endpoint         TEXT    NOT NULL,
	outcome          TEXT    NOT NULL,
	asked            TEXT    NOT NULL DEFAULT '',
	service_tier     TEXT    NOT NULL DEFAULT '',
	calls            INTEGER NOT NULL,
	input_tokens     INTEGER NOT NULL,
	cached_tokens    INTEGER NOT NULL,
	output_tokens    INTEGER NOT NULL,
	reasoning_tokens INTEGER NOT NULL,
	cost             INTEGER NOT NULL,
	unpriced_calls   INTEGER NOT NULL,
	estimated_calls  INTEGER NOT NULL,
	would_refuse     INTEGER NOT NULL DEFAULT 0,
	total_us         INTEGER NOT NULL,
	cache_hits       INTEGER NOT NULL DEFAULT 0,
	saved            INTEGER NOT NULL DEFAULT 0,
	saved_us         INTEGER NOT NULL DEFAULT 0,
	prompt_saved     INTEGER NOT NULL DEFAULT 0,
	PRIMARY KEY (grain, project, token, at, model, endpoint, outcome, asked, service_tier)
) STRICT, WITHOUT ROWID;
INSERT INTO sums
	SELECT grain, project, token, at, model, endpoint, outcome, asked, '', calls, input_tokens, cached_tokens, output_tokens,
		reasoning_tokens, cost, unpriced_calls, estimated_calls, would_refuse, total_us, cache_hits, saved, saved_us, 0
	FROM usage_sums;
DROP TABLE usage_sums;
ALTER TABLE sums RENAME TO usage_sums;

-- The operator's prices have all kinds, as JSON, and may begin to hold in the future.
CREATE TABLE own_prices (
	seq        INTEGER PRIMARY KEY,
	id         TEXT    NOT NULL UNIQUE,
	match      TEXT    NOT NULL, -- a model name, or a pattern with *
	valid_from INTEGER NOT NULL, -- 0: always
	price      TEXT    NOT NULL, -- JSON, in the form of prices.json
	updated_at INTEGER NOT NULL,
	UNIQUE (match, valid_from)
) STRICT;
INSERT INTO own_prices (seq, id, match, valid_from, price, updated_at)
	SELECT seq, id, match, 0, '{' || ltrim(
		iif(input IS NULL, '', printf(',"input":%d.%06d', input / 1000000, input % 1000000)) ||
		iif(cached_input IS NULL, '', printf(',"cached_input":%d.%06d', cached_input / 1000000, cached_input % 1000000)) ||
		iif(cache_write IS NULL, '', printf(',"cache_write":%d.%06d', cache_write / 1000000, cache_write % 1000000)) ||
		iif(audio_input IS NULL, '', printf(',"audio_input":%d.%06d', audio_input / 1000000, audio_input % 1000000)) ||
		iif(output IS NULL, '', printf(',"output":%d.%06d', output / 1000000, output % 1000000)) ||
		iif(audio_output IS NULL, '', printf(',"audio_output":%d.%06d', audio_output / 1000000, audio_output % 1000000)), ',') || '}',
		updated_at
	FROM prices;
DROP TABLE prices;
ALTER TABLE own_prices RENAME TO prices;

-- What a project pays of the prices, in ten-thousandths: 8000 for a discount of 20 percent.
ALTER TABLE projects ADD COLUMN cost_multiplier INTEGER NOT NULL DEFAULT 10000 CHECK (cost_multiplier > 0);
