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

// A postgresLedgerStmt is a statement that takes columns as arrays. mustWrite: it writes every row.
type postgresLedgerStmt struct {
	text      string
	columns   int
	mustWrite bool
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
		SELECT * FROM unnest(?::bigint[], ?::text[], ?::bigint[], ?::text[], ?::bigint[], ?::text[], ?::text[],
			?::text[], ?::text[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[],
			?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[],
			?::bigint[])`
	arraysOfSums = `
		SELECT * FROM unnest(?::text[], ?::bigint[], ?::bigint[], ?::bigint[], ?::text[], ?::text[], ?::text[],
			?::text[], ?::text[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[],
			?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[])`
	arraysOfHours = `
		SELECT * FROM unnest(?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[],
			?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[])`
	arraysOfLatency = `SELECT * FROM unnest(?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[], ?::bigint[])`
)

// postgresLedgerStmts returns the statements whose rows are collected. Rows of tokens are locked in the order of their
// seqs: changes of administrators, which lock several too, then cannot wait for the ledger in a circle.
func postgresLedgerStmts() [ledgerStmtCount]postgresLedgerStmt {
	return [ledgerStmtCount]postgresLedgerStmt{
		stmtDeletePending: {`DELETE FROM begun WHERE batch = ANY(?::bigint[])`, 1, false},
		stmtCountTokenUse: {`
			WITH used AS (SELECT * FROM unnest(?::bigint[], ?::bigint[], ?::bigint[]) AS u (calls, last_used, seq)),
				locked AS (SELECT seq FROM tokens WHERE seq IN (SELECT seq FROM used) ORDER BY seq FOR NO KEY UPDATE)
			UPDATE tokens SET
				request_count = min(tokens.request_count, 9223372036854775807 - used.calls) + used.calls,
				last_used_at = max(coalesce(tokens.last_used_at, 0), used.last_used)
			FROM used JOIN locked ON locked.seq = used.seq WHERE tokens.seq = locked.seq`, 3, false},
		stmtRecordOK: {strings.TrimSuffix(insertOK, "VALUES ") + arraysOfOK, okColumnCount, true},
		stmtRecord:   {strings.TrimSuffix(insertRecord, "VALUES ") + arraysOfRequests, 34, true},
		stmtPrice: {`INSERT INTO billed_prices (id, price) SELECT * FROM unnest(?::bigint[], ?::text[])
			ON CONFLICT DO NOTHING`, 2, false},
		stmtSum: {strings.TrimSuffix(insertSums, "VALUES ") + arraysOfSums + addToSums, sumColumnCount, true},
		stmtSumHits: {`
			UPDATE usage_sums s SET
				cache_hits = min(s.cache_hits, 9223372036854775807 - h.hits) + h.hits,
				saved = min(s.saved, 9223372036854775807 - h.saved) + h.saved,
				saved_us = min(s.saved_us, 9223372036854775807 - h.saved_us) + h.saved_us,
				prompt_saved = min(s.prompt_saved, 9223372036854775807 - h.prompt) + h.prompt,
				client_retries = min(s.client_retries, 9223372036854775807 - h.retries) + h.retries
			FROM unnest(?::bigint[], ?::bigint[], ?::bigint[], ?::text[], ?::bigint[], ?::bigint[], ?::bigint[],
				?::text[], ?::text[], ?::text[], ?::text[], ?::text[], ?::bigint[], ?::bigint[])
				AS h (hits, saved, saved_us, grain, project, token, at, model, endpoint, outcome, asked, tier, prompt,
					retries)
			WHERE s.grain = h.grain AND s.project = h.project AND s.token = h.token AND s.at = h.at
				AND s.model = h.model AND s.endpoint = h.endpoint AND s.outcome = h.outcome AND s.asked = h.asked
				AND s.service_tier = h.tier`, 14, false},
		stmtAttributedSum: {strings.TrimSuffix(insertAttributedSum, "VALUES ") + arraysOfAttributedSums +
			addToAttributed, 24, true},
		stmtHour: {strings.TrimSuffix(insertHours, "VALUES ") + arraysOfHours + addToHours, 11, true},
		stmtLatency: {strings.TrimSuffix(insertLatency, "VALUES ") + arraysOfLatency + addToLatency,
			latencyColumnCount, true},
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
		return l.inTx(ctx, nil, func() error {
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
	rest.sumOnlyRows = slices.DeleteFunc(slices.Clone(b.sumOnlyRows), known)
	orphans := slices.DeleteFunc(slices.Clone(l.orphans), func(id int64) bool { return id == b.pendingBatchID })
	rest.endedBatchIDs = slices.Concat(b.endedBatchIDs, orphans)
	if len(rest.records)+len(rest.sumOnlyRows)+len(rest.endedBatchIDs) > 0 {
		rows := slices.Concat(rest.records, rest.sumOnlyRows)
		if err := l.inTx(ctx, rows, func() error { return l.writeRows(ctx, w, rest) }); err != nil {
			return err
		}
	}
	for _, r := range slices.Concat(b.records, b.sumOnlyRows) {
		delete(l.committed, r)
	}
	l.orphans = l.orphans[:0]
	return nil
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

// inTx runs fn, which writes rows, in a transaction that has a number of its own in ledger_commits.
func (l *postgresLedger) inTx(ctx context.Context, rows []*requestRow, fn func() error) (err error) {
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
	if _, err := execCount(ctx, l.tx, "numbering a transaction",
		`UPDATE ledger_commits SET seq = ? WHERE replica = ?`, l.seq, l.replica); err != nil {
		return err
	}
	err = l.tx.Commit()
	if err == nil {
		return nil
	}
	if sqlState(err) == "" { // the connection was lost
		l.uncertain = rows
	}
	return fmt.Errorf("committing: %w", err)
}

// settleUncertain finds out whether the last transaction was committed, if that is not known.
func (l *postgresLedger) settleUncertain(ctx context.Context) error {
	if len(l.uncertain) == 0 {
		return nil
	}
	seq, err := queryValue[int64](ctx, l.ledgerDB, "looking for the last transaction",
		`SELECT seq FROM ledger_commits WHERE replica = ?`, l.replica)
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
	for stmt := range l.collected {
		if l.collected[stmt].count == 0 {
			continue
		}
		if err := l.flush(ctx, &l.stmts[stmt], &l.collected[stmt]); err != nil {
			return err
		}
	}
	return nil
}

// send collects the rows of a statement, or runs it at once.
func (l *postgresLedger) send(ctx context.Context, stmt int, values []any) (changed int64, err error) {
	switch stmt { // those with eight rows
	case stmtRecordOK8:
		stmt = stmtRecordOK
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

// flush runs a statement with the rows that were collected.
func (l *postgresLedger) flush(ctx context.Context, s *postgresLedgerStmt, rows *postgresRows) error {
	args := make([]any, s.columns)
	for i := range args {
		args[i] = rows.columns[i].String() + "}"
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

// closedReplicas is backend.closedReplicas.
func (p *postgres) closedReplicas(ctx context.Context) ([]int64, error) {
	return collect(ctx, p.store.readDB, "looking for closed replicas", func(id *int64) []any { return []any{id} }, `
		SELECT DISTINCT replica FROM begun
		WHERE replica NOT IN (SELECT id FROM replicas WHERE closed_at IS NULL) ORDER BY replica`)
}

// pendingRecords is store.pendingRecords.
func (p *postgres) pendingRecords(ctx context.Context, replica int64, limit int) ([]requestRow, error) {
	return collect(ctx, p.store.readDB, "reading pending records", (*requestRow).recoverableColumns,
		selectRecoverable+` WHERE replica = ? ORDER BY id LIMIT ?`, replica, limit)
}

// deletePending is store.deletePending.
func (p *postgres) deletePending(ctx context.Context, replica int64) error {
	return p.store.withTx(ctx, func(tx *sql.Tx) error {
		_, err := execCount(ctx, tx, "deleting pending records", `DELETE FROM begun WHERE replica = ?`, replica)
		return err
	})
}

// lastRequestID is backend.lastRequestID.
func (p *postgres) lastRequestID(ctx context.Context, slot, from int64) (int64, error) {
	return queryValue[int64](ctx, p.store.readDB, "reading the last call",
		`SELECT coalesce(max(id), 0) FROM requests WHERE id >= ? AND id >> 11 & 1023 = ?`, from, slot)
}
