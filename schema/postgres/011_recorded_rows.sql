-- Up to which number the transactions of a process have recorded the rows that it has queued, and the name of its file of
-- unwritten rows: see outbox.go. That file may be read long after the process's row is gone.
ALTER TABLE ledger_commits ADD COLUMN outbox text COLLATE "C" NOT NULL DEFAULT '';
ALTER TABLE ledger_commits ADD COLUMN recorded bigint NOT NULL DEFAULT 0;
ALTER TABLE ledger_commits DROP CONSTRAINT ledger_commits_replica_fkey;
