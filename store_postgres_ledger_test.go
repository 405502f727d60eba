//go:build postgres

// Tests of what the ledgers of several replicas write to one PostgreSQL database.
package main

import (
	"context"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// TestPostgresRecoveryOfOne: the calls of a closed replica become lost ones, those of a database that was copied too.
// Calls of an open replica go on.
func TestPostgresRecoveryOfOne(t *testing.T) {
	requirePostgres(t)
	p := newTest(t, nil)
	st, ctx := p.instance.store, t.Context()
	closed, err := queryValue[int64](ctx, st.writeDB, "adding a replica",
		`INSERT INTO replicas (version, started_at, closed_at, slot) VALUES ('old', 0, 1, 7) RETURNING id`)
	if err != nil {
		t.Fatal(err)
	}
	own := postgresReplicaOf(t, st)
	now := time.Now().UnixMilli()
	ids := map[int64]int64{0: now << idTimeShift, closed: now<<idTimeShift | 7<<idSlotShift,
		own: now<<idTimeShift | 9<<idSlotShift}
	for replica, id := range ids {
		row := requestRow{id: id, project: 1, token: 1, endpoint: "POST /v1/responses", model: "m"}
		if _, err := st.writeDB.Exec(`INSERT INTO begun (batch, calls, replica) VALUES (?, ?, ?)`, id,
			string(append(row.appendPendingRecord([]byte{'['}), ']')), replica); err != nil {
			t.Fatal(err)
		}
	}
	var left []int64
	lost, err := st.backend.recoverClosed(ctx, func(ctx context.Context, w *ledgerWriter, replica int64) (int, error) {
		left = append(left, replica)
		return recoverLost(ctx, st, w, func(*requestRow) error { return nil }, replica)
	})
	if err != nil || lost != 2 || !slices.Equal(left, []int64{0, closed}) {
		t.Errorf("%d lost calls of the replicas %v, %v", lost, left, err)
	}
	for replica, id := range ids {
		want := outcomeLost
		if replica == own {
			want = outcomeOpen
		}
		if v, err := st.requestByID(ctx, id); err != nil || v.outcome != want {
			t.Errorf("the call of replica %d is %s, %v; want %s", replica, v.outcome, err, want)
		}
	}
	for slot, want := range map[int64]int64{0: ids[0], 7: ids[closed], 9: 0, 8: 0} {
		if id, err := st.backend.lastRequestID(ctx, slot, minIDAt(time.UnixMilli(now))); id != want || err != nil {
			t.Errorf("the last id of slot %d: %d %v, want %d", slot, id, err, want)
		}
	}
	p.execSQL(`DELETE FROM begun`)
}

// postgresReplicaOf returns the newest open replica of a database.
func postgresReplicaOf(t *testing.T, st *store) int64 {
	t.Helper()
	id, err := queryValue[int64](t.Context(), st.readDB, "reading the replica",
		`SELECT max(id) FROM replicas WHERE closed_at IS NULL`)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// TestPostgresSumsBySlot: replicas add to sums of their own. What reports say does not depend on the slot, nor on
// whether the sums were added up.
func TestPostgresSumsBySlot(t *testing.T) {
	requirePostgres(t)
	p := newTest(t, nil)
	p.manage("PATCH", "/manage/projects/"+p.project, `{"policy":{"attribution":{"tags":["team"]},
		"limits":[{"for_each":"session","count":"requests","max":100,"per":"month"}]}}`, 200, nil)
	st := p.instance.store
	var slot atomic.Int64
	st.backend.slot = slot.Load
	call := func(session string) {
		t.Helper()
		if res := p.do("POST", "/v1/chat/completions", chatBody(), "Content-Type", "application/json", "Authorization",
			"Bearer "+p.token, sessionHeader, session, tagsHeader, "team=a"); res.status != 200 {
			t.Fatalf("got %d %s", res.status, res.body)
		}
	}
	for i := range 6 {
		slot.Store([]int64{0, 3, 1023}[i%3])
		call([]string{"s1", "s2"}[i%2])
		p.waitSettled()
	}
	reports := func() (text string) {
		t.Helper()
		for _, query := range []string{"?interval=hour", "?interval=day&group_by=token", "?group_by=model,outcome",
			"?group_by=session", "?group_by=tag:team,endpoint", "?interval=month&group_by=project"} {
			text += string(p.manageAs(p.adminKey, "GET", "/manage/usage"+query, "").body) + "\n"
		}
		return text + string(p.manageAs(p.adminKey, "GET", "/manage/projects/"+p.project+"?limit_values=10", "").body)
	}
	rows := func(where string) (counts string) {
		t.Helper()
		for _, table := range []string{"usage_sums", "project_hours", "project_latency", "attribution_sums"} {
			n, err := queryValue[int64](t.Context(), st.readDB, "counting", `SELECT count(*) FROM `+table+where)
			if err != nil {
				t.Fatal(err)
			}
			counts += fmt.Sprint(table, " ", n, " ")
		}
		return counts
	}
	p.checkSums()
	before := reports()
	if !strings.Contains(before, `"calls":6`) || strings.Count(before, `"used":3`) != 2 {
		t.Errorf("the reports before: %s", before)
	}
	for _, slot := range []string{"0", "3", "1023"} {
		if n := rows(` WHERE slot = ` + slot); !strings.HasPrefix(n, "usage_sums 8 project_hours 2 ") {
			t.Errorf("slot %s has %s", slot, n)
		}
	}
	merge := func(now time.Time) (merged int64) {
		t.Helper()
		for range 1000 {
			n, err := st.backend.mergeSlots(t.Context(), now.UnixMilli(), 3)
			if err != nil {
				t.Fatal(err)
			}
			if merged += n; n == 0 {
				break
			}
		}
		return merged
	}
	if n := merge(time.Now()); n > 0 {
		t.Errorf("%d rows of the current hour were added up", n)
	}
	tomorrow := time.Now().Add(26 * time.Hour)
	none := rows(` WHERE false`)
	if n := merge(tomorrow); n == 0 || rows(` WHERE slot > 0`) != none {
		t.Errorf("%d rows were added up; there are %s", n, rows(` WHERE slot > 0`))
	}
	if after := reports(); after != before {
		t.Errorf("the reports after: %s\nbefore: %s", after, before)
	}
	// While sums are added up, none is lost, and the ledger goes on.
	var merging sync.WaitGroup
	ctx, stop := context.WithCancel(t.Context())
	merging.Go(func() {
		for ctx.Err() == nil {
			merge(tomorrow)
		}
	})
	slot.Store(5)
	for i := range 60 {
		slot.Store(int64(i % 4))
		call("s3")
		if i%10 == 9 {
			p.waitSettled()
		}
	}
	p.waitSettled()
	stop()
	merging.Wait()
	p.checkSums()
	p.checkCounts()
	if merge(tomorrow); rows(` WHERE slot > 0`) != none {
		t.Errorf("in the end there are %s", rows(` WHERE slot > 0`))
	}
}

// TestPostgresMergeOfLargeSums: sums that are too large for a column stay at the largest value. Parts may be negative.
func TestPostgresMergeOfLargeSums(t *testing.T) {
	requirePostgres(t)
	p := newTest(t, nil)
	p.execSQL(`INSERT INTO project_hours (project, at, calls, input_tokens, output_tokens, cost, unpriced_calls,
			caller_errors, policy_errors, provider_errors, proxy_errors, slot)
		VALUES (9, 0, 1, 9223372036854775807, -2, 0, 0, 0, 0, 0, 0, 0),
			(9, 0, 1, 9223372036854775807, 5, -1, 0, 0, 0, 0, 0, 1),
			(9, 0, 1, 9223372036854775807, 5, -1, 0, 0, 0, 0, 0, 2)`)
	if n, err := p.instance.store.backend.mergeSlots(t.Context(), time.Now().UnixMilli(), 10); err != nil || n == 0 {
		t.Fatal(n, err)
	}
	h, err := p.instance.store.sumHours(t.Context(), 9, 0, 1)
	if err != nil || h.calls != 3 || h.input != math.MaxInt64 || h.output != 8 || h.cost != -2 {
		t.Errorf("%+v %v", h, err)
	}
}

// TestPostgresEraseDuringMerge: the sums of an erased end user that are being added up at that moment are erased, too.
func TestPostgresEraseDuringMerge(t *testing.T) {
	requirePostgres(t)
	p := newTest(t, nil)
	st, ctx := p.instance.store, t.Context()
	project, err := st.projectByID(ctx, p.project)
	if err != nil {
		t.Fatal(err)
	}
	p.execSQL(fmt.Sprintf(`INSERT INTO attribution_sums (project, attribute, at, value, token, model, endpoint, outcome,
			asked, calls, input_tokens, cached_tokens, output_tokens, reasoning_tokens, cost, unpriced_calls,
			estimated_calls, would_refuse, total_us, cache_hits, saved, saved_us, prompt_saved, slot)
		VALUES (%d, 'end_user', 0, 'ann', 1, 'm', 'e', 'ok', '', 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7)`,
		project.seq))
	merging, err := st.writeDB.BeginTx(ctx, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer merging.Rollback()
	if _, err := merging.ExecContext(ctx, mergedAttributed+mergeSums, hourMS, 10); err != nil {
		t.Fatal(err)
	}
	erased := make(chan error, 1)
	go func() {
		_, err := st.eraseEndUser(ctx, project.seq, "ann", func() error { return nil })
		erased <- err
	}()
	waitFor(t, "an erasure that waits", func() bool { return p.countRows(`pg_locks WHERE NOT granted`) > 0 })
	if err := merging.Commit(); err != nil {
		t.Fatal(err)
	}
	if err := <-erased; err != nil {
		t.Error(err)
	}
	if n := p.countRows(`attribution_sums WHERE value = 'ann'`); n > 0 {
		t.Errorf("%d sums have the name", n)
	}
}

// TestPostgresRestartRecordsFirst: a process that is started again records what its predecessor has kept before any
// other replica records the predecessor's calls as lost.
func TestPostgresRestartRecordsFirst(t *testing.T) {
	requirePostgres(t)
	other := openReplicas(t, newTestDatabase(t), 1)[0]
	ctx, db := t.Context(), other.store.writeDB
	id := time.Now().UnixMilli()<<idTimeShift | 7<<idSlotShift
	row := requestRow{id: id, project: 1, token: 1, endpoint: "POST /v1/responses", model: "m"}
	if _, err := db.Exec(`INSERT INTO replicas (version, started_at, slot, nonce)
		VALUES ('dev', 0, 7, 'before')`); err != nil {
		t.Fatal(err)
	}
	if _, err := db.Exec(`INSERT INTO begun (batch, calls, replica)
		SELECT ?1::bigint, ?2, id FROM replicas WHERE slot = 7`,
		id, string(append(row.appendPendingRecord([]byte{'['}), ']'))); err != nil {
		t.Fatal(err)
	}
	config := *other.config
	config.nonce, config.previousNonce = "after", "before"
	again, err := newPostgres(ctx, &config, true)
	if err != nil {
		t.Fatal(err)
	}
	defer again.store.close()
	again.started()
	recover := func(ctx context.Context, p *postgres) (lost int, err error) {
		return p.recoverClosed(ctx, func(ctx context.Context, w *ledgerWriter, replica int64) (int, error) {
			return recoverLost(ctx, p.store, w, func(*requestRow) error { return nil }, replica)
		})
	}
	short, cancel := context.WithTimeout(ctx, 3*lockPause)
	defer cancel()
	if lost, err := recover(short, other); lost > 0 || err == nil {
		t.Errorf("another replica has recorded %d lost calls before the file was: %v", lost, err)
	}
	if lost, err := recover(ctx, again); lost != 1 || err != nil {
		t.Errorf("the process has recorded %d lost calls: %v", lost, err)
	}
	if lost, err := recover(ctx, other); lost > 0 || err != nil {
		t.Errorf("another replica has recorded %d lost calls again: %v", lost, err)
	}
}
