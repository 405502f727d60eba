-- What each value of an attribute has used of a limit with for_each, such as each end user, in one window. Written in
-- the transaction of the calls' rows; a row is deleted when its window has ended.
CREATE TABLE limit_values (
	project      INTEGER NOT NULL,
	token        INTEGER NOT NULL, -- whose limit it is; 0: the project's
	rule         TEXT    NOT NULL, -- what the limit counts: JSON, as ratelimit_values.go writes it
	value        TEXT    NOT NULL, -- '' for calls without the attribute
	window_start INTEGER NOT NULL,
	window_end   INTEGER NOT NULL,
	used         INTEGER NOT NULL, -- requests, tokens or nano-dollars
	PRIMARY KEY (project, token, rule, value, window_start)
) STRICT, WITHOUT ROWID;
CREATE INDEX limit_values_end ON limit_values (window_end);
