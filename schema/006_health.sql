-- What is known of provider keys that are not well, so that a restart does not
-- send calls into trouble that was known before. A key without a row is well.
CREATE TABLE upstream_health (
	upstream   INTEGER PRIMARY KEY, -- its seq
	state      TEXT    NOT NULL, -- cooling, open, exhausted or quarantined
	until      INTEGER NOT NULL, -- left out before; probed after
	strikes    INTEGER NOT NULL, -- times it was left out since its last good answer
	reason     TEXT    NOT NULL,
	changed_at INTEGER NOT NULL
) STRICT;

-- A call that was sent more than once says here where, and what came of each:
-- JSON, '' for most.
ALTER TABLE requests ADD COLUMN attempt_log TEXT NOT NULL DEFAULT '';
