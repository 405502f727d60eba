// SQL for the ledger: begin and settle in groups, sums, recovery after a
// crash, retention, and what /manage reads of it.
package main

import (
	"context"
	"database/sql"
	"fmt"
)

// A requestRow is one call in the ledger. begin writes the first part, settle
// the second.
type requestRow struct {
	id       int64
	started  int64 // unix milliseconds
	project  int64
	token    int64
	endpoint string
	stream   bool
	address  string

	upstream    int64
	model       string
	status      int
	outcome     outcome
	errorCode   string
	source      usageSource
	counts      tokenCounts
	cost        int64 // nano-dollars; meaningful only if priced
	priced      bool
	firstByteUS int64 // -1: none left
	totalUS     int64
	attempts    int
	cache       string
	knownModel  bool // the model may name a sum of its own (see sumModel)
}

// An outcome says how a call ended, as the ledger writes it.
type outcome string

const (
	outcomeOpen          outcome = "open"
	outcomeOK            outcome = "ok"
	outcomeRefused       outcome = "refused"        // by us: no right, no room, not allowed
	outcomeClientGone    outcome = "client_gone"    // the client left before the end
	outcomeTruncated     outcome = "truncated"      // we or the provider cut an answer that had begun
	outcomeUpstreamError outcome = "upstream_error" // the provider failed or answered 4xx/5xx
	outcomeLost          outcome = "lost"           // the program died during the call
)

// A sumKey names one row of usage_sums but for its grain.
type sumKey struct {
	token, project  int64
	started         int64 // cut to the grain by the caller
	model, endpoint string
	outcome         outcome
}

// A sum is what usage_sums adds up.
type sum struct {
	calls, input, cached, output, reasoning int64
	cost, unpriced, estimated, totalUS      int64
}

func (s *sum) add(r *requestRow) {
	s.calls++
	s.input += r.counts.input
	s.cached += r.counts.cached
	s.output += r.counts.output
	s.reasoning += r.counts.reasoning
	if r.priced {
		s.cost += r.cost
	} else if r.source != usageNone {
		s.unpriced++
	}
	if r.source == usageEstimated {
		s.estimated++
	}
	s.totalUS += r.totalUS
}

// ledgerStatements are prepared once on the writing connection.
type ledgerStatements struct {
	begin, count, settle, settleOK, record, sum *sql.Stmt
}

func (s *store) prepareLedger(ctx context.Context) (*ledgerStatements, error) {
	l := &ledgerStatements{}
	for _, p := range []struct {
		to   **sql.Stmt
		text string
	}{
		{&l.begin, `
			INSERT INTO requests (id, project, token, upstream, endpoint, model, stream, address, outcome, usage_source, input_tokens, output_tokens)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'open', 'estimated', ?, ?)`},
		{&l.count, `UPDATE tokens SET request_count = request_count + ?, last_used_at = max(coalesce(last_used_at, 0), ?) WHERE seq = ?`},
		{&l.settle, `
			UPDATE requests SET upstream = ?, model = ?, status = ?, outcome = ?, error_code = ?, usage_source = ?,
				input_tokens = ?, cached_tokens = ?, cache_write_tokens = ?, output_tokens = ?, reasoning_tokens = ?,
				cost = ?, first_byte_us = ?, total_us = ?, attempts = ?, cache = ?
			WHERE id = ?`},
		{&l.settleOK, `
			UPDATE requests SET model = ?, status = 200, outcome = 'ok', usage_source = 'exact', input_tokens = ?, output_tokens = ?,
				cost = ?, first_byte_us = ?, total_us = ?
			WHERE id = ?`},
		{&l.record, `
			INSERT INTO requests (upstream, model, status, outcome, error_code, usage_source,
				input_tokens, cached_tokens, cache_write_tokens, output_tokens, reasoning_tokens,
				cost, first_byte_us, total_us, attempts, cache, id, project, token, endpoint, stream, address)
			VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)`},
		{&l.sum, sumStatement},
	} {
		var err error
		if *p.to, err = s.write.PrepareContext(ctx, p.text); err != nil {
			return nil, fmt.Errorf("preparing the ledger: %w", err)
		}
	}
	return l, nil
}

const sumStatement = `
	INSERT INTO usage_sums (grain, token, at, project, model, endpoint, outcome,
		calls, input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost, unpriced_calls, estimated_calls, total_us)
	VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
	ON CONFLICT DO UPDATE SET calls = calls + excluded.calls,
		input_tokens = input_tokens + excluded.input_tokens, cached_tokens = cached_tokens + excluded.cached_tokens,
		output_tokens = output_tokens + excluded.output_tokens, reasoning_tokens = reasoning_tokens + excluded.reasoning_tokens,
		cost = cost + excluded.cost, unpriced_calls = unpriced_calls + excluded.unpriced_calls,
		estimated_calls = estimated_calls + excluded.estimated_calls, total_us = total_us + excluded.total_us`

func (l *ledgerStatements) close() {
	for _, st := range []*sql.Stmt{l.begin, l.count, l.settle, l.settleOK, l.record, l.sum} {
		st.Close()
	}
}

func nullUnless(ok bool, v int64) any {
	if ok {
		return v
	}
	return nil
}

// settlement returns the arguments that settle and record share.
func (r *requestRow) settlement() []any {
	return []any{r.upstream, r.model, r.status, string(r.outcome), r.errorCode, string(r.source),
		r.counts.input, r.counts.cached, r.counts.cacheWrite, r.counts.output, r.counts.reasoning,
		nullUnless(r.priced, r.cost), nullUnless(r.firstByteUS >= 0, r.firstByteUS), r.totalUS, r.attempts, r.cache, r.id}
}

// ordinary reports whether all that settling changes in the row is what a plain
// successful call changes. Most are such, and each column costs.
func (r *requestRow) ordinary() bool {
	return r.outcome == outcomeOK && r.status == 200 && r.source == usageExact && r.priced && r.firstByteUS >= 0 &&
		r.counts.cached == 0 && r.counts.cacheWrite == 0 && r.counts.reasoning == 0 && r.attempts == 1 && r.errorCode == "" && r.cache == ""
}

// sumModel is the model under which a call is summed. A name that a client made
// up must not make a row, or one client could fill the disk with them.
func (r *requestRow) sumModel() string {
	if r.knownModel {
		return r.model
	}
	return ""
}

// A ledgerBatch is what one transaction writes.
type ledgerBatch struct {
	begins  []*requestRow // as they were when begun
	settles []*requestRow // begun before
	records []*requestRow // never begun: begin and settle in one
	sums    []*requestRow // counted in the sums only
}

// writeLedger writes a batch: all of it, or nothing.
func (s *store) writeLedger(ctx context.Context, l *ledgerStatements, b ledgerBatch) error {
	return s.tx(ctx, func(tx *sql.Tx) error {
		if err := l.writeRows(ctx, tx, b); err != nil {
			return err
		}
		if len(b.settles)+len(b.records)+len(b.sums) == 0 {
			return nil
		}
		sums := map[sumKey]*sum{}
		for _, rows := range [][]*requestRow{b.settles, b.records, b.sums} {
			for _, r := range rows {
				addSum(sums, r)
			}
		}
		st := tx.StmtContext(ctx, l.sum)
		defer st.Close()
		for k, v := range sums {
			if err := writeSum(ctx, st, k, v); err != nil {
				return err
			}
		}
		return nil
	})
}

func (l *ledgerStatements) writeRows(ctx context.Context, tx *sql.Tx, b ledgerBatch) error {
	type used struct{ calls, at int64 }
	counts := map[int64]used{}
	count := func(r *requestRow) {
		u := counts[r.token]
		counts[r.token] = used{u.calls + 1, max(u.at, r.started)}
	}
	if len(b.begins) > 0 {
		st := tx.StmtContext(ctx, l.begin)
		defer st.Close()
		for _, r := range b.begins {
			if _, err := st.ExecContext(ctx, r.id, r.project, r.token, r.upstream, r.endpoint, r.model, r.stream, r.address,
				r.counts.input, r.counts.output); err != nil {
				return fmt.Errorf("beginning a row: %w", err)
			}
			count(r)
		}
	}
	if len(b.settles) > 0 {
		full, short := tx.StmtContext(ctx, l.settle), tx.StmtContext(ctx, l.settleOK)
		defer full.Close()
		defer short.Close()
		for _, r := range b.settles {
			var err error
			if r.ordinary() {
				_, err = short.ExecContext(ctx, r.model, r.counts.input, r.counts.output, r.cost, r.firstByteUS, r.totalUS, r.id)
			} else {
				_, err = full.ExecContext(ctx, r.settlement()...)
			}
			if err != nil {
				return fmt.Errorf("settling a row: %w", err)
			}
		}
	}
	if len(b.records) > 0 {
		st := tx.StmtContext(ctx, l.record)
		defer st.Close()
		for _, r := range b.records {
			args := append(r.settlement(), r.project, r.token, r.endpoint, r.stream, r.address)
			if _, err := st.ExecContext(ctx, args...); err != nil {
				return fmt.Errorf("recording a row: %w", err)
			}
			if r.outcome != outcomeRefused {
				count(r)
			}
		}
	}
	if len(counts) > 0 {
		st := tx.StmtContext(ctx, l.count)
		defer st.Close()
		for token, u := range counts {
			if _, err := st.ExecContext(ctx, u.calls, u.at, token); err != nil {
				return fmt.Errorf("counting calls: %w", err)
			}
		}
	}
	return nil
}

const (
	hourMS = 3_600_000
	dayMS  = 24 * hourMS
)

func addSum(sums map[sumKey]*sum, r *requestRow) {
	k := sumKey{r.token, r.project, r.started - r.started%hourMS, r.sumModel(), r.endpoint, r.outcome}
	v := sums[k]
	if v == nil {
		v = &sum{}
		sums[k] = v
	}
	v.add(r)
}

// writeSum adds v to four rows: the hour and the day, of the token and of its
// project.
func writeSum(ctx context.Context, st *sql.Stmt, k sumKey, v *sum) error {
	for _, to := range []struct {
		grain     string
		token, at int64
	}{
		{"hour", k.token, k.started}, {"hour", 0, k.started},
		{"day", k.token, k.started - k.started%dayMS}, {"day", 0, k.started - k.started%dayMS},
	} {
		if _, err := st.ExecContext(ctx, to.grain, to.token, to.at, k.project, k.model, k.endpoint, string(k.outcome),
			v.calls, v.input, v.cached, v.output, v.reasoning, v.cost, v.unpriced, v.estimated, v.totalUS); err != nil {
			return fmt.Errorf("adding to the sums: %w", err)
		}
	}
	return nil
}

// recoverLost finds the rows that a dead process left open, from row id from
// on, and turns them into lost ones with the estimate they were begun with. It
// works in steps of limit rows and returns how many it turned and where to go
// on; 0 rows: done. finish may fill in a row's cost.
func (s *store) recoverLost(ctx context.Context, from int64, limit int, finish func(*requestRow)) (n int, next int64, err error) {
	err = s.tx(ctx, func(tx *sql.Tx) error {
		rows, err := tx.QueryContext(ctx, `
			SELECT id, started_at, project, token, upstream, endpoint, model, stream, address, input_tokens, output_tokens
			FROM requests WHERE id >= ? AND outcome = 'open' ORDER BY id LIMIT ?`, from, limit)
		if err != nil {
			return fmt.Errorf("reading open rows: %w", err)
		}
		defer rows.Close()
		sums := map[sumKey]*sum{}
		var lost []*requestRow
		for rows.Next() {
			r := &requestRow{outcome: outcomeLost, errorCode: "process_died", source: usageEstimated, firstByteUS: -1}
			if err := rows.Scan(&r.id, &r.started, &r.project, &r.token, &r.upstream, &r.endpoint, &r.model, &r.stream, &r.address,
				&r.counts.input, &r.counts.output); err != nil {
				return fmt.Errorf("reading open rows: %w", err)
			}
			finish(r)
			addSum(sums, r)
			lost = append(lost, r)
		}
		if err := rows.Err(); err != nil {
			return fmt.Errorf("reading open rows: %w", err)
		}
		for _, r := range lost {
			if _, err := tx.ExecContext(ctx, `
				UPDATE requests SET outcome = ?, error_code = ?, cost = ?, total_us = 0 WHERE id = ?`,
				string(r.outcome), r.errorCode, nullUnless(r.priced, r.cost), r.id); err != nil {
				return fmt.Errorf("closing a lost row: %w", err)
			}
			n, next = n+1, r.id+1
		}
		st, err := tx.PrepareContext(ctx, sumStatement)
		if err != nil {
			return fmt.Errorf("preparing sums: %w", err)
		}
		defer st.Close()
		for k, v := range sums {
			if err := writeSum(ctx, st, k, v); err != nil {
				return err
			}
		}
		return nil
	})
	return n, next, err
}

// forgetRequests deletes up to limit settled rows with an id below before, and
// returns how many. forgetSums does the same for hourly sums.
func (s *store) forgetRequests(ctx context.Context, before int64, limit int) (int64, error) {
	res, err := s.write.ExecContext(ctx, `
		DELETE FROM requests WHERE id IN (SELECT id FROM requests WHERE id < ? AND outcome <> 'open' ORDER BY id LIMIT ?)`, before, limit)
	if err != nil {
		return 0, fmt.Errorf("deleting old rows: %w", err)
	}
	return res.RowsAffected()
}

func (s *store) forgetSums(ctx context.Context, before int64, limit int) (int64, error) {
	res, err := s.write.ExecContext(ctx, `
		DELETE FROM usage_sums WHERE (grain, token, at, project, model, endpoint, outcome) IN (
			SELECT grain, token, at, project, model, endpoint, outcome FROM usage_sums
			WHERE grain = 'hour' AND at < ?1 AND token <> 0 LIMIT ?2)`, before, limit)
	if err != nil {
		return 0, fmt.Errorf("deleting old sums: %w", err)
	}
	return res.RowsAffected()
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
	s.totalUS += o.totalUS
}
