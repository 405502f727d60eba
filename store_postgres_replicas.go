//go:build postgres

// This file has the SQL with which several processes share one PostgreSQL database: the advisory locks, the row of
// each replica and its heartbeat, which of them leads, and who may write. A replica whose row was closed commits
// nothing any more, whatever its clock or its memory says. The file decides nothing: cluster.go does.
package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"
)

// The advisory locks of a schema, as offsets from postgresLockClass. A session has the first, the third and the
// fourth on lockConn.
const (
	lockProcess  = 0 // shared by all replicas, or exclusively by a process that works alone
	lockAudited  = 1 // an audited transaction
	lockLeader   = 2 // the replica that does what only one does
	lockStarting = 3 // a process that migrates, and creates what an empty database lacks
)

const (
	startingLockAttempts = 600
	startingLockPause    = 100 * time.Millisecond
	lockConnections      = 2 // one has the locks of the process, one that of a start
)

// lockOut keeps other processes from starting, until the function that it returns is called.
func (c *cluster) lockOut(ctx context.Context) (release func(), err error) {
	conn, err := c.db.lockDB.Conn(ctx)
	if err != nil {
		return nil, fmt.Errorf("connecting: %w", err)
	}
	for attempts := startingLockAttempts; ; attempts-- {
		taken, err := tryAdvisoryLock(ctx, conn, lockStarting, c.db.lockKey)
		if err == nil && !taken && attempts == 0 {
			err = errors.New("another llm-proxy has been starting with it for a minute; look at its log")
		}
		if err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		if taken {
			return sync.OnceFunc(func() {
				ctx, cancel := context.WithTimeout(context.Background(), postgresConnectTimeout)
				defer cancel()
				// If this fails, the connection is lost, and the lock with it.
				_, _ = conn.ExecContext(ctx, `SELECT pg_advisory_unlock(?, ?)`, postgresLockClass+lockStarting,
					c.db.lockKey)
				_ = conn.Close()
			}), nil
		}
		time.Sleep(startingLockPause)
	}
}

// takeLock takes the lock of a process, or returns an error if another process keeps it from that.
func (c *cluster) takeLock(ctx context.Context) error {
	conn, err := c.db.lockDB.Conn(ctx)
	if err != nil {
		return fmt.Errorf("connecting: %w", err)
	}
	taken := false
	for attempts := 10; err == nil && !taken && attempts > 0; attempts-- {
		if c.db.config.replicated {
			err = conn.QueryRowContext(ctx, `SELECT pg_try_advisory_lock_shared(?, ?)`,
				postgresLockClass+lockProcess, c.db.lockKey).Scan(&taken)
		} else {
			taken, err = tryAdvisoryLock(ctx, conn, lockProcess, c.db.lockKey)
		}
		if err == nil && !taken {
			time.Sleep(50 * time.Millisecond) // the server may not have noticed yet that a process has ended
		}
	}
	if err == nil && !taken {
		err = errors.New("another llm-proxy is using it; stop that one, or set another DATABASE_URL for this one")
	}
	if err != nil {
		return errors.Join(err, conn.Close())
	}
	c.conn = conn
	return nil
}

// tryAdvisoryLock takes a lock for the session of conn, and returns false if another session has it.
func tryAdvisoryLock(ctx context.Context, conn *sql.Conn, lock int, key int32) (taken bool, err error) {
	err = conn.QueryRowContext(ctx, `SELECT pg_try_advisory_lock(?, ?)`, postgresLockClass+lock, key).Scan(&taken)
	return taken, err
}

// join makes this process one of the replicas: it takes its locks, migrates the schema and sends the first heartbeat.
func (p *postgres) join(ctx context.Context) (err error) {
	if p.started, err = p.cluster.lockOut(ctx); err != nil {
		p.started = func() {}
		return err
	}
	if err = p.cluster.takeLock(ctx); err != nil {
		return err
	}
	if err = p.migrate(ctx); err != nil {
		return err
	}
	if err = p.register(ctx); err != nil {
		return err
	}
	return p.cluster.beat(ctx)
}

// register adds this process to the replicas. A process that works alone closes all others: from then on they can
// commit nothing.
func (p *postgres) register(ctx context.Context) error {
	tx, err := p.store.writeDB.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("beginning a transaction: %w", err)
	}
	defer tx.Rollback() // without effect after Commit
	now := time.Now().UnixMilli()
	if !p.config.replicated {
		if _, err := execCount(ctx, tx, "closing other replicas", `
			UPDATE replicas SET epoch = epoch + 1, closed_at = ? WHERE closed_at IS NULL`, now); err != nil {
			return err
		}
	}
	var slot int64
	err = tx.QueryRowContext(ctx, `
		INSERT INTO replicas (version, started_at, slot, address, nonce)
		SELECT ?::text, ?::bigint, min(s), ?::text, ?::text FROM generate_series(0, ?::bigint) s
		WHERE NOT EXISTS (SELECT 1 FROM replicas r WHERE r.slot = s AND r.recovered_at IS NULL)
		RETURNING id, epoch, slot`,
		p.config.version, now, p.config.address, p.config.nonce, replicaSlots-1).Scan(&p.replica, &p.epoch, &slot)
	if err != nil {
		return fmt.Errorf("adding a replica: %w", err)
	}
	for _, statement := range []string{
		`INSERT INTO ledger_commits (replica, seq) VALUES (?, 0)`,
		`INSERT INTO replica_beats (replica, beat, at)
			VALUES (?, 0, (extract(epoch FROM clock_timestamp()) * 1000)::bigint)`,
	} {
		if _, err := execCount(ctx, tx, "adding a replica", statement, p.replica); err != nil {
			return err
		}
	}
	for _, statement := range []string{
		`DELETE FROM ledger_commits c USING replicas r WHERE r.id = c.replica AND r.recovered_at < ?`,
		`DELETE FROM replica_beats b USING replicas r WHERE r.id = b.replica AND r.recovered_at < ?`,
	} {
		if _, err := execCount(ctx, tx, "deleting old replicas", statement, now-dayMS); err != nil {
			return err
		}
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("committing: %w", err)
	}
	p.writer = postgresLedger{postgres: p, stmts: postgresLedgerStmts(), committed: map[*requestRow]bool{}}
	p.store.backend.replica = p.replica
	p.slot.Store(slot)
	return nil
}

// leave closes this process's row. Its slot is free unless calls of it are still to be recorded.
func (p *postgres) leave() error {
	if p.replica == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), postgresConnectTimeout)
	defer cancel()
	_, err := execCount(ctx, p.store.writeDB, "leaving the replicas", `
		UPDATE replicas SET epoch = epoch + 1, closed_at = ?1::bigint,
			recovered_at = CASE WHEN EXISTS (SELECT 1 FROM begun WHERE replica = ?2) THEN NULL ELSE ?1 END
		WHERE id = ?2 AND epoch = ?3 AND closed_at IS NULL`, time.Now().UnixMilli(), p.replica, p.epoch)
	return err
}

// requireOpenReplica is true if this process may write. It keeps others from closing the replica before the
// transaction ends.
const requireOpenReplica = `SELECT id FROM replicas WHERE id = ? AND epoch = ? AND closed_at IS NULL FOR SHARE`

// startTx is called at the start of a write transaction. An audited one runs alone, so that the audit trail has one
// writer.
func (p *postgres) startTx(ctx context.Context, tx *sql.Tx, audited bool) error {
	var id int64
	if err := tx.QueryRowContext(ctx, requireOpenReplica, p.replica, p.epoch).Scan(&id); err != nil {
		if errors.Is(err, sql.ErrNoRows) {
			err = errFenced
		}
		return fmt.Errorf("beginning to write: %w", err)
	}
	if !audited {
		return nil
	}
	if _, err := tx.ExecContext(ctx, `SELECT pg_advisory_xact_lock(?, ?)`, postgresLockClass+lockAudited,
		p.lockKey); err != nil {
		return fmt.Errorf("waiting for other changes: %w", err)
	}
	return nil
}

// announce tells the other replicas of a change, once the transaction is committed.
func (p *postgres) announce(ctx context.Context, tx *sql.Tx, seq int64) error {
	if !p.config.replicated {
		return nil
	}
	_, err := tx.ExecContext(ctx, `SELECT pg_notify(?, ?)`, p.channel(), "change "+strconv.FormatInt(seq, 10))
	return err
}

// channel names what the replicas of the schema listen to.
func (p *postgres) channel() string { return fmt.Sprintf("llm_proxy_%08x", uint32(p.lockKey)) }

// A heartbeat is what the database says to one. at is its time in unix milliseconds.
type heartbeat struct {
	at    int64
	open  bool // this process may write
	leads bool // it has the lock of the leader
}

// sendBeat sends a heartbeat. If this process does not lead, it tries to take the lock of the leader.
func (c *cluster) sendBeat(ctx context.Context) (b heartbeat, err error) {
	err = c.conn.QueryRowContext(ctx, `
		WITH milliseconds AS (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint AS now),
			sent AS (UPDATE replica_beats SET beat = beat + 1, at = milliseconds.now FROM milliseconds
				WHERE replica = ?1 AND EXISTS (SELECT 1 FROM replicas WHERE id = ?1 AND epoch = ?2
					AND closed_at IS NULL)
				RETURNING 1)
		SELECT milliseconds.now, EXISTS (SELECT 1 FROM sent),
			CASE WHEN ?3::boolean THEN true ELSE pg_try_advisory_lock(?4, ?5) END
		FROM milliseconds`,
		c.db.replica, c.db.epoch, c.locked, postgresLockClass+lockLeader, c.db.lockKey).
		Scan(&b.at, &b.open, &b.leads)
	if err != nil {
		err = fmt.Errorf("sending a heartbeat: %w", err)
	}
	return b, err
}
