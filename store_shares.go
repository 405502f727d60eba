// SQL for upstreams that serve other projects beside their own.
package main

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
)

// sharedColumn is the list of projects that an upstream u is shared with, as
// JSON.
const sharedColumn = `(SELECT json_group_array(id) FROM (
		SELECT o.id FROM upstream_shares s JOIN projects o ON o.seq = s.project
		WHERE s.upstream = u.seq AND o.deleted_at IS NULL ORDER BY o.id))`

// servingUpstreams returns the upstreams that a project's calls may go to, its
// own and those shared with it, in the order in which they are preferred.
func (s *store) servingUpstreams(ctx context.Context, project int64) ([]upstreamRow, error) {
	rows, err := s.read.QueryContext(ctx, `
		SELECT `+upstreamColumns+` FROM upstreams u JOIN projects p ON p.seq = u.project
		WHERE u.seq IN (SELECT seq FROM upstreams WHERE project = ?1 UNION SELECT upstream FROM upstream_shares WHERE project = ?1)
			AND u.deleted_at IS NULL
		ORDER BY u.priority, u.seq LIMIT 1000`, project)
	if err != nil {
		return nil, fmt.Errorf("listing a project's upstreams: %w", err)
	}
	defer rows.Close()
	var out []upstreamRow
	for rows.Next() {
		var u upstreamRow
		if err := u.scan(rows); err != nil {
			return nil, fmt.Errorf("listing a project's upstreams: %w", err)
		}
		out = append(out, u)
	}
	return out, rows.Err()
}

// sharers returns the projects that an upstream is shared with.
func (s *store) sharers(ctx context.Context, upstream int64) (seqs []int64, err error) {
	rows, err := s.read.QueryContext(ctx, `SELECT project FROM upstream_shares WHERE upstream = ?`, upstream)
	if err != nil {
		return nil, fmt.Errorf("reading whom an upstream is shared with: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var seq int64
		if err := rows.Scan(&seq); err != nil {
			return nil, fmt.Errorf("reading whom an upstream is shared with: %w", err)
		}
		seqs = append(seqs, seq)
	}
	return seqs, rows.Err()
}

// share writes whom an upstream is shared with, and bumps the versions of all
// projects that this or another change of it concerns.
func (u *upstreamRow) share(ctx context.Context, tx *sql.Tx, now int64) error {
	if err := touchSharers(ctx, tx, u.seq, now); err != nil {
		return err
	}
	var ids []string
	if err := json.Unmarshal([]byte(u.shared), &ids); err != nil {
		return fmt.Errorf("whom upstream %s is shared with: %w", u.id, err)
	}
	if _, err := tx.ExecContext(ctx, `DELETE FROM upstream_shares WHERE upstream = ?`, u.seq); err != nil {
		return err
	}
	for _, id := range ids {
		res, err := tx.ExecContext(ctx, `
			INSERT INTO upstream_shares (upstream, project) SELECT ?1, seq FROM projects WHERE id = ?2 AND deleted_at IS NULL AND seq <> ?3`, u.seq, id, u.project)
		if err != nil {
			return err
		}
		if n, err := res.RowsAffected(); err != nil || n != 1 {
			return &fieldError{"shared_with", "names " + clip(id, 64) + ", which is no other project"}
		}
	}
	return touchSharers(ctx, tx, u.seq, now)
}

func touchSharers(ctx context.Context, tx *sql.Tx, upstream, now int64) error {
	_, err := tx.ExecContext(ctx, `
		UPDATE projects SET version = version + 1, updated_at = ?
		WHERE deleted_at IS NULL AND seq IN (SELECT project FROM upstream_shares WHERE upstream = ?)`, now, upstream)
	return err
}
