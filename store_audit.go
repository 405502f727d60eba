// SQL for the audit trail, and the one way to change what administrators
// manage: change, which writes the entry in the same transaction. No entry, no
// change.
package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"math"
)

// auditSchemaVersion is the version of the schema that brought the trail.
const auditSchemaVersion = 2

// withAuditedTx runs do in one write transaction, and puts the act that it returns
// into the audit trail in the same one.
func (s *store) withAuditedTx(ctx context.Context, by auditOrigin, do func(*sql.Tx) (auditEvent, error)) error {
	var seq int64
	err := s.withTx(ctx, func(tx *sql.Tx) error {
		a, err := do(tx)
		if err != nil {
			return err
		}
		seq, err = s.appendAuditEntry(ctx, tx, by, a)
		return err
	})
	for was := s.lastAuditSeq.Load(); err == nil && was < seq; was = s.lastAuditSeq.Load() {
		s.lastAuditSeq.CompareAndSwap(was, seq) // who committed later may have been here before
	}
	return err
}

// recordAuditEvent puts something into the audit trail that changes nothing here, such as a
// sign-in. Who notes an act must not let it happen when that fails.
func (s *store) recordAuditEvent(ctx context.Context, by auditOrigin, a auditEvent) error {
	return s.withAuditedTx(ctx, by, func(*sql.Tx) (auditEvent, error) { return a, nil })
}

// appendAuditEntry adds an entry at the trail's end and returns its seq. An end that
// somebody has tampered with does not stop it, for tokens must be revocable all
// the same: the entry then follows none, which checkAudit finds ever after. An
// end before one that this process has seen is one that was put back.
func (s *store) appendAuditEntry(ctx context.Context, tx *sql.Tx, by auditOrigin, a auditEvent) (int64, error) {
	if s.chain == nil {
		return 0, errors.New("the audit trail is not open")
	}
	var stored string
	var newest int64
	err := tx.QueryRowContext(ctx, `
		SELECT coalesce((SELECT value FROM settings WHERE name = 'audit_head'), ''), (SELECT coalesce(max(seq), 0) FROM audit)`).
		Scan(&stored, &newest)
	if err != nil {
		return 0, fmt.Errorf("reading the end of the audit trail: %w", err)
	}
	head, ok := s.chain.verifyHead(stored)
	if seen := max(newest, s.lastAuditSeq.Load()); !ok || seen > head.seq {
		head = emptyAuditHead(seen)
	}
	e := &auditEntry{auditOrigin: by, action: a.action, object: a.object, detail: a.detailJSON()}
	head = s.chain.appendEntry(head, e)
	if _, err := tx.ExecContext(ctx, `
		INSERT INTO audit (seq, at, actor, role, address, request_id, action, object, detail, prev, mac)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		e.seq, e.at, e.actorID, string(e.role), e.address, e.requestID, e.action, e.object, e.detail, e.prev, e.mac); err != nil {
		return 0, fmt.Errorf("writing the audit trail: %w", err)
	}
	return e.seq, setSettingTx(ctx, tx, "audit_head", s.chain.signHead(head))
}

func setSettingTx(ctx context.Context, tx *sql.Tx, name, value string) error {
	if _, err := tx.ExecContext(ctx, `
		INSERT INTO settings (name, value) VALUES (?, ?)
		ON CONFLICT (name) DO UPDATE SET value = excluded.value`, name, value); err != nil {
		return fmt.Errorf("writing the setting %s: %w", name, err)
	}
	return nil
}

// openAudit makes s able to change things, with the chain that the database has.
// A database without one gets it, with a first entry that says what was there
// already. One that has entries and no key for them is not served.
func (s *store) openAudit(ctx context.Context, sl *sealer, by auditOrigin) (err error) {
	if s.chain, err = s.loadAuditChain(ctx, sl); !errors.Is(err, errNotFound) {
		return err
	}
	var sealed string
	if s.chain, sealed, err = newAuditChain(sl); err != nil {
		return err
	}
	return s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		var entries, projects, tokens, keys int64
		if err := tx.QueryRowContext(ctx, `
			SELECT (SELECT coalesce(max(seq), 0) FROM audit), (SELECT coalesce(max(seq), 0) FROM projects),
				(SELECT coalesce(max(seq), 0) FROM tokens), (SELECT coalesce(max(seq), 0) FROM management_keys)`).
			Scan(&entries, &projects, &tokens, &keys); err != nil {
			return auditEvent{}, fmt.Errorf("beginning the audit trail: %w", err)
		}
		if entries > 0 {
			return auditEvent{}, errors.New("the audit trail has entries, but its key was removed from the database; bring back a backup with llm-proxy restore FILE")
		}
		return auditEvent{actionAuditBegin, "", []auditField{{"projects", projects}, {"tokens", tokens}, {"management_keys", keys}}},
			setSettingTx(ctx, tx, "audit_key", sealed)
	})
}

// loadAuditChain returns the chain that the database has, or errNotFound.
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

// loadAuditHead returns the trail's end, and false if this program did not write it.
// newest is the seq of the last entry that is there, at the same moment.
func (s *store) loadAuditHead(ctx context.Context, chain *auditChain) (h auditHead, ok bool, newest int64, err error) {
	var stored string
	err = s.readDB.QueryRowContext(ctx, `
		SELECT coalesce((SELECT value FROM settings WHERE name = 'audit_head'), ''), (SELECT coalesce(max(seq), 0) FROM audit)`).
		Scan(&stored, &newest)
	if err != nil {
		return h, false, 0, fmt.Errorf("reading the end of the audit trail: %w", err)
	}
	h, ok = chain.verifyHead(stored)
	return h, ok, newest, nil
}

// verifyAudit goes through the whole trail, as it ends now: others may write on.
func (s *store) verifyAudit(ctx context.Context, chain *auditChain, expect *auditHead) (*auditCheck, error) {
	k := &auditCheck{chain: chain, lastHead: emptyAuditHead(0), expectedHead: expect}
	h, ok, newest, err := s.loadAuditHead(ctx, chain)
	if err != nil {
		return nil, err
	}
	until := h.seq
	if !ok {
		until = newest
	}
	// From below 1: a row may have been put there.
	for after, full := int64(math.MinInt64), true; full; {
		page, err := s.auditPage(ctx, after, until)
		if err != nil {
			return nil, err
		}
		for i := range page {
			k.add(&page[i])
			after = page[i].seq
		}
		full = len(page) == auditPageSize
	}
	k.finish(h, ok, newest)
	return k, nil
}

const auditPageSize = 1000

const auditColumns = `a.seq, a.at, a.actor, a.role, a.address, a.request_id, a.action, a.object, a.detail, a.prev, a.mac`

func (e *auditEntry) scan(row interface{ Scan(...any) error }, more ...any) error {
	return row.Scan(append([]any{&e.seq, &e.at, &e.actorID, &e.role, &e.address, &e.requestID, &e.action, &e.object, &e.detail, &e.prev, &e.mac}, more...)...)
}

// auditPage returns entries in the order in which they were written.
func (s *store) auditPage(ctx context.Context, after, until int64) ([]auditEntry, error) {
	rows, err := s.readDB.QueryContext(ctx, `
		SELECT `+auditColumns+` FROM audit a WHERE a.seq > ? AND a.seq <= ? ORDER BY a.seq LIMIT ?`, after, until, auditPageSize)
	if err != nil {
		return nil, fmt.Errorf("reading the audit trail: %w", err)
	}
	defer rows.Close()
	out := make([]auditEntry, 0, auditPageSize)
	for rows.Next() {
		var e auditEntry
		if err := e.scan(rows); err != nil {
			return nil, fmt.Errorf("reading the audit trail: %w", err)
		}
		out = append(out, e)
	}
	return out, rows.Err()
}

// An auditFilter says which entries a list holds; "" is all. It goes on below
// the entry with beforeAt and beforeSeq.
type auditFilter struct {
	actor, action, object string
	from, to              int64
	beforeAt, beforeSeq   int64
	limit                 int
}

// An auditRow is an entry for people: name is what the actor's key is called now.
type auditRow struct {
	auditEntry
	actorName string
}

// listAudit returns up to f.limit entries, newest first. Each of the four cases
// walks an index of its own.
func (s *store) listAudit(ctx context.Context, f auditFilter) ([]auditRow, error) {
	const head = `SELECT ` + auditColumns + `, coalesce(k.name, '') FROM audit a LEFT JOIN management_keys k ON k.id = a.actor
		WHERE a.at >= ?1 AND a.at < ?2 AND (a.at, a.seq) < (?3, ?4) AND `
	const tail = ` ORDER BY a.at DESC, a.seq DESC LIMIT ?5`
	query := head + `?6 = '' AND ?7 = '' AND ?8 = ''` + tail
	switch {
	case f.object != "":
		query = head + `a.object = ?6 AND (?7 = '' OR a.actor = ?7) AND (?8 = '' OR a.action = ?8)` + tail
	case f.actor != "":
		query = head + `?6 = '' AND a.actor = ?7 AND (?8 = '' OR a.action = ?8)` + tail
	case f.action != "":
		query = head + `?6 = '' AND ?7 = '' AND a.action = ?8` + tail
	}
	rows, err := s.readDB.QueryContext(ctx, query, f.from, f.to, f.beforeAt, f.beforeSeq, f.limit, f.object, f.actor, f.action)
	if err != nil {
		return nil, fmt.Errorf("listing the audit trail: %w", err)
	}
	defer rows.Close()
	var out []auditRow
	for rows.Next() {
		var r auditRow
		if err := r.scan(rows, &r.actorName); err != nil {
			return nil, fmt.Errorf("listing the audit trail: %w", err)
		}
		out = append(out, r)
	}
	return out, rows.Err()
}
