// This file has the SQL for management keys and for the prices that administrators set. Every change goes
// through withAuditedTx: without an audit entry there is no change.
package main

import (
	"context"
	"database/sql"
	"errors"
)

// A managementKeyRow is a management key as stored.
type managementKeyRow struct {
	seq                  int64
	id, name             string
	hash                 []byte
	role                 string
	expiresAt, revokedAt *int64
	version              int64
	createdAt, updatedAt int64
}

const (
	managementKeyEditable = `name, role, expires_at, revoked_at, version, updated_at`
	selectManagementKeys  = `SELECT seq, id, hash, created_at, ` + managementKeyEditable + ` FROM management_keys `
)

// editable returns the columns that a change may write.
func (k *managementKeyRow) editable() []any {
	return []any{&k.name, &k.role, &k.expiresAt, &k.revokedAt, &k.version, &k.updatedAt}
}

func (k *managementKeyRow) columns() []any {
	return append([]any{&k.seq, &k.id, &k.hash, &k.createdAt}, k.editable()...)
}

func (k *managementKeyRow) versionFields() (version, updatedAt *int64) {
	return &k.version, &k.updatedAt
}

// auditFields are what the audit trail records of a management key.
func (k *managementKeyRow) auditFields() []auditField {
	return []auditField{{"name", k.name}, {"role", k.role}, {"expires_at", auditTime(k.expiresAt)},
		{"revoked_at", auditTime(k.revokedAt)}}
}

// addManagementKey stores a new key and fills in what the database decides.
func (s *store) addManagementKey(ctx context.Context, origin auditOrigin, k *managementKeyRow) error {
	return s.withAuditedTx(ctx, origin, func(tx *sql.Tx) (auditEvent, error) {
		k.version = 1
		err := tx.QueryRowContext(ctx, `
			INSERT INTO management_keys (id, hash, created_at, `+managementKeyEditable+`)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) RETURNING seq`,
			k.columns()[1:]...).Scan(&k.seq)
		return auditEvent{"key.create", k.id, diffAuditFields(nil, k.auditFields())}, mapUniqueViolation(err)
	})
}

func (s *store) managementKeyByHash(ctx context.Context, hash [32]byte) (managementKeyRow, error) {
	return queryRow(ctx, s.readDB, (*managementKeyRow).columns, selectManagementKeys+`WHERE hash = ?`, hash[:])
}

func (s *store) managementKeyByID(ctx context.Context, id string) (managementKeyRow, error) {
	return managementKeyByID(ctx, s.readDB, id)
}

func managementKeyByID(ctx context.Context, db querier, id string) (managementKeyRow, error) {
	return queryRow(ctx, db, (*managementKeyRow).columns, selectManagementKeys+`WHERE id = ?`, id)
}

// countManagementKeys counts revoked and expired ones too.
func (s *store) countManagementKeys(ctx context.Context) (int64, error) {
	return queryValue[int64](ctx, s.readDB, "counting management keys", `SELECT count(*) FROM management_keys`)
}

func (s *store) listManagementKeys(ctx context.Context, after int64, limit int) ([]managementKeyRow, error) {
	return collect(ctx, s.readDB, "listing management keys", (*managementKeyRow).columns,
		selectManagementKeys+`WHERE seq > ? ORDER BY seq LIMIT ?`, after, limit)
}

// changeManagementKey is changeRow for a management key.
func (s *store) changeManagementKey(ctx context.Context, origin auditOrigin, id string, version, now int64,
	edit func(*managementKeyRow) error) (managementKeyRow, error) {
	load := func(tx *sql.Tx) (managementKeyRow, error) { return managementKeyByID(ctx, tx, id) }
	save := func(tx *sql.Tx, old, k *managementKeyRow) (auditEvent, error) {
		_, err := tx.ExecContext(ctx, `
			UPDATE management_keys SET (`+managementKeyEditable+`) = (?, ?, ?, ?, ?, ?) WHERE seq = ?`,
			append(k.editable(), k.seq)...)
		action := "key.change"
		if k.revokedAt != nil {
			action = "key.revoke"
		}
		return auditEvent{action, k.id, diffAuditFields(old.auditFields(), k.auditFields())}, err
	}
	return changeRow(ctx, s, origin, version, now, load, edit, save)
}

// A priceRow is a price that an administrator set; nil: none for that kind.
type priceRow struct {
	seq                                                             int64
	id, match                                                       string
	input, cachedInput, cacheWrite, output, audioInput, audioOutput *int64
	updatedAt                                                       int64
}

const priceColumns = `id, match, input, cached_input, cache_write, output, audio_input, audio_output, updated_at`

func (p *priceRow) columns() []any {
	return []any{&p.id, &p.match, &p.input, &p.cachedInput, &p.cacheWrite, &p.output, &p.audioInput, &p.audioOutput,
		&p.updatedAt}
}

// auditFields are what the audit trail records of a price.
func (p *priceRow) auditFields() []auditField {
	return []auditField{{"match", p.match}, {"input", auditDollars(p.input)},
		{"cached_input", auditDollars(p.cachedInput)},
		{"cache_write", auditDollars(p.cacheWrite)}, {"output", auditDollars(p.output)},
		{"audio_input", auditDollars(p.audioInput)}, {"audio_output", auditDollars(p.audioOutput)}}
}

// setPrice stores a price. It replaces one with the same match, whose id stays.
func (s *store) setPrice(ctx context.Context, origin auditOrigin, p *priceRow) error {
	return s.withAuditedTx(ctx, origin, func(tx *sql.Tx) (auditEvent, error) {
		var oldFields []auditField
		old, err := queryRow(ctx, tx, (*priceRow).columns, `
			SELECT `+priceColumns+` FROM prices WHERE match = ?`, p.match)
		if err == nil {
			oldFields = old.auditFields()
		} else if !errors.Is(err, errNotFound) {
			return auditEvent{}, err
		}
		err = tx.QueryRowContext(ctx, `
			INSERT INTO prices (`+priceColumns+`) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
			ON CONFLICT (match) DO UPDATE SET input = excluded.input, cached_input = excluded.cached_input,
				cache_write = excluded.cache_write, output = excluded.output, audio_input = excluded.audio_input,
				audio_output = excluded.audio_output, updated_at = excluded.updated_at
			RETURNING id`, p.columns()...).Scan(&p.id)
		return auditEvent{"price.set", p.id, diffAuditFields(oldFields, p.auditFields())}, err
	})
}

func (s *store) deletePrice(ctx context.Context, origin auditOrigin, id string) error {
	return s.withAuditedTx(ctx, origin, func(tx *sql.Tx) (auditEvent, error) {
		old, err := queryRow(ctx, tx, (*priceRow).columns, `
			DELETE FROM prices WHERE id = ? RETURNING `+priceColumns, id)
		return auditEvent{"price.delete", id, diffAuditFields(old.auditFields(), nil)}, err
	})
}

func (s *store) listPrices(ctx context.Context) ([]priceRow, error) {
	return collect(ctx, s.readDB, "listing prices", (*priceRow).columns,
		`SELECT `+priceColumns+` FROM prices ORDER BY match LIMIT 10000`)
}
