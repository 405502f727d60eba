-- Webhooks: where notifications are sent. The URL is sealed too, because it is often a credential itself.
CREATE TABLE webhooks (
	seq              INTEGER PRIMARY KEY,
	id               TEXT    NOT NULL UNIQUE,
	name             TEXT    NOT NULL,
	format           TEXT    NOT NULL,
	events           TEXT    NOT NULL, -- JSON list of types; []: all
	error_percent    INTEGER NOT NULL, -- of a project's calls in an hour
	host             TEXT    NOT NULL, -- the URL's, to show
	sealed_url       BLOB    NOT NULL,
	sealed_secret    BLOB    NOT NULL,
	old_secret       BLOB,             -- sealed; NULL: none
	old_secret_until INTEGER,
	is_active        INTEGER NOT NULL CHECK (is_active IN (0, 1)),
	version          INTEGER NOT NULL DEFAULT 1,
	created_at       INTEGER NOT NULL,
	updated_at       INTEGER NOT NULL
) STRICT;

CREATE TABLE notifications (
	seq  INTEGER PRIMARY KEY,
	id   TEXT    NOT NULL UNIQUE,
	type TEXT    NOT NULL,
	at   INTEGER NOT NULL,
	data TEXT    NOT NULL -- JSON object
) STRICT;
CREATE INDEX notifications_at ON notifications (at);

-- What has been noticed: of several processes, the one that inserts the key decides.
CREATE TABLE notification_marks (
	key   TEXT    PRIMARY KEY,
	until INTEGER NOT NULL -- when it may be deleted
) STRICT, WITHOUT ROWID;
CREATE INDEX notification_marks_until ON notification_marks (until);

-- What is sent to each webhook.
CREATE TABLE deliveries (
	seq          INTEGER PRIMARY KEY,
	id           TEXT    NOT NULL UNIQUE,
	webhook      INTEGER NOT NULL,
	notification INTEGER NOT NULL,
	state        TEXT    NOT NULL, -- pending, delivered or failed
	attempts     INTEGER NOT NULL,
	next_at      INTEGER NOT NULL,
	leased_until INTEGER NOT NULL, -- a process is sending it until then
	give_up_at   INTEGER NOT NULL,
	status       INTEGER NOT NULL, -- of the last answer; 0: none
	problem      TEXT    NOT NULL,
	updated_at   INTEGER NOT NULL,
	UNIQUE (webhook, notification)
) STRICT;
CREATE INDEX deliveries_due ON deliveries (webhook, next_at) WHERE state = 'pending';
CREATE INDEX deliveries_webhook ON deliveries (webhook, seq);
CREATE INDEX deliveries_notification ON deliveries (notification);
