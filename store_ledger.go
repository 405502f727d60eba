// The ledger's writing half: one transaction for a batch of calls. It is the
// hottest SQL there is, so it speaks to the driver itself, on the one writing
// connection, with prepared statements: going through database/sql's own
// layers costs half as much again (measured: bench/).
package main

import (
	"context"
	"database/sql/driver"
	"fmt"
	"strconv"
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
