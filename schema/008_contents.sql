-- What calls of projects that asked for it said and were answered: the first
-- bytes of each body, sealed with a key of this database's own, which is sealed
-- with the encryption key in settings. A call has a row only while it is kept.
CREATE TABLE contents (
	id            INTEGER PRIMARY KEY, -- the call's, in requests
	project       INTEGER NOT NULL,
	until         INTEGER NOT NULL, -- gone from then on
	request       BLOB    NOT NULL,
	request_bytes INTEGER NOT NULL, -- of the whole, of which only the first may be kept
	answer        BLOB    NOT NULL,
	answer_bytes  INTEGER NOT NULL
) STRICT;
CREATE INDEX contents_until ON contents (until);
CREATE INDEX contents_project ON contents (project, id);
