-- What the pages that list tokens walk along, so that a page of a million takes
-- no longer than one of ten.

-- When a token ends by itself; a time that never comes for one that does not.
ALTER TABLE tokens ADD COLUMN ends_at INTEGER GENERATED ALWAYS AS (coalesce(expires_at, 9000000000000000)) VIRTUAL;
CREATE INDEX tokens_ends ON tokens (ends_at, seq) WHERE revoked_at IS NULL;
CREATE INDEX tokens_project_ends ON tokens (project, ends_at, seq) WHERE revoked_at IS NULL;
CREATE INDEX tokens_revoked ON tokens (revoked_at, seq) WHERE revoked_at IS NOT NULL;
CREATE INDEX tokens_unused ON tokens (seq) WHERE last_used_at IS NULL;
