-- Limits: what a restart must know to go on counting, and what the operator
-- sees of limits that refuse, or only would.

-- The limit that refused the call, or that would have if it were not a shadow
-- limit, in words; '' if there was none.
ALTER TABLE requests ADD COLUMN limit_hit TEXT NOT NULL DEFAULT '';

-- Limits go by the model asked for, which is not always the one that answers:
-- gpt-4o is answered by gpt-4o-2024-08-06. asked is '' where names are not kept
-- apart. would_refuse are the calls that a shadow limit would have refused.
CREATE TABLE sums (
	grain            TEXT    NOT NULL CHECK (grain = 'hour' OR grain = 'day' OR grain = 'token'),
	project          INTEGER NOT NULL,
	token            INTEGER NOT NULL,
	at               INTEGER NOT NULL,
	model            TEXT    NOT NULL,
	endpoint         TEXT    NOT NULL,
	outcome          TEXT    NOT NULL,
	asked            TEXT    NOT NULL DEFAULT '',
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
	PRIMARY KEY (grain, project, token, at, model, endpoint, outcome, asked)
) STRICT, WITHOUT ROWID;
INSERT INTO sums
	SELECT grain, project, token, at, model, endpoint, outcome, CASE grain WHEN 'token' THEN '' ELSE model END,
		calls, input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost, unpriced_calls, estimated_calls, 0, total_us
	FROM usage_sums;
DROP TABLE usage_sums;
ALTER TABLE sums RENAME TO usage_sums;
