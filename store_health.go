// SQL for what is known of provider keys that are not well.
package main

import (
	"context"
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

// setHealth stores a key's health; a ready one's row goes.
func (s *store) setHealth(ctx context.Context, r *healthRow) error {
	if r.state == keyReady {
		_, err := s.write.ExecContext(ctx, `DELETE FROM upstream_health WHERE upstream = ?`, r.upstream)
		return err
	}
	_, err := s.write.ExecContext(ctx, `
		INSERT INTO upstream_health (upstream, state, until, strikes, reason, changed_at) VALUES (?, ?, ?, ?, ?, ?)
		ON CONFLICT (upstream) DO UPDATE SET state = excluded.state, until = excluded.until, strikes = excluded.strikes,
			reason = excluded.reason, changed_at = excluded.changed_at`,
		r.upstream, r.state.String(), r.until, r.strikes, r.reason, r.changedAt)
	return err
}
