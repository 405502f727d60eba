-- Latency is counted in rows instead of the 44 columns of project_hours: a row for each bucket in which an hour of a
-- project, or with project 0 of all of them, has calls. Only calls that succeeded count.
CREATE TABLE project_latency (
	project     INTEGER NOT NULL,
	at          INTEGER NOT NULL, -- start of the hour, by the call's started_at
	bucket      INTEGER NOT NULL, -- its longest time in milliseconds; 0: the last bucket, which has no longest
	first_bytes INTEGER NOT NULL, -- calls whose first answer byte took a time in this bucket
	answers     INTEGER NOT NULL, -- calls whose whole answer did
	PRIMARY KEY (project, at, bucket)
) STRICT, WITHOUT ROWID;
INSERT INTO project_latency
SELECT * FROM (
	SELECT project, at, 10, f10 AS f, t10 AS t FROM project_hours UNION ALL
	SELECT project, at, 16, f16, t16 FROM project_hours UNION ALL
	SELECT project, at, 25, f25, t25 FROM project_hours UNION ALL
	SELECT project, at, 40, f40, t40 FROM project_hours UNION ALL
	SELECT project, at, 63, f63, t63 FROM project_hours UNION ALL
	SELECT project, at, 100, f100, t100 FROM project_hours UNION ALL
	SELECT project, at, 160, f160, t160 FROM project_hours UNION ALL
	SELECT project, at, 250, f250, t250 FROM project_hours UNION ALL
	SELECT project, at, 400, f400, t400 FROM project_hours UNION ALL
	SELECT project, at, 630, f630, t630 FROM project_hours UNION ALL
	SELECT project, at, 1000, f1000, t1000 FROM project_hours UNION ALL
	SELECT project, at, 1600, f1600, t1600 FROM project_hours UNION ALL
	SELECT project, at, 2500, f2500, t2500 FROM project_hours UNION ALL
	SELECT project, at, 4000, f4000, t4000 FROM project_hours UNION ALL
	SELECT project, at, 6300, f6300, t6300 FROM project_hours UNION ALL
	SELECT project, at, 10000, f10000, t10000 FROM project_hours UNION ALL
	SELECT project, at, 16000, f16000, t16000 FROM project_hours UNION ALL
	SELECT project, at, 25000, f25000, t25000 FROM project_hours UNION ALL
	SELECT project, at, 40000, f40000, t40000 FROM project_hours UNION ALL
	SELECT project, at, 63000, f63000, t63000 FROM project_hours UNION ALL
	SELECT project, at, 100000, f100000, t100000 FROM project_hours UNION ALL
	SELECT project, at, 0, f_more, t_more FROM project_hours)
WHERE f > 0 OR t > 0;

-- One copy of the table costs less than dropping 44 columns one by one.
CREATE TABLE hours (
	project         INTEGER NOT NULL,
	at              INTEGER NOT NULL,
	calls           INTEGER NOT NULL,
	input_tokens    INTEGER NOT NULL,
	output_tokens   INTEGER NOT NULL,
	cost            INTEGER NOT NULL,
	unpriced_calls  INTEGER NOT NULL,
	caller_errors   INTEGER NOT NULL,
	policy_errors   INTEGER NOT NULL,
	provider_errors INTEGER NOT NULL,
	proxy_errors    INTEGER NOT NULL,
	PRIMARY KEY (project, at)
) STRICT, WITHOUT ROWID;
INSERT INTO hours
SELECT project, at, calls, input_tokens, output_tokens, cost, unpriced_calls, caller_errors, policy_errors, provider_errors, proxy_errors
FROM project_hours;
DROP TABLE project_hours;
ALTER TABLE hours RENAME TO project_hours;
