-- Finds the first token of a project that is not revoked, however many are.
CREATE INDEX tokens_project_unrevoked ON tokens (project, seq) WHERE revoked_at IS NULL;
