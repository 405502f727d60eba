// SQL that reads single calls of the ledger.
package main

import (
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
)

// A requestView is a row of the ledger with the ids and names of what it names.
type requestView struct {
	requestRow
	projectID, tokenID, upstreamID       string
	projectName, tokenName, upstreamName string
	nullCost                             *int64
	nullFirstByteUS, nullTotalUS         *int64
}

const requestColumns = `r.id, r.started_at, coalesce(p.id, ''), coalesce(t.id, ''), coalesce(u.id, ''),
	coalesce(p.name, ''), coalesce(t.name, ''), coalesce(u.name, ''), r.endpoint, r.model, r.stream, r.address,
	r.status, r.outcome, r.error_code, r.usage_source, r.input_tokens, r.cached_tokens, r.cache_write_tokens,
	r.output_tokens, r.reasoning_tokens, r.cost, r.first_byte_us, r.total_us, r.attempts, r.cache, r.limit_hit, r.attempt_log`

const requestJoins = ` LEFT JOIN projects p ON p.seq = r.project
	LEFT JOIN tokens t ON t.seq = r.token LEFT JOIN upstreams u ON u.seq = r.upstream `

const (
	selectRunning = `SELECT ` + requestColumns + ` FROM running r` + requestJoins
	selectEnded   = `SELECT ` + requestColumns + ` FROM requests r` + requestJoins
)

func (v *requestView) scan(row interface{ Scan(...any) error }) error {
	return mapNoRows(row.Scan(&v.id, &v.started, &v.projectID, &v.tokenID, &v.upstreamID,
		&v.projectName, &v.tokenName, &v.upstreamName, &v.endpoint, &v.model, &v.stream, &v.address,
		&v.status, &v.outcome, &v.errorCode, &v.source, &v.counts.input, &v.counts.cached, &v.counts.cacheWrite,
		&v.counts.output, &v.counts.reasoning, &v.nullCost, &v.nullFirstByteUS, &v.nullTotalUS, &v.attempts, &v.cache, &v.limitHit, &v.attemptLog))
}

// requestByID returns a call, running or ended, or errNotFound.
func (s *store) requestByID(ctx context.Context, id int64) (v requestView, err error) {
	const ended = selectEnded + `WHERE r.id = ?`
	for _, query := range [...]string{ended, selectRunning + `WHERE r.batch <= ?1 AND r.id = ?1`, ended} { // it may end in between
		if err = v.scan(s.readDB.QueryRowContext(ctx, query, id)); !errors.Is(err, errNotFound) {
			break
		}
	}
	return v, err
}

// A requestFilter says which calls a list holds. Ids are a range of time. Empty
// texts and zeros let all calls through.
type requestFilter struct {
	project, token           string // ids
	outcome, model, endpoint string
	statusFrom, statusTo     int   // statusFrom <= status < statusTo
	from, before             int64 // ids: from <= id < before
	limit                    int
}

// needsScan reports whether the filter asks for more than an index can tell: calls
// that it does not let through are looked at, then, and may be many.
func (f *requestFilter) needsScan() bool {
	return f.outcome != "" || f.model != "" || f.endpoint != "" || f.statusTo != 0 || f.token != "" && f.project != ""
}

// maxScannedRequests is how many calls are looked at for one page of a list.
const maxScannedRequests = 20_000

// requestsPage returns up to f.limit calls, newest first, and the id before which
// the list goes on, 0 if it does not. For a filter that few calls pass a page can
// be short, or empty, and the list still goes on: so that none takes long.
func (s *store) requestsPage(ctx context.Context, f requestFilter) (rows []requestView, next int64, err error) {
	limit, first := f.limit, f.from
	f.limit++
	if f.needsScan() {
		if f.from, err = s.scanStart(ctx, &f, maxScannedRequests); err != nil {
			return nil, 0, err
		}
	}
	if rows, err = s.listRequests(ctx, f); err != nil {
		return nil, 0, err
	}
	switch {
	case len(rows) > limit:
		return rows[:limit], rows[limit-1].id, nil
	case f.from > first:
		return rows, f.from, nil
	}
	return rows, 0, nil
}

// scanStart returns the id of the last of the latest most calls of f's project or
// token: f.from if there are not so many.
func (s *store) scanStart(ctx context.Context, f *requestFilter, most int) (from int64, err error) {
	const head, tail = `SELECT count(*), coalesce(min(id), 0) FROM (SELECT id FROM requests WHERE `, ` AND id >= ?2 AND id < ?3 ORDER BY id DESC LIMIT ?4)`
	query, scope := head+`?1 = ''`+tail, ""
	switch {
	case f.token != "":
		query, scope = head+`token = (SELECT seq FROM tokens WHERE id = ?1)`+tail, f.token
	case f.project != "":
		query, scope = head+`project = (SELECT seq FROM projects WHERE id = ?1)`+tail, f.project
	}
	n := 0
	if err := s.readDB.QueryRowContext(ctx, query, scope, f.from, f.before, most).Scan(&n, &from); err != nil {
		return 0, fmt.Errorf("listing calls: %w", err)
	}
	if n < most {
		from = f.from
	}
	return from, nil
}

// listRequests returns up to f.limit calls, running and ended, newest first.
func (s *store) listRequests(ctx context.Context, f requestFilter) ([]requestView, error) {
	const tail = ` AND r.id >= ?2 AND r.id < ?3 AND (?4 = '' OR r.outcome = ?4)
		AND (?6 = '' OR r.project = (SELECT seq FROM projects WHERE id = ?6)) AND (?7 = '' OR r.model = ?7)
		AND (?8 = '' OR r.endpoint = ?8) AND (?10 = 0 OR r.status >= ?9 AND r.status < ?10) ORDER BY r.id DESC LIMIT ?5`
	const ofToken, ofProject = `r.token = (SELECT seq FROM tokens WHERE id = ?1)`, `r.project = (SELECT seq FROM projects WHERE id = ?1)`
	const begun = `r.batch < ?3 AND ` // a note of an earlier call is in no later batch
	running, ended, scope := selectRunning+`WHERE `+begun+`?1 = ''`+tail, selectEnded+`WHERE ?1 = ''`+tail, ""
	switch {
	case f.token != "":
		running, ended, scope = selectRunning+`WHERE `+begun+ofToken+tail, selectEnded+`WHERE `+ofToken+tail, f.token
	case f.project != "":
		running, ended, scope = selectRunning+`WHERE `+begun+ofProject+tail, selectEnded+`WHERE `+ofProject+tail, f.project
	}
	list := func(out []requestView, query string) ([]requestView, error) {
		rows, err := s.readDB.QueryContext(ctx, query, scope, f.from, f.before, f.outcome, f.limit, f.project, f.model, f.endpoint, f.statusFrom, f.statusTo)
		if err != nil {
			return nil, fmt.Errorf("listing calls: %w", err)
		}
		defer rows.Close()
		for rows.Next() {
			var v requestView
			if err := v.scan(rows); err != nil {
				return nil, fmt.Errorf("listing calls: %w", err)
			}
			out = append(out, v)
		}
		return out, rows.Err()
	}
	var out []requestView
	var err error
	if f.statusTo == 0 && (f.outcome == "" || f.outcome == string(outcomeOpen)) { // which running ones have
		if out, err = list(nil, running); err != nil {
			return nil, err
		}
	}
	open := len(out)
	// After the running ones: a call that ends in between is in both lists, and in
	// the order of the sort its row comes last.
	if out, err = list(out, ended); err != nil || open == 0 {
		return out, err
	}
	slices.SortStableFunc(out, func(a, b requestView) int { return cmp.Compare(b.id, a.id) })
	for i := len(out) - 1; i > 0; i-- {
		if out[i].id == out[i-1].id {
			out = slices.Delete(out, i-1, i)
		}
	}
	return out[:min(len(out), f.limit)], nil
}

const contentStatement = `
	INSERT INTO contents (id, project, until, request, request_bytes, answer, answer_bytes) VALUES (?, ?, ?, ?, ?, ?, ?)
	ON CONFLICT DO NOTHING`

// contentByID returns what is kept of a call at now, or errNotFound.
func (s *store) contentByID(ctx context.Context, id, now int64) (*contentRow, error) {
	c := &contentRow{id: id}
	err := s.readDB.QueryRowContext(ctx, `
		SELECT project, until, request, request_bytes, answer, answer_bytes FROM contents WHERE id = ? AND until > ?`, id, now).
		Scan(&c.project, &c.expiresAt, &c.request, &c.requestBytes, &c.response, &c.responseBytes)
	if err != nil {
		return nil, mapNoRows(err)
	}
	return c, nil
}

// contentExpiry returns until when content of a call is kept, 0 if none is.
func (s *store) contentExpiry(ctx context.Context, id int64) (until int64, err error) {
	err = s.readDB.QueryRowContext(ctx, `SELECT until FROM contents WHERE id = ?`, id).Scan(&until)
	if err = mapNoRows(err); errors.Is(err, errNotFound) {
		return 0, nil
	}
	return until, err
}

// deleteExpiredContents deletes up to limit contents that are kept until now or less,
// and returns how many.
func (s *store) deleteExpiredContents(ctx context.Context, now int64, limit int) (int64, error) {
	return s.deleteContents(ctx, `
		DELETE FROM contents WHERE id IN (SELECT id FROM contents WHERE until <= ? ORDER BY until LIMIT ?)`, now, limit)
}

// deleteOldestContents deletes up to limit contents, of the oldest calls first.
func (s *store) deleteOldestContents(ctx context.Context, limit int) (int64, error) {
	return s.deleteContents(ctx, `
		DELETE FROM contents WHERE id IN (SELECT id FROM contents WHERE id > ? ORDER BY id LIMIT ?)`, 0, limit)
}

// deleteProjectContents deletes up to limit contents of a project.
func (s *store) deleteProjectContents(ctx context.Context, project int64, limit int) (int64, error) {
	return s.deleteContents(ctx, `
		DELETE FROM contents WHERE id IN (SELECT id FROM contents WHERE project = ? ORDER BY id LIMIT ?)`, project, limit)
}

func (s *store) deleteContents(ctx context.Context, text string, of int64, limit int) (int64, error) {
	res, err := s.writeDB.ExecContext(ctx, text, of, limit)
	if err != nil {
		return 0, fmt.Errorf("deleting contents: %w", err)
	}
	return res.RowsAffected()
}

// listUnhealthy returns the health of every upstream in use that is not well.
func (s *store) listUnhealthy(ctx context.Context) ([]healthRow, error) {
	rows, err := s.readDB.QueryContext(ctx, `
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
	if !r.state.needsAttention() && !told.needsAttention() || r.state == told {
		return s.withTx(ctx, func(tx *sql.Tx) error { return writeHealth(ctx, tx, r) })
	}
	detail := []auditField{{"state", [2]string{told.String(), r.state.String()}}, {"reason", r.reason}}
	return s.withAuditedTx(ctx, auditOrigin{actorID: actorSystem, at: now}, func(tx *sql.Tx) (auditEvent, error) {
		return auditEvent{"upstream.health", r.id, detail}, writeHealth(ctx, tx, r)
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
