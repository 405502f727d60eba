-- What admins say about routing; both are JSON, see routing.go.
ALTER TABLE projects ADD COLUMN routing TEXT NOT NULL DEFAULT '{}';
ALTER TABLE upstreams ADD COLUMN settings TEXT NOT NULL DEFAULT '{}'; -- its own limits and patience, a note
