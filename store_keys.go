// SQL for management keys and for the prices that the operator sets.
package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
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

const managementKeyColumns = `seq, id, name, hash, role, expires_at, revoked_at, version, created_at, updated_at`

func (k *managementKeyRow) scan(row interface{ Scan(...any) error }) error {
	return mapNoRows(row.Scan(&k.seq, &k.id, &k.name, &k.hash, &k.role, &k.expiresAt, &k.revokedAt, &k.version, &k.createdAt, &k.updatedAt))
}

func (s *store) addManagementKey(ctx context.Context, by auditOrigin, k *managementKeyRow) error {
	return s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		err := tx.QueryRowContext(ctx, `
			INSERT INTO management_keys (id, name, hash, role, expires_at, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?)
			RETURNING seq, version`, k.id, k.name, k.hash, k.role, k.expiresAt, k.createdAt, k.updatedAt).Scan(&k.seq, &k.version)
		return auditEvent{"key.create", k.id, diffAuditFields(nil, k.auditFields())}, mapUniqueViolation(err)
	})
}

// auditFields are what the audit trail says of a management key.
func (k *managementKeyRow) auditFields() []auditField {
	return []auditField{{"name", k.name}, {"role", k.role}, {"expires_at", auditTime(k.expiresAt)}, {"revoked_at", auditTime(k.revokedAt)}}
}

func (s *store) managementKeyByHash(ctx context.Context, hash [32]byte) (k managementKeyRow, err error) {
	err = k.scan(s.readDB.QueryRowContext(ctx, `SELECT `+managementKeyColumns+` FROM management_keys WHERE hash = ?`, hash[:]))
	return k, err
}

func (s *store) managementKeyByID(ctx context.Context, id string) (k managementKeyRow, err error) {
	err = k.scan(s.readDB.QueryRowContext(ctx, `SELECT `+managementKeyColumns+` FROM management_keys WHERE id = ?`, id))
	return k, err
}

// countManagementKeys counts revoked and expired ones too.
func (s *store) countManagementKeys(ctx context.Context) (n int64, err error) {
	err = s.readDB.QueryRowContext(ctx, `SELECT count(*) FROM management_keys`).Scan(&n)
	return n, err
}

func (s *store) listManagementKeys(ctx context.Context, after int64, limit int) ([]managementKeyRow, error) {
	rows, err := s.readDB.QueryContext(ctx, `
		SELECT `+managementKeyColumns+` FROM management_keys WHERE seq > ? ORDER BY seq LIMIT ?`, after, limit)
	if err != nil {
		return nil, fmt.Errorf("listing management keys: %w", err)
	}
	defer rows.Close()
	var out []managementKeyRow
	for rows.Next() {
		var k managementKeyRow
		if err := k.scan(rows); err != nil {
			return nil, fmt.Errorf("listing management keys: %w", err)
		}
		out = append(out, k)
	}
	return out, rows.Err()
}

// rekeyDatabase is changeProject for management keys.
func (s *store) changeManagementKey(ctx context.Context, by auditOrigin, id string, version, now int64, change func(*managementKeyRow) error) (k managementKeyRow, err error) {
	err = s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		if err := k.scan(tx.QueryRowContext(ctx, `SELECT `+managementKeyColumns+` FROM management_keys WHERE id = ?`, id)); err != nil {
			return auditEvent{}, err
		}
		if version != 0 && version != k.version {
			return auditEvent{}, errStale
		}
		was := k
		if err := change(&k); err != nil {
			return auditEvent{}, err
		}
		k.version, k.updatedAt = k.version+1, now
		_, err := tx.ExecContext(ctx, `
			UPDATE management_keys SET name = ?, role = ?, expires_at = ?, revoked_at = ?, version = ?, updated_at = ? WHERE seq = ?`,
			k.name, k.role, k.expiresAt, k.revokedAt, k.version, k.updatedAt, k.seq)
		action := "key.change"
		if k.revokedAt != nil {
			action = "key.revoke"
		}
		return auditEvent{action, k.id, diffAuditFields(was.auditFields(), k.auditFields())}, err
	})
	return k, err
}

// A priceRow is a price that the operator set; nil: none for that kind.
type priceRow struct {
	seq                                                             int64
	id, match                                                       string
	input, cachedInput, cacheWrite, output, audioInput, audioOutput *int64
	updatedAt                                                       int64
}

const priceColumns = `seq, id, match, input, cached_input, cache_write, output, audio_input, audio_output, updated_at`

func (p *priceRow) scan(row interface{ Scan(...any) error }) error {
	return mapNoRows(row.Scan(&p.seq, &p.id, &p.match, &p.input, &p.cachedInput, &p.cacheWrite, &p.output, &p.audioInput, &p.audioOutput, &p.updatedAt))
}

// setPrice stores a price, in place of one with the same match, whose id then
// stays.
func (s *store) setPrice(ctx context.Context, by auditOrigin, p *priceRow) error {
	return s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		var was priceRow
		var before []auditField
		err := was.scan(tx.QueryRowContext(ctx, `SELECT `+priceColumns+` FROM prices WHERE match = ?`, p.match))
		if err == nil {
			before = was.auditFields()
		} else if !errors.Is(err, errNotFound) {
			return auditEvent{}, err
		}
		err = p.scan(tx.QueryRowContext(ctx, `
			INSERT INTO prices (id, match, input, cached_input, cache_write, output, audio_input, audio_output, updated_at)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
			ON CONFLICT (match) DO UPDATE SET input = excluded.input, cached_input = excluded.cached_input,
				cache_write = excluded.cache_write, output = excluded.output, audio_input = excluded.audio_input,
				audio_output = excluded.audio_output, updated_at = excluded.updated_at
			RETURNING `+priceColumns,
			p.id, p.match, p.input, p.cachedInput, p.cacheWrite, p.output, p.audioInput, p.audioOutput, p.updatedAt))
		return auditEvent{"price.set", p.id, diffAuditFields(before, p.auditFields())}, err
	})
}

func (s *store) deletePrice(ctx context.Context, by auditOrigin, id string) error {
	return s.withAuditedTx(ctx, by, func(tx *sql.Tx) (auditEvent, error) {
		var was priceRow
		err := was.scan(tx.QueryRowContext(ctx, `DELETE FROM prices WHERE id = ? RETURNING `+priceColumns, id))
		return auditEvent{"price.delete", id, diffAuditFields(was.auditFields(), nil)}, err
	})
}

// auditFields are what the audit trail says of a price.
func (p *priceRow) auditFields() []auditField {
	return []auditField{{"match", p.match}, {"input", auditDollars(p.input)}, {"cached_input", auditDollars(p.cachedInput)},
		{"cache_write", auditDollars(p.cacheWrite)}, {"output", auditDollars(p.output)},
		{"audio_input", auditDollars(p.audioInput)}, {"audio_output", auditDollars(p.audioOutput)}}
}

func (s *store) listPrices(ctx context.Context) ([]priceRow, error) {
	rows, err := s.readDB.QueryContext(ctx, `SELECT `+priceColumns+` FROM prices ORDER BY match LIMIT 10000`)
	if err != nil {
		return nil, fmt.Errorf("listing prices: %w", err)
	}
	defer rows.Close()
	var out []priceRow
	for rows.Next() {
		var p priceRow
		if err := p.scan(rows); err != nil {
			return nil, fmt.Errorf("listing prices: %w", err)
		}
		out = append(out, p)
	}
	return out, rows.Err()
}
