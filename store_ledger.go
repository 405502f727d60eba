// This file has the SQL that writes the ledger: one transaction for a batch of calls. It runs for every
// call, so it uses the driver's own connection, the one that writes, with statements that are prepared once
// and take up to eight rows at a time. Through database/sql a call's share costs a fifth more CPU: 9.2
// instead of 7.7 µs where calls have one token, 45 instead of 39 µs where each has its own
// (BenchmarkLedgerBatch).
package main

import (
	"context"
	"database/sql/driver"
	"errors"
	"fmt"
	"strconv"
	"time"
)

// The statements of a ledgerWriter. One that ends in 8 is the one before it with eight rows.
const (
	stmtInsertPending = iota
	stmtDeletePending
	stmtCountTokenUse
	stmtRecordOK
	stmtRecordOK8
	stmtRecordAgentOK
	stmtRecordAgentOK8
	stmtRecord
	stmtRecord8
	stmtPrice
	stmtContent
	stmtBackground
	stmtBackgroundUsage
	stmtBatchUsage
	stmtBatchShown
	stmtSum
	stmtSum8
	stmtSumHits
	stmtAttributedSum
	stmtAttributedSum8
	stmtLimitUse
	stmtHour
	stmtLatency
	stmtLatency8
	stmtDelivered
	stmtKeepInMemory
	stmtBeginTx
	stmtCommit
	stmtRollback
	ledgerStmtCount
)

// The numbers of values in one row.
const (
	okColumnCount, agentOKColumnCount, recordColumnCount      = 14, 22, 34
	sumColumnCount, attributedColumnCount, latencyColumnCount = 19, 24, 5
)

// Successful calls have shorter statements, because most calls are such and each value costs: a plain call, and one
// of an agent, with a session, a cached prompt or such.
const (
	insertOK = `
		INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address, status, outcome,
			usage_source, input_tokens, output_tokens, cost, price, first_byte_us, total_us)
		VALUES `
	okValues = `(?, ?, ?, ?, ?, ?, ?, ?, 200, 'ok', 'exact', ?, ?, ?, ?, ?, ?)`

	insertAgentOK = `
		INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address, status, outcome,
			usage_source, input_tokens, output_tokens, cost, price, first_byte_us, total_us, cached_tokens,
			cache_write_tokens, reasoning_tokens, details, session, end_user, tags, routed_by)
		VALUES `
	agentOKValues = `(?, ?, ?, ?, ?, ?, ?, ?, 200, 'ok', 'exact', ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`

	insertRecord = `
		INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address, status, outcome,
			error_code, usage_source, input_tokens, cached_tokens, cache_write_tokens, output_tokens,
			reasoning_tokens, cost, first_byte_us, total_us, attempts, cache, limit_hit, attempt_log,
			saved, saved_us, details, price, session, end_user, tags, routed_by, client_retry, idempotency_hash)
		VALUES `
	recordValues = `(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?,
			?, ?, ?)`

	insertSums = `
		INSERT INTO usage_sums AS s (grain, token, at, project, model, endpoint, outcome, asked, service_tier, calls,
			input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost, unpriced_calls, estimated_calls,
			would_refuse, total_us)
		VALUES `
	sumValues = `(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`
	// The additions stop at the largest int64: a larger sum would become a REAL, which the column refuses.
	addToSums = ` ON CONFLICT (grain, project, token, at, model, endpoint, outcome, asked, service_tier) DO UPDATE` +
		setSums
	setSums = `
			SET calls = min(s.calls, 9223372036854775807 - excluded.calls) + excluded.calls,
			input_tokens = min(s.input_tokens, 9223372036854775807 - excluded.input_tokens) + excluded.input_tokens,
			cached_tokens = min(s.cached_tokens, 9223372036854775807 - excluded.cached_tokens) + excluded.cached_tokens,
			output_tokens = min(s.output_tokens, 9223372036854775807 - excluded.output_tokens) + excluded.output_tokens,
			reasoning_tokens = min(s.reasoning_tokens, 9223372036854775807 - excluded.reasoning_tokens)
				+ excluded.reasoning_tokens,
			cost = min(s.cost, 9223372036854775807 - excluded.cost) + excluded.cost,
			unpriced_calls = min(s.unpriced_calls, 9223372036854775807 - excluded.unpriced_calls)
				+ excluded.unpriced_calls,
			estimated_calls = min(s.estimated_calls, 9223372036854775807 - excluded.estimated_calls)
				+ excluded.estimated_calls,
			would_refuse = min(s.would_refuse, 9223372036854775807 - excluded.would_refuse) + excluded.would_refuse,
			total_us = min(s.total_us, 9223372036854775807 - excluded.total_us) + excluded.total_us`

	// sumColumns are what both tables of sums add up, in the order of usageSum.counters.
	sumColumns = `calls, input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost, unpriced_calls,
			estimated_calls, would_refuse, total_us, cache_hits, saved, saved_us, prompt_saved, client_retries`
	insertAttributedSum = `
		INSERT INTO attribution_sums AS s (project, attribute, at, value, token, model, endpoint, outcome, asked,
			` + sumColumns + `)
		VALUES `
	attributedValues = `(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`
	addToAttributed  = `
		ON CONFLICT (project, attribute, at, value, token, model, endpoint, outcome, asked) DO UPDATE` + setSums + `,
			cache_hits = min(s.cache_hits, 9223372036854775807 - excluded.cache_hits) + excluded.cache_hits,
			saved = min(s.saved, 9223372036854775807 - excluded.saved) + excluded.saved,
			saved_us = min(s.saved_us, 9223372036854775807 - excluded.saved_us) + excluded.saved_us,
			prompt_saved = min(s.prompt_saved, 9223372036854775807 - excluded.prompt_saved) + excluded.prompt_saved,
			client_retries = min(s.client_retries, 9223372036854775807 - excluded.client_retries)
				+ excluded.client_retries`

	// Most rows of the sums have no hit of a cache and no retry, so these columns are added to separately.
	addHits = `UPDATE usage_sums SET
			cache_hits = min(cache_hits, 9223372036854775807 - ?1) + ?1,
			saved = min(saved, 9223372036854775807 - ?2) + ?2,
			saved_us = min(saved_us, 9223372036854775807 - ?3) + ?3,
			prompt_saved = min(prompt_saved, 9223372036854775807 - ?13) + ?13,
			client_retries = min(client_retries, 9223372036854775807 - ?14) + ?14
		WHERE grain = ?4 AND project = ?5 AND token = ?6 AND at = ?7 AND model = ?8 AND endpoint = ?9
			AND outcome = ?10 AND asked = ?11 AND service_tier = ?12`

	insertHours = `
		INSERT INTO project_hours AS h (project, at, calls, input_tokens, output_tokens, cost, unpriced_calls,
			caller_errors, policy_errors, provider_errors, proxy_errors)
		VALUES `
	hourValues = `(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`
	addToHours = ` ON CONFLICT (project, at) DO UPDATE SET
			calls = min(h.calls, 9223372036854775807 - excluded.calls) + excluded.calls,
			input_tokens = min(h.input_tokens, 9223372036854775807 - excluded.input_tokens) + excluded.input_tokens,
			output_tokens = min(h.output_tokens, 9223372036854775807 - excluded.output_tokens)
				+ excluded.output_tokens,
			cost = min(h.cost, 9223372036854775807 - excluded.cost) + excluded.cost,
			unpriced_calls = min(h.unpriced_calls, 9223372036854775807 - excluded.unpriced_calls)
				+ excluded.unpriced_calls,
			caller_errors = min(h.caller_errors, 9223372036854775807 - excluded.caller_errors)
				+ excluded.caller_errors,
			policy_errors = min(h.policy_errors, 9223372036854775807 - excluded.policy_errors)
				+ excluded.policy_errors,
			provider_errors = min(h.provider_errors, 9223372036854775807 - excluded.provider_errors)
				+ excluded.provider_errors,
			proxy_errors = min(h.proxy_errors, 9223372036854775807 - excluded.proxy_errors) + excluded.proxy_errors`

	insertLatency = `INSERT INTO project_latency AS l (project, at, bucket, first_bytes, answers) VALUES `
	latencyValues = `(?, ?, ?, ?, ?)`
	addToLatency  = ` ON CONFLICT (project, at, bucket) DO UPDATE SET
			first_bytes = min(l.first_bytes, 9223372036854775807 - excluded.first_bytes) + excluded.first_bytes,
			answers = min(l.answers, 9223372036854775807 - excluded.answers) + excluded.answers`
)

func ledgerSQL() [ledgerStmtCount]string {
	return [...]string{
		stmtInsertPending: `INSERT INTO begun (batch, calls) VALUES (?, ?)`,
		stmtDeletePending: `DELETE FROM begun WHERE batch = ?`,
		stmtCountTokenUse: `
			UPDATE tokens SET request_count = min(request_count, 9223372036854775807 - ?1) + ?1,
				last_used_at = max(coalesce(last_used_at, 0), ?2)
			WHERE seq = ?3`,
		stmtRecordOK: insertOK + okValues,
		stmtRecordOK8: insertOK + okValues + `, ` + okValues + `, ` + okValues + `, ` + okValues + `, ` +
			okValues + `, ` + okValues + `, ` + okValues + `, ` + okValues,
		stmtRecordAgentOK: insertAgentOK + agentOKValues,
		stmtRecordAgentOK8: insertAgentOK + agentOKValues + `, ` + agentOKValues + `, ` +
			agentOKValues + `, ` + agentOKValues + `, ` + agentOKValues + `, ` + agentOKValues + `, ` +
			agentOKValues + `, ` + agentOKValues,
		stmtRecord: insertRecord + recordValues,
		stmtRecord8: insertRecord + recordValues + `, ` + recordValues + `, ` + recordValues + `, ` + recordValues +
			`, ` + recordValues + `, ` + recordValues + `, ` + recordValues + `, ` + recordValues,
		stmtPrice:      `INSERT INTO billed_prices (id, price) VALUES (?, ?) ON CONFLICT DO NOTHING`,
		stmtContent:    insertContent,
		stmtBackground: insertBackground, stmtBackgroundUsage: updateBackground,
		stmtBatchUsage: insertBatchUsage, stmtBatchShown: insertBatchShown,
		stmtSum: insertSums + sumValues + addToSums,
		stmtSum8: insertSums + sumValues + `, ` + sumValues + `, ` + sumValues + `, ` + sumValues + `, ` +
			sumValues + `, ` + sumValues + `, ` + sumValues + `, ` + sumValues + addToSums,
		stmtSumHits:       addHits,
		stmtAttributedSum: insertAttributedSum + attributedValues + addToAttributed,
		stmtAttributedSum8: insertAttributedSum + attributedValues + `, ` + attributedValues + `, ` +
			attributedValues + `, ` + attributedValues + `, ` + attributedValues + `, ` + attributedValues + `, ` +
			attributedValues + `, ` + attributedValues + addToAttributed,
		stmtLimitUse: `
			INSERT INTO limit_values AS v (project, token, rule, value, window_start, window_end, used)
			VALUES (?1, ?2, ?3, ?4, ?5, ?6, max(0, ?7))
			ON CONFLICT (project, token, rule, value, window_start) DO UPDATE SET
				used = max(0, min(v.used, 9223372036854775807 - max(0, ?7)) + ?7)`,
		stmtHour:    insertHours + hourValues + addToHours,
		stmtLatency: insertLatency + latencyValues + addToLatency,
		stmtLatency8: insertLatency + latencyValues + `, ` + latencyValues + `, ` + latencyValues + `, ` +
			latencyValues + `, ` + latencyValues + `, ` + latencyValues + `, ` + latencyValues + `, ` +
			latencyValues + addToLatency,
		stmtDelivered: upsertSetting,
		// A statement with several rows copies the pages that it changes, to be able to take all rows back. Large
		// copies would go to a file.
		stmtKeepInMemory: `PRAGMA temp_store = 2`,
		stmtBeginTx:      `BEGIN IMMEDIATE`,
		stmtCommit:       `COMMIT`,
		stmtRollback:     `ROLLBACK`,
	}
}

// rowsOfStatement returns how many rows a statement writes, 0 if that depends.
func rowsOfStatement(stmt int) int64 {
	switch stmt {
	case stmtRecordOK8, stmtRecordAgentOK8, stmtRecord8, stmtSum8, stmtAttributedSum8, stmtLatency8:
		return 8
	case stmtInsertPending, stmtRecordOK, stmtRecordAgentOK, stmtRecord, stmtSum, stmtAttributedSum, stmtLimitUse,
		stmtHour, stmtLatency:
		return 1
	}
	return 0
}

// A ledgerWriter holds the prepared statements of the writing connection. It belongs to one goroutine.
type ledgerWriter struct {
	store   *store
	changed int64       // rows, by the last statement
	conn    driver.Conn // the one the statements belong to; database/sql may open another
	// send runs statements instead of conn, if it is not nil.
	send  func(ctx context.Context, stmt int, values []any) (changed int64, err error)
	stmts [ledgerStmtCount]driver.StmtExecContext
	args  [8 * recordColumnCount]driver.NamedValue // as many as the longest statement has

	// writeAll writes a batch on PostgreSQL; nil: SQLite.
	writeAll func(context.Context, *ledgerWriter, ledgerBatch) error

	prices    map[int64]bool // that are stored, as far as it is known
	lastPrice *price         // one of them
}

const maxKnownPrices = 10_000

func (s *store) newLedgerWriter() *ledgerWriter {
	w := &ledgerWriter{store: s, prices: map[int64]bool{}}
	if s.backend != nil {
		w.writeAll = s.backend.writeLedger
	}
	for i := range w.args {
		w.args[i].Ordinal = i + 1
	}
	return w
}

// write writes a batch: all of it, or nothing.
func (w *ledgerWriter) write(ctx context.Context, b ledgerBatch) error {
	if w.writeAll != nil {
		return w.writeAll(ctx, w, b)
	}
	conn, err := w.store.writeDB.Conn(ctx)
	if err != nil {
		return fmt.Errorf("taking the writing connection: %w", err)
	}
	defer conn.Close() // returns it to the pool
	return conn.Raw(func(c any) error {
		if err := w.prepare(c); err != nil {
			return err
		}
		if err := w.exec(ctx, stmtBeginTx); err != nil {
			return fmt.Errorf("beginning a transaction: %w", err)
		}
		err := w.writeBatch(ctx, b)
		if err == nil && b.probe {
			err = errProbed
		}
		if err == nil {
			if err = w.exec(ctx, stmtCommit); err == nil {
				return nil
			}
			err = fmt.Errorf("committing: %w", err)
		}
		_ = w.exec(ctx, stmtRollback) // fails if SQLite has already rolled back
		clear(w.prices)
		w.lastPrice = nil
		return err
	})
}

// writeOrReduce writes a batch of rows. If the database refuses it, it writes the rows one by one, those that it
// refuses without their texts.
func (w *ledgerWriter) writeOrReduce(ctx context.Context, b ledgerBatch) error {
	err := w.write(ctx, b)
	if !isRejectedRow(err) {
		return err
	}
	for _, one := range b.split() {
		if err = w.write(ctx, one); isRejectedRow(err) {
			reduced, row := one.reduced()
			err = w.write(ctx, reduced)
			if isRejectedRow(err) && len(one.records) > 0 {
				if recorded, _ := w.store.isRecorded(ctx, row.id); recorded { // by another replica, meanwhile
					err = nil
				}
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// errProbed ends the transaction of a probe.
var errProbed = errors.New("the probe succeeded")

// probe returns an error if the database would not take the record and the row of a call now. It leaves nothing.
func (w *ledgerWriter) probe(ctx context.Context) error {
	if err := w.store.checkWritable(ctx); err != nil {
		return err
	}
	row := requestRow{id: 1, outcome: outcomeOK, status: 200, source: usageExact, priced: true, attempts: 1}
	pending := append(row.appendPendingRecord([]byte{'['}), ']')
	err := w.write(ctx, ledgerBatch{
		pendingBatchID: 1, pendingRecordsJSON: pending, records: []*requestRow{&row}, probe: true})
	if errors.Is(err, errProbed) {
		return nil
	}
	return err
}

// prepare prepares the statements, unless this connection has them.
func (w *ledgerWriter) prepare(c any) error {
	conn, ok := c.(driver.Conn)
	if !ok {
		return fmt.Errorf("the driver's connection is a %T", c)
	}
	if w.conn == conn {
		return nil
	}
	// There is one connection at a time, so the previous one is closed, and its statements with it: closing
	// them again would crash.
	clear(w.stmts[:])
	for i, query := range ledgerSQL() {
		st, err := conn.Prepare(query)
		if err != nil {
			return fmt.Errorf("preparing the ledger: %w", err)
		}
		if w.stmts[i], ok = st.(driver.StmtExecContext); !ok {
			return fmt.Errorf("the driver's statement is a %T", st)
		}
	}
	if err := w.exec(context.Background(), stmtKeepInMemory); err != nil {
		return fmt.Errorf("preparing the ledger: %w", err)
	}
	w.conn = conn
	return nil
}

// close closes the statements. Call it before the store is closed.
func (w *ledgerWriter) close() {
	if w.conn == nil {
		return
	}
	conn, err := w.store.writeDB.Conn(context.Background())
	if err != nil {
		return // the connection is closed, and its statements with it
	}
	defer conn.Close()
	_ = conn.Raw(func(c any) error {
		if c != any(w.conn) { // database/sql has opened another; the statements' one is closed, as in prepare
			return nil
		}
		for _, st := range w.stmts {
			if st, ok := st.(driver.Stmt); ok {
				_ = st.Close()
			}
		}
		clear(w.stmts[:])
		w.conn = nil
		return nil
	})
}

// execute runs a statement. Values are int64, string, []byte, bool or nil.
func (w *ledgerWriter) exec(ctx context.Context, stmt int, values ...any) error {
	if w.send != nil {
		changed, err := w.send(ctx, stmt, values)
		w.changed = changed
		return err
	}
	for i, v := range values {
		w.args[i].Value = v
	}
	res, err := w.stmts[stmt].ExecContext(ctx, w.args[:len(values)])
	if err == nil {
		w.changed, _ = res.RowsAffected()
		if want := rowsOfStatement(stmt); want > 0 && w.changed != want { // a trigger may ignore rows
			return errRowIgnored
		}
	}
	return err
}

func (w *ledgerWriter) writeBatch(ctx context.Context, b ledgerBatch) error {
	if b.pendingBatchID != 0 {
		if err := w.exec(ctx, stmtInsertPending, b.pendingBatchID, string(b.pendingRecordsJSON)); err != nil {
			return fmt.Errorf("writing pending records: %w", err)
		}
	}
	if len(b.records)+len(b.sumOnlyRows)+len(b.endedBatchIDs) == 0 {
		return nil
	}
	if b.delivered.number > 0 {
		if err := w.exec(ctx, stmtDelivered, outboxSetting+b.delivered.id,
			strconv.FormatUint(b.delivered.number, 10)); err != nil {
			return fmt.Errorf("noting which kept calls are recorded: %w", err)
		}
	}
	if err := w.insertRequests(ctx, b.records); err != nil {
		return fmt.Errorf("recording calls: %w", err)
	}
	for _, batch := range b.endedBatchIDs {
		if err := w.exec(ctx, stmtDeletePending, batch); err != nil {
			return fmt.Errorf("deleting pending records: %w", err)
		}
	}
	type tokenUse struct{ calls, lastUsedAt int64 }
	uses := map[int64]tokenUse{}
	tally := newUsageTally()
	for _, r := range b.records {
		tally.add(r)
		if r.outcome != outcomeRefused {
			u := uses[r.token]
			uses[r.token] = tokenUse{u.calls + 1, max(u.lastUsedAt, r.started+r.totalUS/1000)}
		}
	}
	for _, r := range b.sumOnlyRows {
		if r.usageOf != 0 {
			if err := w.recordLateUsage(ctx, r.requestRow); err != nil {
				return fmt.Errorf("recording the usage of a response or batch: %w", err)
			}
			if !r.counted {
				continue // it was known already
			}
		}
		tally.add(r.requestRow)
	}
	for k, amount := range tally.limitUses {
		if err := w.exec(ctx, stmtLimitUse, k.project, k.token, k.rule, k.value, k.windowStart, k.windowEnd,
			amount); err != nil {
			return fmt.Errorf("counting the use of values: %w", err)
		}
	}
	for token, u := range uses {
		if err := w.exec(ctx, stmtCountTokenUse, u.calls, u.lastUsedAt, token); err != nil {
			return fmt.Errorf("counting calls of tokens: %w", err)
		}
	}
	if err := w.writeTally(ctx, tally); err != nil {
		return fmt.Errorf("adding to the sums and hours: %w", err)
	}
	return nil
}

// recordLateUsage writes the usage of a call that has become known after its end, and sets whether it was not known.
func (w *ledgerWriter) recordLateUsage(ctx context.Context, r *requestRow) (err error) {
	cost := nullUnless(r.priced, r.cost)
	if r.batch == "" {
		err = w.exec(ctx, stmtBackgroundUsage, r.usageOf, string(r.source), r.counts.input, r.counts.cached,
			r.counts.cacheWrite, r.counts.output, r.counts.reasoning, cost, r.detailsJSON(), r.priceID())
	} else {
		err = w.exec(ctx, stmtBatchUsage, r.batch, r.model, r.priced, r.batchLines, r.counts.input, r.counts.cached,
			r.counts.cacheWrite, r.counts.output, r.counts.reasoning, r.cost, r.promptSaved, r.linesCounted)
	}
	if r.counted = err == nil && w.changed > 0; !r.counted {
		return err
	}
	if r.batch != "" {
		err = w.exec(ctx, stmtBatchShown, r.usageOf, r.project, r.token, r.endpoint, string(r.outcome), r.model,
			string(r.source), r.counts.input, r.counts.cached, r.counts.cacheWrite, r.counts.output,
			r.counts.reasoning, cost, r.detailsJSON(), r.priceID())
	}
	return errors.Join(err, w.storePrice(ctx, r.price))
}

// A rowGroup collects rows for a statement with one row and for one with eight.
type rowGroup struct {
	w           *ledgerWriter
	one, eight  int // statements
	columnCount int
	values      []any
}

func (w *ledgerWriter) newRowGroup(one, eight, columnCount int) rowGroup {
	return rowGroup{w, one, eight, columnCount, nil}
}

// add adds a row, and writes eight once it has them.
func (g *rowGroup) add(ctx context.Context, values ...any) error {
	if g.values == nil {
		g.values = make([]any, 0, 8*g.columnCount)
	}
	if g.values = append(g.values, values...); len(g.values) < 8*g.columnCount {
		return nil
	}
	err := g.w.exec(ctx, g.eight, g.values...)
	g.values = g.values[:0]
	return err
}

// flush writes the rows that are left.
func (g *rowGroup) flush(ctx context.Context) error {
	for ; len(g.values) > 0; g.values = g.values[g.columnCount:] {
		if err := g.w.exec(ctx, g.one, g.values[:g.columnCount]...); err != nil {
			return err
		}
	}
	return nil
}

// insertRequests writes the rows of calls, and their content where it is stored.
func (w *ledgerWriter) insertRequests(ctx context.Context, rows []*requestRow) error {
	plain := w.newRowGroup(stmtRecordOK, stmtRecordOK8, okColumnCount)
	agents := w.newRowGroup(stmtRecordAgentOK, stmtRecordAgentOK8, agentOKColumnCount)
	full := w.newRowGroup(stmtRecord, stmtRecord8, recordColumnCount)
	for _, r := range rows {
		var err error
		session, endUser, tags := r.attribution.columns()
		switch {
		case r.isPlainOK():
			err = plain.add(ctx, r.id, r.project, r.token, r.upstream, r.endpoint, r.model, r.stream, r.address,
				r.counts.input, r.counts.output, r.cost, r.priceID(), r.firstByteUS, r.totalUS)
		case r.isOK() && w.send == nil: // PostgreSQL takes all other rows at once
			err = agents.add(ctx, r.id, r.project, r.token, r.upstream, r.endpoint, r.model, r.stream, r.address,
				r.counts.input, r.counts.output, r.cost, r.priceID(), r.firstByteUS, r.totalUS, r.counts.cached,
				r.counts.cacheWrite, r.counts.reasoning, r.detailsJSON(), session, endUser, tags, r.routedBy)
		default:
			err = full.add(ctx, r.id, r.project, r.token, r.upstream, r.endpoint, r.model, r.stream,
				r.address, int64(r.status), string(r.outcome), r.errorCode, string(r.source),
				r.counts.input, r.counts.cached, r.counts.cacheWrite, r.counts.output, r.counts.reasoning,
				nullUnless(r.priced, r.cost), nullUnless(r.firstByteUS >= 0, r.firstByteUS), r.totalUS,
				int64(r.attempts), r.cache, r.limitHit, r.attemptLog, r.saved,
				r.savedUS, r.detailsJSON(), r.priceID(), session, endUser, tags, r.routedBy, r.clientRetry,
				r.idempotencyHash)
		}
		if err == nil {
			err = w.storePrice(ctx, r.price)
		}
		if err == nil && r.backgroundID != "" {
			err = w.exec(ctx, stmtBackground, r.id, r.project, r.token, r.upstream, r.backgroundID, r.endpoint,
				string(r.outcome), r.model, r.modelTracked, r.requestedModel, r.requestedModelTracked,
				r.reservedInput, r.reservedOutput, r.reservedCost)
		}
		if err == nil && r.content != nil {
			c := r.content
			err = w.exec(ctx, stmtContent, c.id, c.project, c.expiresAt, c.request, c.requestBytes,
				c.response, c.responseBytes)
		}
		if err != nil {
			return err
		}
	}
	for _, g := range [...]*rowGroup{&plain, &agents, &full} {
		if err := g.flush(ctx); err != nil {
			return err
		}
	}
	return nil
}

// storePrice stores a price that the cost of a call is made of.
func (w *ledgerWriter) storePrice(ctx context.Context, p *price) error {
	if p == nil || p == w.lastPrice || w.prices[p.id] {
		return nil
	}
	if len(w.prices) > maxKnownPrices {
		clear(w.prices)
	}
	w.lastPrice, w.prices[p.id] = p, true
	return w.exec(ctx, stmtPrice, p.id, p.text)
}

// writeTally adds what was added up to the stored sums, and writes each row once.
func (w *ledgerWriter) writeTally(ctx context.Context, t *usageTally) error {
	t.rollUp()
	sums := w.newRowGroup(stmtSum, stmtSum8, sumColumnCount)
	for k, v := range t.sums {
		err := sums.add(ctx, k.grain, k.token, k.start, k.project, k.model, k.endpoint, string(k.outcome),
			k.requestedModel, k.tier.String(), v.calls, v.input, v.cached, v.output, v.reasoning, v.cost, v.unpriced,
			v.estimated, v.wouldRefuse, v.totalUS)
		if err != nil {
			return err
		}
	}
	if err := sums.flush(ctx); err != nil {
		return err
	}
	for k, v := range t.sums {
		if v.hits == 0 && v.promptSaved == 0 && v.clientRetries == 0 {
			continue
		}
		if err := w.exec(ctx, stmtSumHits, v.hits, v.saved, v.savedUS, k.grain, k.project, k.token, k.start, k.model,
			k.endpoint, string(k.outcome), k.requestedModel, k.tier.String(), v.promptSaved,
			v.clientRetries); err != nil {
			return err
		}
	}
	attributed := w.newRowGroup(stmtAttributedSum, stmtAttributedSum8, attributedColumnCount)
	for k, v := range t.attributed {
		if err := attributed.add(ctx, k.project, k.attribute, k.start, k.value, k.token, k.model, k.endpoint,
			string(k.outcome), k.requestedModel, v.calls, v.input, v.cached, v.output, v.reasoning, v.cost, v.unpriced,
			v.estimated, v.wouldRefuse, v.totalUS, v.hits, v.saved, v.savedUS, v.promptSaved,
			v.clientRetries); err != nil {
			return err
		}
	}
	if err := attributed.flush(ctx); err != nil {
		return err
	}
	latency := w.newRowGroup(stmtLatency, stmtLatency8, latencyColumnCount)
	bounds := latencyBounds()
	for k, v := range t.hours {
		if err := w.exec(ctx, stmtHour, k.project, k.at, v.calls, v.input, v.output, v.cost, v.unpriced,
			v.errors[0], v.errors[1], v.errors[2], v.errors[3]); err != nil {
			return err
		}
		for i, firstBytes := range v.firstByteLatency {
			answers, boundMS := v.totalLatency[i], int64(0)
			if i < len(bounds) {
				boundMS = bounds[i]
			}
			if firstBytes == 0 && answers == 0 {
				continue
			}
			if err := latency.add(ctx, k.project, k.at, boundMS, firstBytes, answers); err != nil {
				return err
			}
		}
	}
	return latency.flush(ctx)
}

// selectRecoverable selects what a pending record has, for recoverableColumns.
const selectRecoverable = `
	SELECT id, started_at, project, token, upstream, endpoint, model, stream, address, input_tokens, output_tokens,
		session, end_user, tags
	FROM running`

func (r *requestRow) recoverableColumns() []any {
	return append([]any{&r.id, &r.started, &r.project, &r.token, &r.upstream, &r.endpoint, &r.model, &r.stream,
		&r.address, &r.counts.input, &r.counts.output}, r.attributionColumns()...)
}

// pendingRecords returns up to limit calls of a closed replica whose pending record has no row yet. A SQLite database
// that no program has open has only one, 0: the last program that had it open.
func (s *store) pendingRecords(ctx context.Context, replica int64, limit int) ([]requestRow, error) {
	if s.backend != nil {
		return s.backend.pendingRecords(ctx, replica, limit)
	}
	return collect(ctx, s.readDB, "reading pending records", (*requestRow).recoverableColumns,
		selectRecoverable+` ORDER BY id LIMIT ?`, limit)
}

// deletePending deletes the pending records of a closed replica.
func (s *store) deletePending(ctx context.Context, replica int64) error {
	if s.backend != nil {
		return s.backend.deletePending(ctx, replica)
	}
	return execute(ctx, s.writeDB, "deleting pending records", `DELETE FROM begun`)
}

// lastRequestID returns the highest id of a call, 0 if there is none.
func (s *store) lastRequestID(ctx context.Context) (int64, error) {
	return queryValue[int64](ctx, s.readDB, "reading the last call", `SELECT coalesce(max(id), 0) FROM requests`)
}

// newIDSource returns a source of ids that are above all with the slot of this process.
func (s *store) newIDSource(ctx context.Context, now time.Time) (*idSource, error) {
	if s.backend == nil {
		last, err := s.lastRequestID(ctx)
		return newIDSource(last, nil), err
	}
	// Lower ids do not matter. Higher ones are of a clock that was ahead.
	last, err := s.backend.lastRequestID(ctx, s.backend.slot(), minIDAt(now))
	return newIDSource(last, s.backend.slot), err
}

// deleteOldRequests deletes up to limit rows with an id below before, and returns how many. The row of a
// call that still has a pending record stays: without it the call would seem to run. Such a record is in no
// later batch.
func (s *store) deleteOldRequests(ctx context.Context, before int64, limit int) (int64, error) {
	return execCount(ctx, s.writeDB, "deleting old calls", `
		DELETE FROM requests WHERE id IN (SELECT id FROM requests
			WHERE id < ?1 AND id NOT IN (
				SELECT CAST(c.value ->> 0 AS BIGINT) FROM begun b, json_each(b.calls) c WHERE b.batch < ?1)
			ORDER BY id LIMIT ?2)`, before, limit)
}
