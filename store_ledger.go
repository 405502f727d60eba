// The ledger's writing half: one transaction for a batch of calls. It is the
// hottest SQL there is, so it speaks to the driver itself, on the one writing
// connection, with prepared statements: going through database/sql's own
// layers costs half as much again (measured: bench/).
package main

import (
	"context"
	"database/sql/driver"
	"fmt"
)

// The statements of a ledgerWriter.
const (
	stmtBegin = iota
	stmtCount
	stmtSettle
	stmtSettleOK
	stmtRecord
	stmtSum
	stmtHour
	stmtContent
	stmtBeginTx
	stmtCommit
	stmtRollback
	ledgerStatements
)

func ledgerTexts() [ledgerStatements]string {
	return [...]string{
		stmtBegin: `
			INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address, outcome, usage_source, input_tokens, output_tokens)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'open', 'estimated', ?, ?)`,
		stmtCount: `UPDATE tokens SET request_count = request_count + ?, last_used_at = max(coalesce(last_used_at, 0), ?) WHERE seq = ?`,
		stmtSettle: `
			UPDATE requests SET upstream = ?, model = ?, status = ?, outcome = ?, error_code = ?, usage_source = ?,
				input_tokens = ?, cached_tokens = ?, cache_write_tokens = ?, output_tokens = ?, reasoning_tokens = ?,
				cost = ?, first_byte_us = ?, total_us = ?, attempts = ?, cache = ?, limit_hit = ?, attempt_log = ?
			WHERE id = ?`,
		stmtSettleOK: `
			UPDATE requests SET model = ?, status = 200, outcome = 'ok', usage_source = 'exact', input_tokens = ?, output_tokens = ?,
				cost = ?, first_byte_us = ?, total_us = ?
			WHERE id = ?`,
		stmtRecord: `
			INSERT INTO requests (upstream, model, status, outcome, error_code, usage_source,
				input_tokens, cached_tokens, cache_write_tokens, output_tokens, reasoning_tokens,
				cost, first_byte_us, total_us, attempts, cache, limit_hit, attempt_log, id, project, token, endpoint, stream, address)
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
	args  [2 + hourColumns]driver.NamedValue // hourStatement has the most
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
	begins  []*requestRow // as they were when begun
	settles []*requestRow // begun before
	records []*requestRow // never begun: begin and settle in one
	sums    []*requestRow // counted in the sums only
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
	type used struct{ calls, at int64 }
	counts := map[int64]used{}
	count := func(r *requestRow, n int64) {
		u := counts[r.token]
		counts[r.token] = used{u.calls + n, max(u.at, r.started)}
	}
	for _, r := range b.begins {
		if err := w.exec(ctx, stmtBegin, r.id, r.project, r.token, r.upstream, r.endpoint, r.model, r.stream, r.address,
			r.counts.input, r.counts.output); err != nil {
			return fmt.Errorf("beginning a row: %w", err)
		}
		count(r, 1)
	}
	for _, r := range b.settles {
		var err error
		if r.ordinary() {
			err = w.exec(ctx, stmtSettleOK, r.model, r.counts.input, r.counts.output, r.cost, r.firstByteUS, r.totalUS, r.id)
		} else {
			err = w.exec(ctx, stmtSettle, r.settlement()...)
		}
		if err != nil {
			return fmt.Errorf("settling a row: %w", err)
		}
		if r.outcome == outcomeRefused { // it began, and was ended before it was forwarded
			count(r, -1)
		}
	}
	for _, r := range b.records {
		if err := w.exec(ctx, stmtRecord, append(r.settlement(), r.project, r.token, r.endpoint, r.stream, r.address)...); err != nil {
			return fmt.Errorf("recording a row: %w", err)
		}
		if r.outcome != outcomeRefused {
			count(r, 1)
		}
	}
	for _, rows := range [...][]*requestRow{b.settles, b.records} {
		for _, r := range rows {
			if c := r.content; c != nil {
				if err := w.exec(ctx, stmtContent, c.id, c.project, c.until, c.request, c.requestBytes, c.answer, c.answerBytes); err != nil {
					return fmt.Errorf("keeping content: %w", err)
				}
			}
		}
	}
	for token, u := range counts {
		if err := w.exec(ctx, stmtCount, u.calls, u.at, token); err != nil {
			return fmt.Errorf("counting calls: %w", err)
		}
	}
	sums := newTally()
	for _, rows := range [...][]*requestRow{b.settles, b.records, b.sums} {
		for _, r := range rows {
			sums.add(r)
		}
	}
	exec := func(stmt int) func(...driver.Value) error {
		return func(values ...driver.Value) error { return w.exec(ctx, stmt, values...) }
	}
	return sums.write(exec(stmtSum), exec(stmtHour))
}

// settlement returns the values that settle and record share.
func (r *requestRow) settlement() []driver.Value {
	return []driver.Value{r.upstream, r.model, int64(r.status), string(r.outcome), r.errorCode, string(r.source),
		r.counts.input, r.counts.cached, r.counts.cacheWrite, r.counts.output, r.counts.reasoning,
		nullUnless(r.priced, r.cost), nullUnless(r.firstByteUS >= 0, r.firstByteUS), r.totalUS, int64(r.attempts), r.cache, r.limitHit, r.attemptLog, r.id}
}

// ordinary reports whether all that settling changes in the row is what a plain
// successful call changes. Most are such, and each column costs.
func (r *requestRow) ordinary() bool {
	return r.outcome == outcomeOK && r.status == 200 && r.source == usageExact && r.priced && r.firstByteUS >= 0 &&
		r.counts.cached == 0 && r.counts.cacheWrite == 0 && r.counts.reasoning == 0 && r.attempts == 1 && r.errorCode == "" && r.cache == "" && r.limitHit == ""
}
