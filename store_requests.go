// This file has the SQL that reads single calls of the ledger, their stored content, and usage that becomes known after
// a call (store_ledger.go writes them), and the SQL of the response cache. Cached answers come sealed and go sealed:
// nothing here can read one. cache.go decides which are stored, and keeps transactions short, because the ledger shares
// the writing connection. The periods that reports and lists of calls cover are at the end.
package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"time"
)

// A requestView is a row of the ledger with the ids and names of the project, token and upstream that it
// refers to.
type requestView struct {
	requestRow
	projectID, tokenID, upstreamID       string
	projectName, tokenName, upstreamName string
	nullCost                             *int64
	nullFirstByteUS, nullTotalUS         *int64
	detailsText                          string // JSON
	billedPriceID                        int64  // 0: none
}

// withDetails reads the text columns of rows.
func withDetails(rows []requestView, err error) ([]requestView, error) {
	for i := range rows {
		err = errors.Join(err, rows[i].setDetails(rows[i].detailsText))
	}
	return rows, err
}

const requestColumns = `r.id, r.started_at, coalesce(p.id, ''), coalesce(t.id, ''), coalesce(u.id, ''),
	coalesce(p.name, ''), coalesce(t.name, ''), coalesce(u.name, ''), r.endpoint,
	coalesce(nullif(r.model, ''), g.model, ''), r.stream, r.address,
	r.status, r.outcome, r.error_code, coalesce(g.usage_source, r.usage_source),
	coalesce(g.input_tokens, r.input_tokens), coalesce(g.cached_tokens, r.cached_tokens),
	coalesce(g.cache_write_tokens, r.cache_write_tokens), coalesce(g.output_tokens, r.output_tokens),
	coalesce(g.reasoning_tokens, r.reasoning_tokens), coalesce(g.cost, r.cost), r.first_byte_us, r.total_us,
	r.attempts, r.cache, r.limit_hit,
	r.attempt_log, r.saved, r.saved_us, coalesce(nullif(g.details, ''), r.details),
	coalesce(nullif(g.price, 0), r.price), r.routed_by, r.client_retry, r.idempotency_hash,
	r.session, r.end_user, r.tags`

const requestJoins = ` LEFT JOIN projects p ON p.seq = r.project
	LEFT JOIN tokens t ON t.seq = r.token LEFT JOIN upstreams u ON u.seq = r.upstream
	LEFT JOIN background g ON g.call = r.id AND g.usage_source <> '' `

const (
	selectRunning = `SELECT ` + requestColumns + ` FROM running r` + requestJoins
	selectEnded   = `SELECT ` + requestColumns + ` FROM requests r` + requestJoins
)

func (v *requestView) columns() []any {
	return append([]any{&v.id, &v.started, &v.projectID, &v.tokenID, &v.upstreamID,
		&v.projectName, &v.tokenName, &v.upstreamName, &v.endpoint, &v.model, &v.stream, &v.address,
		&v.status, &v.outcome, &v.errorCode, &v.source, &v.counts.input, &v.counts.cached, &v.counts.cacheWrite,
		&v.counts.output, &v.counts.reasoning, &v.nullCost, &v.nullFirstByteUS, &v.nullTotalUS, &v.attempts, &v.cache,
		&v.limitHit, &v.attemptLog, &v.saved, &v.savedUS, &v.detailsText, &v.billedPriceID,
		&v.routedBy, &v.clientRetry, &v.idempotencyHash},
		v.attributionColumns()...)
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
	return v, errors.Join(err, v.setDetails(v.detailsText))
}

// billedPrice returns the text of a price that the cost of a call is made of, or errNotFound.
func (s *store) billedPrice(ctx context.Context, id int64) (string, error) {
	return queryValue[string](ctx, s.readDB, "reading a price", `SELECT price FROM billed_prices WHERE id = ?`, id)
}

// cacheHit and cacheNone say whether the response cache answered a call.
const (
	cacheHit  = "hit"
	cacheNone = "none" // "" in the table
)

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

// oldestRequestHour returns the start of the hour of the oldest call, 0 if there is none.
func (s *store) oldestRequestHour(ctx context.Context) (int64, error) {
	started, err := queryValue[int64](ctx, s.readDB, "reading the oldest call",
		`SELECT coalesce(min(id) >> 21, 0) FROM requests`)
	return started - started%hourMS, err
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
		WHERE b.response = ?1 AND (b.project = ?2 OR b.upstream = ?3) AND b.usage_source = ''
		ORDER BY b.project <> ?2 LIMIT 1`,
		response, project, upstream)
}

// expiredUsage returns up to limit such responses of calls with an id below before.
func (s *store) expiredUsage(ctx context.Context, before int64, limit int) ([]requestRow, error) {
	return collect(ctx, s.readDB, "listing background responses", (*requestRow).pendingColumns, selectPending+`
		WHERE b.usage_source = '' AND b.call < ? ORDER BY b.call LIMIT ?`, before, limit)
}

const selectPending = `SELECT b.call, b.call >> 21, b.project, b.token, b.upstream, b.endpoint, b.outcome, b.model,
	b.model_tracked, b.asked, b.asked_tracked, b.reserved_input, b.reserved_output, b.reserved_cost,
	coalesce(r.session, ''), coalesce(r.end_user, ''), coalesce(r.tags, '')
	FROM background b LEFT JOIN requests r ON r.id = b.call`

func (r *requestRow) pendingColumns() []any {
	return append([]any{&r.usageOf, &r.started, &r.project, &r.token, &r.upstream, &r.endpoint, &r.outcome, &r.model,
		&r.modelTracked, &r.requestedModel, &r.requestedModelTracked, &r.reservedInput, &r.reservedOutput,
		&r.reservedCost}, r.attributionColumns()...)
}

// What the ledger writes of usage that becomes known after its call has ended.
const (
	// A provider that names one response twice, such as for a repeated call, has it counted once.
	insertBackground = `
		INSERT INTO background (call, project, token, upstream, response, endpoint, outcome, model,
			model_tracked, asked, asked_tracked, reserved_input, reserved_output, reserved_cost)
		VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING`
	updateBackground = `
		UPDATE background SET usage_source = ?2, input_tokens = ?3, cached_tokens = ?4, cache_write_tokens = ?5,
			output_tokens = ?6, reasoning_tokens = ?7, cost = ?8, details = ?9, price = ?10
		WHERE call = ?1 AND usage_source = ''`
	// Two calls may read the same results at one time: only one finds the lines that were counted before.
	insertBatchUsage = `
		INSERT INTO batch_usage AS u (object, model, priced, lines, input_tokens, cached_tokens, cache_write_tokens,
			output_tokens, reasoning_tokens, cost, prompt_saved)
		VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11)
		ON CONFLICT (object, model, priced) DO UPDATE SET
			lines = min(u.lines, 9223372036854775807 - ?4) + ?4,
			input_tokens = min(u.input_tokens, 9223372036854775807 - ?5) + ?5,
			cached_tokens = min(u.cached_tokens, 9223372036854775807 - ?6) + ?6,
			cache_write_tokens = min(u.cache_write_tokens, 9223372036854775807 - ?7) + ?7,
			output_tokens = min(u.output_tokens, 9223372036854775807 - ?8) + ?8,
			reasoning_tokens = min(u.reasoning_tokens, 9223372036854775807 - ?9) + ?9,
			cost = min(u.cost, 9223372036854775807 - ?10) + ?10,
			prompt_saved = min(u.prompt_saved, 9223372036854775807 - ?11) + ?11
		WHERE u.lines = ?12`

	// The call's row shows all that was read. A part without a price leaves the whole without one.
	insertBatchShown = `
		INSERT INTO background AS b (call, project, token, upstream, response, endpoint, outcome, model, model_tracked,
			asked, asked_tracked, reserved_input, reserved_output, reserved_cost, usage_source, input_tokens,
			cached_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost, details, price)
		VALUES (CAST(?1 AS BIGINT), ?2, ?3, 0, 'batch of call ' || CAST(?1 AS BIGINT), ?4, ?5, ?6, FALSE, '', FALSE,
			0, 0, 0, ?7, ?8, ?9, ?10, ?11, ?12,
			?13, ?14, ?15)
		ON CONFLICT (call) DO UPDATE SET
			usage_source = min(b.usage_source, ?7), -- 'estimated' comes before 'exact'
			input_tokens = min(b.input_tokens, 9223372036854775807 - ?8) + ?8,
			cached_tokens = min(b.cached_tokens, 9223372036854775807 - ?9) + ?9,
			cache_write_tokens = min(b.cache_write_tokens, 9223372036854775807 - ?10) + ?10,
			output_tokens = min(b.output_tokens, 9223372036854775807 - ?11) + ?11,
			reasoning_tokens = min(b.reasoning_tokens, 9223372036854775807 - ?12) + ?12,
			cost = min(b.cost, 9223372036854775807 - ?13) + ?13, price = 0`
)

// addBatch remembers a batch, or a file with results, and the call that made it: 0 if that is not known. The first one
// counts.
func (s *store) addBatch(ctx context.Context, object string, maker *requestRow) error {
	return execute(ctx, s.writeDB, "remembering a batch", `
		INSERT INTO batches (object, call, project, token, endpoint, outcome) VALUES (?, ?, ?, ?, ?, ?)
		ON CONFLICT DO NOTHING`,
		object, maker.usageOf, maker.project, maker.token, maker.endpoint, string(maker.outcome))
}

// batchMaker returns, as the usage of a call, the call that made a batch or a file with results. usageOf is 0 if that
// is not known; the error is errNotFound if the object is not known.
func (s *store) batchMaker(ctx context.Context, object string) (requestRow, error) {
	return queryRow(ctx, s.readDB, func(r *requestRow) []any {
		return append([]any{&r.usageOf, &r.project, &r.token, &r.endpoint, &r.outcome}, r.attributionColumns()...)
	}, `SELECT b.call, b.project, b.token, b.endpoint, b.outcome, coalesce(r.session, ''), coalesce(r.end_user, ''),
		coalesce(r.tags, '')
		FROM batches b LEFT JOIN requests r ON r.id = b.call WHERE b.object = ?`, object)
}

// addUsage adds what another row has used. Their prices and conditions are the same, but for the multiplier.
func (r *requestRow) addUsage(o *requestRow) {
	r.counts.input = addSat(r.counts.input, o.counts.input)
	r.counts.cached = addSat(r.counts.cached, o.counts.cached)
	r.counts.cacheWrite = addSat(r.counts.cacheWrite, o.counts.cacheWrite)
	r.counts.output = addSat(r.counts.output, o.counts.output)
	r.counts.reasoning = addSat(r.counts.reasoning, o.counts.reasoning)
	r.counts.audioInput = addSat(r.counts.audioInput, o.counts.audioInput)
	r.counts.audioOutput = addSat(r.counts.audioOutput, o.counts.audioOutput)
	r.cost, r.promptSaved = addSat(r.cost, o.cost), addSat(r.promptSaved, o.promptSaved)
	multiplier := o.details.multiplier
	more := o.details.counts()
	for i, c := range r.details.counts() {
		*c.count = addSat(*c.count, *more[i].count)
	}
	r.details.multiplier = multiplier
	if o.source == usageEstimated {
		r.source = usageEstimated
	}
}

// A batchUsage is what answers of one model have used: those that have a known price, or those that do not.
type batchUsage struct {
	requestRow
	lines int64
}

// withoutCounted returns the part of what was read of the results of a batch that was not counted before.
func (u *batchUsage) withoutCounted(counted *batchUsage) batchUsage {
	rest := *u
	for i, n := range counted.columns() {
		more := rest.columns()[i].(*int64)
		*more = max(*more-*n.(*int64), 0)
	}
	if counted.lines > 0 { // the rest is made of several sums
		rest.price, rest.details = nil, usageDetails{tier: u.details.tier, multiplier: u.details.multiplier}
	}
	return rest
}

// columns returns the counters that batch_usage has, in the order of its columns.
func (u *batchUsage) columns() []any {
	return []any{&u.lines, &u.counts.input, &u.counts.cached, &u.counts.cacheWrite, &u.counts.output,
		&u.counts.reasoning, &u.cost, &u.promptSaved}
}

// countedUsage returns what was counted of the results in an object of one model, with and without a known price.
func (s *store) countedUsage(ctx context.Context, object, model string) ([]batchUsage, error) {
	return collect(ctx, s.readDB, "reading what was counted of a batch", func(u *batchUsage) []any {
		return append([]any{&u.priced}, u.columns()...)
	}, `SELECT priced, lines, input_tokens, cached_tokens, cache_write_tokens, output_tokens, reasoning_tokens, cost,
		prompt_saved FROM batch_usage WHERE object = ? AND model = ?`, object, model)
}

// deleteOldBackground deletes up to limit background responses whose usage is known, of calls with an id below before.
func (s *store) deleteOldBackground(ctx context.Context, before int64, limit int) (int64, error) {
	return execCount(ctx, s.writeDB, "deleting background responses", `
		DELETE FROM background WHERE call IN (
			SELECT call FROM background WHERE call < ? AND usage_source <> '' ORDER BY call LIMIT ?)`, before, limit)
}

// maxKnownBatches is how many batches, and how many sums of their results, are remembered.
const maxKnownBatches = 100_000

// deleteOldBatches forgets the oldest batches and what was counted of them, up to limit of each, where there are more
// than keep.
func (s *store) deleteOldBatches(ctx context.Context, keep int64, limit int) (deleted int64, err error) {
	return execEach(ctx, s.writeDB, "forgetting old batches", []string{`
		DELETE FROM batches WHERE seq IN (
			SELECT seq FROM batches WHERE seq <= (SELECT max(seq) FROM batches) - ?1 ORDER BY seq LIMIT ?2)`, `
		DELETE FROM batch_usage WHERE seq IN (
			SELECT seq FROM batch_usage WHERE seq <= (SELECT max(seq) FROM batch_usage) - ?1 ORDER BY seq LIMIT ?2)`},
		keep, limit)
}

// A cacheRow is a cached answer as stored.
type cacheRow struct {
	id             int64 // the first bytes of the cache key
	project, token int64 // token is 0 if the tokens of the project share the answer
	model          string
	endpoint       string // its pattern; "": an earlier version stored the answer
	storedAt       int64  // unix milliseconds, like the next
	expiresAt      int64
	usedAt         int64
	size           int64 // bytes that count in MAX_CACHE_BYTES
	answer         []byte
}

// anyToken in a cacheFilter stands for the answers that belong to a single token, whichever it is.
const anyToken = -1

// A cacheFilter describes cached answers of one project. Zero values let all answers through.
type cacheFilter struct {
	project      int64
	token        int64 // anyToken: every answer that belongs to a single token
	model        string
	endpoint     string // a pattern of policies; an answer whose endpoint is not known matches any
	storedBefore int64
}

// matches reports whether the filter describes a cached answer.
func (f *cacheFilter) matches(r *cacheRow) bool {
	return r.project == f.project && (f.token == 0 || f.token == r.token || f.token == anyToken && r.token != 0) &&
		(f.model == "" || f.model == r.model) && (f.storedBefore == 0 || r.storedAt < f.storedBefore) &&
		(f.endpoint == "" || r.endpoint == "" || matchesEndpoint(f.endpoint, r.endpoint))
}

// cachedAnswer returns the token and the sealed answer of a row that has not expired, or errNotFound.
func (s *store) cachedAnswer(ctx context.Context, id, project, now int64) (token int64, answer []byte, err error) {
	err = s.readDB.QueryRowContext(ctx, `
		SELECT token, answer FROM cache WHERE id = ? AND project = ? AND expires_at > ?`, id, project, now).
		Scan(&token, &answer)
	return token, answer, mapNoRows(err)
}

// addCached stores answers, each in place of an earlier one with the same id.
func (s *store) addCached(ctx context.Context, rows []cacheRow) error {
	return s.withTx(ctx, func(tx *sql.Tx) error {
		insert, err := tx.PrepareContext(ctx, `
			INSERT INTO cache (id, project, token, model, endpoint, stored_at, expires_at, used_at, size, answer)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
			ON CONFLICT (id) DO UPDATE SET project = excluded.project, token = excluded.token,
				model = excluded.model, endpoint = excluded.endpoint, stored_at = excluded.stored_at,
				expires_at = excluded.expires_at, used_at = excluded.used_at, size = excluded.size,
				answer = excluded.answer`)
		if err != nil {
			return fmt.Errorf("caching answers: %w", err)
		}
		defer insert.Close()
		for i := range rows {
			r := &rows[i]
			if _, err := insert.ExecContext(ctx, r.id, r.project, r.token, r.model, r.endpoint, r.storedAt,
				r.expiresAt, r.usedAt, r.size, r.answer); err != nil {
				return fmt.Errorf("caching answers: %w", err)
			}
		}
		return nil
	})
}

// touchCached records when answers were used.
func (s *store) touchCached(ctx context.Context, uses map[int64]int64) error {
	return s.withTx(ctx, func(tx *sql.Tx) error {
		for id, at := range uses {
			if _, err := tx.ExecContext(ctx, `UPDATE cache SET used_at = ? WHERE id = ?`, at, id); err != nil {
				return fmt.Errorf("recording the use of cached answers: %w", err)
			}
		}
		return nil
	})
}

// cachedIDs returns up to limit ids of cached answers, and the bytes of all of them.
func (s *store) cachedIDs(ctx context.Context, limit int) (ids []int64, bytes int64, err error) {
	ids, err = collect(ctx, s.readDB, "reading which answers are cached", single[int64],
		`SELECT id FROM cache WHERE project > 0 LIMIT ?`, limit)
	if err != nil {
		return nil, 0, err
	}
	_, bytes, err = s.cacheSize(ctx, 0)
	return ids, bytes, err
}

// cacheSize returns how many answers of a project are stored, and their bytes; 0 stands for all projects.
func (s *store) cacheSize(ctx context.Context, project int64) (entries, bytes int64, err error) {
	query := `SELECT count(*), coalesce(sum(size), 0) FROM cache WHERE project = ?`
	if project == 0 {
		query = `SELECT count(*), coalesce(sum(size), 0) FROM cache WHERE project > ?`
	}
	err = scanRow(ctx, s.readDB, "reading the size of the cache", []any{&entries, &bytes}, query, project)
	return entries, bytes, err
}

// deleteCached deletes answers, and returns the ids of those that were there, and their bytes.
func (s *store) deleteCached(ctx context.Context, ids []int64) (deleted []int64, bytes int64, err error) {
	return s.deleteCacheRows(ctx, `
		DELETE FROM cache WHERE id IN (SELECT CAST(value AS BIGINT) FROM json_each(CAST(? AS TEXT)))
		RETURNING id, size`, string(mustMarshal(ids)))
}

// deleteExpiredCached deletes up to limit answers that expire at now or earlier.
func (s *store) deleteExpiredCached(ctx context.Context, now int64, limit int) (ids []int64, bytes int64, err error) {
	return s.deleteCacheRows(ctx, `
		DELETE FROM cache WHERE id IN (SELECT id FROM cache WHERE expires_at <= ? ORDER BY expires_at LIMIT ?)
		RETURNING id, size`, now, limit)
}

// deleteOldestCached deletes the answers that were used longest ago, up to limit.
func (s *store) deleteOldestCached(ctx context.Context, limit int) (ids []int64, bytes int64, err error) {
	return s.deleteCacheRows(ctx, `
		DELETE FROM cache WHERE id IN (SELECT id FROM cache WHERE used_at > 0 ORDER BY used_at LIMIT ?)
		RETURNING id, size`, limit)
}

func (s *store) deleteCacheRows(ctx context.Context, query string, args ...any) (ids []int64, bytes int64, err error) {
	type deleted struct{ id, size int64 }
	rows, err := collect(ctx, s.writeDB, "deleting cached answers", func(d *deleted) []any {
		return []any{&d.id, &d.size}
	}, query, args...)
	for _, r := range rows {
		ids = append(ids, r.id)
		bytes += r.size
	}
	return ids, bytes, err
}

// A cacheUsage is how much is cached of one project and model.
type cacheUsage struct {
	model          string
	entries, bytes int64
	oldestStoredAt int64
}

const maxCacheModels = 1000

// cacheUsage returns what is cached of a project, by model, the largest share first, up to maxCacheModels.
func (s *store) cacheUsage(ctx context.Context, project, now int64) ([]cacheUsage, error) {
	return collect(ctx, s.readDB, "reading what is cached", func(u *cacheUsage) []any {
		return []any{&u.model, &u.entries, &u.bytes, &u.oldestStoredAt}
	}, `SELECT model, count(*), sum(size), min(stored_at) FROM cache WHERE project = ? AND expires_at > ?
		GROUP BY model ORDER BY 3 DESC LIMIT ?`, project, now, maxCacheModels)
}

// A cachePosition is a position in the list of a project's cached answers, which the index cache_project orders.
type cachePosition struct{ token, size, id int64 }

// cachedAfter returns up to limit of a project's cached answers behind a position, without the answers themselves.
func (s *store) cachedAfter(ctx context.Context, project int64, after cachePosition, limit int) ([]cacheRow, error) {
	return collect(ctx, s.readDB, "listing cached answers", func(r *cacheRow) []any {
		return []any{&r.id, &r.project, &r.token, &r.size, &r.model, &r.endpoint, &r.storedAt}
	}, `
		SELECT * FROM (SELECT id, project, token, size, model, endpoint, stored_at FROM cache
			WHERE project = ?1 AND token = ?2 AND size = ?3 AND id > ?4 ORDER BY id LIMIT ?5) same
		UNION ALL
		SELECT * FROM (SELECT id, project, token, size, model, endpoint, stored_at FROM cache
			WHERE project = ?1 AND (token, size) > (?2, ?3) ORDER BY token, size, id LIMIT ?5) later
		LIMIT ?5`, // many have the same size, and an index of more columns would slow down storing
		project, after.token, after.size, after.id, limit)
}

func microsToMillis(us *int64) *float64 {
	if us == nil {
		return nil
	}
	return new(float64(*us) / 1000)
}

func allOutcomes() []callOutcome {
	return []callOutcome{outcomeOpen, outcomeOK, outcomeRefused, outcomeClientGone, outcomeTruncated,
		outcomeUpstreamError, outcomeLost}
}

// A dashPeriod is the time that a dashboard covers: whole steps up to the current one, and the period before.
type dashPeriod struct {
	name, title      string
	fromDay, toDay   string // of a range of days, as it was asked for
	stepMS           int64  // milliseconds
	from, to         int64  // to is at most the end of the current step
	prevFrom, prevTo int64  // as much of the period before as has passed of this one
	grain            string
}

// newPeriod returns the period from a time up to another; the one before began at prevFrom.
func newPeriod(name, title string, now, from, to, prevFrom int64) dashPeriod {
	p := dashPeriod{name: name, title: title, from: from, prevFrom: prevFrom, stepMS: hourMS, grain: "hour"}
	switch length := to - from; {
	case length > 14*dayMS:
		p.stepMS, p.grain = dayMS, "day"
	case length > 2*dayMS:
		p.stepMS = 6 * hourMS
	}
	hour := now - now%hourMS + hourMS
	p.to = min(to, now-now%p.stepMS+p.stepMS)
	p.prevTo = min(min(to, hour)-(from-prevFrom), from)
	return p
}

// dashPeriods returns the periods to choose from. Days, weeks and months are those of UTC; weeks start on Monday.
func dashPeriods(now int64) []dashPeriod {
	hour, day := now-now%hourMS+hourMS, now-now%dayMS
	date := time.UnixMilli(now).UTC()
	month := func(offset int) int64 {
		return time.Date(date.Year(), date.Month()+time.Month(offset), 1, 0, 0, 0, 0, time.UTC).UnixMilli()
	}
	week := day - int64(date.Weekday()+6)%7*dayMS
	return []dashPeriod{
		newPeriod("24h", "24 hours", now, hour-dayMS, hour, hour-2*dayMS),
		newPeriod("7d", "7 days", now, day-6*dayMS, day+dayMS, day-13*dayMS),
		newPeriod("30d", "30 days", now, day-29*dayMS, day+dayMS, day-59*dayMS),
		newPeriod("90d", "90 days", now, day-89*dayMS, day+dayMS, day-179*dayMS),
		newPeriod("today", "Today", now, day, day+dayMS, day-dayMS),
		newPeriod("yesterday", "Yesterday", now, day-dayMS, day, day-2*dayMS),
		newPeriod("this-week", "This week", now, week, week+7*dayMS, week-7*dayMS),
		newPeriod("last-week", "Last week", now, week-7*dayMS, week, week-14*dayMS),
		newPeriod("this-month", "This month", now, month(0), month(1), month(-1)),
		newPeriod("last-month", "Last month", now, month(-1), month(0), month(-2)),
	}
}

const maxRangeDays = 366

// parsePeriod returns the period with a name or, if a day is given, the range of days, whose last is included. Without
// one of its days, a range begins a week before its end, or ends today.
func parsePeriod(now int64, name, from, to string) (dashPeriod, error) {
	if from == "" && to == "" {
		names := []string{}
		for _, p := range dashPeriods(now) {
			if p.name == name {
				return p, nil
			}
			names = append(names, p.name)
		}
		return dashPeriod{}, checkChoice("period", name, names...)
	}
	last := time.UnixMilli(now).UTC().Truncate(24 * time.Hour)
	first, err := last, error(nil)
	if to != "" {
		last, err = time.Parse(time.DateOnly, to)
	}
	first = last.AddDate(0, 0, -6)
	if from != "" && err == nil {
		first, err = time.Parse(time.DateOnly, from)
	}
	if err != nil {
		return dashPeriod{}, badRequest("invalid_value", "from", "From and To must be days such as 2026-01-31.")
	}
	begin, end := first.UnixMilli(), last.UnixMilli()+dayMS
	switch {
	case end <= begin:
		return dashPeriod{}, badRequest("invalid_value", "from", "From must not be after To.")
	case end-begin > maxRangeDays*dayMS:
		return dashPeriod{}, badRequest("invalid_value", "from", "A range has at most 366 days.")
	case begin > now || first.Year() < 2000:
		return dashPeriod{}, badRequest("invalid_value", "from", "From must be in the past, after the year 2000.")
	}
	p := newPeriod("range", "Range", now, begin, end, begin-(end-begin))
	p.fromDay, p.toDay = first.Format(time.DateOnly), last.Format(time.DateOnly)
	return p, nil
}

func (p *dashPeriod) steps() int         { return int((p.to - p.from) / p.stepMS) }
func (p *dashPeriod) index(at int64) int { return int((at - p.from) / p.stepMS) }

// hasWholeDays reports whether sums of days are enough: the period begins with a day.
func (p *dashPeriod) hasWholeDays() bool { return p.from%dayMS == 0 }

// addTo adds the period to the parameters of an address.
func (p *dashPeriod) addTo(values url.Values) url.Values {
	if p.fromDay == "" {
		values.Set("period", p.name)
	} else {
		values.Set("from", p.fromDay)
		values.Set("to", p.toDay)
	}
	for name, list := range values {
		if list[0] == "" {
			delete(values, name)
		}
	}
	return values
}

// routedByText says how the call came to its upstream: by what it has in common with others, or after another attempt
// had failed.
func (r *requestRow) routedByText() string {
	if r.attempts > 1 {
		return "failover"
	}
	return r.routedBy
}

// idempotencyText returns the hash of the Idempotency-Key as text, "" for none.
func (r *requestRow) idempotencyText() string {
	if r.idempotencyHash == 0 {
		return ""
	}
	return fmt.Sprintf("%016x", uint64(r.idempotencyHash))
}

// isRecorded reports whether a call has a row.
func (s *store) isRecorded(ctx context.Context, id int64) (bool, error) {
	n, err := queryValue[int](ctx, s.readDB, "looking for a call", `SELECT count(*) FROM requests WHERE id = ?`, id)
	return n > 0, err
}
