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

// auditSchema is the version of the schema that brought the trail.
const auditSchema = 2

// change runs do in one write transaction, and puts the act that it returns
// into the audit trail in the same one.
func (s *store) change(ctx context.Context, by origin, do func(*sql.Tx) (act, error)) error {
	var seq int64
	err := s.tx(ctx, func(tx *sql.Tx) error {
		a, err := do(tx)
		if err != nil {
			return err
		}
		seq, err = s.record(ctx, tx, by, a)
		return err
	})
	for was := s.tail.Load(); err == nil && was < seq; was = s.tail.Load() {
		s.tail.CompareAndSwap(was, seq) // who committed later may have been here before
	}
	return err
}

// note puts something into the audit trail that changes nothing here, such as a
// sign-in. Who notes an act must not let it happen when that fails.
func (s *store) note(ctx context.Context, by origin, a act) error {
	return s.change(ctx, by, func(*sql.Tx) (act, error) { return a, nil })
}

// record adds an entry at the trail's end and returns its seq. An end that
// somebody has tampered with does not stop it, for tokens must be revocable all
// the same: the entry then follows none, which checkAudit finds ever after. An
// end before one that this process has seen is one that was put back.
func (s *store) record(ctx context.Context, tx *sql.Tx, by origin, a act) (int64, error) {
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
	head, ok := s.chain.open(stored)
	if seen := max(newest, s.tail.Load()); !ok || seen > head.seq {
		head = noHead(seen)
	}
	e := &auditEntry{origin: by, action: a.action, object: a.object, detail: a.json()}
	head = s.chain.next(head, e)
	if _, err := tx.ExecContext(ctx, `
		INSERT INTO audit (seq, at, actor, role, address, request_id, action, object, detail, prev, mac)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		e.seq, e.at, e.actor, string(e.role), e.address, e.requestID, e.action, e.object, e.detail, e.prev, e.mac); err != nil {
		return 0, fmt.Errorf("writing the audit trail: %w", err)
	}
	return e.seq, putSetting(ctx, tx, "audit_head", s.chain.seal(head))
}

func putSetting(ctx context.Context, tx *sql.Tx, name, value string) error {
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
func (s *store) openAudit(ctx context.Context, sl *sealer, by origin) (err error) {
	if s.chain, err = s.auditChain(ctx, sl); !errors.Is(err, errNotFound) {
		return err
	}
	var sealed string
	if s.chain, sealed, err = newAuditChain(sl); err != nil {
		return err
	}
	return s.change(ctx, by, func(tx *sql.Tx) (act, error) {
		var entries, projects, tokens, keys int64
		if err := tx.QueryRowContext(ctx, `
			SELECT (SELECT coalesce(max(seq), 0) FROM audit), (SELECT coalesce(max(seq), 0) FROM projects),
				(SELECT coalesce(max(seq), 0) FROM tokens), (SELECT coalesce(max(seq), 0) FROM management_keys)`).
			Scan(&entries, &projects, &tokens, &keys); err != nil {
			return act{}, fmt.Errorf("beginning the audit trail: %w", err)
		}
		if entries > 0 {
			return act{}, errors.New("the audit trail has entries, but its key was removed from the database; bring back a backup with llm-proxy restore FILE")
		}
		return act{actionBegin, "", []fact{{"projects", projects}, {"tokens", tokens}, {"management_keys", keys}}},
			putSetting(ctx, tx, "audit_key", sealed)
	})
}

// auditChain returns the chain that the database has, or errNotFound.
func (s *store) auditChain(ctx context.Context, sl *sealer) (*auditChain, error) {
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

// auditHead returns the trail's end, and false if this program did not write it.
// newest is the seq of the last entry that is there, at the same moment.
func (s *store) auditHead(ctx context.Context, chain *auditChain) (h auditHead, ok bool, newest int64, err error) {
	var stored string
	err = s.read.QueryRowContext(ctx, `
		SELECT coalesce((SELECT value FROM settings WHERE name = 'audit_head'), ''), (SELECT coalesce(max(seq), 0) FROM audit)`).
		Scan(&stored, &newest)
	if err != nil {
		return h, false, 0, fmt.Errorf("reading the end of the audit trail: %w", err)
	}
	h, ok = chain.open(stored)
	return h, ok, newest, nil
}

// checkAudit goes through the whole trail, as it ends now: others may write on.
func (s *store) checkAudit(ctx context.Context, chain *auditChain, expect *auditHead) (*auditCheck, error) {
	k := &auditCheck{chain: chain, last: noHead(0), expect: expect}
	h, ok, newest, err := s.auditHead(ctx, chain)
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
		full = len(page) == auditPageRows
	}
	k.finish(h, ok, newest)
	return k, nil
}

const auditPageRows = 1000

const auditColumns = `a.seq, a.at, a.actor, a.role, a.address, a.request_id, a.action, a.object, a.detail, a.prev, a.mac`

func (e *auditEntry) scan(row interface{ Scan(...any) error }, more ...any) error {
	return row.Scan(append([]any{&e.seq, &e.at, &e.actor, &e.role, &e.address, &e.requestID, &e.action, &e.object, &e.detail, &e.prev, &e.mac}, more...)...)
}

// auditPage returns entries in the order in which they were written.
func (s *store) auditPage(ctx context.Context, after, until int64) ([]auditEntry, error) {
	rows, err := s.read.QueryContext(ctx, `
		SELECT `+auditColumns+` FROM audit a WHERE a.seq > ? AND a.seq <= ? ORDER BY a.seq LIMIT ?`, after, until, auditPageRows)
	if err != nil {
		return nil, fmt.Errorf("reading the audit trail: %w", err)
	}
	defer rows.Close()
	out := make([]auditEntry, 0, auditPageRows)
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
	name string
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
	rows, err := s.read.QueryContext(ctx, query, f.from, f.to, f.beforeAt, f.beforeSeq, f.limit, f.object, f.actor, f.action)
	if err != nil {
		return nil, fmt.Errorf("listing the audit trail: %w", err)
	}
	defer rows.Close()
	var out []auditRow
	for rows.Next() {
		var r auditRow
		if err := r.scan(rows, &r.name); err != nil {
			return nil, fmt.Errorf("listing the audit trail: %w", err)
		}
		out = append(out, r)
	}
	return out, rows.Err()
}
