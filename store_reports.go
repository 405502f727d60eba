// SQL that adds up sums. They never touch the ledger's rows.
package main

import (
	"cmp"
	"context"
	"database/sql"
	"database/sql/driver"
	"errors"
	"fmt"
	"slices"
	"time"
)

// A usageQuery says which sums are added up, and by what.
type usageQuery struct {
	interval                                           string // hour, day, month or total
	from, to                                           int64  // unix milliseconds: from <= start of the hour or day < to
	project, token                                     string // ids, "" for all
	byProject, byToken, byModel, byEndpoint, byOutcome bool
	limit                                              int // of groups, and of projects and tokens that are looked at
}

// A timeRange is a span of time whose sums are added up into one: all of it, or a
// month. Within hours and days the rows themselves say.
type timeRange struct{ from, to, at int64 }

func (q *usageQuery) timeRanges() (out []timeRange) {
	if q.interval != "month" {
		return []timeRange{{q.from, q.to, 0}}
	}
	for t := time.UnixMilli(q.from).UTC(); t.UnixMilli() < q.to; {
		next := time.Date(t.Year(), t.Month()+1, 1, 0, 0, 0, 0, time.UTC)
		out = append(out, timeRange{t.UnixMilli(), min(next.UnixMilli(), q.to), t.UnixMilli()})
		t = next
	}
	return out
}

// A usageKey is what a line of the answer is about; what it is not grouped by is
// zero.
type usageKey struct {
	at                       int64
	projectID, projectName   string
	tokenID, tokenName       string
	model, endpoint, outcome string
}

type usageRow struct {
	usageKey
	usageSum
}

func (k *usageKey) compare(o *usageKey) int {
	return cmp.Or(cmp.Compare(k.at, o.at), cmp.Compare(k.projectName, o.projectName), cmp.Compare(k.projectID, o.projectID),
		cmp.Compare(k.tokenName, o.tokenName), cmp.Compare(k.tokenID, o.tokenID), cmp.Compare(k.model, o.model),
		cmp.Compare(k.endpoint, o.endpoint), cmp.Compare(k.outcome, o.outcome))
}

var errTooManyRows = errors.New("too many rows")

// usage adds up sums, or returns errTooManyRows. For each project, or each token
// where single tokens matter, it reads one range of the table's own order, in
// which SQLite adds up as it goes: sorting them all together costs many times
// as much.
func (s *store) usage(ctx context.Context, q usageQuery) ([]usageRow, error) {
	scopes, err := s.usageScopes(ctx, &q)
	if err != nil {
		return nil, err
	}
	statement, grain := q.statement()
	st, err := s.readDB.PrepareContext(ctx, statement)
	if err != nil {
		return nil, fmt.Errorf("adding up usage: %w", err)
	}
	defer st.Close()
	groups := map[usageKey]*usageSum{}
	periods := q.timeRanges()
	for i := range scopes {
		if len(groups) > q.limit {
			return nil, errTooManyRows
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		for _, p := range periods {
			if err := q.sumRange(st, grain, &scopes[i], p, groups); err != nil {
				return nil, fmt.Errorf("adding up usage: %w", err)
			}
		}
	}
	if len(groups) > q.limit {
		return nil, errTooManyRows
	}
	out := make([]usageRow, 0, len(groups))
	for k, v := range groups {
		out = append(out, usageRow{k, *v})
	}
	slices.SortFunc(out, func(a, b usageRow) int { return a.compare(&b.usageKey) })
	return out, nil
}

// statement returns the statement that reads no finer than it must, and the
// grain to read.
func (q *usageQuery) statement() (text, grain string) {
	const sums = `sum(calls), sum(input_tokens), sum(cached_tokens), sum(output_tokens), sum(reasoning_tokens),
			sum(cost), sum(unpriced_calls), sum(estimated_calls), sum(would_refuse), sum(total_us)
		FROM usage_sums WHERE grain = ? AND project = ? AND token = ? AND at >= ? AND at < ? `
	if grain = "day"; q.interval == "hour" {
		grain = "hour"
	}
	timed, fine := q.interval == "hour" || q.interval == "day", q.byEndpoint || q.byOutcome
	switch {
	case fine && timed:
		return `SELECT at, model, endpoint, outcome, ` + sums + `GROUP BY at, model, endpoint, outcome`, grain
	case fine:
		return `SELECT 0, model, endpoint, outcome, ` + sums + `GROUP BY model, endpoint, outcome`, grain
	case q.byModel && timed:
		return `SELECT at, model, '', '', ` + sums + `GROUP BY at, model`, grain
	case q.byModel:
		return `SELECT 0, model, '', '', ` + sums + `GROUP BY model`, grain
	}
	if grain == "day" {
		grain = "token" // over all models; token 0 is all of the project's
	}
	if timed {
		return `SELECT at, '', '', '', ` + sums + `GROUP BY at`, grain
	}
	return `SELECT 0, '', '', '', ` + sums + `GROUP BY grain`, grain
}

// A usageScope is a project, or one of its tokens, whose sums are read.
type usageScope struct {
	project, token int64 // token 0: all of the project's together
	usageKey             // its ids and names
}

// sumRange adds a scope's sums of a period to the groups. It reads one short range
// and cannot be cancelled: for what can, the driver starts a goroutine a time.
func (q *usageQuery) sumRange(st *sql.Stmt, grain string, sc *usageScope, p timeRange, groups map[usageKey]*usageSum) error {
	rows, err := st.QueryContext(context.Background(), grain, sc.project, sc.token, p.from, p.to)
	if err != nil {
		return err
	}
	defer rows.Close()
	base := usageKey{}
	if q.byProject {
		base.projectID, base.projectName = sc.projectID, sc.projectName
	}
	if q.byToken {
		base.tokenID, base.tokenName = sc.tokenID, sc.tokenName
	}
	for rows.Next() {
		var v usageSum
		var at int64
		var model, endpoint, outcome string
		if err := rows.Scan(&at, &model, &endpoint, &outcome, &v.calls, &v.input, &v.cached, &v.output, &v.reasoning,
			&v.cost, &v.unpriced, &v.estimated, &v.wouldRefuse, &v.totalUS); err != nil {
			return err
		}
		k := base
		k.at = p.at + at // one of them is 0
		if q.byModel {
			k.model = model
		}
		if q.byEndpoint {
			k.endpoint = endpoint
		}
		if q.byOutcome {
			k.outcome = outcome
		}
		if g := groups[k]; g != nil {
			g.merge(v)
		} else {
			groups[k] = &v
		}
	}
	return rows.Err()
}

// usedTokensCTE lists the tokens of the project with id ?1 ("": of all) that have
// sums of grain ?2, by going from one to the next in the key's order. A row with
// token NULL ends each project.
const usedTokensCTE = `
	WITH RECURSIVE used (project, token) AS (
		SELECT p.seq, (SELECT min(token) FROM usage_sums WHERE grain = ?2 AND project = p.seq AND token > 0)
		FROM projects p WHERE ?1 = '' OR p.id = ?1
		UNION ALL
		SELECT u.project, (SELECT min(token) FROM usage_sums WHERE grain = ?2 AND project = u.project AND token > u.token)
		FROM used u WHERE u.token IS NOT NULL)`

// usageScopes lists what a query reads. Deleted projects are among it.
func (s *store) usageScopes(ctx context.Context, q *usageQuery) ([]usageScope, error) {
	query := `SELECT seq, 0, id, name, '', '' FROM projects WHERE ?1 = '' OR id = ?1 LIMIT ?2`
	args := []any{q.project, q.limit + 1}
	switch {
	case q.token != "":
		query = `SELECT p.seq, t.seq, p.id, p.name, t.id, t.name FROM tokens t JOIN projects p ON p.seq = t.project
			WHERE t.id = ?3 AND (?1 = '' OR p.id = ?1) LIMIT ?2`
		args = append(args, q.token)
	case q.byToken:
		query = usedTokensCTE + ` SELECT p.seq, t.seq, p.id, p.name, t.id, t.name
			FROM used u JOIN projects p ON p.seq = u.project JOIN tokens t ON t.seq = u.token LIMIT ?3`
		args = []any{q.project, "token", q.limit + 1}
	}
	rows, err := s.readDB.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, fmt.Errorf("listing whose usage to add up: %w", err)
	}
	defer rows.Close()
	var out []usageScope
	for rows.Next() {
		var sc usageScope
		if err := rows.Scan(&sc.project, &sc.token, &sc.projectID, &sc.projectName, &sc.tokenID, &sc.tokenName); err != nil {
			return nil, fmt.Errorf("listing whose usage to add up: %w", err)
		}
		out = append(out, sc)
	}
	if len(out) > q.limit {
		return nil, errTooManyRows
	}
	return out, rows.Err()
}

// An hourKey names a row of project_hours.
type hourKey struct{ project, at int64 }

// An hourSum is what a row of project_hours adds up.
type hourSum struct {
	calls, input, output, cost, unpriced int64
	errors                               [errorClassCount]int64
	firstByteLatency, totalLatency       latencyHistogram
}

// hourColumnCount is how many columns an hourSum fills.
const hourColumnCount = 5 + errorClassCount + 2*latencyBuckets

const errorClassCount = 4

// errorColumnClasses are the columns of errors, in their order.
func errorColumnClasses() [errorClassCount]errorClass {
	return [...]errorClass{errorClassCaller, errorClassPolicy, errorClassProvider, errorClassProxy}
}

// add counts a call. s is what the call alone adds to usage_sums.
func (h *hourSum) add(r *requestRow) {
	var s usageSum
	s.add(r)
	h.calls, h.input, h.output, h.cost, h.unpriced = h.calls+1, h.input+s.input, h.output+s.output, h.cost+s.cost, h.unpriced+s.unpriced
	class := r.errorClass()
	for i, c := range errorColumnClasses() {
		if c == class {
			h.errors[i]++
		}
	}
	if r.outcome == outcomeOK && r.attempts > 0 && r.firstByteUS >= 0 {
		h.firstByteLatency.observe(r.firstByteUS)
		h.totalLatency.observe(r.totalUS)
	}
}

func (h *hourSum) merge(o *hourSum) {
	to := h.columnPtrs()
	for i, v := range o.columnPtrs() {
		*to[i] += *v
	}
}

// columnPtrs returns where the values of h stand, in the order of the statements.
func (h *hourSum) columnPtrs() [hourColumnCount]*int64 {
	c := [hourColumnCount]*int64{&h.calls, &h.input, &h.output, &h.cost, &h.unpriced}
	n := 5
	for i := range h.errors {
		c[n], n = &h.errors[i], n+1
	}
	for i := range h.firstByteLatency {
		c[n], c[n+latencyBuckets] = &h.firstByteLatency[i], &h.totalLatency[i]
		n++
	}
	return c
}

// insertArgs are what hourStatement takes.
func (h *hourSum) insertArgs(k hourKey) []driver.Value {
	out := append(make([]driver.Value, 0, 2+hourColumnCount), k.project, k.at)
	for _, v := range h.columnPtrs() {
		out = append(out, *v)
	}
	return out
}

const hourStatement = `
	INSERT INTO project_hours (project, at,
		calls, input_tokens, output_tokens, cost, unpriced_calls, caller_errors, policy_errors, provider_errors, proxy_errors, f10,
		f16, f25, f40, f63, f100, f160, f250, f400, f630, f1000, f1600, f2500, f4000, f6300, f10000, f16000, f25000, f40000, f63000,
		f100000, f_more, t10, t16, t25, t40, t63, t100, t160, t250, t400, t630, t1000, t1600, t2500, t4000, t6300, t10000, t16000,
		t25000, t40000, t63000, t100000, t_more)
	VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
	ON CONFLICT DO UPDATE SET
		calls = calls + excluded.calls, input_tokens = input_tokens + excluded.input_tokens,
		output_tokens = output_tokens + excluded.output_tokens, cost = cost + excluded.cost,
		unpriced_calls = unpriced_calls + excluded.unpriced_calls, caller_errors = caller_errors + excluded.caller_errors,
		policy_errors = policy_errors + excluded.policy_errors, provider_errors = provider_errors + excluded.provider_errors,
		proxy_errors = proxy_errors + excluded.proxy_errors, f10 = f10 + excluded.f10, f16 = f16 + excluded.f16,
		f25 = f25 + excluded.f25, f40 = f40 + excluded.f40, f63 = f63 + excluded.f63, f100 = f100 + excluded.f100,
		f160 = f160 + excluded.f160, f250 = f250 + excluded.f250, f400 = f400 + excluded.f400, f630 = f630 + excluded.f630,
		f1000 = f1000 + excluded.f1000, f1600 = f1600 + excluded.f1600, f2500 = f2500 + excluded.f2500, f4000 = f4000 + excluded.f4000,
		f6300 = f6300 + excluded.f6300, f10000 = f10000 + excluded.f10000, f16000 = f16000 + excluded.f16000,
		f25000 = f25000 + excluded.f25000, f40000 = f40000 + excluded.f40000, f63000 = f63000 + excluded.f63000,
		f100000 = f100000 + excluded.f100000, f_more = f_more + excluded.f_more, t10 = t10 + excluded.t10, t16 = t16 + excluded.t16,
		t25 = t25 + excluded.t25, t40 = t40 + excluded.t40, t63 = t63 + excluded.t63, t100 = t100 + excluded.t100,
		t160 = t160 + excluded.t160, t250 = t250 + excluded.t250, t400 = t400 + excluded.t400, t630 = t630 + excluded.t630,
		t1000 = t1000 + excluded.t1000, t1600 = t1600 + excluded.t1600, t2500 = t2500 + excluded.t2500, t4000 = t4000 + excluded.t4000,
		t6300 = t6300 + excluded.t6300, t10000 = t10000 + excluded.t10000, t16000 = t16000 + excluded.t16000,
		t25000 = t25000 + excluded.t25000, t40000 = t40000 + excluded.t40000, t63000 = t63000 + excluded.t63000,
		t100000 = t100000 + excluded.t100000, t_more = t_more + excluded.t_more`

const hourSumColumns = `
		coalesce(sum(calls), 0), coalesce(sum(input_tokens), 0), coalesce(sum(output_tokens), 0), coalesce(sum(cost), 0),
		coalesce(sum(unpriced_calls), 0), coalesce(sum(caller_errors), 0), coalesce(sum(policy_errors), 0),
		coalesce(sum(provider_errors), 0), coalesce(sum(proxy_errors), 0), coalesce(sum(f10), 0), coalesce(sum(f16), 0),
		coalesce(sum(f25), 0), coalesce(sum(f40), 0), coalesce(sum(f63), 0), coalesce(sum(f100), 0), coalesce(sum(f160), 0),
		coalesce(sum(f250), 0), coalesce(sum(f400), 0), coalesce(sum(f630), 0), coalesce(sum(f1000), 0), coalesce(sum(f1600), 0),
		coalesce(sum(f2500), 0), coalesce(sum(f4000), 0), coalesce(sum(f6300), 0), coalesce(sum(f10000), 0), coalesce(sum(f16000), 0),
		coalesce(sum(f25000), 0), coalesce(sum(f40000), 0), coalesce(sum(f63000), 0), coalesce(sum(f100000), 0),
		coalesce(sum(f_more), 0), coalesce(sum(t10), 0), coalesce(sum(t16), 0), coalesce(sum(t25), 0), coalesce(sum(t40), 0),
		coalesce(sum(t63), 0), coalesce(sum(t100), 0), coalesce(sum(t160), 0), coalesce(sum(t250), 0), coalesce(sum(t400), 0),
		coalesce(sum(t630), 0), coalesce(sum(t1000), 0), coalesce(sum(t1600), 0), coalesce(sum(t2500), 0), coalesce(sum(t4000), 0),
		coalesce(sum(t6300), 0), coalesce(sum(t10000), 0), coalesce(sum(t16000), 0), coalesce(sum(t25000), 0),
		coalesce(sum(t40000), 0), coalesce(sum(t63000), 0), coalesce(sum(t100000), 0), coalesce(sum(t_more), 0)`

// sumHours adds up the hours of a project, or of all together (project 0), that
// begin in from <= at < to.
func (s *store) sumHours(ctx context.Context, project, from, to int64) (*hourSum, error) {
	h := &hourSum{}
	if err := s.readDB.QueryRowContext(ctx, `SELECT `+hourSumColumns+` FROM project_hours WHERE project = ? AND at >= ? AND at < ?`,
		project, from, to).Scan(h.scanTargets()...); err != nil {
		return nil, fmt.Errorf("adding up hours: %w", err)
	}
	return h, nil
}

func (h *hourSum) scanTargets() []any {
	out := make([]any, 0, hourColumnCount)
	for _, v := range h.columnPtrs() {
		out = append(out, v)
	}
	return out
}

// deleteOldHours deletes the hours of up to limit projects from before a time, and
// returns how many rows went.
func (s *store) deleteOldHours(ctx context.Context, before int64, limit int) (int64, error) {
	res, err := s.writeDB.ExecContext(ctx, `
		DELETE FROM project_hours WHERE at < ?1 AND project IN (
			SELECT seq FROM (SELECT 0 AS seq UNION ALL SELECT seq FROM projects) p
			WHERE EXISTS (SELECT 1 FROM project_hours h WHERE h.project = p.seq AND h.at < ?1) LIMIT ?2)`, before, limit)
	if err != nil {
		return 0, fmt.Errorf("deleting old hours: %w", err)
	}
	return res.RowsAffected()
}

// An usageTotals is what charts are made of.
type usageTotals struct{ calls, tokens, cost int64 }

func (a *usageTotals) add(o usageTotals) {
	a.calls += o.calls
	a.tokens += o.tokens
	a.cost += o.cost
}

// An usageShare is the part of a project, token, model or endpoint in an amount.
type usageShare struct {
	seq             int64  // of a project
	id, name, label string // label is of a token its project's name, of a project "deleted" if it is
	usageTotals
}

// An usagePoint is an amount at a time, of a model or, where there is none, of all.
type usagePoint struct {
	at    int64
	model string
	usageTotals
}

// hourSumsByStep adds up the hours of a project, or of all together (0), in steps of
// length ms from from on, until to.
func (s *store) hourSumsByStep(ctx context.Context, project, from, to, length int64) ([]hourSum, error) {
	st, err := s.readDB.PrepareContext(ctx, `SELECT `+hourSumColumns+` FROM project_hours WHERE project = ? AND at >= ? AND at < ?`)
	if err != nil {
		return nil, fmt.Errorf("adding up hours: %w", err)
	}
	defer st.Close()
	var out []hourSum
	for at := from; at < to; at += length {
		var h hourSum
		if err := st.QueryRowContext(ctx, project, at, min(at+length, to)).Scan(h.scanTargets()...); err != nil {
			return nil, fmt.Errorf("adding up hours: %w", err)
		}
		out = append(out, h)
	}
	return out, nil
}

// usagePointsByModel returns what each model has of each hour or day (grain) of a
// project, or of all together (0).
func (s *store) usagePointsByModel(ctx context.Context, grain string, project, from, to int64) ([]usagePoint, error) {
	return scanUsagePoints(s.readDB.QueryContext(ctx, `
		SELECT at, model, sum(calls), sum(input_tokens + output_tokens), sum(cost) FROM usage_sums
		WHERE grain = ? AND project = ? AND token = 0 AND at >= ? AND at < ? GROUP BY at, model`, grain, project, from, to))
}

// hourlyUsagePoints and stepsOfDays return what a project has of each hour or day.
func (s *store) hourlyUsagePoints(ctx context.Context, project, from, to int64) ([]usagePoint, error) {
	return scanUsagePoints(s.readDB.QueryContext(ctx, `
		SELECT at, '', calls, input_tokens + output_tokens, cost FROM project_hours
		WHERE project = ? AND at >= ? AND at < ?`, project, from, to))
}

func (s *store) dailyUsagePoints(ctx context.Context, project, from, to int64) ([]usagePoint, error) {
	return scanUsagePoints(s.readDB.QueryContext(ctx, `
		SELECT at, '', calls, input_tokens + output_tokens, cost FROM usage_sums
		WHERE grain = 'token' AND project = ? AND token = 0 AND at >= ? AND at < ?`, project, from, to))
}

func scanUsagePoints(rows *sql.Rows, err error) ([]usagePoint, error) {
	if err != nil {
		return nil, fmt.Errorf("reading steps: %w", err)
	}
	defer rows.Close()
	var out []usagePoint
	for rows.Next() {
		var v usagePoint
		if err := rows.Scan(&v.at, &v.model, &v.calls, &v.tokens, &v.cost); err != nil {
			return nil, fmt.Errorf("reading steps: %w", err)
		}
		out = append(out, v)
	}
	return out, rows.Err()
}

// sharesByEndpoint returns what each endpoint has of a project, or of all (0).
func (s *store) sharesByEndpoint(ctx context.Context, grain string, project, from, to int64) ([]usageShare, error) {
	return scanUsageShares(s.readDB.QueryContext(ctx, `
		SELECT 0, '', endpoint, '', sum(calls), sum(input_tokens + output_tokens), sum(cost) FROM usage_sums
		WHERE grain = ? AND project = ? AND token = 0 AND at >= ? AND at < ? GROUP BY endpoint`, grain, project, from, to))
}

// sharesByProjectHours and sharesByProjectDays return what each project has, in
// no order. One with no calls is not among them.
func (s *store) sharesByProjectHours(ctx context.Context, from, to int64) ([]usageShare, error) {
	return scanUsageShares(s.readDB.QueryContext(ctx, `
		SELECT p.seq, p.id, p.name, iif(p.deleted_at IS NULL, '', 'deleted'), sum(h.calls), sum(h.input_tokens + h.output_tokens), sum(h.cost)
		FROM projects p CROSS JOIN project_hours h ON h.project = p.seq AND h.at >= ? AND h.at < ? GROUP BY p.seq`, from, to))
}

func (s *store) sharesByProjectDays(ctx context.Context, from, to int64) ([]usageShare, error) {
	return scanUsageShares(s.readDB.QueryContext(ctx, `
		SELECT p.seq, p.id, p.name, iif(p.deleted_at IS NULL, '', 'deleted'), sum(u.calls), sum(u.input_tokens + u.output_tokens), sum(u.cost)
		FROM projects p CROSS JOIN usage_sums u ON u.grain = 'token' AND u.project = p.seq AND u.token = 0 AND u.at >= ? AND u.at < ?
		GROUP BY p.seq`, from, to))
}

// sharesByToken returns what each token of a project has, in no order, or
// errTooManyRows if more than limit were ever used. id is the project's, "" for all.
// grain is hour, or token: that is days.
func (s *store) sharesByToken(ctx context.Context, grain, id string, from, to int64, limit int) ([]usageShare, error) {
	scopes, err := s.usageScopes(ctx, &usageQuery{project: id, byToken: true, limit: limit})
	if err != nil {
		return nil, err
	}
	st, err := s.readDB.PrepareContext(ctx, `
		SELECT coalesce(sum(calls), 0), coalesce(sum(input_tokens + output_tokens), 0), coalesce(sum(cost), 0) FROM usage_sums
		WHERE grain = ? AND project = ? AND token = ? AND at >= ? AND at < ?`)
	if err != nil {
		return nil, fmt.Errorf("adding up tokens: %w", err)
	}
	defer st.Close()
	var out []usageShare
	for i := range scopes {
		v := usageShare{id: scopes[i].tokenID, name: scopes[i].tokenName, label: scopes[i].projectName}
		if err := st.QueryRowContext(ctx, grain, scopes[i].project, scopes[i].token, from, to).Scan(&v.calls, &v.tokens, &v.cost); err != nil {
			return nil, fmt.Errorf("adding up tokens: %w", err)
		}
		if v.calls > 0 {
			out = append(out, v)
		}
	}
	return out, nil
}

// latestSharesByToken returns what each token has of the latest limit calls of a
// project (0: of all) with ids from from on and below to.
func (s *store) latestSharesByToken(ctx context.Context, project, from, to int64, limit int) ([]usageShare, error) {
	const tokens = `
		SELECT 0, t.id, t.name, p.name, c.calls, c.tokens, c.cost FROM (
			SELECT token, count(*) AS calls, sum(input_tokens + output_tokens) AS tokens, coalesce(sum(cost), 0) AS cost FROM (
				SELECT token, input_tokens, output_tokens, cost FROM requests `
	const rest = ` ORDER BY id DESC LIMIT ?4) GROUP BY token) c
		JOIN tokens t ON t.seq = c.token JOIN projects p ON p.seq = t.project`
	if project == 0 {
		return scanUsageShares(s.readDB.QueryContext(ctx, tokens+`WHERE ?1 = 0 AND id >= ?2 AND id < ?3`+rest, project, from, to, limit))
	}
	return scanUsageShares(s.readDB.QueryContext(ctx, tokens+`WHERE project = ?1 AND id >= ?2 AND id < ?3`+rest, project, from, to, limit))
}

func scanUsageShares(rows *sql.Rows, err error) ([]usageShare, error) {
	if err != nil {
		return nil, fmt.Errorf("reading shares: %w", err)
	}
	defer rows.Close()
	var out []usageShare
	for rows.Next() {
		var v usageShare
		if err := rows.Scan(&v.seq, &v.id, &v.name, &v.label, &v.calls, &v.tokens, &v.cost); err != nil {
			return nil, fmt.Errorf("reading shares: %w", err)
		}
		out = append(out, v)
	}
	return out, rows.Err()
}

// countRequestsSince counts calls with ids from from on, up to limit.
func (s *store) countRequestsSince(ctx context.Context, project, from int64, limit int) (n int64, err error) {
	const counted = `SELECT count(*) FROM (SELECT 1 FROM requests `
	if project == 0 {
		err = s.readDB.QueryRowContext(ctx, counted+`WHERE ?1 = 0 AND id >= ?2 LIMIT ?3)`, project, from, limit).Scan(&n)
	} else {
		err = s.readDB.QueryRowContext(ctx, counted+`WHERE project = ?1 AND id >= ?2 LIMIT ?3)`, project, from, limit).Scan(&n)
	}
	if err != nil {
		return 0, fmt.Errorf("counting calls: %w", err)
	}
	return n, nil
}

// expiringTokens returns up to limit tokens that expire in from <= t < to, the
// first to expire first.
func (s *store) expiringTokens(ctx context.Context, from, to int64, limit int) (out []expiringToken, err error) {
	rows, err := s.readDB.QueryContext(ctx, `
		SELECT t.id, t.name, p.name, p.id, t.expires_at FROM tokens t JOIN projects p ON p.seq = t.project
		WHERE t.revoked_at IS NULL AND t.expires_at >= ? AND t.expires_at < ? AND p.deleted_at IS NULL ORDER BY t.expires_at LIMIT ?`, from, to, limit)
	if err != nil {
		return nil, fmt.Errorf("listing tokens that expire: %w", err)
	}
	defer rows.Close()
	for rows.Next() {
		var n expiringToken
		if err := rows.Scan(&n.id, &n.name, &n.project, &n.projectID, &n.expiresAt); err != nil {
			return nil, fmt.Errorf("listing tokens that expire: %w", err)
		}
		out = append(out, n)
	}
	return out, rows.Err()
}

// A expiringToken is a token that deserves a look, and when something happens to it.
type expiringToken struct {
	id, name, project, projectID string
	expiresAt                    int64
}

// projectNames returns the ids and names of up to limit projects, by name.
func (s *store) projectNames(ctx context.Context, limit int) ([]usageShare, error) {
	return scanUsageShares(s.readDB.QueryContext(ctx, `
		SELECT seq, id, name, '', 0, 0, 0 FROM projects WHERE deleted_at IS NULL ORDER BY name LIMIT ?`, limit))
}

// A unhealthyUpstream is an upstream whose key is not well.
type unhealthyUpstream struct {
	project, projectID, upstream string
	state, reason                string
	until, since                 int64
}

// unhealthyUpstreams returns the upstreams in use that are left out at now, those that
// need somebody's help first.
func (s *store) unhealthyUpstreams(ctx context.Context, now int64, limit int) ([]unhealthyUpstream, error) {
	rows, err := s.readDB.QueryContext(ctx, `
		SELECT p.name, p.id, u.name, h.state, h.reason, h.until, h.changed_at
		FROM upstream_health h JOIN upstreams u ON u.seq = h.upstream JOIN projects p ON p.seq = u.project
		WHERE u.deleted_at IS NULL AND u.is_active = 1 AND p.deleted_at IS NULL AND (h.state <> 'cooling' OR h.until > ?)
		ORDER BY CASE h.state WHEN 'quarantined' THEN 0 WHEN 'exhausted' THEN 1 WHEN 'open' THEN 2 ELSE 3 END, h.changed_at LIMIT ?`, now, limit)
	if err != nil {
		return nil, fmt.Errorf("reading which keys are not well: %w", err)
	}
	defer rows.Close()
	var out []unhealthyUpstream
	for rows.Next() {
		var v unhealthyUpstream
		if err := rows.Scan(&v.project, &v.projectID, &v.upstream, &v.state, &v.reason, &v.until, &v.since); err != nil {
			return nil, fmt.Errorf("reading which keys are not well: %w", err)
		}
		out = append(out, v)
	}
	return out, rows.Err()
}
