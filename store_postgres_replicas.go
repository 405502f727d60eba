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
	"maps"
	"net/url"
	"slices"
	"strconv"
	"sync"
	"time"
)

// The advisory locks of a schema, as offsets from postgresLockClass.
const (
	lockProcess  = 0 // shared by all replicas, or exclusively by a process that works alone
	lockAudited  = 1 // an audited transaction
	lockLeader   = 2 // the replica that does what only one does
	lockStarting = 3 // a process that migrates, and creates what an empty database lacks
	lockRecovery = 4 // whoever records the calls of closed replicas
)

const (
	lockAttempts    = 600
	lockPause       = 100 * time.Millisecond
	lockConnections = 5 // for the locks of the process, a start, a recovery, waiting for one; and to look for changes
	closeTimeout    = 5 * time.Second
	maxAnswerTime   = 10 * time.Second
	answerPoll      = 10 * time.Millisecond
	keptCommits     = 10_000 // of so many processes the last commit is known
)

// lockOut takes one of the locks that others wait for, until the function that it returns is called. After a minute it
// returns errLockedOut: a start tries it again then.
func (c *cluster) lockOut(ctx context.Context, lock int) (release func(), err error) {
	conn, err := c.db.lockDB.Conn(ctx)
	if err != nil {
		return nil, fmt.Errorf("connecting: %w", err)
	}
	for attempts := lockAttempts; ; attempts-- {
		taken, err := tryAdvisoryLock(ctx, conn, lock, c.db.lockKey)
		if taken {
			return sync.OnceFunc(func() { discardConn(conn) }), nil // the server releases the lock
		}
		if err == nil && attempts == 0 {
			err = fmt.Errorf("%w, for longer than a minute: its log says why", errLockedOut)
		}
		if err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(ctx.Err(), conn.Close())
		case <-time.After(lockPause):
		}
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
func (p *postgres) join(ctx context.Context, u *url.URL) (err error) {
	if p.started, err = p.cluster.lockOut(ctx, lockStarting); err != nil {
		p.started = func() {}
		return err
	}
	if err = p.cluster.takeLock(ctx); err != nil {
		return err
	}
	if err = p.migrate(ctx, u); err != nil {
		return err
	}
	if p.config.replicated && p.config.previousNonce != "" { // register closes that process
		if p.recovering, err = p.cluster.lockOut(ctx, lockRecovery); err != nil {
			p.recovering = func() {}
			return err
		}
	}
	if err = p.register(ctx); err != nil {
		return err
	}
	p.cluster.lastSeq, err = queryValue[int64](ctx, p.store.readDB, "reading the end of the audit trail",
		`SELECT coalesce(max(seq), 0) FROM audit`)
	if err != nil {
		return err
	}
	p.cluster.heard.Store(int64(p.cluster.uptime()))
	others, err := p.cluster.readBeats(ctx)
	if err != nil {
		return err
	}
	p.cluster.setRank(others)
	return p.cluster.beat(ctx)
}

// register adds this process to the replicas. It closes the one that had this data directory before, and so has ended;
// a process that works alone closes all others. From then on they can commit nothing.
func (p *postgres) register(ctx context.Context) error {
	tx, err := p.store.writeDB.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("beginning a transaction: %w", err)
	}
	defer tx.Rollback() // without effect after Commit
	now := time.Now().UnixMilli()
	if err := execute(ctx, tx, "closing other replicas", `
		UPDATE replicas SET epoch = epoch + 1, closed_at = ?1::bigint
		WHERE closed_at IS NULL AND (NOT ?2::boolean OR nonce = ?3::text AND nonce <> '')`,
		now, p.config.replicated, p.config.previousNonce); err != nil {
		return err
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
	if _, err := execEach(ctx, tx, "adding a replica", []string{
		`INSERT INTO ledger_commits (replica, seq) VALUES (?, 0)`,
		`INSERT INTO replica_beats (replica, beat, at)
			VALUES (?, 0, (extract(epoch FROM clock_timestamp()) * 1000)::bigint)`,
	}, p.replica); err != nil {
		return err
	}
	if _, err := execEach(ctx, tx, "deleting old replicas", []string{
		`DELETE FROM replica_beats b USING replicas r WHERE r.id = b.replica AND r.recovered_at < ?`,
		`DELETE FROM lease_exchanges e USING replicas r WHERE r.id = e.replica AND r.recovered_at < ?`,
		`DELETE FROM replicas r WHERE r.recovered_at < ?`,
	}, now-dayMS); err != nil {
		return err
	}
	// A machine may be off for long before it is started with the file of rows that its last process has left.
	if err := execute(ctx, tx, "deleting old commits", `
		DELETE FROM ledger_commits c WHERE replica < ?
			AND NOT EXISTS (SELECT 1 FROM replicas r WHERE r.id = c.replica)`, p.replica-keptCommits); err != nil {
		return err
	}
	if err := tx.Commit(); err != nil {
		return fmt.Errorf("committing: %w", err)
	}
	p.writer = postgresLedger{postgres: p, ledgerDB: p.ledgerDB, stmts: postgresLedgerStmts(),
		committed: map[*requestRow]bool{}}
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
	return execute(ctx, p.store.writeDB, "leaving the replicas", `
		UPDATE replicas SET epoch = epoch + 1, closed_at = ?1::bigint,
			recovered_at = CASE WHEN EXISTS (SELECT 1 FROM begun WHERE replica = ?2)
				OR EXISTS (SELECT 1 FROM limit_leases WHERE replica = ?2) THEN NULL ELSE ?1 END
		WHERE id = ?2 AND epoch = ?3 AND closed_at IS NULL`, time.Now().UnixMilli(), p.replica, p.epoch)
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
func (p *postgres) announce(ctx context.Context, tx *sql.Tx, seq int64, mac []byte) error {
	if !p.config.replicated {
		return nil
	}
	p.cluster.rememberOwn(seq, mac)
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
func (c *cluster) sendBeat(ctx context.Context, info *replicaInfo) (b heartbeat, err error) {
	err = c.conn.QueryRowContext(ctx, `
		WITH milliseconds AS (SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint AS now),
			sent AS (UPDATE replica_beats SET beat = beat + 1, at = milliseconds.now,
					info = (?6::jsonb || jsonb_build_object('session', pg_backend_pid()))::text
				FROM milliseconds
				WHERE replica = ?1 AND EXISTS (SELECT 1 FROM replicas WHERE id = ?1 AND epoch = ?2
					AND closed_at IS NULL)
				RETURNING 1)
		SELECT milliseconds.now, EXISTS (SELECT 1 FROM sent),
			CASE WHEN ?3::boolean THEN true WHEN EXISTS (SELECT 1 FROM sent) THEN pg_try_advisory_lock(?4, ?5)
				ELSE false END
		FROM milliseconds`,
		c.db.replica, c.db.epoch, c.locked, postgresLockClass+lockLeader, c.db.lockKey, string(mustMarshal(info))).
		Scan(&b.at, &b.open, &b.leads)
	if err != nil {
		err = fmt.Errorf("sending a heartbeat: %w", err)
	}
	return b, err
}

// changesAfter returns up to limit entries of the audit trail after seq, in their order. Audited transactions end in
// the order of their entries, so none is missing before another. unhealthy: there are upstreams that are not healthy.
func (c *cluster) changesAfter(ctx context.Context, seq int64, limit int) (
	changes []auditChange, unhealthy bool, err error) {
	type entry struct {
		auditChange
		mac       []byte
		unhealthy bool
	}
	entries, err := collect(ctx, c.db.lockDB, "looking for changes", func(e *entry) []any {
		return []any{&e.seq, &e.at, &e.action, &e.object, &e.detail, &e.mac, &e.unhealthy}
	}, `SELECT coalesce(a.seq, 0), coalesce(a.at, 0), coalesce(a.action, ''), coalesce(a.object, ''),
			coalesce(a.detail, ''), coalesce(a.mac, ''), h.unhealthy
		FROM (SELECT EXISTS (SELECT 1 FROM upstream_health) AS unhealthy) h LEFT JOIN (
			SELECT seq, at, action, object, detail, mac FROM audit WHERE seq > ? ORDER BY seq LIMIT ?) a ON true
		ORDER BY 1`, seq, limit)
	for _, e := range entries {
		if unhealthy = e.unhealthy; e.seq > 0 { // otherwise there is no change
			e.own = c.isOwn(e.seq, e.mac)
			changes = append(changes, e.auditChange)
		}
	}
	return changes, unhealthy, err
}

// readBeats returns the last heartbeat of each other replica that may write.
func (c *cluster) readBeats(ctx context.Context) (map[int64]int64, error) {
	type row struct{ id, beat int64 }
	rows, err := collect(ctx, c.db.store.readDB, "reading heartbeats",
		func(r *row) []any { return []any{&r.id, &r.beat} },
		`SELECT r.id, coalesce(b.beat, 0) FROM replicas r LEFT JOIN replica_beats b ON b.replica = r.id
		WHERE r.closed_at IS NULL AND r.id <> ?`, c.db.replica)
	beats := map[int64]int64{}
	for _, r := range rows {
		beats[r.id] = r.beat
	}
	return beats, err
}

// closeReplica closes a replica unless it has sent another heartbeat. It waits for its open transactions, and ends the
// session with its locks: a frozen process would keep that of the leader.
func (c *cluster) closeReplica(ctx context.Context, id, beat int64) (closed bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	err = c.db.store.withTx(ctx, func(tx *sql.Tx) error {
		n, err := execCount(ctx, tx, "closing a replica", `
			UPDATE replicas SET epoch = epoch + 1, closed_at = ?1::bigint
			WHERE id = ?2 AND closed_at IS NULL
				AND coalesce((SELECT beat FROM replica_beats WHERE replica = ?2), 0) = ?3`,
			time.Now().UnixMilli(), id, beat)
		closed = n > 0
		return err
	})
	if err == nil && closed {
		err = execute(ctx, c.db.store.writeDB, "ending the session of a closed replica", `
			SELECT pg_terminate_backend(l.pid) FROM pg_locks l
				JOIN replica_beats b ON l.pid = CAST(b.info::jsonb ->> 'session' AS integer)
			WHERE b.replica = ? AND l.locktype = 'advisory' AND l.classid::bigint = ?`, id,
			postgresLockClass+lockProcess)
	}
	return closed, err
}

// recoverClosed is backend.recoverClosed. Another process may be doing it at the same time: it waits for that. A start
// calls it after it has recorded the file of its predecessor.
func (p *postgres) recoverClosed(ctx context.Context, recoverCalls recoverFunc) (lost int, err error) {
	p.recovering()
	closed, err := p.closedReplicas(ctx)
	if err != nil || len(closed) == 0 {
		return 0, err
	}
	release, err := p.cluster.lockOut(ctx, lockRecovery)
	if err != nil {
		return 0, err
	}
	defer release()
	if closed, err = p.closedReplicas(ctx); err != nil {
		return 0, err
	}
	for _, id := range closed {
		n, err := recoverCalls(ctx, p.newRecoveryWriter(), id)
		if lost += n; err != nil {
			return lost, err
		}
		if err := p.leases.settleDead(ctx, id); err != nil {
			return lost, err
		}
		if err := p.freeSlot(ctx, id); err != nil {
			return lost, err
		}
	}
	return lost, nil
}

// awaitRecovery is backend.awaitRecovery.
func (c *cluster) awaitRecovery(ctx context.Context) error {
	release, err := c.lockOut(ctx, lockRecovery)
	if err == nil {
		release()
	}
	return err
}

// closedReplicas returns those that can write nothing any more, but have left calls or their slot. 0 is a database that
// was copied into this one.
func (p *postgres) closedReplicas(ctx context.Context) ([]int64, error) {
	return collect(ctx, p.store.readDB, "looking for closed replicas", single[int64], `
		SELECT id FROM replicas WHERE closed_at IS NOT NULL AND recovered_at IS NULL
		UNION
		SELECT DISTINCT replica FROM begun WHERE replica NOT IN (SELECT id FROM replicas WHERE closed_at IS NULL)
		ORDER BY 1`)
}

// freeSlot ends the recovery of a replica.
func (p *postgres) freeSlot(ctx context.Context, id int64) error {
	return p.store.withTx(ctx, func(tx *sql.Tx) error {
		return execute(ctx, tx, "freeing a slot", `
			UPDATE replicas SET recovered_at = ?1::bigint WHERE id = ?2 AND closed_at IS NOT NULL`,
			time.Now().UnixMilli(), id)
	})
}

// listReplicas is backend.listReplicas.
func (p *postgres) listReplicas(ctx context.Context) ([]replicaRow, error) {
	return collect(ctx, p.store.readDB, "listing replicas", func(r *replicaRow) []any {
		return []any{&r.id, &r.slot, &r.startedAt, &r.version, &r.address, &r.closedAt, &r.beatAt, &r.now, &r.info}
	}, `
		SELECT r.id, r.slot, r.started_at, r.version, r.address, r.closed_at, coalesce(b.at, 0),
			(extract(epoch FROM clock_timestamp()) * 1000)::bigint, coalesce(b.info, '{}')
		FROM replicas r LEFT JOIN replica_beats b ON b.replica = r.id
		WHERE r.recovered_at IS NULL ORDER BY r.id`)
}

// ask is backend.ask. The answers are in the order of the replicas.
func (c *cluster) ask(ctx context.Context, question, argument string, wait time.Duration) (
	answers []string, silent []int64, err error) {
	beats, err := c.readBeats(ctx)
	if err != nil || len(beats) == 0 {
		return nil, nil, err
	}
	id := fmt.Sprintf("%d-%d", c.db.replica, c.questions.Add(1))
	if err := execute(ctx, c.db.store.writeDB, "asking the other replicas", `SELECT pg_notify(?, ?)`,
		c.db.channel(), fmt.Sprintf("question %s %d %s %s", id, c.db.replica, question, argument)); err != nil {
		return nil, nil, err
	}
	type row struct {
		replica int64
		answer  string
	}
	for deadline := time.Now().Add(wait); ; time.Sleep(answerPoll) {
		rows, err := collect(ctx, c.db.store.readDB, "reading answers",
			func(r *row) []any { return []any{&r.replica, &r.answer} },
			`SELECT replica, answer FROM replica_answers WHERE question = ? ORDER BY replica`, id)
		if err != nil {
			return nil, nil, err
		}
		if len(rows) < len(beats) && time.Now().Before(deadline) {
			continue
		}
		for _, r := range rows {
			answers = append(answers, r.answer)
			delete(beats, r.replica)
		}
		err = execute(ctx, c.db.store.writeDB, "deleting answers",
			`DELETE FROM replica_answers WHERE question = ? OR at < ?`, id, c.limitNow()-time.Minute.Milliseconds())
		return answers, slices.Sorted(maps.Keys(beats)), err
	}
}

// storeAnswer answers the question with this id.
func (c *cluster) storeAnswer(ctx context.Context, id, answer string) error {
	return execute(ctx, c.db.store.writeDB, "answering another replica", `
		INSERT INTO replica_answers (question, replica, at, answer) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING`,
		id, c.db.replica, c.limitNow(), answer)
}
