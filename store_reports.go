// SQL that reads the ledger: single calls and sums. Sums never touch rows.
package main

import (
	"context"
	"fmt"
)

// A requestView is a row of the ledger with the ids of what it names.
type requestView struct {
	requestRow
	projectID, tokenID, upstreamID string
	costKnown                      *int64
	firstByte, total               *int64
}

const requestColumns = `r.id, r.started_at, coalesce(p.id, ''), coalesce(t.id, ''), coalesce(u.id, ''), r.endpoint, r.model, r.stream, r.address,
	r.status, r.outcome, r.error_code, r.usage_source, r.input_tokens, r.cached_tokens, r.cache_write_tokens,
	r.output_tokens, r.reasoning_tokens, r.cost, r.first_byte_us, r.total_us, r.attempts, r.cache`

const requestTables = ` FROM requests r LEFT JOIN projects p ON p.seq = r.project
	LEFT JOIN tokens t ON t.seq = r.token LEFT JOIN upstreams u ON u.seq = r.upstream `

func (v *requestView) scan(row interface{ Scan(...any) error }) error {
	return found(row.Scan(&v.id, &v.started, &v.projectID, &v.tokenID, &v.upstreamID, &v.endpoint, &v.model, &v.stream, &v.address,
		&v.status, &v.outcome, &v.errorCode, &v.source, &v.counts.input, &v.counts.cached, &v.counts.cacheWrite,
		&v.counts.output, &v.counts.reasoning, &v.costKnown, &v.firstByte, &v.total, &v.attempts, &v.cache))
}

func (s *store) requestByID(ctx context.Context, id int64) (v requestView, err error) {
	err = v.scan(s.read.QueryRowContext(ctx, `SELECT `+requestColumns+requestTables+`WHERE r.id = ?`, id))
	return v, err
}

// A requestFilter says which calls a list holds. Ids are a range of time.
type requestFilter struct {
	project, token string // ids, "" for all
	outcome        string // "" for all
	from, before   int64  // ids: from <= id < before
	limit          int
}

// listRequests returns up to f.limit calls, newest first.
func (s *store) listRequests(ctx context.Context, f requestFilter) ([]requestView, error) {
	const head = `SELECT ` + requestColumns + requestTables
	const tail = ` AND r.id >= ?2 AND r.id < ?3 AND (?4 = '' OR r.outcome = ?4) ORDER BY r.id DESC LIMIT ?5`
	query, scope := head+`WHERE ?1 = ''`+tail, ""
	switch {
	case f.token != "":
		query, scope = head+`WHERE r.token = (SELECT seq FROM tokens WHERE id = ?1)`+tail, f.token
	case f.project != "":
		query, scope = head+`WHERE r.project = (SELECT seq FROM projects WHERE id = ?1)`+tail, f.project
	}
	rows, err := s.read.QueryContext(ctx, query, scope, f.from, f.before, f.outcome, f.limit)
	if err != nil {
		return nil, fmt.Errorf("listing calls: %w", err)
	}
	defer rows.Close()
	var out []requestView
	for rows.Next() {
		var v requestView
		if err := v.scan(rows); err != nil {
			return nil, fmt.Errorf("listing calls: %w", err)
		}
		out = append(out, v)
	}
	return out, rows.Err()
}

// A usageQuery says which sums are added up, and by what.
type usageQuery struct {
	grain                                                      string // "hour" or "day"
	from, to                                                   int64  // unix milliseconds, at the grain's boundaries
	project, token                                             string // ids, "" for all
	byTime, byProject, byToken, byModel, byEndpoint, byOutcome bool
	limit                                                      int
}

// A usageRow is one line of the answer; what it is not grouped by is zero.
type usageRow struct {
	at                       int64
	projectID, projectName   string
	tokenID, tokenName       string
	model, endpoint, outcome string
	sum
}

// usage adds up sums. Which rows it reads depends on whether single tokens
// matter: those of one token and those of whole projects lie together in the
// table's own order, those of all tokens in an index's.
func (s *store) usage(ctx context.Context, q usageQuery) ([]usageRow, error) {
	const head = `
		SELECT g.at, coalesce(p.id, ''), coalesce(p.name, ''), coalesce(t.id, ''), coalesce(t.name, ''), g.model, g.endpoint, g.outcome,
			g.calls, g.input_tokens, g.cached_tokens, g.output_tokens, g.reasoning_tokens, g.cost, g.unpriced_calls, g.estimated_calls, g.total_us
		FROM (
			SELECT CASE WHEN ?1 THEN at ELSE 0 END AS at, CASE WHEN ?2 THEN project ELSE 0 END AS project,
				CASE WHEN ?3 THEN token ELSE 0 END AS token, CASE WHEN ?4 THEN model ELSE '' END AS model,
				CASE WHEN ?5 THEN endpoint ELSE '' END AS endpoint, CASE WHEN ?6 THEN outcome ELSE '' END AS outcome,
				sum(calls) AS calls, sum(input_tokens) AS input_tokens, sum(cached_tokens) AS cached_tokens,
				sum(output_tokens) AS output_tokens, sum(reasoning_tokens) AS reasoning_tokens, sum(cost) AS cost,
				sum(unpriced_calls) AS unpriced_calls, sum(estimated_calls) AS estimated_calls, sum(total_us) AS total_us
			FROM usage_sums `
	const tail = ` AND grain = ?7 AND at >= ?8 AND at < ?9
				AND (?10 = '' OR project = (SELECT seq FROM projects WHERE id = ?10))
			GROUP BY 1, 2, 3, 4, 5, 6 ORDER BY 1, 2, 3, 4, 5, 6 LIMIT ?11
		) g LEFT JOIN projects p ON p.seq = g.project LEFT JOIN tokens t ON t.seq = g.token AND g.token <> 0
		ORDER BY g.at, p.name, t.name, g.model, g.endpoint, g.outcome`
	args := []any{q.byTime, q.byProject, q.byToken, q.byModel, q.byEndpoint, q.byOutcome, q.grain, q.from, q.to, q.project, q.limit}
	query := head + `WHERE token = 0` + tail
	switch {
	case q.token != "":
		query = head + `WHERE token = (SELECT seq FROM tokens WHERE id = ?12)` + tail
		args = append(args, q.token)
	case q.byToken:
		query = head + `INDEXED BY usage_sums_time WHERE token <> 0` + tail
	}
	rows, err := s.read.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("adding up usage: %w", err)
	}
	defer rows.Close()
	var out []usageRow
	for rows.Next() {
		var u usageRow
		if err := rows.Scan(&u.at, &u.projectID, &u.projectName, &u.tokenID, &u.tokenName, &u.model, &u.endpoint, &u.outcome,
			&u.calls, &u.input, &u.cached, &u.output, &u.reasoning, &u.cost, &u.unpriced, &u.estimated, &u.totalUS); err != nil {
			return nil, fmt.Errorf("adding up usage: %w", err)
		}
		out = append(out, u)
	}
	return out, rows.Err()
}
