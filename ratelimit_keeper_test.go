//go:build postgres

// These tests check the keeper of leases, and calls that wait for it, against the model of the accounts in
// ratelimit_leases_test.go. They need no PostgreSQL.
package main

import (
	"context"
	"sync"
	"testing"
	"time"
)

// A leaseReplicaTest is a replica with a keeper, whose exchanges take a while.
type leaseReplicaTest struct {
	limits    *limitState
	token     *liveToken
	exchanges int
}

// newLeaseReplicas returns n replicas that share the accounts of table, with one token that has these limits.
// Everything ends with the test.
func newLeaseReplicas(t *testing.T, table *leaseTable, n int, limits string, latency time.Duration,
) (out []*leaseReplicaTest) {
	t.Helper()
	start := time.Now()
	clock := func() int64 { return noon + time.Since(start).Milliseconds() }
	ctx, cancel := context.WithCancel(context.Background())
	var keepers sync.WaitGroup
	t.Cleanup(func() { cancel(); keepers.Wait() })
	for id := range int64(n) {
		r := &leaseReplicaTest{limits: &limitState{}}
		table.replicas[id] = &leaseReplica{}
		number := int64(0)
		exchange := func(_ context.Context, items []leaseItem) ([]leaseReply, error) {
			time.Sleep(latency)
			number++
			for i := range items {
				items[i].Base = new(int64(0))
			}
			table.mu.Lock()
			table.now = clock()
			r.exchanges++
			table.mu.Unlock()
			return table.exchange(id, number, items)
		}
		r.limits.leases = newLeaseKeeper(exchange, clock)
		r.token = &liveToken{project: &liveProject{}}
		r.token.project.state.Store(&projectState{seq: 1})
		r.token.state.Store(&tokenState{seq: 2, version: 1, maxRequests: -1, policy: *testLimits(t, limits)})
		out = append(out, r)
	}
	table.recalls = func(account string, asker int64) {
		for id, r := range out {
			if int64(id) != asker {
				go r.limits.leases.recall(account)
			}
		}
	}
	for _, r := range out {
		keepers.Go(func() { r.limits.run(ctx) })
	}
	return out
}

// call starts a call as the proxy does. It returns nil if a limit refuses it.
func (r *leaseReplicaTest) call(t *testing.T, e estimate) *reservation {
	l := &r.token.project.limiter
	l.mu.Lock()
	defer l.mu.Unlock()
	now := r.limits.leases.now()
	if err := r.limits.prepare(r.token, &e, now); err != nil {
		t.Error(err)
		return nil
	}
	c := &reservation{estimate: e, began: time.Now().UnixMilli()}
	if l.reserve(c, &r.token.limits, now) != nil {
		return nil
	}
	return c
}

// TestLeasesInParallel: three replicas with many calls at once admit exactly what a limit allows, neither more nor
// less, although each of them has leased more than it needs before.
func TestLeasesInParallel(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		limit string
		want  int
	}{
		{`{"count":"requests","max":50,"per":"day"}`, 50},
		{`{"count":"requests","max":1,"per":"lifetime"}`, 1},
		{`{"count":"requests","max":50,"per":"day","shadow":true}`, 600},
		{`{"count":"concurrent","max":37}`, 37},
		{`{"count":"tokens","max":1010,"per":"month"}`, 50},
		{`{"count":"requests","max":50,"per":"day"},{"count":"concurrent","max":20}`, 20},
	} {
		t.Run(test.limit, func(t *testing.T) {
			t.Parallel()
			replicas := newLeaseReplicas(t, newLeaseTable(), 3, test.limit, time.Millisecond)
			var mu sync.Mutex
			var admitted []*reservation
			var clients sync.WaitGroup
			for i := range 600 {
				clients.Go(func() {
					if c := replicas[i%3].call(t, chatEstimate(10, 10)); c != nil {
						mu.Lock()
						defer mu.Unlock()
						admitted = append(admitted, c)
					}
				})
			}
			clients.Wait()
			if len(admitted) != test.want {
				t.Errorf("%d calls were admitted, want %d", len(admitted), test.want)
			}
		})
	}
}

// TestLeasesReturn: what one replica does not use is there for another, within two seconds in any case, at once when
// the other needs it, and also when the other hears nothing.
func TestLeasesReturn(t *testing.T) {
	t.Parallel()
	table := newLeaseTable()
	r := newLeaseReplicas(t, table, 2, `{"count":"requests","max":100,"per":"day"},{"count":"concurrent","max":4}`, 0)
	for range 3 {
		c := r[0].call(t, chatEstimate(1, 1))
		c.settle(noon, finalUsage{forwarded: true}, func([]limitUse) uint64 { return 0 })
	}
	for i := range 4 { // slots that the other has leased, but does not use
		if r[1].call(t, chatEstimate(1, 1)) == nil {
			t.Errorf("slot %d was not available", i)
		}
	}
	if r[0].call(t, chatEstimate(1, 1)) != nil {
		t.Error("a fifth call runs")
	}
	waitFor(t, "unused requests to be returned", func() bool {
		table.mu.Lock()
		defer table.mu.Unlock()
		for _, acc := range table.accounts {
			if _, unspent, busy := acc.others(-1); unspent != busy {
				return false
			}
		}
		return len(table.accounts) == 2
	})
}

// TestLeaseRoundTrips: where a limit is much larger than the traffic, at most one call of a hundred waits for the
// database; and a limit that is used up does not cost an exchange for each call that it refuses.
func TestLeaseRoundTrips(t *testing.T) {
	t.Parallel()
	const calls = 3000
	for name, limits := range map[string]string{
		"plenty":  `{"count":"requests","max":1000000,"per":"minute"},{"count":"tokens","max":100000000,"per":"day"}`,
		"used up": `{"count":"requests","max":10,"per":"day"}`,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			table := newLeaseTable()
			r := newLeaseReplicas(t, table, 3, limits, 0)
			admitted := 0
			for i := range calls {
				if c := r[i%3].call(t, chatEstimate(10, 10)); c != nil {
					c.settle(noon, finalUsage{forwarded: true, tokens: 20}, func([]limitUse) uint64 { return 0 })
					admitted++
				}
			}
			table.mu.Lock()
			defer table.mu.Unlock()
			exchanges := r[0].exchanges + r[1].exchanges + r[2].exchanges
			if exchanges > calls/100 || name == "used up" && admitted != 10 {
				t.Errorf("%d exchanges for %d calls, %d of them admitted", exchanges, calls, admitted)
			}
		})
	}
}

// testLeaseKeeper returns a keeper that exchanges nothing.
func testLeaseKeeper(now func() int64) *leaseKeeper { return newLeaseKeeper(nil, now) }

// TestLeaseOfDroppedValue: when a window begins, the counter of a value is made anew, and the one before reports no
// more: a report of both would take back what was just lent.
func TestLeaseOfDroppedValue(t *testing.T) {
	t.Parallel()
	table := newLeaseTable()
	table.now, table.replicas[1] = noon, &leaseReplica{}
	k := newLeaseKeeper(func(_ context.Context, items []leaseItem) ([]leaseReply, error) {
		return table.exchange(1, table.replicas[1].number+1, items)
	}, func() int64 { return table.now })
	l := &limiter{leases: k}
	p := testLimits(t, `{"count":"requests","max":10,"per":"hour","for_each":"end_user"}`)
	l.setPolicy(&l.project, p, false, noon, &pastUse{})
	own := l.project.counters[0]
	for range 3 {
		own.advance(table.now)
		c := own.group.insert("alice", 0, false)
		r := k.ask([]*limitCounter{c}, []int64{5}, false)
		if err := k.round(t.Context(), true); err != nil || r.err != nil {
			t.Fatal(err, r.err)
		}
		lent := table.accounts[c.lease.account].leases[1]
		if c.shortfall(5) > 0 || c.lease.granted > lent.spent+lent.unspent {
			t.Errorf("the counter may spend %d, the database has %+v", c.lease.granted, lent)
		}
		table.now += hourMS
	}
}
