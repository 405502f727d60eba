-- Projects beside its own that an upstream serves.
CREATE TABLE upstream_shares (
	upstream INTEGER NOT NULL,
	project  INTEGER NOT NULL,
	PRIMARY KEY (upstream, project)
) STRICT, WITHOUT ROWID;
CREATE INDEX upstream_shares_project ON upstream_shares (project, upstream);
