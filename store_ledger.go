// The ledger's writing half: one transaction for a batch of calls. It is the
// hottest SQL there is, so it speaks to the driver itself, on the one writing
// connection, with prepared statements: going through database/sql's own
// layers costs half as much again (measured: bench/).
package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"maps"
	"strconv"
	"strings"
)

// The statements of a ledgerWriter.
const (
	stmtInsertPending = iota
	stmtDeletePending
	stmtCountTokenUse
	stmtRecordOK
	stmtRecordOK8
	stmtRecord
	stmtSum
	stmtHour
	stmtLatency
	stmtContent
	stmtBeginTx
	stmtCommit
	stmtRollback
	ledgerStmtCount
)

// Ordinary rows have a statement of their own, and one that takes eight at once:
// most are such, and each value and each statement costs.
const (
	okInsert = `
			INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address, status, outcome, usage_source,
				input_tokens, output_tokens, cost, first_byte_us, total_us)
			VALUES `
	okValues                       = `(?, ?, ?, ?, ?, ?, ?, ?, 200, 'ok', 'exact', ?, ?, ?, ?, ?)`
	okRowsPerInsert, okColumnCount = 8, 13
)

func ledgerSQL() [ledgerStmtCount]string {
	return [...]string{
		stmtInsertPending: `INSERT INTO begun (batch, calls) VALUES (?, ?)`,
		stmtDeletePending: `DELETE FROM begun WHERE batch = ?`,
		stmtCountTokenUse: `UPDATE tokens SET request_count = request_count + ?, last_used_at = max(coalesce(last_used_at, 0), ?) WHERE seq = ?`,
		stmtRecordOK:      okInsert + okValues,
		stmtRecordOK8:     okInsert + okValues + `, ` + okValues + `, ` + okValues + `, ` + okValues + `, ` + okValues + `, ` + okValues + `, ` + okValues + `, ` + okValues,
		stmtRecord: `
			INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address, status, outcome, error_code, usage_source,
				input_tokens, cached_tokens, cache_write_tokens, output_tokens, reasoning_tokens,
				cost, first_byte_us, total_us, attempts, cache, limit_hit, attempt_log)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		stmtSum:      sumStatement,
		stmtHour:     hourStatement,
		stmtLatency:  latencyStatement,
		stmtContent:  insertContent,
		stmtBeginTx:  `BEGIN IMMEDIATE`,
		stmtCommit:   `COMMIT`,
		stmtRollback: `ROLLBACK`,
	}
}

// A ledgerWriter holds the prepared statements of the writing connection. It
// belongs to one goroutine.
type ledgerWriter struct {
	store *store
	conn  driver.Conn // the statements are of this one; database/sql may open another
	stmts [ledgerStmtCount]driver.StmtExecContext
	args  [okRowsPerInsert * okColumnCount]driver.NamedValue // the most that a statement has
}

func (s *store) newLedgerWriter() *ledgerWriter {
	w := &ledgerWriter{store: s}
	for i := range w.args {
		w.args[i].Ordinal = i + 1
	}
	return w
}

// A ledgerBatch is what one transaction writes.
type ledgerBatch struct {
	pendingBatchID     int64         // the name of the batch of calls that begin; 0: none do
	pendingRecordsJSON []byte        // those calls, as the table begun has them
	records            []*requestRow // calls that have ended
	endedBatchIDs      []int64       // batches whose last calls are among them
	sumOnlyRows        []*requestRow // calls that count in the sums only
}

// write writes a batch: all of it, or nothing.
func (w *ledgerWriter) write(ctx context.Context, b ledgerBatch) error {
	conn, err := w.store.writeDB.Conn(ctx)
	if err != nil {
		return fmt.Errorf("taking the writing connection: %w", err)
	}
	defer conn.Close() // gives it back
	return conn.Raw(func(c any) error {
		if err := w.prepare(c); err != nil {
			return err
		}
		if err := w.exec(ctx, stmtBeginTx); err != nil {
			return fmt.Errorf("beginning a transaction: %w", err)
		}
		err := w.writeBatch(ctx, b)
		if err == nil {
			if err = w.exec(ctx, stmtCommit); err == nil {
				return nil
			}
			err = fmt.Errorf("committing: %w", err)
		}
		_ = w.exec(ctx, stmtRollback) // fails where SQLite has rolled back by itself
		return err
	})
}

// prepare makes the statements, unless they are there for this connection.
func (w *ledgerWriter) prepare(c any) error {
	conn, ok := c.(driver.Conn)
	if !ok {
		return fmt.Errorf("the driver's connection is a %T", c)
	}
	if w.conn == conn {
		return nil
	}
	// The connection before is closed, for there is one at a time, and its
	// statements with it: to close them again would be a crash.
	clear(w.stmts[:])
	for i, text := range ledgerSQL() {
		st, err := conn.Prepare(text)
		if err != nil {
			return fmt.Errorf("preparing the ledger: %w", err)
		}
		if w.stmts[i], ok = st.(driver.StmtExecContext); !ok {
			return fmt.Errorf("the driver's statement is a %T", st)
		}
	}
	w.conn = conn
	return nil
}

// close lets the statements go, before the store is closed.
func (w *ledgerWriter) close() {
	conn, err := w.store.writeDB.Conn(context.Background())
	if err != nil {
		return // the connection is gone, and its statements with it
	}
	defer conn.Close()
	_ = conn.Raw(func(any) error { w.closeStmts(); return nil })
}

func (w *ledgerWriter) closeStmts() {
	for i, st := range w.stmts {
		if st, ok := st.(driver.Stmt); ok {
			_ = st.Close()
		}
		w.stmts[i] = nil
	}
	w.conn = nil
}

// exec runs a statement. Values are int64, string, []byte, bool or nil.
func (w *ledgerWriter) exec(ctx context.Context, stmt int, values ...driver.Value) error {
	for i, v := range values {
		w.args[i].Value = v
	}
	_, err := w.stmts[stmt].ExecContext(ctx, w.args[:len(values)])
	return err
}

func (w *ledgerWriter) writeBatch(ctx context.Context, b ledgerBatch) error {
	if b.pendingBatchID != 0 {
		if err := w.exec(ctx, stmtInsertPending, b.pendingBatchID, string(b.pendingRecordsJSON)); err != nil {
			return fmt.Errorf("noting calls that begin: %w", err)
		}
	}
	type used struct{ calls, at int64 }
	counts := map[int64]used{}
	if err := w.insertRequests(ctx, b.records); err != nil {
		return fmt.Errorf("recording calls: %w", err)
	}
	for _, r := range b.records {
		if r.outcome != outcomeRefused {
			u := counts[r.token]
			counts[r.token] = used{u.calls + 1, max(u.at, r.started+r.totalUS/1000)}
		}
	}
	for _, batch := range b.endedBatchIDs {
		if err := w.exec(ctx, stmtDeletePending, batch); err != nil {
			return fmt.Errorf("letting go of calls that have ended: %w", err)
		}
	}
	for token, u := range counts {
		if err := w.exec(ctx, stmtCountTokenUse, u.calls, u.at, token); err != nil {
			return fmt.Errorf("counting calls: %w", err)
		}
	}
	sums := newUsageTally()
	for _, rows := range [...][]*requestRow{b.records, b.sumOnlyRows} {
		for _, r := range rows {
			sums.add(r)
		}
	}
	exec := func(stmt int) func(...driver.Value) error {
		return func(values ...driver.Value) error { return w.exec(ctx, stmt, values...) }
	}
	return sums.write(exec(stmtSum), exec(stmtHour), exec(stmtLatency))
}

// appendPendingRecord appends the call as begun has it.
func (r *requestRow) appendPendingRecord(b []byte) []byte {
	for i, n := range [...]int64{r.id, r.project, r.token, r.upstream} {
		b = strconv.AppendInt(append(b, "[,"[min(i, 1)]), n, 10)
	}
	b = appendJSONString(append(b, ','), r.endpoint)
	b = appendJSONString(append(b, ','), r.model)
	b = append(b, ",0,"...)
	if r.stream {
		b[len(b)-2] = '1'
	}
	b = appendJSONString(b, r.address)
	b = strconv.AppendInt(append(b, ','), r.counts.input, 10)
	b = strconv.AppendInt(append(b, ','), r.counts.output, 10)
	return append(b, ']')
}

// insertRequests writes the rows of calls, and their content where that is kept.
func (w *ledgerWriter) insertRequests(ctx context.Context, rows []*requestRow) error {
	together := make([]driver.Value, 0, okRowsPerInsert*okColumnCount)
	for _, r := range rows {
		if r.isPlainOK() {
			together = append(together, r.id, r.project, r.token, r.upstream, r.endpoint, r.model, r.stream, r.address,
				r.counts.input, r.counts.output, r.cost, r.firstByteUS, r.totalUS)
			if len(together) == cap(together) {
				if err := w.exec(ctx, stmtRecordOK8, together...); err != nil {
					return err
				}
				together = together[:0]
			}
		} else if err := w.exec(ctx, stmtRecord, r.id, r.project, r.token, r.upstream, r.endpoint, r.model, r.stream, r.address,
			int64(r.status), string(r.outcome), r.errorCode, string(r.source),
			r.counts.input, r.counts.cached, r.counts.cacheWrite, r.counts.output, r.counts.reasoning,
			nullUnless(r.priced, r.cost), nullUnless(r.firstByteUS >= 0, r.firstByteUS), r.totalUS, int64(r.attempts), r.cache, r.limitHit, r.attemptLog); err != nil {
			return err
		}
		if c := r.content; c != nil {
			if err := w.exec(ctx, stmtContent, c.id, c.project, c.expiresAt, c.request, c.requestBytes, c.response, c.responseBytes); err != nil {
				return err
			}
		}
	}
	for ; len(together) > 0; together = together[okColumnCount:] {
		if err := w.exec(ctx, stmtRecordOK, together[:okColumnCount]...); err != nil {
			return err
		}
	}
	return nil
}

// isPlainOK reports whether the row has nothing to say beyond what a plain
// successful call has.
func (r *requestRow) isPlainOK() bool {
	return r.outcome == outcomeOK && r.status == 200 && r.source == usageExact && r.priced && r.firstByteUS >= 0 &&
		r.counts.cached == 0 && r.counts.cacheWrite == 0 && r.counts.reasoning == 0 && r.attempts == 1 && r.errorCode == "" && r.cache == "" &&
		r.limitHit == "" && r.attemptLog == ""
}

// A usageSumKey names one row of usage_sums.
type usageSumKey struct {
	grain           string
	token, project  int64
	start           int64 // of the hour or day
	model, endpoint string
	outcome         callOutcome
	requestedModel  string
}

// billedWithoutUsage reports whether a provider charges for a call of an endpoint whose
// answer may count no tokens: speech by the character, pictures by the piece.
func billedWithoutUsage(endpoint string) bool {
	return strings.HasPrefix(endpoint, "POST /v1/audio/") || strings.HasPrefix(endpoint, "POST /v1/images/")
}

// An usageSum is what usage_sums adds up.
type usageSum struct {
	calls, input, cached, output, reasoning int64
	cost, unpriced, estimated, totalUS      int64
	wouldRefuse                             int64
}

func (s *usageSum) add(r *requestRow) {
	s.calls++
	s.input += r.counts.input
	s.cached += r.counts.cached
	s.output += r.counts.output
	s.reasoning += r.counts.reasoning
	if r.priced {
		s.cost += r.cost
	} else if r.source != usageNone || r.outcome == outcomeOK && billedWithoutUsage(r.endpoint) {
		s.unpriced++
	}
	if r.source == usageEstimated {
		s.estimated++
	}
	if r.wouldRefuse {
		s.wouldRefuse++
	}
	s.totalUS += r.totalUS
}

const sumStatement = `
	INSERT INTO usage_sums (grain, token, at, project, model, endpoint, outcome, asked,
		calls, input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost, unpriced_calls, estimated_calls, would_refuse, total_us)
	VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
	ON CONFLICT DO UPDATE SET calls = calls + excluded.calls,
		input_tokens = input_tokens + excluded.input_tokens, cached_tokens = cached_tokens + excluded.cached_tokens,
		output_tokens = output_tokens + excluded.output_tokens, reasoning_tokens = reasoning_tokens + excluded.reasoning_tokens,
		cost = cost + excluded.cost, unpriced_calls = unpriced_calls + excluded.unpriced_calls,
		estimated_calls = estimated_calls + excluded.estimated_calls, would_refuse = would_refuse + excluded.would_refuse,
		total_us = total_us + excluded.total_us`

func nullUnless(ok bool, v int64) any {
	if ok {
		return v
	}
	return nil
}

// sumModel is the model under which a call is summed. A name that a client made
// up must not make a row, or one client could fill the disk with them.
func (r *requestRow) sumModel() string {
	if r.modelTracked {
		return r.model
	}
	return ""
}

// otherModels stands in sums for models asked for that are not kept apart.
const otherModels = "*"

// sumRequestedModel is the model asked for, under the same rule.
func (r *requestRow) sumRequestedModel() string {
	if r.requestedModelTracked || r.requestedModel == "" {
		return r.requestedModel
	}
	return otherModels
}

// An usageTally adds up calls for the sums and the hours of projects.
type usageTally struct {
	sums  map[usageSumKey]*usageSum // by hour, of single tokens
	hours map[hourKey]*hourSum

	lastKey  usageSumKey // the call before, which is often of the same kind
	lastSum  *usageSum
	lastHour *hourSum
}

func newUsageTally() *usageTally {
	return &usageTally{sums: map[usageSumKey]*usageSum{}, hours: map[hourKey]*hourSum{}}
}

func (t *usageTally) add(r *requestRow) {
	hour := r.started - r.started%hourMS
	k := usageSumKey{"hour", r.token, r.project, hour, r.sumModel(), r.endpoint, r.outcome, r.sumRequestedModel()}
	if t.lastSum == nil || k != t.lastKey {
		t.lastKey, t.lastSum, t.lastHour = k, getOrInsert(t.sums, k), getOrInsert(t.hours, hourKey{r.project, hour})
	}
	t.lastSum.add(r)
	t.lastHour.add(r)
}

func getOrInsert[K comparable, V any](m map[K]*V, k K) *V {
	v := m[k]
	if v == nil {
		v = new(V)
		m[k] = v
	}
	return v
}

func (k usageSumKey) withGrain(grain string, at int64) usageSumKey {
	k.grain, k.start = grain, at
	return k
}

// rollUp adds, to what was added up for single tokens and projects, the coarser
// sums: each row that calls of many tokens share is written once.
func (t *usageTally) rollUp() {
	for k, v := range maps.Clone(t.sums) {
		day, project, everyone := k.withGrain("day", k.start-k.start%dayMS), k, k
		project.token = 0
		everyone.token, everyone.project, everyone.requestedModel = 0, 0, ""
		for _, to := range [...]usageSumKey{
			day, {grain: "token", token: k.token, project: k.project, start: day.start},
			project, project.withGrain("day", day.start), {grain: "token", project: k.project, start: day.start},
			everyone, everyone.withGrain("day", day.start),
		} {
			getOrInsert(t.sums, to).merge(*v)
		}
	}
	for k, v := range maps.Clone(t.hours) {
		getOrInsert(t.hours, hourKey{0, k.at}).merge(v)
	}
}

// write writes what was added up, with the three statements.
func (t *usageTally) write(sums, hours, latency func(...driver.Value) error) error {
	t.rollUp()
	for k, v := range t.sums {
		if err := sums(k.grain, k.token, k.start, k.project, k.model, k.endpoint, string(k.outcome), k.requestedModel,
			v.calls, v.input, v.cached, v.output, v.reasoning, v.cost, v.unpriced, v.estimated, v.wouldRefuse, v.totalUS); err != nil {
			return fmt.Errorf("adding to the sums: %w", err)
		}
	}
	bounds := latencyBounds()
	for k, v := range t.hours {
		if err := hours(k.project, k.at, v.calls, v.input, v.output, v.cost, v.unpriced,
			v.errors[0], v.errors[1], v.errors[2], v.errors[3]); err != nil {
			return fmt.Errorf("adding to the hours: %w", err)
		}
		for i, firstBytes := range v.firstByteLatency {
			answers, boundMS := v.totalLatency[i], int64(0)
			if i < len(bounds) {
				boundMS = bounds[i]
			}
			if firstBytes == 0 && answers == 0 {
				continue
			}
			if err := latency(k.project, k.at, boundMS, firstBytes, answers); err != nil {
				return fmt.Errorf("adding to the latency: %w", err)
			}
		}
	}
	return nil
}

const hourStatement = `
	INSERT INTO project_hours (project, at, calls, input_tokens, output_tokens, cost, unpriced_calls,
		caller_errors, policy_errors, provider_errors, proxy_errors)
	VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
	ON CONFLICT DO UPDATE SET calls = calls + excluded.calls,
		input_tokens = input_tokens + excluded.input_tokens, output_tokens = output_tokens + excluded.output_tokens,
		cost = cost + excluded.cost, unpriced_calls = unpriced_calls + excluded.unpriced_calls,
		caller_errors = caller_errors + excluded.caller_errors, policy_errors = policy_errors + excluded.policy_errors,
		provider_errors = provider_errors + excluded.provider_errors, proxy_errors = proxy_errors + excluded.proxy_errors`

const latencyStatement = `
	INSERT INTO project_latency (project, at, bucket, first_bytes, answers) VALUES (?, ?, ?, ?, ?)
	ON CONFLICT DO UPDATE SET first_bytes = first_bytes + excluded.first_bytes, answers = answers + excluded.answers`

// pendingRecords returns up to limit calls whose pending record has no row yet: in a database that no program has open,
// those that were running when the last one died.
func (s *store) pendingRecords(ctx context.Context, limit int) ([]requestRow, error) {
	return collect(ctx, s.readDB, "reading pending records", func(r *requestRow) []any {
		return []any{&r.id, &r.started, &r.project, &r.token, &r.upstream, &r.endpoint, &r.model, &r.stream, &r.address,
			&r.counts.input, &r.counts.output}
	}, `SELECT id, started_at, project, token, upstream, endpoint, model, stream, address, input_tokens, output_tokens
		FROM running ORDER BY id LIMIT ?`, limit)
}

// deletePending deletes all pending records.
func (s *store) deletePending(ctx context.Context) error {
	_, err := execCount(ctx, s.writeDB, "deleting pending records", `DELETE FROM begun`)
	return err
}

// lastRequestID returns the highest id of a call, 0 if there is none.
func (s *store) lastRequestID(ctx context.Context) (int64, error) {
	return queryValue[int64](ctx, s.readDB, "reading the last call", `SELECT coalesce(max(id), 0) FROM requests`)
}

// deleteOldRequests deletes up to limit rows with an id below before, and returns how many. The row of a call that still
// has a pending record stays: without it the call would seem to run. Such a record is in no later batch.
func (s *store) deleteOldRequests(ctx context.Context, before int64, limit int) (int64, error) {
	return execCount(ctx, s.writeDB, "deleting old calls", `
		DELETE FROM requests WHERE id IN (SELECT id FROM requests
			WHERE id < ?1 AND id NOT IN (SELECT c.value ->> 0 FROM begun b, json_each(b.calls) c WHERE b.batch < ?1)
			ORDER BY id LIMIT ?2)`, before, limit)
}

// deleteOldSums deletes the hourly sums of up to limit tokens from before a time, and returns how many tokens had any.
// It finds those by stepping from one to the next in the key's order, outside the transaction that deletes.
func (s *store) deleteOldSums(ctx context.Context, before int64, limit int) (int64, error) {
	type tokenKey struct{ project, token int64 }
	tokens, err := collect(ctx, s.readDB, "finding old sums", func(k *tokenKey) []any { return []any{&k.project, &k.token} }, usedTokensCTE+`
		SELECT u.project, u.token FROM used u
		WHERE u.token IS NOT NULL
			AND EXISTS (SELECT 1 FROM usage_sums WHERE grain = ?2 AND project = u.project AND token = u.token AND at < ?3)
		LIMIT ?4`, "", "hour", before, limit)
	if err != nil || len(tokens) == 0 {
		return 0, err
	}
	return int64(len(tokens)), s.withTx(ctx, func(tx *sql.Tx) error {
		for _, k := range tokens {
			if _, err := execCount(ctx, tx, "deleting old sums", `
				DELETE FROM usage_sums WHERE grain = 'hour' AND project = ? AND token = ? AND at < ?`, k.project, k.token, before); err != nil {
				return err
			}
		}
		return nil
	})
}

// deleteOldHours deletes the hours and latencies of up to limit projects from before a time, and returns how many rows it
// deleted.
func (s *store) deleteOldHours(ctx context.Context, before int64, limit int) (deleted int64, err error) {
	for _, query := range [...]string{`
		DELETE FROM project_latency WHERE at < ?1 AND project IN (
			SELECT seq FROM (SELECT 0 AS seq UNION ALL SELECT seq FROM projects) p
			WHERE EXISTS (SELECT 1 FROM project_latency l WHERE l.project = p.seq AND l.at < ?1) LIMIT ?2)`, `
		DELETE FROM project_hours WHERE at < ?1 AND project IN (
			SELECT seq FROM (SELECT 0 AS seq UNION ALL SELECT seq FROM projects) p
			WHERE EXISTS (SELECT 1 FROM project_hours h WHERE h.project = p.seq AND h.at < ?1) LIMIT ?2)`} {
		n, err := execCount(ctx, s.writeDB, "deleting old hours", query, before, limit)
		if err != nil {
			return deleted, err
		}
		deleted += n
	}
	return deleted, nil
}

func (s *usageSum) merge(o usageSum) {
	s.calls += o.calls
	s.input += o.input
	s.cached += o.cached
	s.output += o.output
	s.reasoning += o.reasoning
	s.cost += o.cost
	s.unpriced += o.unpriced
	s.estimated += o.estimated
	s.wouldRefuse += o.wouldRefuse
	s.totalUS += o.totalUS
}
