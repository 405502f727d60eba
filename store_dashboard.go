// SQL for the dashboard. Each statement reads one short range, or one a project:
// sums of days where a period has many, and of all projects together where that
// is what is asked. Rows of the ledger are read only up to a bound.
package main

import (
	"context"
	"database/sql"
	"fmt"
)

// An amount is what charts are made of.
type amount struct{ calls, tokens, cost int64 }

func (a *amount) add(o amount) {
	a.calls += o.calls
	a.tokens += o.tokens
	a.cost += o.cost
}

// A share is the part of a project, token, model or endpoint in an amount.
type share struct {
	seq             int64  // of a project
	id, name, label string // label is of a token its project's name, of a project "deleted" if it is
	amount
}

// A step is an amount at a time, of a model or, where there is none, of all.
type step struct {
	at    int64
	model string
	amount
}

// hourSlots adds up the hours of a project, or of all together (0), in steps of
// length ms from from on, until to.
func (s *store) hourSlots(ctx context.Context, project, from, to, length int64) ([]hourSum, error) {
	st, err := s.read.PrepareContext(ctx, `SELECT `+hourTotals+` FROM project_hours WHERE project = ? AND at >= ? AND at < ?`)
	if err != nil {
		return nil, fmt.Errorf("adding up hours: %w", err)
	}
	defer st.Close()
	var out []hourSum
	for at := from; at < to; at += length {
		var h hourSum
		if err := st.QueryRowContext(ctx, project, at, min(at+length, to)).Scan(h.fields()...); err != nil {
			return nil, fmt.Errorf("adding up hours: %w", err)
		}
		out = append(out, h)
	}
	return out, nil
}

// stepsByModel returns what each model has of each hour or day (grain) of a
// project, or of all together (0).
func (s *store) stepsByModel(ctx context.Context, grain string, project, from, to int64) ([]step, error) {
	return readSteps(s.read.QueryContext(ctx, `
		SELECT at, model, sum(calls), sum(input_tokens + output_tokens), sum(cost) FROM usage_sums
		WHERE grain = ? AND project = ? AND token = 0 AND at >= ? AND at < ? GROUP BY at, model`, grain, project, from, to))
}

// stepsOfHours and stepsOfDays return what a project has of each hour or day.
func (s *store) stepsOfHours(ctx context.Context, project, from, to int64) ([]step, error) {
	return readSteps(s.read.QueryContext(ctx, `
		SELECT at, '', calls, input_tokens + output_tokens, cost FROM project_hours
		WHERE project = ? AND at >= ? AND at < ?`, project, from, to))
}

func (s *store) stepsOfDays(ctx context.Context, project, from, to int64) ([]step, error) {
	return readSteps(s.read.QueryContext(ctx, `
		SELECT at, '', calls, input_tokens + output_tokens, cost FROM usage_sums
		WHERE grain = 'token' AND project = ? AND token = 0 AND at >= ? AND at < ?`, project, from, to))
}

func readSteps(rows *sql.Rows, err error) ([]step, error) {
	if err != nil {
		return nil, fmt.Errorf("reading steps: %w", err)
	}
	defer rows.Close()
	var out []step
	for rows.Next() {
		var v step
		if err := rows.Scan(&v.at, &v.model, &v.calls, &v.tokens, &v.cost); err != nil {
			return nil, fmt.Errorf("reading steps: %w", err)
		}
		out = append(out, v)
	}
	return out, rows.Err()
}

// sharesByEndpoint returns what each endpoint has of a project, or of all (0).
func (s *store) sharesByEndpoint(ctx context.Context, grain string, project, from, to int64) ([]share, error) {
	return readShares(s.read.QueryContext(ctx, `
		SELECT 0, '', endpoint, '', sum(calls), sum(input_tokens + output_tokens), sum(cost) FROM usage_sums
		WHERE grain = ? AND project = ? AND token = 0 AND at >= ? AND at < ? GROUP BY endpoint`, grain, project, from, to))
}

// sharesByProjectHours and sharesByProjectDays return what each project has, in
// no order. One with no calls is not among them.
func (s *store) sharesByProjectHours(ctx context.Context, from, to int64) ([]share, error) {
	return readShares(s.read.QueryContext(ctx, `
		SELECT p.seq, p.id, p.name, iif(p.deleted_at IS NULL, '', 'deleted'), sum(h.calls), sum(h.input_tokens + h.output_tokens), sum(h.cost)
		FROM projects p CROSS JOIN project_hours h ON h.project = p.seq AND h.at >= ? AND h.at < ? GROUP BY p.seq`, from, to))
}

func (s *store) sharesByProjectDays(ctx context.Context, from, to int64) ([]share, error) {
	return readShares(s.read.QueryContext(ctx, `
		SELECT p.seq, p.id, p.name, iif(p.deleted_at IS NULL, '', 'deleted'), sum(u.calls), sum(u.input_tokens + u.output_tokens), sum(u.cost)
		FROM projects p CROSS JOIN usage_sums u ON u.grain = 'token' AND u.project = p.seq AND u.token = 0 AND u.at >= ? AND u.at < ?
		GROUP BY p.seq`, from, to))
}

// sharesByToken returns what each token of a project has, in no order, or
// errTooMany if more than limit were ever used. id is the project's, "" for all.
// grain is hour, or token: that is days.
func (s *store) sharesByToken(ctx context.Context, grain, id string, from, to int64, limit int) ([]share, error) {
	scopes, err := s.usageScopes(ctx, &usageQuery{project: id, byToken: true, limit: limit})
	if err != nil {
		return nil, err
	}
	st, err := s.read.PrepareContext(ctx, `
		SELECT coalesce(sum(calls), 0), coalesce(sum(input_tokens + output_tokens), 0), coalesce(sum(cost), 0) FROM usage_sums
		WHERE grain = ? AND project = ? AND token = ? AND at >= ? AND at < ?`)
	if err != nil {
		return nil, fmt.Errorf("adding up tokens: %w", err)
	}
	defer st.Close()
	var out []share
	for i := range scopes {
		v := share{id: scopes[i].tokenID, name: scopes[i].tokenName, label: scopes[i].projectName}
		if err := st.QueryRowContext(ctx, grain, scopes[i].project, scopes[i].token, from, to).Scan(&v.calls, &v.tokens, &v.cost); err != nil {
			return nil, fmt.Errorf("adding up tokens: %w", err)
		}
		if v.calls > 0 {
			out = append(out, v)
		}
	}
	return out, nil
}

// sharesOfLatest returns what each token has of the latest limit calls of a
// project (0: of all) with ids from from on and below to.
func (s *store) sharesOfLatest(ctx context.Context, project, from, to int64, limit int) ([]share, error) {
	const tokens = `
		SELECT 0, t.id, t.name, p.name, c.calls, c.tokens, c.cost FROM (
			SELECT token, count(*) AS calls, sum(input_tokens + output_tokens) AS tokens, coalesce(sum(cost), 0) AS cost FROM (
				SELECT token, input_tokens, output_tokens, cost FROM requests `
	const rest = ` ORDER BY id DESC LIMIT ?4) GROUP BY token) c
		JOIN tokens t ON t.seq = c.token JOIN projects p ON p.seq = t.project`
	if project == 0 {
		return readShares(s.read.QueryContext(ctx, tokens+`WHERE ?1 = 0 AND id >= ?2 AND id < ?3`+rest, project, from, to, limit))
	}
	return readShares(s.read.QueryContext(ctx, tokens+`WHERE project = ?1 AND id >= ?2 AND id < ?3`+rest, project, from, to, limit))
}

func readShares(rows *sql.Rows, err error) ([]share, error) {
	if err != nil {
		return nil, fmt.Errorf("reading shares: %w", err)
	}
	defer rows.Close()
	var out []share
	for rows.Next() {
		var v share
		if err := rows.Scan(&v.seq, &v.id, &v.name, &v.label, &v.calls, &v.tokens, &v.cost); err != nil {
			return nil, fmt.Errorf("reading shares: %w", err)
		}
		out = append(out, v)
	}
	return out, rows.Err()
}

// countSince counts calls with ids from from on, up to limit.
func (s *store) countSince(ctx context.Context, project, from int64, limit int) (n int64, err error) {
	const counted = `SELECT count(*) FROM (SELECT 1 FROM requests `
	if project == 0 {
		err = s.read.QueryRowContext(ctx, counted+`WHERE ?1 = 0 AND id >= ?2 LIMIT ?3)`, project, from, limit).Scan(&n)
	} else {
		err = s.read.QueryRowContext(ctx, counted+`WHERE project = ?1 AND id >= ?2 LIMIT ?3)`, project, from, limit).Scan(&n)
	}
	if err != nil {
		return 0, fmt.Errorf("counting calls: %w", err)
	}
	return n, nil
}

// expiringTokens returns up to limit tokens that expire in from <= t < to, the
// first to expire first.
func (s *store) expiringTokens(ctx context.Context, from, to int64, limit int) (out []tokenNote, err error) {
	rows, err := s.read.QueryContext(ctx, `
		SELECT t.id, t.name, p.name, p.id, t.expires_at FROM tokens t JOIN projects p ON p.seq = t.project
		WHERE t.revoked_at IS NULL AND t.expires_at >= ? AND t.expires_at < ? AND p.deleted_at IS NULL ORDER BY t.expires_at LIMIT ?`, from, to, limit)
	if err != nil {
		return nil, fmt.Errorf("listing tokens that expire: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var n tokenNote
		if err := rows.Scan(&n.id, &n.name, &n.project, &n.projectID, &n.at); err != nil {
			return nil, fmt.Errorf("listing tokens that expire: %w", err)
		}
		out = append(out, n)
	}
	return out, rows.Err()
}

// A tokenNote is a token that deserves a look, and when something happens to it.
type tokenNote struct {
	id, name, project, projectID string
	at                           int64
}

// projectNames returns the ids and names of up to limit projects, by name.
func (s *store) projectNames(ctx context.Context, limit int) ([]share, error) {
	return readShares(s.read.QueryContext(ctx, `
		SELECT seq, id, name, '', 0, 0, 0 FROM projects WHERE deleted_at IS NULL ORDER BY name LIMIT ?`, limit))
}

// A keyTrouble is an upstream whose key is not well.
type keyTrouble struct {
	project, projectID, upstream string
	state, reason                string
	until, since                 int64
}

// keyTroubles returns the upstreams in use that are left out at now, those that
// need somebody's help first.
func (s *store) keyTroubles(ctx context.Context, now int64, limit int) ([]keyTrouble, error) {
	rows, err := s.read.QueryContext(ctx, `
		SELECT p.name, p.id, u.name, h.state, h.reason, h.until, h.changed_at
		FROM upstream_health h JOIN upstreams u ON u.seq = h.upstream JOIN projects p ON p.seq = u.project
		WHERE u.deleted_at IS NULL AND u.is_active = 1 AND p.deleted_at IS NULL AND (h.state <> 'cooling' OR h.until > ?)
		ORDER BY CASE h.state WHEN 'quarantined' THEN 0 WHEN 'exhausted' THEN 1 WHEN 'open' THEN 2 ELSE 3 END, h.changed_at LIMIT ?`, now, limit)
	if err != nil {
		return nil, fmt.Errorf("reading which keys are not well: %w", err)
	}
	defer rows.Close()
	var out []keyTrouble
	for rows.Next() {
		var v keyTrouble
		if err := rows.Scan(&v.project, &v.projectID, &v.upstream, &v.state, &v.reason, &v.until, &v.since); err != nil {
			return nil, fmt.Errorf("reading which keys are not well: %w", err)
		}
		out = append(out, v)
	}
	return out, rows.Err()
}
