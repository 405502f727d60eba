-- What each value of an attribute has used of a limit with for_each; see schema/021_limit_values.sql.
CREATE TABLE limit_values (
	project      bigint NOT NULL,
	token        bigint NOT NULL,
	rule         text COLLATE "C" NOT NULL,
	value        text COLLATE "C" NOT NULL,
	window_start bigint NOT NULL,
	window_end   bigint NOT NULL,
	used         bigint NOT NULL,
	PRIMARY KEY (project, token, rule, value, window_start)
) WITH (fillfactor = 70);
CREATE INDEX limit_values_end ON limit_values (window_end);
