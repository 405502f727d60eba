-- Calls that are running. A call is noted here before the first byte of its
-- answer leaves, and gets its row in requests, whole, when it has ended: rows of
-- requests are never changed. Calls that begin together are one row here, for a
-- row is what a write costs. It goes when the last of its calls has ended; until
-- then it also names those that have.
CREATE TABLE begun (
	batch INTEGER PRIMARY KEY, -- the least id of its calls
	-- JSON, a list of [id, project, token, upstream, endpoint, model asked for,
	-- stream, address, input tokens, output tokens]; the tokens are estimates
	calls TEXT NOT NULL
) STRICT;

-- The calls that are running, in the form of requests: what becomes of them if
-- the program dies now is for the next start to say (outcome lost).
CREATE VIEW running AS
	SELECT b.batch AS batch, c.value ->> 0 AS id, (c.value ->> 0) >> 21 AS started_at, c.value ->> 1 AS project, c.value ->> 2 AS token,
		c.value ->> 3 AS upstream, c.value ->> 4 AS endpoint, c.value ->> 5 AS model, c.value ->> 6 AS stream,
		c.value ->> 7 AS address, 0 AS status, 'open' AS outcome, '' AS error_code, 'estimated' AS usage_source,
		c.value ->> 8 AS input_tokens, 0 AS cached_tokens, 0 AS cache_write_tokens, c.value ->> 9 AS output_tokens,
		0 AS reasoning_tokens, NULL AS cost, NULL AS first_byte_us, NULL AS total_us, 1 AS attempts, '' AS cache,
		'' AS limit_hit, '' AS attempt_log
	FROM begun b, json_each(b.calls) c
	WHERE NOT EXISTS (SELECT 1 FROM requests r WHERE r.id = c.value ->> 0);

-- What a program of an earlier version that died has left open in requests, from
-- the id on that it noted. Those calls are counted in their tokens; from now on a
-- call is when it has ended.
INSERT INTO begun (batch, calls)
	SELECT id, json_array(json_array(id, project, token, upstream, endpoint, model, stream, address, input_tokens, output_tokens))
	FROM requests WHERE id >= coalesce((SELECT CAST(value AS INTEGER) FROM settings WHERE name = 'ledger_open_from'), 0) AND outcome = 'open';
UPDATE tokens SET request_count = request_count - n
	FROM (SELECT calls ->> '$[0][2]' AS token, count(*) AS n FROM begun GROUP BY 1) AS open WHERE tokens.seq = open.token;
DELETE FROM requests WHERE id IN (SELECT batch FROM begun);
DELETE FROM settings WHERE name = 'ledger_open_from';
