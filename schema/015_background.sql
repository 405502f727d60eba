-- Responses that a provider makes in the background, of whose usage the answer to the call that made one says nothing
-- yet. A later answer does, to whatever token asks. The row of the call has no usage and does not change: what it used
-- is here, once known.
CREATE TABLE background (
	call            INTEGER PRIMARY KEY, -- requests.id of the call that made the response
	project         INTEGER NOT NULL,
	token           INTEGER NOT NULL,
	upstream        INTEGER NOT NULL,
	response        TEXT    NOT NULL, -- its id at the provider
	endpoint        TEXT    NOT NULL,
	outcome         TEXT    NOT NULL, -- of the call, as in usage_sums
	model           TEXT    NOT NULL,
	model_tracked   INTEGER NOT NULL, -- whether the name is that in usage_sums
	asked           TEXT    NOT NULL,
	asked_tracked   INTEGER NOT NULL,
	reserved_input  INTEGER NOT NULL, -- tokens; they count if the usage never becomes known
	reserved_output INTEGER NOT NULL,
	reserved_cost   INTEGER NOT NULL, -- nano-dollars; limits count the reserved amounts until the usage is known
	usage_source    TEXT    NOT NULL DEFAULT '', -- '' until the usage is known
	input_tokens    INTEGER NOT NULL DEFAULT 0,
	cached_tokens   INTEGER NOT NULL DEFAULT 0,
	cache_write_tokens INTEGER NOT NULL DEFAULT 0,
	output_tokens   INTEGER NOT NULL DEFAULT 0,
	reasoning_tokens INTEGER NOT NULL DEFAULT 0,
	cost            INTEGER
) STRICT;
CREATE UNIQUE INDEX background_response ON background (response, project);
CREATE INDEX background_pending ON background (call) WHERE usage_source = '';
