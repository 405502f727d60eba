-- Several processes with one database. slot is part of the ids of a replica's calls, so no other replica has it until
-- these calls are settled (recovered_at). nonce is in the replica's data directory, and proves to its next start that
-- the replica has ended.
ALTER TABLE replicas ADD COLUMN slot bigint NOT NULL DEFAULT 0 CHECK (slot BETWEEN 0 AND 1023);
ALTER TABLE replicas ADD COLUMN address text COLLATE "C" NOT NULL DEFAULT '';
ALTER TABLE replicas ADD COLUMN nonce text COLLATE "C" NOT NULL DEFAULT '';
ALTER TABLE replicas ADD COLUMN recovered_at bigint;
UPDATE replicas SET recovered_at = closed_at;
CREATE UNIQUE INDEX replicas_slot ON replicas (slot) WHERE recovered_at IS NULL;

-- The heartbeats of the replicas, which are not in replicas because each write transaction locks a row there. at is
-- by the database's clock. info is what the replica says of itself, for administrators.
CREATE TABLE replica_beats (
	replica bigint PRIMARY KEY REFERENCES replicas (id),
	beat    bigint NOT NULL,
	at      bigint NOT NULL,
	info    text COLLATE "C" NOT NULL DEFAULT '{}'
) WITH (fillfactor = 50);

-- What replicas answer to a question that one of them has sent to all with NOTIFY.
CREATE TABLE replica_answers (
	question text COLLATE "C" NOT NULL,
	replica  bigint NOT NULL,
	at       bigint NOT NULL,
	answer   text COLLATE "C" NOT NULL,
	PRIMARY KEY (question, replica)
);
