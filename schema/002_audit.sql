-- The audit trail: who did what, from where, and what it changed. Rows are
-- added, in the transaction of the change that they tell of, and never changed
-- or removed. Each is bound to the one before it by a MAC (audit.go), so that
-- who goes around these triggers is found out. The key of the MAC is in
-- settings as audit_key, sealed with the encryption key; audit_head says which
-- row is the last, with a MAC of its own.
CREATE TABLE audit (
	seq        INTEGER PRIMARY KEY, -- 1, 2, 3 … without a gap
	at         INTEGER NOT NULL,
	actor      TEXT    NOT NULL, -- a management key's id, env, system, or '' for who is not known
	role       TEXT    NOT NULL, -- the actor's at that time; '' if it had none
	address    TEXT    NOT NULL, -- '' for what the program did by itself
	request_id TEXT    NOT NULL,
	action     TEXT    NOT NULL, -- token.create
	object     TEXT    NOT NULL, -- the id of what it was done to
	detail     TEXT    NOT NULL, -- JSON; of a change, field: [before, after]. Never a secret
	prev       BLOB    NOT NULL CHECK (length(prev) = 32), -- mac of the row before
	mac        BLOB    NOT NULL CHECK (length(mac) = 32)
) STRICT;
CREATE INDEX audit_at ON audit (at);
CREATE INDEX audit_actor ON audit (actor, at);
CREATE INDEX audit_action ON audit (action, at);
CREATE INDEX audit_object ON audit (object, at);

CREATE TRIGGER audit_never_changed BEFORE UPDATE ON audit BEGIN
	SELECT RAISE(ABORT, 'the audit trail is never changed');
END;
CREATE TRIGGER audit_never_removed BEFORE DELETE ON audit BEGIN
	SELECT RAISE(ABORT, 'nothing is removed from the audit trail');
END;
-- Also keeps INSERT OR REPLACE from replacing a row, for which SQLite fires no
-- trigger of deletion.
CREATE TRIGGER audit_at_the_end BEFORE INSERT ON audit
WHEN NEW.seq <= (SELECT max(seq) FROM audit) BEGIN
	SELECT RAISE(ABORT, 'the audit trail grows at its end only');
END;
