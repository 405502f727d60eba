//go:build postgres

// Tests of what the ledgers of several replicas write to one PostgreSQL database.
package main

import (
	"slices"
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
		`INSERT INTO replicas (version, started_at, closed_at) VALUES ('old', 0, 1) RETURNING id`)
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
	left, err := st.backend.closedReplicas(ctx)
	if err != nil || !slices.Equal(left, []int64{0, closed}) {
		t.Fatalf("closed replicas: %v %v", left, err)
	}
	w := st.newLedgerWriter()
	for _, replica := range left {
		if n, err := recoverLost(ctx, st, w, func(*requestRow) error { return nil }, replica); n != 1 || err != nil {
			t.Errorf("replica %d: %d %v", replica, n, err)
		}
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
