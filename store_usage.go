// SQL for the ledger: begin and settle in groups, sums, recovery after a
// crash, retention, and what /manage reads of it.
package main

import (
	"context"
	"database/sql"
	"database/sql/driver"
	"fmt"
	"maps"
	"strings"
)

// A requestRow is one call in the ledger. Its first part is known when it begins.
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
	attemptLog  string      // JSON, "" of a call that needed one attempt
	limitHit    string      // the limit that refused the call, or a shadow limit that would have
	wouldRefuse bool        // it is a shadow limit
	asked       string      // the model asked for
	content     *contentRow // nil: not kept
	knownModel  bool        // the model may name a sum of its own (see sumModel)
	knownAsked  bool        // so may the model asked for
}

// An outcome says how a call ended, as the ledger writes it.
type outcome string

const (
	outcomeOpen          outcome = "open" // it runs
	outcomeOK            outcome = "ok"
	outcomeRefused       outcome = "refused"        // by us: no right, no room, not allowed
	outcomeClientGone    outcome = "client_gone"    // the client left before the end
	outcomeTruncated     outcome = "truncated"      // we or the provider cut an answer that had begun
	outcomeUpstreamError outcome = "upstream_error" // the provider failed or answered 4xx/5xx
	outcomeLost          outcome = "lost"           // the program died during the call
)

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

const (
	hourMS = 3_600_000
	dayMS  = 24 * hourMS
)

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
