// This file has the SQL for the audit trail, and the only way to change what administrators manage:
// withAuditedTx, which writes the audit entry in the same transaction. Without the entry there is no change.
package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
)

// auditSchemaVersion is the first version of the schema with an audit trail.
const auditSchemaVersion = 2

// withAuditedTx runs fn in one write transaction, and appends the event that it returns to the audit trail
// in the same one.
func (s *store) withAuditedTx(ctx context.Context, origin auditOrigin, fn func(*sql.Tx) (auditEvent, error)) error {
	var seq int64
	err := s.withTx(ctx, func(tx *sql.Tx) error {
		event, err := fn(tx)
		if err != nil {
			return err
		}
		seq, err = s.appendAuditEntry(ctx, tx, origin, event)
		return err
	})
	for last := s.lastAuditSeq.Load(); err == nil && last < seq; last = s.lastAuditSeq.Load() {
		s.lastAuditSeq.CompareAndSwap(last, seq) // a later commit may have stored its seq already
	}
	return err
}

// changeRow edits a row and returns it as it is then, all in one audited transaction: load reads the row,
// edit changes it, and save writes it and returns what happened. version must be the row's, unless it is 0;
// errStale otherwise.
func changeRow[T any, P interface {
	*T
	versionFields() (version, updatedAt *int64)
}](ctx context.Context, s *store, origin auditOrigin, version, now int64,
	load func(*sql.Tx) (T, error), edit func(*T) error,
	save func(tx *sql.Tx, old, row *T) (auditEvent, error)) (row T, err error) {
	err = s.withAuditedTx(ctx, origin, func(tx *sql.Tx) (event auditEvent, err error) {
		if row, err = load(tx); err != nil {
			return event, err
		}
		rowVersion, updatedAt := P(&row).versionFields()
		if version != 0 && version != *rowVersion {
			return event, errStale
		}
		old := row
		if err = edit(&row); err != nil {
			return event, err
		}
		*rowVersion, *updatedAt = *rowVersion+1, now
		event, err = save(tx, &old, &row)
		return event, mapUniqueViolation(err)
	})
	return row, err
}

// recordAuditEvent appends an event that changes nothing in the database, such as a sign-in. If it fails,
// the caller must not let the event happen.
func (s *store) recordAuditEvent(ctx context.Context, origin auditOrigin, event auditEvent) error {
	return s.withAuditedTx(ctx, origin, func(*sql.Tx) (auditEvent, error) { return event, nil })
}

// appendAuditEntry appends an entry to the trail and returns its seq. A head that was tampered with does not
// stop it, because tokens must be revocable all the same: the entry then has no predecessor, which
// verifyAudit reports from then on. A head before an entry that this process has committed is an old one
// that was put back.
func (s *store) appendAuditEntry(ctx context.Context, tx *sql.Tx, origin auditOrigin, event auditEvent) (int64, error) {
	if s.chain == nil {
		return 0, errors.New("the audit trail is not open")
	}
	head, ok, newest, err := readAuditHead(ctx, tx, s.chain)
	if err != nil {
		return 0, err
	}
	if lastSeq := max(newest, s.lastAuditSeq.Load()); !ok || lastSeq > head.seq {
		head = emptyAuditHead(lastSeq)
	}
	e := &auditEntry{auditOrigin: origin, action: event.action, object: event.object, detail: event.detailJSON()}
	head = s.chain.appendEntry(head, e)
	if _, err := execCount(ctx, tx, "writing the audit trail", `
		INSERT INTO audit (`+auditColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`, e.columns()...); err != nil {
		return 0, err
	}
	return e.seq, saveSetting(ctx, tx, "audit_head", s.chain.signHead(head))
}

// readAuditHead returns the trail's head, and false if this program did not write it. newest is the seq of
// the last entry that exists at the same moment.
func readAuditHead(ctx context.Context, db querier, chain *auditChain) (
	head auditHead, ok bool, newest int64, err error) {
	var stored string
	err = db.QueryRowContext(ctx, `
		SELECT coalesce((SELECT value FROM settings WHERE name = 'audit_head'), ''),
			(SELECT coalesce(max(seq), 0) FROM audit)`).
		Scan(&stored, &newest)
	if err != nil {
		return head, false, 0, fmt.Errorf("reading the end of the audit trail: %w", err)
	}
	head, ok = chain.verifyHead(stored)
	return head, ok, newest, nil
}

func (s *store) loadAuditHead(ctx context.Context, chain *auditChain) (
	head auditHead, ok bool, newest int64, err error) {
	return readAuditHead(ctx, s.readDB, chain)
}

// openAudit loads the database's audit chain, which makes changes possible. A database without one gets one,
// with a first entry that says what the database already contains. A database with entries but no key for
// them is refused.
func (s *store) openAudit(ctx context.Context, sl *sealer, origin auditOrigin) (err error) {
	if s.chain, err = s.loadAuditChain(ctx, sl); !errors.Is(err, errNotFound) {
		return err
	}
	var sealed string
	if s.chain, sealed, err = newAuditChain(sl); err != nil {
		return err
	}
	return s.withAuditedTx(ctx, origin, func(tx *sql.Tx) (auditEvent, error) {
		var entries, projects, tokens, keys int64
		if err := tx.QueryRowContext(ctx, `
			SELECT (SELECT coalesce(max(seq), 0) FROM audit), (SELECT coalesce(max(seq), 0) FROM projects),
				(SELECT coalesce(max(seq), 0) FROM tokens), (SELECT coalesce(max(seq), 0) FROM management_keys)`).
			Scan(&entries, &projects, &tokens, &keys); err != nil {
			return auditEvent{}, fmt.Errorf("starting the audit trail: %w", err)
		}
		if entries > 0 {
			return auditEvent{}, errors.New("the audit trail has entries, but its key was removed from the database; " +
				"restore a backup with llm-proxy restore FILE")
		}
		detail := []auditField{{"projects", projects}, {"tokens", tokens}, {"management_keys", keys}}
		return auditEvent{actionAuditBegin, "", detail}, saveSetting(ctx, tx, "audit_key", sealed)
	})
}

// loadAuditChain returns the database's audit chain, or errNotFound.
func (s *store) loadAuditChain(ctx context.Context, sl *sealer) (*auditChain, error) {
	sealed, err := s.setting(ctx, "audit_key")
	if err != nil {
		return nil, err
	}
	chain, err := openAuditChain(sl, sealed)
	if err != nil {
		return nil, fmt.Errorf("the key of the audit trail: %w", err)
	}
	return chain, nil
}

// verifyAudit checks the whole trail up to its present end; entries may be appended meanwhile. expected is a
// head that an operator kept, or nil.
func (s *store) verifyAudit(ctx context.Context, chain *auditChain, expected *auditHead) (*auditCheck, error) {
	check := &auditCheck{chain: chain, lastHead: emptyAuditHead(0), expectedHead: expected}
	head, ok, newest, err := s.loadAuditHead(ctx, chain)
	if err != nil {
		return nil, err
	}
	until := head.seq
	if !ok {
		until = newest
	}
	// Nothing writes a seq below 1, so a row there was inserted by somebody else.
	for after, more := int64(math.MinInt64), true; more; {
		page, err := s.auditPage(ctx, after, until)
		if err != nil {
			return nil, err
		}
		for i := range page {
			check.add(&page[i])
			after = page[i].seq
		}
		more = len(page) == auditPageSize
	}
	check.finish(head, ok, newest)
	return check, nil
}

const auditPageSize = 1000

const auditColumns = `seq, at, actor, role, address, request_id, action, object, detail, prev, mac`

func (e *auditEntry) columns() []any {
	return []any{&e.seq, &e.at, &e.actorID, &e.role, &e.address, &e.requestID, &e.action, &e.object, &e.detail,
		&e.prev, &e.mac}
}

// auditPage returns entries in the order in which they were written.
func (s *store) auditPage(ctx context.Context, after, until int64) ([]auditEntry, error) {
	return collect(ctx, s.readDB, "reading the audit trail", (*auditEntry).columns, `
		SELECT `+auditColumns+` FROM audit WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?`,
		after, until, auditPageSize)
}

// An auditFilter says which entries a list has; "" lets all through. The list begins below the entry with
// beforeAt and beforeSeq.
type auditFilter struct {
	actor, action, object string
	from, to              int64
	beforeAt, beforeSeq   int64
	limit                 int
}

// An auditRow is an entry to be shown: actorName is the present name of the actor's key.
type auditRow struct {
	auditEntry
	actorName string
}

func (r *auditRow) columns() []any { return append(r.auditEntry.columns(), &r.actorName) }

// listAudit returns up to f.limit entries, newest first. Each of the four statements walks an index of its
// own.
func (s *store) listAudit(ctx context.Context, f auditFilter) ([]auditRow, error) {
	const head = `SELECT ` + auditColumns + `, coalesce((SELECT name FROM management_keys WHERE id = audit.actor), '')
		FROM audit WHERE at >= ?1 AND at < ?2 AND (at, seq) < (?3, ?4) AND `
	const tail = ` ORDER BY at DESC, seq DESC LIMIT ?5`
	query := head + `?6 = '' AND ?7 = '' AND ?8 = ''` + tail
	switch {
	case f.object != "":
		query = head + `object = ?6 AND (?7 = '' OR actor = ?7) AND (?8 = '' OR action = ?8)` + tail
	case f.actor != "":
		query = head + `?6 = '' AND actor = ?7 AND (?8 = '' OR action = ?8)` + tail
	case f.action != "":
		query = head + `?6 = '' AND ?7 = '' AND action = ?8` + tail
	}
	return collect(ctx, s.readDB, "listing the audit trail", (*auditRow).columns, query,
		f.from, f.to, f.beforeAt, f.beforeSeq, f.limit, f.object, f.actor, f.action)
}
