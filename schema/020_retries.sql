-- How a call's upstream was chosen among several that share calls: 'session' or 'prompt' if the call was kept together
-- with others of its session, or whose prompts begin alike; '' if it was not.
ALTER TABLE requests ADD COLUMN routed_by TEXT NOT NULL DEFAULT '';

-- What clients say about calls that they send again: how often they have sent it before (x-stainless-retry-count), and a
-- keyed hash of the token and the Idempotency-Key, 0 for none.
ALTER TABLE requests ADD COLUMN client_retry INTEGER NOT NULL DEFAULT 0;
ALTER TABLE requests ADD COLUMN idempotency_hash INTEGER NOT NULL DEFAULT 0;

-- Calls that their client had sent before.
ALTER TABLE usage_sums ADD COLUMN client_retries INTEGER NOT NULL DEFAULT 0;
ALTER TABLE attribution_sums ADD COLUMN client_retries INTEGER NOT NULL DEFAULT 0;

DROP VIEW running;
CREATE VIEW running AS
	SELECT b.batch AS batch, c.value ->> 0 AS id, (c.value ->> 0) >> 21 AS started_at, c.value ->> 1 AS project, c.value ->> 2 AS token,
		c.value ->> 3 AS upstream, c.value ->> 4 AS endpoint, c.value ->> 5 AS model, c.value ->> 6 AS stream,
		c.value ->> 7 AS address, 0 AS status, 'open' AS outcome, '' AS error_code, 'estimated' AS usage_source,
		c.value ->> 8 AS input_tokens, 0 AS cached_tokens, 0 AS cache_write_tokens, c.value ->> 9 AS output_tokens,
		0 AS reasoning_tokens, NULL AS cost, NULL AS first_byte_us, NULL AS total_us, 1 AS attempts, '' AS cache,
		'' AS limit_hit, '' AS attempt_log, 0 AS saved, 0 AS saved_us, '' AS details, 0 AS price,
		coalesce(c.value ->> 10, '') AS session, coalesce(c.value ->> 11, '') AS end_user, coalesce(c.value ->> 12, '') AS tags,
		'' AS routed_by, 0 AS client_retry, 0 AS idempotency_hash
	FROM begun b, json_each(b.calls) c
	WHERE NOT EXISTS (SELECT 1 FROM requests r WHERE r.id = c.value ->> 0);
