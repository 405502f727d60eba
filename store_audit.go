// This file has the SQL for the audit trail, and the only way to change what administrators manage:
// withAuditedTx, which writes the audit entry in the same transaction. Without the entry there is no change. It
// also binds each row that grants something by a MAC, and checks that when the row is loaded. A change of the
// encryption key, which seals all secrets again, is here too.
package main

import (
	"context"
	"crypto/hmac"
	"database/sql"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"strconv"
)

// auditSchemaVersion is the first version of the schema with an audit trail.
const auditSchemaVersion = 2

// An auditedTx is a transaction that ends with an audit entry. seq is the entry's.
type auditedTx struct {
	*sql.Tx
	chain *auditChain
	seq   int64
}

// withAuditedTx runs fn in one write transaction, and appends the event that it returns to the audit trail
// in the same one.
func (s *store) withAuditedTx(ctx context.Context, origin auditOrigin, fn func(*auditedTx) (auditEvent, error)) error {
	var seq int64
	err := s.withWriteTx(ctx, true, func(tx *sql.Tx) error {
		head, err := s.nextAuditHead(ctx, tx)
		if err != nil {
			return err
		}
		seq = head.seq + 1
		event, err := fn(&auditedTx{tx, s.chain, seq})
		if err != nil {
			return err
		}
		return s.appendAuditEntry(ctx, tx, head, origin, event)
	})
	if err != nil && s.backend != nil { // it may be committed nevertheless
		s.backend.disown(seq)
	}
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
	grantingRow
	versionFields() (version, updatedAt *int64)
}](ctx context.Context, s *store, origin auditOrigin, version, now int64,
	load func(*auditedTx) (T, error), edit func(*T) error,
	save func(tx *auditedTx, old, row *T) (auditEvent, error)) (row T, err error) {
	err = s.withAuditedTx(ctx, origin, func(tx *auditedTx) (event auditEvent, err error) {
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
		// A foreign row may be ended, but a change must not make it valid.
		if b := P(&row).bound(); b.values != nil && s.checkBinding(ctx, tx, P(&old)) != nil {
			return event, &fieldError{"", "The " + b.kind + " was changed outside this program and is refused. " +
				"Revoke or delete it and create a new one, or restore a backup."}
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
	return s.withAuditedTx(ctx, origin, func(*auditedTx) (auditEvent, error) { return event, nil })
}

// nextAuditHead returns the head after which the next entry is appended. A head that was tampered with does not
// stop that, because tokens must be revocable all the same: the entry then has no predecessor, which
// verifyAudit reports from then on. A head before an entry that this process has committed is an old one
// that was put back.
func (s *store) nextAuditHead(ctx context.Context, tx *sql.Tx) (auditHead, error) {
	if s.chain == nil {
		return auditHead{}, errAuditNotOpen
	}
	head, ok, newest, err := readAuditHead(ctx, tx, s.chain)
	if lastSeq := max(newest, s.lastAuditSeq.Load()); !ok || lastSeq > head.seq {
		head = emptyAuditHead(lastSeq)
	}
	return head, err
}

var errAuditNotOpen = errors.New("the audit trail is not open")

// appendAuditEntry appends an entry to the trail, after head.
func (s *store) appendAuditEntry(ctx context.Context, tx *sql.Tx, head auditHead, origin auditOrigin,
	event auditEvent) error {
	e := &auditEntry{auditOrigin: origin, action: event.action, object: event.object, detail: event.detailJSON()}
	head = s.chain.appendEntry(head, e)
	if err := execute(ctx, tx, "writing the audit trail", `
		INSERT INTO audit (`+auditColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`, e.columns()...); err != nil {
		return err
	}
	if err := saveSetting(ctx, tx, "audit_head", s.chain.signHead(head)); err != nil || s.backend == nil {
		return err
	}
	return s.backend.announce(ctx, tx, e.seq, e.mac)
}

// readAuditHead returns the trail's head, and false if this program did not write it. newest is the seq of
// the last entry that exists at the same moment.
func readAuditHead(ctx context.Context, db querier, chain *auditChain) (
	head auditHead, ok bool, newest int64, err error) {
	var stored string
	err = scanRow(ctx, db, "reading the end of the audit trail", []any{&stored, &newest}, `
		SELECT coalesce((SELECT value FROM settings WHERE name = 'audit_head'), ''),
			(SELECT coalesce(max(seq), 0) FROM audit)`)
	if err != nil {
		return head, false, 0, err
	}
	head, ok = chain.verifyHead(stored)
	return head, ok, newest, nil
}

func (s *store) loadAuditHead(ctx context.Context, chain *auditChain) (
	head auditHead, ok bool, newest int64, err error) {
	return readAuditHead(ctx, s.readDB, chain)
}

// openAudit loads the database's audit chain, which makes changes possible and rows checkable. A database
// without one gets one, and one from before rows were bound is bound.
func (s *store) openAudit(ctx context.Context, sl *sealer, origin auditOrigin) error {
	bound, err := s.rowsAreBound(ctx, sl)
	if err != nil {
		return err
	}
	if s.chain, err = s.loadAuditChain(ctx, sl); errors.Is(err, errNotFound) {
		err = s.beginAudit(ctx, sl, origin, bound)
	}
	if err != nil || bound {
		return err
	}
	return s.bindAll(ctx, sl, origin)
}

// beginAudit starts a trail, with a first entry that says what the database already contains. A database with
// entries or with bound rows, but no key for them, is refused.
func (s *store) beginAudit(ctx context.Context, sl *sealer, origin auditOrigin, bound bool) (err error) {
	var sealed string
	if s.chain, sealed, err = newAuditChain(sl); err != nil {
		return err
	}
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		var entries, projects, tokens, keys int64
		err := scanRow(ctx, tx, "starting the audit trail", []any{&entries, &projects, &tokens, &keys}, `
			SELECT (SELECT coalesce(max(seq), 0) FROM audit), (SELECT coalesce(max(seq), 0) FROM projects),
				(SELECT coalesce(max(seq), 0) FROM tokens), (SELECT coalesce(max(seq), 0) FROM management_keys)`)
		if err != nil {
			return auditEvent{}, err
		}
		if entries > 0 {
			return auditEvent{}, errors.New("the audit trail has entries, but its key was removed from the database; " +
				"restore a backup with llm-proxy restore FILE")
		}
		if bound && projects+tokens+keys > 0 {
			return auditEvent{}, errors.New("the audit trail and its key were removed from the database; " +
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

// A binding binds a row that grants something to the audit entry of the change that wrote it.
type binding struct {
	boundBy int64 // seq of that entry
	mac     []byte
}

// A boundContent is what the MAC of a row covers. values is nil for a row that grants nothing.
type boundContent struct {
	*binding
	kind, id  string // as in the actions and objects of audit entries
	projectID string // the project with which the row ends; "" if none
	values    []any
}

// A grantingRow is a row that grants something: a token, a management key, a project, an upstream, a share of one,
// or a session.
type grantingRow interface{ bound() boundContent }

// bind gives a row its MAC. Every statement that writes a grantingRow is preceded by it.
func (tx *auditedTx) bind(row grantingRow) {
	b := row.bound()
	*b.binding = binding{tx.seq, []byte{}}
	if b.values != nil {
		b.mac = tx.chain.bindingMAC(&b)
	}
}

// bindingMAC returns the MAC of a row. Its label is longer than the two numbers before the label of an audit
// entry, so no entry has the same bytes.
func (c *auditChain) bindingMAC(b *boundContent) []byte {
	texts := []string{strconv.FormatInt(b.boundBy, 10), b.id, b.projectID}
	for _, v := range b.values {
		text := ""
		switch v := v.(type) {
		case string:
			text = v
		case []byte:
			text = string(v)
		case *int64:
			if v != nil {
				text = strconv.FormatInt(*v, 10)
			}
		default: // a number or a bool
			text = fmt.Sprint(v)
		}
		texts = append(texts, text)
	}
	return c.mac("row that grants: "+b.kind, nil, texts...)
}

// A foreignRowError says that a row grants something, but this program did not write it, or it was replaced since.
// For those who look for the row, it does not exist.
type foreignRowError struct{ kind, id, reason string }

func (e *foreignRowError) Error() string { return e.kind + " " + e.id + " " + e.reason }

func (e *foreignRowError) Unwrap() error { return errNotFound }

// checkBinding returns a *foreignRowError for a row that must not grant what it says. The row was read through db,
// in the same transaction. It costs some microseconds, so rows are checked when they are loaded, not at each call.
func (s *store) checkBinding(ctx context.Context, db querier, row grantingRow) error {
	b := row.bound()
	if b.values == nil {
		return nil
	}
	if s.chain == nil {
		return errAuditNotOpen
	}
	reason := "was changed, or was not written by this program"
	if hmac.Equal(s.chain.bindingMAC(&b), b.mac) {
		later, err := laterChange(ctx, db, &b)
		if err != nil || later == 0 {
			return err
		}
		reason = fmt.Sprintf("was put back as it was before entry %d of the audit trail", later)
	}
	err := &foreignRowError{b.kind, b.id, reason}
	if s.reportForeignRow != nil {
		s.reportForeignRow(err)
	}
	return err
}

// queryBoundRow is queryRow for a row whose binding is checked.
func queryBoundRow[T any, P interface {
	*T
	grantingRow
}](ctx context.Context, s *store, columns func(*T) []any, query string, args ...any) (row T, err error) {
	err = s.withReadTx(ctx, func(db querier) error {
		if row, err = queryRow(ctx, db, columns, query, args...); err != nil {
			return err
		}
		return s.checkBinding(ctx, db, P(&row))
	})
	return row, err
}

// withReadTx runs fn with one view of the database, which changes of others meanwhile do not alter.
func (s *store) withReadTx(ctx context.Context, fn func(querier) error) error {
	options := sql.TxOptions{ReadOnly: true}
	if s.backend != nil {
		options.Isolation = sql.LevelRepeatableRead
	}
	tx, err := s.readDB.BeginTx(ctx, &options)
	if err != nil {
		return fmt.Errorf("beginning to read: %w", err)
	}
	defer tx.Rollback() // there is nothing to commit
	return fn(tx)
}

// laterChange returns the seq of an audit entry that says that a row was written, or ended, after it was bound;
// 0 if there is none.
func laterChange(ctx context.Context, db querier, b *boundContent) (int64, error) {
	revokedWith := "" // the action on a project that ends the row too, besides its deletion
	if b.kind == "token" {
		revokedWith = "project.revoke_tokens"
	}
	return queryValue[int64](ctx, db, "comparing a row with the audit trail", `
		SELECT coalesce(
			(SELECT seq FROM audit WHERE object = ?1 AND +seq > ?2 AND action IN (?3 || '.create', ?3 || '.change',
				?3 || '.rotate', ?3 || '.revoke', ?3 || '.delete') LIMIT 1),
			(SELECT seq FROM audit WHERE object = ?4 AND +seq > ?2 AND action IN ('project.delete', ?5) LIMIT 1),
			(SELECT seq FROM audit WHERE action = 'database.restore' AND +seq > ?2 LIMIT 1), 0)`,
		b.id, b.boundBy, b.kind, b.projectID, revokedWith)
}

// The setting keyCheckSetting proves that an encryption key is the right one. Version 2 also says that the rows of
// the database are bound (store_audit.go).
const (
	keyCheckSetting      = "key_check"
	keyCheckContext      = "llm-proxy key check v1"
	boundKeyCheckContext = "llm-proxy key check v2"
)

// sealKeyCheck returns the value of keyCheckSetting, in version 2 if the rows are bound.
func sealKeyCheck(sl *sealer, bound bool) string {
	context := keyCheckContext
	if bound {
		context = boundKeyCheckContext
	}
	return base64.StdEncoding.EncodeToString(sl.seal(newSecret("llm-proxy"), context))
}

// openKeyCheck checks a value of keyCheckSetting, and reports whether it is of version 2.
func openKeyCheck(sl *sealer, check string) (bound bool, err error) {
	sealed, err := base64.StdEncoding.DecodeString(check)
	if err != nil {
		return false, errUnseal
	}
	if _, err = sl.open(sealed, boundKeyCheckContext); err == nil {
		return true, nil
	}
	_, err = sl.open(sealed, keyCheckContext)
	return false, err
}

// rowsAreBound reports whether the rows of the database are bound. The record of the encryption key says so: that
// cannot be made without the key, and without it there is no first start in a database that has rows.
func (s *store) rowsAreBound(ctx context.Context, sl *sealer) (bool, error) {
	check, err := s.setting(ctx, keyCheckSetting)
	if err != nil {
		return false, fmt.Errorf("reading the key check: %w", err)
	}
	return openKeyCheck(sl, check)
}

const actionBind = "database.bind"

// bindAll binds all rows of a database from before rows were bound, and records that in the key check.
func (s *store) bindAll(ctx context.Context, sl *sealer, origin auditOrigin) error {
	return s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		n, err := queryValue[int64](ctx, tx, "looking for an earlier binding",
			`SELECT count(*) FROM audit WHERE action = 'database.bind'`)
		if err == nil && n > 0 {
			err = errors.New("an old record of the encryption key was put back into the database, as if its rows had " +
				"never been bound; restore a backup with llm-proxy restore FILE")
		}
		if err != nil {
			return auditEvent{}, err
		}
		counts := map[string]int64{}
		err = eachGrantingRow(ctx, tx, func(row grantingRow) error {
			tx.bind(row)
			counts[row.bound().kind]++
			return saveBinding(ctx, tx, row)
		})
		if err != nil {
			return auditEvent{}, err
		}
		event := auditEvent{actionBind, "", []auditField{{"projects", counts["project"]}, {"tokens", counts["token"]},
			{"management_keys", counts["key"]}}}
		return event, saveSetting(ctx, tx, keyCheckSetting, sealKeyCheck(sl, true))
	})
}

// rebind binds all rows that are bound rightly to the entry of tx, so that none from before can be put back. Foreign
// rows stay as they are.
func (s *store) rebind(ctx context.Context, tx *auditedTx) error {
	return eachGrantingRow(ctx, tx, func(row grantingRow) error {
		err := s.checkBinding(ctx, tx, row)
		if _, foreign := errors.AsType[*foreignRowError](err); foreign {
			return nil
		}
		if err != nil {
			return err
		}
		tx.bind(row)
		return saveBinding(ctx, tx, row)
	})
}

// foreignRows checks every row that grants something. It returns the first problems, up to limit, and how many
// there are.
func (s *store) foreignRows(ctx context.Context, limit int) (problems []string, n int, err error) {
	err = s.withReadTx(ctx, func(db querier) error {
		return eachGrantingRow(ctx, db, func(row grantingRow) error {
			err := s.checkBinding(ctx, db, row)
			if e, ok := errors.AsType[*foreignRowError](err); ok {
				if n++; n <= limit {
					problems = append(problems, e.Error())
				}
				return nil
			}
			return err
		})
	})
	return problems, n, err
}

// eachGrantingRow calls visit for every row that grants something.
func eachGrantingRow(ctx context.Context, db querier, visit func(grantingRow) error) error {
	return errors.Join(
		visitRows(ctx, db, (*tokenRow).columns, func(t *tokenRow) (int64, error) { return t.seq, visit(t) },
			selectTokens+`WHERE seq > ? AND revoked_at IS NULL ORDER BY seq LIMIT 1000`),
		visitRows(ctx, db, (*managementKeyRow).columns,
			func(k *managementKeyRow) (int64, error) { return k.seq, visit(k) },
			selectManagementKeys+`WHERE seq > ? AND revoked_at IS NULL ORDER BY seq LIMIT 1000`),
		visitRows(ctx, db, (*projectRow).columns, func(p *projectRow) (int64, error) { return p.seq, visit(p) },
			selectProjects+`WHERE seq > ? AND deleted_at IS NULL ORDER BY seq LIMIT 1000`),
		visitRows(ctx, db, (*upstreamRow).columns, func(u *upstreamRow) (int64, error) { return u.seq, visit(u) },
			selectUpstreams+`WHERE seq > ? AND deleted_at IS NULL ORDER BY seq LIMIT 1000`),
		visitRows(ctx, db, (*shareRow).columns, func(r *shareRow) (int64, error) { return math.MaxInt64, visit(r) },
			selectShares+`WHERE s.upstream > ?`),
		visitRows(ctx, db, (*sessionRow).columns, func(r *sessionRow) (int64, error) { return math.MaxInt64, visit(r) },
			selectSessions+`WHERE s.created_at > ?1`))
}

// visitRows calls visit, which returns the row's seq, for the rows of a query that returns them in pages after a
// seq.
func visitRows[T any](ctx context.Context, db querier, columns func(*T) []any, visit func(*T) (int64, error),
	query string) error {
	for after := int64(0); ; {
		page, err := collect(ctx, db, "reading rows to check", columns, query, after)
		if err != nil || len(page) == 0 {
			return err
		}
		for i := range page {
			if after, err = visit(&page[i]); err != nil {
				return err
			}
		}
	}
}

// saveBinding writes only the binding of a row.
func saveBinding(ctx context.Context, tx *auditedTx, row grantingRow) (err error) {
	const doing = "binding a row"
	b := row.bound()
	switch r := row.(type) {
	case *tokenRow:
		err = execute(ctx, tx, doing, `UPDATE tokens SET bound_by = ?, mac = ? WHERE seq = ?`,
			b.boundBy, b.mac, r.seq)
	case *managementKeyRow:
		err = execute(ctx, tx, doing, `UPDATE management_keys SET bound_by = ?, mac = ? WHERE seq = ?`,
			b.boundBy, b.mac, r.seq)
	case *projectRow:
		err = execute(ctx, tx, doing, `UPDATE projects SET bound_by = ?, mac = ? WHERE seq = ?`,
			b.boundBy, b.mac, r.seq)
	case *upstreamRow:
		err = execute(ctx, tx, doing, `UPDATE upstreams SET bound_by = ?, mac = ? WHERE seq = ?`,
			b.boundBy, b.mac, r.seq)
	case *shareRow:
		err = execute(ctx, tx, doing, `UPDATE upstream_shares SET bound_by = ?, mac = ?
			WHERE upstream = ? AND project = ?`, b.boundBy, b.mac, r.upstream, r.project)
	case *sessionRow:
		err = execute(ctx, tx, doing, `UPDATE sessions SET bound_by = ?, mac = ? WHERE hash = ?`,
			b.boundBy, b.mac, r.hash)
	}
	return err
}

const actionRekey = "database.rekey"

// sealedSettings are the settings with a sealed value, and what each value is bound to.
func sealedSettings() map[string]string {
	return map[string]string{
		keyCheckSetting: boundKeyCheckContext, "audit_key": auditKeyContext, contentKeySetting: contentKeyContext}
}

// countSealedKeys counts the provider keys.
func (s *store) countSealedKeys(ctx context.Context) (int64, error) {
	return queryValue[int64](ctx, s.readDB, "counting provider keys",
		`SELECT count(*) FROM upstreams WHERE length(sealed_key) > 0`)
}

// reseal seals with to what from has sealed: all of it, or nothing. It returns the number of provider keys.
// What the old key sealed is overwritten in the file, because that key may leak later.
func (s *store) reseal(ctx context.Context, origin auditOrigin, from, to *sealer,
	originOf func(baseURL string) (string, error)) (n int64, err error) {
	if s.backend == nil {
		if err := execute(ctx, s.writeDB, "asking for deleted data to be overwritten",
			`PRAGMA secure_delete = 1`); err != nil {
			return 0, err
		}
	}
	err = s.withAuditedTx(ctx, origin, func(tx *auditedTx) (auditEvent, error) {
		for name, aad := range sealedSettings() {
			if err := resealSetting(ctx, tx, name, aad, from, to); err != nil {
				return auditEvent{}, fmt.Errorf("the setting %s: %w", name, err)
			}
		}
		if n, err = s.resealUpstreams(ctx, tx, from, to, originOf); err != nil {
			return auditEvent{}, err
		}
		if err := resealWebhooks(ctx, tx, from, to); err != nil {
			return auditEvent{}, err
		}
		if s.backend == nil {
			if err := rewriteSealed(ctx, tx); err != nil {
				return auditEvent{}, err
			}
		}
		return auditEvent{actionRekey, "", []auditField{{"key", [2]string{from.id(), to.id()}}, {"upstreams", n}}}, nil
	})
	if err == nil && s.backend != nil {
		err = s.backend.vacuum(ctx)
	}
	return n, err
}

// rewriteSealed writes the tables with sealed values once more, into pages of their own. When rows moved within a
// table earlier, copies of them stayed in unused parts of its pages; the pages are overwritten when they are freed.
func rewriteSealed(ctx context.Context, tx querier) error {
	_, err := execEach(ctx, tx, "overwriting old values", []string{
		`CREATE TEMP TABLE resealed AS SELECT * FROM upstreams`,
		`DELETE FROM upstreams`,
		`INSERT INTO upstreams SELECT * FROM temp.resealed`,
		`DROP TABLE temp.resealed`,
		`CREATE TEMP TABLE resealed AS SELECT * FROM settings`,
		`DELETE FROM settings`,
		`INSERT INTO settings SELECT * FROM temp.resealed`,
		`DROP TABLE temp.resealed`,
		`CREATE TEMP TABLE resealed AS SELECT * FROM webhooks`,
		`DELETE FROM webhooks`,
		`INSERT INTO webhooks SELECT * FROM temp.resealed`,
		`DROP TABLE temp.resealed`,
	})
	return err
}

func resealSetting(ctx context.Context, tx querier, name, aad string, from, to *sealer) error {
	text, err := queryValue[string](ctx, tx, "reading it", `SELECT value FROM settings WHERE name = ?`, name)
	if errors.Is(err, errNotFound) {
		return nil // not set yet
	}
	if err != nil {
		return err
	}
	sealed, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return errUnseal
	}
	plain, err := from.open(sealed, aad)
	if err != nil {
		return err
	}
	return saveSetting(ctx, tx, name, base64.StdEncoding.EncodeToString(to.seal(plain, aad)))
}

func (s *store) resealUpstreams(ctx context.Context, tx *auditedTx, from, to *sealer,
	originOf func(string) (string, error)) (int64, error) {
	all, err := collect(ctx, tx, "reading provider keys", (*upstreamRow).columns,
		selectUpstreams+`WHERE length(sealed_key) > 0 ORDER BY seq`)
	if err != nil {
		return 0, err
	}
	for i := range all {
		u := &all[i]
		origin, err := originOf(u.baseURL)
		if err != nil {
			return 0, fmt.Errorf("upstream %s of project %s: base URL %w", u.id, u.projectID, err)
		}
		aad := sealContext(u.id, u.projectID, origin)
		plain, err := from.open(u.sealedKey, aad)
		if err != nil {
			return 0, fmt.Errorf("upstream %s of project %s: %w; nothing was changed. "+
				"Enter its provider key again, or delete it, then repeat", u.id, u.projectID, err)
		}
		isBound := s.checkBinding(ctx, tx, u) == nil
		if u.sealedKey = to.seal(plain, aad); isBound { // to the same entry: a row of another size would move
			b := u.bound()
			u.mac = tx.chain.bindingMAC(&b)
		}
		if err := execute(ctx, tx, "writing upstream "+u.id, `
			UPDATE upstreams SET sealed_key = ?, mac = ? WHERE seq = ?`, u.sealedKey, u.mac, u.seq); err != nil {
			return 0, err
		}
	}
	return int64(len(all)), nil
}
