// This file has the SQL for reports: it adds up the sums that the ledger keeps. It reads single calls only
// where there is no sum for what is asked, and then a bounded number of them. It writes nothing, but deletes old sums.
// It also writes tables as CSV.
package main

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"
)

// A usageQuery says which sums to add up, and how to group them.
type usageQuery struct {
	interval                                           string // hour, day, month or total
	hourly                                             bool   // read hours where days would do
	totalsOnly                                         bool   // only calls, tokens and cost are needed
	from, to                                           int64  // from <= start of the hour or day < to
	project, token                                     string // ids, "" for all
	byProject, byToken, byModel, byEndpoint, byOutcome bool
	byCache                                            bool
	byServiceTier                                      bool
	attribute                                          string       // whose values are groups; "": none
	top                                                int          // how many of its values are groups of their own
	largestBy                                          string       // calls, tokens or cost: which are the top
	values                                             []usageShare // the top, if they are known
	limit                                              int          // of groups, and of scopes that are read
}

// A usageKey names a group; fields by which the query does not group are zero.
type usageKey struct {
	at                     int64
	projectSeq             int64
	projectDeleted         bool
	projectID, projectName string
	tokenID, tokenName     string
	usageLabels
	value string // of the attribute
	rest  string // restOther or restNone; "": this is a value
}

// What a group without a value stands for: the values that are not among the top, and the calls that have none.
const (
	restOther = "other"
	restNone  = "none"
)

// usageLabels are the columns of usage_sums by which a query may group, and cacheHit or cacheNone.
type usageLabels struct{ model, endpoint, outcome, serviceTier, cache string }

type usageRow struct {
	usageKey
	usageSum
}

func (k *usageKey) compare(o *usageKey) int {
	return cmp.Or(cmp.Compare(k.at, o.at),
		cmp.Compare(k.projectName, o.projectName), cmp.Compare(k.projectID, o.projectID),
		cmp.Compare(k.tokenName, o.tokenName), cmp.Compare(k.tokenID, o.tokenID), cmp.Compare(k.model, o.model),
		cmp.Compare(k.endpoint, o.endpoint), cmp.Compare(k.outcome, o.outcome),
		cmp.Compare(k.serviceTier, o.serviceTier), cmp.Compare(k.cache, o.cache),
		cmp.Compare(k.rest, o.rest), cmp.Compare(k.value, o.value))
}

var errTooManyRows = errors.New("too many rows")

// usage adds up sums, or returns errTooManyRows. For each project, or each token where single tokens matter,
// it reads one range in the table's own order, in which SQLite adds up as it reads: sorting all rows
// together costs many times as much.
func (s *store) usage(ctx context.Context, q usageQuery) ([]usageRow, error) {
	groups, err := s.usageGroups(ctx, q)
	out := make([]usageRow, 0, len(groups))
	for k, v := range groups {
		out = append(out, usageRow{k, *v})
	}
	slices.SortFunc(out, func(a, b usageRow) int { return a.compare(&b.usageKey) })
	return out, err
}

// usageGroups returns what usage does, in no order.
func (s *store) usageGroups(ctx context.Context, q usageQuery) (map[usageKey]*usageSum, error) {
	scopes, err := s.usageScopes(ctx, &q)
	if err != nil {
		return nil, err
	}
	groups, err := s.sumScopes(ctx, &q, scopes, true)
	if isSumOverflow(err) {
		groups, err = s.sumScopes(ctx, &q, scopes, false)
	}
	if err == nil && q.attribute != "" {
		groups, err = s.reportByValue(ctx, &q, groups)
	}
	return groups, err
}

// sumScopes adds up the sums of scopes. With inSQL, SQLite does most of it, and fails if a sum overflows; otherwise
// each row is read, and sums that would overflow stay at the largest int64.
func (s *store) sumScopes(ctx context.Context, q *usageQuery, scopes []usageScope, inSQL bool,
) (map[usageKey]*usageSum, error) {
	statement, grain := q.statement(inSQL)
	st, err := s.readDB.PrepareContext(ctx, statement)
	if err != nil {
		return nil, fmt.Errorf("adding up usage: %w", err)
	}
	defer st.Close()
	groups := map[usageKey]*usageSum{}
	for i := range scopes {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		for _, r := range q.timeRanges() {
			if err := q.sumRange(st, grain, &scopes[i], r, groups); err != nil {
				return nil, fmt.Errorf("adding up usage: %w", err)
			}
		}
		if len(groups) > q.limit {
			return nil, errTooManyRows
		}
	}
	return groups, nil
}

// A timeRange is a span of time whose sums are added up into one. at is its start in the answer, 0 where the
// rows themselves have one.
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

// ofAll reports whether the sums of all projects together, project 0, answer the query.
func (q *usageQuery) ofAll() bool {
	return q.project == "" && q.token == "" && !q.byProject && !q.byToken
}

// byTime reports whether each hour or day is a group of its own.
func (q *usageQuery) byTime() bool { return q.interval == "hour" || q.interval == "day" }

// statement returns the statement that reads no finer than it must, and the grain to read. Unless addUp is set, the
// statement returns the stored rows as they are.
func (q *usageQuery) statement(addUp bool) (text, grain string) {
	const from = ` FROM usage_sums WHERE grain = ?1 AND project = ?2 AND token = ?3 AND at >= ?4 AND at < ?5 `
	const sums = `sum(calls), sum(input_tokens), sum(cached_tokens), sum(output_tokens), sum(reasoning_tokens),
			sum(cost), sum(unpriced_calls), sum(estimated_calls), sum(would_refuse), sum(total_us),
			sum(cache_hits), sum(saved), sum(saved_us), sum(prompt_saved), sum(client_retries)` + from
	const fromHours = ` FROM project_hours WHERE ?1 = 'hour' AND project = ?2 AND ?3 = 0 AND at >= ?4 AND at < ?5 `
	const hours = `sum(calls), sum(input_tokens), 0, sum(output_tokens), 0, sum(cost), sum(unpriced_calls), 0, 0, 0,
			0, 0, 0, 0, 0` + fromHours
	if grain = "day"; q.interval == "hour" || q.hourly {
		grain = "hour"
	}
	byLabels := q.byEndpoint || q.byOutcome || q.byServiceTier
	labeled := byLabels || q.byModel
	inHours := grain == "hour" && q.totalsOnly && !labeled && !q.byToken && q.token == ""
	if grain == "day" && !labeled && !q.ofAll() {
		grain = "token" // days over all models; token 0 is all of the project's
	}
	switch byTime := q.byTime(); {
	case inHours && !addUp:
		return `SELECT at, '', '', '', '', calls, input_tokens, 0, output_tokens, 0, cost, unpriced_calls, 0, 0, 0,
			0, 0, 0, 0, 0` + fromHours, grain
	case !addUp:
		return `SELECT at, model, endpoint, outcome, service_tier, ` + sumColumns + from, grain
	case byLabels && byTime:
		return `SELECT at, model, endpoint, outcome, service_tier, ` + sums +
			`GROUP BY at, model, endpoint, outcome, service_tier`, grain
	case byLabels:
		return `SELECT 0, model, endpoint, outcome, service_tier, ` + sums +
			`GROUP BY model, endpoint, outcome, service_tier`, grain
	case q.byModel && byTime:
		return `SELECT at, model, '', '', '', ` + sums + `GROUP BY at, model`, grain
	case q.byModel:
		return `SELECT 0, model, '', '', '', ` + sums + `GROUP BY model`, grain
	case inHours && byTime:
		return `SELECT at, '', '', '', '', ` + hours + `GROUP BY at`, grain
	case inHours:
		return `SELECT 0, '', '', '', '', ` + hours + `GROUP BY project`, grain
	case byTime:
		return `SELECT at, '', '', '', '', ` + sums + `GROUP BY at`, grain
	}
	return `SELECT 0, '', '', '', '', ` + sums + `GROUP BY grain`, grain
}

// sumRange adds a scope's sums in a range of time to the groups. It reads one short range and cannot be
// cancelled: for a query that can be, the driver starts a goroutine each time.
func (q *usageQuery) sumRange(st *sql.Stmt, grain string, scope *usageScope, r timeRange,
	groups map[usageKey]*usageSum) error {
	rows, err := st.QueryContext(context.Background(), grain, scope.projectSeq, scope.tokenSeq, r.from, r.to)
	if err != nil {
		return err
	}
	defer rows.Close()
	var base usageKey
	if q.byProject {
		base = scope.usageKey
	}
	base.tokenID, base.tokenName = "", ""
	if q.byToken {
		base.tokenID, base.tokenName = scope.tokenID, scope.tokenName
	}
	for rows.Next() {
		var at int64
		var labels usageLabels
		var v usageSum
		into := []any{&at, &labels.model, &labels.endpoint, &labels.outcome, &labels.serviceTier}
		if err := rows.Scan(append(into, v.columns()...)...); err != nil {
			return err
		}
		k := base
		if k.at = r.at; q.byTime() {
			k.at = at
		}
		if q.byModel {
			k.model = labels.model
		}
		if q.byEndpoint {
			k.endpoint = labels.endpoint
		}
		if q.byOutcome {
			k.outcome = labels.outcome
		}
		if q.byServiceTier {
			k.serviceTier = labels.serviceTier
		}
		q.addTo(groups, k, v)
	}
	return rows.Err()
}

// addTo adds a sum to its group, or with byCache to its two groups.
func (q *usageQuery) addTo(groups map[usageKey]*usageSum, k usageKey, v usageSum) {
	if q.byCache {
		if k.cache = cacheHit; v.hits > 0 {
			getOrInsert(groups, k).merge(v.fromCache())
		}
		if k.cache = cacheNone; v.hits == v.calls {
			return
		}
		v = v.fromProviders()
	}
	getOrInsert(groups, k).merge(v)
}

// A usageScope is a project, or one of its tokens, whose sums are read.
type usageScope struct {
	tokenSeq int64 // 0: all of the project's together
	usageKey       // the ids and names of both
}

func (c *usageScope) columns() []any {
	return []any{&c.projectSeq, &c.tokenSeq, &c.projectID, &c.projectName, &c.projectDeleted, &c.tokenID, &c.tokenName}
}

// usedTokensCTE lists the tokens of the project with id ?1 ("": of all) that have sums of grain ?2, by
// stepping from one to the next in the key's order. A row with token NULL ends each project.
const usedTokensCTE = `
	WITH RECURSIVE used (project, token) AS (
		SELECT p.seq, (SELECT min(token) FROM usage_sums WHERE grain = ?2 AND project = p.seq AND token > 0)
		FROM projects p WHERE ?1 = '' OR p.id = ?1
		UNION ALL
		SELECT u.project,
			(SELECT min(token) FROM usage_sums WHERE grain = ?2 AND project = u.project AND token > u.token)
		FROM used u WHERE u.token IS NOT NULL)`

// usageScopes lists what a query reads, deleted projects included.
func (s *store) usageScopes(ctx context.Context, q *usageQuery) ([]usageScope, error) {
	const names = `p.id, p.name, p.deleted_at IS NOT NULL, `
	query := `SELECT p.seq, 0, ` + names + `'', '' FROM projects p WHERE ?1 = '' OR p.id = ?1 LIMIT ?3`
	args := []any{q.project, q.token, q.limit + 1}
	switch {
	case q.ofAll():
		return []usageScope{{}}, nil
	case q.token != "":
		query = `SELECT p.seq, t.seq, ` + names + `t.id, t.name FROM tokens t JOIN projects p ON p.seq = t.project
			WHERE t.id = ?2 AND (?1 = '' OR p.id = ?1) LIMIT ?3`
	case q.byToken:
		query = usedTokensCTE + ` SELECT p.seq, t.seq, ` + names + `t.id, t.name
			FROM used u JOIN projects p ON p.seq = u.project JOIN tokens t ON t.seq = u.token LIMIT ?3`
		args[1] = "token"
	}
	out, err := collect(ctx, s.readDB, "listing whose usage to add up", (*usageScope).columns, query, args...)
	if err == nil && len(out) > q.limit {
		err = errTooManyRows
	}
	return out, err
}

// A usageShare is the part of a total that a project, token, model or endpoint has.
type usageShare struct {
	seq             int64  // of a project
	id, name, label string // label is "deleted" for a deleted project, and a token's project name
	usageTotals
}

func (v *usageShare) columns() []any {
	return []any{&v.seq, &v.id, &v.name, &v.label, &v.calls, &v.tokens, &v.cost}
}

// usageShares returns what each token, project or endpoint has, by which of them q groups, in no order. One
// without calls is not among them.
func (s *store) usageShares(ctx context.Context, q usageQuery) ([]usageShare, error) {
	q.interval, q.totalsOnly, q.byProject = "total", true, q.byProject || q.byToken
	rows, err := s.usage(ctx, q)
	var out []usageShare
	for i := range rows {
		r := &rows[i]
		share := usageShare{usageTotals: r.totals()}
		switch {
		case q.byToken:
			share.id, share.name, share.label = r.tokenID, r.tokenName, r.projectName
		case q.byProject:
			share.seq, share.id, share.name = r.projectSeq, r.projectID, r.projectName
			if r.projectDeleted {
				share.label = "deleted"
			}
		default:
			share.name = r.endpoint
		}
		out = append(out, share)
	}
	return out, err
}

// projectTotals returns what each project has used of days or, with hourly, of hours that begin in from <= at < to, in
// no order; deleted projects are included, those without calls are not. One statement reads all projects, a range of
// the key each.
func (s *store) projectTotals(ctx context.Context, from, to int64, hourly bool) ([]usageShare, error) {
	const head = `SELECT p.seq, p.id, p.name, CASE WHEN p.deleted_at IS NULL THEN '' ELSE 'deleted' END,
			sum(u.calls), sum(u.input_tokens), sum(u.output_tokens), sum(u.cost) FROM projects p CROSS JOIN `
	query := head + `usage_sums u
		WHERE u.grain = 'token' AND u.project = p.seq AND u.token = 0 AND u.at >= ?1 AND u.at < ?2 GROUP BY p.seq`
	if hourly {
		query = head + `project_hours u WHERE u.project = p.seq AND u.at >= ?1 AND u.at < ?2 GROUP BY p.seq`
	}
	type total struct {
		usageShare
		input, output int64
	}
	rows, err := collect(ctx, s.readDB, "adding up projects", func(t *total) []any {
		return []any{&t.seq, &t.id, &t.name, &t.label, &t.calls, &t.input, &t.output, &t.cost}
	}, query, from, to)
	if isSumOverflow(err) { // usage adds up without overflow
		return s.usageShares(ctx, usageQuery{from: from, to: to, hourly: hourly, byProject: true, limit: math.MaxInt32})
	}
	shares := make([]usageShare, len(rows))
	for i := range rows {
		shares[i] = rows[i].usageShare
		shares[i].tokens = addSat(rows[i].input, rows[i].output)
	}
	return shares, err
}

// busiestProjects returns up to limit projects that are not deleted and had the most calls on days that begin in
// from <= at < to, those first.
func (s *store) busiestProjects(ctx context.Context, from, to int64, limit int) ([]usageShare, error) {
	return collect(ctx, s.readDB, "finding the busiest projects", (*usageShare).columns, `
		SELECT p.seq, p.id, p.name, '', sum(min(u.calls, ?4)) AS calls, 0, 0 FROM projects p CROSS JOIN usage_sums u
		WHERE u.grain = 'token' AND u.project = p.seq AND u.token = 0 AND u.at >= ?1 AND u.at < ?2
			AND p.deleted_at IS NULL GROUP BY p.seq ORDER BY 5 DESC, p.seq LIMIT ?3`,
		from, to, limit, int64(math.MaxInt64/maxRangeDays))
}

// A latestCalls selects the latest calls of a project (0: of all) with from <= id < to.
type latestCalls struct {
	project, from, to int64
	sampleSize        int    // how many calls
	orderBy           string // calls, tokens or cost
	limit             int    // of the tokens that are returned
}

// latestSharesByToken returns what each of the tokens with the most has of the latest calls, and what all tokens have
// and how many they are.
func (s *store) latestSharesByToken(ctx context.Context, q latestCalls) (top []usageShare, all usageTotals,
	tokens int64, err error) {
	const head = `
		WITH used AS (
			SELECT token, count(*) AS calls, sum(min(input_tokens, ?7) + min(output_tokens, ?7)) AS tokens,
				coalesce(sum(min(cost, ?7)), 0) AS cost -- limited, so that their sum is one
			FROM (SELECT token, input_tokens, output_tokens, cost FROM requests `
	const tail = ` ORDER BY id DESC LIMIT ?4) latest GROUP BY token)
		SELECT 0, t.id, t.name, p.name, top.calls, top.tokens, top.cost, a.n, a.calls, a.tokens, a.cost
		FROM (SELECT count(*) AS n, sum(calls) AS calls, sum(tokens) AS tokens, sum(cost) AS cost FROM used) a
		CROSS JOIN (SELECT token, calls, tokens, cost FROM used
			ORDER BY CASE ?5 WHEN 'calls' THEN calls WHEN 'tokens' THEN tokens ELSE cost END DESC, calls DESC, token
			LIMIT ?6) top
		JOIN tokens t ON t.seq = top.token JOIN projects p ON p.seq = t.project`
	query := head + `WHERE CAST(?1 AS BIGINT) = 0 AND id >= ?2 AND id < ?3` + tail
	if q.project != 0 {
		query = head + `WHERE project = ?1 AND id >= ?2 AND id < ?3` + tail
	}
	top, err = collect(ctx, s.readDB, "adding up the latest calls", func(v *usageShare) []any {
		return append(v.columns(), &tokens, &all.calls, &all.tokens, &all.cost)
	}, query, q.project, q.from, q.to, q.sampleSize, q.orderBy, q.limit, int64(math.MaxInt64)/int64(q.sampleSize)/2)
	return top, all, tokens, err
}

// countRequests counts the calls of a project (0: of all) with from <= id < to, up to limit.
func (s *store) countRequests(ctx context.Context, project, from, to int64, limit int) (int64, error) {
	const head = `SELECT count(*) FROM (SELECT 1 FROM requests `
	query := head + `WHERE CAST(?1 AS BIGINT) = 0 AND id >= ?2 AND id < ?3 LIMIT ?4) counted`
	if project != 0 {
		query = head + `WHERE project = ?1 AND id >= ?2 AND id < ?3 LIMIT ?4) counted`
	}
	return queryValue[int64](ctx, s.readDB, "counting calls", query, project, from, to, limit)
}

// maxSessionCalls is how many calls of a session, the latest, its totals add up.
const maxSessionCalls = 100_000

// sessionTotals is what the calls of a session have used that have ended.
type sessionTotals struct {
	calls, first, last, input, cached, output, reasoning, cost, unpriced, failed int64
}

const fromSession = `r.session = ?1 AND r.session <> ''
	AND (?2 = '' OR r.project = (SELECT seq FROM projects WHERE id = ?2))`

// sessionTotals adds up the calls of a session in a project, "" for all.
func (s *store) sessionTotals(ctx context.Context, session, project string) (sessionTotals, error) {
	return queryRow(ctx, s.readDB, func(t *sessionTotals) []any {
		return []any{&t.calls, &t.first, &t.last, &t.input, &t.cached, &t.output, &t.reasoning, &t.cost, &t.unpriced,
			&t.failed}
	}, `
		SELECT count(*), coalesce(min(id) >> 21, 0), coalesce(max(id) >> 21, 0), coalesce(sum(input), 0),
			coalesce(sum(cached), 0), coalesce(sum(output), 0), coalesce(sum(reasoning), 0),
			coalesce(sum(min(cost, ?4)), 0), count(*) FILTER (WHERE cost IS NULL AND usage_source <> 'none'),
			count(*) FILTER (WHERE outcome <> 'ok')
		FROM (SELECT r.id AS id, r.outcome AS outcome, coalesce(g.usage_source, r.usage_source) AS usage_source,
				min(coalesce(g.input_tokens, r.input_tokens), ?4) AS input,
				min(coalesce(g.cached_tokens, r.cached_tokens), ?4) AS cached,
				min(coalesce(g.output_tokens, r.output_tokens), ?4) AS output,
				min(coalesce(g.reasoning_tokens, r.reasoning_tokens), ?4) AS reasoning,
				coalesce(g.cost, r.cost) AS cost
			FROM requests r LEFT JOIN background g ON g.call = r.id AND g.usage_source <> ''
			WHERE `+fromSession+` ORDER BY r.id DESC LIMIT ?3) c`,
		session, project, maxSessionCalls, int64(math.MaxInt64/maxSessionCalls))
}

// sessionCalls returns up to limit calls of a session, ended and running, with an id above after, oldest first.
func (s *store) sessionCalls(ctx context.Context, session, project string, after int64, limit int,
) ([]requestView, error) {
	const tail = fromSession + ` AND r.id > ?3 ORDER BY r.id LIMIT ?4`
	var all []requestView
	for _, query := range [...]string{selectRunning + `WHERE ` + tail, selectEnded + `WHERE ` + tail} {
		rows, err := withDetails(collect(ctx, s.readDB, "listing calls", (*requestView).columns, query, session,
			project, after, limit))
		if err != nil {
			return nil, err
		}
		for i := range rows { // a call that ends in between is in both lists; its row is read last
			all = slices.DeleteFunc(all, func(v requestView) bool { return v.id == rows[i].id })
		}
		all = append(all, rows...)
	}
	slices.SortFunc(all, func(a, b requestView) int { return cmp.Compare(a.id, b.id) })
	return all[:min(len(all), limit)], nil
}

// A pastUsage is what ended calls of an endpoint and a requested model have used since some time.
// requestedModel is "" where models were not tracked.
type pastUsage struct {
	endpoint, requestedModel  string
	calls, nanosUSD           int64
	inputTokens, outputTokens int64
}

func (u *pastUsage) columns() []any {
	return []any{&u.endpoint, &u.requestedModel, &u.calls, &u.inputTokens, &u.outputTokens, &u.nanosUSD}
}

// usageSince adds up what calls that began at from or later have used, of a token or, with token 0, of a
// whole project. from is the start of an hour (grain "hour") or of a day. Refused calls do not count: they
// used nothing.
func (s *store) usageSince(ctx context.Context, grain string, project, token, from int64) ([]pastUsage, error) {
	return usageSince(ctx, s.readDB, grain, project, token, from)
}

func usageSince(ctx context.Context, db querier, grain string, project, token, from int64) ([]pastUsage, error) {
	const rows = ` FROM usage_sums
		WHERE grain = ? AND project = ? AND token = ? AND at >= ? AND outcome <> 'refused'`
	read := func(query string) ([]pastUsage, error) {
		return collect(ctx, db, "reading what a limit has used", (*pastUsage).columns, query, grain, project, token,
			from)
	}
	out, err := read(`SELECT endpoint, asked, sum(calls), sum(input_tokens), sum(output_tokens), sum(cost)` + rows +
		` GROUP BY endpoint, asked`)
	if isSumOverflow(err) { // the caller adds up without overflow
		out, err = read(`SELECT endpoint, asked, calls, input_tokens, output_tokens, cost` + rows)
	}
	return out, err
}

// hourSumsByStep adds up the hours of a project, or of all together (0), that begin in from <= at < to, in
// steps of a length in milliseconds.
func (s *store) hourSumsByStep(ctx context.Context, project, from, to, length int64) ([]hourSum, error) {
	out := make([]hourSum, (to-from+length-1)/length)
	type step struct {
		index int64
		hourSum
	}
	steps, err := collect(ctx, s.readDB, "adding up hours", func(r *step) []any {
		return append([]any{&r.index}, r.columns()...)
	}, `
		SELECT (at - ?2) / ?4, calls, input_tokens, output_tokens, cost, unpriced_calls,
			caller_errors, policy_errors, provider_errors, proxy_errors
		FROM project_hours WHERE project = ?1 AND at >= ?2 AND at < ?3`, project, from, to, length)
	if err != nil {
		return nil, err
	}
	for i := range steps {
		out[steps[i].index].merge(&steps[i].hourSum)
	}
	type bucket struct{ index, boundMS, firstBytes, answers int64 }
	buckets, err := collect(ctx, s.readDB, "adding up latency", func(b *bucket) []any {
		return []any{&b.index, &b.boundMS, &b.firstBytes, &b.answers}
	}, `SELECT (at - ?2) / ?4, bucket, sum(min(first_bytes, 1000000000000)), sum(min(answers, 1000000000000))
		FROM project_latency WHERE project = ?1 AND at >= ?2 AND at < ?3 GROUP BY 1, 2`, project, from, to, length)
	bounds := latencyBounds()
	for _, b := range buckets {
		i := slices.Index(bounds[:], b.boundMS)
		if i < 0 {
			i = len(bounds)
		}
		out[b.index].firstByteLatency[i] += b.firstBytes
		out[b.index].totalLatency[i] += b.answers
	}
	return out, err
}

// sumHours adds up all hours of a project, or of all together (0), that begin in from <= at < to.
func (s *store) sumHours(ctx context.Context, project, from, to int64) (*hourSum, error) {
	sums, err := s.hourSumsByStep(ctx, project, from, to, max(to-from, 1))
	if err != nil || len(sums) == 0 {
		return &hourSum{}, err
	}
	return &sums[0], nil
}

// projectNames returns the ids and names of up to limit projects, by name.
func (s *store) projectNames(ctx context.Context, limit int) ([]usageShare, error) {
	return collect(ctx, s.readDB, "listing the names of projects", (*usageShare).columns,
		`SELECT seq, id, name, '', 0, 0, 0 FROM projects WHERE deleted_at IS NULL ORDER BY name LIMIT ?`, limit)
}

// deleteOldSums deletes the hourly sums of up to limit tokens from before a time, and returns how many
// tokens had any. It finds those by stepping from one to the next in the key's order, outside the
// transaction that deletes.
func (s *store) deleteOldSums(ctx context.Context, before int64, limit int) (int64, error) {
	type tokenKey struct{ project, token int64 }
	tokens, err := collect(ctx, s.readDB, "finding old sums", func(k *tokenKey) []any {
		return []any{&k.project, &k.token}
	}, usedTokensCTE+`
		SELECT u.project, u.token FROM used u
		WHERE u.token IS NOT NULL
			AND EXISTS (SELECT 1 FROM usage_sums
				WHERE grain = ?2 AND project = u.project AND token = u.token AND at < ?3)
		LIMIT ?4`, "", "hour", before, limit)
	if err != nil || len(tokens) == 0 {
		return 0, err
	}
	return int64(len(tokens)), s.withTx(ctx, func(tx *sql.Tx) error {
		for _, k := range tokens {
			err := execute(ctx, tx, "deleting old sums", `
				DELETE FROM usage_sums WHERE grain = 'hour' AND project = ? AND token = ? AND at < ?`,
				k.project, k.token, before)
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// deleteOldHours deletes the hours and latencies of up to limit projects from before a time, and returns how
// many rows it deleted.
func (s *store) deleteOldHours(ctx context.Context, before int64, limit int) (deleted int64, err error) {
	return execEach(ctx, s.writeDB, "deleting old hours", []string{`
		DELETE FROM project_latency WHERE at < ?1 AND project IN (
			SELECT seq FROM (SELECT 0 AS seq UNION ALL SELECT seq FROM projects) p
			WHERE EXISTS (SELECT 1 FROM project_latency l WHERE l.project = p.seq AND l.at < ?1) LIMIT ?2)`, `
		DELETE FROM project_hours WHERE at < ?1 AND project IN (
			SELECT seq FROM (SELECT 0 AS seq UNION ALL SELECT seq FROM projects) p
			WHERE EXISTS (SELECT 1 FROM project_hours h WHERE h.project = p.seq AND h.at < ?1) LIMIT ?2)`},
		before, limit)
}

// parseGroupBy reads by what the sums are grouped.
func (q *usageQuery) parseGroupBy(text string) error {
	if text == "" {
		return nil
	}
	groups := map[string]*bool{"project": &q.byProject, "token": &q.byToken, "model": &q.byModel,
		"endpoint": &q.byEndpoint, "outcome": &q.byOutcome, "cache": &q.byCache, "service_tier": &q.byServiceTier}
	for by := range strings.SplitSeq(text, ",") {
		if isAttribute(by) && q.attribute == "" {
			q.attribute = by
			continue
		}
		group, ok := groups[by]
		if !ok || *group {
			return badRequest("invalid_value", "group_by",
				"group_by must list some of project, token, model, endpoint, outcome, cache and "+
					"service_tier, each once, and one of session, end_user and tag:KEY.")
		}
		*group = true
	}
	if q.attribute != "" && q.byServiceTier {
		return badRequest("invalid_value", "group_by", "group_by cannot have service_tier with "+q.attribute+
			": the sums by session, end user and tag do not keep tiers apart.")
	}
	return nil
}

// A csvTable is a table for spreadsheets. Its first row has the names of the columns.
type csvTable [][]string

// csvType is the media type of a csvTable.
const csvType = "text/csv; charset=utf-8; header=present"

// encode returns the table as CSV.
func (t csvTable) encode() ([]byte, error) {
	var b bytes.Buffer
	w := csv.NewWriter(&b)
	for _, row := range t {
		for i := range row {
			row[i] = safeCell(row[i])
		}
		_ = w.Write(row) // Error returns it
	}
	w.Flush()
	return b.Bytes(), w.Error()
}

// newCSVTable returns a table with a row for each element of list, an object in JSON. The columns are members of it by
// their names; a cell is empty where an element has no such member.
func newCSVTable[T any](columns []string, list []T) (csvTable, error) {
	t := csvTable{columns}
	for i := range list {
		text, err := json.Marshal(list[i])
		if err != nil {
			return nil, err
		}
		members := map[string]json.RawMessage{}
		if err := json.Unmarshal(text, &members); err != nil {
			return nil, err
		}
		row := make([]string, len(columns))
		for k, name := range columns {
			if json.Unmarshal(members[name], &row[k]) != nil { // not a text
				row[k] = string(members[name])
			}
		}
		t = append(t, row)
	}
	return t, nil
}

// safeCell keeps spreadsheets from taking text for a formula. Some read the wide and the small forms of a
// sign like the sign itself, and ignore what is invisible before it.
func safeCell(v string) string {
	visible := strings.TrimLeftFunc(v, func(r rune) bool {
		return unicode.IsSpace(r) || unicode.IsControl(r) || unicode.Is(unicode.Cf, r)
	})
	first, _ := utf8.DecodeRuneInString(visible)
	if strings.ContainsRune("=+-@＝＋－＠﹦﹢﹣﹫", first) && visible != "" ||
		v != "" && strings.ContainsRune("\t\r\n", rune(v[0])) {
		return "'" + v
	}
	return v
}
