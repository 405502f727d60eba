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
	stmtBegin = iota
	stmtOver
	stmtCount
	stmtRecordOK
	stmtRecordOK8
	stmtRecord
	stmtSum
	stmtHour
	stmtContent
	stmtBeginTx
	stmtCommit
	stmtRollback
	ledgerStatements
)

// Ordinary rows have a statement of their own, and one that takes eight at once:
// most are such, and each value and each statement costs.
const (
	okStatement = `
			INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address, status, outcome, usage_source,
				input_tokens, output_tokens, cost, first_byte_us, total_us)
			VALUES `
	okValues              = `(?, ?, ?, ?, ?, ?, ?, ?, 200, 'ok', 'exact', ?, ?, ?, ?, ?)`
	okTogether, okColumns = 8, 13
)

func ledgerTexts() [ledgerStatements]string {
	return [...]string{
		stmtBegin:     `INSERT INTO begun (batch, calls) VALUES (?, ?)`,
		stmtOver:      `DELETE FROM begun WHERE batch = ?`,
		stmtCount:     `UPDATE tokens SET request_count = request_count + ?, last_used_at = max(coalesce(last_used_at, 0), ?) WHERE seq = ?`,
		stmtRecordOK:  okStatement + okValues,
		stmtRecordOK8: okStatement + okValues + `, ` + okValues + `, ` + okValues + `, ` + okValues + `, ` + okValues + `, ` + okValues + `, ` + okValues + `, ` + okValues,
		stmtRecord: `
			INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address, status, outcome, error_code, usage_source,
				input_tokens, cached_tokens, cache_write_tokens, output_tokens, reasoning_tokens,
				cost, first_byte_us, total_us, attempts, cache, limit_hit, attempt_log)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`,
		stmtSum:      sumStatement,
		stmtHour:     hourStatement,
		stmtContent:  contentStatement,
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
	stmts [ledgerStatements]driver.StmtExecContext
	args  [okTogether * okColumns]driver.NamedValue // the most that a statement has
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
	begun   int64         // the name of the batch of calls that begin; 0: none do
	calls   []byte        // those calls, as the table begun has them
	records []*requestRow // calls that have ended
	over    []int64       // batches whose last calls are among them
	sums    []*requestRow // calls that count in the sums only
}

// write writes a batch: all of it, or nothing.
func (w *ledgerWriter) write(ctx context.Context, b ledgerBatch) error {
	conn, err := w.store.write.Conn(ctx)
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
	for i, text := range ledgerTexts() {
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
	conn, err := w.store.write.Conn(context.Background())
	if err != nil {
		return // the connection is gone, and its statements with it
	}
	defer conn.Close()
	_ = conn.Raw(func(any) error { w.drop(); return nil })
}

func (w *ledgerWriter) drop() {
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
	if b.begun != 0 {
		if err := w.exec(ctx, stmtBegin, b.begun, string(b.calls)); err != nil {
			return fmt.Errorf("noting calls that begin: %w", err)
		}
	}
	type used struct{ calls, at int64 }
	counts := map[int64]used{}
	if err := w.record(ctx, b.records); err != nil {
		return fmt.Errorf("recording calls: %w", err)
	}
	for _, r := range b.records {
		if r.outcome != outcomeRefused {
			u := counts[r.token]
			counts[r.token] = used{u.calls + 1, max(u.at, r.started+r.totalUS/1000)}
		}
	}
	for _, batch := range b.over {
		if err := w.exec(ctx, stmtOver, batch); err != nil {
			return fmt.Errorf("letting go of calls that have ended: %w", err)
		}
	}
	for token, u := range counts {
		if err := w.exec(ctx, stmtCount, u.calls, u.at, token); err != nil {
			return fmt.Errorf("counting calls: %w", err)
		}
	}
	sums := newTally()
	for _, rows := range [...][]*requestRow{b.records, b.sums} {
		for _, r := range rows {
			sums.add(r)
		}
	}
	exec := func(stmt int) func(...driver.Value) error {
		return func(values ...driver.Value) error { return w.exec(ctx, stmt, values...) }
	}
	return sums.write(exec(stmtSum), exec(stmtHour))
}

// note appends the call as begun has it.
func (r *requestRow) note(b []byte) []byte {
	for i, n := range [...]int64{r.id, r.project, r.token, r.upstream} {
		b = strconv.AppendInt(append(b, "[,"[min(i, 1)]), n, 10)
	}
	b = appendJSONText(append(b, ','), r.endpoint)
	b = appendJSONText(append(b, ','), r.model)
	b = append(b, ",0,"...)
	if r.stream {
		b[len(b)-2] = '1'
	}
	b = appendJSONText(b, r.address)
	b = strconv.AppendInt(append(b, ','), r.counts.input, 10)
	b = strconv.AppendInt(append(b, ','), r.counts.output, 10)
	return append(b, ']')
}

// record writes the rows of calls, and their content where that is kept.
func (w *ledgerWriter) record(ctx context.Context, rows []*requestRow) error {
	together := make([]driver.Value, 0, okTogether*okColumns)
	for _, r := range rows {
		if r.ordinary() {
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
			if err := w.exec(ctx, stmtContent, c.id, c.project, c.until, c.request, c.requestBytes, c.answer, c.answerBytes); err != nil {
				return err
			}
		}
	}
	for ; len(together) > 0; together = together[okColumns:] {
		if err := w.exec(ctx, stmtRecordOK, together[:okColumns]...); err != nil {
			return err
		}
	}
	return nil
}

// ordinary reports whether the row has nothing to say beyond what a plain
// successful call has.
func (r *requestRow) ordinary() bool {
	return r.outcome == outcomeOK && r.status == 200 && r.source == usageExact && r.priced && r.firstByteUS >= 0 &&
		r.counts.cached == 0 && r.counts.cacheWrite == 0 && r.counts.reasoning == 0 && r.attempts == 1 && r.errorCode == "" && r.cache == "" &&
		r.limitHit == "" && r.attemptLog == ""
}

// A sumKey names one row of usage_sums.
type sumKey struct {
	grain           string
	token, project  int64
	started         int64 // of the hour or day
	model, endpoint string
	outcome         outcome
	asked           string
}

// billedUnseen reports whether a provider charges for a call of an endpoint whose
// answer may count no tokens: speech by the character, pictures by the piece.
func billedUnseen(endpoint string) bool {
	return strings.HasPrefix(endpoint, "POST /v1/audio/") || strings.HasPrefix(endpoint, "POST /v1/images/")
}

// A sum is what usage_sums adds up.
type sum struct {
	calls, input, cached, output, reasoning int64
	cost, unpriced, estimated, totalUS      int64
	wouldRefuse                             int64
}

func (s *sum) add(r *requestRow) {
	s.calls++
	s.input += r.counts.input
	s.cached += r.counts.cached
	s.output += r.counts.output
	s.reasoning += r.counts.reasoning
	if r.priced {
		s.cost += r.cost
	} else if r.source != usageNone || r.outcome == outcomeOK && billedUnseen(r.endpoint) {
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
	if r.knownModel {
		return r.model
	}
	return ""
}

// askedOther stands in sums for models asked for that are not kept apart.
const askedOther = "*"

// sumAsked is the model asked for, under the same rule.
func (r *requestRow) sumAsked() string {
	if r.knownAsked || r.asked == "" {
		return r.asked
	}
	return askedOther
}

// A tally adds up calls for the sums and the hours of projects.
type tally struct {
	sums  map[sumKey]*sum // by hour, of single tokens
	hours map[hourKey]*hourSum

	last sumKey // the call before, which is often of the same kind
	sum  *sum
	hour *hourSum
}

func newTally() *tally { return &tally{sums: map[sumKey]*sum{}, hours: map[hourKey]*hourSum{}} }

func (t *tally) add(r *requestRow) {
	hour := r.started - r.started%hourMS
	k := sumKey{"hour", r.token, r.project, hour, r.sumModel(), r.endpoint, r.outcome, r.sumAsked()}
	if t.sum == nil || k != t.last {
		t.last, t.sum, t.hour = k, addTo(t.sums, k), addTo(t.hours, hourKey{r.project, hour})
	}
	t.sum.add(r)
	t.hour.add(r)
}

func addTo[K comparable, V any](m map[K]*V, k K) *V {
	v := m[k]
	if v == nil {
		v = new(V)
		m[k] = v
	}
	return v
}

func (k sumKey) of(grain string, at int64) sumKey {
	k.grain, k.started = grain, at
	return k
}

// all adds, to what was added up for single tokens and projects, the coarser
// sums: each row that calls of many tokens share is written once.
func (t *tally) all() {
	for k, v := range maps.Clone(t.sums) {
		day, project, everyone := k.of("day", k.started-k.started%dayMS), k, k
		project.token = 0
		everyone.token, everyone.project, everyone.asked = 0, 0, ""
		for _, to := range [...]sumKey{
			day, {grain: "token", token: k.token, project: k.project, started: day.started},
			project, project.of("day", day.started), {grain: "token", project: k.project, started: day.started},
			everyone, everyone.of("day", day.started),
		} {
			addTo(t.sums, to).merge(*v)
		}
	}
	for k, v := range maps.Clone(t.hours) {
		addTo(t.hours, hourKey{0, k.at}).merge(v)
	}
}

// write writes what was added up, with the two statements.
func (t *tally) write(sums, hours func(...driver.Value) error) error {
	t.all()
	for k, v := range t.sums {
		if err := sums(k.grain, k.token, k.started, k.project, k.model, k.endpoint, string(k.outcome), k.asked,
			v.calls, v.input, v.cached, v.output, v.reasoning, v.cost, v.unpriced, v.estimated, v.wouldRefuse, v.totalUS); err != nil {
			return fmt.Errorf("adding to the sums: %w", err)
		}
	}
	for k, v := range t.hours {
		if err := hours(v.values(k)...); err != nil {
			return fmt.Errorf("adding to the hours: %w", err)
		}
	}
	return nil
}

// runningCalls returns up to limit calls that are noted as running: of a database
// that no program has open, those that died with the last one.
func (s *store) runningCalls(ctx context.Context, limit int) ([]*requestRow, error) {
	rows, err := s.read.QueryContext(ctx, `
		SELECT id, started_at, project, token, upstream, endpoint, model, stream, address, input_tokens, output_tokens
		FROM running ORDER BY id LIMIT ?`, limit)
	if err != nil {
		return nil, fmt.Errorf("reading running calls: %w", err)
	}
	defer rows.Close()
	var out []*requestRow
	for rows.Next() {
		r := &requestRow{}
		if err := rows.Scan(&r.id, &r.started, &r.project, &r.token, &r.upstream, &r.endpoint, &r.model, &r.stream, &r.address,
			&r.counts.input, &r.counts.output); err != nil {
			return nil, fmt.Errorf("reading running calls: %w", err)
		}
		out = append(out, r)
	}
	return out, rows.Err()
}

// forgetBegun deletes all notes of calls that began.
func (s *store) forgetBegun(ctx context.Context) error {
	if _, err := s.write.ExecContext(ctx, `DELETE FROM begun`); err != nil {
		return fmt.Errorf("letting go of running calls: %w", err)
	}
	return nil
}

// lastRequest returns the highest id there is, 0 if there is none.
func (s *store) lastRequest(ctx context.Context) (id int64, err error) {
	if err = s.read.QueryRowContext(ctx, `SELECT coalesce(max(id), 0) FROM requests`).Scan(&id); err != nil {
		return 0, fmt.Errorf("reading the last call: %w", err)
	}
	return id, nil
}

// forgetRequests deletes up to limit rows with an id below before, and returns
// how many. The row of a call that is noted as begun stays: without it the call
// would seem to run. No note of such a call is in a later batch.
func (s *store) forgetRequests(ctx context.Context, before int64, limit int) (int64, error) {
	res, err := s.write.ExecContext(ctx, `
		DELETE FROM requests WHERE id IN (SELECT id FROM requests
			WHERE id < ?1 AND id NOT IN (SELECT c.value ->> 0 FROM begun b, json_each(b.calls) c WHERE b.batch < ?1) ORDER BY id LIMIT ?2)`, before, limit)
	if err != nil {
		return 0, fmt.Errorf("deleting old rows: %w", err)
	}
	return res.RowsAffected()
}

// forgetSums deletes the hourly sums of up to limit tokens from before a time,
// and returns how many tokens had any. Which ones is found by going from one to
// the next in the key's order, outside the transaction that deletes.
func (s *store) forgetSums(ctx context.Context, before int64, limit int) (int64, error) {
	rows, err := s.read.QueryContext(ctx, usedTokens+`
		SELECT u.project, u.token FROM used u
		WHERE u.token IS NOT NULL AND EXISTS (SELECT 1 FROM usage_sums WHERE grain = ?2 AND project = u.project AND token = u.token AND at < ?3)
		LIMIT ?4`, "", "hour", before, limit)
	if err != nil {
		return 0, fmt.Errorf("finding old sums: %w", err)
	}
	defer rows.Close()
	var found [][2]int64
	for rows.Next() {
		var project, token int64
		if err := rows.Scan(&project, &token); err != nil {
			return 0, fmt.Errorf("finding old sums: %w", err)
		}
		found = append(found, [2]int64{project, token})
	}
	if err := rows.Err(); err != nil || len(found) == 0 {
		return 0, err
	}
	return int64(len(found)), s.tx(ctx, func(tx *sql.Tx) error {
		for _, f := range found {
			if _, err := tx.ExecContext(ctx, `
				DELETE FROM usage_sums WHERE grain = 'hour' AND project = ? AND token = ? AND at < ?`, f[0], f[1], before); err != nil {
				return fmt.Errorf("deleting old sums: %w", err)
			}
		}
		return nil
	})
}

func (s *sum) merge(o sum) {
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
