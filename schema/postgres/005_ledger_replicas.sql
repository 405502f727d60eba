-- The replica of each running call: its pending records are recovered when it is closed.
CREATE OR REPLACE VIEW running AS
	SELECT b.batch AS batch, (c.value ->> 0)::bigint AS id, (c.value ->> 0)::bigint >> 21 AS started_at,
		(c.value ->> 1)::bigint AS project, (c.value ->> 2)::bigint AS token, (c.value ->> 3)::bigint AS upstream,
		c.value ->> 4 AS endpoint, c.value ->> 5 AS model, c.value ->> 6 = '1' AS stream, c.value ->> 7 AS address,
		0::bigint AS status, 'open' AS outcome, '' AS error_code, 'estimated' AS usage_source,
		(c.value ->> 8)::bigint AS input_tokens, 0::bigint AS cached_tokens, 0::bigint AS cache_write_tokens,
		(c.value ->> 9)::bigint AS output_tokens, 0::bigint AS reasoning_tokens, NULL::bigint AS cost,
		NULL::bigint AS first_byte_us, NULL::bigint AS total_us, 1::bigint AS attempts, '' AS cache, '' AS limit_hit,
		'' AS attempt_log, 0::bigint AS saved, 0::bigint AS saved_us, '' AS details, 0::bigint AS price,
		coalesce(c.value ->> 10, '') AS session, coalesce(c.value ->> 11, '') AS end_user,
		coalesce(c.value ->> 12, '') AS tags, '' AS routed_by, 0::bigint AS client_retry,
		0::bigint AS idempotency_hash, b.replica AS replica
	FROM begun b, json_each(b.calls) c
	WHERE NOT EXISTS (SELECT 1 FROM requests r WHERE r.id = (c.value ->> 0)::bigint);
CREATE INDEX begun_replica ON begun (replica, batch);
