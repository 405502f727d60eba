-- What the dashboard shows of an hour of a project, or, with project 0, of all of
-- them: whose fault errors were and how long calls took. Written in the same
-- transaction as usage_sums. Latency is counted in buckets, of calls that went
-- well alone: f250 counts first answer bytes after more than 160 and at most
-- 250 ms, t250 whole answers, f_more and t_more all above. (latency.go has
-- the bounds.)
CREATE TABLE project_hours (
	project         INTEGER NOT NULL,
	at              INTEGER NOT NULL, -- start of the hour, by the call's started_at
	calls           INTEGER NOT NULL, -- refused ones among them
	input_tokens    INTEGER NOT NULL,
	output_tokens   INTEGER NOT NULL,
	cost            INTEGER NOT NULL, -- of the calls whose cost is known
	unpriced_calls  INTEGER NOT NULL,
	caller_errors   INTEGER NOT NULL, -- see errorclass.go
	policy_errors   INTEGER NOT NULL,
	provider_errors INTEGER NOT NULL,
	proxy_errors    INTEGER NOT NULL,
	f10 INTEGER NOT NULL, f16 INTEGER NOT NULL, f25 INTEGER NOT NULL, f40 INTEGER NOT NULL, f63 INTEGER NOT NULL,
	f100 INTEGER NOT NULL, f160 INTEGER NOT NULL, f250 INTEGER NOT NULL, f400 INTEGER NOT NULL, f630 INTEGER NOT NULL,
	f1000 INTEGER NOT NULL, f1600 INTEGER NOT NULL, f2500 INTEGER NOT NULL, f4000 INTEGER NOT NULL,
	f6300 INTEGER NOT NULL, f10000 INTEGER NOT NULL, f16000 INTEGER NOT NULL, f25000 INTEGER NOT NULL,
	f40000 INTEGER NOT NULL, f63000 INTEGER NOT NULL, f100000 INTEGER NOT NULL, f_more INTEGER NOT NULL,
	t10 INTEGER NOT NULL, t16 INTEGER NOT NULL, t25 INTEGER NOT NULL, t40 INTEGER NOT NULL, t63 INTEGER NOT NULL,
	t100 INTEGER NOT NULL, t160 INTEGER NOT NULL, t250 INTEGER NOT NULL, t400 INTEGER NOT NULL, t630 INTEGER NOT NULL,
	t1000 INTEGER NOT NULL, t1600 INTEGER NOT NULL, t2500 INTEGER NOT NULL, t4000 INTEGER NOT NULL,
	t6300 INTEGER NOT NULL, t10000 INTEGER NOT NULL, t16000 INTEGER NOT NULL, t25000 INTEGER NOT NULL,
	t40000 INTEGER NOT NULL, t63000 INTEGER NOT NULL, t100000 INTEGER NOT NULL, t_more INTEGER NOT NULL,
	PRIMARY KEY (project, at)
) STRICT, WITHOUT ROWID;

-- usage_sums has sums of all projects together too, as project 0, of grain hour
-- and day; and those of a project's day over all tokens, models, endpoints and
-- outcomes, as grain 'token' with token 0. The model asked for is not kept apart there.
INSERT INTO usage_sums (grain, project, token, at, model, endpoint, outcome,
	calls, input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost, unpriced_calls, estimated_calls, would_refuse, total_us)
SELECT grain, 0, 0, at, model, endpoint, outcome, sum(calls), sum(input_tokens), sum(cached_tokens), sum(output_tokens),
	sum(reasoning_tokens), sum(cost), sum(unpriced_calls), sum(estimated_calls), sum(would_refuse), sum(total_us)
FROM usage_sums WHERE grain IN ('hour', 'day') AND token = 0 GROUP BY grain, at, model, endpoint, outcome;

INSERT INTO usage_sums (grain, project, token, at, model, endpoint, outcome,
	calls, input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost, unpriced_calls, estimated_calls, would_refuse, total_us)
SELECT 'token', project, 0, at, '', '', '', sum(calls), sum(input_tokens), sum(cached_tokens), sum(output_tokens),
	sum(reasoning_tokens), sum(cost), sum(unpriced_calls), sum(estimated_calls), sum(would_refuse), sum(total_us)
FROM usage_sums WHERE grain = 'day' AND token = 0 AND project <> 0 GROUP BY project, at;

-- Calls from before this version: their latency is not known in buckets, and
-- whose fault an error was is told by the outcome alone.
INSERT INTO project_hours
SELECT project, at, sum(calls), sum(input_tokens), sum(output_tokens), sum(cost), sum(unpriced_calls),
	sum(iif(outcome = 'client_gone', calls, 0)), sum(iif(outcome = 'refused', calls, 0)),
	sum(iif(outcome IN ('upstream_error', 'truncated'), calls, 0)), sum(iif(outcome = 'lost', calls, 0)),
	0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
	0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
FROM usage_sums WHERE grain = 'hour' AND token = 0 GROUP BY project, at;

-- Tokens that are about to expire.
CREATE INDEX tokens_expiring ON tokens (expires_at) WHERE revoked_at IS NULL AND expires_at IS NOT NULL;
