// SQL for what is known of provider keys that are not well.
package main

import (
	"context"
	"database/sql"
	"fmt"
)

// allHealth returns the health of every upstream in use that is not well.
func (s *store) allHealth(ctx context.Context) ([]healthRow, error) {
	rows, err := s.read.QueryContext(ctx, `
		SELECT h.upstream, u.id, h.state, h.until, h.strikes, h.reason, h.changed_at
		FROM upstream_health h JOIN upstreams u ON u.seq = h.upstream WHERE u.deleted_at IS NULL LIMIT 100000`)
	if err != nil {
		return nil, fmt.Errorf("reading the health of upstreams: %w", err)
	}
	defer rows.Close()
	var out []healthRow
	for rows.Next() {
		var r healthRow
		var state string
		if err := rows.Scan(&r.upstream, &r.id, &state, &r.until, &r.strikes, &r.reason, &r.changedAt); err != nil {
			return nil, fmt.Errorf("reading the health of upstreams: %w", err)
		}
		for i, name := range keyStateNames() {
			if name == state {
				r.state = keyState(i)
			}
		}
		out = append(out, r)
	}
	return out, rows.Err()
}

// setHealth stores a key's health; a ready one's row goes. What is serious, or
// no longer is, goes into the audit trail with it: told is what that has.
func (s *store) setHealth(ctx context.Context, now int64, r *healthRow, told keyState) error {
	if !r.state.serious() && !told.serious() || r.state == told {
		return s.tx(ctx, func(tx *sql.Tx) error { return writeHealth(ctx, tx, r) })
	}
	detail := []fact{{"state", [2]string{told.String(), r.state.String()}}, {"reason", r.reason}}
	return s.change(ctx, origin{actor: actorSystem, at: now}, func(tx *sql.Tx) (act, error) {
		return act{"upstream.health", r.id, detail}, writeHealth(ctx, tx, r)
	})
}

func writeHealth(ctx context.Context, tx *sql.Tx, r *healthRow) error {
	if r.state == keyReady {
		_, err := tx.ExecContext(ctx, `DELETE FROM upstream_health WHERE upstream = ?`, r.upstream)
		return err
	}
	_, err := tx.ExecContext(ctx, `
		INSERT INTO upstream_health (upstream, state, until, strikes, reason, changed_at) VALUES (?, ?, ?, ?, ?, ?)
		ON CONFLICT (upstream) DO UPDATE SET state = excluded.state, until = excluded.until, strikes = excluded.strikes,
			reason = excluded.reason, changed_at = excluded.changed_at`,
		r.upstream, r.state.String(), r.until, r.strikes, r.reason, r.changedAt)
	return err
}
