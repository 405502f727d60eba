-- What the answers in the results of batches have used. It counts when results are read, once, and belongs to the token
-- that made the batch, if that is known.

-- Batches, and files with their results. object is the host of the provider with the id of the batch or file. call is
-- the call that made the batch, 0 if that is not known; the columns after it are that call's.
CREATE TABLE batches (
	seq      INTEGER PRIMARY KEY,
	object   TEXT    NOT NULL UNIQUE,
	call     INTEGER NOT NULL,
	project  INTEGER NOT NULL,
	token    INTEGER NOT NULL,
	endpoint TEXT    NOT NULL,
	outcome  TEXT    NOT NULL
) STRICT;

-- What was counted of the results in an object, by the model that answered. Answers without a known price are counted
-- apart (priced = 0).
CREATE TABLE batch_usage (
	seq                INTEGER PRIMARY KEY,
	object             TEXT    NOT NULL,
	model              TEXT    NOT NULL,
	priced             INTEGER NOT NULL,
	lines              INTEGER NOT NULL,
	input_tokens       INTEGER NOT NULL,
	cached_tokens      INTEGER NOT NULL,
	cache_write_tokens INTEGER NOT NULL,
	output_tokens      INTEGER NOT NULL,
	reasoning_tokens   INTEGER NOT NULL,
	cost               INTEGER NOT NULL, -- nano-dollars, like the next
	prompt_saved       INTEGER NOT NULL,
	UNIQUE (object, model, priced)
) STRICT;

-- The row of a call shows the usage that became known after it: of its background response, or of its batch. details
-- and price are as in requests.
ALTER TABLE background ADD COLUMN details TEXT NOT NULL DEFAULT '';
ALTER TABLE background ADD COLUMN price INTEGER NOT NULL DEFAULT 0;
