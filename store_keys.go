// SQL for management keys and for the prices that the operator sets.
package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
)

// A keyRow is a management key as stored.
type keyRow struct {
	seq                  int64
	id, name             string
	hash                 []byte
	role                 string
	expiresAt, revokedAt *int64
	version              int64
	createdAt, updatedAt int64
}

const keyColumns = `seq, id, name, hash, role, expires_at, revoked_at, version, created_at, updated_at`

func (k *keyRow) scan(row interface{ Scan(...any) error }) error {
	return found(row.Scan(&k.seq, &k.id, &k.name, &k.hash, &k.role, &k.expiresAt, &k.revokedAt, &k.version, &k.createdAt, &k.updatedAt))
}

func (s *store) addKey(ctx context.Context, by origin, k *keyRow) error {
	return s.change(ctx, by, func(tx *sql.Tx) (act, error) {
		err := tx.QueryRowContext(ctx, `
			INSERT INTO management_keys (id, name, hash, role, expires_at, created_at, updated_at) VALUES (?, ?, ?, ?, ?, ?, ?)
			RETURNING seq, version`, k.id, k.name, k.hash, k.role, k.expiresAt, k.createdAt, k.updatedAt).Scan(&k.seq, &k.version)
		return act{"key.create", k.id, changes(nil, k.facts())}, unique(err)
	})
}

// facts are what the audit trail says of a management key.
func (k *keyRow) facts() []fact {
	return []fact{{"name", k.name}, {"role", k.role}, {"expires_at", factTime(k.expiresAt)}, {"revoked_at", factTime(k.revokedAt)}}
}

func (s *store) keyByHash(ctx context.Context, hash [32]byte) (k keyRow, err error) {
	err = k.scan(s.read.QueryRowContext(ctx, `SELECT `+keyColumns+` FROM management_keys WHERE hash = ?`, hash[:]))
	return k, err
}

func (s *store) keyByID(ctx context.Context, id string) (k keyRow, err error) {
	err = k.scan(s.read.QueryRowContext(ctx, `SELECT `+keyColumns+` FROM management_keys WHERE id = ?`, id))
	return k, err
}

// countKeys counts revoked and expired ones too.
func (s *store) countKeys(ctx context.Context) (n int64, err error) {
	err = s.read.QueryRowContext(ctx, `SELECT count(*) FROM management_keys`).Scan(&n)
	return n, err
}

func (s *store) listKeys(ctx context.Context, after int64, limit int) ([]keyRow, error) {
	rows, err := s.read.QueryContext(ctx, `
		SELECT `+keyColumns+` FROM management_keys WHERE seq > ? ORDER BY seq LIMIT ?`, after, limit)
	if err != nil {
		return nil, fmt.Errorf("listing management keys: %w", err)
	}
	defer rows.Close()
	var out []keyRow
	for rows.Next() {
		var k keyRow
		if err := k.scan(rows); err != nil {
			return nil, fmt.Errorf("listing management keys: %w", err)
		}
		out = append(out, k)
	}
	return out, rows.Err()
}

// changeKey is changeProject for management keys.
func (s *store) changeKey(ctx context.Context, by origin, id string, version, now int64, change func(*keyRow) error) (k keyRow, err error) {
	err = s.change(ctx, by, func(tx *sql.Tx) (act, error) {
		if err := k.scan(tx.QueryRowContext(ctx, `SELECT `+keyColumns+` FROM management_keys WHERE id = ?`, id)); err != nil {
			return act{}, err
		}
		if version != 0 && version != k.version {
			return act{}, errStale
		}
		was := k
		if err := change(&k); err != nil {
			return act{}, err
		}
		k.version, k.updatedAt = k.version+1, now
		_, err := tx.ExecContext(ctx, `
			UPDATE management_keys SET name = ?, role = ?, expires_at = ?, revoked_at = ?, version = ?, updated_at = ? WHERE seq = ?`,
			k.name, k.role, k.expiresAt, k.revokedAt, k.version, k.updatedAt, k.seq)
		action := "key.change"
		if k.revokedAt != nil {
			action = "key.revoke"
		}
		return act{action, k.id, changes(was.facts(), k.facts())}, err
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
	return found(row.Scan(&p.seq, &p.id, &p.match, &p.input, &p.cachedInput, &p.cacheWrite, &p.output, &p.audioInput, &p.audioOutput, &p.updatedAt))
}

// setPrice stores a price, in place of one with the same match, whose id then
// stays.
func (s *store) setPrice(ctx context.Context, by origin, p *priceRow) error {
	return s.change(ctx, by, func(tx *sql.Tx) (act, error) {
		var was priceRow
		var before []fact
		err := was.scan(tx.QueryRowContext(ctx, `SELECT `+priceColumns+` FROM prices WHERE match = ?`, p.match))
		if err == nil {
			before = was.facts()
		} else if !errors.Is(err, errNotFound) {
			return act{}, err
		}
		err = p.scan(tx.QueryRowContext(ctx, `
			INSERT INTO prices (id, match, input, cached_input, cache_write, output, audio_input, audio_output, updated_at)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
			ON CONFLICT (match) DO UPDATE SET input = excluded.input, cached_input = excluded.cached_input,
				cache_write = excluded.cache_write, output = excluded.output, audio_input = excluded.audio_input,
				audio_output = excluded.audio_output, updated_at = excluded.updated_at
			RETURNING `+priceColumns,
			p.id, p.match, p.input, p.cachedInput, p.cacheWrite, p.output, p.audioInput, p.audioOutput, p.updatedAt))
		return act{"price.set", p.id, changes(before, p.facts())}, err
	})
}

func (s *store) deletePrice(ctx context.Context, by origin, id string) error {
	return s.change(ctx, by, func(tx *sql.Tx) (act, error) {
		var was priceRow
		err := was.scan(tx.QueryRowContext(ctx, `DELETE FROM prices WHERE id = ? RETURNING `+priceColumns, id))
		return act{"price.delete", id, changes(was.facts(), nil)}, err
	})
}

// facts are what the audit trail says of a price.
func (p *priceRow) facts() []fact {
	return []fact{{"match", p.match}, {"input", factDollars(p.input)}, {"cached_input", factDollars(p.cachedInput)},
		{"cache_write", factDollars(p.cacheWrite)}, {"output", factDollars(p.output)},
		{"audio_input", factDollars(p.audioInput)}, {"audio_output", factDollars(p.audioOutput)}}
}

func (s *store) listPrices(ctx context.Context) ([]priceRow, error) {
	rows, err := s.read.QueryContext(ctx, `SELECT `+priceColumns+` FROM prices ORDER BY match LIMIT 10000`)
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
