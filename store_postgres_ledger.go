//go:build postgres

// This file writes the ledger to PostgreSQL. Each statement costs a round trip, so the rows of a batch are collected
// and written with one statement per kind, as arrays. Pending records, for which calls wait, are one statement that is
// a transaction of its own. When the connection is lost at a commit, the database is asked what became of it before
// anything is written again, so that no row and no sum counts twice.
package main

import (
	"bytes"
	"cmp"
	"context"
	"database/sql"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// A postgresLedger writes batches. It belongs to one goroutine.
type postgresLedger struct {
	*postgres
	ledgerDB  *sql.DB
	recovery  bool // it writes the calls of a closed replica
	tx        *sql.Tx
	stmts     [ledgerStmtCount]postgresLedgerStmt // columns is 0 for those whose rows are not collected
	collected [ledgerStmtCount]postgresRows
	seq       int64 // of the last transaction, as in ledger_commits
	// uncertain has the rows of the last transaction, if it is not known whether it was committed; committed those
	// that were, although the ledger still has them queued.
	uncertain []*requestRow
	committed map[*requestRow]bool
	// orphans are pending batches that may be in the database although their calls have failed.
	orphans []int64
}

// A postgresRows collects rows for one statement, as the texts of one array for each column.
type postgresRows struct {
	columns []strings.Builder
	count   int64
}

// A postgresLedgerStmt is a statement that takes columns as arrays. mustWrite: it writes every row. bySlot: its first
// argument is the slot, because each replica has sums of its own, so that no one waits for another.
type postgresLedgerStmt struct {
	text      string
	columns   int
	mustWrite bool
	bySlot    bool
}

// The parts of statements for rows in arrays.
const (
	arraysOfOK = `SELECT id, project, token, upstream, endpoint, model, stream, address, 200, 'ok', 'exact', input,
			output, cost, price, first_byte, total
		FROM unnest(?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::text[], ?::text[], ?::boolean[],
			?::text[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[])
			AS r (id, project, token, upstream, endpoint, model, stream, address, input, output, cost, price,
				first_byte, total)`
	arraysOfRequests = `
		SELECT * FROM unnest(?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::text[], ?::text[], ?::boolean[],
			?::text[], ?::bigint[], ?::text[], ?::text[], ?::text[], ?::bigint[], ?::bigint[], ?::bigint[],
			?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::text[], ?::text[],
			?::text[], ?::bigint[], ?::bigint[], ?::text[], ?::bigint[], ?::text[], ?::text[], ?::text[],
			?::text[], ?::bigint[], ?::bigint[])`
	arraysOfAttributedSums = `
		SELECT ?::smallint, *
		FROM unnest(?::bigint[], ?::text[], ?::bigint[], ?::text[], ?::bigint[], ?::text[], ?::text[],
			?::text[], ?::text[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[],
			?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[],
			?::bigint[])`
	arraysOfSums = `
		SELECT ?::smallint, *
		FROM unnest(?::text[], ?::bigint[], ?::bigint[], ?::bigint[], ?::text[], ?::text[], ?::text[],
			?::text[], ?::text[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[],
			?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[])`
	arraysOfHours = `
		SELECT ?::smallint, * FROM unnest(?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[],
			?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[])`
	arraysOfLatency = `
		SELECT ?::smallint, * FROM unnest(?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[])`
)

// addBySlot returns the statement that adds rows to the sums of a slot.
func addBySlot(insert, rows, conflict string) string {
	return strings.Replace(strings.TrimSuffix(insert, "VALUES "), "(", "(slot, ", 1) + rows +
		strings.Replace(conflict, "ON CONFLICT (", "ON CONFLICT (slot, ", 1)
}

// postgresLedgerStmts returns the statements whose rows are collected. Rows of tokens are locked in the order of their
// seqs: changes of administrators, which lock several too, then cannot wait for the ledger in a circle.
func postgresLedgerStmts() [ledgerStmtCount]postgresLedgerStmt {
	return [ledgerStmtCount]postgresLedgerStmt{
		stmtDeletePending: {text: `DELETE FROM begun WHERE batch = ANY(?::bigint[])`, columns: 1},
		stmtCountTokenUse: {text: `
			WITH used AS (SELECT * FROM unnest(?::bigint[], ?::bigint[], ?::bigint[]) AS u (calls, last_used, seq)),
				locked AS (SELECT seq FROM tokens WHERE seq IN (SELECT seq FROM used) ORDER BY seq FOR NO KEY UPDATE)
			UPDATE tokens SET
				request_count = min(tokens.request_count, 9223372036854775807 - used.calls) + used.calls,
				last_used_at = max(coalesce(tokens.last_used_at, 0), used.last_used)
			FROM used JOIN locked ON locked.seq = used.seq WHERE tokens.seq = locked.seq`, columns: 3},
		stmtRecordOK: {text: strings.TrimSuffix(insertOK, "VALUES ") + arraysOfOK, columns: okColumnCount,
			mustWrite: true},
		stmtRecord: {text: strings.TrimSuffix(insertRecord, "VALUES ") + arraysOfRequests, columns: recordColumnCount,
			mustWrite: true},
		stmtPrice: {text: `INSERT INTO billed_prices (id, price) SELECT * FROM unnest(?::bigint[], ?::text[]) ORDER BY 1
			ON CONFLICT DO NOTHING`, columns: 2}, // in order, as several replicas insert the same ones
		stmtSum: {text: addBySlot(insertSums, arraysOfSums, addToSums), columns: sumColumnCount, mustWrite: true,
			bySlot: true},
		stmtSumHits: {text: `
			WITH own AS (SELECT ?::smallint AS slot)
			UPDATE usage_sums s SET
				cache_hits = min(s.cache_hits, 9223372036854775807 - h.hits) + h.hits,
				saved = min(s.saved, 9223372036854775807 - h.saved) + h.saved,
				saved_us = min(s.saved_us, 9223372036854775807 - h.saved_us) + h.saved_us,
				prompt_saved = min(s.prompt_saved, 9223372036854775807 - h.prompt) + h.prompt,
				client_retries = min(s.client_retries, 9223372036854775807 - h.retries) + h.retries
			FROM own, unnest(?::bigint[], ?::bigint[], ?::bigint[], ?::text[], ?::bigint[], ?::bigint[], ?::bigint[],
				?::text[], ?::text[], ?::text[], ?::text[], ?::text[], ?::bigint[], ?::bigint[])
				AS h (hits, saved, saved_us, grain, project, token, at, model, endpoint, outcome, asked, tier, prompt,
					retries)
			WHERE s.grain = h.grain AND s.project = h.project AND s.token = h.token AND s.at = h.at
				AND s.model = h.model AND s.endpoint = h.endpoint AND s.outcome = h.outcome AND s.asked = h.asked
				AND s.service_tier = h.tier AND s.slot = own.slot`, columns: 14, bySlot: true},
		stmtAttributedSum: {text: addBySlot(insertAttributedSum, arraysOfAttributedSums, addToAttributed),
			columns: attributedColumnCount, mustWrite: true, bySlot: true},
		// What a slot adds may be negative: the usage of a call that another one has counted became known.
		stmtLimitUse: {text: `
			INSERT INTO limit_values AS v (slot, project, token, rule, value, window_start, window_end, used)
			SELECT ?::smallint, project, token, rule, value, start, max(until), saturate(sum(amount))
			FROM unnest(?::bigint[], ?::bigint[], ?::text[], ?::text[], ?::bigint[], ?::bigint[], ?::bigint[])
				AS u (project, token, rule, value, start, until, amount)
			GROUP BY project, token, rule, value, start
			ON CONFLICT (slot, project, token, rule, value, window_start) DO UPDATE SET
				used = saturate(v.used::numeric + excluded.used)`, columns: 7, bySlot: true},
		stmtHour: {text: addBySlot(insertHours, arraysOfHours, addToHours), columns: 11, mustWrite: true, bySlot: true},
		stmtLatency: {text: addBySlot(insertLatency, arraysOfLatency, addToLatency), columns: latencyColumnCount,
			mustWrite: true, bySlot: true},
	}
}

// write is ledgerWriter.write.
func (l *postgresLedger) write(ctx context.Context, w *ledgerWriter, b ledgerBatch) (err error) {
	defer func() {
		if err != nil { // the prices of the batch may be missing
			clear(w.prices)
			w.lastPrice = nil
		}
	}()
	if err := l.settleUncertain(ctx); err != nil {
		return err
	}
	if b.probe {
		return l.inTx(ctx, nil, outboxMark{}, func() error {
			if err := l.insertPending(ctx, l.tx, &b); err != nil {
				return err
			}
			return cmp.Or(l.writeRows(ctx, w, b), errProbed)
		})
	}
	if b.pendingBatchID != 0 {
		l.orphans = append(l.orphans, b.pendingBatchID) // until it is certain that its calls go on
		if err := l.insertPending(ctx, l.ledgerDB, &b); err != nil {
			return err
		}
	}
	known := func(r *requestRow) bool { return l.committed[r] }
	rest := b
	rest.records = slices.DeleteFunc(slices.Clone(b.records), known)
	rest.sumOnlyRows = slices.DeleteFunc(slices.Clone(b.sumOnlyRows),
		func(r sumOnlyRow) bool { return known(r.requestRow) })
	var mark outboxMark
	if b.delivered.running { // as any other mark, it is a setting, which is one more statement
		mark, rest.delivered = b.delivered, mark
	}
	orphans := slices.DeleteFunc(slices.Clone(l.orphans), func(id int64) bool { return id == b.pendingBatchID })
	rest.endedBatchIDs = slices.Concat(b.endedBatchIDs, orphans)
	if len(rest.records)+len(rest.sumOnlyRows)+len(rest.endedBatchIDs) > 0 {
		err := l.inTx(ctx, rest.rows(), mark, func() error { return l.writeRows(ctx, w, rest) })
		for attempts := 1; attempts < 5 && mayRepeat(err); attempts++ {
			clear(w.prices)
			w.lastPrice = nil
			err = l.inTx(ctx, rest.rows(), mark, func() error { return l.writeRows(ctx, w, rest) })
		}
		if err != nil {
			return err
		}
	}
	for _, r := range b.rows() {
		delete(l.committed, r)
	}
	l.orphans = l.orphans[:0]
	return nil
}

// rows returns all rows of the batch.
func (b *ledgerBatch) rows() []*requestRow {
	rows := slices.Clone(b.records)
	for _, r := range b.sumOnlyRows {
		rows = append(rows, r.requestRow)
	}
	return rows
}

// mayRepeat reports whether the server ended a transaction so that another one could go on: a deadlock, or a lock that
// was not available.
func mayRepeat(err error) bool {
	return slices.Contains([]string{"40P01", "40001", "55P03"}, sqlState(err))
}

// insertPending writes pending records, unless this process may not write any more.
func (l *postgresLedger) insertPending(ctx context.Context, db querier, b *ledgerBatch) error {
	n, err := execCount(ctx, db, "writing pending records", `
		INSERT INTO begun (batch, calls, replica)
		SELECT ?::bigint, ?::text, id FROM (`+requireOpenReplica+`) r
		ON CONFLICT (batch) DO UPDATE SET calls = excluded.calls, replica = excluded.replica`,
		b.pendingBatchID, postgresJSON(b.pendingRecordsJSON), l.replica, l.epoch)
	if err == nil && n == 0 {
		err = l.explainMissingRow(ctx, db)
	}
	return err
}

// explainMissingRow says why a statement with requireOpenReplica wrote nothing.
func (l *postgresLedger) explainMissingRow(ctx context.Context, db querier) error {
	var id int64
	err := db.QueryRowContext(ctx, requireOpenReplica, l.replica, l.epoch).Scan(&id)
	switch {
	case err == nil:
		return errRowIgnored // by a trigger
	case errors.Is(err, sql.ErrNoRows):
		return errFenced
	}
	return err
}

// inTx runs fn, which writes rows, in a transaction that has a number of its own in ledger_commits. mark is true once
// it is committed.
func (l *postgresLedger) inTx(ctx context.Context, rows []*requestRow, mark outboxMark, fn func() error) (err error) {
	if l.tx, err = l.ledgerDB.BeginTx(ctx, nil); err != nil {
		return fmt.Errorf("beginning a transaction: %w", err)
	}
	defer l.tx.Rollback() // without effect after Commit
	if err := l.startTx(ctx, l.tx, false); err != nil {
		return err
	}
	if err := fn(); err != nil {
		return err
	}
	l.seq++
	if l.recovery {
		return l.tx.Commit()
	}
	if err := execute(ctx, l.tx, "numbering a transaction", `
		UPDATE ledger_commits SET seq = ?1::bigint, recorded = greatest(recorded, ?2::bigint),
			outbox = CASE WHEN ?2::bigint > 0 THEN ?3::text ELSE outbox END
		WHERE replica = ?4`, l.seq, int64(mark.number), mark.id, l.replica); err != nil {
		return err
	}
	err = l.tx.Commit()
	if err == nil {
		return nil
	}
	if !mayRepeat(err) { // the connection was lost, or the server is going down
		l.uncertain = rows
	}
	return fmt.Errorf("committing: %w", err)
}

// settleUncertain finds out whether the last transaction was committed, if that is not known. The server may still be
// committing it: then it has the row locked.
func (l *postgresLedger) settleUncertain(ctx context.Context) error {
	if len(l.uncertain) == 0 {
		return nil
	}
	seq, err := queryValue[int64](ctx, l.ledgerDB, "looking for the last transaction",
		`SELECT seq FROM ledger_commits WHERE replica = ? FOR UPDATE`, l.replica)
	if err != nil {
		return err
	}
	if seq == l.seq {
		for _, r := range l.uncertain {
			l.committed[r] = true
		}
	}
	l.uncertain = nil
	return nil
}

// writeRows writes what the batch has beside pending records.
func (l *postgresLedger) writeRows(ctx context.Context, w *ledgerWriter, b ledgerBatch) error {
	for i := range l.collected {
		l.collected[i] = postgresRows{}
	}
	w.send = l.send
	b.pendingBatchID = 0
	if err := w.writeBatch(ctx, b); err != nil {
		return err
	}
	var late []lateLeaseUse
	for _, r := range b.sumOnlyRows {
		if r.counted {
			late = append(late, r.late...)
		}
	}
	if err := l.leases.addLate(ctx, l.tx, late); err != nil {
		return err
	}
	for stmt := range l.collected {
		if stmt == stmtCountTokenUse {
			continue
		}
		if err := l.flush(ctx, &l.stmts[stmt], &l.collected[stmt]); err != nil {
			return err
		}
	}
	// Other replicas wait for the rows of tokens, so these are locked last.
	return l.flush(ctx, &l.stmts[stmtCountTokenUse], &l.collected[stmtCountTokenUse])
}

// send collects the rows of a statement, or runs it at once.
func (l *postgresLedger) send(ctx context.Context, stmt int, values []any) (changed int64, err error) {
	switch stmt { // those with eight rows
	case stmtRecordOK8:
		stmt = stmtRecordOK
	case stmtRecord8:
		stmt = stmtRecord
	case stmtAttributedSum8:
		stmt = stmtAttributedSum
	case stmtSum8:
		stmt = stmtSum
	case stmtLatency8:
		stmt = stmtLatency
	}
	s := &l.stmts[stmt]
	if s.columns == 0 {
		return execCount(ctx, l.tx, "writing a row", ledgerSQL()[stmt], values...)
	}
	rows := &l.collected[stmt]
	if rows.columns == nil {
		rows.columns = make([]strings.Builder, s.columns)
	}
	for i, v := range values {
		appendToArray(&rows.columns[i%s.columns], v)
	}
	rows.count += int64(len(values) / s.columns)
	return int64(len(values) / s.columns), nil
}

// flush runs a statement with the rows that were collected, if there are any.
func (l *postgresLedger) flush(ctx context.Context, s *postgresLedgerStmt, rows *postgresRows) error {
	if rows.count == 0 {
		return nil
	}
	args := make([]any, 0, 1+s.columns)
	if s.bySlot {
		args = append(args, l.store.backend.slot())
	}
	for i := range rows.columns {
		args = append(args, rows.columns[i].String()+"}")
	}
	n, err := execCount(ctx, l.tx, "writing rows", s.text, args...)
	if err == nil && s.mustWrite && n != rows.count { // a trigger may ignore rows
		err = errRowIgnored
	}
	return err
}

// appendToArray appends a value to the text of an array, whose last bracket is missing.
func appendToArray(array *strings.Builder, value any) {
	if array.Len() == 0 {
		array.WriteByte('{')
	} else {
		array.WriteByte(',')
	}
	switch v := value.(type) {
	case nil:
		array.WriteString("NULL")
	case int64:
		var space [20]byte
		array.Write(strconv.AppendInt(space[:0], v, 10))
	case bool:
		array.WriteString(strconv.FormatBool(v))
	case string:
		array.WriteByte('"')
		if strings.ContainsAny(v, `"\`) {
			v = strings.ReplaceAll(strings.ReplaceAll(v, `\`, `\\`), `"`, `\"`)
		}
		array.WriteString(v)
		array.WriteByte('"')
	}
}

// postgresJSON returns JSON without what PostgreSQL takes in none: invalid UTF-8, the escape \u0000, and escapes of
// half a character. Each becomes U+FFFD.
func postgresJSON(text []byte) string {
	if !utf8.Valid(text) {
		text = bytes.ToValidUTF8(text, []byte("\ufffd"))
	}
	if !bytes.Contains(text, []byte(`\u`)) {
		return string(text)
	}
	var out strings.Builder
	for i := 0; i < len(text); {
		if text[i] != '\\' || i+1 == len(text) {
			out.WriteByte(text[i])
			i++
			continue
		}
		end := i + 2
		if text[i+1] == 'u' {
			end = min(i+6, len(text))
		}
		escape := string(text[i:end])
		switch code, _ := strconv.ParseUint(escape[2:], 16, 16); {
		case text[i+1] != 'u':
		case code == 0 || code >= 0xd800 && code < 0xe000: // a program of Go writes whole characters as they are
			escape = "\ufffd"
		}
		out.WriteString(escape)
		i = end
	}
	return out.String()
}

// What a replica has left behind.

// newRecoveryWriter returns a writer for the calls of a closed replica. After a lost connection they are looked for
// again, so its transactions need no numbers. It may be used beside the ledger's.
func (p *postgres) newRecoveryWriter() *ledgerWriter {
	l := &postgresLedger{postgres: p, stmts: postgresLedgerStmts(), committed: map[*requestRow]bool{},
		ledgerDB: p.store.writeDB, recovery: true}
	w := p.store.newLedgerWriter()
	w.writeAll = l.write
	return w
}

// pendingRecords is store.pendingRecords.
func (p *postgres) pendingRecords(ctx context.Context, replica int64, limit int) ([]requestRow, error) {
	return collect(ctx, p.store.readDB, "reading pending records", (*requestRow).recoverableColumns,
		selectRecoverable+` WHERE replica = ? ORDER BY id LIMIT ?`, replica, limit)
}

// deletePending is store.deletePending.
func (p *postgres) deletePending(ctx context.Context, replica int64) error {
	return p.store.withTx(ctx, func(tx *sql.Tx) error {
		return execute(ctx, tx, "deleting pending records", `DELETE FROM begun WHERE replica = ?`, replica)
	})
}

// recordedRows is backend.recordedRows.
func (p *postgres) recordedRows(ctx context.Context, outbox string) (int64, error) {
	return queryValue[int64](ctx, p.store.readDB, "looking for the last recorded row",
		`SELECT coalesce(max(recorded), 0) FROM ledger_commits WHERE outbox = ?`, outbox)
}

// lastRequestID is backend.lastRequestID.
func (p *postgres) lastRequestID(ctx context.Context, slot, from int64) (int64, error) {
	return queryValue[int64](ctx, p.store.readDB, "reading the last call",
		`SELECT coalesce(max(id), 0) FROM requests WHERE id >= ? AND id >> 11 & 1023 = ?`, from, slot)
}

// Sums of several replicas. The sums of a period that is over are added up in the rows of slot 0, so that their number
// does not depend on how many replicas there were. The columns are in the order of the tables.

const (
	// sumTotals adds up the sumColumns of rows that agree in all other columns but the slot.
	sumTotals = `saturate(sum(calls)), saturate(sum(input_tokens)), saturate(sum(cached_tokens)),
			saturate(sum(output_tokens)), saturate(sum(reasoning_tokens)), saturate(sum(cost)),
			saturate(sum(unpriced_calls)), saturate(sum(estimated_calls)), saturate(sum(would_refuse)),
			saturate(sum(total_us)), saturate(sum(cache_hits)), saturate(sum(saved)), saturate(sum(saved_us)),
			saturate(sum(prompt_saved)), saturate(sum(client_retries))
		FROM old GROUP BY 1, 2, 3, 4, 5, 6, 7, 8, 9`

	mergedUsage = `WITH old AS (DELETE FROM usage_sums WHERE ctid = ANY (ARRAY(SELECT ctid FROM usage_sums
			WHERE slot > 0 AND grain = ? AND at < ? LIMIT ? FOR UPDATE SKIP LOCKED)) RETURNING *)
		INSERT INTO usage_sums AS s (grain, project, token, at, model, endpoint, outcome, asked, service_tier,
			` + sumColumns + `)
		SELECT grain, project, token, at, model, endpoint, outcome, asked, service_tier, ` + sumTotals + `
		ON CONFLICT (slot, grain, project, token, at, model, endpoint, outcome, asked, service_tier) DO UPDATE SET `
	mergedAttributed = `WITH old AS (DELETE FROM attribution_sums
			WHERE ctid = ANY (ARRAY(SELECT ctid FROM attribution_sums
				WHERE slot > 0 AND at < ? LIMIT ? FOR UPDATE SKIP LOCKED)) RETURNING *)
		INSERT INTO attribution_sums AS s (project, attribute, at, value, token, model, endpoint, outcome, asked,
			` + sumColumns + `)
		SELECT project, attribute, at, value, token, model, endpoint, outcome, asked, ` + sumTotals + `
		ON CONFLICT (slot, project, attribute, at, value, token, model, endpoint, outcome, asked) DO UPDATE SET `
	// mergeSums adds to the sums that both tables have.
	mergeSums = `calls = saturate(s.calls::numeric + excluded.calls),
			input_tokens = saturate(s.input_tokens::numeric + excluded.input_tokens),
			cached_tokens = saturate(s.cached_tokens::numeric + excluded.cached_tokens),
			output_tokens = saturate(s.output_tokens::numeric + excluded.output_tokens),
			reasoning_tokens = saturate(s.reasoning_tokens::numeric + excluded.reasoning_tokens),
			cost = saturate(s.cost::numeric + excluded.cost),
			unpriced_calls = saturate(s.unpriced_calls::numeric + excluded.unpriced_calls),
			estimated_calls = saturate(s.estimated_calls::numeric + excluded.estimated_calls),
			would_refuse = saturate(s.would_refuse::numeric + excluded.would_refuse),
			total_us = saturate(s.total_us::numeric + excluded.total_us),
			cache_hits = saturate(s.cache_hits::numeric + excluded.cache_hits),
			saved = saturate(s.saved::numeric + excluded.saved),
			saved_us = saturate(s.saved_us::numeric + excluded.saved_us),
			prompt_saved = saturate(s.prompt_saved::numeric + excluded.prompt_saved),
			client_retries = saturate(s.client_retries::numeric + excluded.client_retries)`
	mergedHours = `WITH old AS (DELETE FROM project_hours WHERE ctid = ANY (ARRAY(SELECT ctid FROM project_hours
			WHERE slot > 0 AND at < ? LIMIT ? FOR UPDATE SKIP LOCKED)) RETURNING *)
		INSERT INTO project_hours AS s (project, at, calls, input_tokens, output_tokens, cost, unpriced_calls,
			caller_errors, policy_errors, provider_errors, proxy_errors)
		SELECT project, at, saturate(sum(calls)), saturate(sum(input_tokens)), saturate(sum(output_tokens)),
			saturate(sum(cost)), saturate(sum(unpriced_calls)), saturate(sum(caller_errors)),
			saturate(sum(policy_errors)), saturate(sum(provider_errors)), saturate(sum(proxy_errors))
		FROM old GROUP BY 1, 2
		ON CONFLICT (slot, project, at) DO UPDATE SET calls = saturate(s.calls::numeric + excluded.calls),
			input_tokens = saturate(s.input_tokens::numeric + excluded.input_tokens),
			output_tokens = saturate(s.output_tokens::numeric + excluded.output_tokens),
			cost = saturate(s.cost::numeric + excluded.cost),
			unpriced_calls = saturate(s.unpriced_calls::numeric + excluded.unpriced_calls),
			caller_errors = saturate(s.caller_errors::numeric + excluded.caller_errors),
			policy_errors = saturate(s.policy_errors::numeric + excluded.policy_errors),
			provider_errors = saturate(s.provider_errors::numeric + excluded.provider_errors),
			proxy_errors = saturate(s.proxy_errors::numeric + excluded.proxy_errors)`
	mergedLatency = `WITH old AS (DELETE FROM project_latency WHERE ctid = ANY (ARRAY(SELECT ctid FROM project_latency
			WHERE slot > 0 AND at < ? LIMIT ? FOR UPDATE SKIP LOCKED)) RETURNING *)
		INSERT INTO project_latency AS s (project, at, bucket, first_bytes, answers)
		SELECT project, at, bucket, saturate(sum(first_bytes)), saturate(sum(answers)) FROM old GROUP BY 1, 2, 3
		ON CONFLICT (slot, project, at, bucket) DO UPDATE SET
			first_bytes = saturate(s.first_bytes::numeric + excluded.first_bytes),
			answers = saturate(s.answers::numeric + excluded.answers)`
)

// mergeSlots adds up to limit rows of sums of other slots than 0, of hours and days that ended an hour before now or
// earlier, to those of slot 0, and returns how many rows it has taken. It waits for no other replica, and lets none
// wait for long.
func (p *postgres) mergeSlots(ctx context.Context, now int64, limit int) (merged int64, err error) {
	hour, day := now-now%hourMS-hourMS, (now-hourMS)-(now-hourMS)%dayMS
	for _, m := range []struct {
		query string
		args  []any
	}{
		{mergedUsage + mergeSums, []any{"hour", hour, limit}},
		{mergedUsage + mergeSums, []any{"day", day, limit}},
		{mergedUsage + mergeSums, []any{"token", day, limit}},
		{mergedAttributed + mergeSums, []any{hour, limit}},
		{mergedHours, []any{hour, limit}},
		{mergedLatency, []any{hour, limit}},
	} {
		err = p.store.withTx(ctx, func(tx *sql.Tx) error {
			const doing = "adding up sums of replicas"
			if err := execute(ctx, tx, doing, `SET LOCAL lock_timeout = '50ms'`); err != nil {
				return err
			}
			n, err := execCount(ctx, tx, doing, m.query, m.args...)
			merged += n
			return err
		})
		if mayRepeat(err) { // at the next opportunity
			err = nil
		}
		if err != nil {
			return merged, err
		}
	}
	return merged, nil
}
