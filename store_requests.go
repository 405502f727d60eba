// This file has the SQL that reads single calls of the ledger, and their stored content. store_ledger.go
// writes them.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
)

// A requestView is a row of the ledger with the ids and names of the project, token and upstream that it
// refers to.
type requestView struct {
	requestRow
	projectID, tokenID, upstreamID       string
	projectName, tokenName, upstreamName string
	nullCost                             *int64
	nullFirstByteUS, nullTotalUS         *int64
}

const requestColumns = `r.id, r.started_at, coalesce(p.id, ''), coalesce(t.id, ''), coalesce(u.id, ''),
	coalesce(p.name, ''), coalesce(t.name, ''), coalesce(u.name, ''), r.endpoint, r.model, r.stream, r.address,
	r.status, r.outcome, r.error_code, coalesce(g.usage_source, r.usage_source),
	coalesce(g.input_tokens, r.input_tokens), coalesce(g.cached_tokens, r.cached_tokens),
	coalesce(g.cache_write_tokens, r.cache_write_tokens), coalesce(g.output_tokens, r.output_tokens),
	coalesce(g.reasoning_tokens, r.reasoning_tokens), coalesce(g.cost, r.cost), r.first_byte_us, r.total_us,
	r.attempts, r.cache, r.limit_hit,
	r.attempt_log, r.saved, r.saved_us`

const requestJoins = ` LEFT JOIN projects p ON p.seq = r.project
	LEFT JOIN tokens t ON t.seq = r.token LEFT JOIN upstreams u ON u.seq = r.upstream
	LEFT JOIN background g ON g.call = r.id AND g.usage_source <> '' `

const (
	selectRunning = `SELECT ` + requestColumns + ` FROM running r` + requestJoins
	selectEnded   = `SELECT ` + requestColumns + ` FROM requests r` + requestJoins
)

func (v *requestView) columns() []any {
	return []any{&v.id, &v.started, &v.projectID, &v.tokenID, &v.upstreamID,
		&v.projectName, &v.tokenName, &v.upstreamName, &v.endpoint, &v.model, &v.stream, &v.address,
		&v.status, &v.outcome, &v.errorCode, &v.source, &v.counts.input, &v.counts.cached, &v.counts.cacheWrite,
		&v.counts.output, &v.counts.reasoning, &v.nullCost, &v.nullFirstByteUS, &v.nullTotalUS, &v.attempts, &v.cache,
		&v.limitHit, &v.attemptLog, &v.saved, &v.savedUS}
}

// requestByID returns a call, running or ended, or errNotFound.
func (s *store) requestByID(ctx context.Context, id int64) (v requestView, err error) {
	const ended = selectEnded + `WHERE r.id = ?`
	// A call may end between the first two.
	for _, query := range [...]string{ended, selectRunning + `WHERE r.batch <= ?1 AND r.id = ?1`, ended} {
		if v, err = queryRow(ctx, s.readDB, (*requestView).columns, query, id); !errors.Is(err, errNotFound) {
			break
		}
	}
	return v, err
}

// cacheHit and cacheNone say whether the response cache answered a call.
const (
	cacheHit  = "hit"
	cacheNone = "none" // "" in the table
)

// A requestFilter says which calls a list has. Empty strings and zeros let all calls through.
type requestFilter struct {
	project, token           string // ids
	outcome, model, endpoint string
	cache                    string // cacheHit or cacheNone
	statusFrom, statusTo     int    // statusFrom <= status < statusTo
	from, before             int64  // ids, and so a range of time: from <= id < before
	limit                    int
}

// needsScan reports whether the filter has a condition that no index covers: calls that do not meet it are
// read too, and they may be many.
func (f *requestFilter) needsScan() bool {
	return f.outcome != "" || f.model != "" || f.endpoint != "" || f.statusTo != 0 || f.cache != "" ||
		f.token != "" && f.project != ""
}

// maxScannedRequests is how many calls are read for one page of a list.
const maxScannedRequests = 20_000

// requestsPage returns up to f.limit calls, newest first, and the id before which the next page begins, 0 if
// there is none. For a filter that few calls meet, a page can be short or empty although there is a next
// one, so that no page takes long.
func (s *store) requestsPage(ctx context.Context, f requestFilter) (rows []requestView, next int64, err error) {
	limit, from := f.limit, f.from
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
	case f.from > from:
		return rows, f.from, nil
	}
	return rows, 0, nil
}

// scanStart returns the id of the oldest of the latest limit calls of f's project or token, or f.from if
// there are fewer.
func (s *store) scanStart(ctx context.Context, f *requestFilter, limit int) (from int64, err error) {
	const head = `SELECT count(*), coalesce(min(id), 0) FROM (SELECT id FROM requests WHERE `
	const tail = ` AND id >= ?2 AND id < ?3 ORDER BY id DESC LIMIT ?4)`
	query, scope := head+`?1 = ''`+tail, ""
	switch {
	case f.token != "":
		query, scope = head+`token = (SELECT seq FROM tokens WHERE id = ?1)`+tail, f.token
	case f.project != "":
		query, scope = head+`project = (SELECT seq FROM projects WHERE id = ?1)`+tail, f.project
	}
	n := 0
	if err := s.readDB.QueryRowContext(ctx, query, scope, f.from, f.before, limit).Scan(&n, &from); err != nil {
		return 0, fmt.Errorf("listing calls: %w", err)
	}
	if n < limit {
		from = f.from
	}
	return from, nil
}

// listRequests returns up to f.limit calls, running and ended, newest first.
func (s *store) listRequests(ctx context.Context, f requestFilter) ([]requestView, error) {
	const tail = ` AND r.id >= ?2 AND r.id < ?3 AND (?4 = '' OR r.outcome = ?4)
		AND (?6 = '' OR r.project = (SELECT seq FROM projects WHERE id = ?6)) AND (?7 = '' OR r.model = ?7)
		AND (?8 = '' OR r.endpoint = ?8) AND (?10 = 0 OR r.status >= ?9 AND r.status < ?10)
		AND (?11 = '' OR (r.cache = 'hit') = (?11 = 'hit')) ORDER BY r.id DESC LIMIT ?5`
	const ofToken = `r.token = (SELECT seq FROM tokens WHERE id = ?1)`
	const ofProject = `r.project = (SELECT seq FROM projects WHERE id = ?1)`
	const fromRunning = selectRunning + `WHERE r.batch < ?3 AND ` // no later batch has an earlier call
	const fromEnded = selectEnded + `WHERE `
	running, ended, scope := fromRunning+`?1 = ''`+tail, fromEnded+`?1 = ''`+tail, ""
	switch {
	case f.token != "":
		running, ended, scope = fromRunning+ofToken+tail, fromEnded+ofToken+tail, f.token
	case f.project != "":
		running, ended, scope = fromRunning+ofProject+tail, fromEnded+ofProject+tail, f.project
	}
	list := func(query string) ([]requestView, error) {
		return collect(ctx, s.readDB, "listing calls", (*requestView).columns, query,
			scope, f.from, f.before, f.outcome, f.limit, f.project, f.model, f.endpoint, f.statusFrom, f.statusTo,
			f.cache)
	}
	var out []requestView
	if f.statusTo == 0 && (f.outcome == "" || f.outcome == string(outcomeOpen)) { // running calls can match
		var err error
		if out, err = list(running); err != nil {
			return nil, err
		}
	}
	// Read after the running ones: a call that ends in between is in both lists, and the sort puts its row
	// last.
	rows, err := list(ended)
	if err != nil || len(out) == 0 {
		return rows, err
	}
	out = append(out, rows...)
	slices.SortStableFunc(out, func(a, b requestView) int { return cmp.Compare(b.id, a.id) })
	for i := len(out) - 1; i > 0; i-- {
		if out[i].id == out[i-1].id {
			out = slices.Delete(out, i-1, i)
		}
	}
	return out[:min(len(out), f.limit)], nil
}

const contentColumns = `id, project, until, request, request_bytes, answer, answer_bytes`

func (c *contentRow) columns() []any {
	return []any{&c.id, &c.project, &c.expiresAt, &c.request, &c.requestBytes, &c.response, &c.responseBytes}
}

const insertContent = `
	INSERT INTO contents (` + contentColumns + `) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING`

// contentByID returns the content that is stored of a call at now, or errNotFound.
func (s *store) contentByID(ctx context.Context, id, now int64) (*contentRow, error) {
	c, err := queryRow(ctx, s.readDB, (*contentRow).columns, `
		SELECT `+contentColumns+` FROM contents WHERE id = ? AND until > ?`, id, now)
	return &c, err
}

// contentExpiry returns when the content of a call expires, 0 if none is stored.
func (s *store) contentExpiry(ctx context.Context, id int64) (int64, error) {
	return queryValue[int64](ctx, s.readDB, "reading when content expires",
		`SELECT coalesce((SELECT until FROM contents WHERE id = ?), 0)`, id)
}

// deleteExpiredContents deletes up to limit contents that expire at now or earlier, and returns how many.
func (s *store) deleteExpiredContents(ctx context.Context, now int64, limit int) (int64, error) {
	return execCount(ctx, s.writeDB, "deleting expired content", `
		DELETE FROM contents WHERE id IN (SELECT id FROM contents WHERE until <= ? ORDER BY until LIMIT ?)`, now, limit)
}

// deleteOldestContents deletes up to limit contents, those of the oldest calls first.
func (s *store) deleteOldestContents(ctx context.Context, limit int) (int64, error) {
	return execCount(ctx, s.writeDB, "deleting the oldest content", `
		DELETE FROM contents WHERE id IN (SELECT id FROM contents WHERE id > 0 ORDER BY id LIMIT ?)`, limit)
}

// deleteProjectContents deletes up to limit contents of a project.
func (s *store) deleteProjectContents(ctx context.Context, project int64, limit int) (int64, error) {
	return execCount(ctx, s.writeDB, "deleting a project's content", `
		DELETE FROM contents WHERE id IN (SELECT id FROM contents WHERE project = ? ORDER BY id LIMIT ?)`,
		project, limit)
}

// pendingUsage returns, as the usage of a call, what a response has used whose usage is not known yet: who made it, and
// what was reserved. The response was made in the project, or at the upstream. It returns errNotFound if there is none.
func (s *store) pendingUsage(ctx context.Context, project, upstream int64, response string) (requestRow, error) {
	return queryRow(ctx, s.readDB, (*requestRow).pendingColumns, selectPending+`
		WHERE response = ?1 AND (project = ?2 OR upstream = ?3) AND usage_source = '' ORDER BY project <> ?2 LIMIT 1`,
		response, project, upstream)
}

// expiredUsage returns up to limit such responses of calls with an id below before.
func (s *store) expiredUsage(ctx context.Context, before int64, limit int) ([]requestRow, error) {
	return collect(ctx, s.readDB, "listing background responses", (*requestRow).pendingColumns, selectPending+`
		WHERE usage_source = '' AND call < ? ORDER BY call LIMIT ?`, before, limit)
}

// reservedSince returns what was reserved for background responses whose usage is not known, of calls with an id of
// from or above, of a token or, with token 0, of a whole project. Their calls are in the sums, without usage.
func (s *store) reservedSince(ctx context.Context, project, token, from int64) ([]pastUsage, error) {
	return collect(ctx, s.readDB, "reading what background responses have reserved", func(u *pastUsage) []any {
		return []any{&u.endpoint, &u.requestedModel, &u.inputTokens, &u.outputTokens, &u.nanosUSD}
	}, `
		SELECT endpoint, CASE asked_tracked WHEN 1 THEN asked ELSE ? END, reserved_input, reserved_output, reserved_cost
		FROM background WHERE usage_source = '' AND project = ? AND ? IN (0, token) AND call >= ?`,
		otherModels, project, token, from)
}

const selectPending = `SELECT call, call >> 21, project, token, upstream, endpoint, outcome, model, model_tracked,
	asked, asked_tracked, reserved_input, reserved_output, reserved_cost FROM background`

func (r *requestRow) pendingColumns() []any {
	return []any{&r.usageOf, &r.started, &r.project, &r.token, &r.upstream, &r.endpoint, &r.outcome, &r.model,
		&r.modelTracked, &r.requestedModel, &r.requestedModelTracked, &r.reservedInput, &r.reservedOutput,
		&r.reservedCost}
}
