-- Each replica adds to sums of its own, by its slot, so that no one waits for another. Readers add them up. Those of
-- periods that are over are added to the rows of slot 0.
CREATE FUNCTION saturate(n numeric) RETURNS bigint LANGUAGE sql IMMUTABLE PARALLEL SAFE
	AS 'SELECT least(greatest(n, -9223372036854775808), 9223372036854775807)::bigint';

ALTER TABLE usage_sums ADD COLUMN slot smallint NOT NULL DEFAULT 0, DROP CONSTRAINT usage_sums_pkey,
	ADD PRIMARY KEY (grain, project, token, at, model, endpoint, outcome, asked, service_tier, slot);
CREATE INDEX usage_sums_to_merge ON usage_sums (grain, at) WHERE slot > 0;

ALTER TABLE project_hours ADD COLUMN slot smallint NOT NULL DEFAULT 0, DROP CONSTRAINT project_hours_pkey,
	ADD PRIMARY KEY (project, at, slot);
CREATE INDEX project_hours_to_merge ON project_hours (at) WHERE slot > 0;

ALTER TABLE project_latency ADD COLUMN slot smallint NOT NULL DEFAULT 0, DROP CONSTRAINT project_latency_pkey,
	ADD PRIMARY KEY (project, at, bucket, slot);
CREATE INDEX project_latency_to_merge ON project_latency (at) WHERE slot > 0;

ALTER TABLE attribution_sums ADD COLUMN slot smallint NOT NULL DEFAULT 0, DROP CONSTRAINT attribution_sums_pkey,
	ADD PRIMARY KEY (project, attribute, at, value, token, model, endpoint, outcome, asked, slot);
CREATE INDEX attribution_sums_to_merge ON attribution_sums (at) WHERE slot > 0;

ALTER TABLE limit_values ADD COLUMN slot smallint NOT NULL DEFAULT 0, DROP CONSTRAINT limit_values_pkey,
	ADD PRIMARY KEY (project, token, rule, value, window_start, slot);
